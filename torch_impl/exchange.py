"""Stages 3, 4 and 8: counts, tokens out, tokens back."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.checks import check_experts_per_rank, check_splits
from torch_impl.operators import exchange_rows


class Splits(NamedTuple):
    """Rows per rank, on the host: what a dynamic exchange has to know and a static one does not."""

    send_P: Integer[Tensor, " P"]  # tensors on the CPU, not lists: under capture each item of a list is one more symbol
    receive_P: Integer[Tensor, " P"]
    n_sent: int  # N if the counts match the rows; under capture, a symbol until `send_tokens` has checked that
    n_received: int  # R, the rows this rank receives; under capture the one symbol that every dynamic shape is made of


def n_ranks(group: dist.ProcessGroup | None) -> int:
    """P: the ranks in `group` (None: the default group), or 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def exchange_counts(
    counts_E: Integer[Tensor, " E"], group: dist.ProcessGroup | None = None
) -> tuple[Integer[Tensor, "P e"], Splits]:
    """Tell every rank how many rows each of its experts gets from this rank.

        counts_Pe[p, j] = rows that rank p sends to local expert j of this rank

    One device-to-host copy brings the counts of the rows that leave and of the rows that arrive. They are summed on the
    host as tensors, and only the two totals become integers. Nothing else that moves rows waits for the device.

    Raises ValueError when the number of experts is not a multiple of the number of ranks.
    """
    P = n_ranks(group)
    check_experts_per_rank(counts_E.shape[0], P)
    sent_Pe = counts_E.reshape(P, -1)
    one_P = torch.ones(P, dtype=torch.int64, device="cpu")
    counts_Pe = _all_to_all(sent_Pe, one_P, one_P, P, group)
    splits_2P = torch.stack([sent_Pe, counts_Pe]).cpu().sum(dim=2)  # the one device-to-host sync
    send_P, receive_P = splits_2P.unbind()
    n_sent, n_received = splits_2P.sum(dim=1).tolist()
    return counts_Pe, Splits(send_P, receive_P, n_sent, n_received)


def send_tokens(
    x_ND: Float[Tensor, "N D"], splits: Splits, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "R D"]:
    """Send each rank the rows of its experts. They arrive rank-major: (source rank, local expert, assignment).

    Raises ValueError when the counts do not add up to the rows: some expert id was out of range.
    """
    check_splits(splits.n_sent, x_ND.shape[0])
    return _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)


def return_tokens(
    y_RD: Float[Tensor, "R D"], splits: Splits, group: dist.ProcessGroup | None = None
) -> Float[Tensor, "N D"]:
    """Send every row back to the rank it came from: the inverse of `send_tokens`."""
    return _all_to_all(y_RD, splits.receive_P, splits.send_P, splits.n_sent, group)


def _all_to_all(
    x: Tensor, send_P: Tensor, receive_P: Tensor, n_received: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Uneven all-to-all of rows. With no other rank there is nothing to exchange."""
    if n_ranks(group) == 1:
        return x
    group = group or dist.group.WORLD
    assert group is not None  # there are ranks, so there is a default group
    return exchange_rows(x, send_P, receive_P, n_received, group.group_name)
