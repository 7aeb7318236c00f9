"""Stages 3, 4 and 8: counts, tokens out, tokens back."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_experts_per_rank
from jax_impl.dynamic.checks import check_ragged_exchange
from jax_impl.exchange import n_ranks
from jax_impl.rows import exclusive_cumsum

# The number of updates that an exchange is cut into, for all peers together. XLA copies each update with a thread block
# of its own, so one update per peer leaves a GPU idle. On H100s an exchange took 26 to 65 times as long as a dense one
# with one update per peer, and 1.5 times as long from 128 updates per peer on.
UPDATES = 1024


class Splits(NamedTuple):
    """Rows per rank, on the device, and where they go."""

    send_P: Integer[Array, " P"]
    receive_P: Integer[Array, " P"]
    received_at_P: Integer[Array, " P"]  # where this rank's rows begin in what each other rank receives
    returned_at_P: Integer[Array, " P"]  # where each rank's rows began in what it sent to this one


def exchange_counts(
    counts_E: Integer[Array, " E"], axis_name: str | None = None
) -> tuple[Integer[Array, "P e"], Splits]:
    """Tell every rank how many rows each of its experts gets from this rank, and where in its buffer to put them.

        counts_Pe[p, j] = rows that rank p sends to local expert j of this rank

    Nothing is copied to the host.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    P = n_ranks(axis_name)
    check_experts_per_rank(counts_E.shape[0], P)
    sent_Pe = counts_E.reshape(P, -1)
    counts_Pe = _all_to_all(sent_Pe, axis_name)
    send_P, receive_P = sent_Pe.sum(axis=1), counts_Pe.sum(axis=1)
    received_at_P = _all_to_all(exclusive_cumsum(receive_P), axis_name)
    returned_at_P = _all_to_all(exclusive_cumsum(send_P), axis_name)
    return counts_Pe, Splits(send_P, receive_P, received_at_P, returned_at_P)


def send_tokens(
    x_ND: Float[Array, "N D"], splits: Splits, output_size: int, axis_name: str | None = None
) -> Float[Array, "R D"]:
    """Send each rank the rows of its experts. They arrive rank-major: (source rank, local expert, assignment).

    `output_size` is R, static: at least the most rows that a rank can receive, P*T*min(K, e). Unused rows are zero.
    With no axis there is no other rank, and the rows stay as they are.
    """
    return _ragged(output_size, x_ND.shape[0], axis_name, x_ND, *splits)


def return_tokens(
    y_RD: Float[Array, "R D"], splits: Splits, output_size: int, axis_name: str | None = None
) -> Float[Array, "N D"]:
    """Send every row back to the rank it came from: the inverse of `send_tokens`. `output_size` is N."""
    back = (splits.receive_P, splits.send_P, splits.returned_at_P, splits.received_at_P)
    return _ragged(output_size, y_RD.shape[0], axis_name, y_RD, *back)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ragged(n_out, n_in, axis_name, x, send_P, receive_P, put_at_P, back_at_P):  # noqa: ARG001  for backward
    """Uneven all-to-all of rows. Backward is the same exchange with the splits swapped."""
    if axis_name is None:
        return x
    check_ragged_exchange(axis_name)
    from_P, to_P = exclusive_cumsum(send_P), exclusive_cumsum(receive_P)
    # XLA silently writes past the end of a buffer. So sizes are cut to what fits, whatever was asked for.
    send_P = jnp.clip(jnp.minimum(n_in - from_P, n_out - put_at_P), 0, send_P)
    receive_P = jnp.clip(n_out - to_P, 0, receive_P)
    done_PU, send_PU = _cut(send_P, UPDATES // send_P.shape[0])
    _, receive_PU = _cut(receive_P, UPDATES // send_P.shape[0])
    from_PU = jnp.minimum(from_P[:, None] + done_PU, n_in)
    put_at_PU = jnp.minimum(put_at_P[:, None] + done_PU, n_out)
    sizes = (from_PU, send_PU, put_at_PU, receive_PU)
    buffer = jnp.full((n_out, x.shape[1]), x[:0].sum(), x.dtype)  # zeros, on every axis that x is mapped over
    return jax.lax.ragged_all_to_all(x, buffer, *(a.reshape(-1).astype(jnp.int32) for a in sizes), axis_name=axis_name)


def _cut(rows_P: Integer[Array, " P"], n: int) -> tuple[Integer[Array, "P n"], Integer[Array, "P n"]]:
    """Cut each peer's rows into n nearly equal updates: how many rows come before each update, and how many it has.

    _cut([5, 2], 2) = [[0, 3], [0, 1]], [[3, 2], [1, 1]]
    """
    most_P1 = -(-rows_P[:, None] // n)
    done_Pn = jnp.minimum(jnp.arange(n) * most_P1, rows_P[:, None])
    return done_Pn, jnp.minimum(most_P1, rows_P[:, None] - done_Pn)


def _ragged_forward(n_out, n_in, axis_name, x, *sizes):
    return _ragged(n_out, n_in, axis_name, x, *sizes), sizes


def _ragged_backward(n_out, n_in, axis_name, sizes, dy):
    send_P, receive_P, put_at_P, back_at_P = sizes
    return _ragged(n_in, n_out, axis_name, dy, receive_P, send_P, back_at_P, put_at_P), None, None, None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _all_to_all(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0, tiled=True)
