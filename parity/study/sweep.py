"""What a static capacity costs and saves for a given routing: rows dropped and padded, bytes, memory, errors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from rich.table import Table

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, Parameters
from parity.cases.recording import case_of_recording, load_recording
from parity.oracle import vectorised
from parity.oracle.problem import tokens_that_choose
from parity.oracle.reference import Exact, Layer
from parity.oracle.tolerances import numpy_dtype
from parity.study.part import Asked, Part, Plot, Study, axes, section, svg, table
from parity.study.routing import (
    PER,
    PRIORITIES,
    Routing,
    counts,
    needed_factor,
    places,
    preset_routing,
    recorded_routing,
    steps_that_fit,
    zipf_routing,
)

Array = np.ndarray

FACTORS = ("0.5", "0.75", "1", "1.25", "1.5", "2", "3", "4")
SHOWN = ("1", "1.25", "2")  # in tables
TENTHS = 10  # parts of the sequence by which drops are counted


class Spread(msgspec.Struct):
    """Over steps."""

    median: float
    p99: float
    worst: float


class Figures(msgspec.Struct, tag_field="kind", tag="figures"):
    """One routing under one capacity. Rates are of all assignments; rows and bytes are means over steps."""

    routing: str
    ranks: int
    tokens: int
    experts: int
    top_k: int
    width: int
    factor: str
    per: str
    priority: str
    capacity: int  # rows per bin
    steps: int
    dropped: float  # rate
    dropped_by_rank: list[float]  # of each source rank's assignments
    dropped_by_expert: list[float]  # of the assignments that chose each expert; 0 where none did
    dropped_by_position: list[float]  # of each tenth of a rank's tokens in order; 0 where there are none
    padded: float  # share of the rows sent that are padding
    useful_bytes: float  # to other ranks and back, forward, all ranks
    wasted_bytes: float  # the same of padding
    dynamic_bytes: float  # the same of a dynamic exchange, which sends every row and no padding
    memory: int  # bytes of rows that the busiest rank holds in stages 2 to 8, forward
    dynamic_memory: float  # the same of a dynamic exchange, whose busiest rank differs by step
    needed: Spread  # capacity factor at which nothing drops
    out_error: float | None = None  # relative error in L2 of the layer's output against dropless, of the first step
    dx_error: float | None = None  # of the tokens' gradient
    dw_error: float | None = None  # of all expert weights' gradients
    own: bool = False  # of the capacity that was asked for


def measure(routing: Routing, factor: str | None, per: str, priority: str, place: Array | None = None) -> Figures:
    """Everything but the errors. `place` is what `places` gives, where it is known."""
    case = replace(routing.case, capacity_factor=factor, capacity_per=per, priority=priority)
    n, P, T, K = routing.expert_id.shape
    E, B, C, D = case.experts, case.bins, case.capacity, case.width
    keep = (places(routing, per, priority) if place is None else place) < C
    everything, kept = counts(routing), counts(routing, keep)
    lost = everything - kept
    row = D * numpy_dtype(case.dtype).itemsize
    to_others = 1 - np.eye(P)
    useful, dynamic = ((c.reshape(n, P, P, -1).sum(-1) * to_others).sum(axis=(1, 2)).mean() for c in (kept, everything))
    received = everything.sum(axis=1).reshape(n, P, -1).sum(axis=-1).max(axis=1)  # [n], by the busiest rank
    slots = P * B * C
    tenth = np.arange(T) * TENTHS // max(T, 1)
    needed = needed_factor(everything, K, T, per)
    return Figures(
        routing.name, P, T, E, K, D, factor or "none", per, priority, C, n,
        dropped=_rate(lost.sum(), everything.sum()),
        dropped_by_rank=[_rate(lost[:, p].sum(), n * T * K) for p in range(P)],
        dropped_by_expert=[_rate(lost[..., g].sum(), everything[..., g].sum()) for g in range(E)],
        dropped_by_position=[
            _rate((~keep[:, :, tenth == i]).sum(), keep[:, :, tenth == i].size) for i in range(TENTHS)
        ],
        padded=float((slots - kept.sum(axis=(1, 2))).mean() / slots),
        useful_bytes=float(2 * useful * row),
        wasted_bytes=float(2 * (slots * (P - 1) / P - useful) * row),
        dynamic_bytes=float(2 * dynamic * row),
        # x and y as grouped, as received, and expert-major
        memory=6 * B * C * row,
        dynamic_memory=float((2 * T * K + 4 * received).mean() * row),
        needed=Spread(float(np.median(needed)), float(np.quantile(needed, 0.99)), float(needed.max())),
    )  # fmt: skip


def _rate(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


# ---- Errors against dropless


class Inputs(NamedTuple):
    """One step's tokens, router, weights and cotangent, in float64, that choose as a routing says."""

    x: Array
    parameters: Parameters
    dout: Array
    expert_id: Array


