"""The oracle: a dense float64 MoE layer in NumPy, plain loops over tokens and experts, no dispatch at all.

Every function takes a `Numbers`, which says what happens at the documented rounding points: nothing (`Exact`), or a
random relative error of at most the unit roundoff (`Perturbed`, the yardstick of `tolerances.py`). Functions return
values before their last rounding. Shapes carry the rank in front: x_PTD. What needs no loop, here and in `vectorised`,
takes arrays with more axes before it, of draws.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from parity.cases.case import Case
from parity.oracle.tolerances import noise, underflow
from parity.oracle.windows import Windows

Array = np.ndarray


class Exact:
    """Real arithmetic, as far as float64 goes."""

    def round(self, a: Array, dtype: str, units: float = 1) -> Array:  # noqa: ARG002
        """The value stored in `dtype`, of a function that is `units` roundings off: here, itself."""
        return a

    def terms(self, a: Array, n: int, dtype: str) -> Array:  # noqa: ARG002
        """Terms of sums of n, accumulated in `dtype`, each term of one sum: here, themselves."""
        return a

    def matmul(self, a: Array, b: Array, n: int, dtype: str) -> Array:  # noqa: ARG002
        """a @ b, each number a sum of n products accumulated in `dtype`: here, without error."""
        return a @ b


@dataclass
class Perturbed:
    """The standard model of floating point, fl(a) = a(1 + d), |d| <= u, with d drawn (Monte Carlo arithmetic)."""

    rng: np.random.Generator

    def round(self, a: Array, dtype: str, units: float = 1) -> Array:
        """The value stored in `dtype`, off by up to `units` unit roundoffs, or by what underflow may cost."""
        off = self.rng.uniform(-1, 1, np.shape(a))
        return a + off * np.maximum(units * noise(dtype) * np.abs(a), underflow(dtype))

    def terms(self, a: Array, n: int, dtype: str) -> Array:
        """Terms of sums of n, accumulated in `dtype`, each term of one sum: n roundings walk randomly, so sqrt(n).

        Each term may be lost to underflow, too.
        """
        off = self.rng.uniform(-1, 1, np.shape(a))
        return a + off * np.maximum(np.sqrt(max(n, 1)) * noise(dtype) * np.abs(a), underflow(dtype))

    def matmul(self, a: Array, b: Array, n: int, dtype: str) -> Array:
        """a @ b, each number a sum of n products accumulated in `dtype`, with an error of its own.

        The sum of `terms` of its products: their errors have the variance n * noise**2 / 3 * sum of squared products.
        Perturbing a factor instead would give all numbers of a row one error, which softmax and differences cancel.
        What underflow takes from each product, or from a factor of it, has one sign, and adds up.
        """
        deviation = np.sqrt((a * a) @ (b * b)) * (math.sqrt(max(n, 1) / 3) * noise(dtype))
        tiny = underflow(dtype)
        deviation += np.add.reduce(np.abs(a), -1, keepdims=True) * tiny
        ones = np.ones((1,) * (a.ndim > 1) + a.shape[-1:])  # a product, as b may be on a GPU
        deviation += (ones @ abs(b) + n) * tiny
        return a @ b + deviation * self.rng.standard_normal(deviation.shape)


Numbers = Exact | Perturbed

# Units of rounding that a tanh may be off by: XLA's own, a ratio of polynomials on CPU and GPU, is by up to 4.75
# (all of 4,000,001 float32 between -10 and 10 on a CPU, jax 0.10.2), PyTorch's by 1.0.
TANH = 5


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), which is 0 where the power is beyond float64."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-a))


class Weights(NamedTuple):
    """Of all experts: [E, D, F], [E, D, F], [E, F, D]."""

    w_gate: Array | Windows
    w_up: Array | Windows
    w_down: Array | Windows


def route(case: Case, x_PTD: Array, router_DE: Array, numbers: Numbers) -> tuple[Array, Array]:
    """Logits and scores of all experts, [P, T, E] each, before selection."""
    logits_PTE = np.zeros((*x_PTD.shape[:2], case.experts))
    for p, t in np.ndindex(*x_PTD.shape[:2]):
        logits_PTE[p, t] = numbers.matmul(x_PTD[p, t], router_DE, case.width, case.wide)
    logits_PTE = numbers.round(logits_PTE, case.wide)
    return logits_PTE, scores(case, logits_PTE, numbers)


def scores(case: Case, logits_PTE: Array, numbers: Numbers) -> Array:
    """Softmax or sigmoid of the logits: [P, T, E]."""
    if case.router.score_function == "sigmoid":
        return numbers.round(sigmoid(logits_PTE), case.wide)
    below_PTE = numbers.round(logits_PTE - logits_PTE.max(-1, keepdims=True), case.wide)
    power_PTE = numbers.round(np.exp(below_PTE), case.wide)
    total_PT1 = numbers.terms(power_PTE, case.experts, case.wide).sum(-1, keepdims=True)
    return numbers.round(power_PTE / total_PT1, case.wide)


def select(case: Case, score_PTE: Array) -> Array:
    """The K largest scores of each token as they are stored, ties to the lower expert id: [P, T, K]."""
    id_PTK = np.zeros((*score_PTE.shape[:2], case.top_k), np.int32)
    for p, t in np.ndindex(*score_PTE.shape[:2]):
        score_E = score_PTE[p, t].astype(case.wide)
        id_PTK[p, t] = sorted(range(case.experts), key=lambda g: (-score_E[g], g))[: case.top_k]
    return id_PTK


def chosen_scores(case: Case, score_PTE: Array, id_PTK: Array, numbers: Numbers) -> Array:
    """The scores of the chosen experts, renormalised and scaled as the case says: [P, T, K]; 0 for an id of -1."""
    score_PTK = _of_chosen(score_PTE, id_PTK)
    if case.router.renormalize:
        total_PT1 = numbers.terms(score_PTK, case.top_k, case.wide).sum(-1, keepdims=True) + 1e-20
        score_PTK = numbers.round(score_PTK / total_PT1, case.wide)
    return score_PTK * case.router.scale


def _for_each(id_PTK: Array, a: Array) -> Array:
    """The expert ids with the leading axes of `a`."""
    return np.broadcast_to(id_PTK, (*a.shape[:-1], id_PTK.shape[-1]))


def _of_chosen(score_PTE: Array, id_PTK: Array) -> Array:
    """[P, T, K]; 0 for an id of -1, which is that of padding."""
    return np.where(id_PTK >= 0, np.take_along_axis(score_PTE, _for_each(id_PTK, score_PTE), axis=-1), 0)


def score_backward(case: Case, score_PTE: Array, id_PTK: Array, dscore_PTK: Array, numbers: Numbers) -> Array:
    """The gradient of the logits, [P, T, E], from that of the chosen scores."""
    score_PTK, d_PTK = _of_chosen(score_PTE, id_PTK), case.router.scale * dscore_PTK
    if case.router.renormalize:
        total_PT1 = numbers.terms(score_PTK, case.top_k, case.wide).sum(-1, keepdims=True) + 1e-20
        mean_PT1 = numbers.terms(d_PTK * score_PTK, case.top_k, case.wide).sum(-1, keepdims=True) / total_PT1
        d_PTK = numbers.round(numbers.round(d_PTK, case.wide) - numbers.round(mean_PT1, case.wide), case.wide)
        d_PTK = d_PTK / total_PT1
    d_PTE = np.zeros_like(score_PTE)
    d_PTK = np.where(id_PTK >= 0, numbers.round(d_PTK, case.wide), 0)
    np.put_along_axis(d_PTE, _for_each(id_PTK, d_PTE), d_PTK, axis=-1)
    if case.router.score_function == "sigmoid":
        dlogits_PTE = d_PTE * score_PTE * numbers.round(1 - score_PTE, case.wide)
    else:
        mean_PT1 = numbers.terms(d_PTE * score_PTE, case.top_k, case.wide).sum(-1, keepdims=True)
        dlogits_PTE = score_PTE * numbers.round(d_PTE - numbers.round(mean_PT1, case.wide), case.wide)
    return numbers.round(dlogits_PTE, case.wide)


def route_backward(
    case: Case, x_PTD: Array, router_DE: Array, id_PTK: Array, dscore_PTK: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """Gradients of the tokens [P, T, D] and of the router [D, E], summed over ranks."""
    _, score_PTE = route(case, x_PTD, router_DE, numbers)
    dlogits_PTE = score_backward(case, score_PTE, id_PTK, dscore_PTK, numbers)
    dx_PTD, drouter_DE = np.zeros_like(x_PTD), np.zeros_like(router_DE)
    n = x_PTD.shape[0] * x_PTD.shape[1]
    for p, t in np.ndindex(*x_PTD.shape[:2]):
        dx_PTD[p, t] = numbers.matmul(dlogits_PTE[p, t], router_DE.T, case.experts, case.wide)
        drouter_DE += numbers.terms(np.outer(x_PTD[p, t], dlogits_PTE[p, t]), n, case.wide)
    return dx_PTD, drouter_DE


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
    for p, t, k in np.ndindex(*id_PTK.shape):
        counts_PE[p, id_PTK[p, t, k]] += keep_PTK[p, t, k]
    return counts_PE


def sent(case: Case, id_PTK: Array, keep_PTK: Array, layout: str) -> Array:
    """Rows that each rank sends to each expert, [P, E]: all but padding, or what a static capacity keeps."""
    return count(case, id_PTK, keep_PTK if layout == "static" else id_PTK >= 0)


def received(case: Case, sent_PE: Array) -> Array:
    """The same on the receiver, [P, P, e]: received[q, p, j] rows from rank p for local expert j of rank q."""
    return sent_PE.reshape(case.ranks, case.ranks, -1).transpose(1, 0, 2)


def activated(case: Case, gate: Array, numbers: Numbers) -> tuple[Array, Array]:
    """The activation of a gate and its derivative, in the wide dtype.

    silu(g) = g * sigmoid(g). gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g**3))): Hendrycks and
    Gimpel 2016, "Gaussian Error Linear Units".
    """
    if case.expert.activation == "silu":
        share = numbers.round(sigmoid(gate), case.wide)
        slope = share * (1 + gate * numbers.round(1 - share, case.wide))
        return numbers.round(gate * share, case.wide), numbers.round(slope, case.wide)
    inner = numbers.round(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3), case.wide)
    tanh = numbers.round(np.tanh(inner), case.wide, TANH)
    half = numbers.round((1 + tanh) / 2, case.wide)
    bend = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
    slope = half + numbers.round(gate / 2 * numbers.round(1 - tanh**2, case.wide) * bend, case.wide)
    return numbers.round(gate * half, case.wide), numbers.round(slope, case.wide)


def experts(case: Case, x_PTD: Array, id_PTK: Array, w: Weights, numbers: Numbers) -> Array:
    """Each chosen expert's gated layer of each token: [P, T, K, D]."""
    y_PTKD = np.zeros((*id_PTK.shape, case.width))
    for p, t, k in np.argwhere(id_PTK >= 0):
        g = int(id_PTK[p, t, k])
        *_, hidden_F = _hidden(case, x_PTD[p, t], w, g, numbers)
        y_PTKD[p, t, k] = numbers.matmul(hidden_F, w.w_down[g], case.hidden, case.wide)
    return y_PTKD


