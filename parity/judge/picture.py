"""What a case looks like: where rows went, where errors are, and how large they are for the size of the numbers."""

from threading import Lock

import msgspec
import numpy as np

from parity.oracle import reference
from parity.oracle.problem import Problem

Array = np.ndarray
_LOCK = Lock()  # arrays are compared in threads


class Magnitude(msgspec.Struct):
    """Of all numbers with 2**exponent <= |expected| < 2**(exponent + 1): how many, largest error, largest allowance."""

    exponent: int
    numbers: int
    error: float
    allowed: float


class Picture(msgspec.Struct):
    """One case, small enough to draw."""

    kept: list[list[int]]  # [P, E], assignments of each source rank for each expert
    dropped: list[list[int]]  # [P, E]
    padding: list[int]  # rows of padding that each rank sends on the static side
    # By backend, [P, E]: the largest error over its allowance in any row of (source rank, expert); null without rows.
    worst: dict[str, list[list[float | None]]] = {}
    # By "backend mode/stage/value", for arrays that are judged within an allowance.
    magnitudes: dict[str, list[Magnitude]] = {}

    def add_rows(self, backend: str, rank: Array, expert: Array, ratio: Array) -> None:
        """Error over allowance, [n, ...], of rows with these source ranks and experts."""
        worst = self.worst.setdefault(backend, [[None] * len(self.kept[0]) for _ in self.kept])
        by_row = ratio.reshape(ratio.shape[0], -1).max(axis=1, initial=0)
        with _LOCK:
            for p, g, value in zip(rank.tolist(), expert.tolist(), by_row.tolist(), strict=True):
                worst[p][g] = max(worst[p][g] or 0.0, value)

    def add_magnitudes(self, name: str, expected: Array, error: Array, allowed: Array) -> None:
        """Error and allowance against the size of what was expected."""
        expected, error, allowed = (a.reshape(-1) for a in (expected, error, np.broadcast_to(allowed, expected.shape)))
        seen = (expected != 0) & np.isfinite(error)
        if not seen.any():
            self.magnitudes[name] = []
            return
        exponent = np.frexp(expected[seen])[1] - 1
        lowest, at = int(exponent.min()), exponent - exponent.min()
        count = np.bincount(at)
        worst, most = np.zeros(count.size), np.zeros(count.size)
        np.maximum.at(worst, at, error[seen])
        np.maximum.at(most, at, allowed[seen])
        self.magnitudes[name] = [
            Magnitude(lowest + i, int(count[i]), float(worst[i]), float(most[i]))
            for i in np.flatnonzero(count).tolist()
        ]


def blank(problem: Problem) -> Picture:
    """Where rows went, before any trace is looked at."""
    case = problem.case
    everything, kept = (reference.sent(case, problem.expert_id, problem.keep, s) for s in ("dynamic", "static"))
    padding = case.bins * case.capacity - kept.sum(axis=1)
    return Picture(kept.tolist(), (everything - kept).tolist(), padding.tolist())
