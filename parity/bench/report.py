"""The figures of `bench` as tables and a plot."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.bench.plan import DIRECTIONS, PARTS, Figure
from parity.cases.files import writing


def print_bench(console: Console, figures: Sequence[Figure]) -> None:
    """Print the copies behind the floors and, for each shape, a table of row movements and one of experts."""
    for figure in figures:
        if figure.error:
            what = f"{figure.framework} {figure.shape} {figure.variant} {figure.part} {figure.direction}"
            console.print(f"{what}: {figure.error.splitlines()[0]}", style="red", markup=False)
        elif figure.part == "copy":
            rate = figure.bytes / figure.median / 1e9
            console.print(
                f"{figure.framework} copies {figure.bytes / 2e6:.0f} MB at {rate:.0f} GB/s on {figure.device}"
            )
        elif figure.part == "link":
            rate = figure.link_bytes / figure.median / 1e9
            console.print(f"{figure.framework} copies from one GPU to another at {rate:.0f} GB/s")
    for shape in dict.fromkeys(figure.shape for figure in figures if figure.shape):
        found = [figure for figure in figures if figure.shape == shape]
        console.print()
        for title, of_this_kind, row in (
            (f"{shape}: rows moved", lambda figure: not (figure.flops or figure.link_bytes), _movement_cells),
            (f"{shape}: rows moved between ranks", lambda figure: figure.link_bytes, _exchange_cells),
            (f"{shape}: experts", lambda figure: figure.flops, _expert_cells),
        ):
            chosen = [figure for figure in found if of_this_kind(figure)]
            if chosen:
                console.print(_table(title, chosen, row))
    if any(figure.high - figure.low > figure.median / 2 for figure in figures):
        console.print("\nSome figures vary by more than a quarter (±): is the machine busy?")
    if any(figure.device == "cpu" for figure in figures):
        console.print(
            "\nOn a CPU, arrays can fit into caches, and XLA fuses all of it: a share of the floor can exceed 1."
        )


def _table(title: str, figures: Sequence[Figure], cells) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("framework")
    table.add_column("variant")
    table.add_column("part")
    headers = {
        _movement_cells: ("ms", "±", "of floor", "peak MB", "launches", "syncs", "host ms"),
        _exchange_cells: ("ms", "±", "GB/s out", "of floor", "peak MB", "syncs"),
        _expert_cells: ("ms", "±", "TFLOP/s", "peak MB"),
    }[cells]
    for short in ("fwd", "fwd+bwd"):
        for header in headers:
            table.add_column(f"{short}\n{header}", justify="right", no_wrap=True)
    by_line: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for figure in figures:
        by_line.setdefault((figure.framework, figure.variant, figure.part), {})[figure.direction] = figure
    order = {part: i for i, part in enumerate(("exchange", *PARTS))}
    variants = list(dict.fromkeys(line[:2] for line in by_line))
    for line in sorted(by_line, key=lambda line: (variants.index(line[:2]), order[line[2]])):
        both = [cell for name in DIRECTIONS for cell in cells(by_line[line].get(name))]
        table.add_row(*line, *both, style="bold" if line[2] == "whole" else "", end_section=line[2] == "whole")
    return table


def _movement_cells(figure: Figure | None) -> list[str | Text]:
    if figure is None or figure.error:
        return ["-"] * 7
    share = "-" if figure.share is None else Text(f"{figure.share:.2f}", style=_color(figure.share))
    host = "-" if figure.host is None else f"{1e3 * figure.host:.3g}"
    return [*_times(figure), share, _megabytes(figure), _count(figure.launches), _count(figure.syncs), host]


def _exchange_cells(figure: Figure | None) -> list[str | Text]:
    if figure is None or figure.error:
        return ["-"] * 6
    share = "-" if figure.share is None else Text(f"{figure.share:.2f}", style=_color(figure.share))
    rate = f"{figure.link_bytes / figure.median / 1e9:.3g}"
    return [*_times(figure), rate, share, _megabytes(figure), _count(figure.syncs)]


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


def plot_bench(figures: Sequence[Figure], path: Path) -> None:
    """Each stage's share of its floor, a panel for each shape: variant by color, forward and both by fill."""
    from matplotlib.figure import Figure as Canvas

    drawn = [figure for figure in figures if figure.share and figure.shape]
    shapes = list(dict.fromkeys(figure.shape for figure in drawn))
    canvas = Canvas(figsize=(4.5 * max(1, len(shapes)), 4.5), layout="constrained")
    for number, shape in enumerate(shapes):
        axes = canvas.add_subplot(1, len(shapes), number + 1)
        lines = list(dict.fromkeys((f.framework, f.variant, f.direction) for f in drawn if f.shape == shape))
        parts = [p for p in ("exchange", *PARTS) if any(f.part == p and f.shape == shape for f in drawn)]
        for i, line in enumerate(lines):
            shares = {
                f.part: f.share or 0 for f in drawn if (f.shape, f.framework, f.variant, f.direction) == (shape, *line)
            }
            places = [k + (i - (len(lines) - 1) / 2) * 0.8 / len(lines) for k, p in enumerate(parts) if p in shares]
            color, faint = f"C{i // len(DIRECTIONS)}", 1 if line[2] == "forward" else 0.5
            heights = [shares[p] for p in parts if p in shares]
            axes.bar(places, heights, 0.8 / len(lines), color=color, alpha=faint, label=" ".join(line))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(parts)), parts, rotation=30, ha="right")
        axes.set(title=shape, ylabel="floor / time" if number == 0 else "")
        axes.legend(fontsize="x-small")
    with writing(path):
        canvas.savefig(path, dpi=150)
