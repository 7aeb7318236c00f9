"""The oracle: a dense float64 MoE layer in NumPy, plain loops over tokens and experts, no dispatch at all.

Every function takes a `Numbers`, which says what happens at the documented rounding points: nothing (`Exact`), or a
random relative error of at most the unit roundoff (`Perturbed`, the yardstick of `tolerances.py`). Functions return
values before their last rounding. Shapes carry the rank in front: x_PTD. What needs no loop, here and in `vectorised`,
takes arrays with more axes before it, of draws.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, Parameters
from parity.oracle.arrays import Array, Random, Space, erf, put_along_last, rounded, space_of
from parity.oracle.tolerances import noise, numpy_dtype, underflow

Gradients = dict[str, Array]  # by the name of what has it


@dataclass
class Exact:
    """Real arithmetic, as far as float64 goes."""

    xp: Space = np

    def round(self, a: Array, dtype: str, units: float = 1) -> Array:  # noqa: ARG002
        """The value stored in `dtype`, of a function that is `units` roundings off: here, itself."""
        return a

    def terms(self, a: Array, n: int, dtype: str) -> Array:  # noqa: ARG002
        """Terms of sums of n, accumulated in `dtype`, each term of one sum: here, themselves."""
        return a

    def matmul(self, a: Array, b: Array, n: int, dtype: str) -> Array:  # noqa: ARG002
        """a @ b, each number a sum of n products accumulated in `dtype`: here, without error."""
        return a @ b

    def plus_constant(self, a: Array, b: Array, dtype: str) -> Array:  # noqa: ARG002
        """The value stored in `dtype` of numbers that are stored in it, plus one that is the same for many."""
        return a + b

    def constant(self, a: Array, dtype: str) -> Array:  # noqa: ARG002
        """The value stored in `dtype` of a number that is the same in many places: here, itself."""
        return a

    def at_most(self, a: Array, bound: float, dtype: str) -> Array:  # noqa: ARG002
        """Whether numbers stored in `dtype` are no more than a bound: here, as they are."""
        return a <= bound


@dataclass
class Perturbed:
    """The standard model of floating point, fl(a) = a(1 + d), |d| <= u, with d drawn (Monte Carlo arithmetic)."""

    rng: np.random.Generator
    xp: Space = np

    # How far off each matrix product may be, numbered in the order in which they are asked for: to first order the same
    # in all draws, so that those which share this work it out once.
    deviations: dict[int, Array] | None = None

    def __post_init__(self) -> None:
        self.random, self.matmuls = Random(self.rng), 0

    def round(self, a: Array, dtype: str, units: float = 1) -> Array:
        """The value stored in `dtype`, off by up to `units` unit roundoffs, or by what underflow may cost."""
        return self.random.near(a, units * noise(dtype), underflow(dtype))

    def terms(self, a: Array, n: int, dtype: str) -> Array:
        """Terms of sums of n, accumulated in `dtype`, each term of one sum: n roundings walk randomly, so sqrt(n).

        Each term may be lost to underflow, too.
        """
        return self.random.near(a, math.sqrt(max(n, 1)) * noise(dtype), underflow(dtype))

    def matmul(self, a: Array, b: Array, n: int, dtype: str) -> Array:
        """a @ b, each number a sum of n products accumulated in `dtype`, with an error of its own.

        The sum of `terms` of its products: their errors have the variance n * noise**2 / 3 * sum of squared products.
        Perturbing a factor instead would give all numbers of a row one error, which softmax and differences cancel.
        What underflow takes from each product, or from a factor of it, has one sign, and adds up.
        """
        known, self.matmuls = self.deviations, self.matmuls + 1
        deviation = known.get(self.matmuls) if known is not None else None
        if deviation is None:
            deviation = self._deviation(a, b, n, dtype)
        if known is not None:
            known[self.matmuls] = deviation
        return self.random.plus_normal(a @ b, deviation)

    def _deviation(self, a: Array, b: Array, n: int, dtype: str) -> Array:
        xp, tiny = self.xp, underflow(dtype)
        deviation = xp.sqrt((a * a) @ (b * b))
        deviation *= math.sqrt(max(n, 1) / 3) * noise(dtype)
        deviation += xp.sum(xp.abs(a), axis=-1, keepdims=True) * tiny
        deviation += (xp.sum(xp.abs(b), axis=-2, keepdims=a.ndim > 1) + n) * tiny
        return deviation

    def plus_constant(self, a: Array, b: Array, dtype: str) -> Array:
        """The value stored in `dtype` of numbers that are stored in it, plus one that is the same for many.

        Where the sum has fewer bits than b, all sums lose the same bits of b, and that does not average out over them:
        this loss is there beside a rounding of each number's own.
        """
        exact = rounded(a, dtype) + b
        return self.round(a + b, dtype) + (rounded(exact, dtype) - exact)

    def constant(self, a: Array, dtype: str) -> Array:
        """The value stored in `dtype` of a number that is the same in many places: its own rounding in all of them.

        Drawn, it would average out over them.
        """
        return rounded(a, dtype)

    def at_most(self, a: Array, bound: float, dtype: str) -> Array:
        """Whether numbers stored in `dtype` are no more than a bound. For numbers close to it the answer is random.

        A matmul and a bias are rounded, so that a number is up to 2 units off: within twice that, either may be.
        """
        return self.random.near(a, 0, 4 * noise(dtype) * abs(bound)) <= bound


Numbers = Exact | Perturbed

# Units of rounding that a tanh may be off by: XLA's own, a ratio of polynomials on CPU and GPU, is by up to 4.75
# (all of 4,000,001 float32 between -10 and 10 on a CPU, jax 0.10.2), PyTorch's by 1.0.
TANH = 5

# The same of an erf: XLA's is off by up to 5.3 (4,000,001 float32 between -4 and 4 on a CPU, jax 0.10.2), PyTorch's by
# 1.2, and by 4.7 within its gelu.
ERF = 6


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), which is 0 where the power is beyond float64."""
    with np.errstate(over="ignore"):
        return 1 / (1 + space_of(a).exp(-a))


