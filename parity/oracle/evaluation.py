"""The oracle's word on a problem: every value that can be compared, exact or with every rounding drawn."""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np

from parity.oracle import reference, vectorised
from parity.oracle.problem import Problem, exact_inputs
from parity.oracle.reference import Exact, Layer, Numbers, Perturbed
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
        x, self.router, self.weights, dout = exact_inputs(problem)
        names = ("y", "dy", "dx_rows", "score", "dscore")
        numbers = [x, dout, *(getattr(problem, name).astype(np.float64) for name in names)]
        if draws:
            numbers = [np.broadcast_to(a, (len(draws), *a.shape)) for a in numbers]
        self.x, self.dout, self.y, self.dy, self.dx_rows, self.score, self.dscore = numbers

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
            self.router,
            self.weights,
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
        _, score_PTE = self._oracle.route(self.case, self.x, self.router, numbers)
        return reference.chosen_scores(self.case, score_PTE, self.problem.other_experts, numbers)

    @property
    def counts_of_others(self) -> Array:
        """How often that replay names each expert, [P, E]."""
        others = self.problem.other_experts
        return reference.count(self.case, others, others >= 0)

    @part
    def route_backward(self) -> tuple[Array, Array]:
        """dx [P, T, D] and drouter [D, E] of that replay."""
        others = self.problem.other_experts
        return self._oracle.route_backward(
            self.case, self.x, self.router, others, self.dscore, self._numbers("route_backward")
        )

    @part
    def experts_backward(self) -> tuple[Array, tuple[Array, Array, Array]]:
        """dx [P, T, K, D] and the gradients of the weights."""
        ids = self.problem.expert_id
        return self._oracle.experts_backward(
            self.case, self.x, ids, self.weights, self.dy, self._numbers("experts_backward")
        )

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
        """The token of every assignment, [P, T, K, D]."""
        return np.repeat(self.x[:, :, None], self.case.top_k, axis=2)

    def sent(self, layout: Layout) -> Array:
        """Rows that each rank sends to each expert, [P, E]: all assignments, or those that a static capacity keeps."""
        return reference.sent(self.case, self.problem.expert_id, self.problem.keep, layout)

    def received(self, layout: Layout) -> Array:
        """Rows that each rank receives, by source rank and local expert, [P, P, e]."""
        return reference.received(self.case, self.sent(layout))

    def table(self, layout: Layout) -> Table:
        """Which row lies where."""
        return row_tables(self.case, self.problem.expert_id, self.problem.keep, layout)


Value = Callable[[Evaluation, Layout], Array]
