"""Stage 1: every token chooses K of E experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_router


class Router(NamedTuple):
    """How many experts a token chooses, and how its scores come out of the logits."""

    top_k: int
    score_function: str = "softmax"  # or "sigmoid"
    renormalize: bool = False  # divide a token's K scores by their sum
    scale: float = 1.0  # and multiply them


class Routing(NamedTuple):
    score_TK: Float[Array, "T K"]
    expert_id_TK: Integer[Array, "T K"]
    counts_E: Integer[Array, " E"]


def route(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    router: Router,
    expert_id_TK: Integer[Array, "T K"] | None = None,
) -> Routing:
    """Scores, expert ids and counts per expert, in float32 (float64 for float64 input).

        logits = x @ router;  score = softmax or sigmoid of logits;  the K largest scores win

    Equal scores go to the lower expert id: float32 cannot tell sigmoids of large logits apart. `renormalize` divides
    the K chosen scores by their sum (Mixtral, Qwen3); `scale` multiplies them last (DeepSeek-V3's routed scaling
    factor).
    `expert_id_TK` replays a choice made before (a recording, a recomputation): only its scores are computed. An id out
    of range that is not found here gets some expert's score, and is found or dropped later.

    Raises ValueError on a wrong shape, dtype, `top_k` or `score_function`, and on replayed ids out of range where
    their values are at hand: not traced.
    """
    check_router(x_TD, router_DE, router, expert_id_TK)
    wide = np.promote_types(x_TD.dtype, np.float32)
    logits_TE = jnp.matmul(x_TD.astype(wide), router_DE.astype(wide), precision="highest")
    score_TE = jax.nn.softmax(logits_TE, axis=-1) if router.score_function == "softmax" else jax.nn.sigmoid(logits_TE)
    if expert_id_TK is None:
        expert_id_TK = score_TE.argsort(axis=-1, descending=True, stable=True)[:, : router.top_k]
    score_TK = jnp.take_along_axis(score_TE, expert_id_TK.clip(0, router_DE.shape[1] - 1), axis=1)
    if router.renormalize:
        score_TK = renormalized(score_TK)
    return Routing(score_TK * router.scale, expert_id_TK, count_per_expert(expert_id_TK, router_DE.shape[1]))


@jax.custom_vjp
def renormalized(score_TK: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """A token's scores over their sum, guarded by 1e-20 as DeepSeek-V3 does."""
    return score_TK / (score_TK.sum(axis=-1, keepdims=True) + 1e-20)


def _renormalized_forward(score_TK):
    return renormalized(score_TK), score_TK


def _renormalized_backward(score_TK, dweight_TK):
    # (dw_k - sum over j of dw_j w_j) / total. JAX's own rule divides by the square of the total, which underflows.
    total_T1 = score_TK.sum(axis=-1, keepdims=True) + 1e-20
    mean_T1 = (dweight_TK * (score_TK / total_T1)).sum(axis=-1, keepdims=True)
    return ((dweight_TK - mean_T1) / total_T1,)


renormalized.defvjp(_renormalized_forward, _renormalized_backward)


def count_per_expert(expert_id_TK: Integer[Array, "T K"], n_experts: int) -> Integer[Array, " E"]:
    """How many assignments chose each expert; an id out of range is counted nowhere."""
    expert_E = jnp.arange(n_experts)
    return (expert_id_TK.reshape(-1, 1) == expert_E).sum(axis=0)
