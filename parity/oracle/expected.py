"""What each array of a run should hold, and how far off each number may be."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.cases.case import Case
from parity.oracle import vectorised
from parity.oracle.evaluation import Evaluation
from parity.oracle.problem import Problem
from parity.oracle.quantities import OUTSIDE, Quantity, quantity_of
from parity.oracle.rows import Layout
from parity.oracle.tolerances import DRAWS, allowance, shares_allowance, shares_of, slope_allowance

Array = np.ndarray

_THREADS = ThreadPoolExecutor()


def map_of(case: Case) -> Callable[..., Iterable[Any]]:
    """A `map`: in threads where arrays are large, on which NumPy lets go of the interpreter's lock.

    On small ones threads take the lock from each other: twice the time, and three times the CPU.
    """
    return map if vectorised.small(case) else _THREADS.map


@dataclass(frozen=True)
class Expected:
    """What an array should hold, in a form that no layout touches: the axes of its quantity, rows by row number."""

    name: str  # mode/stage/value
    quantity: Quantity
    values: Array
    allowed: Array | None  # None: bitwise
    dtype: str
    case: Case
    slope: Array | None = None  # `in_groups`, how far from 1 that of got on expected may be
    choices: Array | None = None  # of the layer's output: `shares_of` what each of the K choices adds to it
    share: Array | None = None  # how far from 1 the share of each may be

    @property
    def mode(self) -> str:
        """isolated, e2e or repeat."""
        return self.name.split("/")[0]

    def as_second(self) -> "Expected":
        """Of the second step."""
        return replace(self, name=self.name.replace("e2e", "second", 1))

    def in_groups(self, values: Array) -> list[Array]:
        """[1, n], all numbers, and [groups, n]: of each rank, or each expert, as the router's gradient has columns."""
        by_group = values.T if self.axes == "D E" else values
        return [
            values.reshape(1, -1),
            *[by_group.reshape(len(by_group), -1)] * (self.axes[0] in "PE" or self.axes == "D E"),
        ]

    @property
    def axes(self) -> str:
        """Of the values; of a repetition, one number."""
        return "" if self.mode == "repeat" else self.quantity.axes


class Oracle:
    """The exact evaluation of a problem and its draws, kept for every array that is asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n = vectorised.draws_at_once(problem.case)
        self.exact = Evaluation(problem)
        self.draws = [Evaluation(problem, range(i, i + n)) for i in range(0, DRAWS, n)]
        self.second = Oracle(problem.second) if problem.second else None

    def expected(self, names: Iterable[str], layout: Layout) -> dict[str, Expected]:
        """What the arrays of these names should hold, but for those of which the case has nothing to compare.

        Raises ValueError on a name that is no quantity's.
        """
        names = list(names)
        seconds = [name.replace("second", "e2e", 1) for name in names if name.startswith("second")]
        beside = self.second.expected(seconds, layout) if self.second else {}
        first = [name for name in names if not name.startswith("second")]
        asked = {name: quantity for name in first if (quantity := quantity_of(name)).asks(self.problem.case)}
        arithmetic = [name for name, quantity in asked.items() if not _bitwise(name, quantity, self.problem.case)]

        def evaluated(some: Evaluation) -> dict[str, Array]:
            return {name: _value(some, name, asked[name], layout) for name in arithmetic}

        drawn = list(map_of(self.problem.case)(evaluated, self.draws))
        return {
            name: self._expected(name, quantity, layout, [one for some in drawn if name in some for one in some[name]])
            for name, quantity in asked.items()
        } | {want.name: want for want in map(Expected.as_second, beside.values())}

    def _expected(self, name: str, quantity: Quantity, layout: Layout, drawn: list[Array]) -> Expected:
        if name.startswith("repeat"):
            return Expected(name, quantity, np.zeros(1), None, "int", self.problem.case)
        case, exact = self.problem.case, _value(self.exact, name, quantity, layout)
        dtype = case.dtype_of(quantity.dtype)
        want = Expected(name, quantity, exact, allowance(exact, drawn, dtype) if drawn else None, dtype, case)
        if name not in OUTSIDE or not exact.size:
            return want
        grouped = list(zip(*(want.in_groups(a) for a in (exact, *drawn)), strict=True))
        allowed = [slope_allowance(groups, of_draws, dtype, case.wide) for groups, *of_draws in grouped]
        want = replace(want, slope=np.concatenate(allowed))
        if name != OUTSIDE[0] or case.top_k == 1:
            return want
        choices = shares_of(self._added_by_choice())
        whole, *of_draws = grouped[0]
        return replace(want, choices=choices, share=shares_allowance(choices, whole, of_draws, dtype, case.wide))

    def _added_by_choice(self) -> Array:
        """[K, P * T * D], what each token's first choice adds to the output, its second, and so on."""
        layer, keep, case = self.exact.layer, self.problem.keep, self.problem.case
        weight = np.ones_like(layer.score) if case.score_on == "input" else layer.score
        weighted = np.where(keep[..., None], weight[..., None] * layer.y, 0)
        return np.moveaxis(weighted, 2, 0).reshape(case.top_k, -1)


def _bitwise(name: str, quantity: Quantity, case: Case) -> bool:
    return name.startswith("repeat") or quantity.bitwise(name.split("/")[0], case)


def _value(one: Evaluation, name: str, quantity: Quantity, layout: Layout) -> Array:
    values = getattr(quantity, name.split("/")[0])(one, layout)
    if quantity.axes[0] == "A":
        draws, width = values.shape[: one.draws is not None], values.shape[values.ndim - quantity.axes.count("D") :]
        return values.reshape(*draws, one.case.ranks * one.case.assignments, *width)
    return values
