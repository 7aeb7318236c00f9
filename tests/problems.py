"""Inputs for both frameworks, and what they are judged by: the layer with no dispatch at all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor]


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
    out_TD: Tensor
    gradients: dict[str, Tensor]  # of x, router, score, w_gate, w_up, w_down


def dense(
    x_TD: Tensor,
    router_DE: Tensor,
    weights: Weights,
    dout_TD: Tensor,
    how: dict[str, Any],
    expert_id_TK: Tensor,
    keep_TK: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> Dense:
    """Every expert on every token, weighted by score * keep, in plain operations. Gradients are plain autograd's."""
    x_TD, router_DE, gate, up, down = (a.detach().clone().requires_grad_() for a in (x_TD, router_DE, *weights))
    how = {"score_function": "softmax", "renormalize": False, "scale": 1.0} | how
    logits_TE = x_TD @ router_DE
    score_TE = logits_TE.softmax(-1) if how["score_function"] == "softmax" else logits_TE.sigmoid()
    score_TK = score_TE.gather(1, expert_id_TK)
    if how["renormalize"]:
        score_TK = score_TK / score_TK.sum(-1, keepdim=True)
    score_TK = score_TK * how["scale"]
    score_TK.retain_grad()
    kept_TK = score_TK if keep_TK is None else score_TK * keep_TK

    y_ETD = (activation(x_TD @ gate) * (x_TD @ up)) @ down
    y_TKD = y_ETD[expert_id_TK, torch.arange(x_TD.shape[0])[:, None]]
    out_TD = (kept_TK[:, :, None] * y_TKD).sum(1)
    out_TD.backward(dout_TD)
    leaves = {"x": x_TD, "router": router_DE, "score": score_TK, "w_gate": gate, "w_up": up, "w_down": down}
    gradients = {name: a.grad for name, a in leaves.items() if a.grad is not None}
    assert len(gradients) == len(leaves)
    return Dense(out_TD.detach(), gradients)


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


def close(actual: Any, expected: Any, dtype: str = "float64") -> None:
    """Equal up to what rounding to `dtype` can do in arrays of this size, relative to the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    step = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=64 * step)


def bits(tree: Any) -> list[bytes]:
    """Every array in nested tuples and dictionaries, to compare bit for bit."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return [part for branch in tree for part in bits(branch)]
    if isinstance(tree, Tensor):
        tree = tree.reshape(-1).contiguous().view(torch.uint8)
    return [np.asarray(tree).tobytes()]
