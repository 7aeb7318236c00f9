"""Stage 1: every token chooses K of E experts."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from torch_impl.checks import check_router


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

    bias_E: Float[Tensor, " E"] | None = None  # added to the logits
    selection_bias_E: Float[Tensor, " E"] | None = None  # added to the scores only for the choice of experts
    scale_E: Float[Tensor, " E"] | None = None  # multiplies the scores


class Routing(NamedTuple):
    score_TK: Float[Tensor, "T K"]
    expert_id_TK: Integer[Tensor, "T K"]
    counts_E: Integer[Tensor, " E"]


def route(
    x_TD: Float[Tensor, "T D"],
    router_DE: Float[Tensor, "D E"],
    router: Router,
    expert_id_TK: Integer[Tensor, "T K"] | None = None,
    per_expert: PerExpert = PerExpert(),
) -> Routing:
    """Scores, expert ids and counts per expert, in float32 (float64 for float64 input).

        logits = x @ router + bias;  score = score_function(logits);  the K largest of score + selection bias win

    Equal scores go to the lower expert id: float32 cannot tell sigmoids of large logits apart. `renormalize` divides
    the K chosen scores by their sum (Mixtral, Qwen3); `scale` multiplies them last (DeepSeek-V3's routed scaling
    factor).
    `expert_id_TK` replays a choice made before (a recording, a recomputation): only its scores are computed. An id out
    of range that is not found here gets some expert's score, and is found or dropped later. Under another precision of
    float32 matmuls than PyTorch's default, "highest", other experts can win.

    Raises ValueError on a wrong shape, dtype, device or option, under autocast, and on replayed ids out of range where
    their values can be read: on a CPU, outside capture.
    """
    check_router(x_TD, router_DE, router, expert_id_TK, per_expert)
    score_TE = SCORE_FUNCTIONS[router.score_function](logits(x_TD, router_DE, router.router_dtype, per_expert.bias_E))
    if expert_id_TK is None:
        expert_id_TK = choose(score_TE, router, per_expert.selection_bias_E)
    clamped_id_TK = expert_id_TK.long().clamp(0, router_DE.shape[1] - 1)
    score_TK = score_TE.gather(1, clamped_id_TK)
    if router.score_function == "softmax_of_chosen":
        score_TK = torch.softmax(score_TK, dim=-1)
    if router.renormalize:
        score_TK = renormalized(score_TK, router.epsilon)
    if per_expert.scale_E is not None:
        score_TK = score_TK * take_by_expert(per_expert.scale_E.to(score_TK.dtype), clamped_id_TK)
    score_TK = score_TK * router.scale
    score_TK = score_TK.to(x_TD.dtype) if router.cast_scores else score_TK
    return Routing(score_TK, expert_id_TK, count_per_expert(expert_id_TK, router_DE.shape[1]))


def logits(
    x_TD: Float[Tensor, "T D"], router_DE: Float[Tensor, "D E"], dtype: str, bias_E: Float[Tensor, " E"] | None
) -> Float[Tensor, "T E"]:
    """x @ router + bias, computed in the dtype that `router_dtype` names, and returned as float32 or wider."""
    logits_dtype = torch.float32 if dtype == "float32" else torch.promote_types(x_TD.dtype, torch.float32)
    matmul_dtype = x_TD.dtype if dtype == "activations" else logits_dtype
    logits_TE = x_TD.to(matmul_dtype) @ router_DE.to(matmul_dtype)
    return (logits_TE if bias_E is None else logits_TE + bias_E.to(matmul_dtype)).to(logits_dtype)


def sqrt_softplus(logits_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """sqrt(log(1 + exp(logits))), as DeepSeek-V4 scores; below -40, exp(logits / 2), whose slope is finite."""
    small_TE = torch.exp(logits_TE.clamp(max=-40) / 2)  # at the bound PyTorch's clamp keeps the whole gradient
    softplus_TE = torch.logaddexp(logits_TE.clamp(min=-40), torch.zeros_like(logits_TE))
    return torch.where(logits_TE < -40, small_TE, softplus_TE.sqrt())


# Score functions by name. "softmax_of_chosen" chooses by logits, and its softmax is over the K chosen (gpt-oss).
SCORE_FUNCTIONS = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
    "softmax_of_chosen": lambda logits_TE: logits_TE,
}


def choose(
    score_TE: Float[Tensor, "T E"], router: Router, selection_bias_E: Float[Tensor, " E"] | None
) -> Integer[Tensor, "T K"]:
    """The K experts with the largest scores plus selection bias, within the best groups where there are groups."""
    if selection_bias_E is not None:
        score_TE = score_TE + selection_bias_E.to(score_TE.dtype)
    if router.groups > 1:
        outside_TE = ~in_best_groups(score_TE, router)
        score_TE = score_TE.masked_fill(outside_TE, 0 if router.outside_groups == "zero" else -torch.inf)
    return top_k_indices(score_TE, router.top_k)


def in_best_groups(score_TE: Float[Tensor, "T E"], router: Router) -> Bool[Tensor, "T E"]:
    """Which experts are in the groups whose best expert, or best two, have the largest scores."""
    score_TGn = score_TE.unflatten(1, (router.groups, -1))
    best_TGn = score_TGn.sort(dim=-1, descending=True).values[..., : 2 if router.group_score == "top2" else 1]
    best_TG = top_k_indices(best_TGn.sum(dim=-1), router.top_groups)
    inside_TG = torch.zeros_like(score_TGn[..., 0], dtype=torch.bool).scatter(1, best_TG, True)
    return inside_TG[..., None].expand_as(score_TGn).flatten(1)


def top_k_indices(score_Tn: Float[Tensor, "T n"], k: int) -> Integer[Tensor, "T k"]:
    """The indices of each row's k largest numbers, largest first; among equal numbers, the lower index first."""
    return score_Tn.argsort(dim=-1, descending=True, stable=True)[:, :k]


def renormalized(score_TK: Float[Tensor, "T K"], epsilon: float) -> Float[Tensor, "T K"]:
    """A token's scores over their sum, which `epsilon` guards: 1e-20 in DeepSeek-V3, none in Mixtral."""
    # PyTorch's own gradient divides by the sum twice. The square of it, which underflows, is never formed.
    return score_TK / (score_TK.sum(dim=-1, keepdim=True) + epsilon)


def take_by_expert(a_E: Float[Tensor, " E"], expert_id_TK: Integer[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """a[expert_id], by a product with ones and zeros, whose gradient needs no scatter-add."""
    one_hot_TKE = expert_id_TK[..., None] == torch.arange(a_E.shape[0], device=a_E.device)
    return one_hot_TKE.to(a_E.dtype) @ a_E


def weigh_input(
    x_TD: Float[Tensor, "T D"], score_TK: Float[Tensor, "T K"], score_on: str
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]:
    """The experts' input, and the weights of their outputs.

    By default these are the tokens and their scores. Where scores are on the input (Llama 4), they are the tokens times
    their one score, and ones.

    Shapes: input_TD, weight_TK.
    """
    if score_on == "output":
        return x_TD, score_TK
    return (x_TD * score_TK).to(x_TD.dtype), torch.ones_like(score_TK)


def count_per_expert(expert_id_TK: Integer[Tensor, "T K"], n_experts: int) -> Integer[Tensor, " E"]:
    """How many assignments chose each expert; an id out of range is counted nowhere."""
    expert_E = torch.arange(n_experts, device=expert_id_TK.device)
    return (expert_E[:, None] == expert_id_TK.reshape(-1)).sum(dim=1)
