"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels
from torch_impl.layout import exclusive_cumsum
from torch_impl.static.checks import check_bins


class ExpertMajor(NamedTuple):
    x_SD: Float[Tensor, "*S D"]  # S = B*C rows, or for expert bins [e, P*C] rows
    source_S: Integer[Tensor, "*S"]  # the rank-major row that each expert-major row is; B*C where it is padding
    target_BC: Integer[Tensor, "B C"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(x_BCD: Float[Tensor, "B C D"], counts_Pe: Integer[Tensor, "P e"]) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank bins     p0: e0 e0 e1 __ | p1: e0 e1 __ __      expert-major   e0: p0 p0 p1 | e1: p0 p1 | __ __ __
        expert bins   p0e0: a __ | p0e1: b c | p1e0: d __ | p1e1: __ __     e0: a __ d __ | e1: b c __ __

    Padding comes out as zero, whatever it held when it came in.

    Raises ValueError when there are neither as many bins as ranks nor as experts.
    """
    (B, C, _), (P, e) = x_BCD.shape, counts_Pe.shape
    check_bins(B, P, P * e)
    source_S = rank_bins_source(counts_Pe, C) if B == P else expert_bins_source(counts_Pe, C)
    target_BC = invert(source_S.reshape(-1), B * C).reshape(B, C)
    return ExpertMajor(permute_rows(x_BCD, source_S, target_BC), source_S, target_BC)


def to_rank_major(
    y_SD: Float[Tensor, "*S D"], source_S: Integer[Tensor, "*S"], target_BC: Integer[Tensor, "B C"]
) -> Float[Tensor, "B C D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_SD, target_BC, source_S)


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
) -> Integer[Tensor, " R"]:
    """For each expert-major row, where it comes from, if segment (p, j) is counts_Pe[p, j] rows from start_Pe[p, j] on.

    A segment's rows all shift by the same distance, so: find each row's segment, by how many end before it, and add
    the shift to the row number. `repeat_interleave` would write past the end of its output if ever the counts were
    more than the rows. Rows past the last come from `output_size`, past the end.
    """
    counts_eP = counts_Pe.T
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    row_R = torch.arange(output_size, device=counts_Pe.device)
    ends = (start_eP + counts_eP).reshape(-1)
    segment_R = torch.searchsorted(ends, row_R, right=True)
    shift_R = rows_or_zero((start_Pe.T - start_eP).reshape(-1), segment_R)
    return torch.where(row_R < counts_Pe.sum(), shift_R + row_R, output_size)


def permute_rows(
    x_SD: Float[Tensor, "*S D"], source_S: Integer[Tensor, "*O"], target_S: Integer[Tensor, "*S"]
) -> Float[Tensor, "*O D"]:
    """Row r is x[source[r]], padding is zero. Backward gathers by `target`, the inverse: no scatter-add."""
    return _PermuteRows.apply(x_SD, source_S, target_S)  # type: ignore[no-any-return]


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, source_S, target_S):
        ctx.save_for_backward(target_S)
        x_SD = x_SD.reshape(-1, x_SD.shape[-1])
        return kernels.gather_rows(x_SD, source_S) if kernels.use_kernels(x_SD) else rows_or_zero(x_SD, source_S)

    @staticmethod
    def backward(ctx, dy_SD):  # type: ignore[override]
        (target_S,) = ctx.saved_tensors
        dy_SD = dy_SD.reshape(-1, dy_SD.shape[-1])
        dx_SD = kernels.gather_rows(dy_SD, target_S) if kernels.use_kernels(dy_SD) else rows_or_zero(dy_SD, target_S)
        return dx_SD, None, None


def rows_or_zero(x: Tensor, index: Integer[Tensor, "..."]) -> Tensor:
    """Rows of x; zero where the index is past the end."""
    if x.shape[0] == 0:  # nothing to gather from
        return x.new_zeros(*index.shape, *x.shape[1:])
    inside = (index < x.shape[0]).reshape(index.shape + (1,) * (x.ndim - 1))
    return torch.where(inside, x[index.clamp(max=x.shape[0] - 1)], 0)


def invert(index_R: Integer[Tensor, " R"], size: int) -> Integer[Tensor, " size"]:
    """The inverse of a permutation with gaps: invert(index)[index[r]] = r, and R where no index points."""
    row_R = torch.arange(index_R.shape[0], device=index_R.device)
    inverse = row_R.new_full((size + 1,), index_R.shape[0])  # all that points past the end meets in one place more
    return inverse.scatter(0, index_R.clamp(max=size), row_R)[:size]
