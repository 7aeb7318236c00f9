"""Wrong input is refused here, before any row is sent to another rank; a wrong output size, before it is used."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

if TYPE_CHECKING:  # these modules import this one
    import torch_impl.experts
    import torch_impl.routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
    x_TD: Tensor,
    router_DE: Tensor,
    router: "torch_impl.routing.Router",
    expert_id_TK: Tensor | None,
    per_expert: "torch_impl.routing.PerExpert",
) -> None:
    """Raises ValueError unless tokens, router and options fit together: shapes, dtypes, devices, K <= E."""
    check_autocast(x_TD)
    if x_TD.ndim != 2 or router_DE.ndim != 2 or x_TD.shape[1] != router_DE.shape[0]:
        raise ValueError(
            f"x must be [T, D] and router [D, E], got {tuple(x_TD.shape)} and {tuple(router_DE.shape)}: "
            "flatten the batch into T, and keep the router as [D, E] (nn.Linear keeps the transpose)"
        )
    if x_TD.dtype not in DTYPES or not router_DE.is_floating_point():
        raise ValueError(
            f"x is {x_TD.dtype} and router {router_DE.dtype}: x must be float32, bfloat16, float16 or float64, "
            "and router floating point"
        )
    if x_TD.device != router_DE.device:
        raise ValueError(f"x is on {x_TD.device} and router on {router_DE.device}: move one to the other's device")
    if not 1 <= router.top_k <= router_DE.shape[1]:
        raise ValueError(f"top_k is {router.top_k} with {router_DE.shape[1]} experts: it must be between 1 and E")
    check_options(router, router_DE.shape[1])
    check_per_expert(per_expert, router_DE)
    if expert_id_TK is not None:
        if expert_id_TK.shape != (x_TD.shape[0], router.top_k):
            raise ValueError(
                f"expert ids have shape {tuple(expert_id_TK.shape)}, scores will have {(x_TD.shape[0], router.top_k)}: "
                "replay the ids of the same tokens and the same top_k"
            )
        check_expert_ids(expert_id_TK, router_DE.shape[1])


def check_options(router: "torch_impl.routing.Router", n_experts: int) -> None:
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


def check_per_expert(per_expert: "torch_impl.routing.PerExpert", router_DE: Tensor) -> None:
    """Raises ValueError unless each per-expert array is [E], floating point, and on the router's device."""
    E = router_DE.shape[1]
    for name, a in per_expert._asdict().items():
        if a is None:
            continue
        if a.shape != (E,) or not a.is_floating_point():
            raise ValueError(f"{name} is {a.dtype} {tuple(a.shape)}: it must be floating point, [{E}]")
        if a.device != router_DE.device:
            raise ValueError(
                f"{name} is on {a.device} and router on {router_DE.device}: move one to the other's device"
            )


def check_routing(x_TD: Tensor, score_TK: Tensor, expert_id_TK: Tensor, counts_E: Tensor) -> None:
    """Raises ValueError unless scores, ids and counts belong to x: T and K, dtypes, device, ids in range."""
    if score_TK.shape != expert_id_TK.shape or score_TK.ndim != 2 or score_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"scores have shape {tuple(score_TK.shape)} and expert ids {tuple(expert_id_TK.shape)} for x "
            f"{tuple(x_TD.shape)}: both must be [T, K] with x's T"
        )
    if not score_TK.is_floating_point():
        raise ValueError(f"scores are {score_TK.dtype}: they must be floating point")
    if not x_TD.device == score_TK.device == expert_id_TK.device:
        raise ValueError(
            f"x is on {x_TD.device}, scores on {score_TK.device}, expert ids on {expert_id_TK.device}: "
            "move them to one device"
        )
    if counts_E.ndim != 1 or counts_E.dtype not in (torch.int32, torch.int64) or counts_E.device != x_TD.device:
        raise ValueError(
            f"counts are {counts_E.dtype} {tuple(counts_E.shape)} on {counts_E.device}: they must be integers [E], "
            "on x's device"
        )
    if not 1 <= expert_id_TK.shape[1] <= counts_E.shape[0]:
        raise ValueError(
            f"K is {expert_id_TK.shape[1]} with {counts_E.shape[0]} experts: a token chooses at least one, and cannot "
            "choose more than there are"
        )
    check_expert_ids(expert_id_TK, counts_E.shape[0], counts_E)


