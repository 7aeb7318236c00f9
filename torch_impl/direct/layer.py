"""The whole layer: rows go straight to their places, sizes stay on the device. `torch_impl/layer.py` has all stages.

Stage 2 only sorts. Stage 5 computes where rows go, before stage 4 writes them there, expert-major. There is no stage 7.

An array's name ends in its shape:

    P  ranks              E  experts              e  experts on a rank, E // P
    T  tokens on a rank   K  experts of a token   N  assignments on a rank, T * K
    D  width              F  hidden width         R  rows that a rank receives
"""

from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts, check_routing
from torch_impl.direct.checks import check_buffers
from torch_impl.direct.exchange import Buffers, exchange_counts, return_tokens, send_tokens
from torch_impl.direct.experts import Biases, Experts, Shared, apply_experts, shared_expert
from torch_impl.direct.grouping import Grouped, combine, group_by_expert
from torch_impl.direct.layout import ExpertMajor, to_expert_major
from torch_impl.routing import PerExpert, Router, Routing, route, weigh_input


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order. Here R is the most that a rank can receive, P*T*min(K, e).

    `placed_RD` and `returned_ND` lie in the buffers: the next step with the same buffers overwrites them. Rows of
    `placed_RD` and `y_RD` past those that arrive hold anything.
    """

    routing: Routing
    grouped: Grouped
    counts_PE: Integer[Tensor, "P E"]
    expert_major: ExpertMajor
    placed_RD: Float[Tensor, "R D"]
    y_RD: Float[Tensor, "R D"]
    returned_ND: Float[Tensor, "N D"]
    shared_TD: Float[Tensor, "T D"] | None  # what the shared expert adds
    out_TD: Float[Tensor, "T D"]
    dropped: Integer[Tensor, ""]  # this rank's ids that are out of range, or repeated within a token


def moe_layer(
    x_TD: Float[Tensor, "T D"],
    router_DE: Float[Tensor, "D E"],
    w_gate_eDF: Float[Tensor, "e D F"] | None,
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    router: Router,
    buffers: Buffers,
    experts: Experts = Experts(),
    routing: Routing | None = None,
    per_expert: PerExpert = PerExpert(),
    biases: Biases = Biases(),
    shared: Shared | None = None,
) -> Stages:
    """One MoE layer over the ranks that made `buffers` together.

    Tokens and the router are this rank's own copy; the weights are of this rank's e = E // P experts. A `routing`
    that was made before (recorded, recomputed, or with masked scores) replaces stage 1 and its arguments. Parts that a
    model lacks are None: a gate, biases, a shared expert.

    Raises ValueError on wrong input, before anything is sent to another rank. Backward raises RuntimeError if another
    forward pass has used the buffers in between.
    """
    routing = route(x_TD, router_DE, router, per_expert=per_expert) if routing is None else routing
    score_TK, expert_id_TK, counts_E = routing
    n_ranks = buffers.counts_PE.own_OD.shape[0]
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(x_TD, counts_E.shape[0], n_ranks, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared)
    check_buffers(x_TD, expert_id_TK, counts_E, buffers)

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(expert_id_TK, counts_E)
    counts_PE = exchange_counts(grouped.kept_E, buffers)
    expert_major = to_expert_major(grouped.slot_TK, counts_PE, buffers)
    place_N, origin_R = expert_major
    placed_RD = send_tokens(input_TD, grouped.slot_TK, place_N, origin_R, buffers)
    counts_e = counts_PE.sum(dim=0).chunk(n_ranks)[buffers.rank]  # rows of this rank's experts, from all ranks
    y_RD = apply_experts(placed_RD, counts_e, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    returned_ND = return_tokens(y_RD, place_N, origin_R, buffers)
    out_TD = combine(y_RD, returned_ND, weight_TK, grouped.slot_TK, place_N, buffers)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return Stages(
        routing, grouped, counts_PE, expert_major, placed_RD, y_RD, returned_ND, shared_TD, out_TD,
        expert_id_TK.numel() - grouped.kept_E.sum(),
    )  # fmt: skip
