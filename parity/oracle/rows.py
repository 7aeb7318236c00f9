"""Which row lies where: the identity of every row of every array, written down without any of the code under test.

A row is known by its number (source rank * T + token) * K + k; -1 is padding. One array per rank.
"""

from typing import Literal

import numpy as np

from parity.cases.case import Case

Array = np.ndarray
# How a backend lays out its rows: as many as there are; padded to a capacity; as many as there are, in a buffer of the
# most there can be; the same, but expert-major from the start; or nothing is seen but the output and gradients.
Layout = Literal["dynamic", "static", "ragged", "direct", "opaque"]
Table = dict[str, list[Array]]
PADDING = -1


def row_tables(case: Case, expert_id: Array, keep: Array, layout: Layout) -> Table:
    """Rows as they are grouped on the sender, as received, and expert-major, on each rank.

    Dynamic arrays hold every assignment and no padding. Ragged ones are the same in buffers of the most rows that a
    rank can have, or receive. Direct ones have such a buffer for expert-major rows alone. Static ones hold those kept,
    in bins of C rows; after rank bins the expert-major padding comes last, after expert bins each (expert, source)
    keeps its bin.
    """
    P, E, C, N = case.ranks, case.experts, case.capacity, case.assignments
    bin_per_expert = layout == "static" and case.bins != P  # with an expert a rank, both kinds of bin are the same
    expert_A = expert_id.reshape(-1)
    there_A = (expert_A >= 0) & (keep.reshape(-1) | (layout != "static"))
    rows = np.flatnonzero(there_A)
    rows = rows[np.lexsort((expert_A[rows], rows // max(N, 1)))]  # by source rank, then expert, then assignment
    source, expert = rows // max(N, 1), expert_A[rows]
    by_rank = expert // (E // P)
    if layout == "static":
        n_bins = E if bin_per_expert else P
        grouped = in_bins(rows, source * n_bins + (expert if bin_per_expert else by_rank), P * n_bins, C)
        bins = grouped.reshape(P, P, -1)  # of each source rank, for each target rank
        received = list(bins.swapaxes(0, 1).reshape(P, -1))
        grouped = list(grouped.reshape(P, -1))
    else:
        most = (N, case.most_received) if layout == "ragged" else (0, 0)
        grouped = [padded(rows[source == p], most[0]) for p in range(P)]
        received = [padded(rows[by_rank == q], most[1]) for q in range(P)]
    if bin_per_expert:
        of_expert = bins.reshape(P, E, C).swapaxes(0, 1)
        return {"grouped": grouped, "received": received, "expert_major": list(of_expert.reshape(P, -1))}
    most_there = {"ragged": case.most_received, "direct": case.most_received, "static": P * C}.get(layout, 0)
    major = rows[np.argsort(expert, kind="stable")]
    at = expert_A[major] // (E // P)
    return {
        "grouped": grouped,
        "received": received,
        "expert_major": [padded(major[at == q], most_there) for q in range(P)],
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


def straight(case: Case, table: Table) -> dict[str, Array]:
    """By row number, where a row goes and where it comes from, in numbers that run through all ranks.

    place: its expert-major row, in buffers of the most there can be. origin: its grouped row. PADDING where no rank
    holds it, and as one more, at the end, for padding.
    """
    found = {}
    for name, order, size in (("place", "expert_major", case.most_received), ("origin", "grouped", case.assignments)):
        found[name] = np.full(case.ranks * case.assignments + 1, PADDING)
        for p, rows in enumerate(table[order]):
            real = np.flatnonzero(rows != PADDING)
            found[name][rows[real]] = p * size + real
    return found


def positions(rows: Array, among: Array) -> Array:
    """Where each row lies among others; their number for padding, and for those that are not among them."""
    real = np.flatnonzero(among != PADDING)
    place = np.full(max(rows.max(initial=-1), among.max(initial=-1)) + 2, among.size)  # PADDING, -1, is the last
    place[among[real]] = real
    return place[rows]


def positions_by_row(case: Case, table: list[Array]) -> Array:
    """Where each row lies on the rank that holds it, by row number; PADDING for those that no rank holds."""
    place = np.full(case.ranks * case.assignments, PADDING)
    for rows in table:
        real = np.flatnonzero(rows != PADDING)
        place[rows[real]] = real
    return place


def in_bins(rows: Array, of_bin: Array, n_bins: int, size: int) -> Array:
    """[n_bins, size], each bin's rows in their order and then padding; `of_bin` says whose each row is, in order."""
    bins = np.full((n_bins, size), PADDING)
    bins[of_bin, np.arange(rows.size) - np.searchsorted(of_bin, of_bin)] = rows
    return bins


def padded(rows: Array, size: int) -> Array:
    """The rows, then padding up to `size`."""
    return np.concatenate([rows, np.full(max(size - rows.size, 0), PADDING)])


def lay_out(values: Array, table: list[Array], padding: float) -> list[Array]:
    """Values by row number [A, ...] as each rank's array holds them."""
    bits = values.view(f"i{values.itemsize}")  # NumPy copies rows of bfloat16, which is not its own, one by one
    of_padding = np.array(padding, values.dtype).view(bits.dtype)

    def of_rank(rows: Array) -> Array:
        if not values.size:
            return np.full((*rows.shape, *values.shape[1:]), padding, values.dtype)
        found = bits.take(np.maximum(rows, 0), axis=0)
        found[rows == PADDING] = of_padding
        return found.view(values.dtype)

    return [of_rank(rows) for rows in table]


def identity(case: Case, row: int) -> tuple[int, int, int]:
    """(source rank, token, k) of a row number."""
    p, t, k = np.unravel_index(row, (case.ranks, max(case.tokens, 1), case.top_k))
    return int(p), int(t), int(k)
