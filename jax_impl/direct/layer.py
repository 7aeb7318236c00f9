"""The whole layer: rows go straight to their places, sizes stay on the device. `torch_impl/direct` is the same page.

Stage 2 only sorts. Stage 5 computes where rows go, before stage 4 writes them there, expert-major. There is no stage 7.

An array's name ends in its shape:

    P  ranks              E  experts              e  experts on a rank, E // P
    T  tokens on a rank   K  experts of a token   N  assignments on a rank, T * K
    D  width              F  hidden width         R  rows that a rank receives
"""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_experts, check_routing
from jax_impl.direct.exchange import exchange_counts, return_tokens, send_tokens
from jax_impl.direct.grouping import Grouped, combine, group_by_expert
from jax_impl.direct.layout import ExpertMajor, to_expert_major
from jax_impl.direct.rows import ranks_of
from jax_impl.experts import Biases, Experts, Shared, apply_experts, shared_expert
from jax_impl.routing import PerExpert, Router, Routing, route, weigh_input


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order. R is the most that a rank can receive, P*T*min(K, e).

    Rows of `placed_RD` past those that arrive hold anything.
    """

    routing: Routing
    grouped: Grouped
    counts_PE: Integer[Array, "P E"]
    expert_major: ExpertMajor
    placed_RD: Float[Array, "R D"]
    y_RD: Float[Array, "R D"]
    returned_ND: Float[Array, "N D"]
    shared_TD: Float[Array, "T D"] | None  # what the shared expert adds
    out_TD: Float[Array, "T D"]
    dropped: Integer[Array, ""]  # this rank's ids that are out of range, or repeated within a token


def moe_layer(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    w_gate_eDF: Float[Array, "e D F"] | None,
    w_up_eDF: Float[Array, "e D F"],
    w_down_eFD: Float[Array, "e F D"],
    router: Router,
    experts: Experts = Experts(),
    routing: Routing | None = None,
    per_expert: PerExpert = PerExpert(),
    biases: Biases = Biases(),
    shared: Shared | None = None,
    axis_name: str | None = None,
) -> Stages:
    """One MoE layer over the ranks of the mapped axis `axis_name` (`shard_map` or `vmap`; None means one rank).

    Tokens and the router are this rank's own copy; the weights are of this rank's e = E // P experts. A `routing`
    that was made before (recorded, recomputed, or with masked scores) replaces stage 1 and its arguments. Parts that a
    model lacks are None: a gate, biases, a shared expert.

    Raises ValueError on wrong input, before anything is sent to another rank.
    """
    routing = route(x_TD, router_DE, router, per_expert=per_expert) if routing is None else routing
    score_TK, expert_id_TK, counts_E = routing
    P = ranks_of(axis_name).count
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(x_TD, counts_E.shape[0], P, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared)

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(expert_id_TK, counts_E)
    counts_PE = exchange_counts(grouped.kept_E, axis_name)
    expert_major = to_expert_major(grouped.slot_TK, counts_PE, axis_name)
    place_N, origin_R = expert_major
    placed_RD = send_tokens(input_TD, grouped.slot_TK, place_N, origin_R, axis_name)
    counts_e = counts_PE.sum(axis=0).reshape(P, -1)[ranks_of(axis_name).own]  # rows of this rank's experts
    y_RD = apply_experts(placed_RD, counts_e, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    returned_ND = return_tokens(y_RD, place_N, origin_R, axis_name)
    out_TD = combine(y_RD, returned_ND, weight_TK, grouped.slot_TK, place_N, axis_name)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return Stages(
        routing, grouped, counts_PE, expert_major, placed_RD, y_RD, returned_ND, shared_TD, out_TD,
        expert_id_TK.size - grouped.kept_E.sum(),
    )  # fmt: skip
