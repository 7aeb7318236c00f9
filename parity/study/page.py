"""What `study` found: tables for people, plots, and one page that needs nothing else. Each part says its own."""

import base64
from pathlib import Path

from rich.console import Console

from parity.cases.files import writing
from parity.study.engine import PARTS
from parity.study.part import PAGES, Plot, Study


def print_study(console: Console, study: Study) -> None:
    """The table of every part that has one."""
    tables = [table for part in PARTS if (table := part.table(study))]
    for i, table in enumerate(tables):
        if i:
            console.print()
        console.print(table)


def plots(study: Study) -> dict[str, Plot]:
    """By file name."""
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
    return PAGES.get_template("page.html.j2").render(header=study.header, sections=sections)


def write(study: Study, folder: Path) -> list[Path]:
    """The page, the plots and all figures, a JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"index.html": page(study), "study.jsonl": "\n".join(study.lines()) + "\n"}
    files |= {name: plot.svg for name, plot in plots(study).items()}
    for name, text in files.items():
        with writing(folder / name) as path:
            path.write_text(text)
    return [folder / name for name in files]
