"""To the ends of float32 and bfloat16: scores, renormalisation and activations, forward and backward, in both packages.

The oracle's word and its allowance, as `check` judges; nothing may be NaN.
"""

from dataclasses import replace
from itertools import product
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from problems import gamma

import jax_impl
import jax_impl.glu
import jax_impl.routing
import torch_impl
import torch_impl.glu
import torch_impl.routing
from parity.cases.case import Case
from parity.cases.parameters import Parameters
from parity.oracle import reference, vectorised
from parity.oracle.reference import Exact, Perturbed
from parity.oracle.tolerances import DRAWS, allowance, numpy_dtype, underflow

# Where float32's exponential over- and underflows, and its subnormals, sigmoid's 1e-20, and where sqrt_softplus becomes
# another formula; and the last numbers.
ENDS = [0, 1, 17, 20, 39, 40, 41, 46, 47, 60, 87, 88, 89, 103, 104, 200, 1e4, 1e20, 3e38]
LOGITS = np.array([[s * a, t * a, s * a / 2, 0.5, 0] for a in ENDS for s, t in product((1, -1), (1, -1))])


def route_torch(case: Case, logits: np.ndarray, ids: np.ndarray, dscore: np.ndarray) -> list[np.ndarray]:
    x, router = torch.tensor(logits, dtype=torch.float32, requires_grad=True), torch.eye(logits.shape[1])
    routing = torch_impl.route(x, router, torch_impl.Router(*case.router), torch.from_numpy(ids))
    return [
        a.detach().numpy() for a in (routing.score_TK, *torch.autograd.grad(routing.score_TK, x, torch.tensor(dscore)))
    ]


def route_jax(case: Case, logits: np.ndarray, ids: np.ndarray, dscore: np.ndarray) -> list[np.ndarray]:
    router = jnp.eye(logits.shape[1])
    how = jax_impl.Router(*case.router)
    score, vjp = jax.vjp(
        lambda x: jax_impl.route(x, router, how, jnp.asarray(ids)).score_TK, jnp.asarray(logits, jnp.float32)
    )
    return [np.asarray(a) for a in (score, *vjp(jnp.asarray(dscore)))]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score_function", get_args(Case.__annotations__["score_function"]))
@pytest.mark.parametrize("route", [route_torch, route_jax])
@np.errstate(over="ignore")
def test_scores_and_their_gradient(route, score_function, renormalize):
    T, E = LOGITS.shape
    case = Case(ranks=1, tokens=T, width=E, experts=E, top_k=2, score_function=score_function, renormalize=renormalize)
    logits = LOGITS.astype(np.float32).astype(np.float64)[None]
    ids = np.tile(np.array([0, 1], np.int32), (1, T, 1))
    dscore = np.random.default_rng(0).standard_normal((1, T, 2)).astype(np.float32)

    w = Parameters(np.eye(E))

    def oracle(numbers):
        _, score = vectorised.route(case, logits, w, numbers)
        chosen = reference.chosen_scores(case, score, ids, w, numbers).weight
        return chosen, vectorised.route_backward(case, logits, w, ids, dscore.astype(np.float64), numbers)[0]

    draws = [oracle(Perturbed(np.random.default_rng([0, i]))) for i in range(DRAWS)]
    got = route(case, logits[0], ids[0], dscore[0])
    for name, exact, mine, *drawn in zip(("score", "dlogits"), oracle(Exact()), got, *draws, strict=True):
        error, allowed = np.abs(mine - exact[0]), allowance(exact, drawn, "float32")[0]
        assert np.isfinite(mine).all(), name
        worst = np.unravel_index((error / allowed).argmax(), error.shape)
        assert (error <= allowed).all(), (name, logits[0][worst[0]], mine[worst], exact[0][worst], allowed[worst])


@pytest.mark.parametrize("package", [torch_impl, jax_impl])
def test_sqrt_softplus_and_its_slope(package):
    """Number by number: sqrt(log(1 + e**a)), and sigmoid(a) over twice that; far below zero e**(a/2), and half that."""
    a = np.array([s * a for a in [*ENDS, 39.9, 40.1, 80, 120, 170] for s in (1, -1)], np.float32)
    exact = a.astype(np.float64)
    value = np.sqrt(np.logaddexp(exact, 0))
    with np.errstate(over="ignore"):
        slope = np.where(exact < -40, value / 2, 1 / (1 + np.exp(-exact)) / (2 * np.maximum(value, 1e-30)))
    if package is torch_impl:
        of = torch.from_numpy(a)[None].requires_grad_()
        score = torch_impl.routing.sqrt_softplus(of)
        got = score.detach().numpy()[0], torch.autograd.grad(score.sum(), of)[0].numpy()[0]
    else:
        score, vjp = jax.vjp(jax_impl.routing.sqrt_softplus, jnp.asarray(a)[None])
        got = np.asarray(score[0]), np.asarray(vjp(jnp.ones_like(score))[0][0])
    for mine, expected in zip(got, (value, slope), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=gamma(16, "float32"), atol=underflow("float32"))


GATES = np.array([s * a for a in (*ENDS, 1e-38, 1e-30, 5, 10, 11, 12) for s in (1, -1)])


