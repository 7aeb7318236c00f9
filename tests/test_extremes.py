"""To the ends of float32 and bfloat16: scores, renormalisation and activations, forward and backward, in both packages.

The oracle's word and its allowance, as `check` judges; nothing may be NaN.
"""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jax_impl
import jax_impl.glu
import torch_impl
import torch_impl.glu
from parity.cases.case import Case
from parity.oracle import reference, vectorised
from parity.oracle.reference import Exact, Perturbed
from parity.oracle.tolerances import DRAWS, allowance, numpy_dtype

# Where float32's exponential over- and underflows, and its subnormals, and sigmoid's 1e-20; and the last numbers.
ENDS = [0, 1, 17, 20, 46, 47, 60, 87, 88, 89, 103, 104, 200, 1e4, 1e20, 3e38]
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
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("route", [route_torch, route_jax])
@np.errstate(over="ignore")
def test_scores_and_their_gradient(route, score_function, renormalize):
    T, E = LOGITS.shape
    case = Case(ranks=1, tokens=T, width=E, experts=E, top_k=2, score_function=score_function, renormalize=renormalize)
    logits = LOGITS.astype(np.float32).astype(np.float64)[None]
    ids = np.tile(np.array([0, 1], np.int32), (1, T, 1))
    dscore = np.random.default_rng(0).standard_normal((1, T, 2)).astype(np.float32)

    def oracle(numbers):
        _, score = vectorised.route(case, logits, np.eye(E), numbers)
        chosen = reference.chosen_scores(case, score, ids, numbers)
        return chosen, vectorised.route_backward(case, logits, np.eye(E), ids, dscore.astype(np.float64), numbers)[0]

    draws = [oracle(Perturbed(np.random.default_rng([0, i]))) for i in range(DRAWS)]
    got = route(case, logits[0], ids[0], dscore[0])
    for name, exact, mine, *drawn in zip(("score", "dlogits"), oracle(Exact()), got, *draws, strict=True):
        error, allowed = np.abs(mine - exact[0]), allowance(exact, drawn, "float32")[0]
        assert np.isfinite(mine).all(), name
        worst = np.unravel_index((error / allowed).argmax(), error.shape)
        assert (error <= allowed).all(), (name, logits[0][worst[0]], mine[worst], exact[0][worst], allowed[worst])


GATES = np.array([s * a for a in (*ENDS, 1e-38, 1e-30, 5, 10, 11, 12) for s in (1, -1)])


def glu_torch(gate, up, dhidden, activation, dtype):
    gate, up = (torch.tensor(a.astype(np.float64)).to(getattr(torch, dtype)).requires_grad_() for a in (gate, up))
    hidden = torch_impl.glu.glu(gate, up, activation)
    gradients = torch.autograd.grad(hidden, (gate, up), torch.tensor(dhidden.astype(np.float64)).to(hidden.dtype))
    return [a.detach().double().numpy() for a in (hidden, *gradients)]


def glu_jax(gate, up, dhidden, activation, dtype):
    hidden, vjp = jax.vjp(lambda gate, up: jax_impl.glu.glu(gate, up, activation), jnp.asarray(gate), jnp.asarray(up))
    return [np.asarray(a, np.float64) for a in (hidden, *vjp(jnp.asarray(dhidden)))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("glu", [glu_torch, glu_jax])
@np.errstate(over="ignore", invalid="ignore")
def test_activations_and_their_gradients(glu, activation, dtype):
    case = replace(Case(), dtype=dtype, activation=activation)
    gate = GATES.astype(numpy_dtype(dtype))
    up, dhidden = (np.full(gate.shape, value, numpy_dtype(dtype)) for value in (0.5, 0.25))

    def oracle(numbers):
        g = np.clip(gate.astype(np.float64), -1e6, 1e6)  # past it the slope is 0 or 1, and g**3 no float64
        active, slope = reference.activated(case, g, numbers)
        active = np.where(gate > 1e6, gate.astype(np.float64), active)
        return active / 2, numbers.round(numbers.round(slope / 8, case.wide), dtype), numbers.round(active / 4, dtype)

    draws = [oracle(Perturbed(np.random.default_rng([0, i]))) for i in range(DRAWS)]
    got = glu(gate, up, dhidden, activation, dtype)
    for name, exact, mine, *drawn in zip(("hidden", "dgate", "dup"), oracle(Exact()), got, *draws, strict=True):
        assert np.isfinite(mine).all(), name
        column = [a[:, None] for a in drawn]  # each number is a row of its own
        error, allowed = np.abs(mine - exact), allowance(exact[:, None], column, dtype)[:, 0]
        worst = int((error / allowed).argmax())
        assert (error <= allowed).all(), (name, GATES[worst], mine[worst], exact[worst], allowed[worst])


def test_the_ends_are_those_of_the_dtypes():
    assert ENDS[-1] < float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) < float(np.finfo(np.float32).max)
    assert 10 * ENDS[-1] > float(np.finfo(np.float32).max)
