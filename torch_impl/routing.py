"""Stage 1: every token chooses K of E experts."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_router


class Router(NamedTuple):
    """How many experts a token chooses, and how its scores come out of the logits."""

    top_k: int
    score_function: str = "softmax"  # or "sigmoid"
    renormalize: bool = False  # divide a token's K scores by their sum
    scale: float = 1.0  # and multiply them


class Routing(NamedTuple):
    score_TK: Float[Tensor, "T K"]
    expert_id_TK: Integer[Tensor, "T K"]
    counts_E: Integer[Tensor, " E"]


def route(
    x_TD: Float[Tensor, "T D"],
    router_DE: Float[Tensor, "D E"],
    router: Router,
    expert_id_TK: Integer[Tensor, "T K"] | None = None,
) -> Routing:
    """Scores, expert ids and counts per expert, in float32 (float64 for float64 input).

        logits = x @ router;  score = softmax or sigmoid of logits;  the K largest scores win

    Equal scores go to the lower expert id: float32 cannot tell sigmoids of large logits apart. `renormalize` divides
    the K chosen scores by their sum (Mixtral, Qwen3); `scale` multiplies them last (DeepSeek-V3's routed scaling
    factor).
    `expert_id_TK` replays a choice made before (a recording, a recomputation): only its scores are computed. An id out
    of range that is not found here gets some expert's score, and is found or dropped later. Under another precision of
    float32 matmuls than PyTorch's default, "highest", other experts can win.

    Raises ValueError on a wrong shape, dtype, device, `top_k` or `score_function`, under autocast, and on replayed ids
    out of range where their values are at hand: on a CPU, not captured.
    """
    check_router(x_TD, router_DE, router, expert_id_TK)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(wide) @ router_DE.to(wide)
    score_TE = torch.softmax(logits_TE, dim=-1) if router.score_function == "softmax" else torch.sigmoid(logits_TE)
    if expert_id_TK is None:
        expert_id_TK = score_TE.argsort(dim=-1, descending=True, stable=True)[:, : router.top_k]
    score_TK = score_TE.gather(1, expert_id_TK.long().clamp(0, router_DE.shape[1] - 1))
    if router.renormalize:
        score_TK = renormalized(score_TK)
    return Routing(score_TK * router.scale, expert_id_TK, count_per_expert(expert_id_TK, router_DE.shape[1]))


def renormalized(score_TK: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """A token's scores over their sum, guarded by 1e-20 as DeepSeek-V3 does."""
    return score_TK / (score_TK.sum(dim=-1, keepdim=True) + 1e-20)


def count_per_expert(expert_id_TK: Integer[Tensor, "T K"], n_experts: int) -> Integer[Tensor, " E"]:
    """How many assignments chose each expert; an id out of range is counted nowhere."""
    expert_E = torch.arange(n_experts, device=expert_id_TK.device)
    return (expert_id_TK.reshape(-1, 1) == expert_E).sum(dim=0)
