"""Stages 3, 4 and 8: counts, tokens out, tokens back."""

import jax
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_experts_per_rank


def n_ranks(axis_name: str | None) -> int:
    """P: the size of the mapped axis, or 1 where there is none."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def exchange_counts(counts_E: Integer[Array, " E"], axis_name: str | None = None) -> Integer[Array, "P e"]:
    """Tell every rank how many rows each of its experts gets from this rank.

        counts_Pe[p, j] = rows that rank p sends to local expert j of this rank

    The counts only say which rows are padding. Every shape is known without them, so nothing waits.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    P = n_ranks(axis_name)
    check_experts_per_rank(counts_E.shape[0], P)
    return _all_to_all(counts_E.reshape(P, -1), axis_name)


def send_tokens(x_BCD: Float[Array, "B C D"], axis_name: str | None = None) -> Float[Array, "B C D"]:
    """Send each rank the bins of its experts. They arrive rank-major: (source rank, local expert, assignment)."""
    return _all_to_all(x_BCD, axis_name)


def return_tokens(y_BCD: Float[Array, "B C D"], axis_name: str | None = None) -> Float[Array, "B C D"]:
    """Send every bin back to the rank it came from: the inverse of `send_tokens`."""
    return _all_to_all(y_BCD, axis_name)


def _all_to_all(x: Array, axis_name: str | None) -> Array:
    """Even all-to-all of bins. It is its own inverse and its own backward."""
    return x if axis_name is None else jax.lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0, tiled=True)