def route(case: Case, x_PTD: Array, w: Parameters, numbers: Numbers) -> tuple[Array, Array]:
    """Logits and scores of all experts, [P, T, E] each, before selection."""
    x_PTD = as_router_takes(case, x_PTD, numbers)
    logits_PTE = np.zeros((*x_PTD.shape[:2], case.experts))
    for p, t in np.ndindex(*x_PTD.shape[:2]):
        logits_PTE[p, t] = numbers.matmul(x_PTD[p, t], w.router, case.width, case.score_dtype)
    logits_PTE = biased(logits_PTE, w.router_bias, case.dtype_of("logits"), numbers)
    return logits_PTE, scores(case, logits_PTE, numbers)


def as_router_takes(case: Case, x: Array, numbers: Numbers) -> Array:
    """The tokens, rounded to float32 where a float64 layer has a float32 router."""
    return numbers.round(x, "float32") if case.dtype == "float64" and case.dtype_of("logits") == "float32" else x


def biased(a: Array, bias: Array | None, dtype: str, numbers: Numbers) -> Array:
    """The value rounded, and with a bias added and rounded again."""
    a = numbers.round(a, dtype)
    return a if bias is None else numbers.plus_constant(a, bias, dtype)


def scores(case: Case, logits_PTE: Array, numbers: Numbers) -> Array:
    """The part of the score function that comes before the choice of experts: [P, T, E]."""
    function, dtype, xp = case.router.score_function, case.score_dtype, numbers.xp
    if function == "softmax":
        return softmax(logits_PTE, case.experts, dtype, numbers)
    if function == "sigmoid":
        return numbers.round(sigmoid(logits_PTE), dtype)
    if function == "sqrt_softplus":
        softplus = xp.logaddexp(logits_PTE, xp.zeros_like(logits_PTE))
        return numbers.round(xp.sqrt(softplus), dtype, 2)  # of the logarithm, and of the root
    assert function == "softmax_of_chosen"
    return logits_PTE


def softmax(a: Array, n: int, dtype: str, numbers: Numbers) -> Array:
    """Softmax over the last axis, of n numbers."""
    xp = numbers.xp
    below = numbers.round(a - xp.max(a, axis=-1, keepdims=True), dtype)
    power = numbers.round(xp.exp(below), dtype)
    total = xp.sum(numbers.terms(power, n, dtype), axis=-1, keepdims=True)
    return numbers.round(power / total, dtype)


def scores_to_choose_by(case: Case, logits_PTE: Array) -> Array:
    """The scores of the logits as they are stored: in 16 bits many are equal, and experts are chosen by them."""
    stored_PTE = logits_PTE.astype(numpy_dtype(case.dtype_of("logits"))).astype(np.float64)
    return scores(case, stored_PTE, Exact())


def select(case: Case, score_PTE: Array, w: Parameters) -> Array:
    """The K experts that each token chooses by these scores, ties to the lower expert id: [P, T, K]."""
    id_PTK = np.zeros((*score_PTE.shape[:2], case.top_k), np.int32)
    for p, t in np.ndindex(*score_PTE.shape[:2]):
        key_E = stored_keys(case, score_PTE[p, t], w)
        if case.groups > 1:
            key_E = within(case, key_E, best_groups(case, key_E))
        id_PTK[p, t] = largest(key_E, case.top_k)
    return id_PTK


