"""`bench`: its floors add up, its baselines compute what ours do, and every figure asked for comes out."""

import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_impl.grouping import Capacity
from parity import bench_jax, bench_torch
from parity.bench import DIRECTIONS, STAGES, Figure, Plan, draw_routing, row_passes, run_bench
from parity.case import Case
from parity.peers import JAX_PEERS, TORCH_PEERS, find_peers
from parity.report.bench import plot_bench

TINY = Case("tiny", ranks=2, tokens=16, width=8, hidden=8, experts=4, top_k=2, capacity_factor="1")


def test_floors_are_those_of_the_formula():
    T, N = 10, 30
    assert row_passes("whole", "forward", T, N) == 6 * N + 2 * T
    assert row_passes("whole", "forward+backward", T, N) == (6 * N + 2 * T) + (7 * N + 2 * T)
    for direction in DIRECTIONS:
        assert sum(row_passes(s, direction, T, N) for s in STAGES) == row_passes("whole", direction, T, N)


def test_routing_repeats_and_a_token_s_experts_differ():
    score_TK, ids_TK, counts_E = draw_routing(TINY, seed=3)
    assert all(len(set(row)) == TINY.top_k for row in ids_TK.tolist())
    assert counts_E.sum() == TINY.assignments
    np.testing.assert_array_equal(ids_TK, draw_routing(TINY, seed=3)[1])
    assert (score_TK != draw_routing(TINY, seed=4)[0]).any()


def test_torch_baseline_computes_the_same():
    assert_same_movement(bench_torch.PLAIN)


def assert_same_movement(movement):
    score_TK, ids_TK, counts_E = (torch.from_numpy(a) for a in draw_routing(TINY, seed=0))
    x_TD = torch.randn(TINY.tokens, TINY.width, requires_grad=True)
    score_TK.requires_grad_()
    results = []
    for m in (bench_torch.OURS, movement):
        scores, ids, counts, counts_Pe = m.prepare(score_TK, ids_TK, counts_E, counts_E.reshape(TINY.ranks, -1))
        x_ND, slot, assignment = m.group_by_expert(x_TD, ids, counts)
        x_RD, source, target = m.to_expert_major(x_ND, counts_Pe)
        out_TD = m.combine(m.to_rank_major(x_RD, source, target), scores, slot, assignment)
        results.append((x_ND, x_RD, out_TD, *torch.autograd.grad(out_TD.square().sum(), (x_TD, score_TK))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows_per_bin", [TINY.assignments, 12])
def test_jax_baseline_computes_the_same(rows_per_bin):
    score_TK, ids_TK, counts_E = (jnp.asarray(a) for a in draw_routing(TINY, seed=0))
    capacity = Capacity(TINY.ranks, rows_per_bin)
    x_TD = jnp.asarray(np.random.default_rng(0).standard_normal((TINY.tokens, TINY.width), np.float32))
    outs = []
    for movement in (bench_jax.OURS, bench_jax.PLAIN):
        x_BCD, slot_TK, assignment, *_ = movement.group_by_expert(x_TD, ids_TK, score_TK, counts_E, capacity)
        kept_Pe = jnp.zeros(4, int).at[ids_TK.reshape(-1)].add((slot_TK < 2 * rows_per_bin).reshape(-1)).reshape(2, 2)
        x_SD, source, target = movement.to_expert_major(x_BCD, kept_Pe)
        y_BCD = movement.to_rank_major(x_SD, source, target)
        outs.append((x_BCD, x_SD, y_BCD, movement.combine(y_BCD, score_TK, slot_TK, assignment)))
    for ours, plain in zip(*outs, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


# What peers offer, as far as it is called, in the fewest words.
FAKES = {
    "megatron/core/transformer/moe/moe_utils.py": """
import torch

def permute(tokens, routing_map, num_out_tokens):
    token_N = routing_map.T.nonzero()[:, 1]
    assert len(token_N) == num_out_tokens
    return tokens[token_N], None, token_N, None, None

def unpermute(permuted, token_N, restore_shape, probs, routing_map):
    return torch.zeros(restore_shape).index_add(0, token_N, permuted * probs.T[routing_map.T][:, None])

def sort_chunks_by_idxs(rows, sizes, order):
    chunks = rows.split(sizes.tolist())
    return torch.cat([chunks[i] for i in order]), None
""",
    "tokamax/__init__.py": "from jax.lax import ragged_dot",
}


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    for name, text in FAKES.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "tokamax")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "tokamax")]:
        del sys.modules[name]


def test_a_peer_is_found_where_it_is_installed_and_computes_the_same(fake_peers, capsys):
    assert_same_movement(find_peers("torch", TORCH_PEERS)["megatron"])
    x_RD, *weights = (jnp.asarray(np.random.default_rng(0).standard_normal(s)) for s in ((6, 4), *[(2, 4, 4)] * 3))
    counts_e = jnp.asarray([2, 4])
    theirs = find_peers("jax", JAX_PEERS)["tokamax"](x_RD, counts_e, *weights)
    np.testing.assert_allclose(theirs, bench_jax.apply_experts(x_RD, counts_e, *weights), rtol=1e-5)
    assert find_peers("jax", {"nobody_has_this": pytest.fail}) == {}
    assert capsys.readouterr().out == ""


def test_a_peer_that_does_not_import_is_said_to(fake_peers, capsys):
    (fake_peers / "tokamax/__init__.py").write_text("raise ImportError('needs another jax')")
    assert find_peers("jax", JAX_PEERS) == {}
    assert "tokamax" in (line := capsys.readouterr().out)
    assert "ImportError: needs another jax" in line


def test_every_figure_comes_out_with_its_floor(fake_peers):
    plan = Plan(shapes=(TINY,), parts=("whole", "experts"), dtype="float32", compiled=False, seconds=0.001)
    figures = [f for f in run_bench(plan) if f.variant != "transformer_engine"]  # found on a GPU
    assert [f.error for f in figures if f.error] == []
    found = [(f.side, f.variant, f.direction) for f in figures if f.part == "whole"]
    variants = [("torch", "ours"), ("torch", "plain"), ("torch", "megatron"), ("jax", "ours"), ("jax", "plain")]
    assert found == [(*variant, d) for variant in variants for d in DIRECTIONS]
    experts = ["grouped_mm", "einsum over expert bins", "rank bins", "rank bins, tokamax"]
    found = [(f.variant, f.direction) for f in figures if f.part == "experts"]
    assert found == [(variant, d) for variant in experts for d in DIRECTIONS]
    assert [f.side for f in figures if f.part == "copy"] == ["torch", "jax"]
    assert all(f.share and f.floor and f.low <= f.median <= f.high for f in figures if f.part == "whole")


def test_every_figure_across_ranks_comes_out_with_what_left_the_rank(tmp_path):
    plan = Plan(shapes=(TINY,), parts=("exchange", "whole"), seconds=0.001, ranks=2)
    figures = list(run_bench(plan))
    assert [f.error for f in figures if f.error] == []
    found = [(f.side, f.part, f.direction) for f in figures if f.shape]
    assert found == [(s, p, d) for s in ("torch", "jax") for p in ("exchange", "whole") for d in DIRECTIONS]
    leaving = TINY.assignments // 2 * TINY.width * 2  # half of the rows, in bfloat16
    assert [f.link_bytes // leaving for f in figures if f.shape] == [1, 2, 2, 4] * 2
    plot_bench(
        [*figures, Figure("tiny", "torch", "ours", "whole", "forward", 1, 1, 1, 1, share=0.5)], tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 1000
