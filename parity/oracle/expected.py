"""What each array of a run should hold, and how far off each number may be."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from parity.cases.case import Case
from parity.oracle import vectorised
from parity.oracle.arrays import Array, space_of, to_numpy
from parity.oracle.evaluation import Evaluation
from parity.oracle.problem import Problem
from parity.oracle.quantities import OUTSIDE, Quantity, quantity_of
from parity.oracle.rows import Layout
from parity.oracle.tolerances import (
    DRAWS,
    alike,
    allowed,
    leaning,
    noise,
    shares_allowance,
    shares_of,
    shares_of_slope,
    strayed,
)

_THREADS = ThreadPoolExecutor(os.cpu_count())


def mapped(case: Case, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """A `map`. Where arrays are large it runs one thread per core, because NumPy then releases the interpreter's lock.

    On small arrays threads contend for the lock, and take twice the time and three times the CPU. Matrix products use
    no threads of their own meanwhile: with a thread per core in each, they would be many times as slow.
    """
    if vectorised.small(case) or vectorised.on_gpu(case):
        return [function(item) for item in items]
    with threadpool_limits(1):
        return list(_THREADS.map(function, items))


@dataclass(frozen=True)
class Expected:
    """What an array should hold, in a form that no layout touches: the axes of its quantity, rows by row number."""

    name: str  # mode/stage/value
    quantity: Quantity
    exact: Evaluation
    layout: Layout
    yardstick: Array | None  # one per row; None where the comparison is bitwise
    dtype: str
    slope: np.ndarray | None = None  # by `in_groups`: how far from 1 the slope of got on expected may be
    choices: Array | None = None  # for the layer's output: `shares_of` what each of the K choices adds
    share: np.ndarray | None = None  # how far from 1 each choice's share may be

    @property
    def case(self) -> Case:
        """Whose array it is."""
        return self.exact.case

    @property
    def mode(self) -> str:
        """isolated, e2e, second or repeat."""
        return self.name.split("/")[0]

    @property
    def values(self) -> Array:
        """All of it, made anew each time."""
        if self.mode == "repeat":
            return np.zeros(1)
        return _value(self.exact, self.name.replace("second", "e2e", 1), self.quantity, self.layout)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(self.values.shape)

    @property
    def allowed(self) -> Array | None:
        """How far off each number may be; None where it must be exact."""
        return None if self.yardstick is None else allowed(self.values, self.yardstick, self.dtype)

    def as_second(self) -> "Expected":
        """Of the second step."""
        return replace(self, name=self.name.replace("e2e", "second", 1))

    @property
    def axes(self) -> str:
        """Of the values; of a repetition, one number."""
        return "" if self.mode == "repeat" else self.quantity.axes


def in_groups(axes: str, values: Array) -> list[Array]:
    """[1, n], all numbers, and [groups, n]: of each rank, or each expert, as the router's gradient has columns."""
    by_group = values.T if axes == "D E" else values
    return [values.reshape(1, -1), *[by_group.reshape(len(by_group), -1)] * (axes[0] in "PE" or axes == "D E")]


@dataclass
class Strayed:
    """The largest errors of one array over all draws so far: per row, per scale, and per choice's share."""

    rows: Any = 0.0
    scales: Any = 0.0
    shares: Any = 0.0

    def more(self, other: "Strayed", xp: Any) -> None:
        """Those of another draw, too."""
        self.rows = xp.maximum(other.rows, self.rows)
        self.scales, self.shares = np.maximum(self.scales, other.scales), np.maximum(self.shares, other.shares)


