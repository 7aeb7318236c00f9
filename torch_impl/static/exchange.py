"""Stages 3, 4 and 8: counts, tokens out, tokens back."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts_per_rank
from torch_impl.exchange import n_ranks


def exchange_counts(counts_E: Integer[Tensor, " E"], group: dist.ProcessGroup | None = None) -> Integer[Tensor, "P e"]:
    """Tell every rank how many rows each of its experts gets from this rank.

        counts_Pe[p, j] = rows that rank p sends to local expert j of this rank

    The counts only say which rows are padding. Every shape is known without them, so nothing waits.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    P = n_ranks(group)
    check_experts_per_rank(counts_E.shape[0], P)
    return _all_to_all(counts_E.reshape(P, -1), group)


def send_tokens(x_BCD: Float[Tensor, "B C D"], group: dist.ProcessGroup | None = None) -> Float[Tensor, "B C D"]:
    """Send each rank the bins of its experts. They arrive rank-major: (source rank, local expert, assignment)."""
    return _AllToAll.apply(x_BCD, group)  # type: ignore[no-any-return]


def return_tokens(y_BCD: Float[Tensor, "B C D"], group: dist.ProcessGroup | None = None) -> Float[Tensor, "B C D"]:
    """Send every bin back to the rank it came from: the inverse of `send_tokens`."""
    return _AllToAll.apply(y_BCD, group)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Even all-to-all of bins. It is its own inverse and its own backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        return _AllToAll.apply(dy, ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if n_ranks(group) == 1:
        return x.view_as(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(y, x.contiguous(), group=group)
    return y
