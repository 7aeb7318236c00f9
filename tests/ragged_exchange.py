"""JAX's uneven exchange where XLA has none, on a CPU: what its documentation says, in collectives that are there."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
    """Stands in for `jax.lax.ragged_all_to_all`."""
    me = jax.lax.axis_index(axis_name)
    rows, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    row, P = jnp.arange(output.shape[0]), rows.shape[0]
    updates = sizes.shape[1] // P  # for each peer, one after the other
    for p in range(P):

        def update(i, output, p=p):
            k = me * updates + i
            size = jnp.minimum(sizes[p, k], recv_sizes[p * updates + i])  # which should be equal
            inside = (row >= places[p, k]) & (row < places[p, k] + size)
            sent = rows[p].at[starts[p, k] + row - places[p, k]].get(mode="fill", fill_value=0)
            return jnp.where(inside[:, None], sent, output)

        output = jax.lax.fori_loop(0, updates, update, output)
    return output
