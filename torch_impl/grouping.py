"""Stages 2 and 9: one row per assignment, sorted by expert; and back, weighted by score."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels
from torch_impl.layout import sort_by_key


class Grouped(NamedTuple):
    x_ND: Float[Tensor, "N D"]
    slot_TK: Integer[Tensor, "T K"]  # the row that holds assignment (t, k)
    assignment_N: Integer[Tensor, " N"]  # the assignment a = t*K + k that each row holds


def group_by_expert(
    x_TD: Float[Tensor, "T D"], expert_id_TK: Integer[Tensor, "T K"], counts_E: Integer[Tensor, " E"]
) -> Grouped:
    """Copy each token once per chosen expert, sorted by expert, ties by assignment.

        tokens  t0 -> experts 2,0      rows   e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    The rows for one rank are contiguous, because expert g lives on rank g // e.
    """
    assignment_N, slot_N = sort_by_key(expert_id_TK.reshape(-1), counts_E.shape[0])
    slot_TK = slot_N.reshape(expert_id_TK.shape)
    return Grouped(expand_rows(x_TD, slot_TK, assignment_N), slot_TK, assignment_N)


def combine(
    y_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_N: Integer[Tensor, " N"],
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once."""
    return weighted_sum(y_ND, score_TK, slot_TK, assignment_N)


def expand_rows(
    x_TD: Float[Tensor, "T D"], slot_TK: Integer[Tensor, "T K"], assignment_N: Integer[Tensor, " N"]
) -> Float[Tensor, "N D"]:
    """Row r is the token of assignment r. Backward, a token gathers its K rows: no scatter-add."""
    return _ExpandRows.apply(x_TD, slot_TK, assignment_N)  # type: ignore[no-any-return]


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_TK, assignment_N):
        ctx.save_for_backward(slot_TK)
        if kernels.use_kernels(x_TD):
            return kernels.expand_rows(x_TD, slot_TK)
        return x_TD[assignment_N // slot_TK.shape[1]]

    @staticmethod
    def backward(ctx, dx_ND):  # type: ignore[override]
        (slot_TK,) = ctx.saved_tensors
        if kernels.use_kernels(dx_ND):
            return kernels.sum_rows(dx_ND, slot_TK), None, None
        wide = torch.promote_types(dx_ND.dtype, torch.float32)
        dx_TD = torch.zeros(slot_TK.shape[0], dx_ND.shape[1], dtype=wide, device=dx_ND.device)
        for slot_T in slot_TK.unbind(dim=1):
            dx_TD = dx_TD + dx_ND[slot_T].to(wide)
        return dx_TD.to(dx_ND.dtype), None, None


def weighted_sum(
    y_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_N: Integer[Tensor, " N"],
) -> Float[Tensor, "T D"]:
    """A token's K rows, weighted and summed in order of k. Backward, a row gathers its token: no scatter-add."""
    # Rounded here, outside: PyTorch 2.11 compiles a Function that ends in a cast to its own dtype without its gradient.
    return _WeightedSum.apply(y_ND, score_TK, slot_TK, assignment_N).to(y_ND.dtype)  # type: ignore[no-any-return]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, score_TK, slot_TK, assignment_N):
        ctx.save_for_backward(y_ND, score_TK, slot_TK, assignment_N)
        if kernels.use_kernels(y_ND):
            return kernels.sum_rows(y_ND, slot_TK, score_TK)
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        out_TD = torch.zeros(slot_TK.shape[0], y_ND.shape[1], dtype=wide, device=y_ND.device)
        for score_T, slot_T in zip(score_TK.unbind(dim=1), slot_TK.unbind(dim=1), strict=True):
            out_TD = out_TD + score_T.to(wide)[:, None] * y_ND[slot_T].to(wide)
        return out_TD

    @staticmethod
    def backward(ctx, dout_TD):  # type: ignore[override]
        y_ND, score_TK, slot_TK, assignment_N = ctx.saved_tensors
        if kernels.use_kernels(y_ND):
            return *kernels.weighted_sum_backward(dout_TD, y_ND, score_TK, slot_TK), None, None
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        score_N = score_TK.reshape(-1)[assignment_N].to(wide)
        dy_ND = score_N[:, None] * dout_TD[assignment_N // slot_TK.shape[1]].to(wide)
        dscore_TK = [(dout_TD.to(wide) * y_ND[slot_T].to(wide)).sum(dim=1) for slot_T in slot_TK.unbind(dim=1)]
        return dy_ND.to(y_ND.dtype), torch.stack(dscore_TK, dim=1).to(score_TK.dtype), None, None
