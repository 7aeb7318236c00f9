"""What ranks run in tests of rows that go straight to their places: beside the readable corner, and on a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from problems import Problem, bits, draw
from torch import Tensor
from torch_ranks import detach

import torch_impl.matmul
import torch_impl.static.matmul
from parity.run.torch_stages import full_of_nan
from torch_impl import Router, Routing, checks, direct, kernels, route
from torch_impl.direct import Buffers
from torch_impl.direct.checks import check_same_offset
from torch_impl.direct.exchange import sends_once
from torch_impl.direct.rows import Arrivals, Buffer, put_rows, put_rows_once
from torch_impl.exchange import n_ranks

Group = dist.ProcessGroup | None
NAN = float("nan")


class Inputs(dict[str, Any]):
    """One rank's part of a problem: leaves by name, expert ids, the output's gradient, and the problem's sizes."""

    def __init__(self, problem: Problem, rank: int, dtype: torch.dtype, tokens: int, device: str = "cpu") -> None:
        P, T, _ = problem.x_PTD.shape
        of_rank = (problem.x_PTD[rank, :tokens], problem.router_DE, *problem.weights_of(rank, P))
        names = ("x", "router", "w_gate", "w_up", "w_down")
        leaves = {name: a.to(device, dtype) for name, a in zip(names, of_rank, strict=True)}
        super().__init__(leaves)
        self.ids = problem.expert_id_PTK[rank, :tokens].to(device)
        self.dout = problem.dout_PTD[rank, :tokens].to(device, dtype)
        self.sizes = (T, self.ids.shape[1], problem.router_DE.shape[1], problem.x_PTD.shape[2])


def buffers_for(inputs: Inputs, group: Group = None) -> Buffers:
    """Full of NaN, which no rank writes over before it is there."""
    x = inputs["x"]
    return full_of_nan(direct.make_buffers(*inputs.sizes, x.dtype, x.device, group))


def step(layer: Callable[..., Any], inputs: Inputs, **how: Any) -> tuple[Any, dict[str, Tensor]]:
    """The layer forward and backward, with the given expert ids: stages, and gradients by name."""
    leaves = {name: a.detach().requires_grad_() for name, a in inputs.items()}
    router = Router(inputs.ids.shape[1])
    routing = route(leaves["x"], leaves["router"], router, expert_id_TK=inputs.ids)
    stages = layer(*leaves.values(), router=router, routing=routing, **how)
    wanted = leaves | {"score": routing.score_TK}
    gradients = torch.autograd.grad(stages.out_TD, list(wanted.values()), inputs.dout)
    return stages, dict(zip(wanted, gradients, strict=True))


