"""How rows move, and where to, where some rows are padding: plain, or through a kernel on a GPU.

Forward and backward are gathers. A gradient that several rows share is summed where it is read, in a fixed order.
M stands for any number of rows, along one axis or several, and O for the number of output rows where it differs.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels
from torch_impl.rows import exclusive_cumsum


def expand_rows(
    x_TD: Float[Tensor, "T D"], slot_TK: Integer[Tensor, "T K"], assignment_M: Integer[Tensor, "*M"]
) -> Float[Tensor, "*M D"]:
    """Row r is the token of assignment r, padding is zero. Backward, a token gathers its K rows: no scatter-add."""
    return _ExpandRows.apply(x_TD, slot_TK, assignment_M)  # type: ignore[no-any-return]


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_TK, assignment_M):
        ctx.save_for_backward(slot_TK)
        if kernels.use_kernels(x_TD):
            x_MD = kernels.expand_rows(x_TD, slot_TK, assignment_M.reshape(-1))
            return x_MD.reshape(*assignment_M.shape, x_TD.shape[1])
        return take_or_zero(x_TD, assignment_M // slot_TK.shape[1])

    @staticmethod
    def backward(ctx, dx_MD):  # type: ignore[override]
        (slot_TK,) = ctx.saved_tensors
        return sum_rows(dx_MD.reshape(-1, dx_MD.shape[-1]), slot_TK), None, None


def sum_rows(
    y_MD: Float[Tensor, "M D"], slot_TK: Integer[Tensor, "T K"], score_TK: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "T D"]:
    """A token's K rows, times their scores if there are any, summed in float32 in order of k, rounded once.

    A slot past the end counts as zero.
    """
    if kernels.use_kernels(y_MD):
        return kernels.sum_rows(y_MD, slot_TK, score_TK)
    return add_rows(y_MD, slot_TK, score_TK).to(y_MD.dtype)


def add_rows(
    y_MD: Float[Tensor, "M D"], slot_TK: Integer[Tensor, "T K"], score_TK: Float[Tensor, "T K"] | None
) -> Float[Tensor, "T D"]:
    """The plain version of `sum_rows`, before it is rounded."""
    accum_dtype = torch.promote_types(y_MD.dtype, torch.float32)
    out_TD = torch.zeros(slot_TK.shape[0], y_MD.shape[1], dtype=accum_dtype, device=y_MD.device)
    for k, slot_T in enumerate(slot_TK.unbind(dim=1)):
        row_TD = take_or_zero(y_MD, slot_T).to(accum_dtype)
        out_TD = out_TD + (row_TD if score_TK is None else score_TK[:, k, None].to(accum_dtype) * row_TD)
    return out_TD


def score_gradient(
    dout_TD: Float[Tensor, "T D"],
    y_MD: Float[Tensor, "M D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
) -> Float[Tensor, "T K"]:
    """dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d], in float32; zero for a slot past the end."""
    if kernels.use_kernels(y_MD):
        return kernels.score_gradient(dout_TD, y_MD, score_TK, slot_TK)
    accum_dtype = torch.promote_types(y_MD.dtype, torch.float32)
    dscore_TK = [
        (dout_TD.to(accum_dtype) * take_or_zero(y_MD, slot_T).to(accum_dtype)).sum(dim=1)
        for slot_T in slot_TK.unbind(dim=1)
    ]
    return torch.stack(dscore_TK, dim=1).to(score_TK.dtype)


def weighted_sum(
    y_MD: Float[Tensor, "*M D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_M: Integer[Tensor, "*M"],
) -> Float[Tensor, "T D"]:
    """A token's K rows, weighted and summed in order of k. Backward, a row gathers its token: no scatter-add."""
    # Rounded outside the Function: PyTorch 2.11 loses the gradient when it compiles one that ends in a cast of dtype.
    return _WeightedSum.apply(y_MD, score_TK, slot_TK, assignment_M).to(y_MD.dtype)  # type: ignore[no-any-return]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD, score_TK, slot_TK, assignment_M):
        ctx.save_for_backward(y_MD, score_TK, slot_TK, assignment_M)
        y_MD = y_MD.reshape(-1, y_MD.shape[-1])
        if kernels.use_kernels(y_MD):
            return kernels.sum_rows(y_MD, slot_TK, score_TK)
        return add_rows(y_MD, slot_TK, score_TK)

    @staticmethod
    def backward(ctx, dout_TD):  # type: ignore[override]
        y_MD, score_TK, slot_TK, assignment_M = ctx.saved_tensors
        shape, y_MD = y_MD.shape, y_MD.reshape(-1, y_MD.shape[-1])
        if kernels.use_kernels(y_MD):
            of_row_M = assignment_M.reshape(-1)
            dy_MD, dscore_TK = kernels.weighted_sum_backward(dout_TD, y_MD, score_TK, slot_TK, of_row_M)
            return dy_MD.reshape(shape), dscore_TK, None, None
        accum_dtype = torch.promote_types(y_MD.dtype, torch.float32)
        score_M = take_or_zero(score_TK.reshape(-1), assignment_M).to(accum_dtype)
        dy_MD = score_M[..., None] * take_or_zero(dout_TD, assignment_M // slot_TK.shape[1]).to(accum_dtype)
        return dy_MD.to(y_MD.dtype), score_gradient(dout_TD, y_MD, score_TK, slot_TK), None, None


def permute_rows(
    x_MD: Float[Tensor, "*M D"], source_O: Integer[Tensor, "*O"], target_M: Integer[Tensor, "*M"]
) -> Float[Tensor, "*O D"]:
    """Row r is x[source[r]], padding is zero. Backward gathers by `target`, the inverse: no scatter-add."""
    return _PermuteRows.apply(x_MD, source_O, target_M)  # type: ignore[no-any-return]


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, source_O, target_M):
        ctx.save_for_backward(target_M)
        x_MD = x_MD.reshape(-1, x_MD.shape[-1])
        return kernels.gather_rows(x_MD, source_O) if kernels.use_kernels(x_MD) else take_or_zero(x_MD, source_O)

    @staticmethod
    def backward(ctx, dy_OD):  # type: ignore[override]
        (target_M,) = ctx.saved_tensors
        dy_OD = dy_OD.reshape(-1, dy_OD.shape[-1])
        dx_MD = kernels.gather_rows(dy_OD, target_M) if kernels.use_kernels(dy_OD) else take_or_zero(dy_OD, target_M)
        return dx_MD, None, None