def _hidden(case: Case, x_D: Array, w: Weights, g: int, numbers: Numbers) -> tuple[Array, Array, Array, Array]:
    """Activated gate, its derivative, up, and their product."""
    gate_F = numbers.round(numbers.matmul(x_D, w.w_gate[g], case.width, case.wide), case.dtype)
    up_F = numbers.round(numbers.matmul(x_D, w.w_up[g], case.width, case.wide), case.dtype)
    act_F, slope_F = activated(case, gate_F, numbers)
    return act_F, slope_F, up_F, numbers.round(act_F * up_F, case.dtype)


def experts_backward(
    case: Case, x_PTD: Array, id_PTK: Array, w: Weights, dy_PTKD: Array, numbers: Numbers
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Gradients of each row [P, T, K, D] and of the weights. Where dy is zero a row adds nothing."""
    dx_PTKD = np.zeros_like(dy_PTKD)
    dw_gate, dw_up, dw_down = (np.zeros(a.shape) for a in w)
    rows_E = np.bincount(id_PTK[id_PTK >= 0], minlength=case.experts).tolist()
    for p, t, k in np.argwhere(id_PTK >= 0):
        g, x_D, dy_D = int(id_PTK[p, t, k]), x_PTD[p, t], dy_PTKD[p, t, k]
        act_F, slope_F, up_F, hidden_F = _hidden(case, x_D, w, g, numbers)
        dhidden_F = numbers.round(numbers.matmul(dy_D, w.w_down[g].T, case.width, case.wide), case.dtype)
        dgate_F = numbers.round(numbers.round(dhidden_F * up_F, case.wide) * slope_F, case.dtype)
        dup_F = numbers.round(dhidden_F * act_F, case.dtype)
        through_gate_D = numbers.matmul(dgate_F, w.w_gate[g].T, case.hidden, case.wide)
        through_up_D = numbers.matmul(dup_F, w.w_up[g].T, case.hidden, case.wide)
        dx_PTKD[p, t, k] = numbers.round(through_gate_D, case.dtype) + numbers.round(through_up_D, case.dtype)
        dw_gate[g] += numbers.terms(np.outer(x_D, dgate_F), rows_E[g], case.wide)
        dw_up[g] += numbers.terms(np.outer(x_D, dup_F), rows_E[g], case.wide)
        dw_down[g] += numbers.terms(np.outer(hidden_F, dy_D), rows_E[g], case.wide)
    return dx_PTKD, (dw_gate, dw_up, dw_down)


def combine(case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """out[t] = sum over k of score * keep * y: [P, T, D]."""
    out_PTD = np.zeros((case.ranks, case.tokens, case.width))
    for p, t, k in np.ndindex(*score_PTK.shape):
        if keep_PTK[p, t, k]:
            out_PTD[p, t] += numbers.terms(score_PTK[p, t, k] * y_PTKD[p, t, k], case.top_k, case.wide)
    return out_PTD


def combine_backward(
    case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, dout_PTD: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """Gradients of the rows [P, T, K, D] and of the scores [P, T, K]; zero for what was dropped."""
    dy_PTKD, dscore_PTK = np.zeros_like(y_PTKD), np.zeros_like(score_PTK)
    for p, t, k in np.ndindex(*score_PTK.shape):
        if keep_PTK[p, t, k]:
            dy_PTKD[p, t, k] = numbers.round(score_PTK[p, t, k] * dout_PTD[p, t], case.wide)
            dscore_PTK[p, t, k] = numbers.terms(y_PTKD[p, t, k] * dout_PTD[p, t], case.width, case.wide).sum()
    return dy_PTKD, dscore_PTK


def group_backward(case: Case, dx_PTKD: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """A token's gradient is the sum over its K rows: [P, T, D]."""
    dx_PTD = np.zeros((case.ranks, case.tokens, case.width))
    for p, t, k in np.ndindex(*keep_PTK.shape):
        if keep_PTK[p, t, k]:
            dx_PTD[p, t] += numbers.terms(dx_PTKD[p, t, k], case.top_k, case.wide)
    return dx_PTD


class Layer(NamedTuple):
    """The layer end to end, each value before its last rounding."""

    logits: Array  # [P, T, E]
    score: Array  # [P, T, K]
    y: Array  # [P, T, K, D]
    out: Array  # [P, T, D]
    dy: Array  # [P, T, K, D]
    dscore: Array  # [P, T, K]
    dx_rows: Array  # [P, T, K, D]
    dx_experts: Array  # [P, T, D], without the router's part
    dx_router: Array  # [P, T, D]
    dx: Array  # [P, T, D]
    drouter: Array  # [D, E]
    dw_gate: Array
    dw_up: Array
    dw_down: Array


def layer(
    case: Case, x_PTD: Array, router_DE: Array, w: Weights, dout_PTD: Array, id_PTK: Array, keep_PTK: Array,
    numbers: Numbers, aux_PTK: Array | float = 0.0, oracle: ModuleType | None = None,
) -> Layer:  # fmt: skip
    """Forward, and backward from the cotangent `dout`, with the expert ids given; of `oracle`'s functions, or these.

    `aux` is added to the gradient of the scores, as that of an auxiliary loss is.
    """
    oracle = oracle or sys.modules[__name__]
    logits, score_PTE = oracle.route(case, x_PTD, router_DE, numbers)
    score = chosen_scores(case, score_PTE, id_PTK, numbers)
    score_r = numbers.round(score, case.wide)
    y = oracle.experts(case, x_PTD, id_PTK, w, numbers)
    y_r = numbers.round(y, case.dtype)
    out = oracle.combine(case, y_r, score_r, keep_PTK, numbers)
    dy, dscore = oracle.combine_backward(case, y_r, score_r, keep_PTK, dout_PTD, numbers)
    dscore = numbers.round(dscore, case.wide) + aux_PTK
    dx_rows, dw = oracle.experts_backward(case, x_PTD, id_PTK, w, numbers.round(dy, case.dtype), numbers)
    dx_experts = oracle.group_backward(case, numbers.round(dx_rows, case.dtype), keep_PTK, numbers)
    dscore_r = numbers.round(dscore, case.wide)
    dx_router, drouter = oracle.route_backward(case, x_PTD, router_DE, id_PTK, dscore_r, numbers)
    dx = numbers.round(dx_experts, case.dtype) + numbers.round(dx_router, case.dtype)
    return Layer(logits, score, y, out, dy, dscore, dx_rows, dx_experts, dx_router, dx, drouter, *dw)
