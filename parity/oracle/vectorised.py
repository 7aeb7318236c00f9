"""The oracle again, without its loops: the same sums and the same rounding points, for cases of real size.

Functions have the names, arguments and results of `reference`, which tests hold them against. Arrays of numbers may
have more axes in front: of draws, which share their expert ids.
"""

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import Parameters
from parity.oracle import reference
from parity.oracle.arrays import Array, gpu_is_there, space_of, zeros_beside
from parity.oracle.reference import Gradients, Layer, Numbers, Perturbed
from parity.oracle.tolerances import DRAWS

# Assignments up to which the plain loops are used where one evaluation is enough: about a second.
PLAIN = 2048

# Numbers in the largest array up to which all draws are evaluated together: of 16 draws, 32 MB.
AT_ONCE = 2**18


def small(case: Case) -> bool:
    """Whether the case's arrays are so small that Python, and not NumPy, takes most of the time."""
    return case.ranks * case.tokens * case.top_k <= PLAIN and not case.real_size


def draws_at_once(case: Case) -> int:
    """Draws that are evaluated together: all, or one where arrays are so large that all would fill memory."""
    rows, experts = case.ranks * case.assignments, case.experts * case.width
    return DRAWS if small(case) and max(rows * case.width, (rows + experts) * case.hidden) <= AT_ONCE else 1


def on_gpu(case: Case) -> bool:
    """Whether the oracle computes on a GPU: where there is one, and the work is not small."""
    return not small(case) and gpu_is_there()


def oracle_for(case: Case) -> ModuleType:
    """The plain loops where they are quick enough, and these functions elsewhere."""
    return reference if small(case) and not on_gpu(case) else sys.modules[__name__]


def route(case: Case, x_PTD: Array, w: Parameters, numbers: Numbers) -> tuple[Array, Array]:
    """See `reference.route`."""
    x_PTD = reference.as_router_takes(case, x_PTD, numbers)
    logits_PTE = numbers.matmul(x_PTD, w.router, case.width, case.score_dtype)
    logits_PTE = reference.biased(logits_PTE, w.router_bias, case.dtype_of("logits"), numbers)
    return logits_PTE, reference.scores(case, logits_PTE, numbers)


def drawn_scores(case: Case, x_PTD: Array, w: Parameters, seed: Sequence[int]) -> Iterator[Array]:
    """Scores of all experts, [P, T, E], with every rounding drawn, `DRAWS` times."""
    n = draws_at_once(case)
    for first in range(0, DRAWS, n):
        xp = space_of(x_PTD)
        numbers = Perturbed(np.random.default_rng([*seed, first]), xp)
        yield from route(case, xp.broadcast_to(x_PTD, (n, *x_PTD.shape)), w, numbers)[1]


def select(case: Case, score_PTE: Array, w: Parameters) -> Array:
    """See `reference.select`."""
    if case.groups > 1:
        return reference.select(case, score_PTE, w)
    keys_PTE = reference.stored_keys(case, score_PTE, w)
    return np.argsort(-keys_PTE, axis=-1, kind="stable")[..., : case.top_k].astype(np.int32)


def route_backward(
    case: Case, x_PTD: Array, w: Parameters, id_PTK: Array, dscore_PTK: Array, numbers: Numbers
) -> tuple[Array, Gradients]:
    """See `reference.route_backward`."""
    logits_PTE, score_PTE = route(case, x_PTD, w, numbers)
    dlogits_PTE, dscale_PE = reference.score_backward(case, logits_PTE, score_PTE, id_PTK, w, dscore_PTK, numbers)
    x_PTD = reference.as_router_takes(case, x_PTD, numbers)
    dx_PTD = numbers.matmul(dlogits_PTE, w.router.T, case.experts, case.score_dtype)
    drouter_PDE = numbers.matmul(x_PTD.swapaxes(-1, -2), dlogits_PTE, case.tokens, case.score_dtype)
    return dx_PTD, reference.router_gradients(case, w, drouter_PDE, dlogits_PTE, dscale_PE, numbers)


def experts(case: Case, x_PTD: Array, id_PTK: Array, w: Parameters, numbers: Numbers) -> Array:
    """See `reference.experts`."""
    y_PTKD = zeros_beside(x_PTD, (*x_PTD.shape[:-3], *id_PTK.shape, case.width))
    for g, p, t, k in _of_each_expert(id_PTK):
        hidden_nF = reference.hidden_of(case, x_PTD[..., p, t, :], w, g, numbers).value
        y_PTKD[..., p, t, k, :] = reference.down(case, hidden_nF, w, g, numbers)
    return y_PTKD


