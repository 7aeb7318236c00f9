"""Stages 5 and 7: from rank-major to expert-major rows, and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl import kernels
from jax_impl.checks import check_bins


class ExpertMajor(NamedTuple):
    x_SD: Float[Array, "*S D"]  # S = B*C rows, or for expert bins [e, P*C] rows
    source_S: Integer[Array, "*S"]  # the rank-major row that each expert-major row is; B*C where it is padding
    target_BC: Integer[Array, "B C"]  # its inverse: the expert-major row that each rank-major row becomes


def to_expert_major(x_BCD: Float[Array, "B C D"], counts_Pe: Integer[Array, "P e"]) -> ExpertMajor:
    """Gather the received rows so that each local expert's rows are contiguous.

        rank bins     p0: e0 e0 e1 __ | p1: e0 e1 __ __      expert-major   e0: p0 p0 p1 | e1: p0 p1 | __ __ __
        expert bins   p0e0: a __ | p0e1: b c | p1e0: d __ | p1e1: __ __     e0: a __ d __ | e1: b c __ __

    Padding comes out as zero, whatever it held when it came in.

    Raises ValueError when there are neither as many bins as ranks nor as experts.
    """
    (B, C, _), (P, e) = x_BCD.shape, counts_Pe.shape
    check_bins(B, P, P * e)
    if B == P and kernels.use_kernels(x_BCD):
        source_S, target_S = kernels.expert_major_rows(counts_Pe, C)
    else:
        source_S = rank_bins_source(counts_Pe, C) if B == P else expert_bins_source(counts_Pe, C)
        target_S = invert(source_S.reshape(-1), B * C)
    target_BC = target_S.reshape(B, C)
    return ExpertMajor(permute_rows(x_BCD, source_S, target_BC), source_S, target_BC)


def to_rank_major(
    y_SD: Float[Array, "*S D"], source_S: Integer[Array, "*S"], target_BC: Integer[Array, "B C"]
) -> Float[Array, "B C D"]:
    """Put every row back where `to_expert_major` took it from."""
    return permute_rows(y_SD, target_BC, source_S)


def rank_bins_source(counts_Pe: Integer[Array, "P e"], capacity: int) -> Integer[Array, " S"]:
    """For each expert-major row, the rank-major row it comes from; P*C, past the end, for the padding, which is last.

    Rows move in P*e segments, those of rank p from p*C on.
    """
    S = counts_Pe.shape[0] * capacity
    start_Pe = jnp.arange(0, S, capacity)[:, None] + jnp.cumsum(counts_Pe, axis=1) - counts_Pe
    return segments_source(start_Pe, counts_Pe, S)


def expert_bins_source(counts_Pe: Integer[Array, "P e"], capacity: int) -> Integer[Array, "e PC"]:
    """The same for expert bins, where whole bins move: (source rank, expert) to (expert, source rank)."""
    P, e = counts_Pe.shape
    row_C = jnp.arange(capacity)
    bin_eP = jnp.arange(P * e).reshape(P, e).T
    source_ePC = jnp.where(row_C < counts_Pe.T[:, :, None], bin_eP[:, :, None] * capacity + row_C, P * e * capacity)
    return source_ePC.reshape(e, P * capacity)


def segments_source(
    start_Pe: Integer[Array, "P e"], counts_Pe: Integer[Array, "P e"], output_size: int
) -> Integer[Array, " R"]:
    """For each expert-major row, where it comes from, if segment (p, j) is counts_Pe[p, j] rows from start_Pe[p, j] on.

    A segment's rows all shift by the same distance, so: find each row's segment, by how many end before it, and add
    the shift to the row number. `jnp.repeat` would say the same in a scan over all rows, which is dozens of launches
    on a GPU. Rows past the last come from `output_size`, past the end.
    """
    counts_eP = counts_Pe.T
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    row_R = jnp.arange(output_size)
    ends = (start_eP + counts_eP).reshape(-1)
    segment_R = jnp.searchsorted(ends, row_R, side="right", method="compare_all")  # the other methods loop
    shift_R = rows_or_zero((start_Pe.T - start_eP).reshape(-1), segment_R)
    return jnp.where(row_R < counts_Pe.sum(), shift_R + row_R, output_size)


@jax.custom_vjp
def permute_rows(
    x_SD: Float[Array, "*S D"],
    source_S: Integer[Array, "*O"],
    target_S: Integer[Array, "*S"],  # noqa: ARG001
) -> Float[Array, "*O D"]:
    """Row r is x[source[r]], padding is zero. Backward gathers by `target`, the inverse: no scatter-add."""
    x_SD = x_SD.reshape(-1, x_SD.shape[-1])
    if kernels.use_kernels(x_SD):
        return kernels.gather_rows(x_SD, source_S)
    return rows_or_zero(x_SD, source_S)


def _permute_rows_forward(x_SD, source_S, target_S):
    return permute_rows(x_SD, source_S, target_S), (source_S, target_S)


def _permute_rows_backward(saved, dy_SD):
    source_S, target_S = saved
    return permute_rows(dy_SD, target_S, source_S), None, None


permute_rows.defvjp(_permute_rows_forward, _permute_rows_backward)


def rows_or_zero(x: Array, index: Integer[Array, "..."]) -> Array:
    """Rows of x; zero where the index is past the end."""
    if x.shape[0] == 0:  # a gather from nothing does not compile
        x = jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)


def invert(index_R: Integer[Array, " R"], size: int) -> Integer[Array, " size"]:
    """The inverse of a permutation with gaps: invert(index)[index[r]] = r, and R where no index points."""
    row_R = jnp.arange(index_R.shape[0])
    return jnp.full(size, index_R.shape[0], row_R.dtype).at[index_R].set(row_R, mode="drop")


def sort_by_key(key_N: Integer[Array, " N"], n_keys: int) -> tuple[Integer[Array, " N"], Integer[Array, " N"]]:
    """Stable sort of keys 0..n_keys-1, and its inverse; the key n_keys means no key, and goes last.

        keys 2 0 2 1     order 1 3 0 2     place 2 0 3 1

    Shapes: order_N, place_N.
    """
    if kernels.use_kernels(key_N):
        return kernels.sort_by_key(key_N, n_keys)
    order_N = jnp.argsort(key_N, stable=True)
    return order_N, invert(order_N, order_N.shape[0])


def exclusive_cumsum(counts: Integer[Array, " n"]) -> Integer[Array, " n"]:
    """Where each segment starts: [2, 0, 3] -> [0, 2, 2]."""
    return jnp.cumsum(counts) - counts
