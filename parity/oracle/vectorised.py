"""The oracle again, without its loops: the same sums and the same rounding points, for cases of real size.

Functions have the names, arguments and results of `reference`, which tests hold them against. Arrays of numbers may
have more axes in front: of draws, which share their expert ids.
"""

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np

from parity.cases.case import Case
from parity.oracle import reference
from parity.oracle.reference import Layer, Numbers, Perturbed, Weights, activated
from parity.oracle.tolerances import DRAWS

Array = np.ndarray

# Assignments up to which the plain loops are used where one evaluation is enough: about a second.
PLAIN = 2048

# Numbers in the largest array up to which all draws are evaluated together: of 16 draws, 32 MB.
AT_ONCE = 2**18


def small(case: Case) -> bool:
    """Whether its arrays are so small that Python, and not NumPy, takes most of the time."""
    return case.ranks * case.tokens * case.top_k <= PLAIN and not case.real_size


def draws_at_once(case: Case) -> int:
    """Draws that are evaluated together: all, or one where arrays are so large that all would fill memory."""
    rows, experts = case.ranks * case.assignments, case.experts * case.width
    return DRAWS if small(case) and max(rows * case.width, (rows + experts) * case.hidden) <= AT_ONCE else 1


def oracle_for(case: Case) -> ModuleType:
    """The plain loops where they are quick enough, and these functions elsewhere."""
    return reference if small(case) else sys.modules[__name__]


def route(case: Case, x_PTD: Array, router_DE: Array, numbers: Numbers) -> tuple[Array, Array]:
    """See `reference.route`."""
    logits_PTE = numbers.round(numbers.matmul(x_PTD, router_DE, case.width, case.wide), case.wide)
    return logits_PTE, reference.scores(case, logits_PTE, numbers)


def drawn_scores(case: Case, x_PTD: Array, router_DE: Array, seed: Sequence[int]) -> Iterator[Array]:
    """Scores of all experts, [P, T, E], with every rounding drawn, `DRAWS` times."""
    n = draws_at_once(case)
    for first in range(0, DRAWS, n):
        numbers = Perturbed(np.random.default_rng([*seed, first]))
        yield from route(case, np.broadcast_to(x_PTD, (n, *x_PTD.shape)), router_DE, numbers)[1]


def select(case: Case, score_PTE: Array) -> Array:
    """See `reference.select`."""
    return np.argsort(-score_PTE.astype(case.wide), axis=-1, kind="stable")[..., : case.top_k].astype(np.int32)


