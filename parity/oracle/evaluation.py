"""The oracle's values for a problem: every value that can be compared, exact or with every rounding drawn."""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np

from parity.oracle import reference, vectorised
from parity.oracle.arrays import Array, in_float64, put, space_of, to_numpy
from parity.oracle.problem import NOTHING, Problem, parameters_in_float64
from parity.oracle.reference import Exact, Gradients, Layer, Numbers, Perturbed
from parity.oracle.rows import Layout, Table, row_tables


def part(compute: Callable[["Evaluation"], Any]) -> Any:
    """A property that is computed once. `cached_property` would let one thread at a time compute, up to Python 3.11."""

    @wraps(compute)
    def get(self: "Evaluation") -> Any:
        if compute.__name__ not in self.parts:
            self.parts[compute.__name__] = compute(self)
        return self.parts[compute.__name__]

    return property(get)


class Evaluation:
    """One evaluation of the oracle: stages fed the problem's values, and the layer. Parts are computed when asked for.

    With `draws` None it is exact. Otherwise every rounding is drawn, and all numbers have a leading axis of draws.
    Each part has a generator of its own, so that none depends on which others are asked for. Inputs are converted
    once, and shared with other evaluations through `beside`; so are, by part, `deviations` of `Perturbed`.
    """

    def __init__(
        self, problem: Problem, draws: range | None = None, beside: "Evaluation | None" = None,
        deviations: dict[str, dict[int, Array]] | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.case, self.draws = problem, problem.case, draws
        self.parts: dict[str, Any] = {}
        self.deviations = deviations
        if beside:
            self.parameters, self.inputs = beside.parameters, beside.inputs
            return
        on_gpu = vectorised.on_gpu(problem.case)
        self.parameters = parameters_in_float64(problem.parameters, on_gpu)
        numbers = ("x", "dout", "y", "dy", "dx_rows", "score", "dscore", "given", "aux")
        self.inputs = {name: put(getattr(problem, name), on_gpu) for name in numbers}
        ids = ("expert_id", "other_experts")
        self.inputs |= {name: put(getattr(problem, name).astype(np.int64), on_gpu) for name in ids}
        self.inputs["keep"] = put(problem.keep, on_gpu)

    def given(self, name: str) -> Array:
        """An input in float64, the same for all draws."""
        a = in_float64(self.inputs[name])
        return a if not self.draws else space_of(a).broadcast_to(a, (len(self.draws), *a.shape))

    @property
    def expert_id(self) -> Array:
        """[P, T, K], where the oracle computes."""
        return self.inputs["expert_id"]

    @property
    def keep(self) -> Array:
        """[P, T, K], where the oracle computes."""
        return self.inputs["keep"]

    @property
    def other_experts(self) -> Array:
        """See `Problem.other_experts`; where the oracle computes."""
        return self.inputs["other_experts"]

    @property
    def _oracle(self) -> ModuleType:
        """The plain loops for exact values, where they are quick enough. Draws are too many for loops."""
        return vectorised.oracle_for(self.case) if self.draws is None else vectorised

    def _numbers(self, part: str) -> Numbers:
        xp = space_of(self.inputs["x"])
        if self.draws is None:
            return Exact(xp)
        rng = np.random.default_rng([self.case.seed, 1, self.draws.start, *part.encode()])
        return Perturbed(rng, xp, None if self.deviations is None else self.deviations.setdefault(part, {}))

    @part
    def layer(self) -> Layer:
        """The whole layer."""
        if self.draws is None and self.problem.exact is not NOTHING:
            return self.problem.exact
        given, numbers = self.given, self._numbers("layer")
        x, dout, aux = given("x"), given("dout"), given("aux")
        return self._oracle.layer(self.case, x, self.parameters, dout, self.expert_id, self.keep, numbers, aux)

    @part
    def score_of_others(self) -> Array:
        """[P, T, K], for a replay of experts that the router does not choose."""
        numbers = self._numbers("score_of_others")
        _, score_PTE = self._oracle.route(self.case, self.given("x"), self.parameters, numbers)
        return reference.chosen_scores(self.case, score_PTE, self.other_experts, self.parameters, numbers).weight

    @property
    def counts_of_others(self) -> Array:
        """How often that replay names each expert, [P, E]."""
        others = self.problem.other_experts
        return reference.count(self.case, others, others >= 0)

    @part
    def route_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, D] of that replay, and the gradients of what the router has learned."""
        x, dscore, numbers = self.given("x"), self.given("dscore"), self._numbers("route_backward")
        return self._oracle.route_backward(self.case, x, self.parameters, self.other_experts, dscore, numbers)

    @part
    def experts_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, K, D] and the gradients of what the experts have learned."""
        given, dy, numbers = self.given("given"), self.given("dy"), self._numbers("experts_backward")
        return self._oracle.experts_backward(self.case, given, self.expert_id, self.parameters, dy, numbers)

    @part
    def shared(self) -> Array:
        """What the shared expert adds, [P, T, D]."""
        return reference.shared_expert(self.case, self.given("x"), self.parameters, self._numbers("shared"))

    @part
    def shared_backward(self) -> tuple[Array, Gradients]:
        """dx [P, T, D] and the gradients of what the shared expert has learned."""
        x, dout, numbers = self.given("x"), self.given("dout"), self._numbers("shared_backward")
        return reference.shared_backward(self.case, x, self.parameters, dout, numbers)

    @part
    def out_of_combine(self) -> Array:
        """[P, T, D]."""
        y, score, numbers = self.given("y"), self.given("score"), self._numbers("out_of_combine")
        return self._oracle.combine(self.case, y, score, self.keep, numbers)

    @part
    def combine_backward(self) -> tuple[Array, Array]:
        """dy [P, T, K, D] and dscore [P, T, K]."""
        y, score, dout = self.given("y"), self.given("score"), self.given("dout")
        return self._oracle.combine_backward(self.case, y, score, self.keep, dout, self._numbers("combine_backward"))

    @part
    def dx_of_group(self) -> Array:
        """[P, T, D]."""
        numbers = self._numbers("dx_of_group")
        return self._oracle.group_backward(self.case, self.given("dx_rows"), self.keep, numbers)

    def rows_of(self, a: Array) -> Array:
        """Tokens [P, T, D] repeated for every assignment, [P, T, K, D]; draws are in front."""
        a = a[..., None, :]
        return space_of(a).broadcast_to(a, (*a.shape[:-2], self.case.top_k, a.shape[-1]))

    def sent(self, layout: Layout) -> Array:
        """Rows that each rank sends to each expert, [P, E]: all assignments, or those that a static capacity keeps."""
        return reference.sent(self.case, self.problem.expert_id, self.problem.keep, layout)

    def received(self, layout: Layout) -> Array:
        """Rows that each rank receives, by source rank and local expert, [P, P, e]."""
        return reference.received(self.case, self.sent(layout))

    def table(self, layout: Layout) -> Table:
        """Which row lies where."""
        if layout not in self.parts:
            self.parts[layout] = row_tables(self.case, self.problem.expert_id, self.problem.keep, layout)
        return self.parts[layout]


