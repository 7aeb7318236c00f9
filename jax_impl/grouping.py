"""Stages 2 and 9: one row per assignment, sorted by expert, padded to a capacity; and back, weighted by score."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer

from jax_impl import kernels
from jax_impl.checks import check_capacity, check_capacity_factor, check_priority
from jax_impl.layout import exclusive_cumsum, invert, rows_or_zero, sort_by_key


class Capacity(NamedTuple):
    """How many rows a bin holds, and who goes first. `n_bins` is P (a bin per rank) or E (a bin per expert)."""

    n_bins: int
    rows: int
    priority: str = "token"


def plan_capacity(
    factor: str | int | float | Decimal | Fraction | None,
    n_tokens: int,
    top_k: int,
    n_experts: int,
    n_ranks: int,
    per: str = "rank",
    priority: str = "token",
    align: int = 1,
) -> Capacity:
    """C = ceil(factor * T*K / bins), at least 1, rounded up to `align`, in exact rational arithmetic.

    A float counts as the decimal it prints as: 4.05 is 81/20. None asks for the no-drop bound: T * min(K, e) rows for
    a rank, T for an expert, as a token's experts differ. `per="expert"` is the form of GShard (Lepikhin et al. 2020).

    Raises ValueError on a factor that is not finite and positive, an unknown `per` or `priority`, an `align` below 1,
    and experts that do not divide over the ranks.
    """
    check_capacity_factor(factor, per, n_experts, n_ranks, align)
    check_priority(priority)
    n_bins = n_ranks if per == "rank" else n_experts
    if factor is None:
        rows = n_tokens * (min(top_k, n_experts // n_ranks) if per == "rank" else 1)
    else:
        rows = math.ceil(Fraction(str(factor)) * n_tokens * top_k / n_bins)
    return Capacity(n_bins, -(-max(rows, 1) // align) * align, priority)


class Grouped(NamedTuple):
    x_BCD: Float[Array, "B C D"]
    slot_TK: Integer[Array, "T K"]  # the row, counted over bins, of assignment (t, k); B*C where it was dropped
    assignment_BC: Integer[Array, "B C"]  # the assignment a = t*K + k that each row holds; T*K where it is padding
    kept_E: Integer[Array, " E"]  # assignments kept, per expert


def group_by_expert(
    x_TD: Float[Array, "T D"],
    expert_id_TK: Integer[Array, "T K"],
    score_TK: Float[Array, "T K"],
    counts_E: Integer[Array, " E"],
    capacity: Capacity,
) -> Grouped:
    """Copy each token once per chosen expert, sorted by expert, ties by assignment, into bins of C rows.

        tokens  t0 -> experts 2,0      C = 2, a bin per rank, e = 2
                t1 -> experts 0,1      rank 0: e0 t0 | e0 t1   (e1 t1 dropped)      rank 1: e2 t0 | padding

    Padding is zero, and only here does anything drop. An id out of range, which a traced function cannot refuse,
    is dropped too.

    Raises ValueError when the capacity holds no rows, does not fit the experts, or its priority is unknown.
    """
    check_capacity(capacity.n_bins, capacity.rows, capacity.priority, counts_E.shape[0])
    (T, K), (E,), (B, C, _) = expert_id_TK.shape, counts_E.shape, capacity
    N = T * K
    expert_N = expert_id_TK.reshape(-1)
    expert_N = jnp.where((expert_N >= 0) & (expert_N < E), expert_N, E)
    keep_N = keep_within_capacity(expert_N, score_TK.reshape(-1), counts_E, K, capacity)
    kept_E = (keep_N[:, None] & (expert_N[:, None] == jnp.arange(E))).sum(axis=0)
    kept_B = kept_E.reshape(B, -1).sum(axis=1)

    # Dropped ones last: the kept ones of a bin are then contiguous, and follow those of the bins before it.
    order_N, place_N = sort_by_key(jnp.where(keep_N, expert_N, E), E)
    start_B = exclusive_cumsum(kept_B)
    row_C = jnp.arange(C)
    assignment_BC = jnp.where(row_C < kept_B[:, None], rows_or_zero(order_N, start_B[:, None] + row_C), N)
    shift_B = jnp.arange(B) * C - start_B
    slot_N = jnp.where(keep_N, place_N + rows_or_zero(shift_B, expert_N // (E // B)), B * C)
    slot_TK = slot_N.reshape(T, K)
    return Grouped(expand_rows(x_TD, slot_TK, assignment_BC), slot_TK, assignment_BC, kept_E)


def keep_within_capacity(
    expert_N: Integer[Array, " N"],
    score_N: Float[Array, " N"],
    counts_E: Integer[Array, " E"],
    top_k: int,
    capacity: Capacity,
) -> Bool[Array, " N"]:
    """Whether each assignment is among the first C of its bin, by `priority`: token, choice or score.

    token: lower assignment first. choice: all first choices before all second ones. score: higher score first.
    Ties go to the lower assignment.
    """
    (N,), (E,), (B, C, priority) = expert_N.shape, counts_E.shape, capacity
    bin_N = expert_N // (E // B)
    if priority == "token":
        _, place_N = sort_by_key(bin_N, B)
    else:
        key_N = jnp.arange(N) % top_k if priority == "choice" else -jax.lax.stop_gradient(score_N)
        place_N = invert(jnp.lexsort((key_N, bin_N)), N)
    start_B = exclusive_cumsum(counts_E.reshape(B, -1).sum(axis=1))
    return (place_N < rows_or_zero(start_B, bin_N) + C) & (bin_N < B)


def combine(
    y_BCD: Float[Array, "B C D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    assignment_BC: Integer[Array, "B C"],
) -> Float[Array, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once.

    A dropped assignment contributes zero, and its score's gradient is zero.
    """
    return weighted_sum(y_BCD, score_TK, slot_TK, assignment_BC)


