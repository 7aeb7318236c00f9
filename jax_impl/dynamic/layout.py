"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.dynamic.rows import expert_major_rows
from jax_impl.rows import permute_rows


class ExpertMajor(NamedTuple):
    x_RD: Float[Array, "R D"]
    source_R: Integer[
        Array, " R"
    ]  # the rank-major row that each expert-major row comes from; R past the rows that arrived
    target_R: Integer[Array, " R"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(x_RD: Float[Array, "R D"], counts_Pe: Integer[Array, "P e"]) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank-major    p0: e0 e0 e1 | p1: e0 e1 e1 | __ __        expert-major   e0: p0 p0 p1 | e1: p0 p1 p1 | __ __

    The unused end of the buffer comes out as zero, whatever it held when it came in.
    """
    source_R, target_R = expert_major_rows(counts_Pe, x_RD.shape[0])
    return ExpertMajor(permute_rows(x_RD, source_R, target_R), source_R, target_R)


def to_rank_major(
    y_RD: Float[Array, "R D"], source_R: Integer[Array, " R"], target_R: Integer[Array, " R"]
) -> Float[Array, "R D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_RD, target_R, source_R)
