"""The oracle's word on a problem: every value that can be compared, exact or with every rounding drawn."""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np

from parity.oracle import reference, vectorised
from parity.oracle.problem import Problem, exact_inputs, in_float64
from parity.oracle.reference import Exact, Gradients, Layer, Numbers, Perturbed
from parity.oracle.rows import Layout, Table, row_tables

Array = np.ndarray


def part(compute: Callable[["Evaluation"], Any]) -> Any:
    """A property that is computed once. `cached_property` would let one thread at a time compute, up to Python 3.11."""

    @wraps(compute)
    def get(self: "Evaluation") -> Any:
        if compute.__name__ not in self.parts:
            self.parts[compute.__name__] = compute(self)
        return self.parts[compute.__name__]

    return property(get)


class Evaluation:
    """One evaluation of the oracle, each part when it is asked for: stages fed the problem's values, and the layer.

    `draws` None: exact. Some: with every rounding drawn, and one more axis in front of all numbers, of these draws.
    Each part has a generator of its own, so that none depends on which others are asked for.
    """

    def __init__(self, problem: Problem, draws: range | None = None) -> None:
        self.problem, self.case, self.draws = problem, problem.case, draws
        self.parts: dict[str, Any] = {}
        x, self.parameters, dout = exact_inputs(problem)
        names = ("y", "dy", "dx_rows", "score", "dscore", "given")
        numbers = [x, dout, *(getattr(problem, name).astype(np.float64) for name in names)]
        if draws:
            numbers = [np.broadcast_to(a, (len(draws), *a.shape)) for a in numbers]
        self.x, self.dout, self.y, self.dy, self.dx_rows, self.score, self.dscore, self.given = numbers

    @property
    def _oracle(self) -> ModuleType:
        """The plain loops where they are quick enough, and only for the exact values: draws are many."""
        return vectorised.oracle_for(self.case) if self.draws is None else vectorised

    def _numbers(self, part: str) -> Numbers:
        if self.draws is None:
            return Exact()
        return Perturbed(np.random.default_rng([self.case.seed, 1, self.draws.start, *part.encode()]))

    @part
    def layer(self) -> Layer:
        """The whole layer."""
        if self.draws is None:
            return self.problem.exact
        p = self.problem
        return vectorised.layer(
            self.case,
            self.x,
            self.parameters,
            self.dout,
            p.expert_id,
            p.keep,
            self._numbers("layer"),
            p.aux.astype(np.float64),
        )

    @part
    def score_of_others(self) -> Array:
        """[P, T, K], for a replay of experts that the router does not choose."""
        numbers = self._numbers("score_of_others")
        _, score_PTE = self._oracle.route(self.case, self.x, self.parameters, numbers)
        return reference.chosen_scores(
            self.case, score_PTE, self.problem.other_experts, self.parameters, numbers
        ).weight

    @property
    def counts_of_others(self) -> Array:
        """How often that replay names each expert, [P, E]."""
        others = self.problem.other_experts
        return reference.count(self.case, others, others >= 0)

    @part
    def route_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, D] of that replay, and the gradients of what the router has learned."""
        others = self.problem.other_experts
        return self._oracle.route_backward(
            self.case, self.x, self.parameters, others, self.dscore, self._numbers("route_backward")
        )

    @part
    def experts_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, K, D] and the gradients of what the experts have learned."""
        ids = self.problem.expert_id
        return self._oracle.experts_backward(
            self.case, self.given, ids, self.parameters, self.dy, self._numbers("experts_backward")
        )

    @part
    def shared(self) -> Array:
        """What the shared expert adds, [P, T, D]."""
        return reference.shared_expert(self.case, self.x, self.parameters, self._numbers("shared"))

    @part
    def shared_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, D] and the gradients of what the shared expert has learned."""
        numbers = self._numbers("shared_backward")
        return reference.shared_backward(self.case, self.x, self.parameters, self.dout, numbers)

    @part
    def out_of_combine(self) -> Array:
        """[P, T, D]."""
        return self._oracle.combine(self.case, self.y, self.score, self.problem.keep, self._numbers("out_of_combine"))

    @part
    def combine_backward(self) -> tuple[Array, Array]:
        """dy [P, T, K, D] and dscore [P, T, K]."""
        keep = self.problem.keep
        return self._oracle.combine_backward(
            self.case, self.y, self.score, keep, self.dout, self._numbers("combine_backward")
        )

    @part
    def dx_of_group(self) -> Array:
        """[P, T, D]."""
        return self._oracle.group_backward(self.case, self.dx_rows, self.problem.keep, self._numbers("dx_of_group"))

    @part
    def x_rows(self) -> Array:
        """What the expert of every assignment is given, [P, T, K, D]."""
        return self.rows_of(self.given)

    def rows_of(self, a: Array) -> Array:
        """[P, T, K, D] of [P, T, D], draws in front."""
        return np.repeat(a[..., None, :], self.case.top_k, axis=-2)

    def sent(self, layout: Layout) -> Array:
        """Rows that each rank sends to each expert, [P, E]: all assignments, or those that a static capacity keeps."""
        return reference.sent(self.case, self.problem.expert_id, self.problem.keep, layout)

    def received(self, layout: Layout) -> Array:
        """Rows that each rank receives, by source rank and local expert, [P, P, e]."""
        return reference.received(self.case, self.sent(layout))

    def table(self, layout: Layout) -> Table:
        """Which row lies where."""
        return row_tables(self.case, self.problem.expert_id, self.problem.keep, layout)


def unreached(problem: Problem) -> list[str]:
    """Which sides of a clamp no expert's gate or up is on: what is done there is not checked."""
    case, ids = problem.case, problem.expert_id
    if case.clamp is None:
        return []
    parameters, given = in_float64(problem.parameters), problem.given.astype(np.float64)
    gate, up = np.zeros(2, bool), np.zeros(3, bool)
    for g in np.unique(ids[ids >= 0]):
        x_nD = given[(ids == g).any(axis=-1)]
        gate_nF, up_nF = reference.gate_and_up(case, x_nD, parameters, g, Exact())
        assert gate_nF is not None
        gate |= [(gate_nF <= case.clamp).any(), (gate_nF > case.clamp).any()]
        up |= [(np.abs(up_nF) <= case.clamp).any(), (up_nF > case.clamp).any(), (up_nF < -case.clamp).any()]
    c = f"{case.clamp:g}"
    sides = (f"gate up to {c}", f"gate above {c}", f"up between -{c} and {c}", f"up above {c}", f"up below -{c}")
    return [side for side, reached in zip(sides, [*gate, *up], strict=True) if not reached]


Value = Callable[[Evaluation, Layout], Array]
