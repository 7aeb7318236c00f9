"""Seeded NumPy inputs of a case, drawn once and given to every runner."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.cases.case import Case
from parity.cases.files import writing
from parity.cases.from_checkpoint import learned
from parity.cases.parameters import Parameter, Parameters, parameters_of, shape
from parity.cases.recording import load_recording
from parity.oracle import reference, vectorised
from parity.oracle.arrays import Array, in_float64, put, space_of, stored
from parity.oracle.reference import Exact, Layer
from parity.oracle.size import check_size
from parity.oracle.tolerances import allowance, numpy_dtype, underflow
from parity.oracle.vectorised import oracle_for
from parity.oracle.windows import Windows, draw_windows

# Stands for the exact layer where it is not kept: in files, and at sizes that are evaluated on a GPU.
NOTHING = Layer(*[np.zeros(0)] * (len(Layer._fields) - 1), gradients={})


@dataclass
class Problem:
    """All that a runner is given: inputs end to end, and the oracle's values at every stage, to feed one by one.

    Dtypes are the case's; shapes carry the rank in front. Values per assignment are [P, T, K, ...].
    """

    case: Case
    x: Array  # [P, T, D]
    parameters: Parameters
    dout: Array  # [P, T, D], the cotangent
    expert_id: Array  # [P, T, K] int32, -1 for tokens that are padding
    keep: Array  # [P, T, K] bool
    score: Array  # [P, T, K]
    y: Array  # [P, T, K, D]
    dscore: Array
    dy: Array
    dx_rows: Array
    aux: Array  # [P, T, K], the gradient of the scores that an auxiliary loss adds; zero without one
    given: Array  # what experts are given, [P, T, D]: the tokens, or the tokens times their scores
    exact: Layer  # float64, end to end
    second: "Problem | None" = None  # the step beside this one: the same weights, other tokens
    chosen_otherwise: int = 0  # tokens whose recorded experts are not those that the router chooses
    own_choice: bool = False  # nothing dropped, and no choice too close to call: a router may choose for itself

    @property
    def other_experts(self) -> Array:
        """Expert ids [P, T, K] that the router does not choose, for a replay that must not choose anew."""
        return np.where(self.expert_id < 0, -1, (self.expert_id + 1) % self.case.experts).astype(np.int32)

    def steps_between(self) -> list["Problem"]:
        """Steps with other tokens, to other experts and to the same ones. They reveal state kept between steps."""
        other = replace(self, x=-self.x)
        return [replace(other, expert_id=self.other_experts), other]

    def order_probe(self) -> tuple[Array, Array]:
        """Rows [P, T, K, D] whose sum over k depends on the order, and the sum in order of k, which is exact.

        A large number, its negative, and a third so small that it survives only when it is added last.
        """
        small = 2.0**-39 if self.case.accum_dtype == "float64" else 2.0**-10
        term_K = np.zeros(self.case.top_k)
        term_K[:3] = np.array([2.0**15, -(2.0**15), small])[: self.case.top_k]
        rows = np.broadcast_to(term_K[:, None], self.y.shape)
        total = np.zeros(self.x.shape, self.case.accum_dtype)
        for k in range(self.case.top_k):
            total += np.where(self.keep[:, :, k, None], rows[:, :, k], 0).astype(self.case.accum_dtype)
        return rows.astype(self.y.dtype), total.astype(np.float64)

    def save(self, path: Path) -> None:
        """Write to a file that only this program reads, without the exact layer."""
        second = self.second and replace(self.second, exact=NOTHING)
        with writing(path), path.open("wb") as file:
            pickle.dump(replace(self, exact=NOTHING, second=second), file, protocol=5)

    @staticmethod
    def load(path: Path) -> "Problem":
        """Read what `save` wrote."""
        with path.open("rb") as file:
            problem = pickle.load(file)
        assert isinstance(problem, Problem)
        return problem


def draw(case: Case) -> Problem:
    """Draw the inputs of a case and evaluate the oracle on them.

    Raises ValueError when the case's recording cannot be read or has other shapes, and when the case does not fit into
    memory.
    """
    if not vectorised.on_gpu(case):  # then the GPU's memory counts
        check_size(case)
    rng = np.random.default_rng([case.seed, 0])
    recorded = (load_recording(case) if case.recording else {}) | learned(case)
    router = recorded["router"].astype(np.float64) if case.checkpoint else _router(case, rng)
    problem = _draw(case, recorded, router, rng)
    if case.two_steps:
        others = {
            name: np.roll(a, 1, axis=1) if name in ("x", "expert_id", "dscore") else a for name, a in recorded.items()
        }
        second = _draw(case, others, router, np.random.default_rng([case.seed, 3]), problem.parameters)
        second.own_choice = bool(second.keep.all()) and clear_choice(second)
        problem.second = second
    return problem


def _draw(
    case: Case, recorded: dict[str, Any], router: Array, rng: np.random.Generator, beside: Parameters | None = None
) -> Problem:
    """What is recorded, and the rest drawn; what is learned is that of the step `beside`, if there is one."""
    P, T, D = case.ranks, case.tokens, case.width
    wanted, x = recorded.get("expert_id"), recorded.get("x")
    if x is None:
        wanted = _wanted_experts(case, rng) if wanted is None else wanted
        x, router = stretched(case, tokens_that_choose(case, wanted, router, rng), router)
        if case.checkpoint and case.clamp:
            x = reaching_the_clamp(case, x, wanted, recorded)
    dtype = numpy_dtype(case.dtype)
    x = x.astype(dtype)
    drawn = {one.name: router if one.name == "router" else _learned(case, one, rng) for one in parameters_of(case)}
    parameters = beside or Parameters(
        **{
            one.name: recorded.get(one.name, drawn[one.name]).astype(numpy_dtype(case.dtype_of(one.dtype)))
            for one in parameters_of(case)
        }
    )
    dout = rng.standard_normal((P, T, D)).astype(dtype)
    return posed(case, x, parameters, dout, recorded)


def posed(
    case: Case, x: Array, parameters: Parameters, dout: Array, recorded: Mapping[str, Array] | None = None,
    *, evaluated: bool = True,
) -> Problem:  # fmt: skip
    """The problem of these inputs, in the case's dtypes, with what the oracle makes of them; expert ids if recorded.

    Not `evaluated`, for a layer that is fed no stage's input and not judged, it has the oracle's routing only.
    """
    recorded = recorded or {}
    exact_parameters = parameters_in_float64(parameters)
    oracle = oracle_for(case)
    logits, score = oracle.route(case, x.astype(np.float64), exact_parameters, Exact())
    by = reference.scores_to_choose_by(case, logits)
    expert_id = recorded["expert_id"].copy() if "expert_id" in recorded else oracle.select(case, by, exact_parameters)
    others = 0
    if "expert_id" in recorded and "x" in recorded:
        own = np.sort(oracle.select(case, by, exact_parameters), axis=-1)
        others = int((own != np.sort(expert_id, axis=-1)).any(axis=-1).sum())
    for rank in range(case.ranks):
        expert_id[rank, case.tokens_of(rank) :] = -1
    # Priority goes by the scores that are stored, so rounding to the stored dtype comes first. XLA on a CPU compares
    # numbers below the normal range as zeros.
    of_scores = numpy_dtype(case.dtype_of("weight"))
    kept = reference.chosen_scores(case, score, expert_id, exact_parameters, Exact()).weight.astype(of_scores)
    kept[np.abs(kept) < underflow(case.dtype_of("weight"))] = 0
    keep = oracle.keep_within_capacity(case, expert_id, kept)
    aux = recorded.get("dscore", np.zeros(expert_id.shape)).astype(of_scores)
    if not evaluated:
        none = np.zeros(0)
        return Problem(case, x, parameters, dout, expert_id, keep, kept, none, none, none, none, aux, none, NOTHING)
    on_gpu = vectorised.on_gpu(case)
    learned = parameters_in_float64(parameters, on_gpu) if on_gpu else exact_parameters
    x64, dout64, aux64 = (in_float64(put(a, on_gpu)) for a in (x, dout, aux))
    ids, kept_rows = put(expert_id.astype(np.int64), on_gpu), put(keep, on_gpu)
    exact = oracle.layer(case, x64, learned, dout64, ids, kept_rows, Exact(space_of(x64)), aux64)
    y, dy, dx_rows, given = (stored(a, case.dtype) for a in (exact.y, exact.dy, exact.dx_rows, exact.input))
    dscore = stored(exact.dscore, case.dtype_of("weight"))
    exact = NOTHING if on_gpu else exact
    return Problem(case, x, parameters, dout, expert_id, keep, kept, y, dscore, dy, dx_rows, aux, given, exact,
                   chosen_otherwise=others)  # fmt: skip


def parameters_in_float64(parameters: Parameters, on_gpu: bool = False) -> Parameters:
    """The same, exactly; on a GPU, or where they are."""

    def exactly(a: Array | Windows) -> Array | Windows:
        return a.in_float64(on_gpu) if isinstance(a, Windows) else in_float64(put(a, on_gpu))

    return parameters._replace(**{name: exactly(a) for name, a in parameters.there().items()})


def clear_choice(problem: Problem) -> bool:
    """Whether each chosen score is further from the next one than both may be off, so that all choose alike."""
    case = problem.case
    x, parameters, _ = exact_inputs(problem)
    logits, score = oracle_for(case).route(case, x, parameters, Exact())
    drawn = vectorised.drawn_scores(case, x, parameters, [case.seed, 4])
    close = 2 * allowance(score, drawn, case.score_dtype).max(axis=-1)
    by = reference.scores_to_choose_by(case, logits)
    keys = reference.stored_keys(case, by, parameters)
    chosen = np.array_equal(oracle_for(case).select(case, by, parameters), problem.expert_id)
    return chosen and all(_far_apart(case, keys[p, t], close[p, t]) for p, t in np.ndindex(*close.shape))


def _far_apart(case: Case, key_E: Array, close: float) -> bool:
    """Whether what a token chooses, and the groups that it chooses in, are further than `close` from the next."""
    if case.groups > 1:
        best_G = -np.sort(-reference.group_scores(case, key_E))[: case.top_groups + 1]
        if case.top_groups < case.groups and best_G[-2] - best_G[-1] <= 2 * close:
            return False
        key_E = reference.within(case, key_E, reference.best_groups(case, key_E))
    best_K = -np.sort(-key_E)[: case.top_k + 1]
    with np.errstate(invalid="ignore"):  # groups that are left out are all at minus infinity
        return bool((-np.diff(best_K) > close).all())


def reaching_the_clamp(case: Case, x: Array, wanted: Array, recorded: dict[str, Any]) -> Array:
    """Tokens of which every other one is so large that some of its gates and ups are beyond the clamp."""
    assert case.clamp
    x = x.copy()
    for p, t in np.ndindex(case.ranks, case.tokens):
        g = int(wanted[p, t, 0])
        largest = min(np.abs(x[p, t] @ recorded[n][g].astype(np.float64)).max() for n in ("w_gate", "w_up"))
        x[p, t] *= max(1, 2 * case.clamp / largest) if t % 2 and largest else 1
    return x


# As large as the gap between wanted experts' scores and the others', so that the selection bias decides many choices.
BIAS = {"softmax": 0.3, "sigmoid": 0.6, "sqrt_softplus": 1.0, "softmax_of_chosen": 2.5}


def _learned(case: Case, parameter: Parameter, rng: np.random.Generator) -> Array | Windows:
    """Draws weights as for a linear layer, and biases and scales of the size of the values that they act on."""
    of = shape(case, parameter)
    # A clamp that no gate reaches is not checked: at this size one gate in six is beyond it, and one up in three.
    reach = case.clamp or 1
    if len(of) == 3:
        size = reach if parameter.name in ("w_gate", "w_up") else 1
        return draw_windows(of, rng, size) if case.real_size else rng.standard_normal(of) * (size / np.sqrt(of[1]))
    if parameter.name == "selection_bias":
        return rng.uniform(-1, 1, of) * BIAS[case.score_function]
    if parameter.name == "expert_scale":
        return rng.uniform(0.5, 1.5, of)
    if len(of) == 2 and parameter.stage == "apply_experts" and parameter.axes[0] != "E":
        return rng.standard_normal(of) / np.sqrt(of[0]) * (reach if parameter.name != "shared_w_down" else 1)
    return rng.standard_normal(of) / (np.sqrt(of[0]) if parameter.name == "shared_score" else 2)


def exact_inputs(problem: Problem) -> tuple[Array, Parameters, Array]:
    """Tokens, what is learned, and the cotangent, in float64."""
    return problem.x.astype(np.float64), parameters_in_float64(problem.parameters), problem.dout.astype(np.float64)


def _router(case: Case, rng: np.random.Generator) -> Array:
    if case.pattern == "ties":
        return rng.integers(-1, 2, (case.width, case.experts)).astype(np.float64)
    router = rng.standard_normal((case.width, case.experts)) / np.sqrt(case.width)
    router[0] *= not case.logit_offset  # the feature that will carry the offset
    return router


def stretched(case: Case, x: Array, router: Array) -> tuple[Array, Array]:
    """Tokens and router with the scale, the offset and the outlier that the case asks for in logits and tokens."""
    x, router = x.copy(), router * case.logit_scale
    if case.logit_offset:
        x[..., 0], router[0] = 1, case.logit_offset
    x[..., -1], router[-1] = x[..., -1] * case.outlier, router[-1] / case.outlier
    return x, router


def _wanted_experts(case: Case, rng: np.random.Generator) -> Array:
    """Which experts each token should choose, best first: [P, T, K]."""
    P, T, K, E = case.ranks, case.tokens, case.top_k, case.experts
    e = E // P
    weight_PE = np.ones((P, E))
    if case.pattern == "zipf":
        weight_PE = weight_PE / np.arange(1, E + 1) ** 1.2
    if case.pattern == "empty_expert":
        weight_PE[:, E // 2] = 0
    if case.pattern == "idle_rank":
        weight_PE[:, P // 2 * e : (P // 2 + 1) * e] = 0
    if case.pattern == "stay_home":
        weight_PE[0, e:] = 0
        weight_PE[1:, :e] = 0
    if case.pattern == "balanced":
        return (np.arange(P * T * K).reshape(P, T, K) % E).astype(np.int32)
    if case.pattern == "one_expert":
        others_PTE = rng.permuted(np.tile(np.arange(1, E), (P, T, 1)), axis=2)
        return np.concatenate([np.zeros((P, T, 1)), others_PTE[..., : K - 1]], axis=2).astype(np.int32)
    # The largest of logarithms with Gumbel noise are a draw by weight without replacement (Efraimidis, Spirakis 2006).
    with np.errstate(divide="ignore"):
        key_PTE = np.log(weight_PE)[:, None] + rng.gumbel(size=(P, T, E))
    return np.argsort(-key_PTE, axis=2)[..., :K].astype(np.int32)


def tokens_that_choose(case: Case, wanted: Array, router: Array, rng: np.random.Generator) -> Array:
    """Hidden states whose logits rank the wanted experts first, in order, with a margin (as far as D >= E allows)."""
    P, T, K, E = case.ranks, case.tokens, case.top_k, case.experts
    if case.pattern == "ties":
        return rng.integers(-2, 3, (P, T, case.width)).astype(np.float64)
    logits = rng.uniform(-1, 0, (P, T, E))
    best_first = 1 + 0.3 * np.arange(K, 0, -1) + rng.uniform(0, 0.2, (P, T, K))
    np.put_along_axis(logits, wanted, best_first, axis=2)
    noise = rng.standard_normal((P, T, case.width))
    x = noise + (logits - noise @ router) @ np.linalg.pinv(router)
    # A router that is nearly singular asks for huge tokens. Shrunk, they choose the same experts, and fit a float16.
    return x / np.maximum(np.sqrt((x**2).mean(axis=-1, keepdims=True)) / 4, 1)