def inputs_of(routing: Routing) -> Inputs:
    """The first step as inputs of the oracle: recorded where the recording has them, else drawn to choose alike."""
    case, rng = routing.case, np.random.default_rng([routing.case.seed, 4])
    D, F, E, ids = case.width, case.hidden, case.experts, routing.expert_id[0]
    recorded = load_recording(case) if case.recording else {}
    router = np.asarray(recorded.get("router", rng.standard_normal((D, E)) / np.sqrt(D)), np.float64)
    x = recorded["x"] if "x" in recorded else tokens_that_choose(case, ids, router, rng)
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    weights = [recorded.get(name, rng.standard_normal(s) / np.sqrt(s[1])) for name, s in shapes.items()]
    dout = rng.standard_normal((case.ranks, case.tokens, D))
    parameters = Parameters(router, *(np.asarray(w, np.float64) for w in weights))
    return Inputs(x.astype(np.float64), parameters, dout, ids)


def evaluate(case: Case, inputs: Inputs, keep: Array) -> Layer:
    """The oracle's layer, forward and backward, with only what is kept."""
    x, parameters, dout, ids = inputs
    return vectorised.layer(case, x, parameters, dout, ids, keep, Exact())


def errors(dropless: Layer, with_drops: Layer) -> tuple[float, float, float]:
    """Relative errors in L2 of the output, the tokens' gradient, and all expert weights' gradients."""

    def relative(arrays: Callable[[Layer], list[Array]]) -> float:
        a, b = (np.concatenate([one.reshape(-1) for one in arrays(layer)]) for layer in (dropless, with_drops))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300))

    def of_weights(layer: Layer) -> list[Array]:
        return [a for name, a in layer.gradients.items() if BY_NAME[name].stage == "apply_experts"]

    return relative(lambda layer: [layer.out]), relative(lambda layer: [layer.dx]), relative(of_weights)


def sweep(
    routing: Routing, factors: Sequence[str] = FACTORS, pers: Iterable[str] = PER,
    priorities: Iterable[str] = PRIORITIES, *, with_errors: bool = True,
) -> Iterator[Figures]:  # fmt: skip
    """Every combination of capacity factor, kind of bin and priority."""
    case = routing.case
    priorities = list(priorities)
    inputs, dropless = inputs_of(routing) if with_errors else None, None
    if inputs:
        dropless = evaluate(case, inputs, np.ones(inputs.expert_id.shape, bool))
        score = dropless.score[None].astype(np.float32)  # what priority goes by is what these inputs score
        routing = routing._replace(score=np.concatenate([score, routing.score[1:]]))
    for per in pers:
        for priority in priorities:
            place = places(routing, per, priority)
            for factor in factors:
                found = measure(routing, factor, per, priority, place)
                if inputs and dropless:
                    if found.dropped == 0:
                        found.out_error = found.dx_error = found.dw_error = 0.0
                    else:
                        keep = place[0] < found.capacity
                        found.out_error, found.dx_error, found.dw_error = errors(dropless, evaluate(case, inputs, keep))
                yield found


@dataclass(frozen=True)
class Plan:
    """What `study` sweeps."""

    base: Case = Case(tokens=128, experts=16, top_k=2, width=32, hidden=32)
    skews: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    steps: int = 200
    # One at a time from the base, at the skew in the middle.
    shapes: tuple[dict[str, int], ...] = (
        {"ranks": 2}, {"ranks": 8}, {"ranks": 16}, {"tokens": 32}, {"tokens": 512},
        {"experts": 8}, {"experts": 64}, {"top_k": 1}, {"top_k": 4}, {"top_k": 8},
    )  # fmt: skip


