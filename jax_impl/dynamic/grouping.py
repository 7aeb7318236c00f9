"""Stages 2 and 9: one row per assignment, sorted by expert; and back, weighted by score."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.rows import expand_rows, sort_by_key, weighted_sum


class Grouped(NamedTuple):
    x_ND: Float[Array, "N D"]
    slot_TK: Integer[Array, "T K"]  # the row that holds assignment (t, k); N where it is sent nowhere
    assignment_N: Integer[Array, " N"]  # the assignment a = t*K + k that each row holds; N past the last
    kept_E: Integer[Array, " E"]  # assignments sent, per expert: all but ids out of range or repeated


def group_by_expert(
    x_TD: Float[Array, "T D"], expert_id_TK: Integer[Array, "T K"], counts_E: Integer[Array, " E"]
) -> Grouped:
    """Copy each token once per chosen expert, sorted by expert, ties by assignment.

        tokens  t0 -> experts 2,0      rows   e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    An id that is out of range, or repeated within a token, is sent nowhere, because a traced function cannot refuse it.
    So no rank sends more than T * min(K, e) rows to another, and no buffer of that size overflows, whatever the ids.
    """
    (T, K), (E,) = expert_id_TK.shape, counts_E.shape
    before_KK = jnp.tril(jnp.ones((K, K), bool), -1)
    again_TK = (before_KK & (expert_id_TK[:, :, None] == expert_id_TK[:, None, :])).any(axis=2)
    valid_N = ((expert_id_TK >= 0) & (expert_id_TK < E) & ~again_TK).reshape(-1)
    expert_N = jnp.where(valid_N, expert_id_TK.reshape(-1), E)
    kept_E = (expert_N[:, None] == jnp.arange(E)).sum(axis=0)

    order_N, place_N = sort_by_key(expert_N, E)
    assignment_N = jnp.where(jnp.arange(T * K) < kept_E.sum(), order_N, T * K)
    slot_TK = jnp.where(valid_N, place_N, T * K).reshape(T, K)
    return Grouped(expand_rows(x_TD, slot_TK, assignment_N), slot_TK, assignment_N, kept_E)


def combine(
    y_ND: Float[Array, "N D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    assignment_N: Integer[Array, " N"],
) -> Float[Array, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once."""
    return weighted_sum(y_ND, score_TK, slot_TK, assignment_N)
