"""How rows move, and where to: plain, or through a kernel on a GPU. The stages' files say which rows move and why.

Forward and backward are gathers. A gradient that several rows share is summed where it is read, in a fixed order.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels


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
        accum_dtype = torch.promote_types(dx_ND.dtype, torch.float32)
        dx_TD = torch.zeros(slot_TK.shape[0], dx_ND.shape[1], dtype=accum_dtype, device=dx_ND.device)
        for slot_T in slot_TK.unbind(dim=1):
            dx_TD = dx_TD + dx_ND[slot_T].to(accum_dtype)
        return dx_TD.to(dx_ND.dtype), None, None


def weighted_sum(
    y_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_N: Integer[Tensor, " N"],
) -> Float[Tensor, "T D"]:
    """A token's K rows, weighted and summed in order of k. Backward, a row gathers its token: no scatter-add."""
    # Rounded outside the Function: PyTorch 2.11 loses the gradient when it compiles one that ends in a cast of dtype.
    return _WeightedSum.apply(y_ND, score_TK, slot_TK, assignment_N).to(y_ND.dtype)  # type: ignore[no-any-return]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, score_TK, slot_TK, assignment_N):
        ctx.save_for_backward(y_ND, score_TK, slot_TK, assignment_N)
        if kernels.use_kernels(y_ND):
            return kernels.sum_rows(y_ND, slot_TK, score_TK)
        accum_dtype = torch.promote_types(y_ND.dtype, torch.float32)
        out_TD = torch.zeros(slot_TK.shape[0], y_ND.shape[1], dtype=accum_dtype, device=y_ND.device)
        for score_T, slot_T in zip(score_TK.unbind(dim=1), slot_TK.unbind(dim=1), strict=True):
            out_TD = out_TD + score_T.to(accum_dtype)[:, None] * y_ND[slot_T].to(accum_dtype)
        return out_TD

    @staticmethod
    def backward(ctx, dout_TD):  # type: ignore[override]
        y_ND, score_TK, slot_TK, assignment_N = ctx.saved_tensors
        if kernels.use_kernels(y_ND):
            return *kernels.weighted_sum_backward(dout_TD, y_ND, score_TK, slot_TK), None, None
        accum_dtype = torch.promote_types(y_ND.dtype, torch.float32)
        score_N = score_TK.reshape(-1)[assignment_N].to(accum_dtype)
        dy_ND = score_N[:, None] * dout_TD[assignment_N // slot_TK.shape[1]].to(accum_dtype)
        dscore_TK = [
            (dout_TD.to(accum_dtype) * y_ND[slot_T].to(accum_dtype)).sum(dim=1) for slot_T in slot_TK.unbind(dim=1)
        ]
        return dy_ND.to(y_ND.dtype), torch.stack(dscore_TK, dim=1).to(score_TK.dtype), None, None


def permute_rows(
    x_RD: Float[Tensor, "R D"], source_R: Integer[Tensor, " R"], target_R: Integer[Tensor, " R"]
) -> Float[Tensor, "R D"]:
    """Row r is x[source[r]]. Backward gathers by `target`, the inverse: no scatter-add."""
    return _PermuteRows.apply(x_RD, source_R, target_R)  # type: ignore[no-any-return]


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, source_R, target_R):
        ctx.save_for_backward(target_R)
        return kernels.gather_rows(x_RD, source_R) if kernels.use_kernels(x_RD) else x_RD[source_R]

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[override]
        (target_R,) = ctx.saved_tensors
        dx_RD = kernels.gather_rows(dy_RD, target_R) if kernels.use_kernels(dy_RD) else dy_RD[target_R]
        return dx_RD, None, None


def expert_major_rows(
    counts_Pe: Integer[Tensor, "P e"], output_size: int
) -> tuple[Integer[Tensor, " R"], Integer[Tensor, " R"]]:
    """For each expert-major row the rank-major row it comes from, and the inverse.

    Shapes: source_R, target_R.
    """
    if kernels.use_kernels(counts_Pe):
        return kernels.expert_major_rows(counts_Pe, output_size)
    source_R = expert_major_source(counts_Pe, output_size)
    return source_R, inverse_permutation(source_R)


def expert_major_source(counts_Pe: Integer[Tensor, "P e"], output_size: int) -> Integer[Tensor, " R"]:
    """For each expert-major row, the rank-major row it comes from.

    Rows move in P*e segments. A segment's rows all shift by the same distance. So each segment's shift is repeated
    over its rows, and the row number is added.
    """
    counts_eP = counts_Pe.T
    start_Pe = exclusive_cumsum(counts_Pe.reshape(-1)).reshape(counts_Pe.shape)
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    shift_eP = start_Pe.T - start_eP
    shift_R = torch.repeat_interleave(shift_eP.reshape(-1), counts_eP.reshape(-1), output_size=output_size)
    return shift_R + torch.arange(output_size, device=counts_Pe.device)


def inverse_permutation(index_R: Integer[Tensor, " R"]) -> Integer[Tensor, " R"]:
    """The inverse permutation: inverse_permutation(index)[index[r]] = r."""
    row_R = torch.arange(index_R.shape[0], device=index_R.device)
    return torch.empty_like(row_R).scatter(0, index_R, row_R)


def sort_by_key(key_N: Integer[Tensor, " N"], n_keys: int) -> tuple[Integer[Tensor, " N"], Integer[Tensor, " N"]]:
    """Stable sort of keys 0..n_keys-1, and its inverse; the key n_keys means no key, and goes last.

        keys 2 0 2 1     order 1 3 0 2     place 2 0 3 1

    Shapes: order_N, place_N.
    """
    if kernels.use_kernels(key_N):
        return kernels.sort_by_key(key_N, n_keys)
    order_N = key_N.argsort(stable=True)
    return order_N, inverse_permutation(order_N)


def exclusive_cumsum(counts: Integer[Tensor, " n"]) -> Integer[Tensor, " n"]:
    """Where each segment starts: [2, 0, 3] -> [0, 2, 2]."""
    return counts.cumsum(dim=0) - counts