@jax.custom_vjp
def expand_rows(
    x_TD: Float[Array, "T D"], slot_TK: Integer[Array, "T K"], assignment_BC: Integer[Array, "B C"]
) -> Float[Array, "B C D"]:
    """Row r is the token of assignment r, padding is zero. Backward, a token gathers its K rows: no scatter-add."""
    if kernels.use_kernels(x_TD):
        x_SD = kernels.expand_rows(x_TD, slot_TK, assignment_BC.reshape(-1))
        return x_SD.reshape(*assignment_BC.shape, -1)
    return rows_or_zero(x_TD, assignment_BC // slot_TK.shape[1])


def _expand_rows_forward(x_TD, slot_TK, assignment_BC):
    return expand_rows(x_TD, slot_TK, assignment_BC), slot_TK


def _expand_rows_backward(slot_TK, dx_BCD):
    wide = np.promote_types(dx_BCD.dtype, np.float32)
    dx_SD = dx_BCD.reshape(-1, dx_BCD.shape[-1])
    if kernels.use_kernels(dx_SD):
        return kernels.sum_rows(dx_SD, slot_TK), None, None
    dx_TD = jnp.zeros((slot_TK.shape[0], dx_BCD.shape[-1]), wide)
    for slot_T in slot_TK.T:
        dx_TD = dx_TD + rows_or_zero(dx_SD, slot_T).astype(wide)
    return dx_TD.astype(dx_BCD.dtype), None, None


expand_rows.defvjp(_expand_rows_forward, _expand_rows_backward)


@jax.custom_vjp
def weighted_sum(
    y_BCD: Float[Array, "B C D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    assignment_BC: Integer[Array, "B C"],  # noqa: ARG001  for backward
) -> Float[Array, "T D"]:
    """A token's K rows, weighted and summed in order of k. Backward, a row gathers its token: no scatter-add."""
    wide = np.promote_types(y_BCD.dtype, np.float32)
    y_SD = y_BCD.reshape(-1, y_BCD.shape[-1])
    if kernels.use_kernels(y_SD):
        return kernels.sum_rows(y_SD, slot_TK, score_TK)
    out_TD = jnp.zeros((slot_TK.shape[0], y_BCD.shape[-1]), wide)
    for score_T, slot_T in zip(score_TK.T, slot_TK.T, strict=True):
        out_TD = out_TD + score_T.astype(wide)[:, None] * rows_or_zero(y_SD, slot_T).astype(wide)
    return out_TD.astype(y_BCD.dtype)


def _weighted_sum_forward(y_BCD, score_TK, slot_TK, assignment_BC):
    return weighted_sum(y_BCD, score_TK, slot_TK, assignment_BC), (y_BCD, score_TK, slot_TK, assignment_BC)


def _weighted_sum_backward(saved, dout_TD):
    y_BCD, score_TK, slot_TK, assignment_BC = saved
    wide = np.promote_types(y_BCD.dtype, np.float32)
    y_SD = y_BCD.reshape(-1, y_BCD.shape[-1])
    if kernels.use_kernels(y_SD):
        dy_SD, dscore_TK = kernels.weighted_sum_backward(dout_TD, y_SD, score_TK, slot_TK, assignment_BC.reshape(-1))
        return dy_SD.reshape(y_BCD.shape), dscore_TK, None, None
    score_BC = rows_or_zero(score_TK.reshape(-1), assignment_BC).astype(wide)
    dy_BCD = score_BC[..., None] * rows_or_zero(dout_TD, assignment_BC // slot_TK.shape[1]).astype(wide)
    dscore_TK = [(dout_TD.astype(wide) * rows_or_zero(y_SD, slot_T).astype(wide)).sum(axis=1) for slot_T in slot_TK.T]
    return dy_BCD.astype(y_BCD.dtype), jnp.stack(dscore_TK, axis=1).astype(score_TK.dtype), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
