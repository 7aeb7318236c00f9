"""Stage 1: every token chooses K of E experts."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer

from jax_impl.checks import check_router
from jax_impl.matmul import matmul


class Router(NamedTuple):
    """How many experts a token chooses, and how its scores come out of the logits."""

    top_k: int
    score_function: str = "softmax"  # or "sigmoid", "sqrt_softplus", "softmax_of_chosen"
    renormalize: bool = False  # divide a token's K scores by their sum
    epsilon: float = 1e-20  # added to the sum that `renormalize` divides by
    scale: float = 1.0  # multiplies the K scores
    groups: int = 1  # groups of experts; a token chooses within the best groups
    top_groups: int = 1  # how many groups a token chooses within
    group_score: str = "top2"  # the sum of a group's two largest scores; or "max", its largest
    outside_groups: str = "minus_inf"  # the scores of experts outside the best groups; or "zero"
    score_on: str = "output"  # a score multiplies an expert's output; or "input", with one expert per token
    router_dtype: str = "wide"  # of the logits: float32, or float64 for float64 tokens; or "float32", "activations"
    cast_scores: bool = False  # round the scores to the dtype of the tokens


class PerExpert(NamedTuple):
    """What a router knows of each expert besides its logits; None where a model lacks it."""

    bias_E: Float[Array, " E"] | None = None  # added to the logits
    selection_bias_E: Float[Array, " E"] | None = None  # added to the scores only for the choice of experts
    scale_E: Float[Array, " E"] | None = None  # multiplies the scores


class Routing(NamedTuple):
    score_TK: Float[Array, "T K"]
    expert_id_TK: Integer[Array, "T K"]
    counts_E: Integer[Array, " E"]


def route(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    router: Router,
    expert_id_TK: Integer[Array, "T K"] | None = None,
    per_expert: PerExpert = PerExpert(),
) -> Routing:
    """Scores, expert ids and counts per expert, in float32 (float64 for float64 input).

        logits = x @ router + bias;  score = score_function(logits);  the K largest of score + selection bias win

    Equal scores go to the lower expert id: float32 cannot tell sigmoids of large logits apart. `renormalize` divides
    the K chosen scores by their sum (Mixtral, Qwen3); `scale` multiplies them last (DeepSeek-V3's routed scaling
    factor).
    `expert_id_TK` replays a choice made before (a recording, a recomputation): only its scores are computed. An id out
    of range that is not found here gets some expert's score, and is found or dropped later.

    Raises ValueError on a wrong shape, dtype or option, and on replayed ids out of range where their values can be
    read: outside a trace.
    """
    check_router(x_TD, router_DE, router, expert_id_TK, per_expert)
    score_TE = SCORE_FUNCTIONS[router.score_function](logits(x_TD, router_DE, router.router_dtype, per_expert.bias_E))
    if expert_id_TK is None:
        expert_id_TK = choose(score_TE, router, per_expert.selection_bias_E)
    clamped_id_TK = expert_id_TK.clip(0, router_DE.shape[1] - 1)
    score_TK = jnp.take_along_axis(score_TE, clamped_id_TK, axis=1)
    if router.score_function == "softmax_of_chosen":
        score_TK = jax.nn.softmax(score_TK, axis=-1)
    if router.renormalize:
        score_TK = renormalized(score_TK, router.epsilon)
    if per_expert.scale_E is not None:
        score_TK = score_TK * take_by_expert(per_expert.scale_E.astype(score_TK.dtype), clamped_id_TK)
    score_TK = score_TK * router.scale
    score_TK = score_TK.astype(x_TD.dtype) if router.cast_scores else score_TK
    return Routing(score_TK, expert_id_TK, count_per_expert(expert_id_TK, router_DE.shape[1]))


def logits(
    x_TD: Float[Array, "T D"], router_DE: Float[Array, "D E"], dtype: str, bias_E: Float[Array, " E"] | None
) -> Float[Array, "T E"]:
    """x @ router + bias, computed in the dtype that `router_dtype` names, and returned as float32 or wider."""
    logits_dtype = np.dtype(np.float32) if dtype == "float32" else np.promote_types(x_TD.dtype, np.float32)
    matmul_dtype = x_TD.dtype if dtype == "activations" else logits_dtype
    logits_TE = matmul(x_TD.astype(matmul_dtype), router_DE.astype(matmul_dtype))
    return (logits_TE if bias_E is None else logits_TE + bias_E.astype(matmul_dtype)).astype(logits_dtype)


def sqrt_softplus(logits_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """sqrt(log(1 + exp(logits))), as DeepSeek-V4 scores; below -40, exp(logits / 2), whose slope is finite."""
    is_small_TE = logits_TE < -40  # not clip: at its bound half the gradient would be lost
    small_TE = jnp.exp(jnp.where(is_small_TE, logits_TE, -40) / 2)
    softplus_TE = jnp.logaddexp(jnp.where(is_small_TE, -40, logits_TE), jnp.zeros_like(logits_TE))
    return jnp.where(is_small_TE, small_TE, jnp.sqrt(softplus_TE))


# Score functions by name. "softmax_of_chosen" chooses by logits, and its softmax is over the K chosen (gpt-oss).
SCORE_FUNCTIONS = {
    "softmax": partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": sqrt_softplus,
    "softmax_of_chosen": lambda logits_TE: logits_TE,
}


def choose(
    score_TE: Float[Array, "T E"], router: Router, selection_bias_E: Float[Array, " E"] | None
) -> Integer[Array, "T K"]:
    """The K experts with the largest scores plus selection bias, within the best groups where there are groups."""
    if selection_bias_E is not None:
        score_TE = score_TE + selection_bias_E.astype(score_TE.dtype)
    if router.groups > 1:
        outside = 0 if router.outside_groups == "zero" else -jnp.inf
        score_TE = jnp.where(in_best_groups(score_TE, router), score_TE, outside)
    return top_k_indices(score_TE, router.top_k)


def in_best_groups(score_TE: Float[Array, "T E"], router: Router) -> Bool[Array, "T E"]:
    """Which experts are in the groups whose best expert, or best two, have the largest scores."""
    score_TGn = score_TE.reshape(score_TE.shape[0], router.groups, score_TE.shape[1] // router.groups)
    best_TGn = jnp.sort(score_TGn, axis=-1, descending=True)[..., : 2 if router.group_score == "top2" else 1]
    best_TG = top_k_indices(best_TGn.sum(axis=-1), router.top_groups)
    inside_TG = jnp.put_along_axis(jnp.zeros(score_TGn.shape[:2], bool), best_TG, True, axis=1, inplace=False)
    return jnp.broadcast_to(inside_TG[..., None], score_TGn.shape).reshape(score_TE.shape)


def top_k_indices(score_Tn: Float[Array, "T n"], k: int) -> Integer[Array, "T k"]:
    """The indices of each row's k largest numbers, largest first; among equal numbers, the lower index first."""
    id_Tk = score_Tn.argsort(axis=-1, descending=True, stable=True)[:, :k]
    # Under shard_map, argsort's result counts as the same on all ranks, and gradients are wrong (docs/models.md).
    axes = jax.typeof(score_Tn).manual_axis_type.varying - jax.typeof(id_Tk).manual_axis_type.varying
    return jax.lax.pcast(id_Tk, tuple(axes), to="varying") if axes else id_Tk


