"""Explanations of measurements, and the choice of the right one: it fits, and no other comes near."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.judge.card import Finding
from parity.oracle.tolerances import unit_roundoff

Array = np.ndarray

# A rival must be off by this many tolerances; otherwise both explanations count as possible.
MARGIN = 3.0

# Roundings on the way to an output number: the score, the expert's output, and two products.
ROUNDINGS = 4

# Error in float32 units of a score function or an activation: 1 + erf(x) loses digits below zero.
UNITS = 256


CANNOT_TELL, OR = "cannot tell: ", "; or "


def tolerance(dtype: str) -> float:
    """The largest relative error of a right explanation: roundings to the dtype and to float32.

    Float32 roundings count in float64 too, as routers of float64 layers are often in float32.
    """
    return ROUNDINGS * unit_roundoff(dtype) + UNITS * unit_roundoff("float32")


@dataclass
class Hypothesis:
    """An explanation, and how far off it is."""

    what: str
    residual: float
    fields: dict[str, Any] = field(default_factory=dict)
    odd: bool = False  # True: no case can express it


def residual(got: Array, expected: Array, floor: float = 1e-3) -> float:
    """The largest relative error. Numbers below `floor` times the largest are compared relative to that product."""
    if got.size == 0:
        return 0.0
    largest = max(float(np.abs(expected).max(initial=0)), 1e-300)
    error = np.abs(got - expected) / np.maximum(np.abs(expected), floor * largest)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def times(got: Array, expected: Array) -> float:
    """The factor f of got = f * expected, by least squares."""
    square = float((expected * expected).sum())
    return float((got * expected).sum()) / square if square > 0 else 0.0


def decide(
    key: str,
    hypotheses: Sequence[Hypothesis],
    tolerance: float,
    experiment: str,
    preferred: dict[str, Any] | None = None,
) -> Finding:
    """The finding: the one explanation that fits, several that cannot be told apart, or none.

    Of explanations that cannot be told apart, or that say the same in other fields, the one with the `preferred`
    fields, those of the asked case, stands for all.
    """
    ranked = sorted(hypotheses, key=lambda h: math.inf if math.isnan(h.residual) else h.residual)
    best = ranked[0]
    if not best.residual <= tolerance:
        nearest = f"none of {len(ranked)} explanations fits; nearest: {best.what}"
        return Finding(key, nearest, "unknown", best.residual, *_rival(ranked[1:]), experiment)
    fits = [h for h in ranked if h.residual <= MARGIN * tolerance]
    words = list(dict.fromkeys(h.what for h in fits))
    others = [h for h in ranked if h.what not in words]
    wanted = preferred or {}
    usual = [h for h in fits if not h.odd] or fits
    chosen = max(usual, key=lambda h: sum(wanted.get(name) == value for name, value in h.fields.items()))
    if len(words) == 1:
        state = "odd" if chosen.odd else "found"
        return Finding(key, chosen.what, state, chosen.residual, *_rival(others), experiment, chosen.fields)
    what = CANNOT_TELL + OR.join([chosen.what, *(word for word in words if word != chosen.what)])
    return Finding(key, what, "cannot tell", chosen.residual, *_rival(others), experiment, chosen.fields)


def chosen_of(finding: Finding) -> str:
    """The words of the explanation that stands for all that fit."""
    return finding.what.removeprefix(CANNOT_TELL).split(OR)[0]


def _rival(others: Sequence[Hypothesis]) -> tuple[str, float | None]:
    return (others[0].what, others[0].residual) if others else ("", None)
