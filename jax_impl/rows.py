"""How rows move, and where to, where some rows are padding: plain, or through a kernel on a GPU.

Forward and backward are gathers. A gradient that several rows share is summed where it is read, in a fixed order.
M stands for any number of rows, along one axis or several, and O for the number of output rows where it differs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jax_impl import kernels


@jax.custom_vjp
def expand_rows(
    x_TD: Float[Array, "T D"], slot_TK: Integer[Array, "T K"], assignment_M: Integer[Array, "*M"]
) -> Float[Array, "*M D"]:
    """Row r is the token of assignment r, padding is zero. Backward, a token gathers its K rows: no scatter-add."""
    if kernels.use_kernels(x_TD):
        x_MD = kernels.expand_rows(x_TD, slot_TK, assignment_M.reshape(-1))
        return x_MD.reshape(*assignment_M.shape, x_TD.shape[1])
    return take_or_zero(x_TD, assignment_M // slot_TK.shape[1])


def _expand_rows_forward(x_TD, slot_TK, assignment_M):
    return expand_rows(x_TD, slot_TK, assignment_M), slot_TK


def _expand_rows_backward(slot_TK, dx_MD):
    return sum_rows(dx_MD.reshape(-1, dx_MD.shape[-1]), slot_TK), None, None


expand_rows.defvjp(_expand_rows_forward, _expand_rows_backward)


def sum_rows(
    y_MD: Float[Array, "M D"], slot_TK: Integer[Array, "T K"], score_TK: Float[Array, "T K"] | None = None
) -> Float[Array, "T D"]:
    """A token's K rows, times their scores if there are any, summed in float32 in order of k, rounded once.

    A slot past the end counts as zero.
    """
    if kernels.use_kernels(y_MD):
        return kernels.sum_rows(y_MD, slot_TK, score_TK)
    accum_dtype = np.promote_types(y_MD.dtype, np.float32)
    out_TD = jnp.zeros((slot_TK.shape[0], y_MD.shape[1]), accum_dtype)
    for k, slot_T in enumerate(slot_TK.T):
        row_TD = take_or_zero(y_MD, slot_T).astype(accum_dtype)
        out_TD = out_TD + (row_TD if score_TK is None else score_TK[:, k, None].astype(accum_dtype) * row_TD)
    return out_TD.astype(y_MD.dtype)


def score_gradient(
    dout_TD: Float[Array, "T D"],
    y_MD: Float[Array, "M D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
) -> Float[Array, "T K"]:
    """dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d], in float32; zero for a slot past the end."""
    if kernels.use_kernels(y_MD):
        return kernels.score_gradient(dout_TD, y_MD, score_TK, slot_TK)
    accum_dtype = np.promote_types(y_MD.dtype, np.float32)
    dscore_TK = [
        (dout_TD.astype(accum_dtype) * take_or_zero(y_MD, slot_T).astype(accum_dtype)).sum(axis=1)
        for slot_T in slot_TK.T
    ]
    return jnp.stack(dscore_TK, axis=1).astype(score_TK.dtype)


@jax.custom_vjp
def weighted_sum(
    y_MD: Float[Array, "*M D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    assignment_M: Integer[Array, "*M"],  # noqa: ARG001  for backward
) -> Float[Array, "T D"]:
    """A token's K rows, weighted and summed in order of k. Backward, a row gathers its token: no scatter-add."""
    return sum_rows(y_MD.reshape(-1, y_MD.shape[-1]), slot_TK, score_TK)


def _weighted_sum_forward(y_MD, score_TK, slot_TK, assignment_M):
    return weighted_sum(y_MD, score_TK, slot_TK, assignment_M), (y_MD, score_TK, slot_TK, assignment_M)


