"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_bins
from jax_impl.rows import expert_major_rows, permute_rows


class ExpertMajor(NamedTuple):
    x_SD: Float[Array, "*S D"]  # [B*C] rows, or for expert bins [e, P*C]
    source_S: Integer[Array, "*S"]  # the rank-major row that each expert-major row comes from; B*C where it is padding
    target_BC: Integer[Array, "B C"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(x_BCD: Float[Array, "B C D"], counts_Pe: Integer[Array, "P e"]) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank bins     p0: e0 e0 e1 __ | p1: e0 e1 __ __      expert-major   e0: p0 p0 p1 | e1: p0 p1 | __ __ __
        expert bins   p0e0: a __ | p0e1: b c | p1e0: d __ | p1e1: __ __     e0: a __ d __ | e1: b c __ __

    Padding comes out as zero, whatever it held when it came in.

    Raises ValueError unless there are as many bins as ranks, or as experts.
    """
    (B, C, _), (P, e) = x_BCD.shape, counts_Pe.shape
    check_bins(B, P, P * e)
    source_S, target_BC = expert_major_rows(counts_Pe, B, C)
    return ExpertMajor(permute_rows(x_BCD, source_S, target_BC), source_S, target_BC)


def to_rank_major(
    y_SD: Float[Array, "*S D"], source_S: Integer[Array, "*S"], target_BC: Integer[Array, "B C"]
) -> Float[Array, "B C D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_SD, target_BC, source_S)
