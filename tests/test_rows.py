"""Which row lies where: by hand in a tiny case, and what holds of every case."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.cases.case import Case
from parity.oracle import reference
from parity.oracle.quantities import SEEN
from parity.oracle.rows import PADDING, Layout, identity, indices, lay_out, positions, row_tables, straight

# Two ranks, two experts on each, two tokens that choose two: rows 0-3 come from rank 0, rows 4-7 from rank 1.
#
#     row      0  1  2  3 | 4  5  6  7        rank bins of 2: rows 3 and 7 come third and are dropped
#     expert   2  0  1  0 | 0  3  3  2        expert bins of 1: rows 3 and 6 come second

_ = PADDING
EXPERT_ID = np.array([[[2, 0], [1, 0]], [[0, 3], [3, 2]]])
KEEP = {"rank": [1, 1, 1, 0, 1, 1, 1, 0], "expert": [1, 1, 1, 0, 1, 1, 0, 1]}
PER_RANK = Case(ranks=2, tokens=2, experts=4, capacity_factor="1")
PER_EXPERT = Case(ranks=2, tokens=2, experts=4, capacity_factor="1", capacity_per="expert")


def tables(case: Case, layout: Layout) -> dict[str, list[np.ndarray]]:
    keep = np.array(KEEP[case.capacity_per], bool).reshape(2, 2, 2)
    np.testing.assert_array_equal(keep, reference.keep_within_capacity(case, EXPERT_ID, np.zeros((2, 2, 2))))
    return row_tables(case, EXPERT_ID, keep, layout)


@pytest.mark.parametrize(
    ("case", "layout", "grouped", "received", "expert_major"),
    [
        (PER_RANK, "dynamic",
            [[1, 3, 2, 0], [4, 7, 5, 6]], [[1, 3, 2, 4], [0, 7, 5, 6]], [[1, 3, 4, 2], [0, 7, 5, 6]]),
        (PER_RANK, "ragged",
            [[1, 3, 2, 0], [4, 7, 5, 6]], [[1, 3, 2, 4, _, _, _, _], [0, 7, 5, 6, _, _, _, _]],
            [[1, 3, 4, 2, _, _, _, _], [0, 7, 5, 6, _, _, _, _]]),
        (PER_RANK, "direct",
            [[1, 3, 2, 0], [4, 7, 5, 6]], [[1, 3, 2, 4], [0, 7, 5, 6]],
            [[1, 3, 4, 2, _, _, _, _], [0, 7, 5, 6, _, _, _, _]]),
        (PER_RANK, "static",
            [[1, 2, 0, _], [4, _, 5, 6]], [[1, 2, 4, _], [0, _, 5, 6]], [[1, 4, 2, _], [0, 5, 6, _]]),
        (PER_EXPERT, "static",
            [[1, 2, 0, _], [4, _, 7, 5]], [[1, 2, 4, _], [0, _, 7, 5]], [[1, 4, 2, _], [0, 7, _, 5]]),
    ],
    ids=["dynamic", "ragged", "direct", "rank-bins", "expert-bins"],
)  # fmt: skip
def test_tables_by_hand(case, layout, grouped, received, expert_major):
    got = {order: [rows.tolist() for rows in per_rank] for order, per_rank in tables(case, layout).items()}
    assert got == {"grouped": grouped, "received": received, "expert_major": expert_major}


@pytest.mark.parametrize(
    ("case", "layout", "rank", "slot", "assignment", "source", "target"),
    [
        (PER_RANK, "dynamic", 0, [[3, 0], [2, 1]], [1, 3, 2, 0], [0, 1, 3, 2], [0, 1, 3, 2]),
        (PER_RANK, "dynamic", 1, [[0, 2], [3, 1]], [0, 3, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]),
        # 4, past the end, where nothing is: an assignment without a slot, a slot without an assignment
        (PER_RANK, "static", 0, [[2, 0], [1, 4]], [1, 2, 0, 4], [0, 2, 1, 4], [0, 2, 1, 4]),
        (PER_RANK, "static", 1, [[0, 2], [3, 4]], [0, 4, 1, 2], [0, 2, 3, 4], [0, 4, 1, 2]),
        (PER_EXPERT, "static", 1, [[0, 3], [4, 2]], [0, 4, 3, 1], [0, 2, 4, 3], [0, 4, 1, 3]),
    ],
)
def test_indices_by_hand(case, layout, rank, slot, assignment, source, target):
    got = {name: a.tolist() for name, a in indices(case, tables(case, layout), rank).items()}
    assert got == {"slot": slot, "assignment": assignment, "source": source, "target": target}


def test_an_expert_bin_with_room():
    case = Case(ranks=1, tokens=1, experts=2, top_k=1, capacity_factor="6", capacity_per="expert")
    got = row_tables(case, np.array([[[1]]]), np.array([[[True]]]), "static")
    assert [rows.tolist() for (rows,) in got.values()] == [[_, _, _, 0, _, _]] * 3


def test_a_token_that_is_padding_is_sent_nowhere_and_ragged_buffers_stay_as_long():
    ids = np.array([[[1]], [[-1]]])
    got = row_tables(Case(ranks=2, tokens=1, experts=2, top_k=1), ids, ids >= 0, "ragged")
    tables = {order: [rows.tolist() for rows in per_rank] for order, per_rank in got.items()}
    assert tables == {"grouped": [[0], [_]], "received": [[_, _], [0, _]], "expert_major": [[_, _], [0, _]]}


def test_where_rows_go_straight():
    """Row 1 lies first on rank 0, row 0 first on rank 1, whose 8 rows come after; row 7 is in rank 1's second slot."""
    found = straight(PER_RANK, tables(PER_RANK, "direct"))
    assert found["place"].tolist() == [8, 0, 3, 1, 2, 10, 11, 9, _]
    assert found["origin"].tolist() == [3, 0, 2, 1, 4, 6, 7, 5, _]
    ids = np.array([[[1]], [[-1]]])
    case = Case(ranks=2, tokens=1, experts=2, top_k=1)
    assert straight(case, row_tables(case, ids, ids >= 0, "direct"))["place"].tolist() == [2, _, _]


