"""The figures of `bench` as tables for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.bench import DIRECTIONS, PARTS, Figure


def print_bench(console: Console, figures: Sequence[Figure]) -> None:
    """A table of row movements and one of experts for each shape, under the copies that floors are counted with."""
    for figure in figures:
        if figure.error:
            what = f"{figure.side} {figure.shape} {figure.variant} {figure.part} {figure.direction}"
            console.print(f"{what}: {figure.error.splitlines()[0]}", style="red", markup=False)
        elif figure.part == "copy":
            rate = figure.bytes / figure.median / 1e9
            console.print(f"{figure.side} copies {figure.bytes / 2e6:.0f} MB at {rate:.0f} GB/s on {figure.device}")
    for shape in dict.fromkeys(figure.shape for figure in figures if figure.shape):
        found = [figure for figure in figures if figure.shape == shape]
        console.print()
        for title, part_of, row in (
            (f"{shape}: rows moved", lambda part: part != "experts", _movement_cells),
            (f"{shape}: experts", lambda part: part == "experts", _expert_cells),
        ):
            chosen = [figure for figure in found if part_of(figure.part)]
            if chosen:
                console.print(_table(title, chosen, row))


def _table(title: str, figures: Sequence[Figure], cells) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("side")
    table.add_column("variant")
    table.add_column("part")
    headers = ("ms", "±", "of floor", "peak MB", "launches", "syncs") if cells is _movement_cells else (
        "ms", "±", "TFLOP/s", "peak MB")  # fmt: skip
    for short in ("fwd", "fwd+bwd"):
        for header in headers:
            table.add_column(f"{short}\n{header}", justify="right", no_wrap=True)
    by_line: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for figure in figures:
        by_line.setdefault((figure.side, figure.variant, figure.part), {})[figure.direction] = figure
    order = {part: i for i, part in enumerate(PARTS)}
    sides = list(dict.fromkeys((side, variant) for side, variant, _ in by_line))
    for line in sorted(by_line, key=lambda line: (sides.index(line[:2]), order[line[2]])):
        both = [cell for name in DIRECTIONS for cell in cells(by_line[line].get(name))]
        table.add_row(*line, *both, style="bold" if line[2] == "whole" else "", end_section=line[2] == "whole")
    return table


def _movement_cells(figure: Figure | None) -> list[str | Text]:
    if figure is None or figure.error:
        return ["-"] * 6
    share = "-" if figure.share is None else Text(f"{figure.share:.2f}", style=_color(figure.share))
    return [*_times(figure), share, _megabytes(figure), _count(figure.launches), _count(figure.syncs)]


def _expert_cells(figure: Figure | None) -> list[str | Text]:
    if figure is None or figure.error:
        return ["-"] * 4
    return [*_times(figure), f"{figure.flops / figure.median / 1e12:.3g}", _megabytes(figure)]


def _times(figure: Figure) -> tuple[str, str]:
    """The median, and half the distance between the quartiles as a share of it."""
    return f"{figure.median * 1e3:.3f}", f"{(figure.high - figure.low) / 2 / figure.median:.0%}"


def _megabytes(figure: Figure) -> str:
    return "-" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f}"


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _color(share: float) -> str:
    return "green" if share >= 0.8 else "yellow" if share >= 0.5 else "red"
