"""Stages 3, 4 and 8: counts, tokens out, tokens back."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts_per_rank, check_splits


class Splits(NamedTuple):
    """Rows per rank, as host integers: what a dynamic exchange has to know and a static one does not."""

    send_P: list[int]
    receive_P: list[int]
    total: int  # R, the rows this rank receives


def n_ranks(group: dist.ProcessGroup | None) -> int:
    """P: the ranks in `group` (None: the default group), or 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def exchange_counts(
    counts_E: Integer[Tensor, " E"], group: dist.ProcessGroup | None = None
) -> tuple[Integer[Tensor, "P e"], Splits]:
    """Tell every rank how many rows each of its experts gets from here.

        counts_Pe[p, j] = rows that rank p sends to local expert j of this rank

    One device-to-host copy brings both split lists over; their total is a sum on the host. Nothing else waits.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    P = n_ranks(group)
    check_experts_per_rank(counts_E.shape[0], P)
    sent_Pe = counts_E.reshape(P, -1)
    counts_Pe = torch.empty_like(sent_Pe)
    if P == 1:
        counts_Pe = sent_Pe
    else:
        dist.all_to_all_single(counts_Pe, sent_Pe.contiguous(), group=group)
    splits_2P = torch.stack([sent_Pe.sum(dim=1), counts_Pe.sum(dim=1)]).cpu()  # the one device-to-host sync
    return counts_Pe, Splits(*splits_2P.tolist(), total=int(splits_2P[1].sum()))


def send_tokens(
    x_ND: Float[Tensor, "N D"], splits: Splits, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "R D"]:
    """Send each rank the rows of its experts. They arrive rank-major: (source rank, local expert, assignment).

    Raises ValueError when the counts do not add up to the rows: some expert id was out of range.
    """
    check_splits(splits.send_P, x_ND.shape[0])
    return _AllToAll.apply(x_ND, splits.send_P, splits.receive_P, group)  # type: ignore[no-any-return]


def return_tokens(
    y_RD: Float[Tensor, "R D"], splits: Splits, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "N D"]:
    """Send every row back to the rank it came from: the inverse of `send_tokens`."""
    return _AllToAll.apply(y_RD, splits.receive_P, splits.send_P, group)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows. Backward is the same exchange with the splits swapped."""

    @staticmethod
    def forward(ctx, x, send_P, receive_P, group):
        ctx.send_P, ctx.receive_P, ctx.group = send_P, receive_P, group
        return _all_to_all(x, send_P, receive_P, group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        return _all_to_all(dy, ctx.receive_P, ctx.send_P, ctx.group), None, None, None


def _all_to_all(x: Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup | None) -> Tensor:
    if n_ranks(group) == 1:
        return x.view_as(x)
    y = x.new_empty(sum(receive_P), x.shape[1])
    dist.all_to_all_single(y, x.contiguous(), receive_P, send_P, group=group)
    return y
