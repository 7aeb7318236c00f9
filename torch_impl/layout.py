"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_output_size
from torch_impl.rows import expert_major_rows, permute_rows


class ExpertMajor(NamedTuple):
    x_RD: Float[Tensor, "R D"]
    source_R: Integer[Tensor, " R"]  # the rank-major row that each expert-major row comes from
    target_R: Integer[Tensor, " R"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(
    x_RD: Float[Tensor, "R D"], counts_Pe: Integer[Tensor, "P e"], output_size: int | None = None
) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank-major    p0: e0 e0 e1 | p1: e0 e1 e1        expert-major   e0: p0 p0 p1 | e1: p0 p1 p1

    `output_size` is R as a host integer (default: the rows received). `repeat_interleave` is given it, because it would
    otherwise ask the device for the sum of its counts, a second synchronisation.

    Raises ValueError when `output_size` is not the number of rows received.
    """
    output_size = x_RD.shape[0] if output_size is None else output_size
    check_output_size(output_size, x_RD.shape[0])
    source_R, target_R = expert_major_rows(counts_Pe, output_size)
    return ExpertMajor(permute_rows(x_RD, source_R, target_R), source_R, target_R)


def to_rank_major(
    y_RD: Float[Tensor, "R D"], source_R: Integer[Tensor, " R"], target_R: Integer[Tensor, " R"]
) -> Float[Tensor, "R D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_RD, target_R, source_R)
