"""The gate's activation, and its slope, are those of the formula: of `glu` alone, and through all four layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from problems import close, dense, draw

import jax_impl.dynamic
import jax_impl.glu
import torch_impl.glu
import torch_impl.static

SLOPE_AT_0 = np.sqrt(2 / np.pi)


def silu(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its value and its slope."""
    sigmoid = 1 / (1 + np.exp(-g))
    return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))


def gelu_tanh(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tanh = np.tanh(SLOPE_AT_0 * (g + 0.044715 * g**3))
    return g / 2 * (1 + tanh), (1 + tanh) / 2 + g / 2 * (1 - tanh**2) * SLOPE_AT_0 * (1 + 3 * 0.044715 * g**2)


def of_torch(gate, up, dhidden, activation, dtype):
    gate, up = (torch.tensor(a, dtype=getattr(torch, dtype), requires_grad=True) for a in (gate, up))
    hidden = torch_impl.glu.glu(gate, up, activation)
    gradients = torch.autograd.grad(hidden, (gate, up), torch.tensor(dhidden, dtype=hidden.dtype))
    return [a.detach().double().numpy() for a in (hidden, *gradients)]


def of_jax(gate, up, dhidden, activation, dtype):
    with jax.enable_x64(True):
        leaves = [jnp.asarray(a, dtype) for a in (gate, up)]
        hidden, vjp = jax.vjp(lambda gate, up: jax_impl.glu.glu(gate, up, activation), *leaves)
        return [np.asarray(a, np.float64) for a in (hidden, *vjp(jnp.asarray(dhidden, dtype)))]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", [silu, gelu_tanh])
@pytest.mark.parametrize("glu", [of_torch, of_jax])
def test_the_formula_forward_and_backward(glu, activation, dtype):
    """Within half a unit in the last place of the exact value, and a few roundings of float32 of what is added up."""
    rng = np.random.default_rng(0)
    gate, up, dhidden = rng.normal(size=(3, 64, 8)) * [[[4]], [[1]], [[1]]]
    gate[0] = [0, -0.0, 20, -20, 1e-3, -1e-3, 1, -1]
    # Rounded before, so that what comes in is the same.
    gate, up, dhidden = (torch.tensor(a, dtype=getattr(torch, dtype)).double().numpy() for a in (gate, up, dhidden))
    value, slope = activation(gate)
    exact = value * up, dhidden * up * slope, dhidden * value
    wide = 2.0**-24 if dtype != "float64" else 2.0**-53
    step = 2 * wide if dtype in ("float32", "float64") else torch.finfo(getattr(torch, dtype)).eps
    least = torch.finfo(getattr(torch, dtype)).tiny
    sizes = np.abs(gate * up), np.abs(dhidden * up) * (1 + gate**2), np.abs(dhidden * gate)
    for ours, expected, size in zip(glu(gate, up, dhidden, activation.__name__, dtype), exact, sizes, strict=True):
        unit = step * 2 ** np.floor(np.log2(np.maximum(np.abs(expected), least)))
        assert (np.abs(ours - expected) <= unit / 2 + 16 * wide * size).all()


def test_the_activations_differ():
    """By far more than is allowed above, so that one cannot pass for the other."""
    g = np.linspace(-3, 3, 7)
    assert np.abs(silu(g)[0] - gelu_tanh(g)[0]).max() > 0.1


PROBLEM = draw(P=1, T=6, D=4, F=8, E=8, K=3, renormalize=True, scale=2.5)
EXACT = dense(
    PROBLEM.x_PTD[0], PROBLEM.router_DE, PROBLEM.weights, PROBLEM.dout_PTD[0], PROBLEM.how, PROBLEM.expert_id_PTK[0],
    activation="gelu_tanh",
)  # fmt: skip


@pytest.mark.parametrize("bins", [None, "rank", "expert"])
def test_gelu_through_the_layers_torch(bins):
    x, router, gate, up, down = leaves = [
        a.clone().requires_grad_() for a in (PROBLEM.x_PTD[0], PROBLEM.router_DE, *PROBLEM.weights)
    ]
    routing = torch_impl.route(x, router, torch_impl.Router(**PROBLEM.how), PROBLEM.expert_id_PTK[0])
    given: dict[str, Any] = {
        "router": torch_impl.Router(3),
        "experts": torch_impl.Experts("gelu_tanh"),
        "routing": routing,
    }
    if bins is None:
        out = torch_impl.moe_layer(x, router, gate, up, down, **given).out_TD
    else:
        capacity = torch_impl.static.plan_capacity(None, 6, 3, 8, 1, bins)
        out = torch_impl.static.moe_layer(x, router, gate, up, down, **given, capacity=capacity).out_TD
    gradients = torch.autograd.grad(out, leaves, PROBLEM.dout_PTD[0])
    close(out.detach(), EXACT, "out")
    for name, gradient in zip(("x", "router", "w_gate", "w_up", "w_down"), gradients, strict=True):
        close(gradient, EXACT, name)


@pytest.mark.parametrize("bins", [None, "rank", "expert"])
def test_gelu_through_the_layers_jax(bins):
    def layer(x, router, *weights):
        ids = jnp.asarray(PROBLEM.expert_id_PTK[0].numpy())
        routing = jax_impl.route(x, router, jax_impl.Router(**PROBLEM.how), ids)
        given: dict[str, Any] = {
            "router": jax_impl.Router(3),
            "experts": jax_impl.Experts("gelu_tanh"),
            "routing": routing,
        }
        if bins is None:
            return jax_impl.dynamic.moe_layer(x, router, *weights, **given).out_TD
        capacity = jax_impl.plan_capacity(None, 6, 3, 8, 1, bins)
        return jax_impl.moe_layer(x, router, *weights, **given, capacity=capacity).out_TD

    with jax.enable_x64(True):
        leaves = [jnp.asarray(a.numpy()) for a in (PROBLEM.x_PTD[0], PROBLEM.router_DE, *PROBLEM.weights)]
        out, vjp = jax.vjp(jax.jit(layer), *leaves)
        close(out, EXACT, "out")
        for name, gradient in zip(("x", "router", "w_gate", "w_up", "w_down"), vjp(PROBLEM.dout_PTD[0].numpy())):  # noqa: B905
            close(gradient, EXACT, name)