def unreached(problem: Problem) -> list[str]:
    """The sides of a clamp that no expert's gate or up reaches, so that clamping there is not checked."""
    case, ids = problem.case, problem.expert_id
    if case.clamp is None:
        return []
    on_gpu = vectorised.on_gpu(case)
    parameters, given = parameters_in_float64(problem.parameters, on_gpu), in_float64(put(problem.given, on_gpu))
    gate, up = np.zeros(2, bool), np.zeros(3, bool)
    for g in np.unique(ids[ids >= 0]):
        x_nD = given[np.nonzero((ids == g).any(axis=-1))]
        gate_nF, up_nF = reference.gate_and_up(case, x_nD, parameters, int(g), Exact(space_of(x_nD)))
        assert gate_nF is not None
        gate_nF, up_nF = to_numpy(gate_nF), to_numpy(up_nF)
        gate |= [(gate_nF <= case.clamp).any(), (gate_nF > case.clamp).any()]
        up |= [(np.abs(up_nF) <= case.clamp).any(), (up_nF > case.clamp).any(), (up_nF < -case.clamp).any()]
    c = f"{case.clamp:g}"
    sides = (f"gate up to {c}", f"gate above {c}", f"up between -{c} and {c}", f"up above {c}", f"up below -{c}")
    return [side for side, reached in zip(sides, [*gate, *up], strict=True) if not reached]


Value = Callable[[Evaluation, Layout], Array]
