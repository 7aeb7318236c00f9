"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels
from torch_impl.checks import check_output_size


class ExpertMajor(NamedTuple):
    x_RD: Float[Tensor, "R D"]
    source_R: Integer[Tensor, " R"]  # the rank-major row that each expert-major row is
    target_R: Integer[Tensor, " R"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(
    x_RD: Float[Tensor, "R D"], counts_Pe: Integer[Tensor, "P e"], output_size: int | None = None
) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank-major    p0: e0 e0 e1 | p1: e0 e1 e1        expert-major   e0: p0 p0 p1 | e1: p0 p1 p1

    `output_size` is R as a host integer (default: the rows received). Without it `repeat_interleave` would have to
    ask the device for the sum of its counts, a second synchronisation.

    Raises ValueError when `output_size` is not the number of rows received.
    """
    output_size = x_RD.shape[0] if output_size is None else output_size
    check_output_size(output_size, x_RD.shape[0])
    if kernels.use_kernels(counts_Pe):
        source_R, target_R = kernels.expert_major_rows(counts_Pe, output_size)
    else:
        source_R = expert_major_source(counts_Pe, output_size)
        target_R = invert(source_R)
    return ExpertMajor(permute_rows(x_RD, source_R, target_R), source_R, target_R)


def to_rank_major(
    y_RD: Float[Tensor, "R D"], source_R: Integer[Tensor, " R"], target_R: Integer[Tensor, " R"]
) -> Float[Tensor, "R D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_RD, target_R, source_R)


def expert_major_source(counts_Pe: Integer[Tensor, "P e"], output_size: int) -> Integer[Tensor, " R"]:
    """For each expert-major row, the rank-major row it comes from.

    Rows move in P*e segments. A segment's rows all shift by the same distance, so: repeat each segment's shift over
    its rows, and add the row number.
    """
    counts_eP = counts_Pe.T
    start_Pe = exclusive_cumsum(counts_Pe.reshape(-1)).reshape(counts_Pe.shape)
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    shift_eP = start_Pe.T - start_eP
    shift_R = torch.repeat_interleave(shift_eP.reshape(-1), counts_eP.reshape(-1), output_size=output_size)
    return shift_R + torch.arange(output_size, device=counts_Pe.device)


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


def invert(index_R: Integer[Tensor, " R"]) -> Integer[Tensor, " R"]:
    """The inverse permutation: invert(index)[index[r]] = r."""
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
    return order_N, invert(order_N)


def exclusive_cumsum(counts: Integer[Tensor, " n"]) -> Integer[Tensor, " n"]:
    """Where each segment starts: [2, 0, 3] -> [0, 2, 2]."""
    return counts.cumsum(dim=0) - counts
