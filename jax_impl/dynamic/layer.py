"""The whole layer: nine stages, in order. Sizes known on the device only; `torch_impl/layer.py` is the same page.

An array's name ends in its shape:

    P  ranks              E  experts              e  experts on a rank, E // P
    T  tokens on a rank   K  experts of a token   N  assignments on a rank, T * K
    D  width              F  hidden width         R  rows that a rank receives
"""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_experts, check_routing
from jax_impl.dynamic.exchange import Splits, exchange_counts, n_ranks, return_tokens, send_tokens
from jax_impl.dynamic.grouping import Grouped, combine, group_by_expert
from jax_impl.dynamic.layout import ExpertMajor, to_expert_major, to_rank_major
from jax_impl.experts import Biases, Experts, Shared, apply_experts, shared_expert
from jax_impl.routing import PerExpert, Router, Routing, route, weigh_input


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order. R is the most that a rank can receive, P*T*min(K, e)."""

    routing: Routing
    grouped: Grouped
    counts_Pe: Integer[Array, "P e"]
    splits: Splits
    received_RD: Float[Array, "R D"]
    expert_major: ExpertMajor
    y_RD: Float[Array, "R D"]
    rank_major_RD: Float[Array, "R D"]
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
    """One MoE layer over the ranks of the mapped axis `axis_name` (`shard_map` on GPUs; None means one rank).

    Tokens and the router are this rank's own copy; the weights are of this rank's e = E // P experts. A `routing`
    that was made before (recorded, recomputed, or with masked scores) replaces stage 1 and its arguments. Parts that a
    model lacks are None: a gate, biases, a shared expert.

    Raises ValueError on wrong input and, with an axis, on a CPU or under `vmap`, before anything is sent.
    """
    routing = route(x_TD, router_DE, router, per_expert=per_expert) if routing is None else routing
    score_TK, expert_id_TK, counts_E = routing
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(
        x_TD, counts_E.shape[0], n_ranks(axis_name), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared
    )

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(input_TD, expert_id_TK, counts_E)
    counts_Pe, splits = exchange_counts(grouped.kept_E, axis_name)
    (T, K), (P, e) = expert_id_TK.shape, counts_Pe.shape
    received_RD = send_tokens(grouped.x_ND, splits, P * T * min(K, e), axis_name)
    expert_major = to_expert_major(received_RD, counts_Pe)
    y_RD = apply_experts(expert_major.x_RD, counts_Pe.sum(axis=0), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    rank_major_RD = to_rank_major(y_RD, expert_major.source_R, expert_major.target_R)
    returned_ND = return_tokens(rank_major_RD, splits, T * K, axis_name)
    out_TD = combine(returned_ND, weight_TK, grouped.slot_TK, grouped.assignment_N)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    return Stages(
        routing, grouped, counts_Pe, splits, received_RD, expert_major, y_RD, rank_major_RD, returned_ND, shared_TD,
        out_TD, expert_id_TK.size - grouped.kept_E.sum(),
    )  # fmt: skip
