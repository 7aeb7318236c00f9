"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.layout import exclusive_cumsum, invert, permute_rows


class ExpertMajor(NamedTuple):
    x_RD: Float[Array, "R D"]
    source_R: Integer[Array, " R"]  # the rank-major row that each expert-major row is; R past the rows that arrived
    target_R: Integer[Array, " R"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(x_RD: Float[Array, "R D"], counts_Pe: Integer[Array, "P e"]) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank-major    p0: e0 e0 e1 | p1: e0 e1 e1 | __ __        expert-major   e0: p0 p0 p1 | e1: p0 p1 p1 | __ __

    What is left of the buffer comes out as zero, whatever it held when it came in.
    """
    source_R = expert_major_source(counts_Pe, x_RD.shape[0])
    target_R = invert(source_R, x_RD.shape[0])
    return ExpertMajor(permute_rows(x_RD, source_R, target_R), source_R, target_R)


def to_rank_major(
    y_RD: Float[Array, "R D"], source_R: Integer[Array, " R"], target_R: Integer[Array, " R"]
) -> Float[Array, "R D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_RD, target_R, source_R)


def expert_major_source(counts_Pe: Integer[Array, "P e"], output_size: int) -> Integer[Array, " R"]:
    """For each expert-major row, the rank-major row it comes from; `output_size`, past the end, for what is left.

    Rows move in P*e segments. A segment's rows all shift by the same distance, so: find each row's segment, by how
    many end before it, and add the shift to the row number.
    """
    counts_eP = counts_Pe.T
    start_Pe = exclusive_cumsum(counts_Pe.reshape(-1)).reshape(counts_Pe.shape)
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    row_R = jnp.arange(output_size)
    segment_R = (row_R[:, None] >= (start_eP + counts_eP).reshape(-1)).sum(axis=1)
    shift_R = (start_Pe.T - start_eP).reshape(-1).at[segment_R].get(mode="clip")
    return jnp.where(row_R < counts_Pe.sum(), shift_R + row_R, output_size)
