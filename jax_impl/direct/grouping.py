"""Stages 2 and 9: the order of assignments, sorted by expert; and their rows, weighted by score."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.direct.exchange import put_tokens
from jax_impl.direct.rows import ranks_of
from jax_impl.rows import score_gradient, sort_by_key, sum_rows


class Grouped(NamedTuple):
    slot_TK: Integer[Array, "T K"]  # the place of assignment (t, k) in the order by expert; N where it is sent nowhere
    kept_E: Integer[Array, " E"]  # assignments sent, per expert: all but ids out of range or repeated


def group_by_expert(expert_id_TK: Integer[Array, "T K"], counts_E: Integer[Array, " E"]) -> Grouped:
    """Sort assignments by expert, ties by assignment. No row moves yet; its row will return to its slot.

        tokens  t0 -> experts 2,0      slots  e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    An id that is out of range, or repeated within a token, is sent nowhere, because a traced function cannot refuse it.
    So no rank sends more than T * min(K, e) rows to another, and nothing overflows, whatever the ids.
    """
    (T, K), (E,) = expert_id_TK.shape, counts_E.shape
    before_KK = jnp.tril(jnp.ones((K, K), bool), -1)
    again_TK = (before_KK & (expert_id_TK[:, :, None] == expert_id_TK[:, None, :])).any(axis=2)
    valid_TK = (expert_id_TK >= 0) & (expert_id_TK < E) & ~again_TK
    expert_N = jnp.where(valid_TK, expert_id_TK, E).reshape(-1)
    _, slot_N = sort_by_key(expert_N, E)
    slot_TK = jnp.where(valid_TK, slot_N.reshape(T, K), T * K)
    return Grouped(slot_TK, (jnp.arange(E)[:, None] == expert_N).sum(axis=1))


def combine(
    y_RD: Float[Array, "R D"],
    returned_ND: Float[Array, "N D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    place_N: Integer[Array, " N"],
    axis_name: str | None = None,
) -> Float[Array, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * returned[slot[t,k]]), in float32, rounded once.

    Backward, dout is sent as the tokens were: the row of y that belongs to assignment (t, k) gets the gradient
    round(score[t,k] * dout[t]), and the rows that belong to none get anything.
    """
    return _combine(y_RD, returned_ND, score_TK, slot_TK, place_N, ranks_of(axis_name))


@jax.custom_vjp
def _combine(y_RD, returned_ND, score_TK, slot_TK, place_N, ranks):  # noqa: ARG001  y_RD gets a gradient
    return sum_rows(returned_ND, slot_TK, score_TK)


def _combine_forward(y_RD, returned_ND, score_TK, slot_TK, place_N, ranks):
    no_columns_R0 = y_RD[:, :0]  # says how many rows there are, without keeping them
    saved = no_columns_R0, returned_ND, score_TK, slot_TK, place_N, ranks
    return _combine(y_RD, returned_ND, score_TK, slot_TK, place_N, ranks), saved


def _combine_backward(saved, dout_TD):
    no_columns_R0, returned_ND, score_TK, slot_TK, place_N, ranks = saved
    dy_RD = put_tokens(dout_TD, slot_TK, place_N, no_columns_R0.shape[0], ranks, score_TK)
    return dy_RD, None, score_gradient(dout_TD, returned_ND, score_TK, slot_TK), None, None, None


_combine.defvjp(_combine_forward, _combine_backward)
