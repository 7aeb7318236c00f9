"""Triton kernels for row movements, their indices and SwiGLU. Each does what the plain version beside its call does.

A kernel reads and writes every row once, forward and backward. Indexing in PyTorch would read a token K times, or keep
rows in float32. Moved rows equal the plain version's bit for bit. So do sums over K: the order is the same, and every
product is rounded. No kernel adds atomically, so all results repeat.
M stands for any number of rows, and O for the number of output rows where it differs.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # CPU builds of PyTorch lack it, and use the plain versions
triton: Any = import_module("triton") if HAS_TRITON else SimpleNamespace(jit=lambda kernel: kernel)
tl: Any = import_module("triton.language") if HAS_TRITON else SimpleNamespace(constexpr=int)
PADDING_ROWS = 64  # rows that one program checks for padding
SWIGLU_BLOCK, SWIGLU_WARPS = 2048, 8  # elements that a program takes at once, 8 per thread; and its warps
SWIGLU_PROGRAMS = 8448  # 64 per SM of an H200: so few that rows past n_rows cost no time
SORT_BLOCK, SORT_TILE = 256, 64  # positions of N, and keys, per program; JAX takes 512, for XLA's cumsum


def use_kernels(x: Tensor) -> bool:
    """Whether x can go through kernels: on the current GPU, with Triton installed.

    Kernels record no autograd graph, so a backward that is itself differentiated (`create_graph=True`) avoids them.
    """
    differentiated = torch.is_grad_enabled() and x.is_floating_point()
    return HAS_TRITON and x.is_cuda and x.device.index == torch.cuda.current_device() and not differentiated


def sort_by_key(key_N: Integer[Tensor, " N"], n_keys: int) -> tuple[Integer[Tensor, " N"], Integer[Tensor, " N"]]:
    """Stable sort of keys 0..n_keys-1, and its inverse. Any other key counts as no key, and goes last.

    A general sort makes many passes over wide keys. Here the keys are few. First each key is counted in each block of
    N. Then a cumsum, key by key, says where a block's rows of a key end. From there each block places its own rows.

    Shapes: order_N, place_N.
    """
    N, BLOCK = key_N.numel(), SORT_BLOCK
    blocks = -(-N // BLOCK)
    order_N = torch.empty(N, dtype=torch.int64, device=key_N.device)
    place_N = torch.empty_like(order_N)
    key_N = key_N.contiguous()
    counts = torch.empty((n_keys + 1) * blocks, dtype=torch.int32, device=key_N.device)
    grid = (blocks, -(-(n_keys + 1) // SORT_TILE))
    _count_keys[grid](key_N, counts, N, n_keys, blocks, BLOCK=BLOCK, TILE=SORT_TILE, num_warps=4)
    end = counts.cumsum(dim=0, dtype=torch.int32)
    _place_keys[(blocks,)](key_N, end, order_N, place_N, N, n_keys, blocks, BLOCK=BLOCK, num_warps=BLOCK // 32)
    return order_N, place_N


@triton.jit
@no_type_check
def _load_keys(key, i, N, n_keys):
    """Load a block's keys. Keys out of range become n_keys, the last key.

    So do positions past the end of N, which come after all others of their block.
    """
    found = tl.load(key + i, mask=i < N, other=0).to(tl.int64)  # n_keys may not fit into the key's dtype
    return tl.where((i >= N) | (found < 0) | (found > n_keys), n_keys, found).to(tl.int32)


@triton.jit
@no_type_check
def _count_keys(key, counts, N, n_keys, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """One program per block of N and tile of keys."""
    b = tl.program_id(0)
    found = _load_keys(key, b * BLOCK + tl.arange(0, BLOCK), N, n_keys)
    mine = tl.program_id(1) * TILE + tl.arange(0, TILE)
    count = tl.sum((found[:, None] == mine[None, :]).to(tl.int32), 0)
    tl.store(counts + mine * blocks + b, count, mask=mine <= n_keys)


@triton.jit
@no_type_check
def _place_keys(key, end, order, place, N, n_keys, blocks, BLOCK: tl.constexpr):
    """One program per block. A key's row is where its block's rows of that key end, minus how many are left."""
    b = tl.program_id(0)
    i = b * BLOCK + tl.arange(0, BLOCK)
    found = _load_keys(key, i, N, n_keys)
    same = found[:, None] == found[None, :]
    from_here = tl.sum((same & (i[:, None] >= i[None, :])).to(tl.int32), 0)  # the axis within one thread
    row = tl.load(end + found * blocks + b) - from_here
    tl.store(place + i, row.to(tl.int64), mask=i < N)
    tl.store(order + row, i.to(tl.int64), mask=i < N)


def expert_major_rows(
    counts_Pe: Integer[Tensor, "P e"], output_size: int
) -> tuple[Integer[Tensor, " R"], Integer[Tensor, " R"]]:
    """For each expert-major row the rank-major one it comes from, and the inverse, in one launch.

    `output_size` must be the sum of the counts: rows past that sum would stay unwritten.

    Shapes: source_R, target_R.
    """
    P, e = counts_Pe.shape
    source_R = torch.empty(output_size, dtype=torch.int64, device=counts_Pe.device)
    target_R = torch.empty_like(source_R)
    _expert_major_rows[(P * e,)](
        counts_Pe.contiguous(), source_R, target_R, output_size, P, e,
        SEGMENTS=_power_of_2(P * e), BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return source_R, target_R


@triton.jit
@no_type_check
def _expert_major_rows(counts, source, target, R, P, e, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per segment: the rows from one rank p for one expert j. It computes where its segment starts."""
    p = tl.program_id(0) // e
    j = tl.program_id(0) % e
    segment = tl.arange(0, SEGMENTS)
    count = tl.load(counts + segment, mask=segment < P * e, other=0)
    rank = segment // e
    expert = segment % e
    rank_major = tl.sum(tl.where(segment < tl.program_id(0), count, 0), 0)
    expert_major = tl.sum(tl.where((expert < j) | ((expert == j) & (rank < p)), count, 0), 0)
    rows = tl.load(counts + tl.program_id(0))
    for first in range(0, rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        inside = (r < rows) & (expert_major + r < R) & (rank_major + r < R)
        tl.store(source + expert_major + r, rank_major + r, mask=inside)
        tl.store(target + rank_major + r, expert_major + r, mask=inside)


def gather_rows(x_MD: Float[Tensor, "M D"], index_O: Integer[Tensor, "*O"]) -> Float[Tensor, "*O D"]:
    """Row r is x[index[r]], and zero where the index is past the end."""
    M, D = x_MD.shape
    y_OD = x_MD.new_empty(*index_O.shape, D)
    BLOCK, num_warps = _tile(D, 1)
    chunks = -(-D // BLOCK)
    _gather_rows[(index_O.numel() * chunks,)](
        x_MD.contiguous(), index_O.contiguous(), y_OD, M, D, chunks, BLOCK=BLOCK, num_warps=num_warps
    )
    return y_OD


@triton.jit
@no_type_check
def _gather_rows(x, index, y, M, D, chunks, BLOCK: tl.constexpr):
    """One program per row, or per chunk of a wide one."""
    r = (tl.program_id(0) // chunks).to(tl.int64)
    d = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + r).to(tl.int64)
    row = tl.load(x + source * D + d, mask=d < tl.where(source < M, D, 0), other=0)
    tl.store(y + r * D + d, row, mask=d < D)


def expand_rows(
    x_TD: Float[Tensor, "T D"], slot_TK: Integer[Tensor, "T K"], assignment_M: Integer[Tensor, " M"] | None = None
) -> Float[Tensor, "M D"]:
    """Copy token t to rows slot[t]: the same rows as gathering x[assignment // K], but x is read once.

    With `assignment`, a slot past the end is skipped. Rows whose assignment is past the last one are padding: zero.
    """
    (T, K), D = slot_TK.shape, x_TD.shape[1]
    M = T * K if assignment_M is None else assignment_M.shape[0]
    x_MD = x_TD.new_empty(M, D)
    BLOCK, num_warps = _tile(D, 1)
    chunks = -(-D // BLOCK)
    looking = 0 if assignment_M is None else -(-M // PADDING_ROWS)
    _expand_rows[(T * chunks + looking,)](
        x_TD.contiguous(), slot_TK.contiguous(), slot_TK if assignment_M is None else assignment_M.contiguous(), x_MD,
        T, M, D, chunks,
        K=K, PADDED=assignment_M is not None, PADDING_ROWS=PADDING_ROWS, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip
    return x_MD


@triton.jit
@no_type_check
def _expand_rows(
    x, slot, assignment, y, T, M, D, chunks,
    K: tl.constexpr, PADDED: tl.constexpr, PADDING_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token, or per chunk of a wide token. Earlier programs clear padding."""
    program = tl.program_id(0) - (tl.cdiv(M, PADDING_ROWS) if PADDED else 0)
    if PADDED and program < 0:
        _clear_padding(tl.program_id(0), assignment, y, T * K, M, D, PADDING_ROWS)
        return
    t = (program // chunks).to(tl.int64)
    d = program % chunks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + t * D + d, mask=d < D)
    for k in tl.static_range(K):
        place = tl.load(slot + t * K + k).to(tl.int64)
        tl.store(y + place * D + d, row, mask=d < (tl.where(place < M, D, 0) if PADDED else D))


@triton.jit
@no_type_check
def _clear_padding(program, assignment, y, N, M, D, PADDING_ROWS: tl.constexpr):
    """Write zero into a program's rows that hold no assignment."""
    BLOCK: tl.constexpr = 128
    row = program.to(tl.int64) * PADDING_ROWS + tl.arange(0, PADDING_ROWS)
    padding = tl.load(assignment + row, mask=row < M, other=-1) >= N
    if tl.max(padding.to(tl.int32), 0) > 0:
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            zero = tl.zeros([PADDING_ROWS, BLOCK], y.dtype.element_ty)
            tl.store(y + row[:, None] * D + d[None, :], zero, mask=padding[:, None] & (d < D)[None, :])


def put_rows(
    x_MD: Shaped[Tensor, "M D"],
    place_MK: Integer[Tensor, "M K"],
    pointers_P: Integer[Tensor, " P"],
    n_rows: int,
    score_MK: Float[Tensor, "M K"] | None = None,
) -> None:
    """Store row m of x, for every k, to row place[m, k] among all ranks' rows; a negative place is nowhere.

    With scores, round(score[m,k] * x[m]) is stored, computed in float32. Rank p's `n_rows` rows begin at address
    pointers[p], which may be in another GPU's memory.
    """
    (M, K), D = place_MK.shape, x_MD.shape[1]
    BLOCK, num_warps = _tile(D, 1)
    _put_rows[(M,)](
        x_MD.contiguous(), place_MK.contiguous(), pointers_P, place_MK if score_MK is None else score_MK.contiguous(),
        M, D, n_rows, put_stride(M),
        K=K, WEIGHTED=score_MK is not None, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip


def put_stride(n_rows: int) -> int:
    """The step from one row that is sent to the next: about 0.618 of the number of rows, and coprime to it.

    Rows that follow each other often go to the same rank. If all ranks sent to one rank at a time, its link would be
    full and the others idle. With this step, what is sent at one time is spread evenly over all rows, so over ranks.
    """
    return next(n for n in range(max(1, round(0.618 * n_rows)), n_rows + 2) if math.gcd(n, n_rows) == 1)


@triton.jit
@no_type_check
def _put_rows(
    x, place, pointers, score, M, D, n_rows, stride, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row. It reads a chunk once and stores it K times. A row that goes nowhere is not read."""
    dtype = x.dtype.element_ty
    accum_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    m = tl.program_id(0).to(tl.int64) * stride % M
    going = 0
    for k in tl.static_range(K):
        going += (tl.load(place + m * K + k) >= 0).to(tl.int32)
    for first in range(0, tl.where(going > 0, D, 0), BLOCK):
        d = first + tl.arange(0, BLOCK)
        row = tl.load(x + m * D + d, mask=d < D)
        for k in tl.static_range(K):
            target = tl.load(place + m * K + k).to(tl.int64)
            there = target >= 0
            rank = tl.where(there, target // n_rows, 0)
            # Allocations are aligned, which the compiler has to know to store 16 bytes at once.
            base = tl.multiple_of(tl.load(pointers + rank).to(tl.pointer_type(dtype)), 16)
            value = row
            if WEIGHTED:
                value = (tl.load(score + m * K + k).to(accum_dtype) * row.to(accum_dtype)).to(dtype)
            tl.store(base + (target - rank * n_rows) * D + d, value, mask=d < tl.where(there, D, 0))


def place_rows(
    counts_PE: Integer[Tensor, "P E"], rank: int, n_own_slots: int, n_slots: int, n_rows: int
) -> tuple[Integer[Tensor, " N"], Integer[Tensor, " R"]]:
    """For each of this rank's slots the row, among all ranks' rows, that its row becomes; and for each row, its slot.

    Both are -1 past the last. PyTorch's operations would need some 30 small launches for that, and hold the host for
    longer than the rows take to move.

    Shapes: place_N, origin_R.
    """
    P, E = counts_PE.shape
    place_N = torch.full((n_own_slots,), -1, dtype=torch.int64, device=counts_PE.device)
    origin_R = torch.full((n_rows,), -1, dtype=torch.int64, device=counts_PE.device)
    _place_rows[(2 * E,)](
        counts_PE.contiguous(), place_N, origin_R, P, E, E // P, rank, n_own_slots, n_slots, n_rows,
        TILE=1024, num_warps=4,
    )  # fmt: skip
    return place_N, origin_R


@triton.jit
@no_type_check
def _place_rows(counts, place, origin, P, E, e, rank, n_own_slots, n_slots, n_rows, TILE: tl.constexpr):
    """One program per segment, the rows of one expert g from one rank p: the first E leave, the other P*e arrive."""
    arrives = tl.program_id(0) >= E
    i = tl.program_id(0) - E
    p = tl.where(arrives, i // e, rank)
    g = tl.where(arrives, rank * e + i % e, tl.program_id(0))
    slots = tl.zeros([TILE], tl.int64)
    owned = tl.zeros([TILE], tl.int64)
    for first in range(0, P * E, TILE):
        segment = first + tl.arange(0, TILE)
        count = tl.load(counts + segment, mask=segment < P * E, other=0)
        sender = segment // E
        expert = segment % E
        slots += tl.where((sender == p) & (expert < g), count, 0)
        before = (expert < g) | ((expert == g) & (sender < p))
        owned += tl.where((expert // e == g // e) & before, count, 0)
    slot = tl.sum(slots, 0)  # where the segment starts in its sender's slots
    row = tl.sum(owned, 0)  # and in its owner's rows
    rows = tl.load(counts + p * E + g)
    for first in range(0, rows, TILE):
        r = first + tl.arange(0, TILE)
        goes = (g // e).to(tl.int64) * n_rows + row + r
        came = p.to(tl.int64) * n_slots + slot + r
        tl.store(place + slot + r, goes, mask=(r < tl.where(arrives, 0, rows)) & (slot + r < n_own_slots))
        tl.store(origin + row + r, came, mask=(r < tl.where(arrives, rows, 0)) & (row + r < n_rows))


def sum_rows(
    y_MD: Float[Tensor, "M D"], slot_TK: Integer[Tensor, "T K"], score_TK: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of y[slot[t,k]]), each times score[t,k] if there are scores, in float32.

    A slot past the end counts as zero.
    """
    (T, K), (M, D) = slot_TK.shape, y_MD.shape
    out_TD = y_MD.new_empty(T, D)
    BLOCK, num_warps = _tile(D, K)
    chunks = -(-D // BLOCK)
    _sum_rows[(T * chunks,)](
        y_MD.contiguous(), slot_TK.contiguous(), slot_TK if score_TK is None else score_TK.contiguous(), out_TD,
        M, D, chunks,
        K=K, WEIGHTED=score_TK is not None, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip
    return out_TD


@triton.jit
@no_type_check
def _sum_rows(
    y, slot, score, out, M, D, chunks, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per token, or per chunk of a wide one."""
    accum_dtype = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    t = (tl.program_id(0) // chunks).to(tl.int64)
    d = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], accum_dtype)
    for k in tl.static_range(K):
        source = tl.load(slot + t * K + k).to(tl.int64)
        row = tl.load(y + source * D + d, mask=d < tl.where(source < M, D, 0), other=0).to(accum_dtype)
        if WEIGHTED:
            # A product plus a sum would be one instruction, rounded once. This rounds the product by itself, as the
            # plain version does; adding zero turns -0 into 0, which a sum that starts from 0 does not show.
            row = tl.fma(row, tl.load(score + t * K + k).to(accum_dtype), 0.0)
        total += row
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)


def weighted_sum_backward(
    dout_TD: Float[Tensor, "T D"],
    y_MD: Float[Tensor, "M D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
    assignment_M: Integer[Tensor, " M"] | None = None,
) -> tuple[Float[Tensor, "M D"], Float[Tensor, "T K"]]:
    """dy[slot[t,k]] = round(score[t,k] * dout[t]) and dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d].

    A token's gradient is read once, and each of its rows is read and written once. Where rows can be padding,
    `assignment` says which are, and they are written as zero.

    Shapes: dy_MD, dscore_TK.
    """
    (T, K), (M, D) = slot_TK.shape, y_MD.shape
    dy_MD, dscore_TK = y_MD.new_empty(M, D), torch.empty_like(score_TK, memory_format=torch.contiguous_format)
    BLOCK, num_warps = _tile(D, K)
    looking = 0 if assignment_M is None else -(-M // PADDING_ROWS)
    _weighted_sum_backward[(T + looking,)](
        dout_TD.contiguous(), y_MD.contiguous(), score_TK.contiguous(), slot_TK.contiguous(),
        slot_TK if assignment_M is None else assignment_M.contiguous(), dy_MD, dscore_TK, T, M, D,
        K=K, K_PADDED=_power_of_2(K), ROWS=True, PADDED=assignment_M is not None, PADDING_ROWS=PADDING_ROWS,
        BLOCK=BLOCK, num_warps=max(num_warps, 4),  # the warps share the sums of all rows
    )  # fmt: skip
    return dy_MD, dscore_TK


def score_gradient(
    dout_TD: Float[Tensor, "T D"],
    y_MD: Float[Tensor, "M D"],
    score_TK: Float[Tensor, "T K"],
    slot_TK: Integer[Tensor, "T K"],
) -> Float[Tensor, "T K"]:
    """dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d], in float32; zero for a slot past the end."""
    (T, K), (M, D) = slot_TK.shape, y_MD.shape
    dscore_TK = torch.empty_like(score_TK, memory_format=torch.contiguous_format)
    BLOCK, num_warps = _tile(D, K)
    y_MD, slot_TK = y_MD.contiguous(), slot_TK.contiguous()
    _weighted_sum_backward[(T,)](
        dout_TD.contiguous(), y_MD, dscore_TK, slot_TK, slot_TK, y_MD, dscore_TK, T, M, D,  # scores are not read
        K=K, K_PADDED=_power_of_2(K), ROWS=False, PADDED=True, PADDING_ROWS=PADDING_ROWS, BLOCK=BLOCK,
        num_warps=max(num_warps, 4),
    )  # fmt: skip
    return dscore_TK


@triton.jit
@no_type_check
def _weighted_sum_backward(
    dout, y, score, slot, assignment, dy, dscore, T, M, D,
    K: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PADDING_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: its K rows side by side, chunk by chunk. Earlier programs clear padding.

    Without ROWS only the scores' gradient is computed.
    """
    accum_dtype = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    t = (tl.program_id(0) - (tl.cdiv(M, PADDING_ROWS) if PADDED and ROWS else 0)).to(tl.int64)
    if PADDED and ROWS and t < 0:
        _clear_padding(tl.program_id(0), assignment, dy, T * K, M, D, PADDING_ROWS)
        return
    k = tl.arange(0, K_PADDED)
    row = tl.load(slot + t * K + k, mask=k < K, other=M).to(tl.int64)
    weight = tl.load(score + t * K + k, mask=k < (K if ROWS else 0), other=0).to(accum_dtype)
    real = row < M if PADDED else k < K
    total = tl.zeros([K_PADDED, BLOCK], accum_dtype)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        inside = real[:, None] & (d < D)[None, :]
        place = row[:, None] * D + d[None, :]
        gradient = tl.load(dout + t * D + d, mask=d < D, other=0).to(accum_dtype)[None, :]
        total += gradient * tl.load(y + place, mask=inside, other=0).to(accum_dtype)
        if ROWS:
            tl.store(dy + place, (weight[:, None] * gradient).to(dy.dtype.element_ty), mask=inside)
    tl.store(dscore + t * K + k, tl.sum(total, 1).to(dscore.dtype.element_ty), mask=k < K)


def use_swiglu_kernels(x: Tensor) -> bool:
    """Whether SwiGLU of x goes through kernels: in 16 bits only.

    The kernels' exponential is a few units of float32 off, which a float32 result would show.
    """
    with torch.no_grad():  # autograd differentiates the Function, not the kernels
        serve = use_kernels(x)
    return serve and x.element_size() == 2


def swiglu(
    gate_MF: Float[Tensor, "*M F"], up_MF: Float[Tensor, "*M F"], n_rows: Integer[Tensor, ""] | None = None
) -> Float[Tensor, "*M F"]:
    """hidden = round(silu(gate) * up), in float32. With `n_rows`, rows past the first `n_rows` stay unwritten."""
    gate_MF, up_MF = gate_MF.contiguous(), up_MF.contiguous()
    hidden_MF = gate_MF.new_empty(*gate_MF.shape)
    n = gate_MF.numel()
    _swiglu[(_swiglu_programs(n, n_rows),)](
        gate_MF, up_MF, hidden_MF, gate_MF if n_rows is None else n_rows, n, gate_MF.shape[-1],
        COUNTED=n_rows is not None, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS,
    )  # fmt: skip
    return hidden_MF


def _swiglu_programs(n: int, n_rows: Tensor | None) -> int:
    """One program per block; with `n_rows`, which only the device knows, at most so many, of several blocks each."""
    blocks = -(-n // SWIGLU_BLOCK)
    return blocks if n_rows is None else min(blocks, SWIGLU_PROGRAMS)


@triton.jit
@no_type_check
def _swiglu(gate, up, hidden, n_rows, n, F, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of elements, or per several blocks, one after the other."""
    if COUNTED:
        n = tl.minimum(tl.load(n_rows).to(tl.int64) * F, n)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        g = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
        u = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g))
        tl.store(hidden + i, (g * sigmoid * u).to(hidden.dtype.element_ty), mask=i < n)


def swiglu_backward(
    dhidden_MF: Float[Tensor, "*M F"],
    gate_MF: Float[Tensor, "*M F"],
    up_MF: Float[Tensor, "*M F"],
    n_rows: Integer[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "*M F"], Float[Tensor, "*M F"]]:
    """dgate = round(dhidden * up * silu'(gate)) and dup = round(dhidden * silu(gate)), in float32.

    silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))). With `n_rows`, rows past the first `n_rows` stay unwritten.

    Shapes: dgate_MF, dup_MF.
    """
    dhidden_MF, gate_MF, up_MF = dhidden_MF.contiguous(), gate_MF.contiguous(), up_MF.contiguous()
    dgate_MF, dup_MF = gate_MF.new_empty(*gate_MF.shape), up_MF.new_empty(*up_MF.shape)
    n = gate_MF.numel()
    _swiglu_backward[(_swiglu_programs(n, n_rows),)](
        dhidden_MF, gate_MF, up_MF, dgate_MF, dup_MF, gate_MF if n_rows is None else n_rows, n, gate_MF.shape[-1],
        COUNTED=n_rows is not None, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS,
    )  # fmt: skip
    return dgate_MF, dup_MF


@triton.jit
@no_type_check
def _swiglu_backward(dhidden, gate, up, dgate, dup, n_rows, n, F, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of elements, or per several blocks, one after the other."""
    if COUNTED:
        n = tl.minimum(tl.load(n_rows).to(tl.int64) * F, n)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        gradient = tl.load(dhidden + i, mask=i < n, other=0).to(tl.float32)
        g = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
        u = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g))
        dg = gradient * u * sigmoid * (1 + g * (1 - sigmoid))
        tl.store(dgate + i, dg.to(dgate.dtype.element_ty), mask=i < n)
        tl.store(dup + i, (gradient * g * sigmoid).to(dup.dtype.element_ty), mask=i < n)


def _tile(width: int, n_rows: int) -> tuple[int, int]:
    """How many columns of `n_rows` rows a program takes at once, and its number of warps.

    A thread holds 16 elements of a single row, or 8 of each of several rows.
    """
    BLOCK = max(128, min(_power_of_2(width), 2048, 8192 // _power_of_2(n_rows)))
    return BLOCK, max(1, BLOCK // (512 if n_rows == 1 else 256))


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n, because the sides of tiles are powers of two."""
    return 1 << (n - 1).bit_length()