def routings(plan: Plan, recordings: Sequence[str]) -> list[Callable[[], Routing]]:
    """The routings of a plan and of recordings, made when they are asked for. A recording is cut for 4 ranks."""
    base, middle = plan.base, plan.skews[len(plan.skews) // 2]
    made: list[Callable[[], Routing]] = []
    for recording in recordings:
        whole = case_of_recording(Case(ranks=1, tokens=0, recording=recording))
        ranks = next(P for P in (4, 2, 1) if whole.experts % P == 0)
        # As many tokens as leave eight steps, for a spread over steps; fewer steps where the recording is short.
        tokens = max(1, min(whole.tokens // ranks, max(16, whole.tokens // ranks // 8)))
        made.append(partial(recorded_routing, replace(whole, ranks=ranks, tokens=tokens), plan.steps))
    shaped = [(base, skew) for skew in plan.skews] + [(replace(base, **shape), middle) for shape in plan.shapes]
    for case, skew in shaped:
        made.append(partial(zipf_routing, case, skew, steps_that_fit(case, plan.steps), base.seed))
    return made


# ---- What is shown of it


def by_routing(figures: Sequence[Figures]) -> dict[tuple, list[Figures]]:
    """Figures of each routing and shape."""
    groups: dict[tuple, list[Figures]] = {}
    for f in figures:
        groups.setdefault((f.routing, f.ranks, f.tokens, f.experts, f.top_k, f.width), []).append(f)
    return groups


def find(figures: Sequence[Figures], factor: str, per: str, priority: str = "token") -> Figures:
    """The one of a group with these."""
    return next(f for f in figures if (f.factor, f.per, f.priority) == (factor, per, priority))


def commonest(groups: dict[tuple, list[Figures]]) -> list[list[Figures]]:
    """Recordings and those of the commonest shape, which differ in skew only."""
    shapes = [key[1:] for key in groups]
    common = max(shapes, key=shapes.count, default=None)
    return [g for key, g in groups.items() if key[1:] == common or not key[0].startswith("zipf")][:8]


def _label(f: Figures) -> str:
    return f"{f.routing}, P={f.ranks} T={f.tokens} E={f.experts} K={f.top_k}"


def drop_table(study: Study) -> Table | None:
    """A line for each routing and kind of bin: capacity needed, and at some factors what drops and what is padding."""
    if not (figures := study.of(Figures)):
        return None
    columns = ["routing", "bins", "P", "T", "E", "K", "needed: median", "p99", "worst"]
    asked = [f for f in figures if f.own]
    result = table(
        "Capacity factor at which nothing drops, over steps; % dropped (priority token) / % of rows padding",
        [*columns, *(f"at {factor}" for factor in SHOWN), *as_asked(asked), "output off at 1"], 2,
    )  # fmt: skip
    for group in by_routing(figures).values():
        for per in PER:
            first, needed = find(group, "1", per), find(group, "1", per).needed
            cells = [first.routing, per, *map(str, (first.ranks, first.tokens, first.experts, first.top_k))]
            cells += [f"{n:.2f}" for n in (needed.median, needed.p99, needed.worst)]
            for factor in SHOWN:
                f = find(group, factor, per)
                cells.append(f"{100 * f.dropped:.1f}/{100 * f.padded:.0f}")
            own = next((f for f in group if f.own), None)
            if own:
                cells.append(f"{100 * own.dropped:.1f}/{100 * own.padded:.0f}" if own.per == per else "")
            result.add_row(*cells, "" if first.out_error is None else f"{100 * first.out_error:.1f}%")
    return result


def _two(f: Figures) -> tuple[str, str]:
    return f"{100 * f.dropped:.1f}%", f"{100 * f.padded:.0f}%"


def as_asked(figures: Sequence[Figures]) -> list[str]:
    """The heading of the column of the capacity that was asked for; none where none was."""
    return [f"at {f.factor} a {f.per}, {f.priority}" for f in figures[:1]]


def drop_section(study: Study) -> str:
    """The same for the page, which has room for more."""
    if not (figures := study.of(Figures)):
        return ""
    columns = ["routing", "bins", "P", "T", "E", "K", "steps", "needed: median", "p99", "worst"]
    columns += [column for factor in SHOWN for column in (f"dropped at {factor}", "padding")]
    columns += [column for what in as_asked([f for f in figures if f.own]) for column in (f"dropped {what}", "padding")]
    rows = []
    for group in by_routing(figures).values():
        for per in PER:
            f = find(group, "1", per)
            shown = [find(group, factor, per) for factor in SHOWN]
            rows.append([
                f.routing, per, f.ranks, f.tokens, f.experts, f.top_k, f.steps,
                *(f"{n:.2f}" for n in (f.needed.median, f.needed.p99, f.needed.worst)),
                *(cell for f in shown for cell in _two(f)),
                *(cell for own in group if own.own for cell in (_two(own) if own.per == per else ("", ""))),
            ])  # fmt: skip
    return section(
        "drops", "Capacity needed, and what drops below it",
        "Priority token. Dropped is a share of all assignments, padding of the rows sent; the factor needed is over "
        "steps.",
        columns, rows,
    )  # fmt: skip


def plots(study: Study) -> dict[str, Plot]:
    """Of routings whose errors are known."""
    figures = study.of(Figures)
    skewed = {k: g for k, g in by_routing(figures).items() if find(g, "1", "rank").out_error is not None}
    if not skewed:
        return {}
    return {
        "drops.svg": Plot(
            _drops(skewed),
            "Assignments dropped against the capacity factor, with a bin per rank and a bin per expert, priority "
            "token.",
        ),
        "positions.svg": Plot(
            _positions(skewed),
            "Assignments dropped in each tenth of a rank's tokens in order, capacity factor 1, a bin per rank.",
        ),
        "errors.svg": Plot(
            _errors(figures),
            "Relative error of the output and of the tokens' gradient against the dropless layer, by share dropped.",
        ),
    }


def _drops(groups: dict[tuple, list[Figures]]) -> str:
    figure, panels = axes(2)
    for ax, per in zip(panels, PER, strict=True):
        for group in commonest(groups):
            points = [find(group, factor, per) for factor in FACTORS]
            x, y = [float(p.factor) for p in points], [100 * p.dropped for p in points]
            ax.plot(x, y, "o-", ms=3, label=_label(points[0]))
        ax.set(title=f"a bin per {per}", xlabel="capacity factor", ylabel="dropped, %")
    panels[0].legend(fontsize=7, frameon=False)
    return svg(figure)


def _positions(groups: dict[tuple, list[Figures]]) -> str:
    figure, panels = axes(1)
    group = commonest(groups)[len(commonest(groups)) // 2]
    for priority in PRIORITIES:
        f = find(group, "1", "rank", priority)
        panels[0].plot(np.arange(5, 100, 10), [100 * r for r in f.dropped_by_position], "o-", ms=3, label=priority)
    panels[0].set(
        title=_label(group[0]), xlabel="position in the rank's tokens, %", ylabel="dropped, %", ylim=(0, None)
    )
    panels[0].legend(title="priority", frameon=False)
    return svg(figure)


def _errors(figures: Sequence[Figures]) -> str:
    figure, panels = axes(2)
    for ax, name, what in zip(panels, ("out_error", "dx_error"), ("output", "tokens' gradient"), strict=True):
        for priority, marker in zip(PRIORITIES, "o^s", strict=True):
            points = [(f.dropped, getattr(f, name)) for f in figures if f.priority == priority]
            ax.plot(*(100 * np.array(points, float).T), marker, ms=3, alpha=0.5, label=priority)
        ax.set(title=f"error of the {what}", xlabel="dropped, %", ylabel="relative error in L2, %")
    panels[0].legend(title="priority", frameon=False)
    return svg(figure)


def jobs(asked: Asked) -> list[Callable[[], list[Figures]]]:
    """A routing each: those of the presets asked for, or the plan's and the recordings'."""
    made = [partial(preset_routing, case, 8) for case in asked.presets]
    return [partial(_swept, asked.capacity, routing) for routing in made or routings(Plan(), asked.recordings)]


def _swept(own: Case | None, routing: Callable[[], Routing]) -> list[Figures]:
    found = list(sweep(made := routing()))
    if own:
        as_asked = measure(made, own.capacity_factor, own.capacity_per, own.priority)
        found.append(msgspec.structs.replace(as_asked, own=True))
    return found


PART = Part("sweep", jobs, table=drop_table, section=drop_section, plots=plots)
