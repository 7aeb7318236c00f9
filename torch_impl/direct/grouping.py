"""Stages 2 and 9: the order of assignments, sorted by expert; and their rows, weighted by score."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.direct.checks import check_first_gradient, check_not_reused
from torch_impl.direct.exchange import Buffers, put_tokens
from torch_impl.rows import sort_by_key
from torch_impl.static.rows import score_gradient, sum_rows


class Grouped(NamedTuple):
    slot_TK: Integer[Tensor, "T K"]  # the place of assignment (t, k) in the order by expert; N where it is sent nowhere
    kept_E: Integer[Tensor, " E"]  # assignments sent, per expert: all but ids out of range or repeated


def group_by_expert(expert_id_TK: Integer[Tensor, "T K"], counts_E: Integer[Tensor, " E"]) -> Grouped:
    """Sort assignments by expert, ties by assignment. No row moves yet; its row will return to its slot.

        tokens  t0 -> experts 2,0      slots  e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    An id that is out of range, or repeated within a token, is sent nowhere, because refusing it would mean waiting for
    its value. So no rank sends more than T * min(K, e) rows to another, and nothing overflows, whatever the ids.
    """
    (T, K), (E,) = expert_id_TK.shape, counts_E.shape
    again_TK = (expert_id_TK[:, :, None] == expert_id_TK[:, None, :]).tril(-1).any(dim=2)
    valid_TK = (expert_id_TK >= 0) & (expert_id_TK < E) & ~again_TK
    expert_N = torch.where(valid_TK, expert_id_TK, E).reshape(-1)
    order_N, slot_N = sort_by_key(expert_N, E)
    slot_TK = torch.where(valid_TK, slot_N.reshape(T, K), T * K)
    # Comparing each id with each expert would take longer than the sort.
    expert_E = torch.arange(E, dtype=expert_N.dtype, device=expert_N.device)
    end_E = torch.searchsorted(expert_N[order_N], expert_E, right=True)
    return Grouped(slot_TK, end_E.diff(prepend=end_E.new_zeros(1)))


def combine(
    y_RD: Float[Tensor, "R D"],
    returned_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    place_N: Integer[Tensor, " N"],
    buffers: Buffers,
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * returned[slot[t,k]]), in float32, rounded once.

    Backward, dout is sent as the tokens were: the row of y that belongs to assignment (t, k) gets the gradient
    round(score[t,k] * dout[t]), and the rows that belong to none get anything. The gradient of y lies in the buffers.

    Backward raises RuntimeError if another forward pass has overwritten what returned.
    """
    return _Combine.apply(y_RD, returned_ND, score_TK, slot_TK, place_N, buffers)  # type: ignore[no-any-return]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, returned_ND, score_TK, slot_TK, place_N, buffers):  # noqa: ARG004  y_RD gets a gradient
        # Saved like a tensor, not set on ctx: under activation checkpointing, the recomputed pass then saves its own.
        ctx.save_for_backward(returned_ND, score_TK, slot_TK, place_N, buffers.forwards.clone())
        ctx.buffers = buffers
        return sum_rows(returned_ND, slot_TK, score_TK)

    @staticmethod
    def backward(ctx, dout_TD):  # type: ignore[override]
        returned_ND, score_TK, slot_TK, place_N, forwards = ctx.saved_tensors
        buffers, dy_RD = ctx.buffers, None
        check_first_gradient()
        check_not_reused(forwards, buffers.forwards)
        if ctx.needs_input_grad[0]:
            put_tokens(dout_TD, slot_TK, place_N, buffers.dy_RD, buffers, score_TK)
            dy_RD = buffers.dy_RD.own_OD.data
        return dy_RD, None, score_gradient(dout_TD, returned_ND, score_TK, slot_TK), None, None, None
