"""What a case looks like: where rows went, where errors are, and how large they are for the size of the numbers."""

from threading import Lock

import msgspec
import numpy as np

from parity.oracle import reference
from parity.oracle.arrays import largest_at, space_of, to_numpy
from parity.oracle.problem import Problem

Array = np.ndarray
_LOCK = Lock()  # arrays are compared in threads


class Magnitude(msgspec.Struct):
    """Of all numbers with 2**exponent <= |expected| < 2**(exponent + 1): how many, largest error, largest allowance."""

    exponent: int
    """Power of two below the numbers' absolute values."""
    numbers: int
    """How many numbers there are."""
    error: float
    """The largest error among them."""
    allowed: float
    """The largest allowance among them."""


class Picture(msgspec.Struct):
    """One case, small enough to draw."""

    kept: list[list[int]]
    """[P, E], assignments that each source rank keeps for each expert."""
    dropped: list[list[int]]
    """[P, E], assignments that each source rank drops for each expert."""
    padding: list[int]
    """[P], rows of padding that each rank sends in the static layout."""
    worst: dict[str, list[list[float | None]]] = {}
    """[P, E], by backend: the largest error over its allowance in rows of (source rank, expert); null without rows."""
    magnitudes: dict[str, list[Magnitude]] = {}
    """Errors by size of the expected number, by "backend mode/stage/value", for arrays judged within an allowance."""

    def add_rows(self, backend: str, rank: Array, expert: Array, ratio: Array) -> None:
        """Add ratios of error to allowance, [n], of rows with these source ranks and experts."""
        P, E = len(self.kept), len(self.kept[0])
        worst_PE = np.full((P, E), -np.inf)
        np.maximum.at(worst_PE, (rank, expert), ratio)
        with _LOCK:
            worst = self.worst.setdefault(backend, [[None] * E for _ in range(P)])
            for p, g in np.argwhere(worst_PE >= 0).tolist():
                worst[p][g] = max(worst[p][g] or 0.0, float(worst_PE[p, g]))


class Magnitudes:
    """Errors and allowances by the size of the expected number, collected from arrays that come in pieces."""

    def __init__(self) -> None:
        self.by_exponent: dict[int, Magnitude] = {}

    def add(self, expected: Array, error: Array, allowed: Array) -> None:
        """Some more numbers."""
        xp = space_of(expected)
        seen = (expected != 0) & xp.isfinite(error)
        exponent = xp.frexp(expected)[1][seen] - 1
        if not len(exponent):
            return
        lowest = int(xp.min(exponent))
        at = xp.astype(exponent - lowest, xp.int64)
        n = int(xp.max(at)) + 1
        count, worst, most = (
            to_numpy(a).tolist() for a in (xp.bincount(at), *(largest_at(n, at, a[seen]) for a in (error, allowed)))
        )
        for i in range(n):
            one = self.by_exponent.setdefault(lowest + i, Magnitude(lowest + i, 0, 0.0, 0.0))
            one.numbers, one.error = one.numbers + int(count[i]), max(one.error, worst[i])
            one.allowed = max(one.allowed, most[i])

    def found(self) -> list[Magnitude]:
        """Magnitudes of all numbers so far, small ones first."""
        return [one for _, one in sorted(self.by_exponent.items()) if one.numbers]


def blank(problem: Problem) -> Picture:
    """The picture of a case before any trace is read: where rows went, without errors."""
    case = problem.case
    everything, kept = (reference.sent(case, problem.expert_id, problem.keep, s) for s in ("dynamic", "static"))
    padding = case.bins * case.capacity - kept.sum(axis=1)
    return Picture(kept.tolist(), (everything - kept).tolist(), padding.tolist())
