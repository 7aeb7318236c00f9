"""A report as one HTML page that needs no server and no network."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from parity.judge.blame import Blame
from parity.judge.card import Card
from parity.judge.compare import LISTED, Check, Row, Where, largest_error
from parity.judge.picture import Magnitude
from parity.judge.records import CaseRecord, Report
from parity.oracle.quantities import STAGES
from parity.report.terminal import (
    SHORT,
    SURE,
    backends,
    capacity,
    describe,
    drops,
    few,
    headline,
    notes,
    of_stage,
    place,
    repeat,
)
from parity.run.backend import Backend
from parity.run.faults import FAULTS

DRAWN = 40  # most cases with charts, failing ones first: each adds about 80 kB to the page
MODES = {"isolated": "alone", "e2e": "in the layer", "second": "in a second step", "repeat": "run twice"}
COLOURS = "abcd"  # colours of backends in a chart, in the order in which they ran
SHADES = 5  # shades of the heat map, from no error to the whole allowance


class Line(NamedTuple):
    """The result of one side's comparisons at one stage."""

    side: str
    ok: bool | None  # None: nothing was compared
    text: str
    ratio: float | None = None  # worst ratio of error to allowance
    detail: str = ""  # that error and that allowance
    seen: bool = True  # False: the backend shows nothing at this stage


class Tile(NamedTuple):
    """One stage in a case's strip, or the whole layer."""

    name: str
    lines: list[Line]

    @property
    def ok(self) -> bool | None:
        """Whether all match; None if some side should show something and nothing was compared."""
        results = [line.ok for line in self.lines if line.seen]
        return False if False in results else None if None in results or not results else True

    @property
    def unseen(self) -> bool:
        """Whether no side shows anything there."""
        return not any(line.seen for line in self.lines)


class FailingRow(NamedTuple):
    """A failing row and its comparison."""

    check: Check
    row: Row


class Series(NamedTuple):
    """One side's array in the chart of error against magnitude, as SVG paths."""

    backend: str
    points: str
    colour: str
    over: str  # the points above the line
    allowance: str


class Plotted(NamedTuple):
    """One array in that chart."""

    label: str
    ok: bool
    worst: float
    series: list[Series]


