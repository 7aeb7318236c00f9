"""The whole layer: nine stages, in order. Static shapes; `jax_impl/layer.py` is the same page.

An array's name ends in its shape:

    P  ranks                  E  experts              e  experts on a rank, E // P
    T  tokens on a rank       K  experts of a token   N  assignments on a rank, T * K
    D  width                  F  hidden width
    B  bins, P or E of them   C  rows of a bin        S  rows in expert-major order: [B * C], or [e, P * C] where B is E
"""

from typing import NamedTuple

import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts, check_routing
from torch_impl.experts import Biases, Experts, Shared
from torch_impl.routing import PerExpert, Router, Routing, route, weigh_input
from torch_impl.static.checks import check_bins
from torch_impl.static.exchange import exchange_counts, n_ranks, return_tokens, send_tokens
from torch_impl.static.experts import apply_experts, shared_expert
from torch_impl.static.grouping import Capacity, Grouped, combine, group_by_expert
from torch_impl.static.layout import ExpertMajor, to_expert_major, to_rank_major


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order, and what was dropped."""

    routing: Routing
    grouped: Grouped
    counts_Pe: Integer[Tensor, "P e"]
    received_BCD: Float[Tensor, "B C D"]
    expert_major: ExpertMajor
    y_SD: Float[Tensor, "*S D"]
    rank_major_BCD: Float[Tensor, "B C D"]
    returned_BCD: Float[Tensor, "B C D"]
    shared_TD: Float[Tensor, "T D"] | None  # what the shared expert adds
    out_TD: Float[Tensor, "T D"]
    dropped_E: Integer[Tensor, " E"]  # this rank's assignments dropped, per expert
    dropped: Integer[Tensor, ""]  # the same in total, ids out of range included


def moe_layer(
    x_TD: Float[Tensor, "T D"],
    router_DE: Float[Tensor, "D E"],
    w_gate_eDF: Float[Tensor, "e D F"] | None,
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    router: Router,
    capacity: Capacity,
    experts: Experts = Experts(),
    routing: Routing | None = None,
    per_expert: PerExpert = PerExpert(),
    biases: Biases = Biases(),
    shared: Shared | None = None,
    group: dist.ProcessGroup | None = None,
) -> Stages:
    """One MoE layer over the ranks of `group` (None: the default group; no group at all means one rank).

    Tokens and the router are this rank's own copy; the weights are of this rank's e = E // P experts. A `routing`
    that was made before (recorded, recomputed, or with masked scores) replaces stage 1 and its arguments. Parts that a
    model lacks are None: a gate, biases, a shared expert.

    Raises ValueError on wrong input, before anything is sent to another rank.
    """
    routing = route(x_TD, router_DE, router, per_expert=per_expert) if routing is None else routing
    score_TK, expert_id_TK, counts_E = routing
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(x_TD, counts_E.shape[0], n_ranks(group), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared)
    check_bins(capacity.n_bins, n_ranks(group), counts_E.shape[0])

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(input_TD, expert_id_TK, score_TK, counts_E, capacity)
    counts_Pe = exchange_counts(grouped.kept_E, group)
    received_BCD = send_tokens(grouped.x_BCD, group)
    expert_major = to_expert_major(received_BCD, counts_Pe)
    y_SD = apply_experts(expert_major.x_SD, counts_Pe.sum(dim=0), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    rank_major_BCD = to_rank_major(y_SD, expert_major.source_S, expert_major.target_BC)
    returned_BCD = return_tokens(rank_major_BCD, group)
    out_TD = combine(returned_BCD, weight_TK, grouped.slot_TK, grouped.assignment_BC)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    dropped_E = counts_E - grouped.kept_E
    return Stages(
        routing, grouped, counts_Pe, received_BCD, expert_major, y_SD, rank_major_BCD, returned_BCD, shared_TD, out_TD,
        dropped_E, expert_id_TK.numel() - grouped.kept_E.sum(),
    )  # fmt: skip
