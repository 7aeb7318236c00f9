"""Routings to study, and which of their assignments a capacity drops: nothing else decides that.

Letters besides the layer's own: n steps. A routing is expert ids and scores [n, P, T, K].
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, Parameters
from parity.cases.recording import case_of_recording, load_recording, recording_name
from parity.oracle import vectorised
from parity.oracle.problem import draw
from parity.oracle.reference import Exact, chosen_scores

Array = np.ndarray

PER = ("rank", "expert")
PRIORITIES = ("token", "choice", "score")
MOST_ASSIGNMENTS = 2**18  # most assignments of one routing in a sweep: steps are cut to fit, to bound memory and time


class Routing(NamedTuple):
    """Steps of one routing, and the case whose shapes it has."""

    name: str
    case: Case
    expert_id: Array  # [n, P, T, K]
    score: Array  # [n, P, T, K]


def zipf_routing(case: Case, skew: float, steps: int, seed: int = 0) -> Routing:
    """Logits are -skew * log(popularity rank) plus Gumbel noise, so first choices follow Zipf's law with that exponent.

    The popularity of each expert is drawn once for all steps. Scores are the softmax of the logits.
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
        learned = Parameters(**{n: a.astype(np.float64) for n, a in tensors.items() if n in BY_NAME})
        _, every = vectorised.route(all_in_one, x, learned, Exact())
        score = chosen_scores(all_in_one, every, ids[None], learned, Exact()).weight[0].astype(np.float32)
    n = min(steps, len(ids) // (P * T))
    ids, score = (a[: n * P * T].reshape(n, P, T, -1) for a in (ids, score))
    return Routing(recording_name(case.recording), replace(all_in_one, ranks=P, tokens=T, name=case.name), ids, score)


def preset_routing(case: Case, steps: int) -> Routing:
    """A preset's own routing, drawn with as many seeds; a recording's only once, as it does not change.

    Raises ValueError as `draw` does.
    """
    problems = [draw(replace(case, seed=case.seed + i)) for i in range(1 if case.recording else steps)]
    ids, score = (np.stack([getattr(problem, name) for problem in problems]) for name in ("expert_id", "score"))
    return Routing(case.name, case, ids, score)


def steps_that_fit(case: Case, steps: int) -> int:
    """The number of steps, 1 to `steps`, that keeps a routing within MOST_ASSIGNMENTS."""
    return max(1, min(steps, MOST_ASSIGNMENTS // max(1, case.ranks * case.tokens * case.top_k)))


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