def route_backward(
    case: Case, x_PTD: Array, router_DE: Array, id_PTK: Array, dscore_PTK: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """See `reference.route_backward`."""
    _, score_PTE = route(case, x_PTD, router_DE, numbers)
    dlogits_PTE = reference.score_backward(case, score_PTE, id_PTK, dscore_PTK, numbers)
    dx_PTD = numbers.matmul(dlogits_PTE, router_DE.T, case.experts, case.wide)
    *draws, P, T, D = x_PTD.shape
    x_Dn = x_PTD.reshape(*draws, P * T, D).swapaxes(-1, -2)
    dlogits_nE = dlogits_PTE.reshape(*draws, P * T, case.experts)
    drouter_DE = numbers.matmul(x_Dn, dlogits_nE, P * T, case.wide)
    return dx_PTD, drouter_DE


def experts(case: Case, x_PTD: Array, id_PTK: Array, w: Weights, numbers: Numbers) -> Array:
    """See `reference.experts`."""
    y_PTKD = np.zeros((*x_PTD.shape[:-3], *id_PTK.shape, case.width))
    for g in np.unique(id_PTK[id_PTK >= 0]):
        p, t, k = np.nonzero(id_PTK == g)
        *_, hidden_nF = _hidden(case, x_PTD[..., p, t, :], w, g, numbers)
        y_PTKD[..., p, t, k, :] = numbers.matmul(hidden_nF, w.w_down[g], case.hidden, case.wide)
    return y_PTKD


def _hidden(case: Case, x_nD: Array, w: Weights, g: int, numbers: Numbers) -> tuple[Array, Array, Array, Array]:
    gate_nF = numbers.round(numbers.matmul(x_nD, w.w_gate[g], case.width, case.wide), case.dtype)
    up_nF = numbers.round(numbers.matmul(x_nD, w.w_up[g], case.width, case.wide), case.dtype)
    act_nF, slope_nF = activated(case, gate_nF, numbers)
    return act_nF, slope_nF, up_nF, numbers.round(act_nF * up_nF, case.dtype)


def experts_backward(
    case: Case, x_PTD: Array, id_PTK: Array, w: Weights, dy_PTKD: Array, numbers: Numbers
) -> tuple[Array, tuple[Array, Array, Array]]:
    """See `reference.experts_backward`; of the weights' gradients only the rows that are compared."""
    dx_PTKD = np.zeros_like(dy_PTKD)
    rows = [case.compared_rows(a.shape[1]) for a in w]
    sizes = [(a.shape[0], np.arange(a.shape[1])[r].size, a.shape[2]) for a, r in zip(w, rows, strict=True)]
    dw_gate, dw_up, dw_down = (np.zeros((*x_PTD.shape[:-3], *size)) for size in sizes)
    for g in np.unique(id_PTK[id_PTK >= 0]):
        p, t, k = np.nonzero(id_PTK == g)
        x_nD, dy_nD, n = x_PTD[..., p, t, :], dy_PTKD[..., p, t, k, :], p.size
        act_nF, slope_nF, up_nF, hidden_nF = _hidden(case, x_nD, w, g, numbers)
        dhidden_nF = numbers.round(numbers.matmul(dy_nD, w.w_down[g].T, case.width, case.wide), case.dtype)
        dgate_nF = numbers.round(numbers.round(dhidden_nF * up_nF, case.wide) * slope_nF, case.dtype)
        dup_nF = numbers.round(dhidden_nF * act_nF, case.dtype)
        through_gate_nD = numbers.matmul(dgate_nF, w.w_gate[g].T, case.hidden, case.wide)
        through_up_nD = numbers.matmul(dup_nF, w.w_up[g].T, case.hidden, case.wide)
        dx_PTKD[..., p, t, k, :] = numbers.round(through_gate_nD, case.dtype) + numbers.round(through_up_nD, case.dtype)
        dw_gate[..., g, :, :] = numbers.matmul(x_nD[..., rows[0]].swapaxes(-1, -2), dgate_nF, n, case.wide)
        dw_up[..., g, :, :] = numbers.matmul(x_nD[..., rows[1]].swapaxes(-1, -2), dup_nF, n, case.wide)
        dw_down[..., g, :, :] = numbers.matmul(hidden_nF[..., rows[2]].swapaxes(-1, -2), dy_nD, n, case.wide)
    return dx_PTKD, (dw_gate, dw_up, dw_down)


def combine(case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """See `reference.combine`."""
    weight_PTK = np.where(keep_PTK, score_PTK, 0)
    return numbers.terms(weight_PTK[..., None] * y_PTKD, case.top_k, case.wide).sum(axis=-2)


def combine_backward(
    case: Case, y_PTKD: Array, score_PTK: Array, keep_PTK: Array, dout_PTD: Array, numbers: Numbers
) -> tuple[Array, Array]:
    """See `reference.combine_backward`."""
    weight_PTK = np.where(keep_PTK, score_PTK, 0)
    dy_PTKD = numbers.round(weight_PTK[..., None] * dout_PTD[..., None, :], case.wide)
    return dy_PTKD, keep_PTK * numbers.terms(y_PTKD * dout_PTD[..., None, :], case.width, case.wide).sum(axis=-1)


def group_backward(case: Case, dx_PTKD: Array, keep_PTK: Array, numbers: Numbers) -> Array:
    """See `reference.group_backward`."""
    return (keep_PTK[..., None] * numbers.terms(dx_PTKD, case.top_k, case.wide)).sum(axis=-2)


def layer(
    case: Case, x_PTD: Array, router_DE: Array, w: Weights, dout_PTD: Array, id_PTK: Array, keep_PTK: Array,
    numbers: Numbers, aux_PTK: Array | float = 0.0,
) -> Layer:  # fmt: skip
    """See `reference.layer`."""
    return reference.layer(
        case, x_PTD, router_DE, w, dout_PTD, id_PTK, keep_PTK, numbers, aux_PTK, oracle=sys.modules[__name__]
    )
