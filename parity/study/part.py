"""The type of a part of the study, and drawing helpers. `engine.PARTS` lists the parts; each has a file of its own."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.judge.records import Header, encode

R = TypeVar("R")

# The Jinja environment of sections and of the page around them.
PAGES = Environment(
    loader=PackageLoader("parity", "study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What to measure."""

    presets: Sequence[Case] = ()  # sweep these instead of the plan
    recordings: Sequence[str] = ()  # the reader's own recordings, shown in place of the one that comes with the project
    models: Sequence[str] = tuple(MODELS)
    ranks: int | None = None  # None: 4 in the sweep, and several sizes in the simulation
    tokens: int | None = None  # per rank; None: 128 in the sweep, 4096 in the simulation
    steps: int | None = None  # steps of the simulation; None: up to 1000, fewer for large groups
    quick: bool = False  # fewer shapes, skews and steps
    learn: int = 0  # number of seeds to train from
    learn_steps: int = 200
    dispatch: bool = True
    capacity: Case | None = None  # a case whose capacity is tried too


class Study(msgspec.Struct):
    """Everything that the study found."""

    header: Header
    records: list[Any] = []

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    def lines(self) -> list[str]:
        """All records as JSON lines."""
        return [encode(record) for record in (self.header, *self.records)]


class Plot(NamedTuple):
    """A picture, and what it shows in a sentence."""

    svg: str
    caption: str


class Rows(NamedTuple):
    """A table for the terminal, in words; the first `left` columns say what a row is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


class Part(NamedTuple):
    """One thing that the study measures. Each way to show it is optional, and returns "" if nothing was found."""

    name: str  # name in the progress bar
    jobs: Callable[[Asked], Sequence[Callable[[], list[Any]]]]  # each runs in a process; it returns tagged structs
    weight: int = 1  # how long a job takes beside others': the heaviest start first
    alone: bool = False  # its jobs start processes themselves: they run in this process, after all others
    summary: Callable[[Study], list[Any]] = lambda _: []  # more records, derived from all it found
    answer: Callable[[Study], list[str]] = lambda _: []  # sentences at the top of the output
    table: Callable[[Study], Rows | None] = lambda _: None  # for the terminal
    section: Callable[[Study], str] = lambda _: ""  # of the page; its plots follow
    plots: Callable[[Study], dict[str, Plot]] = lambda _: {}  # by name of file


def script_data(found: Any) -> str:
    """JSON for a script element, inside which only "</" and "<!--" could end or change it."""
    return msgspec.json.encode(found).decode().replace("<", "\\u003c")


SECTION = PAGES.from_string("""
<h2 id="{{ name }}">{{ title }}</h2>
{% if note %}
<p class="note">{{ note }}</p>
{% endif %}
<table class="figures"><caption>{{ caption }}</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}
<td data-of="{{ columns[loop.index0] }}">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody></table>
""")


def section(
    name: str, title: str, caption: str, columns: Sequence[str], rows: Iterable[Iterable[object]], note: str = ""
) -> str:
    """A heading over a table, for the page."""
    return SECTION.render(name=name, title=title, caption=caption, columns=columns, rows=rows, note=note)


MOST = 20  # characters of a column of names; longer ones are folded


def tables(found: Rows, width: int) -> list[Table]:
    """Split columns that do not fit side by side into further tables, which repeat the first columns."""
    sizes = [
        max(cell_len(text) for text in (*column.split(), *(row[i] for row in found.rows)))
        for i, column in enumerate(found.columns)
    ]
    sizes[: found.left] = [min(size, MOST) for size in sizes[: found.left]]
    first = list(range(found.left))
    blocks: list[list[int]] = [[]]
    for i in range(found.left, len(found.columns)):
        if blocks[-1] and sum(sizes[j] + 1 for j in (*first, *blocks[-1], i)) > width:
            blocks.append([])
        blocks[-1].append(i)
    made = []
    for block in blocks:
        made.append(Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)))
        for i in (*first, *block):
            side = "left" if i < found.left else "right"
            made[-1].add_column(found.columns[i], justify=side, overflow="fold", width=sizes[i])
        for row in found.rows:
            made[-1].add_row(*(escape(row[i]) for i in (*first, *block)))
    return made


# These colours are replaced by those of the page, light or dark, also when the picture stands alone.
PAPER, INK, FAINT = "#fefdfe", "#010203", "#807f81"
COLOURS = ("#2f7fd1", "#e07b00", "#1f9d6b", "#c44fb0", "#d9483b", "#1897ad", "#8b6fe0", "#9a8400")
STYLE = (
    "<style>svg{--paper:#fff;--ink:#1c2128;--faint:#c9ced4}"
    "@media(prefers-color-scheme:dark){svg{--paper:#0f1318;--ink:#e4e9ef;--faint:#414a55}}</style>"
)


def axes():
    """A figure and its axes, as wide as a phone, with letters that are legible there."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # importing takes a second

    look: Any = {
        "font.size": 12, "axes.titlesize": 12, "axes.facecolor": PAPER, "figure.facecolor": PAPER, "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
        "axes.prop_cycle": cycler(linestyle=("-", "--")) * cycler(color=COLOURS), "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "lines.markersize": 4,
    }  # fmt: skip
    with rc_context(look):
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        return figure, figure.subplots()


def plain(axis, values: Iterable[float]) -> None:
    """Put ticks at measured values, as plain numbers: 1, 8, 64."""
    from matplotlib.ticker import NullFormatter

    at = sorted(set(values))
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(at, [f"{value:g}" for value in at], minor=False)


def svg(figure) -> str:
    """The figure as SVG, with any legend below it. The same figure gives the same bytes."""
    import matplotlib

    (ax,), out = figure.axes, io.StringIO()
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        columns = 2 if max(map(len, labels)) < 24 else 1
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, labelcolor=INK
        )
    with matplotlib.rc_context({"svg.hashsalt": "parity", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, facecolor=PAPER)
    drawn = out.getvalue().replace(PAPER, "var(--paper)").replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + STYLE, drawn, count=1)
