"""How rows move, and where to: each straight to its place on any rank, plain, or through a kernel on a GPU.

Forward and backward, every row has one writer. A gradient that several rows share is summed where it is read, in a
fixed order. M stands for any number of rows, and O for the rows of a buffer.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Integer, Shaped
from torch import Tensor

from torch_impl import kernels
from torch_impl.direct.checks import check_rows
from torch_impl.exchange import n_ranks
from torch_impl.static.rows import take_or_zero


class Buffer(NamedTuple):
    """This rank's part of rows that all ranks write to, and the way to the other parts."""

    own_OD: Tensor  # O is the same on every rank
    pointers_P: Integer[Tensor, " P"] | None  # where each rank's part begins; None where no kernel can write to it
    handle: Any  # of symmetric memory; None where there is no other rank
    group: dist.ProcessGroup | None


def put_rows(x_MD: Shaped[Tensor, "M D"], place_MK: Integer[Tensor, "M K"], buffer: Buffer) -> None:
    """Write row m of x, for every k, to row place[m, k] among all ranks' rows: row o of rank p is number p*O + o.

        O = 2    place 1 3 -1        rank 0: __ x0 | rank 1: __ x1        x2 goes nowhere

    Once it is done, the rows that any rank has put into this rank's part are there. Other rows stay as they are.

    Raises ValueError unless x's rows are like the buffer's.
    """
    check_rows(x_MD, buffer.own_OD)
    if buffer.pointers_P is not None and kernels.use_kernels(x_MD):
        kernels.put_rows(x_MD, place_MK, buffer.pointers_P, buffer.own_OD.shape[0])
        if buffer.handle is not None:
            buffer.handle.barrier(channel=0)
        return
    if n_ranks(buffer.group) > 1:
        x_MD, place_MK = exchange_places(x_MD, place_MK, buffer)
    put_here(x_MD, place_MK, buffer.own_OD)


def exchange_places(
    x_MD: Shaped[Tensor, "M D"], place_MK: Integer[Tensor, "M K"], buffer: Buffer
) -> tuple[Shaped[Tensor, "O D"], Integer[Tensor, "O 1"]]:
    """The plain way to other ranks: an uneven all-to-all of rows, and of their places. It waits for their number."""
    P, n_rows, place_A = n_ranks(buffer.group), buffer.own_OD.shape[0], place_MK.reshape(-1)
    rank_A = torch.where(place_A < 0, P, place_A // n_rows)
    send_P = (rank_A[:, None] == torch.arange(P, device=rank_A.device)).sum(dim=0)
    receive_P = torch.empty_like(send_P)
    dist.all_to_all_single(receive_P, send_P, group=buffer.group)
    leaving = rank_A.argsort(stable=True)[: int(send_P.sum())]
    arrived = []
    for rows in (x_MD[leaving // place_MK.shape[1]], place_A[leaving, None] % n_rows):
        arrived.append(rows.new_empty(int(receive_P.sum()), rows.shape[1]))
        dist.all_to_all_single(arrived[-1], rows, receive_P.tolist(), send_P.tolist(), group=buffer.group)
    return arrived[0], arrived[1]


def put_here(x_MD: Shaped[Tensor, "M D"], place_MK: Integer[Tensor, "M K"], own_OD: Shaped[Tensor, "O D"]) -> None:
    """Write rows to places of this rank's own. It waits for nothing: each place gathers its row."""
    (_, K), (n_rows, _) = place_MK.shape, own_OD.shape
    place_A = place_MK.reshape(-1)
    row_A = torch.arange(place_A.shape[0], device=place_A.device)
    source = row_A.new_full((n_rows + 1,), -1)  # one extra place takes all that goes nowhere
    source_O = source.scatter(0, torch.where(place_A < 0, n_rows, place_A), row_A)[:n_rows]
    x_OD = take_or_zero(x_MD, source_O.clamp(min=0) // K)
    own_OD.copy_(torch.where((source_O >= 0)[:, None], x_OD, own_OD))


def expert_major_rows(
    counts_PE: Integer[Tensor, "P E"], rank: int, n_own_slots: int, n_slots: int, n_rows: int
) -> tuple[Integer[Tensor, " N"], Integer[Tensor, " R"]]:
    """For each slot the row that its row becomes, and for each row the slot that it came from.

    Slots and rows are numbered over all ranks: slot s of rank p is p * n_slots + s, row r of rank p is p * n_rows + r.
    `n_own_slots` is how many slots this step has. The rows of one expert from one rank are a segment, in slots and in
    rows. Within it both are in the same order. So all of a segment shifts by the distance between its two starts.

    Shapes: place_N, origin_R.
    """
    if kernels.use_kernels(counts_PE):
        return kernels.place_rows(counts_PE, rank, n_own_slots, n_slots, n_rows)
    P, E = counts_PE.shape
    e = E // P
    start_PE = counts_PE.cumsum(dim=1) - counts_PE
    counts_PeP = counts_PE.reshape(P, P, e).permute(1, 2, 0)  # (owner, expert, sender), the order of an owner's rows
    counts_PeP_flat = counts_PeP.reshape(P, -1)
    row_PE = (counts_PeP_flat.cumsum(dim=1) - counts_PeP_flat).reshape(P, e, P).permute(2, 0, 1).reshape(P, E)
    shift_PE = row_PE - start_PE

    first_row_E = torch.arange(E, device=counts_PE.device) // e * n_rows  # of its owner, among all ranks' rows
    first_slot_P1 = torch.arange(P, device=counts_PE.device)[:, None] * n_slots
    mine = slice(rank * e, (rank + 1) * e)
    place_N = shift_segments(counts_PE[rank], shift_PE[rank] + first_row_E, n_own_slots)
    back_Pe = first_slot_P1 - shift_PE[:, mine]
    origin_R = shift_segments(counts_PE[:, mine].T.reshape(-1), back_Pe.T.reshape(-1), n_rows)
    return place_N, origin_R


def shift_segments(
    counts_G: Integer[Tensor, " G"], shift_G: Integer[Tensor, " G"], output_size: int
) -> Integer[Tensor, " O"]:
    """Numbers 0, 1, 2, ..., of which the first counts[0] shift by shift[0], and so on; -1 past the last segment.

    A number's segment is how many segments end before it.
    """
    row_O = torch.arange(output_size, device=counts_G.device)
    segment_O = torch.searchsorted(counts_G.cumsum(dim=0), row_O, right=True)
    return torch.where(row_O < counts_G.sum(), row_O + take_or_zero(shift_G, segment_O), -1)
