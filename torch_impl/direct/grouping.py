"""Stages 2 and 9: the order of assignments, sorted by expert; and their rows, weighted by score."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.direct.exchange import Buffers, until_backward
from torch_impl.routing import count_per_expert
from torch_impl.rows import sort_by_key
from torch_impl.static.rows import weighted_sum


class Grouped(NamedTuple):
    slot_TK: Integer[Tensor, "T K"]  # the place of assignment (t, k) in the order by expert; N where it is sent nowhere
    assignment_N: Integer[Tensor, " N"]  # the assignment a = t*K + k in each slot; N past the last
    kept_E: Integer[Tensor, " E"]  # assignments sent, per expert: all but ids out of range or repeated


def group_by_expert(expert_id_TK: Integer[Tensor, "T K"], counts_E: Integer[Tensor, " E"]) -> Grouped:
    """Sort assignments by expert, ties by assignment. No row moves yet: a slot is where it returns to.

        tokens  t0 -> experts 2,0      slots  e0: t0 t1   e1: t1   e2: t0
                t1 -> experts 0,1

    An id that is out of range, or repeated within a token, is sent nowhere, because refusing it would mean waiting for
    its value. So no rank sends more than T * min(K, e) rows to another, and no buffer overflows, whatever the ids.
    """
    (T, K), (E,) = expert_id_TK.shape, counts_E.shape
    again_TK = (expert_id_TK[:, :, None] == expert_id_TK[:, None, :]).tril(-1).any(dim=2)
    valid_TK = (expert_id_TK >= 0) & (expert_id_TK < E) & ~again_TK
    expert_TK = torch.where(valid_TK, expert_id_TK, E)
    kept_E = count_per_expert(expert_TK, E)

    order_N, place_N = sort_by_key(expert_TK.reshape(-1), E)
    row_N = torch.arange(T * K, device=order_N.device)
    assignment_N = torch.where(row_N < kept_E.sum(), order_N, T * K)
    slot_TK = torch.where(valid_TK, place_N.reshape(T, K), T * K)
    return Grouped(slot_TK, assignment_N, kept_E)


def combine(
    y_ND: Float[Tensor, "N D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_N: Integer[Tensor, " N"],
    buffers: Buffers,
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of score[t,k] * y[slot[t,k]]), summed in float32, rounded once.

    Backward reads y again, in the buffers, and raises RuntimeError if another forward pass has overwritten it.
    """
    return until_backward(weighted_sum(y_ND, score_TK, slot_TK, assignment_N), buffers)
