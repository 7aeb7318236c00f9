"""Wrong input is refused here, before anything is sent to another rank."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

if TYPE_CHECKING:  # these modules import this one
    import jax_impl.experts
    import jax_impl.routing

DTYPES = ("float32", "bfloat16", "float16", "float64")

# The values that each string option of a router may have.
ROUTER_WORDS = {
    "score_function": ("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"),
    "group_score": ("top2", "max"),
    "outside_groups": ("minus_inf", "zero"),
    "score_on": ("output", "input"),
    "router_dtype": ("wide", "float32", "activations"),
}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu2")


def check_router(
    x_TD: Array,
    router_DE: Array,
    router: "jax_impl.routing.Router",
    expert_id_TK: Array | None,
    per_expert: "jax_impl.routing.PerExpert",
) -> None:
    """Raises ValueError unless tokens, router and options fit together: shapes, dtypes, K <= E."""
    if x_TD.ndim != 2 or router_DE.ndim != 2 or x_TD.shape[1] != router_DE.shape[0]:
        raise ValueError(
            f"x must be [T, D] and router [D, E], got {x_TD.shape} and {router_DE.shape}: "
            "flatten the batch into T, and keep the router as [D, E]"
        )
    if x_TD.dtype.name not in DTYPES or not jnp.issubdtype(router_DE.dtype, jnp.floating):
        raise ValueError(
            f"x is {x_TD.dtype} and router {router_DE.dtype}: x must be float32, bfloat16, float16 or float64, "
            "and router floating point"
        )
    if not 1 <= router.top_k <= router_DE.shape[1]:
        raise ValueError(f"top_k is {router.top_k} with {router_DE.shape[1]} experts: it must be between 1 and E")
    check_options(router, router_DE.shape[1])
    check_per_expert(per_expert, router_DE)
    if expert_id_TK is not None:
        if expert_id_TK.shape != (x_TD.shape[0], router.top_k):
            raise ValueError(
                f"expert ids have shape {expert_id_TK.shape}, scores will have {(x_TD.shape[0], router.top_k)}: "
                "replay the ids of the same tokens and the same top_k"
            )
        check_expert_ids(expert_id_TK, router_DE.shape[1])


def check_options(router: "jax_impl.routing.Router", n_experts: int) -> None:
    """Raises ValueError on an unknown word, a scale or epsilon out of range, or impossible groups.

    Groups must divide the experts, and the best groups must hold enough experts to choose from.
    """
    for name, words in ROUTER_WORDS.items():
        if getattr(router, name) not in words:
            raise ValueError(f"{name} is {getattr(router, name)!r}: it must be one of {', '.join(map(repr, words))}")
    if not abs(router.scale) < math.inf:
        raise ValueError(f"scale is {router.scale}: it must be finite")
    if not 0 <= router.epsilon < math.inf:
        raise ValueError(f"epsilon is {router.epsilon}: it must be finite, and not negative")
    if router.score_on == "input" and router.top_k != 1:
        raise ValueError(f"score_on is 'input' with top_k {router.top_k}: a token has one input, so it takes top_k 1")
    if router.groups < 1 or n_experts % router.groups or not 1 <= router.top_groups <= router.groups:
        raise ValueError(
            f"groups is {router.groups} and top_groups {router.top_groups} with {n_experts} experts: groups must "
            "divide the number of experts, and top_groups must be between 1 and groups"
        )
    size = n_experts // router.groups
    if router.groups > 1 and (router.top_k > router.top_groups * size or (router.group_score == "top2" and size < 2)):
        raise ValueError(
            f"top_k is {router.top_k} with {router.top_groups} groups of {size} experts to choose from: use more "
            "or larger groups; group_score 'top2' needs at least two experts in each"
        )


def check_per_expert(per_expert: "jax_impl.routing.PerExpert", router_DE: Array) -> None:
    """Raises ValueError unless each per-expert array is [E] and floating point."""
    E = router_DE.shape[1]
    for name, a in per_expert._asdict().items():
        if a is not None and (a.shape != (E,) or not jnp.issubdtype(a.dtype, jnp.floating)):
            raise ValueError(f"{name} is {a.dtype} {tuple(a.shape)}: it must be floating point, [{E}]")


def check_routing(x_TD: Array, score_TK: Array, expert_id_TK: Array, counts_E: Array) -> None:
    """Raises ValueError unless scores, ids and counts belong to x: T and K, dtypes, ids in range."""
    if score_TK.shape != expert_id_TK.shape or score_TK.ndim != 2 or score_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"scores have shape {score_TK.shape} and expert ids {expert_id_TK.shape} for x "
            f"{x_TD.shape}: both must be [T, K] with x's T"
        )
    if not jnp.issubdtype(score_TK.dtype, jnp.floating):
        raise ValueError(f"scores are {score_TK.dtype}: they must be floating point")
    if counts_E.ndim != 1 or counts_E.dtype.name not in ("int32", "int64"):
        raise ValueError(f"counts are {counts_E.dtype} {counts_E.shape}: they must be integers [E]")
    if not 1 <= expert_id_TK.shape[1] <= counts_E.shape[0]:
        raise ValueError(
            f"K is {expert_id_TK.shape[1]} with {counts_E.shape[0]} experts: a token chooses at least one, and cannot "
            "choose more than there are"
        )
    check_expert_ids(expert_id_TK, counts_E.shape[0], counts_E)


def check_expert_ids(expert_id_TK: Array, n_experts: int, counts_E: Array | None = None) -> None:
    """Raises ValueError on ids that are not integers, out of [0, E), twice in one token, or unlike the counts.

    Values can be read outside a trace only. Inside one, `group_by_expert` drops and counts ids that are out of range.
    """
    if expert_id_TK.dtype.name not in ("int32", "int64"):
        raise ValueError(f"expert ids are {expert_id_TK.dtype}: they must be int32 or int64")
    if isinstance(expert_id_TK, Tracer) or expert_id_TK.size == 0:
        return
    ids_TK = np.asarray(expert_id_TK)
    low, high = int(ids_TK.min()), int(ids_TK.max())
    if low < 0 or high >= n_experts:
        raise ValueError(
            f"expert ids run from {low} to {high} with {n_experts} experts: they must be in [0, {n_experts})"
        )
    sorted_TK = np.sort(ids_TK, axis=1)
    twice_T = (sorted_TK[:, 1:] == sorted_TK[:, :-1]).any(axis=1)
    if twice_T.any():
        token = int(twice_T.nonzero()[0][0])
        raise ValueError(
            f"token {token} chose experts {ids_TK[token].tolist()}: a token's experts must differ, "
            "or the no-drop capacity T*min(K, e) does not hold"
        )
    if counts_E is None or isinstance(counts_E, Tracer):
        return
    if not np.array_equal(np.bincount(ids_TK.reshape(-1), minlength=n_experts), counts_E):
        raise ValueError(
            f"counts per expert are {counts_E.tolist()}, which is not how often the expert ids name each expert: "
            "pass the counts of the same routing (count_per_expert)"
        )


def check_experts(
    x_TD: Array,
    n_experts: int,
    n_ranks: int,
    w_gate_eDF: Array | None,
    w_up_eDF: Array,
    w_down_eFD: Array,
    experts: "jax_impl.experts.Experts",
    biases: "jax_impl.experts.Biases",
    shared: "jax_impl.experts.Shared | None",
) -> None:
    """Raises ValueError unless the weights are this rank's E // P experts, in x's dtype."""
    check_experts_per_rank(n_experts, n_ranks)
    if x_TD.dtype.name not in DTYPES:
        raise ValueError(f"x is {x_TD.dtype}: it must be float32, bfloat16, float16 or float64")
    e, D, F = n_experts // n_ranks, x_TD.shape[1], w_up_eDF.shape[-1]
    weights = {"w_gate": (w_gate_eDF, (e, D, F)), "w_up": (w_up_eDF, (e, D, F)), "w_down": (w_down_eFD, (e, F, D))}
    weights |= {"b_gate": (biases.gate_eF, (e, F)), "b_up": (biases.up_eF, (e, F)), "b_down": (biases.down_eD, (e, D))}
    if w_gate_eDF is None and biases.gate_eF is not None:
        raise ValueError("b_gate is given without w_gate: pass both, or neither")
    if shared is not None:
        H = shared.w_up_DH.shape[-1]
        weights |= {"shared w_gate": (shared.w_gate_DH, (D, H)), "shared w_up": (shared.w_up_DH, (D, H))}
        weights |= {"shared w_down": (shared.w_down_HD, (H, D)), "shared score": (shared.score_D, (D,))}
        if (shared.w_gate_DH is None) != (w_gate_eDF is None):
            raise ValueError("only one of w_gate and shared w_gate is given: pass both, or neither")
    for name, (a, shape) in weights.items():
        if a is None:
            continue
        if a.shape != shape:
            raise ValueError(
                f"{name} has shape {a.shape}, expected {shape}: this rank holds "
                f"e = {n_experts} // {n_ranks} = {e} experts of width D = {D} and hidden width F = {F}"
            )
        if a.dtype != x_TD.dtype:
            raise ValueError(f"{name} is {a.dtype} and x is {x_TD.dtype}: convert one to the other")
    check_expert_options(experts, gated=w_gate_eDF is not None)


def check_expert_options(experts: "jax_impl.experts.Experts", gated: bool) -> None:
    """Raises ValueError on an unknown activation, a clamp that is not positive, or gate options without a gate."""
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {experts.activation!r}: it must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if experts.clamp is not None and not experts.clamp > 0:
        raise ValueError(f"clamp is {experts.clamp}: it must be positive, or None")
    if not gated and (experts.clamp is not None or experts.up_offset):
        raise ValueError("clamp and up_offset need experts with a gate: pass w_gate, or leave them out")


def check_experts_per_rank(n_experts: int, n_ranks: int) -> None:
    """Raises ValueError unless every rank gets the same number of experts."""
    if n_experts % n_ranks:
        raise ValueError(f"{n_experts} experts do not divide over {n_ranks} ranks: E must be a multiple of P")


def check_capacity_factor(factor: object, per: str, n_experts: int, n_ranks: int, align: int) -> None:
    """Raises ValueError unless the factor is None or a finite positive number, and the bins are ranks or experts."""
    check_experts_per_rank(n_experts, n_ranks)
    if per not in ("rank", "expert"):
        raise ValueError(f"capacity_per is {per!r}: it must be 'rank' or 'expert'")
    if align < 1:
        raise ValueError(f"align is {align}: it must be at least 1")
    if factor is None:
        return
    try:
        exact = Fraction(str(factor))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if exact <= 0:
        raise ValueError(
            f"the capacity factor is {factor!r}: it must be finite and positive, as a decimal ('1.25') or a fraction "
            "('5/4'); leave it out for the bound at which nothing drops"
        )


def check_capacity(n_bins: int, rows: int, priority: str, n_experts: int) -> None:
    """Raises ValueError unless bins hold at least one row, divide the experts, and the priority is known."""
    if rows < 1:
        raise ValueError(f"the capacity is {rows} rows per bin: it must be at least 1")
    if n_bins < 1 or n_experts % n_bins:
        raise ValueError(f"{n_bins} bins for {n_experts} experts: use one bin per rank, or one per expert")
    check_priority(priority)


def check_priority(priority: str) -> None:
    """Raises ValueError on an unknown priority."""
    if priority not in ("token", "choice", "score"):
        raise ValueError(f"priority is {priority!r}: it must be 'token', 'choice' or 'score'")


def check_bins(n_bins: int, n_ranks: int, n_experts: int) -> None:
    """Raises ValueError unless there is a bin for each rank, or one for each expert."""
    if n_bins not in (n_ranks, n_experts):
        raise ValueError(
            f"{n_bins} bins for {n_ranks} ranks of {n_experts} experts in all: use one bin per rank, or one per expert"
        )
