"""What a static capacity costs and saves for a given routing: rows dropped and padded, bytes, memory, errors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, Parameters
from parity.cases.recording import case_of_recording, load_recording, sizes_of_recording
from parity.oracle import vectorised
from parity.oracle.problem import tokens_that_choose
from parity.oracle.reference import Exact, Layer
from parity.oracle.tolerances import numpy_dtype
from parity.study.part import (
    PAGES,
    Asked,
    Part,
    Plot,
    Rows,
    Study,
    axes,
    plain,
    script_data,
    section,
    svg,
)
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
SHOWN = ("1", "1.25", "2")  # capacity factors in tables
BROUGHT = "pydoc"  # the recording that comes with the project
TENTHS = 10  # equal parts of the sequence in which drops are counted


class Spread(msgspec.Struct):
    """Statistics of a number over steps."""

    median: float
    p99: float  # the least value that is enough in 99% of steps
    worst: float


def spread(values: Array) -> Spread:
    """The spread of one number per step."""
    p99 = np.quantile(values, 0.99, method="inverted_cdf")
    return Spread(float(np.median(values)), float(p99), float(values.max()))


class Figures(msgspec.Struct, tag_field="kind", tag="figures"):
    """One routing under one capacity. Rates are of all assignments; rows and bytes are means over steps.

    A recording may not say how wide its layer is: width, bytes and memory are None then.
    """

    routing: str
    ranks: int
    tokens: int
    experts: int
    top_k: int
    width: int | None
    factor: str
    per: str
    priority: str
    capacity: int  # rows per bin
    steps: int
    dropped: float  # rate of dropped assignments
    dropped_by_rank: list[float]  # rate, for each source rank's assignments
    dropped_by_expert: list[float]  # rate, for the assignments of each expert; 0 if it has none
    dropped_by_position: list[float]  # rate, for each tenth of a rank's tokens in order; 0 if it is empty
    padded: float  # share of the rows sent that are padding
    useful_bytes: float | None  # bytes to other ranks and back, forward, summed over ranks
    wasted_bytes: float | None  # the same for padding
    dynamic_bytes: float | None  # the same for a dynamic exchange, which sends every row and no padding
    memory: int | None  # bytes of rows that the busiest rank holds in stages 2 to 8, forward
    dynamic_memory: float | None  # the same for a dynamic exchange, whose busiest rank differs by step
    needed: Spread  # capacity factor at which nothing drops
    out_error: float | None = None  # relative error in L2 of the layer's output against dropless, of the first step
    dx_error: float | None = None  # of the tokens' gradient
    dw_error: float | None = None  # the same for the gradients of all expert weights
    own: bool = False  # whether this is the capacity that was asked for
    brought: bool = False  # whether the routing is the reader's own or a recording, not drawn for the plan
    ranks_by_default: bool = False  # whether the reader, whose recording it is, left the number of ranks to the study
    tokens_by_default: bool = False  # the same for the tokens of a rank
    drawn: str = ""  # what of the inputs behind the errors was drawn at random, in words


class Recorded(msgspec.Struct, tag_field="kind", tag="recorded"):
    """How much of a recording was used, and how far its needs come from where its experts are."""

    routing: str
    ranks: int
    tokens: int
    recorded: int  # tokens of the recording
    used: int  # those of them that fill steps
    busiest_rank: int
    over_mean: float  # rows that the busiest rank receives, relative to the mean rank's
    busiest_experts: list[int]  # up to four of that rank that get more than the mean expert, the busiest first
    placed: list[list[int]]  # the experts of each rank, were they placed evenly
    needed_placed: Spread  # capacity factor at which nothing would drop then, with a bin per rank


def recorded_facts(routing: Routing) -> Recorded:
    """What a recording's routing says beside its figures. Experts are placed by their loads in these same steps."""
    case, every = routing.case, counts(routing)
    n, P, T, K = routing.expert_id.shape
    load_E = every.sum(axis=(0, 1))
    load_P = load_E.reshape(P, -1).sum(axis=1)
    rank, e = int(load_P.argmax()), case.experts // P
    mine = sorted(range(rank * e, (rank + 1) * e), key=lambda g: -load_E[g])[:4]
    placed = placed_evenly(load_E, P)
    moved = every[..., np.concatenate(placed)]
    return Recorded(
        routing.name, P, T, case_of_recording(replace(case, ranks=1, tokens=0)).tokens, n * P * T,
        rank, float(load_P[rank] / load_P.mean()), mine[:1] + [g for g in mine[1:] if load_E[g] > load_E.mean()],
        placed, spread(needed_factor(moved, K, T, "rank")),
    )  # fmt: skip


