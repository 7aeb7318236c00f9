"""One symbol, not a sum of P: what a compiler sees of the dynamic path, and that what it makes of it is right."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import capture_ranks
import jax
import jax.numpy as jnp
import pytest
import torch
from capture_ranks import permute_of, run_both, uneven
from jax_ranks import to_jax
from problems import bits, draw
from torch.utils.checkpoint import checkpoint
from torch_ranks import TorchRanks

import jax_impl
import torch_impl
from jax_impl import Capacity
from parity.faults import Fault, plant

RANKS = [2, 4, 64, 1024]
T, K, e = 64, 2, 2  # of the step that parity.capture_torch captures

# In a process of its own, where no shapes are checked at run time: the checks are not the layer's, and do not capture.
CAPTURE = """
import sys, msgspec
from parity.capture_torch import measure
for P in map(int, sys.argv[1:]):
    print(msgspec.json.encode(measure(P, "torch_impl", False)).decode())
"""

WHOLE_LAYER = """
import sys, msgspec, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from parity.capture import Measured
from parity.capture_torch import captured_graphs, describe
from torch_impl import moe_layer
for P in map(int, sys.argv[1:]):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=P)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, router = torch.zeros(8, 16, dtype=dtype).requires_grad_(), torch.zeros(16, 2 * P).requires_grad_()
        weights = [torch.zeros(2, 16, 16, dtype=dtype).requires_grad_() for _ in range(3)]
        found = Measured("torch", str(dtype), P, "layer")
        graphs, _ = captured_graphs(lambda *a: moe_layer(*a, top_k=2).out_TD, x, router, *weights)
        describe(found, graphs)
        print(msgspec.json.encode(found).decode())
    dist.destroy_process_group()
"""


def captured(program: str, *ranks: int, cwd: Path | None = None) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, ranks)], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def one_symbol(found: dict, T: int) -> dict:
    """What is said of a dispatch that is sized by one bounded symbol and waits for the device once."""
    bound = ["0", str(found["ranks"] * T * min(K, e))]
    right = {"symbols": 1, "terms": 1, "permute_terms": 1, "permute_terms_backward": 1, "range": bound, "error": ""}
    return {name: (found[name], value) for name, value in right.items() if found[name] != value}


def test_one_symbol_at_every_size_of_group():
    measured = captured(CAPTURE, *RANKS)
    assert [found["ranks"] for found in measured] == RANKS
    for found in measured:
        assert one_symbol(found, T) == {}
        assert found["syncs"] == 1
    # What the compiler has to look at does not grow with P.
    assert len({(found["nodes"], found["runtime_asserts"], found["symbols_in_all"]) for found in measured}) == 1


def test_one_symbol_in_the_whole_layer():
    measured = captured(WHOLE_LAYER, 4, 1024)
    assert len(measured) == 6
    for found in measured:
        assert one_symbol(found, T=8) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "seen"),
    [
        (
            "exchange", "    sent, total = splits_2P.sum(dim=1).tolist()\n",
            "    sent, total = map(sum, splits_2P.tolist())\n", {"permute_terms", "permute_terms_backward", "terms"},
        ),
        (
            "exchange", "    sent, total = splits_2P.sum(dim=1).tolist()\n",
            "    sent, total = splits_2P[0].sum().item(), counts_Pe.sum().item()\n", {"syncs"},
        ),
        ("layout", ", output_size=output_size)", ")", {"syncs", "symbols"}),
    ],
    ids=["list-sum", "sum-on-the-device", "no-output-size"],
)  # fmt: skip
def test_a_step_back_is_seen(tmp_path, file, old, new, seen):
    fault = Fault("a-step-back", "torch", "exchange_counts", "", f"torch_impl/{file}.py", old, new)
    (found,) = captured(CAPTURE, 4, cwd=plant(fault, tmp_path / "copy"))
    wrong = one_symbol(found, T).keys() | ({"syncs"} if found["syncs"] != 1 else set())
    assert wrong >= seen


def test_a_lost_bound_is_seen(tmp_path):
    fault = Fault("no-bound", "torch", "send_tokens", "", "torch_impl/layer.py", "    check_received(", "    (")
    found = captured(WHOLE_LAYER, 4, cwd=plant(fault, tmp_path / "copy"))[0]
    assert one_symbol(found, T=8) == {"range": (["0", "int_oo"], ["0", "64"])}


def over_ranks(ranks: TorchRanks, P: int, n: int, backend: str, dtype: torch.dtype, on: str = "cpu") -> None:
    """All ranks together: one graph for every routing, the bits of the eager layer where data moves."""
    results = ranks(run_both, list(range(P)), *([value] * P for value in (P, n, backend, dtype, on)))
    for rank, found in enumerate(results):
        assert len(set(found.rows)) > 3
        assert (found.graphs, found.graph_breaks) == (1, 0)  # a recompilation would be one more graph
        assert found.moved_differ == 0
        # The same operations on the same rows: only fusion may round otherwise, by a few units of the largest value.
        assert found.error <= 64, rank
    assert 0 in results[1].rows
    assert 1 in results[1].rows  # neither is a special case to the compiler


@pytest.mark.parametrize(("P", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_one_graph_for_fifty_routings(torch_ranks: TorchRanks, P, dtype):
    over_ranks(torch_ranks, P, 50, "aot_eager", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_graph_for_fifty_routings_inductor(torch_ranks: TorchRanks, dtype):
    over_ranks(torch_ranks, 2, 50, "inductor", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_fifty_routings_gpu(torch_ranks: TorchRanks, backend, dtype):
    """Over NCCL where each rank has a GPU of its own, else over gloo."""
    over_ranks(torch_ranks, 2, 50, backend, dtype, "cuda")


def test_uneven_tokens_with_a_promise(torch_ranks: TorchRanks):
    """The bound on R takes the most tokens of any rank; a rank that has none itself could not know it."""
    assert torch_ranks(uneven, [8, 0], ["aot_eager"] * 2) == [True, True]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_wrong_output_size_is_refused_when_compiled(torch_ranks: TorchRanks, backend):
    run = partial(lambda n, size: torch_ranks(permute_of, [n], [size], [backend])[0])
    assert run(6, None) == run(6, 6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match=r"Eq\(u0, 8\)|u0 == 8|u0 >= 8"):
        run(6, 8)


def test_ids_out_of_range_are_refused_when_compiled(torch_ranks: TorchRanks):
    with pytest.raises(RuntimeError, match=r"u0 >= 16|Eq\(u0, 16\)"):
        torch_ranks(capture_ranks.ids_out_of_range, ["aot_eager"])
