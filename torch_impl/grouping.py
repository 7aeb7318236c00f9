"""Stages 2 and 9: one row per assignment, sorted by expert; and back, weighted by score."""

from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.rows import expand_rows, sort_by_key, weighted_sum


class Grouped(NamedTuple):
    x_ND: Float[Tensor, "N D"]
    slot_TK: Integer[Tensor, "T K"]  # the row that holds assignment (t, k)
    assignment_N: Integer[Tensor, " N"]  # the assignment a = t*K + k that each row holds


def group_by_expert(
    x_TD: Float[Tensor, "T D"], expert_id_TK: Integer[Tensor, "T K"], counts_E: Integer[Tensor, " E"]
) -> Grouped:
    """Copy each token once per chosen expert, sorted by expert, ties by assignment.

        tokens  t0 -> experts 2,0      rows   e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    The rows for one rank are contiguous, because expert g lives on rank g // e.
    """
    assignment_N, slot_N = sort_by_key(expert_id_TK.reshape(-1), counts_E.shape[0])
    slot_TK = slot_N.reshape(expert_id_TK.shape)
    return Grouped(expand_rows(x_TD, slot_TK, assignment_N), slot_TK, assignment_N)


def combine(
    y_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_N: Integer[Tensor, " N"],
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once."""
    return weighted_sum(y_ND, score_TK, slot_TK, assignment_N)
