"""What a static capacity costs and saves for a given routing: rows dropped and padded, bytes, memory, errors.

Letters besides the layer's own: n steps. A routing is expert ids and scores [n, P, T, K]; nothing else decides who is
dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.recording import case_of_recording, load_recording
from parity.oracle import vectorised
from parity.oracle.problem import draw, tokens_that_choose
from parity.oracle.reference import Exact, Layer, Weights, chosen_scores
from parity.oracle.tolerances import numpy_dtype

Array = np.ndarray

PER = ("rank", "expert")
PRIORITIES = ("token", "choice", "score")
FACTORS = ("0.5", "0.75", "1", "1.25", "1.5", "2", "3", "4")
TENTHS = 10  # parts of the sequence by which drops are counted
MOST_ASSIGNMENTS = 2**18  # of one routing in a sweep: steps are cut to fit, or memory and time run away


class Routing(NamedTuple):
    """Steps of one routing, and the case whose shapes it has."""

    name: str
    case: Case
    expert_id: Array  # [n, P, T, K]
    score: Array  # [n, P, T, K]


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


# ---- Where routings come from


def zipf_routing(case: Case, skew: float, steps: int, seed: int = 0) -> Routing:
    """Logits are -skew * log(popularity rank) plus Gumbel noise, so first choices follow Zipf's law with that exponent.

    Which expert is how popular is drawn once for all steps. Scores are the softmax of the logits.
    """
    rng = np.random.default_rng([seed, 3])
    E, shape = case.experts, (steps, case.ranks, case.tokens)
    popularity_E = rng.permutation(-skew * np.log(np.arange(1, E + 1)))
    logits = popularity_E + rng.gumbel(size=(*shape, E))
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., : case.top_k]
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    score = np.take_along_axis(power / power.sum(axis=-1, keepdims=True), ids, axis=-1)
    return Routing(f"zipf {skew:g}", case, ids.astype(np.int32), score.astype(np.float32))


def recorded_routing(case: Case, steps: int) -> Routing:
    """Consecutive stretches of P*T tokens of a recording, up to `steps` of them.

    Scores are its router's where it has hidden states; without, none is known, and all are alike.

    Raises ValueError as `load_recording` does.
    """
    assert case.recording is not None
    P, T = case.ranks, case.tokens
    all_in_one = case_of_recording(replace(case, ranks=1, tokens=0))
    tensors = load_recording(all_in_one)
    ids = tensors["expert_id"][0]
    score = np.ones(ids.shape, np.float32)
    if "x" in tensors:
        x = tensors["x"].astype(np.float64).reshape(1, -1, all_in_one.width)
        _, every = vectorised.route(all_in_one, x, tensors["router"].astype(np.float64), Exact())
        score = chosen_scores(all_in_one, every, ids[None], Exact())[0].astype(np.float32)
    n = min(steps, len(ids) // (P * T))
    ids, score = (a[: n * P * T].reshape(n, P, T, -1) for a in (ids, score))
    return Routing(case.recording, replace(all_in_one, ranks=P, tokens=T, name=case.name), ids, score)


def preset_routing(case: Case, steps: int) -> Routing:
    """A preset's own routing, drawn with as many seeds; a recording's only once, as it does not change.

    Raises ValueError as `draw` does.
    """
    problems = [draw(replace(case, seed=case.seed + i)) for i in range(1 if case.recording else steps)]
    ids, score = (np.stack([getattr(problem, name) for problem in problems]) for name in ("expert_id", "score"))
    return Routing(case.name, case, ids, score)


def steps_that_fit(case: Case, steps: int) -> int:
    """At most `steps`, so that a routing keeps to MOST_ASSIGNMENTS; at least one."""
    return max(1, min(steps, MOST_ASSIGNMENTS // max(1, case.ranks * case.tokens * case.top_k)))


# ---- Who is dropped, and what that costs


def places(routing: Routing, per: str, priority: str) -> Array:
    """[n, P, T, K]: how many assignments of its bin come before each one. A capacity of C keeps those below C."""
    ids, case = routing.expert_id, routing.case
    n, P, T, K = ids.shape
    bins = P if per == "rank" else case.experts
    a = np.arange(T * K)
    key = {"token": a, "choice": a % K, "score": -routing.score.reshape(n * P, -1)}[priority]
    bin_of = ids.reshape(n * P, -1) // (case.experts // bins) + bins * np.arange(n * P)[:, None]
    key, bin_of = np.broadcast_to(key, bin_of.shape).reshape(-1), bin_of.reshape(-1)
    order = np.lexsort((key, bin_of))  # stable: ties go to the lower assignment
    size = np.bincount(bin_of, minlength=n * P * bins)
    start = np.cumsum(size) - size
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size) - start[bin_of[order]]
    return place.reshape(ids.shape)


def counts(routing: Routing, keep: Array | None = None) -> Array:
    """[n, P, E]: assignments (those kept) of each source rank for each expert."""
    n, P, _, _ = routing.expert_id.shape
    E = routing.case.experts
    row = (np.arange(n * P)[:, None] * E + routing.expert_id.reshape(n * P, -1)).reshape(-1)
    weights = None if keep is None else keep.reshape(-1)
    return np.bincount(row, weights, minlength=n * P * E).astype(np.int64).reshape(n, P, E)


def needed_factor(counts_nPE: Array, top_k: int, tokens: int, per: str) -> Array:
    """[n]: the capacity factor at which nothing drops in a step: the fullest bin over the mean bin, T*K / bins."""
    n, P, E = counts_nPE.shape
    bins = P if per == "rank" else E
    fullest = counts_nPE.reshape(n, P, bins, -1).sum(axis=-1).max(axis=(1, 2), initial=0)
    return fullest * bins / max(tokens * top_k, 1)


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
    router: Array
    weights: Weights
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
    return Inputs(x.astype(np.float64), router, Weights(*(np.asarray(w, np.float64) for w in weights)), dout, ids)


def evaluate(case: Case, inputs: Inputs, keep: Array) -> Layer:
    """The oracle's layer, forward and backward, with only what is kept."""
    x, router, weights, dout, ids = inputs
    return vectorised.layer(case, x, router, weights, dout, ids, keep, Exact())


def errors(dropless: Layer, with_drops: Layer) -> tuple[float, float, float]:
    """Relative errors in L2 of the output, the tokens' gradient, and all expert weights' gradients."""

    def relative(*names: str) -> float:
        a, b = (np.concatenate([getattr(layer, n).reshape(-1) for n in names]) for layer in (dropless, with_drops))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300))

    return relative("out"), relative("dx"), relative("dw_gate", "dw_up", "dw_down")


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