def placed_evenly(load_E: Array, ranks: int) -> list[list[int]]:
    """The experts of each rank, as many on each: the heaviest first, to the least loaded rank that has room."""
    placed: list[list[int]] = [[] for _ in range(ranks)]
    load_P = np.zeros(ranks)
    for g in np.argsort(-load_E, kind="stable"):
        p = int(load_P.argmin())
        placed[p].append(int(g))
        load_P[p] = load_P[p] + load_E[g] if len(placed[p]) < len(load_E) // ranks else np.inf
    return placed


def measure(routing: Routing, factor: str | None, per: str, priority: str, place: Array | None = None) -> Figures:
    """Measure all figures except errors. `place` is the result of `places`, if already computed."""
    case = replace(routing.case, capacity_factor=factor, capacity_per=per, priority=priority)
    n, P, T, K = routing.expert_id.shape
    E, B, C, D = case.experts, case.bins, case.capacity, case.width
    keep = (places(routing, per, priority) if place is None else place) < C
    everything, kept = counts(routing), counts(routing, keep)
    lost = everything - kept
    row = D * numpy_dtype(case.dtype).itemsize
    to_others = 1 - np.eye(P)
    useful, dynamic = ((c.reshape(n, P, P, -1).sum(-1) * to_others).sum(axis=(1, 2)).mean() for c in (kept, everything))
    received = everything.sum(axis=1).reshape(n, P, -1).sum(axis=-1).max(axis=1)  # [n], rows of the busiest receiver
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
        needed=spread(needed),
    )  # fmt: skip


def _rate(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


# ---- Errors against dropless


class Inputs(NamedTuple):
    """One step's tokens, router, weights and cotangent, in float64, whose router chooses as a routing says."""

    x: Array
    parameters: Parameters
    dout: Array
    expert_id: Array


ALL_DRAWN = "tokens and weights"


def drawn_inputs(routing: Routing) -> str:
    """What `inputs_of` draws, in words: nothing of a recording that has tokens, router and expert weights."""
    recorded = load_recording(routing.case) if routing.case.recording else {}
    if "x" not in recorded:
        return ALL_DRAWN
    return "" if {"w_up", "w_down"} <= recorded.keys() else "expert weights"


def inputs_of(routing: Routing) -> Inputs:
    """The first step as inputs of the oracle: recorded ones if there are any, otherwise drawn to choose alike."""
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
    """Run the oracle's layer, forward and backward, with only the kept assignments."""
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
    priorities: Iterable[str] = PRIORITIES,
) -> Iterator[Figures]:  # fmt: skip
    """Every combination of capacity factor, kind of bin and priority.

    A recording without hidden states has no errors and no priority `score`: its scores are not known.
    """
    case = routing.case
    drawn = drawn_inputs(routing)
    inputs, dropless = None if case.recording and drawn == ALL_DRAWN else inputs_of(routing), None
    priorities = [priority for priority in priorities if inputs or priority != "score"]
    if inputs:
        dropless = evaluate(case, inputs, np.ones(inputs.expert_id.shape, bool))
        score = dropless.score[None].astype(np.float32)  # priority uses the scores of these inputs
        routing = routing._replace(score=np.concatenate([score, routing.score[1:]]))
    for per in pers:
        for priority in priorities:
            place = places(routing, per, priority)
            for factor in factors:
                found = measure(routing, factor, per, priority, place)
                if inputs and dropless:
                    found.drawn = drawn
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
    # Vary one field at a time from the base, at the middle skew.
    shapes: tuple[dict[str, int], ...] = (
        {"ranks": 2}, {"ranks": 8}, {"ranks": 16}, {"tokens": 32}, {"tokens": 512},
        {"experts": 8}, {"experts": 64}, {"top_k": 1}, {"top_k": 4}, {"top_k": 8},
    )  # fmt: skip


