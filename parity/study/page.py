"""What `study` found: tables for people, plots, and one page that needs nothing else. Each part says its own."""

import base64
from pathlib import Path

from rich.console import Console

from parity.cases.files import writing
from parity.study import dispatch
from parity.study.dispatch import Dispatch
from parity.study.engine import PARTS
from parity.study.part import PAGES, Plot, Study, tables


def answers(study: Study) -> list[str]:
    """The answers of all parts, in sentences."""
    return [sentence for part in PARTS for sentence in part.answer(study)]


def print_study(console: Console, study: Study) -> None:
    """The answer, and the table of every part that has one, as wide as the console."""
    for sentence in answers(study):
        console.print(sentence, markup=False)
    for part in PARTS:
        if found := part.table(study):
            console.print()
            console.print(found.title, markup=False)
            for table in tables(found, console.width):
                console.print()
                console.print(table)


def plots(study: Study) -> dict[str, Plot]:
    """All plots, by file name."""
    return {name: plot for part in PARTS for name, plot in part.plots(study).items()}


def page(study: Study) -> str:
    """A section for every part that found something: the small dispatch to step through, tables, plots."""
    sections = [
        (
            part.section(study),
            [(base64.b64encode(p.svg.encode()).decode(), p.caption) for p in part.plots(study).values()],
        )
        for part in PARTS
    ]
    return PAGES.get_template("page.html.j2").render(header=study.header, answers=answers(study), sections=sections)


def write(study: Study, folder: Path) -> list[Path]:
    """The page, the dispatch alone on one, the plots, and all figures, a JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"index.html": page(study), "study.jsonl": "\n".join(study.lines()) + "\n"}
    if dispatches := study.of(Dispatch):
        files["dispatch.html"] = dispatch.page(dispatches)
    files |= {name: plot.svg for name, plot in plots(study).items()}
    for name, text in files.items():
        with writing(folder / name) as path:
            path.write_text(text)
    return [folder / name for name in files]