def stored_keys(case: Case, score: Array, w: Parameters) -> Array:
    """What experts are chosen by, as it is stored: scores, plus the selection bias; groups not yet looked at."""
    key = score.astype(case.score_dtype)
    return key if w.selection_bias is None else key + w.selection_bias.astype(case.score_dtype)


def group_scores(case: Case, key_E: Array) -> Array:
    """The sum of the two largest of each group, or its largest: [groups]."""
    best_Gn = -np.sort(-key_E.reshape(case.groups, -1), axis=1)
    return best_Gn[:, 0] + best_Gn[:, 1] if case.group_score == "top2" else best_Gn[:, 0]


def best_groups(case: Case, key_E: Array) -> list[int]:
    """The groups that a token chooses within."""
    return largest(group_scores(case, key_E), case.top_groups)


def within(case: Case, key_E: Array, groups: Iterable[int]) -> Array:
    """The keys that experts are chosen by, with zero or minus infinity outside these groups."""
    inside_E = np.isin(np.arange(case.experts) // (case.experts // case.groups), [*groups])
    return np.where(inside_E, key_E, 0 if case.outside_groups == "zero" else -np.inf)


def largest(a_n: Array, k: int) -> list[int]:
    """The indices of the k largest, largest first; among equal ones, the lower index first."""
    return sorted(range(a_n.size), key=lambda i: (-a_n[i], i))[:k]


class Chosen(NamedTuple):
    """The scores of the chosen experts on their way, [P, T, K] each, 0 for an id of -1."""

    score: Array  # as the score function has them
    share: Array  # of their sum, where they are renormalised; else themselves
    weight: Array  # scaled; not yet rounded


def chosen_scores(case: Case, score_PTE: Array, id_PTK: Array, w: Parameters, numbers: Numbers) -> Chosen:
    """The scores of the chosen experts, renormalised and scaled as the case says."""
    score_PTK = _of_chosen(score_PTE, id_PTK)
    if case.router.score_function == "softmax_of_chosen":
        score_PTK = numbers.xp.where(id_PTK >= 0, softmax(score_PTK, case.top_k, case.score_dtype, numbers), 0)
    share_PTK = score_PTK
    if case.router.renormalize:
        share_PTK = numbers.round(score_PTK / _total(case, score_PTK, numbers), case.score_dtype)
    weight_PTK = share_PTK
    if w.expert_scale is not None:
        weight_PTK = numbers.round(share_PTK * w.expert_scale[id_PTK], case.score_dtype)
    weight_PTK = weight_PTK * case.router.scale
    if case.cast_scores:
        weight_PTK = numbers.round(weight_PTK, case.score_dtype)
    return Chosen(score_PTK, share_PTK, weight_PTK)


def _total(case: Case, score_PTK: Array, numbers: Numbers) -> Array:
    """The sum that scores are divided by, [P, T, 1]; 1 for padding, whose scores are zero."""
    terms_PTK = numbers.terms(score_PTK, case.top_k, case.score_dtype)
    total_PT1 = numbers.xp.sum(terms_PTK, axis=-1, keepdims=True) + case.router.epsilon
    return numbers.xp.where(total_PT1 == 0, 1.0, total_PT1)


def _for_each(id_PTK: Array, a: Array) -> Array:
    """The expert ids with the leading axes of `a`, and that of the first expert for padding."""
    xp = space_of(a)
    return xp.broadcast_to(xp.maximum(id_PTK, 0), (*a.shape[:-1], id_PTK.shape[-1]))


def _of_chosen(score_PTE: Array, id_PTK: Array) -> Array:
    """[P, T, K]; 0 for an id of -1, which is that of padding."""
    xp = space_of(score_PTE)
    return xp.where(id_PTK >= 0, xp.take_along_axis(score_PTE, _for_each(id_PTK, score_PTE), axis=-1), 0.0)


def score_backward(
    case: Case, logits_PTE: Array, score_PTE: Array, id_PTK: Array, w: Parameters, dscore_PTK: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """The gradient of the logits, [P, T, E], from that of the chosen scores; and of the experts' scales, [P, E]."""
    dtype, xp = case.score_dtype, numbers.xp
    chosen = chosen_scores(case, score_PTE, id_PTK, w, numbers)
    d_PTK = numbers.round(case.router.scale * dscore_PTK, dtype)
    dscale_PTE = xp.zeros_like(score_PTE)
    if w.expert_scale is not None:
        _put(dscale_PTE, id_PTK, numbers.round(d_PTK * chosen.share, dtype))
        d_PTK = numbers.round(d_PTK * w.expert_scale[id_PTK], dtype)
    if case.router.renormalize:
        total_PT1 = _total(case, chosen.score, numbers)
        mean_PT1 = xp.sum(numbers.terms(d_PTK * chosen.score, case.top_k, dtype), axis=-1, keepdims=True) / total_PT1
        d_PTK = numbers.round(d_PTK - numbers.round(mean_PT1, dtype), dtype) / total_PT1
    if case.router.score_function == "softmax_of_chosen":
        d_PTK = softmax_backward(chosen.score, d_PTK, case.top_k, dtype, numbers)
    d_PTE = xp.zeros_like(score_PTE)
    _put(d_PTE, id_PTK, numbers.round(d_PTK, dtype))
    dlogits_PTE = d_PTE
    if case.router.score_function == "softmax":
        dlogits_PTE = softmax_backward(score_PTE, d_PTE, case.experts, dtype, numbers)
    if case.router.score_function == "sigmoid":
        dlogits_PTE = d_PTE * score_PTE * numbers.round(1 - score_PTE, dtype)
    if case.router.score_function == "sqrt_softplus":
        share_PTE = numbers.round(sigmoid(logits_PTE), dtype)
        slope_PTE = numbers.round(share_PTE / (2 * xp.maximum(score_PTE, 1e-9)), dtype)
        # From -40 down, where the share is the score squared, half the score: their quotient underflows.
        dlogits_PTE = d_PTE * xp.where(logits_PTE < -40, numbers.round(score_PTE / 2, dtype), slope_PTE)
    dscale_PE = xp.sum(numbers.terms(dscale_PTE, case.tokens, dtype), axis=-2)
    return numbers.round(dlogits_PTE, case.dtype_of("logits")), dscale_PE


def softmax_backward(score: Array, d: Array, n: int, dtype: str, numbers: Numbers) -> Array:
    """The gradient of the logits of a softmax over the last axis, of n."""
    mean = numbers.xp.sum(numbers.terms(d * score, n, dtype), axis=-1, keepdims=True)
    return score * numbers.round(d - numbers.round(mean, dtype), dtype)


def _put(into_PTE: Array, id_PTK: Array, values_PTK: Array) -> None:
    """Values of the chosen experts at their expert ids; nothing for padding, whose id is -1."""
    values_PTK = space_of(into_PTE).where(id_PTK >= 0, values_PTK, 0.0)
    put_along_last(into_PTE, _for_each(id_PTK, into_PTE), values_PTK)


def route_backward(
    case: Case, x_PTD: Array, w: Parameters, id_PTK: Array, dscore_PTK: Array, numbers: Numbers
) -> tuple[Array, Gradients]:
    """Gradients of the tokens [P, T, D], and of what the router has learned, summed over ranks."""
    logits_PTE, score_PTE = route(case, x_PTD, w, numbers)
    dlogits_PTE, dscale_PE = score_backward(case, logits_PTE, score_PTE, id_PTK, w, dscore_PTK, numbers)
    x_PTD = as_router_takes(case, x_PTD, numbers)
    dx_PTD, drouter_PDE = np.zeros_like(x_PTD), np.zeros((case.ranks, case.width, case.experts))
    for p, t in np.ndindex(*x_PTD.shape[:2]):
        dx_PTD[p, t] = numbers.matmul(dlogits_PTE[p, t], w.router.T, case.experts, case.score_dtype)
        drouter_PDE[p] += numbers.terms(np.outer(x_PTD[p, t], dlogits_PTE[p, t]), case.tokens, case.score_dtype)
    return dx_PTD, router_gradients(case, w, drouter_PDE, dlogits_PTE, dscale_PE, numbers)


def router_gradients(
    case: Case, w: Parameters, drouter_PDE: Array, dlogits_PTE: Array, dscale_PE: Array, numbers: Numbers
) -> Gradients:
    """The router's gradients, summed over ranks, for the parameters that the case has."""
    dbias_PE = numbers.xp.sum(numbers.terms(dlogits_PTE, case.tokens, case.score_dtype), axis=-2)
    of_ranks = {"router": (drouter_PDE, -3), "router_bias": (dbias_PE, -2), "expert_scale": (dscale_PE, -2)}
    return {n: over_ranks(case, n, a, axis, numbers) for n, (a, axis) in of_ranks.items() if n in w.there()}


def over_ranks(case: Case, name: str, a: Array, axis: int, numbers: Numbers) -> Array:
    """The sum over ranks of a gradient, which each rounds to its dtype."""
    dtype = case.dtype_of(BY_NAME[name].dtype)
    return numbers.xp.sum(numbers.terms(numbers.round(a, dtype), case.ranks, dtype), axis=axis)


def keep_within_capacity(case: Case, id_PTK: Array, score_PTK: Array) -> Array:
    """Which assignments a static capacity keeps: bins are filled one assignment at a time, in order of priority."""
    keep_PTK = np.zeros(id_PTK.shape, bool)
    experts_per_bin = case.experts // case.bins
    for p in range(case.ranks):
        everyone = [(t, k) for t in range(case.tokens) for k in range(case.top_k) if id_PTK[p, t, k] >= 0]
        if case.priority == "choice":
            everyone.sort(key=lambda tk: tk[1])
        if case.priority == "score":
            everyone.sort(key=lambda tk: -float(score_PTK[p][tk]))
        room = [case.capacity] * case.bins
        for t, k in everyone:
            b = id_PTK[p, t, k] // experts_per_bin
            if room[b] > 0:
                room[b] -= 1
                keep_PTK[p, t, k] = True
    return keep_PTK


def count(case: Case, id_PTK: Array, keep_PTK: Array) -> Array:
    """Assignments kept, per rank and expert: [P, E]."""
    counts_PE = np.zeros((case.ranks, case.experts), np.int64)
    np.add.at(counts_PE, (np.indices(id_PTK.shape)[0], id_PTK), keep_PTK)
    return counts_PE


def sent(case: Case, id_PTK: Array, keep_PTK: Array, layout: str) -> Array:
    """Rows that each rank sends to each expert, [P, E]: all but padding, or what a static capacity keeps."""
    return count(case, id_PTK, keep_PTK if layout == "static" else id_PTK >= 0)


def received(case: Case, sent_PE: Array) -> Array:
    """The same on the receiver, [P, P, e]: received[q, p, j] rows from rank p for local expert j of rank q."""
    return sent_PE.reshape(case.ranks, case.ranks, -1).transpose(1, 0, 2)


def activated(case: Case, gate: Array, numbers: Numbers) -> tuple[Array, Array]:
    """The activation of a gate and its derivative, in the wide dtype.

    silu(g) = g * sigmoid(g). gelu(g) = g * Phi(g), and gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 *
    g**3))): Hendrycks and Gimpel 2016, "Gaussian Error Linear Units". quick_gelu(g) = g * sigmoid(1.702 * g): the same
    paper. relu2(g) = max(g, 0)**2: So et al. 2021, "Primer".
    """
    dtype, activation, xp = case.accum_dtype, case.expert.activation, numbers.xp
    if activation in ("silu", "quick_gelu"):
        times = 1.0 if activation == "silu" else 1.702
        inner = gate if activation == "silu" else numbers.round(times * gate, dtype)
        share = numbers.round(sigmoid(inner), dtype)
        slope = share * (1 + times * gate * numbers.round(1 - share, dtype))
        return numbers.round(gate * share, dtype), numbers.round(slope, dtype)
    if activation == "relu2":
        above = xp.maximum(gate, 0.0)
        return numbers.round(above**2, dtype), numbers.round(2 * above, dtype)
    if activation == "gelu":
        share = numbers.round((1 + numbers.round(erf(gate / math.sqrt(2)), dtype, ERF)) / 2, dtype)
        density = numbers.round(xp.exp(-numbers.round(gate**2 / 2, dtype)), dtype) / math.sqrt(2 * math.pi)
        return numbers.round(gate * share, dtype), numbers.round(share + numbers.round(gate * density, dtype), dtype)
    assert activation == "gelu_tanh"
    inner = numbers.round(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3), dtype)
    tanh = numbers.round(xp.tanh(inner), dtype, TANH)
    half = numbers.round((1 + tanh) / 2, dtype)
    bend = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
    slope = half + numbers.round(gate / 2 * numbers.round(1 - tanh**2, dtype) * bend, dtype)
    return numbers.round(gate * half, dtype), numbers.round(slope, dtype)


class Hidden(NamedTuple):
    """What the backward of a gated activation needs."""

    value: Array
    of_gate: Array | None  # the derivative by the gate, over the gradient of the value; None without a gate
    of_up: Array  # by up


def hidden(case: Case, gate: Array | None, up: Array, numbers: Numbers) -> Hidden:
    """activation(gate) * (up + offset), each clamped before; without a gate, activation(up)."""
    if gate is None:
        act, slope = activated(case, up, numbers)
        return Hidden(numbers.round(act, case.dtype), None, slope)
    xp = numbers.xp
    of_gate, of_up, both_clamped = 1, 1, None
    if case.clamp is not None:
        of_gate = numbers.at_most(gate, case.clamp, case.dtype)
        of_up = numbers.at_most(xp.abs(up), case.clamp, case.dtype)
        both_clamped = (gate >= case.clamp) & (xp.abs(up) >= case.clamp)
        gate, up = xp.minimum(gate, case.clamp), xp.clip(up, -case.clamp, case.clamp)
    assert gate is not None
    act, slope = activated(case, gate, numbers)
    lifted = numbers.round(up + case.up_offset, case.accum_dtype) if case.up_offset else up
    value = numbers.round(act * lifted, case.dtype)
    if both_clamped is not None:
        value = xp.where(both_clamped, numbers.constant(act * lifted, case.dtype), value)
    return Hidden(value, slope * lifted * of_gate, act * of_up)


def experts(case: Case, x_PTD: Array, id_PTK: Array, w: Parameters, numbers: Numbers) -> Array:
    """Each chosen expert's gated layer of each token: [P, T, K, D]; before the last rounding, or the last bias."""
    y_PTKD = np.zeros((*id_PTK.shape, case.width))
    for p, t, k in np.argwhere(id_PTK >= 0):
        g = int(id_PTK[p, t, k])
        y_PTKD[p, t, k] = down(case, hidden_of(case, x_PTD[p, t], w, g, numbers).value, w, g, numbers)
    return y_PTKD


def hidden_of(case: Case, x: Array, w: Parameters, g: int, numbers: Numbers) -> Hidden:
    """What an expert makes of tokens [..., D] before its last matmul."""
    return hidden(case, *gate_and_up(case, x, w, g, numbers), numbers)


def gate_and_up(case: Case, x: Array, w: Parameters, g: int, numbers: Numbers) -> tuple[Array | None, Array]:
    """An expert's projections of tokens [..., D], with their biases; None for a gate that there is not."""
    gate, up = (
        None if weight is None else biased(
            numbers.matmul(x, weight[g], case.width, case.accum_dtype),
            None if bias is None else bias[g], case.dtype, numbers,
        )
        for weight, bias in ((w.w_gate, w.b_gate), (w.w_up, w.b_up))
    )  # fmt: skip
    assert up is not None
    return gate, up


def down(case: Case, hidden: Array, w: Parameters, g: int, numbers: Numbers) -> Array:
    """An expert's last matmul, and its bias."""
    y = numbers.matmul(hidden, w.w_down[g], case.hidden, case.accum_dtype)
    return y if w.b_down is None else numbers.round(y, case.dtype) + w.b_down[g]


def experts_backward(
    case: Case, x_PTD: Array, id_PTK: Array, w: Parameters, dy_PTKD: Array, numbers: Numbers
) -> tuple[Array, Gradients]:
    """Gradients of each row [P, T, K, D], and of what experts have learned. Where dy is zero a row adds nothing."""
    dx_PTKD = np.zeros_like(dy_PTKD)
    found = {name: np.zeros(a.shape) for name, a in of_experts(w).items()}
    rows_E = np.bincount(id_PTK[id_PTK >= 0], minlength=case.experts).tolist()
    for p, t, k in np.argwhere(id_PTK >= 0):
        g, x_D, dy_D = int(id_PTK[p, t, k]), x_PTD[p, t], dy_PTKD[p, t, k]
        hid = hidden_of(case, x_D, w, g, numbers)
        dgate_F, dup_F = gate_and_up_backward(case, hid, dy_D, w.w_down[g], case.width, numbers)
        dx_PTKD[p, t, k] = dx_of(case, ((dgate_F, w.w_gate), (dup_F, w.w_up)), g, numbers)
        products = {"w_up": (x_D, dup_F), "w_down": (hid.value, dy_D), "b_up": (dup_F,), "b_down": (dy_D,)}
        if dgate_F is not None:
            products |= {"w_gate": (x_D, dgate_F), "b_gate": (dgate_F,)}
        for name in found:
            product = products[name][0] if len(products[name]) == 1 else np.outer(*products[name])
            found[name][g] += numbers.terms(product, rows_E[g], case.accum_dtype)
    return dx_PTKD, found


def of_experts(w: Parameters) -> dict[str, Any]:
    """Each rank's part of an array: that of its own experts."""
    return {name: a for name, a in w.there().items() if BY_NAME[name].per_rank}


def gate_and_up_backward(
    case: Case, hid: Hidden, dy: Array, w_down: Any, n: int, numbers: Numbers
) -> tuple[Array | None, Array]:
    """Gradients of gate and up; None without a gate."""
    dhidden = numbers.round(numbers.matmul(dy, w_down.T, n, case.accum_dtype), case.dtype)
    dup = numbers.round(dhidden * hid.of_up, case.dtype)
    if hid.of_gate is None:
        return None, dup
    return numbers.round(numbers.round(dhidden * hid.of_gate, case.accum_dtype), case.dtype), dup


def dx_of(case: Case, through: Iterable[tuple[Array | None, Any]], g: int, numbers: Numbers) -> Array:
    """The gradient of an expert's tokens, by gate and up: each rounded, and added."""
    parts = [
        numbers.round(numbers.matmul(d, weight[g].T, case.hidden, case.accum_dtype), case.dtype)
        for d, weight in through
        if d is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def shared_expert(case: Case, x_PTD: Array, w: Parameters, numbers: Numbers) -> Array:
    """What the shared expert adds to each token: [P, T, D]."""
    y_PTD = numbers.matmul(
        _shared_hidden(case, x_PTD, w, numbers).value, w.shared_w_down, case.shared_hidden, case.accum_dtype
    )
    if w.shared_score is None:
        return y_PTD
    return _shared_weight(case, x_PTD, w, numbers) * numbers.round(y_PTD, case.dtype)


def _shared_hidden(case: Case, x_PTD: Array, w: Parameters, numbers: Numbers) -> Hidden:
    gate_PTH, up_PTH = (
        None
        if weight is None
        else numbers.round(numbers.matmul(x_PTD, weight, case.width, case.accum_dtype), case.dtype)
        for weight in (w.shared_w_gate, w.shared_w_up)
    )
    assert up_PTH is not None
    return hidden(case, gate_PTH, up_PTH, numbers)


def _shared_weight(case: Case, x_PTD: Array, w: Parameters, numbers: Numbers) -> Array:
    """The sigmoid of its score: [P, T, 1]."""
    logit_PT1 = numbers.round(numbers.matmul(x_PTD, w.shared_score[:, None], case.width, case.accum_dtype), case.dtype)
    return numbers.round(sigmoid(logit_PT1), case.dtype)


def shared_backward(
    case: Case, x_PTD: Array, w: Parameters, dout_PTD: Array, numbers: Numbers
) -> tuple[Array, Gradients]:
    """Gradients of the tokens [P, T, D], and of what the shared expert has learned, summed over ranks."""
    hid = _shared_hidden(case, x_PTD, w, numbers)
    found, parts, dy_PTD, x_PDT = {}, [], dout_PTD, x_PTD.swapaxes(-1, -2)

    def over_tokens(name: str, a: Array, d_PTn: Array) -> None:
        of_ranks = numbers.matmul(a, d_PTn, case.tokens, case.accum_dtype)
        found[name] = over_ranks(case, name, of_ranks, -3, numbers)

    if w.shared_score is not None:
        y_PTD = numbers.matmul(hid.value, w.shared_w_down, case.shared_hidden, case.accum_dtype)
        weight_PT1 = _shared_weight(case, x_PTD, w, numbers)
        dy_PTD = numbers.round(weight_PT1 * dout_PTD, case.dtype)
        product_PTD = numbers.round(numbers.round(y_PTD, case.dtype) * dout_PTD, case.dtype)
        dweight_PT1 = numbers.xp.sum(numbers.terms(product_PTD, case.width, case.accum_dtype), axis=-1, keepdims=True)
        slope_PT1 = weight_PT1 * numbers.round(1 - weight_PT1, case.dtype)
        dlogit_PT1 = numbers.round(numbers.round(dweight_PT1, case.dtype) * slope_PT1, case.dtype)
        parts.append(numbers.round(dlogit_PT1 * w.shared_score, case.dtype))
        over_tokens("shared_score", x_PDT, dlogit_PT1)
        found["shared_score"] = found["shared_score"][..., 0]
    dgate_PTH, dup_PTH = gate_and_up_backward(case, hid, dy_PTD, w.shared_w_down, case.width, numbers)
    over_tokens("shared_w_down", hid.value.swapaxes(-1, -2), dy_PTD)
    for name, d_PTH in (("shared_w_up", dup_PTH), ("shared_w_gate", dgate_PTH)):
        if d_PTH is not None:
            over_tokens(name, x_PDT, d_PTH)
            dx_PTD = numbers.matmul(d_PTH, getattr(w, name).T, case.shared_hidden, case.accum_dtype)
            parts.append(numbers.round(dx_PTD, case.dtype))
    return added_up(parts, case.dtype, numbers), found


def added_up(parts: Sequence[Array], dtype: str, numbers: Numbers) -> Array:
    """The sum, term by term, rounded after each addition but the last."""
    total = parts[0]
    for part in parts[1:-1]:
        total = numbers.round(total + part, dtype)
    return total + parts[-1] if len(parts) > 1 else total


def combine(case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """out[t] = sum over k of score * keep * y: [P, T, D]."""
    out_PTD = np.zeros((case.ranks, case.tokens, case.width))
    for p, t, k in np.ndindex(*score_PTK.shape):
        if keep_PTK[p, t, k]:
            out_PTD[p, t] += numbers.terms(score_PTK[p, t, k] * y_PTKD[p, t, k], case.top_k, case.accum_dtype)
    return out_PTD


def combine_backward(
    case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, dout_PTD: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """Gradients of the rows [P, T, K, D] and of the scores [P, T, K]; zero for what was dropped."""
    dy_PTKD, dscore_PTK = np.zeros_like(y_PTKD), np.zeros_like(score_PTK)
    for p, t, k in np.ndindex(*score_PTK.shape):
        if keep_PTK[p, t, k]:
            dy_PTKD[p, t, k] = numbers.round(score_PTK[p, t, k] * dout_PTD[p, t], case.accum_dtype)
            dscore_PTK[p, t, k] = numbers.terms(y_PTKD[p, t, k] * dout_PTD[p, t], case.width, case.accum_dtype).sum()
    return dy_PTKD, dscore_PTK


def group_backward(case: Case, dx_PTKD: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """A token's gradient is the sum over its K rows: [P, T, D]."""
    dx_PTD = np.zeros((case.ranks, case.tokens, case.width))
    for p, t, k in np.ndindex(*keep_PTK.shape):
        if keep_PTK[p, t, k]:
            dx_PTD[p, t] += numbers.terms(dx_PTKD[p, t, k], case.top_k, case.accum_dtype)
    return dx_PTD


class Layer(NamedTuple):
    """The layer end to end, each value before its last rounding."""

    logits: Array  # [P, T, E]
    score: Array  # [P, T, K]
    input: Array  # [P, T, D], what experts are given
    y: Array  # [P, T, K, D]
    shared: Array  # [P, T, D], what the shared expert adds; zero without one
    out: Array  # [P, T, D]
    dy: Array  # [P, T, K, D]
    dscore: Array  # [P, T, K]
    dx_rows: Array  # [P, T, K, D]
    dx_experts: Array  # [P, T, D], without the router's part
    dx_router: Array  # [P, T, D]
    dx: Array  # [P, T, D]
    gradients: Gradients  # of what there is to learn, by name


def layer(
    case: Case, x_PTD: Array, w: Parameters, dout_PTD: Array, id_PTK: Array, keep_PTK: Array, numbers: Numbers,
    aux_PTK: Array | float = 0.0, oracle: ModuleType | None = None,
) -> Layer:  # fmt: skip
    """Forward, and backward from the cotangent `dout`, with the expert ids given; of `oracle`'s functions, or these.

    `aux` is added to the gradient of the scores, as that of an auxiliary loss is.
    """
    oracle = oracle or sys.modules[__name__]
    logits, score_PTE = oracle.route(case, x_PTD, w, numbers)
    score = chosen_scores(case, score_PTE, id_PTK, w, numbers).weight
    score_r = numbers.round(score, case.dtype_of("weight"))
    on_input = case.router.score_on == "input"
    given = numbers.round(x_PTD * score_r * keep_PTK, case.dtype) if on_input else x_PTD
    xp = numbers.xp
    weight = xp.ones_like(score_r) if on_input else score_r
    y = oracle.experts(case, given, id_PTK, w, numbers)
    y_r = numbers.round(y, case.dtype)
    out = oracle.combine(case, y_r, weight, keep_PTK, numbers)
    dy, dscore = oracle.combine_backward(case, y_r, weight, keep_PTK, dout_PTD, numbers)
    dx_rows, gradients = oracle.experts_backward(case, given, id_PTK, w, numbers.round(dy, case.dtype), numbers)
    dx_experts = oracle.group_backward(case, numbers.round(dx_rows, case.dtype), keep_PTK, numbers)
    if on_input:
        dgiven = numbers.round(dx_experts, case.dtype)
        dscore = keep_PTK * xp.sum(numbers.terms(dgiven * x_PTD, case.width, case.accum_dtype), axis=-1, keepdims=True)
        dx_experts = dgiven * score_r
    dscore = numbers.round(dscore, case.dtype_of("weight")) + aux_PTK
    dscore_r = numbers.round(dscore, case.dtype_of("weight"))
    dx_router, of_router = oracle.route_backward(case, x_PTD, w, id_PTK, dscore_r, numbers)
    dx_parts = [
        numbers.round(a, dtype) for a, dtype in ((dx_router, case.dtype_of("logits")), (dx_experts, case.dtype))
    ]
    shared, of_shared = xp.zeros_like(out), {}
    if w.shared_w_up is not None:
        shared = shared_expert(case, x_PTD, w, numbers)
        out = numbers.round(out, case.dtype) + numbers.round(shared, case.dtype)
        dx_shared, of_shared = shared_backward(case, x_PTD, w, dout_PTD, numbers)
        dx_parts.insert(0, numbers.round(dx_shared, case.dtype))
    dx = added_up([numbers.round(a, case.dtype) for a in dx_parts], case.dtype, numbers)
    return Layer(
        logits, score, given, y, shared, out, dy, dscore, dx_rows, dx_experts, dx_router, dx,
        of_router | gradients | of_shared,
    )  # fmt: skip
