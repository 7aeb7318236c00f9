"""Stage 5: where rows go. Nothing moves, and there is no stage 7: rows arrive, and leave, in expert-major order."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Integer

from jax_impl.direct.rows import expert_major_rows, ranks_of


class ExpertMajor(NamedTuple):
    place_N: Integer[Array, " N"]  # the row, among all ranks' rows, that each slot's row becomes; -1 past the last
    origin_R: Integer[Array, " R"]  # the slot, among all ranks' slots, that each row came from; -1 past the last


def to_expert_major(
    slot_TK: Integer[Array, "T K"], counts_PE: Integer[Array, "P E"], axis_name: str | None = None
) -> ExpertMajor:
    """Where each row that this rank sends will lie, and where each row that it receives came from.

        slots   p0: e0 e0 e1 | p1: e0 e1 e1        rows   e0: p0 p0 p1 | e1: p0 p1 p1

    The counts of all ranks are enough for that: the rows of one expert from one rank move together, in their order.
    """
    (T, K), (P, E) = slot_TK.shape, counts_PE.shape
    n_slots, n_rows = T * K, P * T * min(K, E // P)
    return ExpertMajor(*expert_major_rows(counts_PE, ranks_of(axis_name).own, n_slots, n_rows))