class Oracle:
    """The exact evaluation of a problem, and how far draws deviate from it. No draw is kept."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.case = problem, problem.case
        self.exact = Evaluation(problem)
        self.xp = space_of(self.exact.inputs["x"])
        self.strayed: dict[str, Strayed] = {}
        self.second = Oracle(problem.second) if problem.second else None
        self._choices: Array | None = None
        rows = problem.y[problem.keep]  # in a narrow range, 16 bits make many equal that come from different tokens
        self.alike = max(alike(problem.x), alike(rows[rows.any(axis=-1)]))
        self.stopped = False  # set when nobody waits for the draws any more

    def stop(self) -> None:
        """Give up the draws that have not begun, those of a second step too."""
        self.stopped = True
        if self.second:
            self.second.stop()

    def expected(self, names: Iterable[str], layout: Layout) -> dict[str, Expected]:
        """What the arrays of these names should hold, without those that have nothing to compare in this case.

        Raises ValueError on a name that is no quantity's.
        """
        names = list(names)
        self.measure(names)
        seconds = [name.replace("second", "e2e", 1) for name in names if name.startswith("second")]
        beside = self.second.expected(seconds, layout) if self.second else {}
        first = [name for name in names if not name.startswith("second")]
        asked = {name: quantity for name in first if (quantity := quantity_of(name)).asks(self.case)}
        return {name: self._expected(name, quantity, layout) for name, quantity in asked.items()} | {
            want.name: want for want in map(Expected.as_second, beside.values())
        }

    def measure(self, names: Iterable[str]) -> None:
        """Draw how far off these arrays may be, all at once: a draw evaluates every array that it is asked for."""
        new: dict[str, Quantity] = {}
        for name in names:
            if name.startswith("second") or name in self.strayed:
                continue
            quantity = quantity_of(name)
            if quantity.asks(self.case) and not _bitwise(name, quantity, self.case):
                new[name] = quantity
        if not new:
            return
        self.strayed |= {name: Strayed() for name in new}
        for name, quantity in new.items():  # exact values are computed once, before threads ask for them
            _value(self.exact, name, quantity, "dynamic")
        if OUTSIDE[0] in new and self.case.top_k > 1 and self.case.ranks * self.case.tokens > 0:
            self._choices = shares_of(self._added_by_choice())
        n = vectorised.draws_at_once(self.case)

        of_parts: dict[str, list[str]] = {}
        for name in new:
            of_parts.setdefault(_part(name), []).append(name)

        deviations = {} if n < DRAWS and self.xp is np else None

        def drawn(first: int) -> dict[str, Strayed]:
            if self.stopped:
                raise CancelledError
            one, found = Evaluation(self.problem, range(first, first + n), self.exact, deviations), {}
            for names in of_parts.values():
                found |= {name: self._strayed(one, name, new[name]) for name in names}
                one.parts.clear()
            return found

        for found in mapped(self.case, drawn, range(0, DRAWS, n)):
            for name, of_draw in found.items():
                self.strayed[name].more(of_draw, self.xp)

    def _strayed(self, one: Evaluation, name: str, quantity: Quantity) -> Strayed:
        """How far the array is off in these draws."""
        exact, drawn = (_value(of, name, quantity, "dynamic") for of in (self.exact, one))
        rows = strayed(drawn, exact)
        found = Strayed(self.xp.max(rows, axis=0))
        if name in OUTSIDE and exact.size:
            groups = in_groups(quantity.axes, exact)
            shares = [shares_of_slope(group) for group in groups]
            for draw in drawn:
                of_draw = in_groups(quantity.axes, draw)
                off = [
                    to_numpy(self.xp.abs(self.xp.sum(share * (a - b), axis=-1)))
                    for share, a, b in zip(shares, of_draw, groups, strict=True)
                ]
                found.scales = np.maximum(found.scales, np.concatenate(off))
                if name == OUTSIDE[0] and self._choices is not None:
                    found.shares = np.maximum(
                        found.shares, np.abs(to_numpy(self._choices @ (draw - exact).reshape(-1)))
                    )
        return found

    def _expected(self, name: str, quantity: Quantity, layout: Layout) -> Expected:
        if name.startswith("repeat"):
            return Expected(name, quantity, self.exact, layout, None, "int")
        dtype, off = self.case.dtype_of(quantity.dtype), self.strayed.get(name)
        want = Expected(name, quantity, self.exact, layout, off.rows if off else None, dtype)
        if name not in OUTSIDE or not want.values.size or not off:
            return want
        whole, *groups = in_groups(quantity.axes, want.values)
        shares, case, n = [shares_of_slope(a) for a in (whole, *groups)], self.case, len(whole)
        products = case.width + case.hidden  # one after the other: of gate or up, and of down
        products = 2 * products + case.ranks * case.tokens if quantity.backward else products
        systematic = leaning(products, case.dtype) * max(noise(case.accum_dtype), noise(case.score_dtype))
        allowed = [
            to_numpy(shares_allowance(of, a, self._put(worst), dtype, systematic, self.alike))
            for of, a, worst in zip(shares, (whole, *groups), (off.scales[:n], off.scales[n:]), strict=False)
        ]
        want = replace(want, slope=np.concatenate(allowed))
        if name != OUTSIDE[0] or self._choices is None:
            return want
        share = shares_allowance(self._choices, whole, self._put(off.shares), dtype, systematic, self.alike)
        return replace(want, choices=self._choices, share=to_numpy(share))

    def _put(self, a: np.ndarray) -> Array:
        return a if self.xp is np else self.xp.asarray(a, device=self.exact.inputs["x"].device)

    def _added_by_choice(self) -> Array:
        """[K, P * T * D], what each token's first choice adds to the output, its second, and so on."""
        layer, keep, xp = self.exact.layer, self.exact.keep, self.xp
        weight = xp.ones_like(layer.score) if self.case.score_on == "input" else layer.score
        weighted = xp.where(keep[..., None], weight[..., None] * layer.y, 0.0)
        return xp.moveaxis(weighted, 2, 0).reshape(self.case.top_k, -1)


def _part(name: str) -> str:
    """What an evaluation makes an array with: the layer, or a stage on its own."""
    mode, stage, _ = name.split("/")
    return stage if mode == "isolated" else ""


def _bitwise(name: str, quantity: Quantity, case: Case) -> bool:
    return name.startswith("repeat") or quantity.bitwise(name.split("/")[0], case)


def _value(one: Evaluation, name: str, quantity: Quantity, layout: Layout) -> Array:
    values = getattr(quantity, name.split("/")[0])(one, layout)
    if quantity.axes[0] == "A":
        draws, width = values.shape[: one.draws is not None], values.shape[values.ndim - quantity.axes.count("D") :]
        return values.reshape(*draws, one.case.ranks * one.case.assignments, *width)
    return values
