"""The whole layer: nine stages, in order. Static shapes; `torch_impl/layer.py` is the same page with dynamic ones.

To see what the shapes alone change, put `jax_impl/dynamic/layer.py` beside this.

An array's name ends in its shape:

    P  ranks                  E  experts              e  experts on a rank, E // P
    T  tokens on a rank       K  experts of a token   N  assignments on a rank, T * K
    D  width                  F  hidden width
    B  bins, P or E of them   C  rows of a bin        S  rows in expert-major order: [B * C], or [e, P * C] where B is E
"""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.checks import check_bins, check_experts, check_routing
from jax_impl.exchange import exchange_counts, n_ranks, return_tokens, send_tokens
from jax_impl.experts import Biases, Experts, Shared, apply_experts, shared_expert
from jax_impl.grouping import Capacity, Grouped, combine, group_by_expert
from jax_impl.layout import ExpertMajor, to_expert_major, to_rank_major
from jax_impl.routing import PerExpert, Router, Routing, route, weigh_input


class Stages(NamedTuple):
    """Every intermediate of one forward pass, in order, and what was dropped."""

    routing: Routing
    grouped: Grouped
    counts_Pe: Integer[Array, "P e"]
    received_BCD: Float[Array, "B C D"]
    expert_major: ExpertMajor
    y_SD: Float[Array, "*S D"]
    rank_major_BCD: Float[Array, "B C D"]
    returned_BCD: Float[Array, "B C D"]
    shared_TD: Float[Array, "T D"] | None  # what the shared expert adds
    out_TD: Float[Array, "T D"]
    dropped_E: Integer[Array, " E"]  # this rank's assignments dropped, per expert
    dropped: Integer[Array, ""]  # the same in total, ids out of range included


def moe_layer(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    w_gate_eDF: Float[Array, "e D F"] | None,
    w_up_eDF: Float[Array, "e D F"],
    w_down_eFD: Float[Array, "e F D"],
    router: Router,
    capacity: Capacity,
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
    check_routing(x_TD, score_TK, expert_id_TK, counts_E)
    check_experts(
        x_TD, counts_E.shape[0], n_ranks(axis_name), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared
    )
    check_bins(capacity.n_bins, n_ranks(axis_name), counts_E.shape[0])

    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)
    grouped = group_by_expert(input_TD, expert_id_TK, score_TK, counts_E, capacity)
    counts_Pe = exchange_counts(grouped.kept_E, axis_name)
    received_BCD = send_tokens(grouped.x_BCD, axis_name)
    expert_major = to_expert_major(received_BCD, counts_Pe)
    y_SD = apply_experts(expert_major.x_SD, counts_Pe.sum(axis=0), w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    rank_major_BCD = to_rank_major(y_SD, expert_major.source_S, expert_major.target_BC)
    returned_BCD = return_tokens(rank_major_BCD, axis_name)
    out_TD = combine(returned_BCD, weight_TK, grouped.slot_TK, grouped.assignment_BC)
    shared_TD = None if shared is None else shared_expert(x_TD, shared, experts)
    out_TD = out_TD if shared_TD is None else out_TD + shared_TD
    dropped_E = counts_E - grouped.kept_E
    return Stages(
        routing, grouped, counts_Pe, received_BCD, expert_major, y_SD, rank_major_BCD, returned_BCD, shared_TD, out_TD,
        dropped_E, expert_id_TK.size - grouped.kept_E.sum(),
    )  # fmt: skip
