"""How rows move, and where to: each straight to its place on any rank, plain, or through a kernel on a GPU.

Forward and backward, every row has one writer. A gradient that several rows share is summed where it is read, in a
fixed order. M stands for any number of rows, and O for the rows of a buffer.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from torch_impl import kernels
from torch_impl.direct.checks import check_rows
from torch_impl.static.rows import take_or_zero


class Buffer(NamedTuple):
    """Rows that all ranks write to: this rank's part, and how to write to the other ranks' parts."""

    own_OD: Tensor  # O is the same on every rank
    pointers_P: Integer[Tensor, " P"] | None  # where each rank's part begins; None where no kernel can write to it
    handle: Any  # of symmetric memory, for its barrier; None where no other rank writes
    group: dist.ProcessGroup | None
    n_writers: int  # all ranks of the group, or this one alone


class Arrivals(NamedTuple):
    """Where tokens arrive, once each, before they are copied to their places: token t of rank p in row p*T + t."""

    x_AD: Buffer
    place_AK: Buffer  # a token's K places among all ranks' rows
    score_AK: Buffer  # what it is multiplied by there, if anything


def put_rows(
    x_MD: Shaped[Tensor, "M D"],
    place_MK: Integer[Tensor, "M K"],
    buffer: Buffer,
    score_MK: Float[Tensor, "M K"] | None = None,
    barrier: bool = True,
) -> None:
    """Write row m of x, for every k, to row place[m, k] among all ranks' rows: row o of rank p is number p*O + o.

        O = 2    place 1 3 -1        rank 0: __ x0 | rank 1: __ x1        x2 goes nowhere

    With scores, round(score[m, k] * x[m]) is written. After it, in order of the stream, this rank's part has what any
    rank has put there. Without `barrier`, that holds after the next `put_rows` with one. Other rows stay as they are.

    Raises ValueError unless x's rows are like the buffer's.
    """
    check_rows(x_MD, buffer.own_OD)
    if buffer.pointers_P is not None and kernels.use_kernels(x_MD):
        kernels.put_rows(x_MD, place_MK, buffer.pointers_P, buffer.own_OD.shape[0], score_MK)
        if buffer.handle is not None and barrier:
            buffer.handle.barrier(channel=0)
        return
    if score_MK is not None:
        x_MD, place_MK = weigh_rows(x_MD, score_MK), place_MK.reshape(-1, 1)
    if buffer.n_writers > 1:
        x_MD, place_MK = exchange_places(x_MD, place_MK, buffer)
    put_here(x_MD, place_MK, buffer.own_OD)


def put_rows_once(
    x_TD: Float[Tensor, "T D"],
    place_TK: Integer[Tensor, "T K"],
    buffer: Buffer,
    arrivals: Arrivals,
    rank: int,
    score_TK: Float[Tensor, "T K"] | None = None,
) -> None:
    """The same as `put_rows`, but a row goes to each rank once, and is copied to its places there.

        places  t0: rank 0, 1, 1        arrive  rank 0: t0         copied  rank 0: t0
                t1: rank 1, 1, 1                rank 1: t0 t1              rank 1: t0 t0 t1 t1 t1

    A token's places and scores go to every rank, even to one without a place for it: otherwise that rank would read
    the places of an earlier step.
    """
    P, (n_rows, _), (n_arrivals, K) = arrivals.x_AD.n_writers, buffer.own_OD.shape, arrivals.place_AK.own_OD.shape
    T, most = x_TD.shape[0], n_arrivals // P  # the tokens of this rank, and the most that any has
    rank_P = torch.arange(P, device=x_TD.device)
    arrival_TP = (rank * most + torch.arange(most, device=x_TD.device))[:, None] + rank_P * n_arrivals
    has_place_TP = (place_TK[:, :, None] // n_rows == rank_P).any(dim=1)

    all_places_TK = place_TK.new_full((most, K), -1)  # nowhere, past this rank's tokens
    all_places_TK[:T] = place_TK
    put_rows(all_places_TK, arrival_TP, arrivals.place_AK, barrier=False)
    if score_TK is not None:
        put_rows(score_TK.to(arrivals.score_AK.own_OD.dtype), arrival_TP[:T], arrivals.score_AK, barrier=False)
    put_rows(x_TD, torch.where(has_place_TP, arrival_TP[:T], -1), arrivals.x_AD)

    place_AK = arrivals.place_AK.own_OD
    here_AK = torch.where(place_AK // n_rows == rank, place_AK % n_rows, -1)
    put_rows(arrivals.x_AD.own_OD, here_AK, buffer, None if score_TK is None else arrivals.score_AK.own_OD)


def weigh_rows(x_MD: Float[Tensor, "M D"], score_MK: Float[Tensor, "M K"]) -> Float[Tensor, "A D"]:
    """Row m times each of its K scores, in float32, rounded once: K rows for each row of x."""
    accum_dtype = torch.promote_types(x_MD.dtype, torch.float32)
    return (score_MK.to(accum_dtype)[:, :, None] * x_MD.to(accum_dtype)[:, None]).to(x_MD.dtype).flatten(0, 1)


def exchange_places(
    x_MD: Shaped[Tensor, "M D"], place_MK: Integer[Tensor, "M K"], buffer: Buffer
) -> tuple[Shaped[Tensor, "O D"], Integer[Tensor, "O 1"]]:
    """The plain way to other ranks: an uneven all-to-all of rows and their places. The host waits for their number."""
    P, n_rows, place_A = buffer.n_writers, buffer.own_OD.shape[0], place_MK.reshape(-1)
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
    """Write rows to places of this rank's own. The host waits for nothing: each place gathers its row."""
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