class Chart(NamedTuple):
    """Error against magnitude, both on logarithmic axes that all arrays of a case share."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    arrays: list[Plotted]  # worst first
    chosen: int  # the one shown first


class Bar(NamedTuple):
    """One column: (kind, rows, y, height) from the bottom up."""

    label: str
    x: float
    parts: list[tuple[str, int, float, float]]


class Bars(NamedTuple):
    """Rows by source rank, or by expert."""

    axis: str
    width: float
    step: float
    ticks: list[tuple[float, int]]
    bars: list[Bar]


class View(NamedTuple):
    """One case, as the template draws it."""

    id: str
    name: str
    record: CaseRecord
    checks: list[Check]
    ok: bool | None
    blame: Blame | None
    headline: str
    command: str
    tiles: list[Tile]
    largest: float
    missing: list[str]
    cards: list[Card]  # cards of layers that fail in this case and give no stages
    verdicts: list[tuple[Blame, str, str]]  # with its headline, and the command that repeats it


def page(report: Report) -> str:
    """The report as HTML, complete in itself: style, charts and script are in it and nothing is loaded.

    Every case is in the table; the first `DRAWN`, those that fail before those that match, have a section with charts.
    """
    views = [_view(report, f"case-{i}", name) for i, name in enumerate(report.cases)]
    ordered = sorted(views, key=lambda view: view.ok is True)
    missing: dict[str, list[View]] = {}
    for view in views:
        for what in view.missing:
            missing.setdefault(what, []).append(view)
    return _ENVIRONMENT.get_template("page.html.j2").render(
        report=report,
        views=views,
        sections=ordered[:DRAWN],
        drawn={view.id for view in ordered[:DRAWN]},
        undrawn=ordered[DRAWN:],
        failed=[view for view in views if view.ok is False],
        unjudged=[view for view in views if view.ok is None],
        sides=[name for name in report.backends if any(name in record.seconds for record in report.cases.values())],
        unseen=notes(report),
        planted=getattr(FAULTS.get(report.header.planted), "sentence", ""),
        missing=missing,
        environment=_environment(report),
    )


def _view(report: Report, id: str, name: str) -> View:
    record, checks = report.cases[name], report.checks[name]
    verdict = report.blamed(name)
    verdicts = [(v, headline(v, report.backends), repeat(report, record, v)) for v in report.verdicts(name)]
    return View(
        id, name, record, checks,
        False if verdict else True if any(check.rows for check in checks) else None,
        verdict,
        "; ".join(said for _, said, _ in verdicts),
        repeat(report, record, verdict) if verdict else record.command,
        _tiles(record, checks, backends(report, record)),
        largest_error(checks),
        _missing(record, checks, backends(report, record)),
        report.cards.get(name, []),
        verdicts,
    )  # fmt: skip


# ---- The strip


def _tiles(record: CaseRecord, checks: Sequence[Check], ran: Sequence[Backend]) -> list[Tile]:
    sides = list(record.seconds)
    between = " \N{EN DASH} ".join(sides)

    def tile(name: str, found: list[Check], shown_by: set[str]) -> Tile:
        by_side: dict[str, list[Check]] = {side: [] for side in (*sides, between)}
        for check in found:
            by_side[between if check.right in sides else check.left].append(check)
        # Two sides that drop differently have no counts in common: `_missing` says so.
        return Tile(name, [_line(side, of, side in shown_by) for side, of in by_side.items() if of or side in sides])

    stages = [
        tile(
            SHORT[s],
            of_stage(checks, ran, s)[0],
            {backend.name for backend in ran if backend.judged(s)},
        )
        for s in STAGES
    ]
    in_the_layer = {b.name for b in ran if any(not name.startswith("isolated") for name in b.provides)}
    return [*stages, tile("whole layer", [c for c in checks if c.mode != "isolated"], in_the_layer)]


def _line(side: str, checks: list[Check], shown: bool) -> Line:
    if not checks:
        return Line(side, None, "not compared") if shown else Line(side, None, "not seen", seen=False)
    bad = [check for check in checks if not check.ok]
    worst = max((c for c in checks if not c.bitwise and c.rows), key=lambda c: c.worst, default=None)
    detail = "" if worst is None else f"{worst.value}: error {num(worst.error)}, allowance {num(worst.allowed)}"
    ratio = None if worst is None else worst.worst
    if not bad:
        return Line(side, True, "exact" if ratio is None else ratio_text(ratio), ratio, detail)
    whole = next((c for c in bad if c.where is None), None)
    if whole:
        return Line(side, False, "not comparable", None, f"{whole.value}: {whole.note}")
    if worst is None or worst.ok:
        most = max(bad, key=lambda c: c.failing)
        return Line(side, False, f"{most.failing}/{most.rows} rows", None, f"{most.value}: not equal bit for bit")
    return Line(side, False, ratio_text(worst.worst), ratio, detail)


# ---- Charts


def shade(ratio: float | None) -> str:
    """The class of a heat map's cell."""
    if ratio is None:
        return "none"
    return "over" if not ratio <= 1 else f"h{min(int(ratio * SHADES), SHADES - 1)}"


WIDTH, HEIGHT = 400.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 392.0, 10.0, 204.0
ZERO = 218.0  # where errors of exactly zero lie, below the logarithmic axis


def chart(view: View) -> Chart | None:
    """Error against magnitude, of all arrays judged within an allowance; None when there are none."""
    by_array: dict[str, dict[str, list[Magnitude]]] = {}
    for key, found in view.record.picture.magnitudes.items():
        backend, array = key.split(" ", 1)
        by_array.setdefault(array, {})[backend] = found
    everything = [m for sides in by_array.values() for found in sides.values() for m in found]
    if not everything:
        return None
    first, last = min(m.exponent for m in everything), max(m.exponent for m in everything) + 1
    sizes = [v for m in everything for v in (m.error, m.allowed) if v > 0]
    low, high = math.floor(math.log10(min(sizes, default=1))), math.ceil(math.log10(max(sizes, default=10)))
    high = max(high, low + 1)

    def x(exponent: float) -> float:
        return round(LEFT + (exponent - first) / (last - first) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (math.log10(value) - low) / (high - low) * (BOTTOM - TOP), 1) if value > 0 else ZERO

    def series(backend: str, found: list[Magnitude]) -> Series:
        nth = list(view.record.seconds).index(backend)
        beside = 3.0 * nth
        spots = [(x(m.exponent + 0.5) + beside, y(m.error), m.error > m.allowed) for m in found]
        points = "".join(f"M{a:.1f} {b}h.01" for a, b, _ in spots)  # a path of zero length is lost in print
        over = "".join(f"M{a - 5:.1f} {b - 5:.1f}l10 10m-10 0l10 -10" for a, b, above in spots if above)
        line = "".join(f"M{x(m.exponent)} {y(m.allowed)}H{x(m.exponent + 1)}" for m in found)
        return Series(backend, points, COLOURS[nth % len(COLOURS)], over, line)

    judged: dict[str, list[Check]] = {}
    for check in view.checks:
        if check.right == "oracle":
            judged.setdefault(f"{check.mode}/{check.stage}/{check.value}", []).append(check)
    arrays = []
    for array, sides in by_array.items():
        mode, stage, value = array.split("/")
        own = [check for check in judged.get(array, []) if check.left in sides]
        drawn = [series(side, found) for side, found in sides.items()]
        worst, ok = max((check.worst for check in own), default=math.nan), all(check.ok for check in own)
        empty = [f"; nothing to draw of {side}" for side, found in sides.items() if not found]
        label = f"{SHORT[stage]}: {value}, {MODES[mode]} ({ratio_text(worst)}{''.join(empty)})"
        arrays.append((array, Plotted(label, ok, worst, drawn)))
    arrays.sort(key=lambda named: (named[1].ok, -named[1].worst))
    blamed = view.blame and f"{view.blame.check.mode}/{view.blame.check.stage}/{view.blame.check.value}"
    chosen = next((i for i, (array, _) in enumerate(arrays) if array == blamed), 0)
    every_x, every_y = math.ceil((last - first) / 8), math.ceil((high - low) / 8)
    return Chart(
        [(x(e), f"2{_superscript(e)}") for e in range(first, last + 1, every_x)],
        [(y(10.0**e), f"10{_superscript(e)}") for e in range(low, high + 1, every_y)],
        [plotted for _, plotted in arrays],
        chosen,
    )