def _weighted_sum_backward(saved, dout_TD):
    y_MD, score_TK, slot_TK, assignment_M = saved
    accum_dtype = np.promote_types(y_MD.dtype, np.float32)
    shape, y_MD = y_MD.shape, y_MD.reshape(-1, y_MD.shape[-1])
    if kernels.use_kernels(y_MD):
        dy_MD, dscore_TK = kernels.weighted_sum_backward(dout_TD, y_MD, score_TK, slot_TK, assignment_M.reshape(-1))
        return dy_MD.reshape(shape), dscore_TK, None, None
    score_M = take_or_zero(score_TK.reshape(-1), assignment_M).astype(accum_dtype)
    dy_MD = score_M[..., None] * take_or_zero(dout_TD, assignment_M // slot_TK.shape[1]).astype(accum_dtype)
    return dy_MD.astype(y_MD.dtype), score_gradient(dout_TD, y_MD, score_TK, slot_TK), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


@jax.custom_vjp
def permute_rows(
    x_MD: Float[Array, "*M D"],
    source_O: Integer[Array, "*O"],
    target_M: Integer[Array, "*M"],  # noqa: ARG001
) -> Float[Array, "*O D"]:
    """Row r is x[source[r]], padding is zero. Backward gathers by `target`, the inverse: no scatter-add."""
    x_MD = x_MD.reshape(-1, x_MD.shape[-1])
    if kernels.use_kernels(x_MD):
        return kernels.gather_rows(x_MD, source_O)
    return take_or_zero(x_MD, source_O)


def _permute_rows_forward(x_MD, source_O, target_M):
    return permute_rows(x_MD, source_O, target_M), (source_O, target_M)


def _permute_rows_backward(saved, dy_OD):
    source_O, target_M = saved
    return permute_rows(dy_OD, target_M, source_O), None, None


permute_rows.defvjp(_permute_rows_forward, _permute_rows_backward)


def expert_major_rows(
    counts_Pe: Integer[Array, "P e"], n_bins: int, capacity: int
) -> tuple[Integer[Array, "*S"], Integer[Array, "B C"]]:
    """For each expert-major row the rank-major row it comes from, and the inverse; past the end where it is padding.

    Shapes: source_S, target_BC.
    """
    P, _ = counts_Pe.shape
    if n_bins == P and kernels.use_kernels(counts_Pe):
        source_S, target_S = kernels.expert_major_rows(counts_Pe, capacity)
        return source_S, target_S.reshape(n_bins, capacity)
    source_S = rank_bins_source(counts_Pe, capacity) if n_bins == P else expert_bins_source(counts_Pe, capacity)
    return source_S, inverse_permutation(source_S.reshape(-1)).reshape(n_bins, capacity)


def rank_bins_source(counts_Pe: Integer[Array, "P e"], capacity: int) -> Integer[Array, " S"]:
    """For each expert-major row, the rank-major row it comes from; P*C, past the end, for the padding, which is last.

    Rows move in P*e segments, those of rank p from p*C on.
    """
    S = counts_Pe.shape[0] * capacity
    start_Pe = jnp.arange(0, S, capacity)[:, None] + counts_Pe.cumsum(axis=1) - counts_Pe
    return segments_source(start_Pe, counts_Pe, S)


def expert_bins_source(counts_Pe: Integer[Array, "P e"], capacity: int) -> Integer[Array, "e PC"]:
    """The same for expert bins, where whole bins move: (source rank, expert) to (expert, source rank)."""
    P, e = counts_Pe.shape
    row_C = jnp.arange(capacity)
    bin_eP = jnp.arange(P * e).reshape(P, e).T
    row_ePC = bin_eP[:, :, None] * capacity + row_C
    return jnp.where(row_C < counts_Pe.T[:, :, None], row_ePC, P * e * capacity).reshape(e, P * capacity)


def segments_source(
    start_Pe: Integer[Array, "P e"], counts_Pe: Integer[Array, "P e"], output_size: int
) -> Integer[Array, " O"]:
    """For each expert-major row, where it comes from, if segment (p, j) is counts_Pe[p, j] rows from start_Pe[p, j] on.

    A segment's rows all shift by the same distance. A row's segment is the number of segments that end before it,
    and that segment's shift is added to the row number. `jnp.repeat` would do the same in a scan over all rows, with
    dozens of launches on a GPU. Rows past the last segment get `output_size` as their source, past the end.
    """
    counts_eP = counts_Pe.T
    start_eP = exclusive_cumsum(counts_eP.reshape(-1)).reshape(counts_eP.shape)
    row_O = jnp.arange(output_size)
    ends = (start_eP + counts_eP).reshape(-1)
    segment_O = jnp.searchsorted(ends, row_O, side="right", method="compare_all")  # the other methods loop
    shift_O = take_or_zero((start_Pe.T - start_eP).reshape(-1), segment_O)
    return jnp.where(row_O < counts_Pe.sum(), shift_O + row_O, output_size)


def take_or_zero(x: Array, index: Integer[Array, "..."]) -> Array:
    """Rows of x; zero where the index is past the end."""
    if x.shape[0] == 0:  # a gather from nothing does not compile
        x = jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
    return jnp.asarray(x).at[index].get(mode="fill", fill_value=0)


def inverse_permutation(index_O: Integer[Array, " O"]) -> Integer[Array, " O"]:
    """The inverse of a permutation with gaps: inverse_permutation(index)[index[r]] = r, and O where no index points."""
    row_O = jnp.arange(index_O.shape[0])
    return jnp.full_like(row_O, index_O.shape[0]).at[index_O].set(row_O, mode="drop")


def sort_by_key(key_N: Integer[Array, " N"], n_keys: int) -> tuple[Integer[Array, " N"], Integer[Array, " N"]]:
    """Stable sort of keys 0..n_keys-1, and its inverse; the key n_keys means no key, and goes last.

        keys 2 0 2 1     order 1 3 0 2     place 2 0 3 1

    Shapes: order_N, place_N.
    """
    if kernels.use_kernels(key_N):
        return kernels.sort_by_key(key_N, n_keys)
    order_N = key_N.argsort(stable=True)
    return order_N, inverse_permutation(order_N)


def exclusive_cumsum(counts: Integer[Array, " n"]) -> Integer[Array, " n"]:
    """Where each segment starts: [2, 0, 3] -> [0, 2, 2]."""
    return counts.cumsum(axis=0) - counts