def check_expert_ids(expert_id_TK: Tensor, n_experts: int, counts_E: Tensor | None = None) -> None:
    """Raises ValueError on ids that are not integers, out of [0, E), twice in one token, or unlike the counts.

    Values are read on a CPU only: on a GPU that would cost a sync. There `check_splits` finds ids out of range.
    """
    if expert_id_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert ids are {expert_id_TK.dtype}: they must be int32 or int64")
    if expert_id_TK.device.type != "cpu" or expert_id_TK.numel() == 0 or is_captured():
        return
    low, high = int(expert_id_TK.min()), int(expert_id_TK.max())
    if low < 0 or high >= n_experts:
        raise ValueError(
            f"expert ids run from {low} to {high} with {n_experts} experts: they must be in [0, {n_experts})"
        )
    sorted_TK = expert_id_TK.sort(dim=1).values
    twice_T = (sorted_TK[:, 1:] == sorted_TK[:, :-1]).any(dim=1)
    if twice_T.any():
        token = int(twice_T.nonzero()[0])
        raise ValueError(
            f"token {token} chose experts {expert_id_TK[token].tolist()}: a token's experts must differ, "
            "or the bound P*T*min(K, e) on the rows a rank receives does not hold"
        )
    if counts_E is not None and not expert_id_TK.reshape(-1).bincount(minlength=n_experts).equal(counts_E.long()):
        raise ValueError(
            f"counts per expert are {counts_E.tolist()}, which is not how often the expert ids name each expert: "
            "pass the counts of the same routing (count_per_expert)"
        )


def check_experts(
    x_TD: Tensor,
    n_experts: int,
    n_ranks: int,
    w_gate_eDF: Tensor | None,
    w_up_eDF: Tensor,
    w_down_eFD: Tensor,
    experts: "torch_impl.experts.Experts",
    biases: "torch_impl.experts.Biases",
    shared: "torch_impl.experts.Shared | None",
) -> None:
    """Raises ValueError unless the weights are this rank's E // P experts, in x's dtype and on x's device."""
    check_experts_per_rank(n_experts, n_ranks)
    check_autocast(x_TD)
    if x_TD.dtype not in DTYPES:
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
                f"{name} has shape {tuple(a.shape)}, expected {shape}: this rank holds "
                f"e = {n_experts} // {n_ranks} = {e} experts of width D = {D} and hidden width F = {F}"
            )
        if a.dtype != x_TD.dtype or a.device != x_TD.device:
            raise ValueError(
                f"{name} is {a.dtype} on {a.device} and x is {x_TD.dtype} on {x_TD.device}: convert one to the other"
            )
    check_expert_options(experts, gated=w_gate_eDF is not None)


def check_expert_options(experts: "torch_impl.experts.Experts", gated: bool) -> None:
    """Raises ValueError on an unknown activation, a clamp that is not positive, or gate options without a gate."""
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {experts.activation!r}: it must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if experts.clamp is not None and not experts.clamp > 0:
        raise ValueError(f"clamp is {experts.clamp}: it must be positive, or None")
    if not gated and (experts.clamp is not None or experts.up_offset):
        raise ValueError("clamp and up_offset need experts with a gate: pass w_gate, or leave them out")


def check_autocast(x_TD: Tensor) -> None:
    """Raises ValueError under autocast: it would compute in a dtype other than x's, and the router in 16 bits."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        raise ValueError(
            f"autocast to {torch.get_autocast_dtype(device)} is on: matmuls would not be in the dtypes that the layer "
            f"states. Cast x and the weights, and call it under torch.autocast({device!r}, enabled=False)"
        )


def check_experts_per_rank(n_experts: int, n_ranks: int) -> None:
    """Raises ValueError unless every rank gets the same number of experts."""
    if n_experts % n_ranks:
        raise ValueError(f"{n_experts} experts do not divide over {n_ranks} ranks: E must be a multiple of P")


def check_output_size(output_size: int, n_rows: int) -> None:
    """Raises ValueError unless the permute's output has exactly the rows that were received."""
    check_sizes(
        output_size == n_rows,
        lambda: (
            f"output_size is {output_size} but {n_rows} rows were received: pass the total of the receive splits, "
            "or leave it out"
        ),
    )


def check_splits(sent: int, n_rows: int) -> None:
    """Raises ValueError unless every row has a rank to go to."""
    check_sizes(
        sent == n_rows,
        lambda: (
            f"there are {n_rows} rows to send, but the counts per expert add up to {sent}: "
            "an expert id is out of range, or the counts belong to another routing"
        ),
    )


def tell_most_received(n_received: int, most: int) -> None:
    """Tells a compiler how many rows a rank can receive at most; the compiled code asserts it.

    Without this bound the symbol for R ranges up to infinity, and compiled code has to index with 64 bits.
    """
    if is_captured():
        torch._check(n_received <= most)


def check_sizes(condition: bool, message: Callable[[], str]) -> None:
    """Raises ValueError unless the condition on sizes holds. It costs no sync.

    Under capture, sizes are symbols. The compiler then assumes the condition, and the compiled code asserts it with a
    RuntimeError in the compiler's words.
    """
    if is_captured():
        torch._check(condition)
    elif not condition:
        raise ValueError(message())


def is_captured() -> bool:
    """Whether torch.compile, torch.export or make_fx with fake tensors is tracing, so that values cannot be read."""
    return torch.compiler.is_compiling() or detect_fake_mode() is not None