@jax.custom_vjp  # its forward and backward receive epsilon as an array
def renormalized(score_TK: Float[Array, "T K"], epsilon: float | Float[Array, ""]) -> Float[Array, "T K"]:
    """A token's scores over their sum, which `epsilon` guards: 1e-20 in DeepSeek-V3, none in Mixtral."""
    return score_TK / (score_TK.sum(axis=-1, keepdims=True) + epsilon)


def _renormalized_forward(score_TK, epsilon):
    return renormalized(score_TK, epsilon), (score_TK, epsilon)


def _renormalized_backward(kept, dweight_TK):
    # (dw_k - sum over j of dw_j w_j) / total. JAX's own rule divides by the square of the total, which underflows.
    score_TK, epsilon = kept
    total_T1 = score_TK.sum(axis=-1, keepdims=True) + epsilon
    mean_T1 = (dweight_TK * (score_TK / total_T1)).sum(axis=-1, keepdims=True)
    return (dweight_TK - mean_T1) / total_T1, None


renormalized.defvjp(_renormalized_forward, _renormalized_backward)


def take_by_expert(a_E: Float[Array, " E"], expert_id_TK: Integer[Array, "T K"]) -> Float[Array, "T K"]:
    """a[expert_id], by a product with ones and zeros, whose gradient needs no scatter-add."""
    one_hot_TKE = expert_id_TK[..., None] == jnp.arange(a_E.shape[0])
    return matmul(one_hot_TKE.astype(a_E.dtype), a_E)


def weigh_input(
    x_TD: Float[Array, "T D"], score_TK: Float[Array, "T K"], score_on: str
) -> tuple[Float[Array, "T D"], Float[Array, "T K"]]:
    """The experts' input, and the weights of their outputs.

    By default these are the tokens and their scores. Where scores are on the input (Llama 4), they are the tokens times
    their one score, and ones.

    Shapes: input_TD, weight_TK.
    """
    if score_on == "output":
        return x_TD, score_TK
    product_dtype = np.promote_types(x_TD.dtype, score_TK.dtype)
    return (x_TD.astype(product_dtype) * score_TK.astype(product_dtype)).astype(x_TD.dtype), jnp.ones_like(score_TK)


def count_per_expert(expert_id_TK: Integer[Array, "T K"], n_experts: int) -> Integer[Array, " E"]:
    """How many assignments chose each expert; an id out of range is counted nowhere."""
    expert_E = jnp.arange(n_experts)
    return (expert_E[:, None] == expert_id_TK.reshape(-1)).sum(axis=1)
