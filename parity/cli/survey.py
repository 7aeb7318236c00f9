"""`python -m parity survey`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.cases.files import writing
from parity.cli.shared import MATCH, MISMATCH, Json, Page, check_writable, not_a_terminal, say, working
from parity.judge.engine import progress
from parity.run import ours
from parity.survey import engine
from parity.survey.differences import whole
from parity.survey.layers import installed
from parity.survey.moving import text
from parity.survey.page import page
from parity.survey.records import LINES, Survey, Surveyed, load


@dataclass
class Command:
    """Which published layers are the same function, and what sets the others apart?

    Runs every published layer whose package is installed, each in a process of its own: every MoE block of
    transformers, as its own configuration has it, and those of Megatron-Core, torchtitan, tokamax and MaxText.
    Identifies each layer, proves that by its output and gradients, and gives it the same inputs as all others. Writes a
    page with a row per layer and a column per property, and for any two layers what moving weights between them takes.
    A layer whose result is in the folder is not run again, unless it is named.

    Exit code: 0 every layer has a card that is proved, 1 otherwise, 2 wrong usage.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity survey                       half an hour on two cores
        python -m parity survey families:mixtral maxtext:dense     and the way from the first to the second
        python -m parity survey families:qwen3_moe,norm_topk_prob=True    with another setting than the default
        python -m parity survey easydel@PATH/TO/python --out survey
    """

    layers: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAMES]")] = ()
    """Layers, named as for `check --backend`. Default: all that are installed."""
    out: Path = Path("survey")
    """Folder for index.html, one JSON line per layer and dtype, and the outputs of the layers."""
    dtype: tuple[Literal["float32", "bfloat16", "float16", "float64"], ...] = ("float32", "bfloat16")
    """Dtypes in which each layer runs."""
    jobs: int = os.cpu_count() or 1
    """Number of layers to run at a time. Default: the number of CPUs."""
    timeout: float = 600
    """Seconds after which a layer is stopped; time that it waits for a CPU does not count."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, one per layer and dtype, the default when output is not a terminal; --no-json prints the table."""


def run(command: Command) -> int:
    """Run `survey`; its exit code."""
    if command.jobs < 1 or not command.timeout > 0:
        raise ValueError(f"--jobs {command.jobs} --timeout {command.timeout:g}: both must be positive")
    for name in command.layers:
        ours.find(name)
    command.out.mkdir(parents=True, exist_ok=True)
    check_writable(command.out / "index.html")
    done = {(one.layer, one.dtype) for one in load(command.out)}
    names = list(command.layers or (name for name in installed() if any((name, d) not in done for d in command.dtype)))
    if not names and not done:
        raise ValueError("no published layer is installed here: `python -m parity backends` says which there are")
    with working("reading what each layer keeps"):
        about = engine.known(names)
    with progress() as bar:
        task = bar.add_task("layers", total=len(names) * len(command.dtype))
        for one in engine.run(names, command.dtype, command.out, command.jobs, command.timeout, about):
            bar.advance(task)
            if command.json:
                print(msgspec.json.encode(one).decode(), flush=True)
            elif one.why:
                bar.console.print(f"{one.layer} {one.dtype}: {one.why}", markup=False, highlight=False)
    survey = whole(command.out)
    if not command.json:
        print_survey(Page(120), survey)
        for way in ways(survey, command.layers, command.dtype):
            Page(120).print(way, markup=False, soft_wrap=True)
    with writing(command.out / "index.html") as path:
        path.write_text(page(survey))
    say(f"wrote {command.out / 'index.html'} and {command.out / LINES}")
    return MATCH if all(one.card and one.card.proved for one in survey.layers) else MISMATCH


def ways(survey: Survey, names: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    """If two layers were named, how to move weights from the first to the second, in each dtype."""
    found = []
    for dtype in dtypes if len(names) == 2 else ():
        place = {one.layer: i for i, one in enumerate(survey.layers) if one.dtype == dtype and one.card}
        if set(names) <= place.keys():
            i, j = (place[name] for name in names)
            apart = survey.apart.get(f"{min(i, j)} {max(i, j)}", [])
            found.append("\n" + text(survey.layers[i], survey.layers[j], apart))
    return found


def print_survey(console: Console, survey: Survey) -> None:
    """Groups of layers that are one function, those that are not proved, and those that could not be asked."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("dtype", "layers that are one function"):
        table.add_column(column, overflow="fold")
    for group in survey.groups:
        members = [survey.layers[i] for i in group]
        names = Text(", ").join(
            Text(one.layer, "" if one.card and one.card.proved else "bold yellow") for one in members
        )
        table.add_row(members[0].dtype, names)
    console.print(table)
    for one in survey.layers:
        if one.card and not one.card.proved:
            console.print(Text.assemble((f"{one.layer} {one.dtype}", "bold yellow"), f": not proved: {one.card.proof}"))
    for one in survey.layers:
        if one.card is None:
            console.print(Text.assemble((f"{one.layer} {one.dtype}", "bold"), f": no card: {one.why}"))
    cards: list[Surveyed] = [one for one in survey.layers if one.card]
    proved = sum(bool(one.card and one.card.proved) for one in cards)
    console.print(
        f"\n{len(survey.layers)} layers and dtypes, {len(cards)} cards, {proved} proved; {len(survey.groups)} functions"
    )
