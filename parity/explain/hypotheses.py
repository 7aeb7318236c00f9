"""Explanations of what was measured, and how the right one is known: it fits, and no other comes near."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.judge.card import Finding
from parity.oracle.tolerances import unit_roundoff

Array = np.ndarray

# How many times the tolerance a rival must be off by: below, both are called possible.
MARGIN = 3.0

# Roundings on the way to a number of the output: of the score, of what the expert makes, of both of their products.
ROUNDINGS = 4

# Units in float32 that a function of a router or an activation may be off by: 1 + erf(x) loses digits below zero.
UNITS = 256


CANNOT_TELL, OR = "cannot tell: ", "; or "


def tolerance(dtype: str) -> float:
    """The largest error of a right explanation, as a part of what it explains: roundings to the dtype, and to float32.

    Also in float64, whose routers are often in float32.
    """
    return ROUNDINGS * unit_roundoff(dtype) + UNITS * unit_roundoff("float32")


@dataclass
class Hypothesis:
    """An explanation, and how far off it is."""

    what: str
    residual: float
    fields: dict[str, Any] = field(default_factory=dict)
    odd: bool = False  # no case says it


def residual(got: Array, expected: Array, floor: float = 1e-3) -> float:
    """The largest error, as a part of each number; of numbers below `floor` of the largest, as a part of that."""
    if got.size == 0:
        return 0.0
    largest = max(float(np.abs(expected).max(initial=0)), 1e-300)
    error = np.abs(got - expected) / np.maximum(np.abs(expected), floor * largest)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def times(got: Array, expected: Array) -> float:
    """The factor by which `got` is `expected`, by least squares."""
    square = float((expected * expected).sum())
    return float((got * expected).sum()) / square if square > 0 else 0.0


def decide(
    key: str,
    hypotheses: Sequence[Hypothesis],
    tolerance: float,
    experiment: str,
    preferred: dict[str, Any] | None = None,
) -> Finding:
    """The finding: of explanations that fit, the one; or those that cannot be told apart; or none.

    Among those that cannot be told apart, and those that say the same in other fields, the one with the `preferred`
    fields, the asked case's, stands for all.
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
    """In words, the explanation that stands for all that fit."""
    return finding.what.removeprefix(CANNOT_TELL).split(OR)[0]


def _rival(others: Sequence[Hypothesis]) -> tuple[str, float | None]:
    return (others[0].what, others[0].residual) if others else ("", None)
