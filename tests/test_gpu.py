"""What only a GPU can show: one synchronisation, none, bits that repeat, and the whole check there."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch
from problems import bits, draw

import jax_impl
import torch_impl
from jax_impl import plan_capacity
from parity.run.torch_stages import HostWaits

pytestmark = pytest.mark.gpu

T, K, E = 512, 4, 16
PROBLEM = draw(P=1, T=T, D=256, F=512, E=E, K=K)


def torch_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    tensors = (PROBLEM.x_PTD[0], PROBLEM.router_DE, *PROBLEM.weights)
    return [a.to("cuda", torch.float32 if i == 1 else dtype).requires_grad_() for i, a in enumerate(tensors)]


def torch_step(inputs: list[torch.Tensor], dout: torch.Tensor) -> tuple:
    x, router, gate, up, down = inputs
    out = torch_impl.moe_layer(x, router, gate, up, down, torch_impl.Router(K)).out_TD
    return out, *torch.autograd.grad(out, inputs, dout)


def jax_inputs(dtype: str) -> tuple:
    arrays = (PROBLEM.x_PTD[0], PROBLEM.router_DE, *PROBLEM.weights, PROBLEM.dout_PTD[0])
    return tuple(jnp.asarray(a.numpy(), "float32" if i == 1 else dtype) for i, a in enumerate(arrays))


@jax.jit
def jax_step(x, router, gate, up, down, dout):
    capacity = plan_capacity(None, T, K, E, 1)
    out, vjp = jax.vjp(
        lambda *a: jax_impl.moe_layer(*a, router=jax_impl.Router(K), capacity=capacity).out_TD,
        x,
        router,
        gate,
        up,
        down,
    )
    return out, *vjp(dout)


def synchronisations(step) -> int:
    """How often PyTorch itself says that a call made the host wait."""
    waits = HostWaits(torch.device("cuda"))
    with waits.counted():
        step()
    return waits.count


def test_one_synchronisation():
    """bfloat16, where grouped_mm reads the counts on the device."""
    inputs, dout = torch_inputs(torch.bfloat16), PROBLEM.dout_PTD[0].to("cuda", torch.bfloat16)
    torch_step(inputs, dout)
    x, router, gate, up, down = inputs
    assert synchronisations(lambda: torch_impl.moe_layer(x, router, gate, up, down, torch_impl.Router(K))) == 1
    assert synchronisations(lambda: torch_step(inputs, dout)) == 1
    assert synchronisations(lambda: x.sum().item()) == 1  # a guard on the counter


@pytest.mark.filterwarnings("ignore")  # the profiler warns of its own cycles
def test_one_copy_to_the_host():
    inputs, dout = torch_inputs(torch.bfloat16), PROBLEM.dout_PTD[0].to("cuda", torch.bfloat16)
    torch_step(inputs, dout)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    x, router, gate, up, down = inputs
    with torch.profiler.profile(activities=activities) as profile:
        torch_impl.moe_layer(x, router, gate, up, down, torch_impl.Router(K))
    names = [event.name for event in profile.events() or []]
    assert sum("Memcpy DtoH" in name for name in names) == 1, names
    assert sum(name == "aten::_local_scalar_dense" for name in names) == 0


def test_no_copy_to_the_host_in_jax():
    inputs = jax_inputs("bfloat16")
    jax.block_until_ready(jax_step(*inputs))
    with jax.transfer_guard_device_to_host("disallow"):
        jax.block_until_ready(jax_step(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_runs_give_the_same_bits_torch(dtype):
    inputs, dout = torch_inputs(dtype), PROBLEM.dout_PTD[0].to("cuda", dtype)
    runs = {tuple(bits([a.detach().float().cpu() for a in torch_step(inputs, dout)])) for _ in range(10)}
    assert len(runs) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_runs_give_the_same_bits_jax(dtype):
    inputs = jax_inputs(dtype)
    runs = {tuple(bits(jax.device_get(jax_step(*inputs)))) for _ in range(10)}
    assert len(runs) == 1


@pytest.mark.parametrize(
    "arguments",
    [["zipf", "bfloat16-drop"], ["--model", "olmoe-1b-7b", "--ranks", "1", "--tokens", "16"]],
    ids=["ranks-share-one-gpu", "model"],
)
def test_check(arguments):
    command = [sys.executable, "-m", "parity", "check", "--device", "cuda", "--no-json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
