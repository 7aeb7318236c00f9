"""Which row lies where: the identity of every row of every array, written down without any of the code under test.

A row is known by its number (source rank * T + token) * K + k; -1 is padding. One array per rank.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Literal

import numpy as np

from parity.cases.case import Case

Array = np.ndarray
# How a backend lays out its rows: as many as there are; padded to a capacity; as many as there are, in a buffer of the
# most there can be; or nothing is seen but the output and gradients.
Layout = Literal["dynamic", "static", "ragged", "opaque"]
Table = dict[str, list[Array]]
PADDING = -1


def row_tables(case: Case, expert_id: Array, keep: Array, layout: Layout) -> Table:
    """Rows as they are grouped on the sender, as received, and expert-major, on each rank.

    Dynamic arrays hold every assignment and no padding. Ragged ones are the same in buffers of the most rows that a
    rank can have, or receive. Static ones hold those kept, in bins of C rows; after rank bins the expert-major padding
    comes last, after expert bins each (expert, source) keeps its bin.
    """
    P, C, e = case.ranks, case.capacity, case.experts // case.ranks
    bin_per_expert = layout == "static" and case.bins != P  # with an expert a rank, both kinds of bin are the same
    expert_of = expert_id.reshape(-1)
    kept = keep.reshape(-1) if layout == "static" else np.ones(expert_of.size, bool)
    by_expert = {
        (p, g): [a for a in range(p * case.tokens * case.top_k, (p + 1) * case.tokens * case.top_k)
                 if kept[a] and expert_of[a] == g]
        for p in range(P) for g in range(case.experts)
    }  # fmt: skip

    def sent(source: int, target: int) -> list[int]:
        segments = [by_expert[source, g] for g in range(target * e, (target + 1) * e)]
        if bin_per_expert:
            return joined(padded(segment, C) for segment in segments)
        return padded(joined(segments), C) if layout == "static" else joined(segments)

    def grouped(source: int) -> list[int]:
        rows = joined(sent(source, q) for q in range(P))
        return padded(rows, case.assignments) if layout == "ragged" else rows

    def received(target: int) -> list[int]:
        rows = joined(sent(p, target) for p in range(P))
        return padded(rows, case.most_received) if layout == "ragged" else rows

    def expert_major(target: int) -> list[int]:
        segments = [by_expert[p, g] for g in range(target * e, (target + 1) * e) for p in range(P)]
        if bin_per_expert:
            return joined(padded(segment, C) for segment in segments)
        most = {"ragged": case.most_received, "static": P * C}.get(layout, 0)
        return padded(joined(segments), most)

    return {
        "grouped": [np.array(grouped(p), np.int64) for p in range(P)],
        "received": [np.array(received(q), np.int64) for q in range(P)],
        "expert_major": [np.array(expert_major(q), np.int64) for q in range(P)],
    }


def indices(case: Case, table: Table, rank: int) -> dict[str, Array]:
    """The index arrays of a rank as the oracle has them; past the end, at the number of rows, for what is not there.

    slot [T, K]: the grouped row of each assignment. assignment: what each grouped row holds. source, target: the
    received row of each expert-major row, and the other way round.
    """
    N = case.tokens * case.top_k
    grouped, received, major = (table[order][rank] for order in ("grouped", "received", "expert_major"))
    own = np.where(grouped == PADDING, N, grouped - rank * N)
    slot = np.full(N + 1, grouped.size)
    slot[own] = np.arange(grouped.size)
    return {
        "slot": slot[:N].reshape(case.tokens, case.top_k),
        "assignment": own,
        "source": positions(major, received),
        "target": positions(received, major),
    }


def positions(rows: Array, among: Array) -> Array:
    """Where each row lies among others; their number for padding."""
    place = {int(row): slot for slot, row in enumerate(among) if row != PADDING}
    return np.array([place.get(int(row), among.size) for row in rows], np.int64)


def positions_by_row(case: Case, table: list[Array]) -> Array:
    """Where each row lies on the rank that holds it, by row number; PADDING for those that no rank holds."""
    place = np.full(case.ranks * case.assignments, PADDING)
    for rows in table:
        real = np.flatnonzero(rows != PADDING)
        place[rows[real]] = real
    return place


def joined(segments: Iterable[list[int]]) -> list[int]:
    """The segments, one after the other."""
    return list(chain.from_iterable(segments))


def padded(rows: list[int], size: int) -> list[int]:
    """The rows, then padding up to `size`."""
    return rows + [PADDING] * (size - len(rows))


def lay_out(values: Array, table: list[Array], padding: float) -> list[Array]:
    """Values by row number [A, ...] as each rank's array holds them."""
    flat = np.concatenate([values, np.full((1, *values.shape[1:]), padding, values.dtype)])
    return [flat[rows] for rows in table]  # PADDING, -1, is the row appended


def identity(case: Case, row: int) -> tuple[int, int, int]:
    """(source rank, token, k) of a row number."""
    p, t, k = np.unravel_index(row, (case.ranks, max(case.tokens, 1), case.top_k))
    return int(p), int(t), int(k)
