"""What a part of the study is, and what parts draw with. `engine.PARTS` lists them; each has a file of its own."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.judge.records import Header, encode

R = TypeVar("R")

# Of sections as well as of the page around them.
PAGES = Environment(
    loader=PackageLoader("parity", "study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What to measure."""

    presets: Sequence[Case] = ()  # sweep these instead of the plan
    recordings: Sequence[str] = ("pydoc",)
    models: Sequence[str] = tuple(MODELS)
    tokens: int = 4096  # on a rank, in the simulation
    steps: int | None = None  # of the simulation; none: up to 1000, fewer for large groups
    learn: int = 0  # seeds
    learn_steps: int = 200
    dispatch: bool = True
    capacity: Case | None = None  # of which the capacity is looked at, too


class Study(msgspec.Struct):
    """What was found."""

    header: Header
    records: list[Any] = []

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    def lines(self) -> list[str]:
        """A JSON object a line."""
        return [encode(record) for record in (self.header, *self.records)]


class Plot(NamedTuple):
    """A picture, and what it shows in a sentence."""

    svg: str
    caption: str


class Part(NamedTuple):
    """One thing that the study measures. Of what shows it, anything can be left out, and shows nothing found as ""."""

    name: str  # of its progress
    jobs: Callable[[Asked], Sequence[Callable[[], list[Any]]]]  # each runs in a process; it returns tagged structs
    weight: int = 1  # how long a job takes beside others': the heaviest start first
    alone: bool = False  # a job starts processes itself: it runs here, when all others are done
    summary: Callable[[Study], list[Any]] = lambda _: []  # more records, of all that it found
    table: Callable[[Study], Table | None] = lambda _: None  # for the terminal
    section: Callable[[Study], str] = lambda _: ""  # of the page; its plots follow
    plots: Callable[[Study], dict[str, Plot]] = lambda _: {}  # by name of file


SECTION = PAGES.from_string("""
<h2 id="{{ name }}">{{ title }}</h2>
{% if note %}
<p class="note">{{ note }}</p>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}">
<table><caption>{{ caption }}</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
</div>
""")


def section(
    name: str, title: str, caption: str, columns: Iterable[str], rows: Iterable[Iterable[object]], note: str = ""
) -> str:
    """A heading over a table, for the page."""
    return SECTION.render(name=name, title=title, caption=caption, columns=columns, rows=rows, note=note)


def table(title: str, columns: Iterable[str], left: int) -> Table:
    """An empty table whose first columns stand to the left."""
    result = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return result


def axes(n: int, height: float = 3.4):
    """A figure and its n axes, side by side."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(4.6 * n, height), layout="constrained")
    found = figure.subplots(1, n, squeeze=False)[0]
    for ax in found:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, found


def svg(figure) -> str:
    """The same bytes for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "parity", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
