"""A whole layer in PyTorch, timed: a process per rank, the first prints its figure."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from parity.bench.in_torch import RUNS_TOGETHER, join_ranks, start_ranks
from parity.bench.in_torch import measure as timed
from parity.bench.plan import Plan as Timing
from parity.bench.plan import emit
from parity.run.supervisor import end_with_parent
from parity.study.layers import Plan, routing_of
from torch_impl import Router, direct, moe_layer, static
from torch_impl.routing import Routing, count_per_expert


def one_rank(rank: int, plan: Plan, address: str) -> None:
    """The layer forward and backward, over and over."""
    case = plan.case
    if case.ranks > 1:
        device = join_ranks(rank, case.ranks, address)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, e = getattr(torch, case.dtype), case.experts // case.ranks
    torch.manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) / shape[-2] ** 0.5).to(dtype)

    x, dout = draw(case.tokens, case.width), draw(case.tokens, case.width)
    weights = [
        draw(e, *shape).requires_grad_() for shape in ((case.width, case.hidden),) * 2 + ((case.hidden, case.width),)
    ]
    router = torch.zeros(case.width, case.experts, device=device)
    step = routing_of(plan)
    ids, score = (torch.from_numpy(a[0, rank]).to(device) for a in (step.expert_id, step.score))
    chosen = Routing(score.requires_grad_(), ids, count_per_expert(ids, case.experts))
    leaves = (x.requires_grad_(), chosen.score_TK, *weights)
    layer: Callable[..., Any] = moe_layer
    if plan.layout == "static":
        capacity = static.plan_capacity(plan.factor, case.tokens, case.top_k, case.experts, case.ranks)
        layer = partial(static.moe_layer, capacity=capacity)
    if plan.layout == "direct":
        sizes = (case.tokens, case.top_k, case.experts, case.width)
        layer = partial(direct.moe_layer, buffers=direct.make_buffers(*sizes, dtype, device))

    def run(_: int) -> Any:
        out = layer(x, router, *weights, router=Router(case.top_k), routing=chosen).out_TD
        return torch.autograd.grad(out, leaves, dout)

    figure = timed(Timing(seconds=plan.seconds), device, run, RUNS_TOGETHER if case.ranks > 1 else None)
    if rank == 0:
        emit(figure)
    if case.ranks > 1:
        dist.destroy_process_group()


def main(plan: Plan) -> None:
    """One rank here, several in processes of their own."""
    if plan.case.ranks == 1:
        one_rank(0, plan, "")
    else:
        start_ranks(one_rank, plan, plan.case.ranks)


if __name__ == "__main__":
    end_with_parent()
    main(msgspec.json.decode(sys.argv[1], type=Plan))
