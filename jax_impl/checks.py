"""Wrong input is refused here, before anything is sent to another rank."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

if TYPE_CHECKING:  # they import what is here
    import jax_impl.experts
    import jax_impl.routing

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_router(x_TD: Array, router_DE: Array, router: "jax_impl.routing.Router", expert_id_TK: Array | None) -> None:
    """Raises ValueError unless these make a router: shapes, dtypes, K <= E, known score function."""
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
    if router.score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function is {router.score_function!r}: it must be 'softmax' or 'sigmoid'")
    if not abs(router.scale) < math.inf:
        raise ValueError(f"scale is {router.scale}: it must be finite")
    if expert_id_TK is not None:
        if expert_id_TK.shape != (x_TD.shape[0], router.top_k):
            raise ValueError(
                f"expert ids have shape {expert_id_TK.shape}, scores will have {(x_TD.shape[0], router.top_k)}: "
                "replay the ids of the same tokens and the same top_k"
            )
        check_expert_ids(expert_id_TK, router_DE.shape[1])


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
    """Raises ValueError on ids that are not integers, out of [0, E), twice in one token, or counted otherwise.

    Values can be read outside a trace only; inside one, `group_by_expert` drops and counts what is out of range.
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
            f"counts per expert are {counts_E.tolist()}, which is not how often the ids name each: "
            "pass the counts of the same routing (count_per_expert)"
        )


def check_experts(
    x_TD: Array,
    n_experts: int,
    n_ranks: int,
    w_gate_eDF: Array,
    w_up_eDF: Array,
    w_down_eFD: Array,
    experts: "jax_impl.experts.Experts",
) -> None:
    """Raises ValueError unless the weights are this rank's E // P experts, in x's dtype."""
    check_experts_per_rank(n_experts, n_ranks)
    if x_TD.dtype.name not in DTYPES:
        raise ValueError(f"x is {x_TD.dtype}: it must be float32, bfloat16, float16 or float64")
    e, D, F = n_experts // n_ranks, x_TD.shape[1], w_gate_eDF.shape[-1]
    weights = {"w_gate": (w_gate_eDF, (e, D, F)), "w_up": (w_up_eDF, (e, D, F)), "w_down": (w_down_eFD, (e, F, D))}
    for name, (w, shape) in weights.items():
        if w.shape != shape:
            raise ValueError(
                f"{name} has shape {w.shape}, expected {shape}: this rank holds "
                f"e = {n_experts} // {n_ranks} = {e} experts of width D = {D} and hidden width F = {F}"
            )
        if w.dtype != x_TD.dtype:
            raise ValueError(f"{name} is {w.dtype} and x is {x_TD.dtype}: convert one to the other")
    if experts.activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {experts.activation!r}: it must be 'silu' or 'gelu_tanh'")


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
        raise ValueError(f"a capacity of {rows} rows per bin: it must be at least 1")
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
