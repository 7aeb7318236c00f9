"""Stage 5: where rows go. Nothing moves, and there is no stage 7: rows arrive, and leave, in expert-major order."""

from typing import NamedTuple

from jaxtyping import Integer
from torch import Tensor

from torch_impl.direct.exchange import Buffers
from torch_impl.direct.rows import expert_major_rows


class ExpertMajor(NamedTuple):
    place_N: Integer[Tensor, " N"]  # the row, among all ranks' rows, that each slot's row becomes; -1 past the last
    origin_R: Integer[Tensor, " R"]  # the slot, among all ranks' slots, that each row came from; -1 past the last


def to_expert_major(
    slot_TK: Integer[Tensor, "T K"], counts_PE: Integer[Tensor, "P E"], buffers: Buffers
) -> ExpertMajor:
    """Where each row that this rank sends will lie, and where each row that it receives came from.

        slots   p0: e0 e0 e1 | p1: e0 e1 e1        rows   e0: p0 p0 p1 | e1: p0 p1 p1

    The counts of all ranks are enough for that: the rows of one expert from one rank move together, in their order.
    """
    n_slots, n_rows = buffers.returned_ND.own_OD.shape[0], buffers.placed_RD.own_OD.shape[0]
    return ExpertMajor(*expert_major_rows(counts_PE, buffers.rank, slot_TK.numel(), n_slots, n_rows))
