"""2 then 9, 4 then 8, 5 then 7 put every row back where it was, bit for bit, whatever the routing.

The routing is drawn, the shapes are fixed, so JAX compiles once. In JAX the rows that were kept come back, and every
padding row is poisoned with NaN on the way: 0 * NaN is NaN, so a padding row that gets anywhere shows.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax_ranks import AXIS, over_ranks
from problems import close, dense_experts, who_stays
from torch_ranks import TorchRanks, run_exchange

from jax_impl import Capacity
from jax_impl.exchange import exchange_counts, return_tokens, send_tokens
from jax_impl.experts import apply_experts as apply_experts_jax
from jax_impl.grouping import combine as combine_jax
from jax_impl.grouping import group_by_expert as group_by_expert_jax
from jax_impl.layout import to_expert_major as to_expert_major_jax
from jax_impl.layout import to_rank_major as to_rank_major_jax
from jax_impl.routing import count_per_expert
from torch_impl.experts import apply_experts
from torch_impl.grouping import combine, group_by_expert
from torch_impl.layout import to_expert_major, to_rank_major

T, K, E, P, D = 5, 3, 6, 2, 4
e = E // P
NAN = float("nan")
X = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
KINDS_OF_BIN = pytest.mark.parametrize("n_bins", [P, E])

# [T, K] experts, a token's all different, and the one choice of each token that gets all the weight.
drawn_ids = st.lists(st.permutations(range(E)).map(lambda order: order[:K]), min_size=T, max_size=T).map(np.array)
drawn_choices = st.lists(st.integers(0, K - 1), min_size=T, max_size=T).map(np.array)
# Rows that each of P ranks sends to each of e experts.
drawn_counts = st.lists(st.lists(st.integers(0, 3), min_size=e, max_size=e), min_size=P, max_size=P).map(np.array)


@given(drawn_ids, drawn_choices)
def test_group_then_combine_torch(ids, chosen):
    """Weight 1 on one choice and 0 on the others: the token itself."""
    counts_E = torch.from_numpy(np.bincount(ids.reshape(-1), minlength=E))
    grouped = group_by_expert(torch.from_numpy(X), torch.from_numpy(ids), counts_E)
    score_TK = torch.eye(K)[torch.from_numpy(chosen)]
    out_TD = combine(grouped.x_ND, score_TK, grouped.slot_TK, grouped.assignment_N)
    np.testing.assert_array_equal(out_TD.numpy(), X)
    # Each row's expert is no lower than the row's before, and the slots name every row once.
    sorted_N = ids.reshape(-1)[grouped.assignment_N.numpy()]
    assert (np.diff(sorted_N) >= 0).all()
    assert sorted(grouped.slot_TK.reshape(-1).tolist()) == list(range(T * K))


@lru_cache
def group_then_combine(capacity: Capacity):
    @jax.jit
    def both(ids, priority_score, weight):
        grouped = group_by_expert_jax(jnp.asarray(X), ids, priority_score, count_per_expert(ids, E), capacity)
        padding_BC = grouped.assignment_BC == T * K
        y_BCD = jnp.where(padding_BC[..., None], NAN, grouped.x_BCD)
        return combine_jax(y_BCD, weight, grouped.slot_TK, grouped.assignment_BC), grouped

    return both


@KINDS_OF_BIN
@pytest.mark.parametrize("priority", ["token", "choice", "score"])
@given(drawn_ids, drawn_choices)
def test_group_then_combine_jax(n_bins, priority, ids, chosen):
    """The token itself where its choice was kept, zero where it was dropped."""
    C = 2
    score = np.random.default_rng(ids.sum()).integers(0, 3, (T, K)).astype(np.float32)  # with ties
    out_TD, grouped = group_then_combine(Capacity(n_bins, C, priority))(ids, score, np.eye(K, dtype=np.float32)[chosen])
    keep = who_stays(ids, score, E, n_bins, C, priority)
    np.testing.assert_array_equal(out_TD, np.where(keep[np.arange(T), chosen][:, None], X, 0))
    np.testing.assert_array_equal(grouped.slot_TK == n_bins * C, ~keep)
    np.testing.assert_array_equal(grouped.kept_E, np.bincount(ids[keep], minlength=E))
    assert not np.asarray(grouped.x_BCD)[grouped.assignment_BC == T * K].any()  # padding is exactly zero


@pytest.mark.parametrize("n_ranks", [2, 4])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_send_then_return_torch(torch_ranks: TorchRanks, n_ranks, data):
    """Over real processes, some of which may send or receive nothing."""
    counts = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=n_ranks, max_size=n_ranks)
    )
    rows = [torch.rand(sum(of_rank), D) + rank for rank, of_rank in enumerate(counts)]
    results = torch_ranks(run_exchange, rows, [torch.tensor(c) for c in counts], [None] * n_ranks)
    for rank, (result, sent, of_rank) in enumerate(zip(results, rows, counts, strict=True)):
        assert torch.equal(result.returned_ND, sent)
        assert torch.equal(result.dx_ND, sent)  # what came in was sent back as the gradient
        assert torch.equal(result.dreceived_RD, result.received_RD)
        assert sum(of_rank) == result.splits.send_P.sum() == result.splits.n_sent
        experts = slice(rank * 8 // n_ranks, (rank + 1) * 8 // n_ranks)
        assert result.counts_Pe.tolist() == [source[experts] for source in counts]
        assert result.splits.n_received == result.counts_Pe.sum() == result.received_RD.shape[0]


@pytest.mark.parametrize("bins_per_rank", [1, e])
def test_send_then_return_jax(bins_per_rank):
    """Bins are sent whole, padding and all, so no routing matters."""

    def there_and_back(x):
        return return_tokens(send_tokens(x, AXIS), AXIS)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4 * bins_per_rank, 3, D)), jnp.float32)
    back, vjp = jax.vjp(over_ranks(there_and_back), x)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(vjp(x)[0], x)


@given(drawn_counts)
def test_expert_major_and_back_torch(counts):
    R = int(counts.sum())
    x_RD = torch.arange(R * D, dtype=torch.float32).reshape(R, D).requires_grad_()
    major = to_expert_major(x_RD, torch.from_numpy(counts), R)
    back_RD = to_rank_major(major.x_RD, major.source_R, major.target_R)
    assert torch.equal(back_RD, x_RD)
    assert torch.equal(torch.autograd.grad(back_RD, x_RD, x_RD.detach())[0], x_RD)
    # (source rank, local expert) of each row, in the order of experts.
    rank_major = [(j, p) for p in range(P) for j in range(e) for _ in range(counts[p, j])]
    assert [rank_major[row] for row in major.source_R] == sorted(rank_major)


C_LAYOUT = {P: e * 3, E: 3}  # a bin always has room


@lru_cache
def expert_major_and_back(n_bins: int):
    @jax.jit
    def both(x, counts, cotangent):
        def forward(x):
            major = to_expert_major_jax(x, counts)
            past = jnp.isin(major.source_S, n_bins * C_LAYOUT[n_bins])  # padding
            poisoned = jnp.where(past[..., None], NAN, major.x_SD)
            return to_rank_major_jax(poisoned, major.source_S, major.target_BC), major

        back, vjp, major = jax.vjp(forward, x, has_aux=True)
        return back, major, vjp(cotangent)[0]

    return both


@KINDS_OF_BIN
@given(drawn_counts)
def test_expert_major_and_back_jax(n_bins, counts):
    C = C_LAYOUT[n_bins]
    x = np.arange(1.0, n_bins * C * D + 1, dtype=np.float32).reshape(n_bins, C, D)
    held_B = counts.reshape(n_bins, -1).sum(axis=1)  # rows in each bin, the rest of it is padding
    real_BC1 = (np.arange(C) < held_B[:, None])[..., None]
    poisoned = np.where(real_BC1, x, NAN)
    back, major, dx = expert_major_and_back(n_bins)(poisoned, counts, poisoned)
    np.testing.assert_array_equal(back, np.where(real_BC1, x, 0))
    np.testing.assert_array_equal(dx, np.where(real_BC1, x, 0))
    # What stage 6 gets: each expert's rows by source rank, and zero.
    by_expert = [[row for p in range(P) for row in rows_of(poisoned, counts, p, j)] for j in range(e)]
    if n_bins == P:
        rows = np.array([row for rows in by_expert for row in rows]).reshape(-1, D)
        np.testing.assert_array_equal(major.x_SD[: len(rows)], rows)
        assert not np.asarray(major.x_SD[len(rows) :]).any()
    else:
        for x_SD, rows in zip(np.asarray(major.x_SD), by_expert, strict=True):
            np.testing.assert_array_equal(x_SD[x_SD[:, 0] != 0], np.array(rows).reshape(-1, D))


def rows_of(x_BCD: np.ndarray, counts: np.ndarray, p: int, j: int) -> np.ndarray:
    """The rows from rank p for expert j, where they arrived."""
    if x_BCD.shape[0] == E:
        return x_BCD[p * e + j, : counts[p, j]]
    start = counts[p, :j].sum()
    return x_BCD[p, start : start + counts[p, j]]


F = 4
WEIGHTS = [np.random.default_rng(n).normal(size=shape).astype(np.float32) for n, shape in enumerate([(e, D, F)] * 2)]
WEIGHTS.append(np.random.default_rng(2).normal(size=(e, F, D)).astype(np.float32))
S = 12


@jax.jit
def experts_forward_and_backward(x, counts, dy):
    y, vjp = jax.vjp(lambda *inputs: apply_experts_jax(inputs[0], counts, *inputs[1:]), x, *WEIGHTS)
    return y, vjp(dy)


@given(st.lists(st.integers(0, S // e), min_size=e, max_size=e).map(np.array))
def test_rows_past_the_groups_reach_nothing(counts):
    """Rows past the groups of a bin per rank: they come out as zero, and with them no gradient changes by a bit."""
    rng = np.random.default_rng(counts.sum())
    x, dy = rng.normal(size=(2, S, D)).astype(np.float32)
    real_S1 = (np.arange(S) < counts.sum())[:, None]
    zero = experts_forward_and_backward(np.where(real_S1, x, 0), counts, np.where(real_S1, dy, 0))
    other = experts_forward_and_backward(np.where(real_S1, x, NAN), counts, np.where(real_S1, dy, NAN))
    for a, b in zip(jax.tree.leaves(zero), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    y, (dx, *_) = zero
    assert not np.asarray(y)[~real_S1[:, 0]].any()
    assert not np.asarray(dx)[~real_S1[:, 0]].any()


@given(st.lists(st.integers(0, 3), min_size=e, max_size=e))
def test_each_row_meets_its_own_expert(counts):
    """As dense experts do; both ways PyTorch has (grouped_mm takes no float64)."""
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(sum(counts), D, dtype=dtype)
        gate, up, down = (torch.from_numpy(w).to(dtype) for w in WEIGHTS)
        y = apply_experts(x, torch.tensor(counts), gate, up, down)
        expected = dense_experts(x, torch.tensor(counts), (gate, up, down), str(dtype).removeprefix("torch."))
        close(y, expected, "out")


def test_over_ranks_takes_the_collective():
    """A guard on the helper: the counts of every rank do get to the others."""
    counts = jnp.arange(16).reshape(4, 4)
    sent = over_ranks(partial(exchange_counts, axis_name=AXIS))(counts)
    np.testing.assert_array_equal(sent[:, :, 0], counts.T)
