"""The whole layer: nine stages, in order. Dynamic shapes; `jax_impl/layer.py` is the same page with static ones.

To see what the shapes alone change, put `torch_impl/static/layer.py` beside this.

An array's name ends in its shape:

    P  ranks              E  experts              e  experts on a rank, E // P
    T  tokens on a rank   K  experts of a token   N  assignments on a rank, T * K
    D  width              F  hidden width         R  rows that a rank receives
"""

from typing import NamedTuple

import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts, check_routing, tell_most_received
from torch_impl.exchange import Splits, exchange_counts, n_ranks, return_tokens, send_tokens
from torch_impl.experts import Biases, Experts, Shared, apply_experts, shared_expert
from torch_impl.grouping import Grouped, combine, group_by_expert
from torch_impl.layout import ExpertMajor, to_expert_major, to_rank_major
from torch_impl.routing import PerExpert, Router, Routing, route, weigh_input


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order."""

    routing: Routing
    grouped: Grouped
    counts_Pe: Integer[Tensor, "P e"]
    splits: Splits
    received_RD: Float[Tensor, "R D"]
    expert_major: ExpertMajor
    y_RD: Float[Tensor, "R D"]
    rank_major_RD: Float[Tensor, "R D"]
    returned_ND: Float[Tensor, "N D"]
    shared_TD: Float[Tensor, "T D"] | None  # what the shared expert adds
    out_TD: Float[Tensor, "T D"]


def moe_layer(
    x_TD: Float[Tensor, "T D"],
    router_DE: Float[Tensor, "D E"],
    w_gate_eDF: Float[Tensor, "e D F"] | None,
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    router: Router,
    experts: Experts = Experts(),
    routing: Routing | None = None,
    per_expert: PerExpert = PerExpert(),
    biases: Biases = Biases(),
    shared: Shared | None = None,
    max_tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Stages:
    """One MoE layer over the ranks of `group` (None: the default group; no group at all means one rank).

    Tokens and the router are this rank's own copy; the weights are of this rank's e = E // P experts. A `routing`
    that was made before (recorded, recomputed, or with masked scores) replaces stage 1 and its arguments. Parts that a
    model lacks are None: a gate, biases, a shared expert.
    `max_tokens` is the most tokens that any rank has (default: as many as this rank). It gives a compiler the bound
    P*T*min(K, e) on R.

    Raises ValueError on a wrong shape, dtype, device or option before anything is sent to another rank. Where one rank
    alone raises, the others wait until the group's timeout. Values of ids are read on a CPU only: on a GPU an id out of
    range is found once the counts were exchanged, and an expert that a token chose twice is not found.
    """
    routing = route(x_TD, router_DE, router, per_expert=per_expert) if routing is None else routing
    score_TK, expert_id_TK, counts_E = routing
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(x_TD, counts_E.shape[0], n_ranks(group), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared)

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(input_TD, expert_id_TK, counts_E)
    counts_Pe, splits = exchange_counts(counts_E, group)
    (T, K), (P, e) = expert_id_TK.shape, counts_Pe.shape
    tell_most_received(splits.n_received, P * (T if max_tokens is None else max_tokens) * min(K, e))
    received_RD = send_tokens(grouped.x_ND, splits, group)
    expert_major = to_expert_major(received_RD, counts_Pe, splits.n_received)
    y_RD = apply_experts(expert_major.x_RD, counts_Pe.sum(dim=0), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    rank_major_RD = to_rank_major(y_RD, expert_major.source_R, expert_major.target_R)
    returned_ND = return_tokens(rank_major_RD, splits, group)
    out_TD = combine(returned_ND, weight_TK, grouped.slot_TK, grouped.assignment_N)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return Stages(
        routing, grouped, counts_Pe, splits, received_RD, expert_major, y_RD, rank_major_RD, returned_ND, shared_TD,
        out_TD,
    )  # fmt: skip
