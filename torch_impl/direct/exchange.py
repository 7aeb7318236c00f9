"""Stages 3, 4 and 8: counts, tokens out, tokens back, each row written straight to the rank that it is for.

What a step does, in order; | is a barrier of all ranks on the device:

    forward     write counts | read counts, write tokens | read tokens, write returned | read returned
    backward    read returned, write dout | read dout and tokens, write dx | read dx

There is one barrier after each write and none before it. Between the last read of a buffer and the next write to it,
in the next step or the next backward, every rank passes another buffer's barrier. So no rank writes to a buffer that
another still reads, if all ranks do the same steps, forward and backward, in the same order. One case is not covered:
a backward that does not compute the gradient of x must not run twice (`retain_graph=True`) without a forward pass
in between.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_impl import kernels
from torch_impl.direct.checks import check_not_reused, check_same_offset, check_same_sizes
from torch_impl.direct.rows import Arrivals, Buffer, put_rows, put_rows_once
from torch_impl.exchange import n_ranks
from torch_impl.static.rows import sum_rows


class Buffers(NamedTuple):
    """What ranks write into, made once. Two steps in flight, two layers or two groups need a set each.

    Layers can share a set where no other forward pass comes between a layer's last forward and its backward: under
    activation checkpointing, or without gradients.
    """

    counts_PE: Buffer
    placed_RD: Buffer
    returned_ND: Buffer
    dy_RD: Buffer  # the gradient of what returns
    dx_ND: Buffer  # the gradient of what is sent
    arrivals: Arrivals | None  # None where a token goes straight to each of its places
    top_k: int
    rank: int
    forwards: Tensor  # on the host: how many forward passes have used this set


def make_buffers(
    tokens: int,
    top_k: int,
    experts: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Buffers:
    """Buffers for steps of up to `tokens` tokens on any rank, which all ranks of the group make together.

    With T = `tokens` and e = E // P, a rank allocates 2*P*T*min(K, e) rows of D elements for what arrives, 2*T*K for
    what returns, and P*T where a token goes to each rank once. A step allocates none, so a CUDA graph can hold it.

    Raises ValueError, on all ranks alike, when experts do not divide over ranks, or ranks ask for different buffers.
    """
    P = n_ranks(group)
    sizes = {"tokens": tokens, "top_k": top_k, "experts": experts, "width": width}
    check_same_sizes(sizes | {"dtype": str(dtype), "device": device.type}, P, group)
    n_slots, n_rows = tokens * top_k, P * tokens * min(top_k, experts // P)

    def make(rows: int, columns: int, dtype: torch.dtype, n_writers: int = P) -> Buffer:
        if device.type == "cuda" and kernels.HAS_TRITON:
            return _on_gpus(rows, columns, dtype, device, group, n_writers)
        return Buffer(torch.empty(rows, columns, dtype=dtype, device=device), None, None, group, n_writers)

    arrivals, n_writers = None, P
    if sends_once(P, top_k):
        score_dtype, n_writers = torch.promote_types(dtype, torch.float32), 1  # each rank copies to its own places
        arrivals = Arrivals(
            make(P * tokens, width, dtype), make(P * tokens, top_k, torch.int64), make(P * tokens, top_k, score_dtype)
        )
    return Buffers(
        make(P, experts, torch.int64), make(n_rows, width, dtype, n_writers), make(n_slots, width, dtype),
        make(n_rows, width, dtype, n_writers), make(n_slots, width, dtype), arrivals,
        top_k, dist.get_rank(group) if P > 1 else 0, torch.zeros((), dtype=torch.int64, device="cpu"),
    )  # fmt: skip


def sends_once(n_ranks: int, top_k: int) -> bool:
    """Whether a token goes to each rank once, and is copied to its places there.

    That pays where several of a token's experts share a rank. The copy is one more pass over the rows: on two GPUs,
    sending once was faster with eight choices, and slower with two.
    """
    return n_ranks > 1 and top_k > 2


def _on_gpus(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None, n_writers: int
) -> Buffer:
    """Memory of this GPU that all ranks of the group can write to, or this rank alone; without NVLink multicast."""
    if n_writers == 1:
        own_OD = torch.empty(rows, columns, dtype=dtype, device=device)
        return Buffer(own_OD, torch.tensor([own_OD.data_ptr()], device=device), None, group, n_writers)
    from torch.distributed import _symmetric_memory as symmetric  # takes a second to import

    own_OD = symmetric.empty(max(rows, 1), columns, dtype=dtype, device=device)
    handle = symmetric.rendezvous(own_OD, group or dist.group.WORLD)  # type: ignore[arg-type]
    # One allocation of PyTorch's may hold several buffers, and `buffer_ptrs` are where allocations begin.
    offset = own_OD.data_ptr() - handle.buffer_ptrs[handle.rank]
    check_same_offset(offset, handle.world_size, group)
    return Buffer(own_OD[:rows], torch.tensor(handle.buffer_ptrs, device=device) + offset, handle, group, n_writers)


def exchange_counts(counts_E: Integer[Tensor, " E"], buffers: Buffers) -> Integer[Tensor, "P E"]:
    """Tell every rank how many rows each expert gets from this rank.

        counts_PE[p, g] = rows that rank p sends to expert g, which may live on any rank

    Nothing is copied to the host. The counts of all ranks say where every row goes.
    """
    own_PE = buffers.counts_PE.own_OD
    P = own_PE.shape[0]
    row_of_rank_P = torch.arange(buffers.rank, P * P, P, device=counts_E.device)
    put_rows(counts_E.to(own_PE.dtype)[None], row_of_rank_P[None], buffers.counts_PE)
    return own_PE.clone()


def send_tokens(
    x_TD: Float[Tensor, "T D"],
    slot_TK: Integer[Tensor, "T K"],
    place_N: Integer[Tensor, " N"],
    origin_R: Integer[Tensor, " R"],
    buffers: Buffers,
) -> Float[Tensor, "R D"]:
    """Write each token to its K places, expert-major: (local expert, source rank, assignment).

    Rows past the last that arrives hold anything. Backward, the rows' gradients return to their slots, and a token's
    gradient is the sum of its K rows.
    """
    return _SendTokens.apply(x_TD, slot_TK, place_N, origin_R, buffers)  # type: ignore[no-any-return]


class _SendTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_TK, place_N, origin_R, buffers):
        buffers.forwards.add_(1)
        # The count of forward passes is saved, not kept, because a recomputation saves its own.
        ctx.save_for_backward(slot_TK, origin_R, buffers.forwards.clone())
        ctx.buffers = buffers
        put_tokens(x_TD, slot_TK, place_N, buffers.placed_RD, buffers)
        return buffers.placed_RD.own_OD.data  # of a view, autograd would refuse the next step's write

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD):  # type: ignore[override]
        slot_TK, origin_R, forwards = ctx.saved_tensors
        check_not_reused(forwards, ctx.buffers.forwards)
        put_rows(dx_RD, origin_R[:, None], ctx.buffers.dx_ND)
        return sum_rows(ctx.buffers.dx_ND.own_OD[: slot_TK.numel()], slot_TK), None, None, None, None


def put_tokens(
    x_TD: Float[Tensor, "T D"],
    slot_TK: Integer[Tensor, "T K"],
    place_N: Integer[Tensor, " N"],
    buffer: Buffer,
    buffers: Buffers,
    score_TK: Float[Tensor, "T K"] | None = None,
) -> None:
    """Write each token to its K places in `buffer`; with scores, each time round(score[t,k] * x[t])."""
    place_TK = torch.nn.functional.pad(place_N, (0, 1), value=-1)[slot_TK]
    if buffers.arrivals is None:
        put_rows(x_TD, place_TK, buffer, score_TK)
    else:
        put_rows_once(x_TD, place_TK, buffer, buffers.arrivals, buffers.rank, score_TK)


@torch.no_grad()
def return_tokens(
    y_RD: Float[Tensor, "R D"], place_N: Integer[Tensor, " N"], origin_R: Integer[Tensor, " R"], buffers: Buffers
) -> Float[Tensor, "N D"]:
    """Write every row back to the slot that it came from: the inverse of `send_tokens`.

    Autograd does not see it: the backward of `combine` sends the gradient of y.
    """
    put_rows(y_RD, origin_R[:, None], buffers.returned_ND)
    return buffers.returned_ND.own_OD[: place_N.shape[0]].data