def test_positions():
    assert positions(np.array([7, _, 3, 9]), np.array([3, _, 7])).tolist() == [2, 3, 0, 3]


def test_values_are_laid_out_with_padding():
    values = np.array([[0.0, 0.5], [1, 1.5], [2, 2.5]], np.float32)
    first, second, none = lay_out(values, [np.array([2, _, 0]), np.array([_]), np.array([], np.int64)], np.nan)
    np.testing.assert_array_equal(first, [[2, 2.5], [np.nan, np.nan], [0, 0.5]])
    np.testing.assert_array_equal(second, [[np.nan, np.nan]])
    assert none.shape == (0, 2)
    assert first.dtype == second.dtype == none.dtype == np.float32


def test_identity():
    case = Case(ranks=2, tokens=3, experts=4, top_k=2)
    assert [identity(case, row) for row in (0, 1, 2, 5, 6, 11)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 2, 1)
    ]  # fmt: skip


# ---- Of every case


@st.composite
def routed(draw: st.DrawFn) -> tuple[Case, np.ndarray, np.ndarray]:
    """A case, expert ids and what its capacity keeps."""
    P, e, T = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 5))
    case = Case(
        ranks=P, tokens=T, experts=P * e, top_k=draw(st.integers(1, min(P * e, 3))),
        capacity_factor=draw(st.sampled_from([None, "1/4", "1/2", "1", "5/3"])),
        capacity_per=draw(st.sampled_from(["rank", "expert"])), align=draw(st.integers(1, 3)),
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ids = rng.permuted(np.tile(np.arange(P * e), (P, T, 1)), axis=2)[..., : case.top_k]
    return case, ids, reference.keep_within_capacity(case, ids, rng.random(ids.shape))


layouts = pytest.mark.parametrize("layout", SEEN)


@layouts
@given(routed())
def test_every_kept_row_once_in_order_where_it_belongs(layout, problem):
    case, ids, keep = problem
    there = np.flatnonzero(keep | (layout != "static")).tolist()
    e, N = case.experts // case.ranks, case.tokens * case.top_k
    expert = ids.reshape(-1)
    sorts = {
        "grouped": lambda row: (row // N, expert[row], row),
        "received": lambda row: (expert[row] // e, row // N, expert[row], row),
        "expert_major": lambda row: (expert[row] // e, expert[row], row // N, row),
    }
    for order, per_rank in row_tables(case, ids, keep, layout).items():
        rows = np.concatenate(per_rank)
        assert rows[rows != PADDING].tolist() == sorted(there, key=sorts[order])
        for rank, mine in enumerate(per_rank):  # the first of the sort's keys is the rank that holds the row
            assert {sorts[order](row)[0] for row in mine[mine != PADDING]} <= {rank}


@given(routed())
def test_padding_comes_last_in_every_bin(problem):
    case, ids, keep = problem
    C, P = case.capacity, case.ranks
    for order, per_rank in row_tables(case, ids, keep, "static").items():
        bin_size = P * C if order == "expert_major" and case.bins == P else C
        for rows in per_rank:
            assert rows.size == case.bins * C
            padding = rows.reshape(-1, bin_size) == PADDING
            assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    grouped = row_tables(case, ids, keep, "static")["grouped"]
    for b, rows in enumerate(np.concatenate(grouped).reshape(-1, C)):
        chosen = ids.reshape(-1)[rows[rows != PADDING]]
        assert (chosen * case.bins // case.experts == b % case.bins).all()


@layouts
@given(routed())
def test_indices_undo_each_other(layout, problem):
    case, ids, keep = problem
    table = row_tables(case, ids, keep, layout)
    N = case.tokens * case.top_k
    for rank in range(case.ranks):
        grouped, received, major = (table[order][rank] for order in ("grouped", "received", "expert_major"))
        found = indices(case, table, rank)
        has_slot = (keep | (layout != "static"))[rank].reshape(-1)
        slot, assignment = found["slot"].reshape(-1), found["assignment"]
        assert (grouped[slot[has_slot]] == rank * N + np.flatnonzero(has_slot)).all()
        assert (assignment[slot[has_slot]] == np.flatnonzero(has_slot)).all()
        assert (slot[~has_slot] == grouped.size).all()
        assert (assignment[grouped == PADDING] == N).all()
        for there, back, among, rows in (("source", "target", received, major), ("target", "source", major, received)):
            real = rows != PADDING
            assert (among[found[there][real]] == rows[real]).all()
            assert (found[back][found[there][real]] == np.flatnonzero(real)).all()
            assert (found[there][~real] == among.size).all()


@layouts
@given(routed())
def test_what_is_laid_out_is_found_again(layout, problem):
    case, ids, keep = problem
    values = np.random.default_rng(0).standard_normal((ids.size, 2))
    for per_rank in row_tables(case, ids, keep, layout).values():
        back = np.zeros(values.shape)
        for rows, laid_out in zip(per_rank, lay_out(values, per_rank, np.nan), strict=True):
            assert np.isnan(laid_out[rows == PADDING]).all()
            back[rows[rows != PADDING]] = laid_out[rows != PADDING]
        there = (keep | (layout != "static")).reshape(-1, 1)
        np.testing.assert_array_equal(back, np.where(there, values, 0))
