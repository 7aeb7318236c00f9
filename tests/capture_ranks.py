"""What the capture tests have PyTorch ranks do: the layer compiled and eager, over many routings."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_impl import layer, layout, routing

T, D, F, E, K = 8, 8, 8, 8, 2


class Compared(NamedTuple):
    """One rank's findings over all routings."""

    rows: list[int]  # received
    moved_differ: int  # tensors that are not the same bits
    error: float  # of out and gradients: the largest, in units of the dtype's rounding times the largest value
    graphs: int
    graph_breaks: int


def routings(P: int, rank: int, n: int) -> list[Tensor]:
    """Expert ids of one rank: where a rank receives everything, nothing or a single row, and then at random."""
    e = E // P
    first = [[0, 1]] * T
    all_but_one = [*first[:-1], [0, e]]  # one row for rank 1
    planted = [first, all_but_one if rank == 0 else first, first]
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K].contiguous() for _ in range(n - len(planted))]
    return [drawn[0], *map(torch.tensor, planted), *drawn[1:]]


def run_both(
    rank: int, P: int, n: int, backend: str, dtype: torch.dtype, on: str, group: dist.ProcessGroup | None
) -> Compared:
    """The layer forward and backward, eager and compiled once, on `n` routings."""
    device = torch.device(on, rank % torch.cuda.device_count()) if on != "cpu" else torch.device("cpu")
    if on == "cuda" and torch.cuda.device_count() >= P:
        torch.cuda.set_device(device)
        group = dist.new_group(dist.get_process_group_ranks(group), backend="nccl", use_local_synchronization=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    e = E // P
    inputs = [normal(T, D), normal(D, E), normal(e, D, F), normal(e, D, F), normal(e, F, D)]

    def moe(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, ids_TK):
        chosen = routing.route(x_TD, router_DE, K, expert_id_TK=ids_TK)
        return layer.moe_layer(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, top_k=K, routing=chosen, group=group)

    compiled = torch.compile(moe, backend=backend, fullgraph=True)
    rows, moved_differ, error = [], 0, 0.0
    for ids_TK in routings(P, rank, n):
        dout_TD = normal(T, D).detach()
        results = []
        for run in (moe, compiled):
            stages = run(*inputs, ids_TK.to(device))
            gradients = torch.autograd.grad(stages.out_TD, inputs, dout_TD)
            results.append((stages, gradients))
        (stages, gradients), (stages_, gradients_) = results
        rows.append(stages_.splits.total)
        moved_differ += sum(not torch.equal(a, b) for a, b in zip(moved(stages), moved(stages_), strict=True))
        for a, b in zip((stages.out_TD, *gradients), (stages_.out_TD, *gradients_), strict=True):
            scale = torch.finfo(dtype).eps * float(a.detach().abs().max().clamp(min=1))
            error = max(error, float((a.detach() - b.detach()).abs().max()) / scale)
    counters = torch._dynamo.utils.counters
    return Compared(
        rows, moved_differ, error, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    )


def moved(stages: layer.Stages) -> list[Tensor]:
    """What stages 2 to 5 moved, whose bits no arithmetic has touched."""
    return [
        stages.grouped.x_ND, stages.grouped.slot_TK, stages.counts_Pe, stages.splits.send_P, stages.splits.receive_P,
        stages.received_RD, *stages.expert_major,
    ]  # fmt: skip


def uneven(T_here: int, backend: str, group: dist.ProcessGroup | None) -> bool:
    """Whether the compiled layer equals the eager one where ranks have different numbers of tokens."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    P = dist.get_world_size(group)
    weights = [torch.randn(E // P, D, F) for _ in range(3)]
    x_TD, router_DE = torch.randn(T_here, D), torch.randn(D, E)

    def moe(x_TD, router_DE, *weights):
        return layer.moe_layer(x_TD, router_DE, *weights, top_k=K, max_tokens=T, group=group).out_TD

    expected = moe(x_TD, router_DE, *weights)
    return torch.equal(torch.compile(moe, backend=backend, fullgraph=True)(x_TD, router_DE, *weights), expected)


def permute_of(n: int, output_size: int | None, backend: str, _: Any) -> list[float]:
    """Compile a permute of `n` rows, a number that the compiler does not know, by counts that add up to six; run it."""
    torch._dynamo.reset()

    def permute(x_RD: Tensor, n: Tensor, counts_Pe: Tensor) -> Tensor:
        rows = n.item()
        torch._check(rows >= 0)
        torch._check(rows <= 16)
        return layout.to_expert_major(x_RD[:rows], counts_Pe, output_size).x_RD

    run = torch.compile(permute, backend=backend, fullgraph=True)
    return run(torch.arange(16.0)[:, None], torch.tensor(n), torch.tensor([[2, 3, 1]])).flatten().tolist()


def ids_out_of_range(backend: str, group: dist.ProcessGroup | None) -> None:
    """Compile the layer and choose an expert that does not exist; ids are not read under capture."""
    torch._dynamo.reset()
    x_TD, router_DE, weights = torch.randn(T, D), torch.randn(D, E), [torch.randn(E, D, F) for _ in range(3)]

    def moe(x_TD, router_DE, ids_TK, *weights):
        score_TK = ids_TK.float()
        chosen = routing.Routing(score_TK, ids_TK, routing.count_per_expert(ids_TK, E))
        return layer.moe_layer(x_TD, router_DE, *weights, top_k=K, routing=chosen, group=group).out_TD

    ids_TK = torch.tensor([[0, 1]] * T)
    run = torch.compile(moe, backend=backend, fullgraph=True)
    run(x_TD, router_DE, ids_TK, *weights)
    ids_TK[3, 1] = E
    run(x_TD, router_DE, ids_TK, *weights)
