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
    row = jnp.arange(output.shape[0])
    for p in range(rows.shape[0]):
        size = jnp.minimum(sizes[p, me], recv_sizes[p])  # which should be equal
        inside = (row >= places[p, me]) & (row < places[p, me] + size)
        sent = rows[p].at[starts[p, me] + row - places[p, me]].get(mode="fill", fill_value=0)
        output = jnp.where(inside[:, None], sent, output)
    return output
