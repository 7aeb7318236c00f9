"""Inputs for both frameworks, and what they are judged by: the layer with no dispatch at all."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parity.cases.case import Case
from parity.cases.parameters import Parameters
from parity.oracle import vectorised
from parity.oracle.reference import Exact, Perturbed
from parity.oracle.tolerances import DRAWS, allowance, unit_roundoff

Weights = tuple[Tensor, Tensor, Tensor]
WEIGHTS = ("w_gate", "w_up", "w_down")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda g: g / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
}


class Problem(NamedTuple):
    """P ranks' tokens, the router, E experts and a cotangent, in float64."""

    x_PTD: Tensor
    router_DE: Tensor
    weights: Weights  # [E, D, F], [E, D, F], [E, F, D]
    expert_id_PTK: Tensor
    dout_PTD: Tensor
    how: dict[str, Any]  # what `route` takes

    def weights_of(self, rank: int, n_ranks: int) -> Weights:
        """The weights of one rank's experts."""
        gate, up, down = (w.chunk(n_ranks)[rank] for w in self.weights)
        return gate, up, down

    def with_ids(self, ids_TK: list[list[int]]) -> "Problem":
        """The same with these expert ids on every rank."""
        return self._replace(expert_id_PTK=torch.tensor([ids_TK] * self.x_PTD.shape[0]))


def draw(P: int, T: int, D: int, F: int, E: int, K: int, seed: int = 0, **how: Any) -> Problem:
    """A random problem. Expert ids are drawn too and not the router's, the lower ones more often."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    popularity_E = np.arange(1, E + 1) ** -1.0
    ids = [rng.choice(E, K, replace=False, p=popularity_E / popularity_E.sum()) for _ in range(P * T)]
    return Problem(
        x_PTD=normal(P, T, D),
        router_DE=normal(D, E),
        weights=(normal(E, D, F), normal(E, D, F), normal(E, F, D)),
        expert_id_PTK=torch.from_numpy(np.array(ids, np.int64).reshape(P, T, K)),
        dout_PTD=normal(P, T, D),
        how={"top_k": K, **how},
    )


# What most tests take, so that JAX compiles it once: two ranks of four experts, six tokens each that choose three.
# Of a rank's 18 choices two thirds are for rank 0 (12 and 14): a bin of 9 overflows there and has padding for rank 1.
STANDARD = draw(P=2, T=6, D=4, F=8, E=8, K=3)


class Dense(NamedTuple):
    """What a layer should give, and how far off each number may be: the allowance that `check` has."""

    out_TD: Tensor
    gradients: dict[str, Tensor]  # of x, router, score, w_gate, w_up, w_down
    allowed: dict[str, np.ndarray]  # of each gradient, and of out

    def value(self, name: str) -> Tensor:
        return self.out_TD if name == "out" else self.gradients[name]


def dense(
    x_TD: Tensor,
    router_DE: Tensor,
    weights: Weights,
    dout_TD: Tensor,
    how: dict[str, Any],
    expert_id_TK: Tensor,
    keep_TK: Tensor | None = None,
    activation: str = "silu",
    dtype: str = "float64",
) -> Dense:
    """Every expert on every token, weighted by score * keep, in plain operations. Gradients are plain autograd's.

    In float64, on inputs that were rounded to `dtype`, which is the one that the layer under test computes in.
    """
    inputs = [a.detach().to(getattr(torch, dtype)).double() for a in (x_TD, router_DE, *weights, dout_TD)]
    x_TD, router_DE, gate, up, down = (a.clone().requires_grad_() for a in inputs[:-1])
    how = {"score_function": "softmax", "renormalize": False, "scale": 1.0} | how
    keep_TK = torch.ones(expert_id_TK.shape, dtype=torch.bool) if keep_TK is None else keep_TK
    logits_TE = x_TD @ router_DE
    score_TE = logits_TE.softmax(-1) if how["score_function"] == "softmax" else logits_TE.sigmoid()
    score_TK = score_TE.gather(1, expert_id_TK)
    if how["renormalize"]:
        score_TK = score_TK / score_TK.sum(-1, keepdim=True)
    score_TK = score_TK * how["scale"]
    score_TK.retain_grad()

    y_ETD = (ACTIVATIONS[activation](x_TD @ gate) * (x_TD @ up)) @ down
    y_TKD = y_ETD[expert_id_TK, torch.arange(x_TD.shape[0])[:, None]]
    out_TD = ((score_TK * keep_TK)[:, :, None] * y_TKD).sum(1)
    out_TD.backward(inputs[-1])
    leaves = {"x": x_TD, "router": router_DE, "score": score_TK, "w_gate": gate, "w_up": up, "w_down": down}
    gradients = {name: a.grad for name, a in leaves.items() if a.grad is not None}
    assert len(gradients) == len(leaves)
    (T, D), (E, _, F) = x_TD.shape, gate.shape
    how |= {"dtype": dtype, "activation": activation}
    case = Case(ranks=1, tokens=T, width=D, hidden=F, experts=E, **how)
    return Dense(out_TD.detach(), gradients, allowances(case, inputs, expert_id_TK, keep_TK))


def allowances(case: Case, inputs: list[Tensor], expert_id_TK: Tensor, keep_TK: Tensor) -> dict[str, np.ndarray]:
    """Of out and of each gradient, as `check` has them. The router's gradient is stored as the router is."""
    x, *learned, dout = (a.numpy() for a in inputs)
    parameters, ids, keep = Parameters(*learned), expert_id_TK.numpy(), keep_TK.numpy()

    def evaluated(numbers: Exact | Perturbed) -> dict[str, np.ndarray]:
        made = vectorised.layer(case, x[None], parameters, dout[None], ids[None], keep[None], numbers)
        of_tokens = {"out": made.out[0], "x": made.dx[0], "score": made.dscore[0]}
        return of_tokens | {name: made.gradients[name] for name in ("router", *WEIGHTS)}

    exact, draws = evaluated(Exact()), [evaluated(Perturbed(np.random.default_rng(i))) for i in range(DRAWS)]
    return {
        name: allowance(values, [draw[name] for draw in draws], case.accum_dtype if name == "score" else case.dtype)
        for name, values in exact.items()
    }