def experts_backward(
    case: Case, x_PTD: Array, id_PTK: Array, w: Parameters, dy_PTKD: Array, numbers: Numbers
) -> tuple[Array, Gradients]:
    """See `reference.experts_backward`; of the weights' gradients only the rows that are compared."""
    dx_PTKD, found = numbers.xp.zeros_like(dy_PTKD), {}
    rows = {name: case.compared_rows(a.shape[1]) for name, a in reference.of_experts(w).items()}
    for name, a in reference.of_experts(w).items():
        size = a.shape if len(a.shape) == 2 else (a.shape[0], np.arange(a.shape[1])[rows[name]].size, a.shape[2])
        found[name] = zeros_beside(x_PTD, (*x_PTD.shape[:-3], *size))
    for g, p, t, k in _of_each_expert(id_PTK):
        x_nD, dy_nD, n = x_PTD[..., p, t, :], dy_PTKD[..., p, t, k, :], len(p)
        hid = reference.hidden_of(case, x_nD, w, g, numbers)
        dgate_nF, dup_nF = reference.gate_and_up_backward(case, hid, dy_nD, w.w_down[g], case.width, numbers)
        through = ((dgate_nF, w.w_gate), (dup_nF, w.w_up))
        dx_PTKD[..., p, t, k, :] = reference.dx_of(case, through, g, numbers)
        of_weights = {"w_gate": (x_nD, dgate_nF), "w_up": (x_nD, dup_nF), "w_down": (hid.value, dy_nD)}
        of_biases = {"b_gate": dgate_nF, "b_up": dup_nF, "b_down": dy_nD}
        for name, gradient in found.items():
            if name in of_weights:
                a, d = of_weights[name]
                gradient[..., g, :, :] = numbers.matmul(a[..., rows[name]].swapaxes(-1, -2), d, n, case.accum_dtype)
            else:
                gradient[..., g, :] = numbers.xp.sum(numbers.terms(of_biases[name], n, case.accum_dtype), axis=-2)
    return dx_PTKD, found


def _of_each_expert(id_PTK: Array) -> Iterator[tuple[int, Array, Array, Array]]:
    """Each expert that is chosen, and where: ranks, tokens and choices, in order."""
    xp, (_, T, K) = space_of(id_PTK), id_PTK.shape
    flat_A = id_PTK.reshape(-1)
    by_expert_A = xp.argsort(flat_A, stable=True)
    experts, rows = xp.unique_counts(flat_A)
    end = 0
    for g, n in zip(experts.tolist(), rows.tolist(), strict=True):
        a_n = by_expert_A[end : end + n]
        end += n
        if g >= 0:
            yield g, a_n // (T * K), a_n // K % T, a_n % K


def combine(case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """See `reference.combine`."""
    weight_PTK = numbers.xp.where(keep_PTK, score_PTK, 0.0)
    return numbers.xp.sum(numbers.terms(weight_PTK[..., None] * y_PTKD, case.top_k, case.accum_dtype), axis=-2)


def combine_backward(
    case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, dout_PTD: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """See `reference.combine_backward`."""
    weight_PTK = numbers.xp.where(keep_PTK, score_PTK, 0.0)
    dy_PTKD = numbers.round(weight_PTK[..., None] * dout_PTD[..., None, :], case.accum_dtype)
    terms_PTKD = numbers.terms(y_PTKD * dout_PTD[..., None, :], case.width, case.accum_dtype)
    return dy_PTKD, keep_PTK * numbers.xp.sum(terms_PTKD, axis=-1)


def group_backward(case: Case, dx_PTKD: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """See `reference.group_backward`."""
    return numbers.xp.sum(keep_PTK[..., None] * numbers.terms(dx_PTKD, case.top_k, case.accum_dtype), axis=-2)


def keep_within_capacity(case: Case, id_PTK: Array, score_PTK: Array) -> Array:
    """See `reference.keep_within_capacity`: of each rank's assignments, in order of priority, the first in each bin."""
    keep_PTK = np.zeros(id_PTK.shape, bool)
    for id_TK, score_TK, keep_TK in zip(id_PTK, score_PTK, keep_PTK, strict=True):
        first = {"token": np.zeros(id_TK.shape), "choice": np.indices(id_TK.shape)[1], "score": -score_TK}
        order_a = first[case.priority].reshape(-1).argsort(kind="stable")
        bin_a = id_TK.reshape(-1)[order_a] // (case.experts // case.bins)
        order_a = order_a[bin_a.argsort(kind="stable")]
        bin_a = np.sort(bin_a)
        place_a = np.arange(bin_a.size) - np.searchsorted(bin_a, bin_a)
        keep_TK.reshape(-1)[order_a] = (place_a < case.capacity) & (bin_a >= 0)
    return keep_PTK


def layer(
    case: Case, x_PTD: Array, w: Parameters, dout_PTD: Array, id_PTK: Array, keep_PTK: Array, numbers: Numbers,
    aux_PTK: Array | float = 0.0,
) -> Layer:  # fmt: skip
    """See `reference.layer`."""
    return reference.layer(case, x_PTD, w, dout_PTD, id_PTK, keep_PTK, numbers, aux_PTK, oracle=sys.modules[__name__])