def _superscript(n: int) -> str:
    return str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


BARS_BOTTOM, BARS_TOP = 150.0, 14.0


def _counts(record: CaseRecord) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int | None]]]:
    """Rows kept, dropped and padded, of each source rank and of each expert.

    Padding fills bins, so experts have padding only with one bin per expert: C rows from every rank, less those kept.
    """
    case, picture = record.case, record.picture
    by_rank = zip(map(sum, picture.kept), map(sum, picture.dropped), picture.padding, strict=True)
    kept, dropped = (list(map(sum, zip(*rows, strict=True))) for rows in (picture.kept, picture.dropped))
    full = case.ranks * case.capacity if case.capacity_per == "expert" else None
    by_expert = [(k, d, None if full is None else full - k) for k, d in zip(kept, dropped, strict=True)]
    return list(by_rank), by_expert


def bars(record: CaseRecord) -> list[Bars]:
    """Kept, dropped and padded rows by source rank and by expert."""
    by_rank, by_expert = _counts(record)
    return [_bars("source rank", by_rank), _bars("expert", [(k, d, p or 0) for k, d, p in by_expert])]


def _bars(axis: str, counts: list[tuple[int, int, int]]) -> Bars:
    most = max((sum(count) for count in counts), default=0) or 1
    scale = (BARS_BOTTOM - BARS_TOP) / most
    step = max(12.0, min(35.0, 330.0 / max(len(counts), 1)))
    result = []
    for i, count in enumerate(counts):
        bottom, parts = BARS_BOTTOM, []
        for kind, n in zip(("kept", "dropped", "padding"), count, strict=True):
            bottom -= n * scale
            parts.append((kind, n, round(bottom, 1), round(n * scale, 1)))
        result.append(Bar(str(i), LEFT + i * step, parts))
    every = _round_step(most)
    ticks = [(round(BARS_BOTTOM - n * scale, 1), n) for n in range(0, most + 1, every)]
    return Bars(axis, LEFT + len(counts) * step + 8, step, ticks, result)


def _round_step(most: int) -> int:
    """1, 2 or 5 times a power of ten: at most five such steps reach `most`."""
    power = 10 ** max(len(str(most)) - 2, 0)
    return next(step * power for step in (1, 2, 5, 10, 20, 50) if most <= 5 * step * power)


def totals(record: CaseRecord) -> list[tuple[str, int, int, int | None, list[float | None]]]:
    """The charts in numbers, one line per source rank or expert: kept, dropped, padding, worst ratio of each side."""

    def worst(cells: Iterable[float | None]) -> float | None:
        return max((cell for cell in cells if cell is not None), default=None)

    by_rank, by_expert = _counts(record)
    maps = record.picture.worst.values()
    return [
        *((f"source rank {p}", *counts, [worst(rows[p]) for rows in maps]) for p, counts in enumerate(by_rank)),
        *(
            (f"expert {g}", *counts, [worst(row[g] for row in rows) for rows in maps])
            for g, counts in enumerate(by_expert)
        ),
    ]


