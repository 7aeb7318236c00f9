"""Any number of ranks computes the same: real processes in PyTorch, shard_map and vmap in JAX."""

import numpy as np
import pytest
import torch
from jax_ranks import capacity_of, run_problem
from problems import STANDARD, bits, close, dense, draw, gamma, who_stays, within
from torch_ranks import TorchRanks, layer_arguments, run_layer, second_gradients

from jax_impl import Capacity
from torch_impl import Router, static


@pytest.mark.parametrize(
    ("sizes", "ids"),
    [
        ([5], None),
        ([5, 5], None),
        ([5, 2, 4, 0], None),  # tokens are uneven over the ranks, and one has none
        # All tokens on rank 0, all for experts of rank 1: 0 receives nothing, 1 sends nothing, 2 and 3 do neither.
        ([5, 0, 0, 0], [[3, 2]] * 5),
    ],
)
def test_processes_equal_one_rank(torch_ranks: TorchRanks, sizes, ids):
    """Outputs and gradients, also of a rank that sends or receives nothing, which has to take part all the same."""
    P = len(sizes)
    problem = draw(P, T=5, D=4, F=8, E=8, K=2, renormalize=True, scale=2.5)
    problem = problem if ids is None else problem.with_ids(ids)
    arguments = [layer_arguments(problem, rank, P) for rank in range(P)]
    for of_rank, T in zip(arguments, sizes, strict=True):
        for i in (0, 3, 5):  # x, dout, ids
            of_rank[i] = of_rank[i][:T]
    results = torch_ranks(run_layer, *map(list, zip(*arguments, strict=True)))
    x, dout, ids = (torch.cat([of_rank[i] for of_rank in arguments]) for i in (0, 3, 5))
    expected = dense(x, problem.router_DE, problem.weights, dout, problem.how, ids)
    # No process group here.
    alone, alone_gradients = run_layer(x, problem.router_DE, problem.weights, dout, Router(**problem.how), ids)

    assert [stages.out_TD.shape[0] for stages, _ in results] == sizes
    together = torch.cat([stages.out_TD for stages, _ in results])
    close(together, expected, "out")
    close(alone.out_TD, expected, "out")
    for name in expected.gradients:
        parts = [gradients[name] for _, gradients in results]
        # The router's gradient is the sum over ranks; a token's and an expert's are complete where they live.
        gradient = sum(parts) if name == "router" else torch.cat(parts)
        close(gradient, expected, name)
        close(alone_gradients[name], expected, name)


@pytest.mark.parametrize("capacity", [None, static.Capacity(2, 10), static.Capacity(4, 5)])
def test_a_gradient_of_a_gradient_crosses_ranks_too(torch_ranks: TorchRanks, capacity):
    problem = draw(P=2, T=5, D=4, F=8, E=4, K=2)
    arguments = [[*layer_arguments(problem, rank, 2), capacity] for rank in range(2)]
    results = torch_ranks(second_gradients, *map(list, zip(*arguments, strict=True)))
    x, dout, ids = (torch.cat([of_rank[i] for of_rank in arguments]) for i in (0, 3, 5))
    alone = second_gradients(x, problem.router_DE, problem.weights, dout, Router(**problem.how), ids, None)
    for expected, parts in zip(alone, zip(*results, strict=True), strict=True):
        # Rows that meet in other matmuls are summed in another order, of at most 10 rows, 8 hidden numbers, 4 features.
        # Each is five such sums behind the other; relative to the largest number, as of what they cancel is not known.
        within(torch.cat(parts), expected, gamma(5 * 10, "float64") * float(expected.abs().max()))


def test_a_rank_that_receives_nothing_jax():
    problem = STANDARD.with_ids([[7, 4, 5]] * 6)
    stages, gradients = run_problem(problem, capacity_of(problem, None))
    assert stages.counts_Pe.tolist() == [[[0, 0, 0, 0]] * 2, [[6, 6, 0, 6]] * 2]
    for rank in range(2):
        x, router, _, dout, _, ids = layer_arguments(problem, rank, 2)
        expected = dense(x, router, problem.weights, dout, problem.how, ids, dtype="float32")
        close(stages.out_TD[rank], expected, "out")
    for name in ("w_gate", "w_up", "w_down"):
        assert not gradients[name][0].any()
        assert gradients[name][1].any()


@pytest.mark.parametrize("capacity", [Capacity(2, 9), Capacity(8, 2)])
def test_shard_map_equals_vmap(capacity):
    """Bit for bit. A router of zeros keeps its matmul, which vmap batches and so rounds otherwise, out of dx."""
    problem = STANDARD._replace(router_DE=torch.zeros_like(STANDARD.router_DE))
    stages, gradients = run_problem(problem, capacity, "shard_map")
    mapped_stages, mapped_gradients = run_problem(problem, capacity, "vmap")
    both = gradients.pop("router"), mapped_gradients.pop("router")
    for rank in range(2):
        x, router, _, dout, _, ids = layer_arguments(problem, rank, 2)
        keep = torch.from_numpy(who_stays(ids.numpy(), np.ones(ids.shape), 8, *capacity))
        expected = dense(x, router, problem.weights, dout, problem.how, ids, keep, dtype="float32")
        for drouter_PDE in both:
            close(drouter_PDE[rank], expected, "router")
    assert bits((stages, gradients)) == bits((mapped_stages, mapped_gradients))


def test_one_rank_needs_no_axis():
    problem, capacity = draw(P=1, T=12, D=8, F=8, E=4, K=2), Capacity(1, 24)
    assert bits(run_problem(problem, capacity, "no axis")) == bits(run_problem(problem, capacity, "shard_map"))


def program(what: str, group) -> str:
    if what == "raise":
        raise ValueError("from a rank")
    if what == "exit":
        raise SystemExit
    return what


def test_a_failing_rank_fails_the_test():
    """A guard on the helper: the error arrives, nothing is left running, and the next call starts anew."""
    ranks = TorchRanks()
    with pytest.raises(RuntimeError, match="from a rank"):
        ranks(program, ["fine", "raise"])
    assert not ranks.processes
    with pytest.raises(RuntimeError, match="ended without an answer"):
        ranks(program, ["fine", "exit"])
    assert not ranks.processes
