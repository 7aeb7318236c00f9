"""What a layer drops: how many rows an expert or a rank keeps, which ones, and what happens to dropped weight."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from parity.cases.case import Case
from parity.explain.ask import Answer
from parity.explain.hypotheses import Hypothesis, decide, residual
from parity.explain.probes import (
    FEATURES,
    MOST,
    OFFSET,
    STEP,
    U0,
    U0_ALONE,
    V0,
    Probes,
    U,
    V,
    problem_of,
    shown,
    weights,
)
from parity.explain.reading import Reading
from parity.judge.card import Finding
from parity.oracle import reference
from parity.oracle.problem import Problem

Array = np.ndarray

TOKENS = (8, 25, 61)  # per rank, a probe each: ceil and floor differ here, as do early and late rounding
FACTORS = ("1/2", "3/4", "1", "11/10", "6/5", "5/4", "3/2", "2", "3", "4")  # tried if the case has no factor


def problems(found: Probes, factor: str | None) -> dict[str, Problem]:
    """Probes in which every token chooses expert 0: half of the tokens first, and half second, after expert 1."""
    case = found.case
    grid = np.arange(-MOST, 0, STEP / 2)
    if not found.tokens.whole or case.experts > len(grid):
        return {}
    rng, made = np.random.default_rng(30), {}
    w = weights(found, w_down=shown(case, 0))
    case = replace(case, capacity_factor=factor)
    for T in TOKENS:
        x = np.zeros((case.ranks, T, case.width))
        x[..., V], x[..., U], x[..., OFFSET] = V0, U0 if case.gated else U0_ALONE, 0
        for p, t in np.ndindex(case.ranks, T):
            x[p, t, FEATURES : FEATURES + case.experts] = rng.choice(grid, case.experts, replace=False)
        x[..., FEATURES] = 2 + np.stack([rng.permutation(T) for _ in range(case.ranks)]) / 32
        if case.top_k > 1:
            x[:, : T // 2, FEATURES + 1] = MOST - STEP
        made[f"capacity-{T}"] = problem_of(replace(case, tokens=T, name=f"probe-capacity-{T}"), x, w, evaluated=False)
    return made


def read(reading: Reading, answers: Mapping[str, Answer], factor: str | None) -> list[Finding]:
    """Findings on what is dropped."""
    case = replace(reading.case, capacity_factor=factor)
    asked = [T for T in TOKENS if f"capacity-{T}" in answers and answers[f"capacity-{T}"].out is not None]
    if not asked or reading.score is None:
        return []
    got = {}
    for T in asked:
        out = answers[f"capacity-{T}"].out
        assert out is not None
        made = out[:, reading.numbers_E] / reading.usual()
        got[T] = (np.sqrt(np.maximum(made, 0)) if reading.on_input else made).reshape(case.ranks, T, -1)
    return _findings(reading, case, got, {T: _logits(reading, T) for T in asked})


def _logits(reading: Reading, T: int) -> Array:
    problem = reading.probes.problems[f"capacity-{T}"]
    return problem.x.astype(np.float64) @ reading.probes.router_DE


def _findings(reading: Reading, case: Case, got: Mapping[int, Array], logits: Mapping[int, Array]) -> list[Finding]:
    experiment = f"all tokens want one expert, of {', '.join(map(str, got))} on a rank"
    weight = {T: np.stack([reading.score(a) for a in logits[T]]) for T in got if reading.score}
    lost = {T: int(((weight[T] != 0) & (got[T] == 0)).sum()) for T in got}
    if not any(lost.values()):
        return [Finding("dropped", "nothing, though all tokens want one expert", experiment=experiment)]
    wanted = {T: np.where(weight[T] != 0, -logits[T], np.inf) for T in got}  # closed groups have weight 0
    ids = {T: np.argsort(wanted[T], axis=-1, kind="stable")[..., : case.top_k] for T in got}
    score = {T: np.take_along_axis(weight[T], ids[T], -1) for T in got}
    seen = {T: np.take_along_axis(got[T], ids[T], -1) != 0 for T in got}

    @cache  # many rules give the same number of rows
    def wrong(T: int, rows: int, per: str, priority: tuple[str, bool], batch: bool) -> int:
        return int((_kept(case, rows, per, priority, batch, ids[T], score[T]) != seen[T]).sum())

    total = sum(a.size for a in seen.values())
    hypotheses = []
    for what, fields, rows_of, *how in _rules(case):
        off = sum(wrong(T, rows_of(T), *how) for T in got) / total
        hypotheses.append(Hypothesis(what, off, fields, not fields))
    rule = decide(
        "dropped",
        hypotheses,
        1e-9,
        experiment + "; residual: part of the assignments that is not explained",
        vars(case),
    )
    nearest = min(hypotheses, key=lambda h: h.residual)
    if rule.state == "unknown":
        counts = ", ".join(f"{(got[T][..., 0] != 0).sum(1).tolist()} of {T}" for T in got)
        rule.what = (
            f"by none of {len(hypotheses)} rules: expert 0 keeps, on each rank, {counts}; nearest: {nearest.what}"
        )
    reading.fields |= rule.fields if rule.state in ("found", "cannot tell") else {}
    T = max(got)
    kept = got[T] != 0
    alone = np.where(kept, reading.scale * weight[T], 0)
    share = alone.sum(-1, keepdims=True)
    again = np.where(
        share > 0, alone / np.where(share > 0, share, 1) * (reading.scale * weight[T]).sum(-1, keepdims=True), 0
    )
    becomes = decide(
        "weight of the dropped",
        [
            Hypothesis("is lost: the others keep theirs", residual(got[T], alone)),
            Hypothesis("goes to the others of the token", residual(got[T], again), odd=True),
        ],
        reading.tolerance,
        experiment,
    )
    return [rule, becomes]


Rows = Callable[[Fraction, int, int, int], int]  # maps factor, T, K and number of bins to rows per bin

# Capacity formulas of published layers; b is the number of bins, which are ranks or experts.
FORMS: dict[str, Rows] = {
    "ceil(f*T*K/b)": lambda f, T, K, b: math.ceil(f * T * K / b),
    "floor(f*T*K/b)": lambda f, T, K, b: math.floor(f * T * K / b),
    "floor(ceil(T*K/b)*f)": lambda f, T, K, b: math.floor(math.ceil(Fraction(T * K, b)) * f),
    "ceil(f*T/b)": lambda f, T, K, b: math.ceil(f * T / b),  # noqa: ARG005  of K nothing is said
    "floor(f*T/b)": lambda f, T, K, b: math.floor(f * T / b),  # noqa: ARG005
    "ceil(f*T*K/b) + 1": lambda f, T, K, b: math.ceil(f * T * K / b) + 1,
}
OWN = "ceil(f*T*K/b)"  # the formula of a case
LEAST = (1, 4)  # minimum rows per bin
# Which rows are kept, by the `priority` of a case and whether the order is reversed.
WHOSE = {
    ("token", False): "first tokens first",
    ("token", True): "last tokens first",
    ("choice", False): "first choices first",
    ("choice", True): "first choices first, and of these the last tokens",
    ("score", False): "largest scores first",
    ("score", True): "smallest scores first",
}


def _rules(case: Case) -> Iterable[tuple[str, dict[str, Any], Callable[[int], int], str, tuple[str, bool], bool]]:
    """Each rule: its words, the case fields that express it, rows per bin by T, and how bins are filled."""
    factors = (case.capacity_factor,) if case.capacity_factor else FACTORS
    over = (False, True) if case.ranks > 1 else (False,)
    for factor, per, form, least, priority, batch in product(factors, ("rank", "expert"), FORMS, LEAST, WHOSE, over):
        if per == "rank" and (batch or least > 1):
            continue  # with bins per rank, no known layer counts T over all ranks or has a minimum
        if "K" not in form and str(Fraction(factor) / case.top_k) in factors:
            continue  # equals the formula with K at a smaller factor
        own = form == OWN and least == 1 and not batch and not priority[1]
        fields: dict[str, Any] = {}
        if own:
            fields = {"capacity_factor": factor, "capacity_per": per, "priority": priority[0]}
        bins, ranks = case.ranks if per == "rank" else case.experts, case.ranks if batch else 1

        def rows_of(T: int, f: Fraction = Fraction(factor), form: str = form, least: int = least, n: int = bins,
                    ranks: int = ranks) -> int:  # fmt: skip
            return max(FORMS[form](f, T * ranks, case.top_k, n), least)

        formula = form.replace("b", "P" if per == "rank" else "E") + f", {least} at least" * (least > 1)
        said = f"more than {formula} rows of {'a rank' if per == 'rank' else 'an expert'}, f = {factor}"
        yield f"{said}{', T of all ranks' * batch}; {WHOSE[priority]}", fields, rows_of, per, priority, batch


def _kept(case: Case, rows: int, per: str, priority: tuple[str, bool], batch: bool, ids: Array, score: Array) -> Array:
    """Mask of the assignments that bins of `rows` rows keep, when the oracle fills them."""
    P, K = 1 if batch else case.ranks, case.top_k
    T = ids.shape[0] * ids.shape[1] // P
    bins = case.ranks if per == "rank" else case.experts
    by, other_way = priority
    capacity = str(Fraction(rows * bins, T * K))
    of = replace(case, ranks=P, tokens=T, capacity_per=per, priority=by, align=1, capacity_factor=capacity)
    ids, score = ids.reshape(P, T, K), score.reshape(P, T, K)
    if other_way and by != "score":
        kept = reference.keep_within_capacity(of, ids[:, ::-1], score[:, ::-1])[:, ::-1]
    else:
        kept = reference.keep_within_capacity(of, ids, -score if other_way else score)
    return kept.reshape(case.ranks, -1, K)
