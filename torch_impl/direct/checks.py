"""Buffers that do not fit, or are in use, are refused here. All other checks are in `torch_impl.checks`."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_impl.checks import check_experts_per_rank

if TYPE_CHECKING:  # that module imports this one
    from torch_impl.direct.exchange import Buffers


def check_same_sizes(sizes: dict[str, Any], n_ranks: int, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError, on all ranks alike, unless all ask for the same, each size at least 1, and tokens at least 0.

    Ranks compare first, because one that raised alone would leave the others waiting.
    """
    of_ranks = of_all_ranks(sizes, n_ranks, group)
    for rank, others in enumerate(of_ranks):
        if others != of_ranks[0]:
            raise ValueError(
                f"buffers for {of_ranks[0]} on rank 0 and for {others} on rank {rank}: all ranks must ask for the "
                "same, as tokens the most that any rank has"
            )
    if sizes["tokens"] < 0 or min(sizes["top_k"], sizes["experts"], sizes["width"]) < 1:
        raise ValueError(f"buffers for {sizes}: every size must be at least 1, and tokens at least 0")
    check_experts_per_rank(sizes["experts"], n_ranks)


def check_same_offset(offset: int, n_ranks: int, group: dist.ProcessGroup | None) -> None:
    """Raises RuntimeError unless a buffer lies at the same offset in every rank's allocation: others write there."""
    of_ranks = of_all_ranks(offset, n_ranks, group)
    if len(set(of_ranks)) > 1:
        raise RuntimeError(
            f"a buffer lies at offsets {of_ranks} in the memory of the ranks, and others would write elsewhere: make "
            "symmetric memory in the same order on all ranks, buffers for this layer first"
        )


def of_all_ranks(what: Any, n_ranks: int, group: dist.ProcessGroup | None) -> list[Any]:
    """The `what` of each rank, in order of ranks."""
    if n_ranks == 1:
        return [what]
    found: list[Any] = [None] * n_ranks
    dist.all_gather_object(found, what, group=group)
    return found


def check_buffers(x_TD: Tensor, expert_id_TK: Tensor, counts_E: Tensor, buffers: "Buffers") -> None:
    """Raises ValueError unless the buffers hold a step of this size, dtype and device."""
    (T, K), (E,), D = expert_id_TK.shape, counts_E.shape, x_TD.shape[1]
    (P, experts), (n_rows, width) = buffers.counts_PE.own_OD.shape, buffers.placed_RD.own_OD.shape
    top_k, tokens = buffers.top_k, buffers.returned_ND.own_OD.shape[0] // buffers.top_k
    if (experts, width, top_k) != (E, D, K) or tokens < T or n_rows < P * tokens * min(K, E // P):
        raise ValueError(
            f"the buffers have room for {tokens} tokens of width {width}, {top_k} of {experts} experts each, and "
            f"{n_rows} rows to arrive; here are {T} tokens of width {D}, {K} of {E} experts each: make buffers with "
            "the sizes of this layer, and the most tokens that any rank has"
        )
    own_RD = buffers.placed_RD.own_OD
    if own_RD.dtype != x_TD.dtype or own_RD.device != x_TD.device:
        raise ValueError(
            f"the buffers are {own_RD.dtype} on {own_RD.device} and x is {x_TD.dtype} on {x_TD.device}: make buffers "
            "like x"
        )


def check_rows(x_MD: Tensor, own_OD: Tensor) -> None:
    """Raises ValueError unless rows have the buffer's width, dtype and device: a kernel writes to bare addresses."""
    if (x_MD.shape[1], x_MD.dtype, x_MD.device) != (own_OD.shape[1], own_OD.dtype, own_OD.device):
        raise ValueError(
            f"rows are {x_MD.dtype} of width {x_MD.shape[1]} on {x_MD.device}, the buffer's {own_OD.dtype} of width "
            f"{own_OD.shape[1]} on {own_OD.device}: what experts return must be like what they are given"
        )


def check_first_gradient() -> None:
    """Raises RuntimeError where the gradient itself is to be differentiated (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: rows that are written to another rank's memory leave no graph, so this gradient cannot "
            "be differentiated again. Use torch_impl.moe_layer for that"
        )


def check_not_reused(forwards: Tensor, forwards_now: Tensor) -> None:
    """Raises RuntimeError if another forward pass has used the buffers since. Both counts are on the host."""
    if later := int(forwards_now) - int(forwards):
        raise RuntimeError(
            f"{later} forward passes have used these buffers since the one whose backward this is, and overwrote the "
            "rows that it needs: run each backward before the next forward, or make another set of buffers for each "
            "step in flight and each layer"
        )