def expert_major_rows(
    counts_Pe: Integer[Tensor, "P e"], n_bins: int, capacity: int
) -> tuple[Integer[Tensor, "*S"], Integer[Tensor, "B C"]]:
    """For each expert-major row the rank-major row it comes from, and the inverse; past the end where it is padding.

    Shapes: source_S, target_BC.
    """
    P, _ = counts_Pe.shape
    source_S = rank_bins_source(counts_Pe, capacity) if n_bins == P else expert_bins_source(counts_Pe, capacity)
    return source_S, inverse_permutation(source_S.reshape(-1)).reshape(n_bins, capacity)


def rank_bins_source(counts_Pe: Integer[Tensor, "P e"], capacity: int) -> Integer[Tensor, " S"]:
    """For each expert-major row, the rank-major row it comes from; P*C, past the end, for the padding, which is last.

    Rows move in P*e segments, those of rank p from p*C on.
    """
    S = counts_Pe.shape[0] * capacity
    start_Pe = torch.arange(0, S, capacity, device=counts_Pe.device)[:, None] + counts_Pe.cumsum(dim=1) - counts_Pe
    return segments_source(start_Pe, counts_Pe, S)


def expert_bins_source(counts_Pe: Integer[Tensor, "P e"], capacity: int) -> Integer[Tensor, "e PC"]:
    """The same for expert bins, where whole bins move: (source rank, expert) to (expert, source rank)."""
    P, e = counts_Pe.shape
    row_C = torch.arange(capacity, device=counts_Pe.device)
    bin_eP = torch.arange(P * e, device=counts_Pe.device).reshape(P, e).T
    row_ePC = bin_eP[:, :, None] * capacity + row_C
    return torch.where(row_C < counts_Pe.T[:, :, None], row_ePC, P * e * capacity).reshape(e, P * capacity)


def segments_source(
    start_Pe: Integer[Tensor, "P e"], counts_Pe: Integer[Tensor, "P e"], output_size: int
) -> Integer[Tensor, " O"]:
    """For each expert-major row, where it comes from, if segment (p, j) is counts_Pe[p, j] rows from start_Pe[p, j] on.

    A segment's rows all shift by the same distance. A row's segment is the number of segments that end before it,
    and that segment's shift is added to the row number. `repeat_interleave` would write past the end of its output if
    the counts were ever more than the rows. Rows past the last segment get `output_size` as their source, past the end.
    """
    counts_eP = counts_Pe.T
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    row_O = torch.arange(output_size, device=counts_Pe.device)
    ends = (start_eP + counts_eP).reshape(-1)
    segment_O = torch.searchsorted(ends, row_O, right=True)
    shift_O = take_or_zero((start_Pe.T - start_eP).reshape(-1), segment_O)
    return torch.where(row_O < counts_Pe.sum(), shift_O + row_O, output_size)


def take_or_zero(x: Tensor, index: Integer[Tensor, "..."]) -> Tensor:
    """Rows of x; zero where the index is past the end."""
    if x.shape[0] == 0:  # nothing to gather from
        return x.new_zeros(*index.shape, *x.shape[1:])
    inside = (index < x.shape[0]).reshape(index.shape + (1,) * (x.ndim - 1))
    return torch.where(inside, x[index.clamp(max=x.shape[0] - 1)], 0)


def inverse_permutation(index_O: Integer[Tensor, " O"]) -> Integer[Tensor, " O"]:
    """The inverse of a permutation with gaps: inverse_permutation(index)[index[r]] = r, and O where no index points."""
    (n_rows,) = index_O.shape
    row_O = torch.arange(n_rows, device=index_O.device)
    inverse = row_O.new_full((n_rows + 1,), n_rows)  # one extra place takes all indices past the end
    return inverse.scatter(0, index_O.clamp(max=n_rows), row_O)[:n_rows]
