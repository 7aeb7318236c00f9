"""The gate's activation, and its slope, are those of the formula: of `glu` alone, and through all four layers."""

from itertools import combinations
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from problems import close, dense, draw, gamma

import jax_impl.dynamic
import jax_impl.glu
import torch_impl.glu
import torch_impl.static
from parity.cases.case import Case
from parity.oracle.problem import draw as draw_problem
from parity.oracle.problem import exact_inputs

SLOPE_AT_0 = np.sqrt(2 / np.pi)


def silu(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its value and its slope."""
    sigmoid = 1 / (1 + np.exp(-g))
    return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))


def gelu_tanh(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tanh = np.tanh(SLOPE_AT_0 * (g + 0.044715 * g**3))
    return g / 2 * (1 + tanh), (1 + tanh) / 2 + g / 2 * (1 - tanh**2) * SLOPE_AT_0 * (1 + 3 * 0.044715 * g**2)


def gelu(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = np.vectorize(NormalDist().cdf)(g)
    return g * share, share + g * np.exp(-(g**2) / 2) / np.sqrt(2 * np.pi)


def quick_gelu(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sigmoid = 1 / (1 + np.exp(-1.702 * g))
    return g * sigmoid, sigmoid * (1 + 1.702 * g * (1 - sigmoid))


def relu2(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(g, 0) ** 2, 2 * np.maximum(g, 0)


ACTIVATIONS = [silu, gelu, gelu_tanh, quick_gelu, relu2]


def of_torch(given, dhidden, experts, dtype):
    """Of gate and up, or of up alone."""
    leaves = [torch.tensor(a, dtype=getattr(torch, dtype), requires_grad=True) for a in given]
    hidden = torch_impl.glu.glu(leaves[0] if leaves[1:] else None, leaves[-1], torch_impl.Experts(*experts))
    gradients = torch.autograd.grad(hidden, leaves, torch.tensor(dhidden, dtype=hidden.dtype))
    return [a.detach().double().numpy() for a in (hidden, *gradients)]


def of_jax(given, dhidden, experts, dtype):
    def glu(*of):
        return jax_impl.glu.glu(of[0] if of[1:] else None, of[-1], jax_impl.Experts(*experts))

    with jax.enable_x64(True):
        hidden, vjp = jax.vjp(glu, *(jnp.asarray(a, dtype) for a in given))
        return [np.asarray(a, np.float64) for a in (hidden, *vjp(jnp.asarray(dhidden, dtype)))]


glus = pytest.mark.parametrize("glu", [of_torch, of_jax])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@activations
@glus
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
    for ours, expected, size in zip(glu((gate, up), dhidden, (activation.__name__,), dtype), exact, sizes, strict=True):
        unit = step * 2 ** np.floor(np.log2(np.maximum(np.abs(expected), least)))
        assert (np.abs(ours - expected) <= unit / 2 + 16 * wide * size).all()


@activations
@glus
def test_without_a_gate(glu, activation):
    rng = np.random.default_rng(0)
    up, dhidden = rng.normal(size=(2, 64, 8))
    value, slope = activation(up)
    for ours, expected in zip(glu((up,), dhidden, (activation.__name__,), "float64"), (value, dhidden * slope)):  # noqa: B905
        np.testing.assert_allclose(ours, expected, rtol=gamma(64, "float64"), atol=gamma(64, "float64"))


@pytest.mark.parametrize(("one", "other"), list(combinations(ACTIVATIONS, 2)))
def test_the_activations_differ(one, other):
    """By more than is allowed above, so that one cannot pass for the other. The tanh is a close approximation."""
    g = np.linspace(-3, 3, 13)
    least = 3e-4 if {one, other} == {gelu, gelu_tanh} else 0.01
    assert np.abs(one(g)[0] - other(g)[0]).max() > least


# At a clamp of 2 and a step to either side of it, above and below. All are numbers of bfloat16.
AROUND = np.array([[s * a for a in (0.5, 1.9921875, 2, 2.015625, 5)] for s in (1, -1)]).reshape(-1)


def test_the_slope_at_the_clamp_is_that_inside():
    """There the gate and up both count, as between the clamps; a step beyond neither does. Bit for bit in both."""
    gate, up = (a.reshape(-1) for a in np.meshgrid(AROUND, AROUND))
    dhidden = np.ones(gate.shape)
    experts = ("relu2", 2.0, 1.0)
    hidden, dgate, dup = of_torch((gate, up), dhidden, experts, "bfloat16")
    for ours, theirs in zip((hidden, dgate, dup), of_jax((gate, up), dhidden, experts, "bfloat16"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    lifted = np.clip(up, -2, 2) + 1
    exact = np.minimum(np.maximum(gate, 0), 2) ** 2 * lifted, np.where(gate <= 2, 2 * np.maximum(gate, 0) * lifted, 0)
    exact += (np.where(np.abs(up) <= 2, np.minimum(np.maximum(gate, 0), 2) ** 2, 0),)
    for ours, expected in zip((hidden, dgate, dup), exact, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2.0**-8, atol=0)
    at = (gate == 2) & (np.abs(up) == 2)
    assert at.any()
    assert (dgate[at] != 0).all()
    assert (dup[at] != 0).all()


@activations
def test_around_the_clamp_both_are_bitwise_the_same(activation):
    """But for gates far below zero, where what is left of 1 + erf or 1 + tanh is each framework's own."""
    gate, up = (a.reshape(-1) for a in np.meshgrid(AROUND[AROUND > -3], AROUND))
    given = (gate, up), np.ones(gate.shape), (activation.__name__, 2.0, 1.0), "bfloat16"
    for ours, theirs in zip(of_torch(*given), of_jax(*given), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clamp", [0.7, 7.0])
def test_drawn_inputs_reach_every_branch_of_a_clamp(clamp, dtype):
    """Of gates some are beyond and some are not; of ups, on both sides; in every expert, and in the shared one."""
    case = Case(tokens=32, clamp=clamp, up_offset=1.0, dtype=dtype, expert_bias=True, shared_hidden=24)
    problem = draw_problem(case)
    x, w, _ = exact_inputs(problem)
    for g in range(case.experts):
        of = x[(problem.expert_id == g).any(axis=-1)]
        check_branches(of @ w.w_gate[g] + w.b_gate[g], of @ w.w_up[g] + w.b_up[g], clamp)
    check_branches(x @ w.shared_w_gate, x @ w.shared_w_up, clamp)


def check_branches(gate: np.ndarray, up: np.ndarray, clamp: float) -> None:
    for branch in (gate > clamp, gate < clamp, up > clamp, up < -clamp, np.abs(up) < clamp):
        assert branch.sum() > 10


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
