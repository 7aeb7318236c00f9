"""Stages 3, 4 and 8: counts, tokens out, tokens back, each row written straight to the rank that it is for."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_experts_per_rank
from jax_impl.direct.rows import Ranks, put_rows, ranks_of
from jax_impl.exchange import n_ranks
from jax_impl.rows import sum_rows


def exchange_counts(counts_E: Integer[Array, " E"], axis_name: str | None = None) -> Integer[Array, "P E"]:
    """Tell every rank how many rows each expert gets from this rank.

        counts_PE[p, g] = rows that rank p sends to expert g, which may live on any rank

    Nothing is copied to the host. The counts of all ranks say where every row goes.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    check_experts_per_rank(counts_E.shape[0], n_ranks(axis_name))
    return counts_E[None] if axis_name is None else jax.lax.all_gather(counts_E, axis_name)


def send_tokens(
    x_TD: Float[Array, "T D"],
    slot_TK: Integer[Array, "T K"],
    place_N: Integer[Array, " N"],
    origin_R: Integer[Array, " R"],
    axis_name: str | None = None,
) -> Float[Array, "R D"]:
    """Write each token to its K places, expert-major: (local expert, source rank, assignment).

    Rows past the last that arrives hold anything. Backward, the rows' gradients return to their slots, and a token's
    gradient is the sum of its K rows.
    """
    return _send_tokens(x_TD, slot_TK, place_N, origin_R, ranks_of(axis_name))


@jax.custom_vjp
def _send_tokens(x_TD, slot_TK, place_N, origin_R, ranks):
    return put_tokens(x_TD, slot_TK, place_N, origin_R.shape[0], ranks)


def _send_tokens_forward(x_TD, slot_TK, place_N, origin_R, ranks):
    return _send_tokens(x_TD, slot_TK, place_N, origin_R, ranks), (slot_TK, origin_R, ranks)


def _send_tokens_backward(saved, dx_RD):
    slot_TK, origin_R, ranks = saved
    dx_ND = put_rows(dx_RD, origin_R[:, None], slot_TK.size, ranks)
    return sum_rows(dx_ND, slot_TK), None, None, None, None


_send_tokens.defvjp(_send_tokens_forward, _send_tokens_backward)


def put_tokens(
    x_TD: Float[Array, "T D"],
    slot_TK: Integer[Array, "T K"],
    place_N: Integer[Array, " N"],
    n_rows: int,
    ranks: Ranks,
    score_TK: Float[Array, "T K"] | None = None,
) -> Float[Array, "R D"]:
    """Write each token to its K places among each rank's `n_rows`; with scores, each time round(score[t,k] * x[t])."""
    place_TK = jnp.pad(place_N, (0, 1), constant_values=-1)[slot_TK]
    return put_rows(x_TD, place_TK, n_rows, ranks, score_TK)


def return_tokens(
    y_RD: Float[Array, "R D"],
    place_N: Integer[Array, " N"],
    origin_R: Integer[Array, " R"],
    axis_name: str | None = None,
) -> Float[Array, "N D"]:
    """Write every row back to the slot that it came from: the inverse of `send_tokens`.

    Autodiff does not see it: the backward of `combine` sends the gradient of y.
    """
    return put_rows(jax.lax.stop_gradient(y_RD), origin_R[:, None], place_N.shape[0], ranks_of(axis_name))