def both_corners(inputs: Inputs, steps: int, group: Group) -> list[tuple]:
    """Output and gradients of the readable corner, and of this one, of each of several steps with the same buffers."""
    stages, gradients = step(torch_impl.moe_layer, inputs, group=group)
    results, buffers = [(stages.out_TD.detach(), gradients)], buffers_for(inputs, group)
    (T, K, E, _), P = inputs.sizes, n_ranks(group)
    assert (buffers.arrivals is not None) == sends_once(P, K)
    assert buffers.placed_RD.own_OD.shape[0] == P * T * min(K, E // P)
    with products_of_as_many_rows() if inputs["x"].dtype == torch.float32 else nullcontext():
        for _ in range(steps):
            stages, gradients = step(direct.moe_layer, inputs, buffers=buffers)
            results.append((stages.out_TD.detach(), gradients))
    return results


@contextmanager
def products_of_as_many_rows() -> Iterator[None]:
    """Each expert's rows are multiplied as in the readable corner; rows past them hold NaN, also backward."""
    plain = torch_impl.static.matmul.grouped_matmul

    def product(x_RD: Tensor, w_eDF: Tensor, counts_e: Tensor) -> Tensor:
        y_RF = torch_impl.matmul.grouped_matmul(x_RD[: int(counts_e.sum())], w_eDF, counts_e)
        return torch.cat([y_RF, y_RF.new_full((x_RD.shape[0] - y_RF.shape[0], y_RF.shape[1]), NAN)])

    torch_impl.static.matmul.grouped_matmul = product
    yield
    torch_impl.static.matmul.grouped_matmul = plain


def with_any_ids(inputs: Inputs, group: Group) -> tuple[Any, dict[str, Tensor]]:
    """A step whose ids are not looked at, as on a GPU."""
    looked_at = checks.check_expert_ids
    checks.check_expert_ids = lambda *_: None
    try:
        stages, gradients = step(direct.moe_layer, inputs, buffers=buffers_for(inputs, group))
    finally:
        checks.check_expert_ids = looked_at
    return detach(stages), gradients


def put(x_MD: Tensor, place_MK: Tensor, n_rows: int, score_MK: Tensor | None, group: Group) -> Tensor:
    """This rank's rows once all ranks have put theirs; those that nobody has are NaN."""
    part = Buffer(x_MD.new_full((n_rows, x_MD.shape[1]), NAN), None, None, group, n_ranks(group))
    put_rows(x_MD, place_MK, part, score_MK)
    return part.own_OD


def put_once(x_TD: Tensor, place_TK: Tensor, n_rows: int, score_TK: Tensor | None, group: Group) -> Tensor:
    """The same where each token goes to a rank once; up to six tokens of a rank."""
    P = n_ranks(group)

    def part(rows: int, columns: int, dtype: torch.dtype, writers: int = P) -> Buffer:
        return Buffer(torch.full((rows, columns), -77, dtype=dtype), None, None, group, writers)

    arrivals = Arrivals(
        part(6 * P, x_TD.shape[1], x_TD.dtype),
        part(6 * P, place_TK.shape[1], torch.int64),
        part(6 * P, place_TK.shape[1], torch.float32),
    )
    placed = part(n_rows, x_TD.shape[1], x_TD.dtype, 1)
    placed.own_OD.fill_(NAN)
    put_rows_once(x_TD, place_TK, placed, arrivals, dist.get_rank(group) if P > 1 else 0, score_TK)
    return placed.own_OD


def different_sizes(tokens: int, experts: int, dtype: torch.dtype, group: Group) -> str:
    try:
        direct.make_buffers(tokens, 2, experts, 4, dtype, torch.device("cpu"), group)
    except ValueError as error:
        return str(error)
    return ""


def different_offsets(offset: int, group: Group) -> str:
    try:
        check_same_offset(offset, n_ranks(group), group)
    except RuntimeError as error:
        return str(error)
    return ""


# ---- On a GPU, which several ranks may share


def on_gpu(rank: int, P: int, store: str, one_gpu: bool) -> None:
    """Everything that needs kernels and barriers, on one of P ranks; raises AssertionError where it is wrong."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # not used here, and not to be had everywhere
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = str(int(one_gpu))  # of one GPU, for several ranks
    torch.cuda.set_device(0 if one_gpu else rank)
    backend = "gloo" if one_gpu else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=P, timeout=timedelta(seconds=300)
    )
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    problem = draw(P=P, T=96, D=256, F=128, E=16, K=4)
    tokens = 96 - 9 * rank  # of each rank another number
    inputs = Inputs(problem, rank, torch.bfloat16, tokens, "cuda")
    buffers, puts = buffers_for(inputs), []
    assert (buffers.returned_ND.handle is not None) == (P > 1)

    kernel = kernels.put_rows
    kernels.put_rows = lambda *arguments: (puts.append(arguments), kernel(*arguments))[1]
    stages, gradients = step(direct.moe_layer, inputs, buffers=buffers)
    kernels.put_rows = kernel
    assert len(puts) == (5 if P == 1 else 5 + 5), "counts, tokens, what returns, and two gradients; tokens once"
    assert int(stages.dropped) == 0
    found = bits_of(stages.out_TD, gradients)
    stages, gradients = step(torch_impl.moe_layer, inputs)
    assert found == bits_of(stages.out_TD, gradients), "the readable corner has other bits"

    for _ in range(10):
        stages, gradients = step(direct.moe_layer, inputs, buffers=buffers)
        assert bits_of(stages.out_TD, gradients) == found, "a later step has other bits"

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # what waits raises
    step(direct.moe_layer, inputs, buffers=buffers)
    torch.cuda.set_sync_debug_mode("default")

    inputs.ids[0, 0], inputs.ids[1, 1] = 16, -1
    stages, gradients = step(direct.moe_layer, inputs, buffers=buffers)
    assert int(stages.dropped) == 2
    assert all(a.isfinite().all() for a in (stages.out_TD, *gradients.values()))
    assert gradients["score"][0, 0] == gradients["score"][1, 1] == 0

    captured(inputs, buffers)
    dist.destroy_process_group()


def captured(inputs: Inputs, buffers: Buffers) -> None:
    """A CUDA graph holds a step: captured on some tokens, replayed on others, the bits are those of the eager step."""

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: a.detach().requires_grad_() for name, a in inputs.items()}
        stages = direct.moe_layer(*leaves.values(), router=Router(inputs.ids.shape[1]), buffers=buffers)  # type: ignore[arg-type]
        return stages.out_TD, dict(
            zip(leaves, torch.autograd.grad(stages.out_TD, list(leaves.values()), inputs.dout), strict=True)
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        held = run()
    inputs["x"].copy_(-inputs["x"].flip(0))  # other tokens, to other experts
    expected = bits_of(*run())
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert bits_of(*held) == expected, "the graph's step has other bits"


def bits_of(out: Tensor, gradients: dict[str, Tensor]) -> list[bytes]:
    return bits([a.detach().float().cpu() for a in (out, *gradients.values())])


def routing_of(inputs: Inputs) -> Routing:
    return route(inputs["x"], inputs["router"], Router(inputs.ids.shape[1]), expert_id_TK=inputs.ids)