# ---- Tables


def failing_rows(view: View) -> tuple[list[FailingRow], int]:
    """Every failing row that the report lists, those of the blamed comparison first, and how many rows fail in all."""
    checks = [c for c in view.checks if not c.ok and c.where is not None and c.mode != "repeat"]
    checks.sort(key=lambda check: view.blame is None or check is not view.blame.check)
    listed = [FailingRow(check, row) for check in checks for row in check.worst_rows or [_only_row(check)]]
    return listed, sum(check.failing for check in checks)


def _only_row(check: Check) -> Row:
    got, expected = (math.nan if value is None else value for value in (check.got, check.expected))
    return Row(check.where or Where(), got, expected, check.error, check.allowed)


def not_by_row(view: View) -> list[Check]:
    """Failures without rows: arrays that could not be compared with the oracle's, and runs that did not repeat."""
    return [c for c in view.checks if not c.ok and (c.where is None or c.mode == "repeat")]


def _missing(record: CaseRecord, checks: list[Check], ran: Sequence[Backend]) -> list[str]:
    """What was not compared in this case, and why."""
    result, sides = [], list(record.seconds)
    if len(sides) == 1:
        result.append(f"Only {sides[0]} ran: it was held against the oracle, not against another backend.")
    for backend in ran:
        side, mine = backend.name, [c for c in checks if c.left == backend.name and c.mode == "isolated"]
        stages = {c.stage for c in mine if c.rows or not c.ok} | {s for s in STAGES if not backend.alone(s)}
        result += [f"{side}: stage {SHORT[stage]} has no row to compare." for stage in STAGES if stage not in stages]
        result += [f"{side}: {backend.seen()}."] * (backend.unseen != "")
    whole = sum(not check.ok and check.where is None for check in checks)
    if whole:
        result.append(f"{whole} arrays fail as a whole, and so were not compared row by row: see the failing rows.")
    result += [f"{_array(c)} of {c.left}: {c.note}." for c in checks if c.note and (c.ok or c.where)]
    if len(sides) > 1:
        paired = {_array(c) for c in checks if c.right in sides}
        broken = {_array(c) for c in checks if not c.ok and c.where is None}
        alone = dict.fromkeys(_array(c) for c in checks if c.right == "oracle")
        only = [name for name in alone if name not in paired | broken]
        if only:
            result.append(f"Compared with the oracle only, not with each other: {'; '.join(only)}.")
    if record.case.real_size:
        result.append("8 rows of each expert weight's gradient were compared, not all: the weights are of real size.")
    return result


def _array(check: Check) -> str:
    return f"{SHORT[check.stage]}: {check.value} ({MODES[check.mode]})"


def _environment(report: Report) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """Backend, property, and each value with the number of cases that had it."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for record in report.cases.values():
        for side, about in record.environment.items():
            for key, value in about.items():
                values = found.setdefault((side, key), {})
                values[value] = values.get(value, 0) + 1
    harness = [("harness", key, [(value, len(report.cases))]) for key, value in report.header.machine.items()]
    return harness + [(side, key, list(values.items())) for (side, key), values in found.items()]


# ---- Numbers


def num(value: float | None) -> str:
    """A number with four digits."""
    if value is None:
        return "\N{EN DASH}"
    return "\N{INFINITY}" if value == math.inf else f"{value:.4g}"


def exact(row: Row) -> tuple[str, str]:
    """Actual and expected number, with nine digits, which tell float32 numbers apart, or as many as are needed."""
    got, expected = f"{row.got:.9g}", f"{row.expected:.9g}"
    return (repr(row.got), repr(row.expected)) if got == expected else (got, expected)


def ratio_text(value: float | None) -> str:
    """An error over its allowance: never 1.00 for one that is over."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if value == math.inf:
        return "\N{INFINITY}"
    if 1 < value < 1.005:
        return ">1"
    return (
        f"{value:.2f}"
        if value < 10
        else f"{value:.0f}"
        if value < 1000
        else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    )


_ENVIRONMENT = Environment(
    loader=PackageLoader("parity", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=StrictUndefined,
)  # fmt: skip
_ENVIRONMENT.filters.update(num=num, ratio=ratio_text, shade=shade)
_ENVIRONMENT.globals.update(
    bars=bars, capacity=capacity, chart=chart, colours=COLOURS, describe=describe, drops=drops, exact=exact,
    failing_rows=failing_rows, few=few, listed=LISTED, modes=MODES, not_by_row=not_by_row, place=place, short=SHORT,
    stages=STAGES, sure=SURE, totals=totals,
)  # fmt: skip
