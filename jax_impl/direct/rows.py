"""How rows move, and where to: each straight to its place on any rank, plain, or through a kernel on GPUs.

Forward and backward, every row has one writer. A gradient that several rows share is summed where it is read, in a
fixed order. M stands for any number of rows, O for the rows of a rank's result, and A for those of all ranks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jax_impl import kernels
from jax_impl.exchange import n_ranks
from jax_impl.rows import take_or_zero


@partial(jax.tree_util.register_dataclass, data_fields=["own"], meta_fields=["axis_name", "count", "reach"])
@dataclass(frozen=True)
class Ranks:
    """The ranks of a mapped axis, looked up in forward and kept for backward.

    Where `vmap` maps the axis and the gradient is taken outside of it, JAX runs a custom backward without the axis's
    index and size.
    """

    own: Any  # this rank's number; while JAX transforms the pytree, any object of its own
    axis_name: str | None
    count: int
    reach: bool  # whether a kernel can write to the others' memory


def ranks_of(axis_name: str | None) -> Ranks:
    """The ranks of the axis, or one rank where there is no axis."""
    if axis_name is None:
        return Ranks(0, None, 1, reach=False)
    P = n_ranks(axis_name)
    return Ranks(jax.lax.axis_index(axis_name), axis_name, P, reach=P > 1 and kernels.can_reach_ranks(axis_name))


def put_rows(
    x_MD: Float[Array, "M D"],
    place_MK: Integer[Array, "M K"],
    n_rows: int,
    ranks: Ranks,
    score_MK: Float[Array, "M K"] | None = None,
) -> Float[Array, "O D"]:
    """Write row m of x, for every k, to row place[m, k] among all ranks' rows: row o of rank p is number p*O + o.

        O = 2    place 1 3 -1        rank 0: __ x0 | rank 1: __ x1        x2 goes nowhere

    With scores, round(score[m, k] * x[m]) is written. Returned is this rank's part, O = `n_rows` rows, with what any
    rank has put there. Other rows hold anything: NaN in the plain version, so that a test sees who reads them.
    """
    if score_MK is not None:
        x_MD, place_MK = weigh_rows(x_MD, score_MK), place_MK.reshape(-1, 1)
    if ranks.reach and kernels.use_remote_kernels(x_MD):
        return kernels.put_rows(x_MD, place_MK, n_rows, ranks.axis_name, ranks.count)
    if ranks.count > 1:
        x_MD, place_MK = exchange_places(x_MD, place_MK, n_rows, ranks)
    return put_here(x_MD, place_MK, n_rows)


def weigh_rows(x_MD: Float[Array, "M D"], score_MK: Float[Array, "M K"]) -> Float[Array, "A D"]:
    """Row m times each of its K scores, in float32, rounded once: K rows for each row of x."""
    accum_dtype = np.promote_types(x_MD.dtype, np.float32)
    weighed_MKD = score_MK.astype(accum_dtype)[:, :, None] * x_MD.astype(accum_dtype)[:, None]
    return weighed_MKD.astype(x_MD.dtype).reshape(-1, x_MD.shape[1])


def exchange_places(
    x_MD: Float[Array, "M D"], place_MK: Integer[Array, "M K"], n_rows: int, ranks: Ranks
) -> tuple[Float[Array, "A D"], Integer[Array, "A K"]]:
    """The plain way to other ranks: all rows go to all ranks, with their places on each; -1 where they have none.

    The rows of each other rank come by one `ppermute`. In backward, an all-gather would need more of the axis than
    `Ranks` keeps. A rank's own rows come first.
    """
    P = ranks.count
    shifts = [[(p, (p + i) % P) for p in range(P)] for i in range(1, P)]

    def of_all(a_M: Array) -> Array:
        others = (jax.lax.ppermute(a_M, ranks.axis_name, shift) for shift in shifts)
        return jnp.concatenate([a_M, *others])

    here_AK = of_all(place_MK) - ranks.own * n_rows  # still negative for nowhere
    return of_all(x_MD), jnp.where((here_AK >= 0) & (here_AK < n_rows), here_AK, -1)


def put_here(x_MD: Float[Array, "M D"], place_MK: Integer[Array, "M K"], n_rows: int) -> Float[Array, "O D"]:
    """Write rows to places of this rank's own: each place gathers its row."""
    (M, K), place_A = place_MK.shape, place_MK.reshape(-1)
    row_A = jnp.arange(M * K)
    source_O = jnp.full(n_rows, M * K).at[jnp.where(place_A < 0, n_rows, place_A)].set(row_A, mode="drop")
    if kernels.use_kernels(x_MD):
        return kernels.gather_rows(x_MD, source_O // K)
    return jnp.where((source_O < M * K)[:, None], take_or_zero(x_MD, source_O // K), jnp.nan)


def expert_major_rows(
    counts_PE: Integer[Array, "P E"], rank: Array | int, n_slots: int, n_rows: int
) -> tuple[Integer[Array, " N"], Integer[Array, " R"]]:
    """For each slot the row that its row becomes, and for each row the slot that it came from.

    Slots and rows are numbered over all ranks: slot s of rank p is p * n_slots + s, row r of rank p is p * n_rows + r.
    The rows of one expert from one rank are a segment, in slots and in rows. Within it both are in the same order. So
    all of a segment shifts by the distance between its two starts.

    Shapes: place_N, origin_R.
    """
    P, E = counts_PE.shape
    e = E // P
    start_PE = counts_PE.cumsum(axis=1) - counts_PE
    counts_PeP = counts_PE.reshape(P, P, e).transpose(1, 2, 0)  # (owner, expert, sender), the order of an owner's rows
    counts_PeP_flat = counts_PeP.reshape(P, -1)
    row_PE = (counts_PeP_flat.cumsum(axis=1) - counts_PeP_flat).reshape(P, e, P).transpose(2, 0, 1).reshape(P, E)
    shift_PE = row_PE - start_PE

    first_row_E = jnp.arange(E) // e * n_rows  # of its owner, among all ranks' rows
    first_slot_P1 = jnp.arange(P)[:, None] * n_slots
    mine = rank * e + jnp.arange(e)
    place_N = shift_segments(counts_PE[rank], shift_PE[rank] + first_row_E, n_slots)
    back_Pe = first_slot_P1 - shift_PE[:, mine]
    origin_R = shift_segments(counts_PE[:, mine].T.reshape(-1), back_Pe.T.reshape(-1), n_rows)
    return place_N, origin_R


def shift_segments(
    counts_G: Integer[Array, " G"], shift_G: Integer[Array, " G"], output_size: int
) -> Integer[Array, " O"]:
    """Numbers 0, 1, 2, ..., of which the first counts[0] shift by shift[0], and so on; -1 past the last segment.

    A number's segment is how many segments end before it.
    """
    row_O = jnp.arange(output_size)
    ends = counts_G.cumsum(axis=0)
    segment_O = jnp.searchsorted(ends, row_O, side="right", method="compare_all")  # the other methods loop
    return jnp.where(row_O < counts_G.sum(), row_O + take_or_zero(shift_G, segment_O), -1)