def dense_experts(x_RD: Tensor, counts_e: Tensor, weights: Weights, dtype: str) -> Dense:
    """Rows that lie by expert, each through its own: every token has one choice, whose renormalised score is 1."""
    ids_R1 = torch.arange(len(counts_e)).repeat_interleave(counts_e.long())[:, None]
    router_DE = torch.zeros(x_RD.shape[1], len(counts_e))
    how = {"top_k": 1, "renormalize": True}
    return dense(x_RD, router_DE, weights, torch.ones_like(x_RD), how, ids_R1, dtype=dtype)


def who_stays(
    expert_id_TK: np.ndarray, score_TK: np.ndarray, n_experts: int, n_bins: int, C: int, priority: str
) -> np.ndarray:
    """[T, K], true where kept. Word for word: the assignments of a bin rank by priority, the first C stay."""
    K = expert_id_TK.shape[1]
    bin_N, score_N = expert_id_TK.reshape(-1) // (n_experts // n_bins), score_TK.reshape(-1)
    key = {"token": lambda a: a, "choice": lambda a: (a % K, a), "score": lambda a: (-score_N[a], a)}[priority]
    keep_N = np.zeros(bin_N.size, bool)
    for b in range(n_bins):
        keep_N[sorted(np.flatnonzero(bin_N == b), key=key)[:C]] = True
    return keep_N.reshape(expert_id_TK.shape)


def within(actual: Any, expected: Any, allowed: Any) -> None:
    """Each number off by no more than its own allowance; one that is NaN fails."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    off, allowed = np.abs(actual - expected), np.broadcast_to(allowed, actual.shape)
    assert (off <= allowed).all(), f"{(~(off <= allowed)).sum()} of {off.size} are off, by up to {off.max()}"


def close(actual: Any, expected: Dense, name: str) -> None:
    """The output ("out"), or the gradient of that name, is the dense layer's."""
    within(actual, expected.value(name), expected.allowed[name])


def gamma(n: int, dtype: str) -> float:
    """The largest relative error of a product of n numbers 1 + d, |d| <= u: n u / (1 - n u).

    That of n roundings one after the other; and, relative to the sum of magnitudes, of a sum of n + 1 terms or of n
    products, in any order (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    nu = n * unit_roundoff(dtype)
    assert nu < 1
    return nu / (1 - nu)


def bits(tree: Any) -> list[bytes]:
    """Every array in nested tuples and dictionaries, to compare bit for bit."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return [part for branch in tree for part in bits(branch)]
    if isinstance(tree, Tensor):
        tree = tree.reshape(-1).contiguous().view(torch.uint8)
    return [np.asarray(tree).tobytes()]