QUICK = Plan(skews=(0.0, 1.0), steps=100, shapes=())


def planned(asked: Asked) -> Plan:
    """The plan for the ranks and tokens asked for, with a number of experts that divides evenly among ranks."""
    plan = QUICK if asked.quick else Plan()
    base, shapes = plan.base, plan.shapes
    if asked.ranks:
        experts = -(-base.experts // asked.ranks) * asked.ranks
        base = replace(base, ranks=asked.ranks, experts=experts)
        shapes = tuple(s for s in shapes if "ranks" not in s and s.get("experts", experts) % asked.ranks == 0)
    if asked.tokens:
        base, shapes = replace(base, tokens=asked.tokens), tuple(s for s in shapes if "tokens" not in s)
    return replace(plan, base=base, shapes=shapes)


def recorded_case(recording: str, ranks: int | None, tokens: int | None) -> Case:
    """A recording laid out over the ranks asked for, by default 4, in about eight steps.

    Raises ValueError if its experts do not divide evenly among ranks, or its tokens are too few for one step.
    """
    whole = case_of_recording(Case(ranks=1, tokens=0, recording=recording))
    P = ranks or next(P for P in (4, 2, 1) if whole.experts % P == 0 and whole.tokens >= P)
    if whole.experts % P:
        raise ValueError(f"--ranks {P}: the {whole.experts} experts of --recording {recording} cannot be shared evenly")
    # As many tokens as leave eight steps, for a spread over steps; fewer steps where the recording is short.
    T = tokens or max(1, min(whole.tokens // P, max(16, whole.tokens // P // 8)))
    if whole.tokens < P * T:
        raise ValueError(
            f"--recording {recording} has {whole.tokens} tokens, and a step of {P} ranks with {T} tokens each takes "
            f"{P * T}: ask for fewer --ranks or --tokens"
        )
    return replace(whole, ranks=P, tokens=T)


def routings(asked: Asked) -> list[Callable[[], Routing]]:
    """The routings of the reader's recordings; without any, of the project's own recording and of the plan.

    Raises ValueError as `recorded_case` does.
    """
    plan = planned(asked)
    if asked.recordings:
        cases = [recorded_case(recording, asked.ranks, asked.tokens) for recording in asked.recordings]
        return [partial(recorded_routing, case, plan.steps) for case in cases]
    base, middle = plan.base, plan.skews[len(plan.skews) // 2]
    made: list[Callable[[], Routing]] = []
    with suppress(ValueError):  # the recording is small: it may have too few tokens for these ranks
        made.append(partial(recorded_routing, recorded_case(BROUGHT, asked.ranks, asked.tokens), plan.steps))
    shaped = [(base, skew) for skew in plan.skews] + [(replace(base, **shape), middle) for shape in plan.shapes]
    for case, skew in shaped:
        made.append(partial(zipf_routing, case, skew, steps_that_fit(case, plan.steps), base.seed))
    return made


# ---- Tables and plots


def by_routing(figures: Sequence[Figures]) -> dict[tuple, list[Figures]]:
    """Figures of each routing and shape."""
    groups: dict[tuple, list[Figures]] = {}
    for f in figures:
        groups.setdefault((f.routing, f.ranks, f.tokens, f.experts, f.top_k, f.width), []).append(f)
    return groups


def find(figures: Sequence[Figures], factor: str, per: str, priority: str = "token") -> Figures:
    """The figures in a group with this capacity factor, kind of bin and priority."""
    return next(f for f in figures if (f.factor, f.per, f.priority) == (factor, per, priority))


def commonest(groups: dict[tuple, list[Figures]]) -> list[list[Figures]]:
    """Recordings and those of the commonest shape, which differ in skew only."""
    shapes = [key[1:] for key in groups]
    common = max(shapes, key=shapes.count, default=None)
    return [g for key, g in groups.items() if key[1:] == common or not key[0].startswith("zipf")][:8]


def _shape(f: Figures) -> str:
    return f"{f.ranks} x {f.tokens}, {f.top_k} of {f.experts}"


def percent(rate: float) -> str:
    """A percentage with one decimal; small values other than zero are not shown as zero."""
    return "0%" if rate == 0 else "<0.1%" if rate < 0.0005 else f"{100 * rate:.1f}%"


def rounded_up(factor: float) -> str:
    """A factor with two decimals that is still enough."""
    return f"{np.ceil(100 * factor - 1e-9) / 100:.2f}"


def enough(f: Figures) -> tuple[str, str]:
    """The factor at which nothing drops, rounded up, and the share of steps in which that holds."""
    factor = least(f.needed, f.steps)
    if f.steps == 1:
        return factor, "in its one step (one step: no percentile)"
    return factor, f"in any of its {f.steps} steps" if f.steps < 100 else "in 99% of steps"


def least(needed: Spread, steps: int) -> str:
    """The factor, rounded up, at which nothing drops in 99% of steps; in all, where there are fewer than 100."""
    return rounded_up(needed.worst if steps < 100 else needed.p99)


def losses(group: Sequence[Figures], per: str) -> str:
    """What 1.25 drops with this kind of bin, and the largest factor of the sweep that is not enough."""
    needed = float(enough(find(group, "1", per))[0])
    every = [find(group, factor, per) for factor in FACTORS]
    less = [f for f in every if float(f.factor) < needed and f.dropped][-1:]
    shown = [f for f in every if f.factor == "1.25" or f in less]
    said = [f"{f.factor} drops {percent(f.dropped) if f.dropped else 'nothing'}" for f in reversed(shown)]
    return " and ".join(said)


def sentence(group: Sequence[Figures], recorded: Recorded | None = None) -> str:
    """What capacity one routing needs, what it loses with less, and what that rests on."""
    rank, expert = (find(group, "1", per) for per in PER)
    factor, when = enough(rank)
    name = "even routing" if rank.routing == "zipf 0" else rank.routing
    said = (
        f"For {name} ({rank.ranks} ranks of {rank.tokens} tokens, {rank.top_k} of {rank.experts} experts "
        f"each), a capacity factor of {factor} with a bin per rank drops nothing {when}; {losses(group, 'rank')}. "
        f"With a bin per expert it takes {enough(expert)[0]}; {losses(group, 'expert')}."
    )
    if rank.steps < 100:
        most = f"the most that any of {rank.steps} steps needs" if rank.steps > 1 else "of one step"
        said += f" Both factors are {most}, which is no safety margin."
    for f in group:
        if f.own:
            said += f" Your capacity, a factor of {f.factor} with a bin per {f.per}, drops {percent(f.dropped)}."
    if recorded:
        said += leftover(recorded, rank.steps) + placement(recorded, rank)
    return said + assumed(rank)


def leftover(recorded: Recorded, steps: int) -> str:
    """A sentence on the tokens of a recording that are not used, if there are any."""
    if not (left := recorded.recorded - recorded.used):
        return ""
    fill = f"fill {steps} whole steps" if steps > 1 else "fill one whole step"
    return f" Of its {recorded.recorded:,} tokens the first {recorded.used:,} {fill}; the last {left:,} are left out."


def placement(recorded: Recorded, rank: Figures) -> str:
    """Sentences on where the experts are, if placing them evenly would make a difference of more than 5%."""
    placed = least(recorded.needed_placed, rank.steps)
    if float(enough(rank)[0]) <= 1.05 * float(placed):
        return ""
    experts = ", ".join(map(str, recorded.busiest_experts))
    return (
        f" Rank {recorded.busiest_rank} gets {recorded.over_mean:.2f} times the mean, by "
        f"expert{'s' * (len(recorded.busiest_experts) > 1)} {experts}. With experts placed evenly over the ranks, "
        f"a rank bin would need {placed}."
    )


def assumed(f: Figures) -> str:
    """A sentence on the ranks and tokens that the reader, whose recording it is, left to the study."""
    left = [(f"--ranks {f.ranks}", "more ranks")] * f.ranks_by_default
    left += [(f"--tokens {f.tokens}", "fewer tokens on a rank")] * f.tokens_by_default
    if not left:
        return ""
    flags, harder = (" and ".join(words) for words in zip(*left, strict=True))
    return f" This assumes {flags}: give what your training step has, as {harder} need a larger factor."


def answer(study: Study) -> list[str]:
    """Sentences on the reader's own routings; without any, on a recorded and an even routing."""
    groups = list(by_routing(study.of(Figures)).values())
    leading = [group for group in groups if group[0].brought]
    if all(group[0].routing == BROUGHT for group in leading):
        leading += [group for group in groups if group[0].routing == "zipf 0"][:1]
    recorded = {(r.routing, r.ranks, r.tokens): r for r in study.of(Recorded)}
    return [
        sentence(group, recorded.get((group[0].routing, group[0].ranks, group[0].tokens)))
        for group in leading or groups[:1]
    ]


def _needed(f: Figures) -> str:
    if f.steps == 1:
        return "one step: no percentile"
    return f"{'all' if f.steps < 100 else '99% of'} {f.steps} steps".replace(" ", "\N{NO-BREAK SPACE}")


def inputs_note(groups: Iterable[Sequence[Figures]]) -> str:
    """A sentence on the inputs that errors were computed with, for all routings whose errors are known."""
    names: dict[str, dict[str, None]] = {}
    for f in (group[0] for group in groups):
        if f.out_error is not None:
            names.setdefault(f.drawn, {})[f.routing if f.brought else "zipf"] = None
    said = [
        f"{', '.join(of)} has {f'{drawn} drawn at random' if drawn else 'its own tokens and weights'}"
        for drawn, of in names.items()
    ]
    return f"Errors are of the first step: {'; '.join(said)}." if said else ""


NOTE = (
    "'drops at' a factor is the share of all assignments that it drops; 'pads at' is the share of the rows sent that "
    "is padding."
)
NO_SCORES = (
    "The recording has no hidden states, so its scores are not known: errors are not measured, and priority score is "
    "left out."
)


def note(groups: Iterable[Sequence[Figures]]) -> str:
    """What the columns of the table hold."""
    inputs = inputs_note(groups)
    return f"{NOTE} 'output off' is the error of the output with priority token. {inputs}" if inputs else NOTE


def drop_table(study: Study) -> Rows | None:
    """One row per routing and kind of bin: capacity needed and, at some factors, what drops and what is padding."""
    if not (figures := study.of(Figures)):
        return None
    asked, known = [f for f in figures if f.own], any(f.out_error is not None for f in figures)
    columns = ["routing", "bin per", "needed", *(f"drops at {factor}" for factor in SHOWN), *as_asked(asked),
               "ranks x tokens, experts a token", "enough in", "needed, median", "needed, worst",
               *(f"pads at {factor}" for factor in SHOWN),
               *(["output off at 1"] if known else [])]  # fmt: skip
    rows, groups = [], by_routing(figures).values()
    for group in groups:
        for per in PER:
            first = find(group, "1", per)
            shown = [find(group, factor, per) for factor in SHOWN]
            own = [" / ".join(_two(f)) if f.per == per else "" for f in group if f.own]
            rows.append([
                first.routing, per, enough(first)[0], *(percent(f.dropped) for f in shown), *own,
                _shape(first), _needed(first), rounded_up(first.needed.median), rounded_up(first.needed.worst),
                *(f"{100 * f.padded:.0f}%" for f in shown),
                *(["-" if first.out_error is None else percent(first.out_error)] if known else []),
            ])  # fmt: skip
    title = f"The capacity factor needed to drop nothing, and what less of it costs. {note(groups)}"
    return Rows(title, columns, rows, 2)


def _two(f: Figures) -> tuple[str, str]:
    return percent(f.dropped), f"{100 * f.padded:.0f}%"


def as_asked(figures: Sequence[Figures]) -> list[str]:
    """The heading of the column for the capacity that was asked for, if one was."""
    return [f"yours, {f.factor} per {f.per}: drops / pads" for f in figures[:1]]


def drop_section(study: Study) -> str:
    """The figures to choose from, and the table of the terminal."""
    if not (found := drop_table(study)):
        return ""
    groups = by_routing(study.of(Figures)).values()
    chosen = [
        {
            "name": f"{group[0].routing}: {_shape(group[0])}",
            "when": enough(group[0])[1],
            "needed": {per: enough(find(group, "1", per))[0] for per in PER},
            "note": inputs_note([group]) or NO_SCORES,
            "figures": group,
        }
        for group in groups
    ]
    data = script_data({"groups": chosen, "factors": FACTORS})
    return PAGES.get_template("costs.html.j2").render(data=data) + section(
        "drops", "Capacity needed, and what drops below it",
        note(groups), found.columns, found.rows,
    )  # fmt: skip


def plots(study: Study) -> dict[str, Plot]:
    """Plots of what drops, and of the errors where they are known."""
    if not (figures := study.of(Figures)):
        return {}
    shown = commonest(by_routing(figures))
    found = {f"drops-{per}.svg": _drops(shown, per) for per in PER}
    found["positions.svg"] = _positions(shown[len(shown) // 2])
    if known := [f for f in figures if f.out_error is not None]:
        for name, what in (("out_error", "output"), ("dx_error", "gradient")):
            found[f"error-of-{what}.svg"] = _errors(known, name, what)
    return found


def _drops(groups: Sequence[Sequence[Figures]], per: str) -> Plot:
    figure, ax = axes()
    for group in groups:
        points = [find(group, factor, per) for factor in FACTORS]
        ax.plot([float(p.factor) for p in points], [100 * p.dropped for p in points], "o-", label=points[0].routing)
    ax.set(title=f"a bin per {per}", xlabel="capacity factor", ylabel="assignments dropped, %")
    plain(ax.xaxis, [0.5, 1, 1.5, 2, 3, 4])
    return Plot(svg(figure), f"Assignments dropped against the capacity factor, with a bin per {per}, priority token.")


def _positions(group: Sequence[Figures]) -> Plot:
    figure, ax = axes()
    for priority in dict.fromkeys(f.priority for f in group):
        f = find(group, "1", "rank", priority)
        ax.plot(np.arange(5, 100, 10), [100 * r for r in f.dropped_by_position], "o-", label=f"priority {priority}")
    ax.set(
        title=f"{group[0].routing}, capacity factor 1, a bin per rank", xlabel="position in the rank's tokens, %",
        ylabel="assignments dropped, %", ylim=(0, None),
    )  # fmt: skip
    said = f"Assignments of {group[0].routing} dropped in each tenth of a rank's tokens in order"
    return Plot(svg(figure), f"{said}, always at a capacity factor of 1 with a bin per rank.")


def _errors(figures: Sequence[Figures], name: str, what: str) -> Plot:
    figure, ax = axes()
    for priority, marker in zip(PRIORITIES, "o^s", strict=True):
        points = [(f.dropped, getattr(f, name)) for f in figures if f.priority == priority and not f.own]
        ax.plot(*(100 * np.array(points, float).T), marker, alpha=0.6, label=f"priority {priority}")
    of = {"output": "output", "gradient": "tokens' gradient"}[what]
    ax.set(title=f"error of the {of}", xlabel="assignments dropped, %", ylabel="relative error in L2, %")
    said = f"Relative error of the {of} against the dropless layer, by the share that is dropped."
    return Plot(svg(figure), f"{said} {inputs_note(by_routing(figures).values())}")


def jobs(asked: Asked) -> list[Callable[[], list[Figures | Recorded]]]:
    """One job per routing: those of the presets asked for, or those of the plan and the recordings."""
    made = [partial(preset_routing, case, 8) for case in asked.presets]
    if asked.recordings or not made:
        made += routings(asked)
    return [partial(_swept, asked, routing) for routing in made]


def _swept(asked: Asked, routing: Callable[[], Routing]) -> list[Figures | Recorded]:
    made, own = routing(), asked.capacity
    found = list(sweep(made))
    if own:
        known = own.priority in {f.priority for f in found}  # which rows drop depends on it, how many does not
        as_asked = measure(made, own.capacity_factor, own.capacity_per, own.priority if known else "token")
        found.append(msgspec.structs.replace(as_asked, own=True))
    recording = made.case.recording
    no_width = bool(recording) and "D" not in sizes_of_recording(recording)
    for f in found:
        f.brought = not made.name.startswith("zipf ")
        f.ranks_by_default = bool(asked.recordings) and not asked.ranks
        f.tokens_by_default = bool(asked.recordings) and not asked.tokens
        if no_width:
            f.width = f.useful_bytes = f.wasted_bytes = f.dynamic_bytes = f.memory = f.dynamic_memory = None
    return [*found, recorded_facts(made)] if recording else [*found]


PART = Part("sweep", jobs, answer=answer, table=drop_table, section=drop_section, plots=plots)
