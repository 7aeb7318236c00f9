"""`bench`: its floors add up, its baselines compute what ours do, and every figure asked for comes out."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_impl.grouping import Capacity
from parity import bench_jax, bench_torch
from parity.bench import DIRECTIONS, STAGES, Figure, Plan, draw_routing, row_passes, run_bench
from parity.case import Case
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
    score_TK, ids_TK, counts_E = (torch.from_numpy(a) for a in draw_routing(TINY, seed=0))
    counts_Pe = counts_E.reshape(TINY.ranks, -1)
    x_TD = torch.randn(TINY.tokens, TINY.width, requires_grad=True)
    score_TK.requires_grad_()
    results = []
    for movement in (bench_torch.OURS, bench_torch.PLAIN):
        x_ND, slot, assignment = movement.group_by_expert(x_TD, ids_TK, counts_E)
        x_RD, source, target = movement.to_expert_major(x_ND, counts_Pe)
        out_TD = movement.combine(movement.to_rank_major(x_RD, source, target), score_TK, slot, assignment)
        results.append((x_ND, x_RD, out_TD, *torch.autograd.grad(out_TD.square().sum(), (x_TD, score_TK))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


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


def test_every_figure_comes_out_with_its_floor():
    plan = Plan(shapes=(TINY,), parts=("whole",), compiled=False, seconds=0.001)
    figures = list(run_bench(plan))
    found = [(f.side, f.variant, f.direction) for f in figures if f.part == "whole"]
    assert found == [(side, v, d) for side in ("torch", "jax") for v in ("ours", "plain") for d in DIRECTIONS]
    assert [f.side for f in figures if f.part == "copy"] == ["torch", "jax"]
    assert all(f.share and f.floor and f.low <= f.median <= f.high for f in figures)


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