def glu_torch(given, dhidden, case):
    dtype, experts = getattr(torch, case.dtype), torch_impl.Experts(*case.expert)
    leaves = [torch.tensor(a.astype(np.float64)).to(dtype).requires_grad_() for a in given]
    hidden = torch_impl.glu.glu(leaves[0] if case.gated else None, leaves[-1], experts)
    gradients = torch.autograd.grad(hidden, leaves, torch.tensor(dhidden.astype(np.float64)).to(dtype))
    return [a.detach().double().numpy() for a in (hidden, *gradients)]


def glu_jax(given, dhidden, case):
    experts = jax_impl.Experts(*case.expert)
    hidden, vjp = jax.vjp(
        lambda *of: jax_impl.glu.glu(of[0] if case.gated else None, of[-1], experts), *map(jnp.asarray, given)
    )
    return [np.asarray(a, np.float64) for a in (hidden, *vjp(jnp.asarray(dhidden)))]


activations = pytest.mark.parametrize("activation", get_args(Case.__annotations__["activation"]))
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
glus = pytest.mark.parametrize("glu", [glu_torch, glu_jax])


def activated(case, values, numbers):
    """The oracle's word on an activation and its slope, at any number."""
    g = values.astype(np.float64)
    if case.activation == "relu2":
        return reference.activated(case, g, numbers)
    active, slope = reference.activated(case, np.clip(g, -1e6, 1e6), numbers)  # past it the slope is 0 or 1
    return np.where(g > 1e6, g, active), slope  # and g**3 no float64


def check_numbers(case, names, oracle, got):
    """Each number by itself. Where the value is beyond the dtype, it is infinite, and no gradient is NaN."""
    draws = [oracle(Perturbed(np.random.default_rng([0, i]))) for i in range(DRAWS)]
    most = float(ml_dtypes.finfo(numpy_dtype(case.dtype)).max)
    beyond = np.abs(oracle(Exact())[0]) > most
    assert np.isinf(got[0][beyond]).all()
    for name, exact, mine, *drawn in zip(names, oracle(Exact()), got, *draws, strict=True):
        assert not np.isnan(mine).any(), name
        assert np.isfinite(mine[~beyond]).all(), name
        column = [a[~beyond, None] for a in drawn]
        error, allowed = np.abs(mine - exact)[~beyond], allowance(exact[~beyond, None], column, case.dtype)[:, 0]
        worst = int((error / allowed).argmax())
        at = GATES[~beyond][worst], mine[~beyond][worst], exact[~beyond][worst], allowed[worst]
        assert (error <= allowed).all(), (name, *at)


@dtypes
@activations
@glus
@np.errstate(over="ignore", invalid="ignore")
def test_activations_and_their_gradients(glu, activation, dtype):
    case = replace(Case(), dtype=dtype, activation=activation)
    gate = GATES.astype(numpy_dtype(dtype))
    up, dhidden = (np.full(gate.shape, value, numpy_dtype(dtype)) for value in (0.5, 0.25))

    def oracle(numbers):
        active, slope = activated(case, gate, numbers)
        return (
            active / 2,
            numbers.round(numbers.round(slope / 8, case.accum_dtype), dtype),
            numbers.round(active / 4, dtype),
        )

    check_numbers(case, ("hidden", "dgate", "dup"), oracle, glu((gate, up), dhidden, case))


@dtypes
@activations
@glus
@np.errstate(over="ignore", invalid="ignore")
def test_activations_without_a_gate(glu, activation, dtype):
    case = replace(Case(), dtype=dtype, activation=activation, gated=False)
    up, dhidden = GATES.astype(numpy_dtype(dtype)), np.full(GATES.shape, 0.25, numpy_dtype(dtype))

    def oracle(numbers):
        active, slope = activated(case, up, numbers)
        return active, numbers.round(slope / 4, dtype)

    check_numbers(case, ("hidden", "dup"), oracle, glu((up,), dhidden, case))


@dtypes
@activations
@glus
@np.errstate(over="ignore", invalid="ignore")
def test_clamped_at_the_ends(glu, activation, dtype):
    """Numbers beyond the clamp on all sides; a step of the slope past it would be a large one."""
    case = replace(Case(), dtype=dtype, activation=activation, clamp=7.0, up_offset=1.0)
    gate = GATES.astype(numpy_dtype(dtype))
    up, dhidden = -gate / 2, np.full(GATES.shape, 1 / 16, numpy_dtype(dtype))

    def oracle(numbers):
        hid = reference.hidden(case, np.maximum(gate.astype(np.float64), -1e6), up.astype(np.float64), numbers)
        assert hid.of_gate is not None
        of_gate = numbers.round(numbers.round(hid.of_gate / 16, case.accum_dtype), dtype)
        return hid.value, of_gate, numbers.round(hid.of_up / 16, dtype)

    check_numbers(case, ("hidden", "dgate", "dup"), oracle, glu((gate, up), dhidden, case))


def test_the_ends_are_those_of_the_dtypes():
    assert ENDS[-1] < float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) < float(np.finfo(np.float32).max)
    assert 10 * ENDS[-1] > float(np.finfo(np.float32).max)
