"""What only GPUs can show of the other two corners: no synchronisation, a CUDA graph, the ragged exchange itself."""

import subprocess
import sys

import pytest
import torch
from problems import bits, draw
from test_gpu import synchronisations

import torch_impl.static
from torch_impl.static import Capacity

pytestmark = pytest.mark.gpu

T, K, E = 512, 4, 16
PROBLEM = draw(P=1, T=T, D=256, F=512, E=E, K=K)
every_kind = pytest.mark.parametrize(
    "capacity",
    [Capacity(bins, T * K // bins, priority) for bins in (1, E) for priority in ("token", "choice", "score")],
)


def inputs() -> list[torch.Tensor]:
    tensors = (PROBLEM.x_PTD[0], PROBLEM.router_DE, *PROBLEM.weights)
    return [a.to("cuda", torch.float32 if i == 1 else torch.bfloat16).requires_grad_() for i, a in enumerate(tensors)]


def step(leaves: list[torch.Tensor], dout: torch.Tensor, capacity: Capacity) -> tuple:
    x, router, gate, up, down = leaves
    stages = torch_impl.static.moe_layer(x, router, gate, up, down, torch_impl.Router(K), capacity=capacity)
    return stages.out_TD.detach(), stages.dropped, *torch.autograd.grad(stages.out_TD, leaves, dout)


@every_kind
def test_no_synchronisation(capacity):
    leaves, dout = inputs(), PROBLEM.dout_PTD[0].to("cuda", torch.bfloat16)
    step(leaves, dout, capacity)
    assert synchronisations(lambda: step(leaves, dout, capacity)) == 0
    assert synchronisations(lambda: leaves[0].sum().item()) == 1  # a guard on the counter


@every_kind
def test_a_cuda_graph_holds_forward_and_backward(capacity):
    """Captured on one input, replayed on another: the same bits as without a graph."""
    leaves, dout = inputs(), PROBLEM.dout_PTD[0].to("cuda", torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(leaves, dout, capacity)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, dout, capacity)
    with torch.no_grad():
        leaves[0].copy_(-leaves[0].flip(0))  # other tokens, to other experts
    expected = step(leaves, dout, capacity)
    graph.replay()
    torch.cuda.synchronize()
    assert bits([a.float().cpu() for a in captured]) == bits([a.float().cpu() for a in expected])


def check(*arguments: str) -> None:
    command = [sys.executable, "-m", "parity", "check", "--device", "cuda", "--no-json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr


def test_check_of_static_pytorch():
    check(
        "zipf",
        "drop-rank-score",
        "drop-expert-choice",
        "bfloat16-drop",
        "--backend",
        "both",
        "--backend",
        "torch-static",
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_check_of_all_four_corners(ranks):
    """The ragged exchange needs a GPU a rank."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and there are {torch.cuda.device_count()}: run it where there are")
    corners = ("--backend", "both", "--backend", "torch-static", "--backend", "jax-dynamic")
    check("zipf", "drop-rank-score", "bfloat16", "--ranks", str(ranks), *corners)
