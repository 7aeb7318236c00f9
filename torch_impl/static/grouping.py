"""Stages 2 and 9: one row per assignment, sorted by expert, padded to a capacity; and back, weighted by score."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from torch_impl.rows import exclusive_cumsum, sort_by_key
from torch_impl.static.checks import check_capacity, check_capacity_factor, check_priority
from torch_impl.static.rows import expand_rows, inverse_permutation, take_or_zero, weighted_sum


class Capacity(NamedTuple):
    """How many rows a bin holds, and which it keeps first. `n_bins` is P (a bin per rank) or E (a bin per expert)."""

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
    x_BCD: Float[Tensor, "B C D"]
    slot_TK: Integer[Tensor, "T K"]  # the row, counted over bins, of assignment (t, k); B*C where it was dropped
    assignment_BC: Integer[Tensor, "B C"]  # the assignment a = t*K + k that each row holds; T*K where it is padding
    kept_E: Integer[Tensor, " E"]  # assignments kept, per expert


def group_by_expert(
    x_TD: Float[Tensor, "T D"],
    expert_id_TK: Integer[Tensor, "T K"],
    score_TK: Float[Tensor, "T K"],
    counts_E: Integer[Tensor, " E"],
    capacity: Capacity,
) -> Grouped:
    """Copy each token once per chosen expert, sorted by expert, ties by assignment, into bins of C rows.

        tokens  t0 -> experts 2,0      C = 2, a bin per rank, e = 2
                t1 -> experts 0,1      rank 0: e0 t0 | e0 t1   (e1 t1 dropped)      rank 1: e2 t0 | padding

    Padding is zero. Assignments are dropped only here. An id out of range is dropped too, because on a GPU refusing it
    would mean waiting for its value.

    Raises ValueError when the capacity holds no rows, does not fit the experts, or its priority is unknown.
    """
    check_capacity(capacity.n_bins, capacity.rows, capacity.priority, counts_E.shape[0])
    (T, K), (E,), (B, C, _) = expert_id_TK.shape, counts_E.shape, capacity
    N = T * K
    expert_N = expert_id_TK.reshape(-1)
    expert_N = torch.where((expert_N >= 0) & (expert_N < E), expert_N, E)
    keep_N = keep_within_capacity(expert_N, score_TK.reshape(-1), counts_E, K, capacity)
    kept_E = (keep_N[:, None] & (expert_N[:, None] == torch.arange(E, device=x_TD.device))).sum(dim=0)
    kept_B = kept_E.reshape(B, -1).sum(dim=1)

    # Dropped assignments sort last. The kept ones of a bin are then contiguous, and follow those of earlier bins.
    order_N, place_N = sort_by_key(torch.where(keep_N, expert_N, E), E)
    start_B = exclusive_cumsum(kept_B)
    row_C = torch.arange(C, device=x_TD.device)
    assignment_BC = torch.where(row_C < kept_B[:, None], take_or_zero(order_N, start_B[:, None] + row_C), N)
    shift_B = torch.arange(B, device=x_TD.device) * C - start_B
    slot_N = torch.where(keep_N, place_N + take_or_zero(shift_B, expert_N // (E // B)), B * C)
    slot_TK = slot_N.reshape(T, K)
    return Grouped(expand_rows(x_TD, slot_TK, assignment_BC), slot_TK, assignment_BC, kept_E)


def keep_within_capacity(
    expert_N: Integer[Tensor, " N"],
    score_N: Float[Tensor, " N"],
    counts_E: Integer[Tensor, " E"],
    top_k: int,
    capacity: Capacity,
) -> Bool[Tensor, " N"]:
    """Whether each assignment is among the first C of its bin, by `priority`: token, choice or score.

    token: lower assignment first. choice: all first choices before all second ones. score: higher score first.
    Ties go to the lower assignment.
    """
    (N,), (E,), (B, C, priority) = expert_N.shape, counts_E.shape, capacity
    bin_N = expert_N // (E // B)
    if priority == "token":
        _, place_N = sort_by_key(bin_N, B)
    else:
        key_N = torch.arange(N, device=expert_N.device) % top_k if priority == "choice" else -score_N.detach()
        by_key_N = key_N.argsort(stable=True)  # PyTorch has no lexsort
        by_bin_N, _ = sort_by_key(bin_N[by_key_N], B)
        place_N = inverse_permutation(by_key_N[by_bin_N])
    start_B = exclusive_cumsum(counts_E.reshape(B, -1).sum(dim=1))
    return (place_N < take_or_zero(start_B, bin_N) + C) & (bin_N < B)


def combine(
    y_BCD: Float[Tensor, "B C D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_BC: Integer[Tensor, "B C"],
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once.

    A dropped assignment contributes zero, and its score's gradient is zero.
    """
    return weighted_sum(y_BCD, score_TK, slot_TK, assignment_BC)
