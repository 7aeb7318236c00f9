"""Pallas kernels for row movements, and for matmuls of rows grouped by expert. Each does what the plain version does.

XLA reads rows 8 bytes at a time, and takes one more launch for each k to find out which rows are padding. A kernel here
takes one launch in all, moves 16 bytes at a time, and reads and writes every row once. Sums over K are in the plain
version's order.

`jax.lax.ragged_dot` on a GPU multiplies every row by every expert's weights and keeps one product of e. The matmul
kernels here read a row once per tile of columns, and an expert's weights once per tile of that expert's rows.

One kernel, `put_rows`, writes to the memory of other GPUs. Pallas's Triton compiler has no way to name another GPU, so
this kernel goes through Mosaic, the other compiler behind Pallas.

M stands for any number of rows, and O for the number of output rows where it differs.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Integer

ROWS, COLUMNS, DEPTH = 128, 256, 64  # rows and columns of a matmul's result tile; step along the summed axis
WARPS, STAGES = 8, 4  # warps of a matmul; how far a kernel's loads run ahead
PADDING_ROWS = 64  # rows that one program checks for padding
SORT_BLOCK, SORT_TILE = 512, 64  # positions of N, and keys, per program; at 256, XLA's cumsum costs more
PUT_ROWS, PUT_BLOCKS, PUT_CORES = 4, 6, 132  # rows that a block takes at once, blocks per SM, SMs of a GPU
PUT_BYTES = 208 * 2**10  # of an SM's shared memory that rows can take
INTERPRET = False  # tests set it, to run without a GPU


def use_kernels(x: Array) -> bool:  # noqa: ARG001  the same answer for every array here; not so in PyTorch
    """Whether x can go through kernels: where JAX's default backend is a GPU.

    During tracing the device of x is not known. To compute on the CPU of a machine with a GPU, set JAX_PLATFORMS=cpu.
    """
    return jax.default_backend() == "gpu"


def use_matmul_kernels(x: Array) -> bool:
    """Whether x can go through `grouped_matmul`: on a GPU, in a dtype that its matrix units multiply exactly."""
    return use_kernels(x) and x.dtype in (jnp.bfloat16, jnp.float16)


def can_reach_ranks(axis_name: str) -> bool:
    """Whether a kernel can write to the memory of the other ranks of this axis: GPUs in reach, under `shard_map`."""
    return gpus_reach_each_other() and axis_name in jax.sharding.get_abstract_mesh().manual_axes


def gpus_reach_each_other() -> bool:
    """Whether a kernel can write from one GPU to another: from the H100 on, in one process.

    jax 0.11 cannot reach the memory of another process's GPU, and an earlier jax was not tried.
    """
    return (
        jax.default_backend() == "gpu"
        and jax.device_count() > 1  # with one, jax asks for NVSHMEM, which XLA no longer has
        and jax.__version_info__ >= (0, 11)
        and jax.process_count() == 1
        and float(jax.devices()[0].compute_capability) >= 9
    )


def use_remote_kernels(x_MD: Float[Array, "M D"]) -> bool:
    """Whether rows can go to ranks within reach through `put_rows`.

    Elements must have 16 or 32 bits, and rows a multiple of 128 bytes: copies to and from shared memory require that.
    With at most 2^22 rows, a block's number times the stride fits in 32 bits.
    """
    return use_kernels(x_MD) and x_MD.shape[0] <= 2**22 and _put_tile(x_MD.shape[1], x_MD.dtype.itemsize) is not None


def sort_by_key(key_N: Integer[Array, " N"], n_keys: int) -> tuple[Integer[Array, " N"], Integer[Array, " N"]]:
    """Stable sort of keys 0..n_keys-1, and its inverse. Any other key counts as no key, and goes last.

    A general sort makes many passes over wide keys. Here the keys are few. First each key is counted in each block of
    N. Then a cumsum, key by key, says where a block's rows of a key end. From there each block places its own rows.

    Shapes: order_N, place_N.
    """
    (N,), blocks = key_N.shape, pl.cdiv(key_N.shape[0], SORT_BLOCK)
    if key_N.dtype.itemsize < 4:  # n_keys may not fit into so few bytes
        key_N = key_N.astype(jnp.int32)
    key_N = jnp.where((key_N < 0) | (key_N > n_keys), n_keys, key_N).astype(jnp.int32)
    grid = (blocks, pl.cdiv(n_keys + 1, SORT_TILE))
    counts = _call(_count_keys_kernel, grid, _like(key_N, n_keys + 1, blocks), key_N, num_warps=4)
    end = jnp.cumsum(counts.reshape(-1), dtype=jnp.int32).reshape(counts.shape)
    return _call(_place_keys_kernel, (blocks,), (_like(key_N, N),) * 2, key_N, end, num_warps=SORT_BLOCK // 32)


def _load_keys(key, i, n_keys: int) -> Array:
    """Load a block's keys. Positions past the end of N get the last key, after all others of the block."""
    return triton.load(key.at[i], mask=i < key.shape[0], other=n_keys)


def _count_keys_kernel(key, counts) -> None:
    """One program per block of N and tile of keys."""
    b, n_keys = pl.program_id(0), counts.shape[0] - 1
    found = _load_keys(key, b * SORT_BLOCK + jnp.arange(SORT_BLOCK), n_keys)
    mine = pl.program_id(1) * SORT_TILE + jnp.arange(SORT_TILE)
    count = (found[:, None] == mine[None]).sum(axis=0, dtype=jnp.int32)
    triton.store(counts.at[mine, b], count, mask=mine <= n_keys)


def _place_keys_kernel(key, end, order, place) -> None:
    """One program per block. A key's row is where its block's rows of that key end, minus how many are left."""
    b, n_keys = pl.program_id(0), end.shape[0] - 1
    i = b * SORT_BLOCK + jnp.arange(SORT_BLOCK, dtype=jnp.int32)
    found = _load_keys(key, i, n_keys)
    same = found[:, None] == found[None]
    from_here = (same & (i[:, None] >= i[None])).sum(axis=0, dtype=jnp.int32)  # the axis within one thread
    row = triton.load(end.at[found, b]) - from_here
    triton.store(place.at[i], row, mask=i < key.shape[0])
    triton.store(order.at[row], i, mask=i < key.shape[0])


def expert_major_rows(
    counts_Pe: Integer[Array, "P e"], capacity: int
) -> tuple[Integer[Array, " S"], Integer[Array, " S"]]:
    """For each expert-major row of rank bins the rank-major one it comes from, and the inverse; S where it is padding.

    The padding of a bin counts as one more expert's rows, which come last.

    Shapes: source_S, target_S.
    """
    P, e = counts_Pe.shape
    padding_P = capacity - counts_Pe.sum(axis=1)
    counts = jnp.concatenate([counts_Pe, padding_P[:, None]], axis=1).astype(jnp.int32).reshape(-1)
    result = _like(counts, P * capacity)
    return _call(partial(_expert_major_rows_kernel, n_groups=e + 1), counts.shape, (result,) * 2, counts, num_warps=4)


def _expert_major_rows_kernel(counts, source, target, *, n_groups: int) -> None:
    """One program per segment: the rows from one rank p for one expert j. It computes where its segment starts."""
    (S,), BLOCK = source.shape, 1024
    p, j = pl.program_id(0) // n_groups, pl.program_id(0) % n_groups
    segment = jnp.arange(_power_of_2(counts.shape[0]))
    count = triton.load(counts.at[segment], mask=segment < counts.shape[0], other=0)
    rank, expert = segment // n_groups, segment % n_groups
    rank_major = jnp.where(segment < pl.program_id(0), count, 0).sum(dtype=jnp.int32)
    expert_major = jnp.where((expert < j) | ((expert == j) & (rank < p)), count, 0).sum(dtype=jnp.int32)
    rows, padding = counts[pl.program_id(0)], j == n_groups - 1

    def store(step, nothing):
        r = (step * BLOCK + jnp.arange(BLOCK)).astype(jnp.int32)
        inside = (r < rows) & (expert_major + r < S) & (rank_major + r < S)
        triton.store(source.at[expert_major + r], jnp.where(padding, S, rank_major + r), mask=inside)
        triton.store(target.at[rank_major + r], jnp.where(padding, S, expert_major + r), mask=inside)
        return nothing

    jax.lax.fori_loop(0, -(-rows // BLOCK), store, ())


def gather_rows(x_MD: Float[Array, "M D"], index_O: Integer[Array, "*O"]) -> Float[Array, "*O D"]:
    """Row r is x[index[r]], and zero where the index is past the end."""
    D = x_MD.shape[1]
    BLOCK, num_warps = _tile(D, 1)
    chunks = pl.cdiv(D, BLOCK)
    result = _like(x_MD, index_O.size, D)
    kernel = partial(_gather_rows_kernel, chunks=chunks, BLOCK=BLOCK)
    y_OD = _call(kernel, (index_O.size * chunks,), result, x_MD, index_O.reshape(-1), num_warps=num_warps)
    return y_OD.reshape(*index_O.shape, D)


def _gather_rows_kernel(x, index, y, *, chunks: int, BLOCK: int) -> None:
    """One program per row, or per chunk of a wide one."""
    r = pl.program_id(0) // chunks
    d = pl.program_id(0) % chunks * BLOCK + jnp.arange(BLOCK)
    source = index[r]
    row = triton.load(x.at[source, d], mask=(d < x.shape[1]) & (source < x.shape[0]), other=0)
    triton.store(y.at[r, d], row, mask=d < x.shape[1])


def expand_rows(
    x_TD: Float[Array, "T D"], slot_TK: Integer[Array, "T K"], assignment_M: Integer[Array, " M"]
) -> Float[Array, "M D"]:
    """Copy token t to rows slot[t]: the same rows as gathering x[assignment // K], but x is read once.

    A slot past the end is skipped. Rows whose assignment is past the last one are padding: zero.
    """
    (T, K), (M,), D = slot_TK.shape, assignment_M.shape, x_TD.shape[1]
    BLOCK, num_warps = _tile(D, K)
    kernel = partial(_expand_rows_kernel, BLOCK=BLOCK)
    grid = (pl.cdiv(M, PADDING_ROWS) + T,)
    return _call(kernel, grid, _like(x_TD, M, D), x_TD, slot_TK, assignment_M, num_warps=num_warps)


def _expand_rows_kernel(x, slot, assignment, y, *, BLOCK: int) -> None:
    """One program per token: its K rows side by side, chunk by chunk. Earlier programs clear padding."""
    (T, K), (M, D) = slot.shape, y.shape
    t, k = pl.program_id(0) - pl.cdiv(M, PADDING_ROWS), jnp.arange(_power_of_2(K))
    row = triton.load(slot.at[t, k], mask=(t >= 0) & (k < K), other=M)

    def copy(step, nothing):
        d = step * BLOCK + jnp.arange(BLOCK)
        tile = jnp.broadcast_to(triton.load(x.at[t, d], mask=d < D, other=0)[None], (k.size, BLOCK))
        triton.store(y.at[row[:, None], d[None]], tile, mask=(row < M)[:, None] & (d < D)[None])
        return nothing

    jax.lax.fori_loop(0, pl.cdiv(D, BLOCK) * (t >= 0).astype(jnp.int32), copy, ())
    _clear_padding(assignment, y, T * K)


def _clear_padding(assignment, y, N: int) -> None:
    """Write zero into a program's rows that hold no assignment. Programs past the last row have none to check."""
    (M, D), BLOCK = y.shape, 128
    row = pl.program_id(0) * PADDING_ROWS + jnp.arange(PADDING_ROWS)
    padding = triton.load(assignment.at[row], mask=row < M, other=-1) >= N

    def clear(step, nothing):
        d = step * BLOCK + jnp.arange(BLOCK)
        zero = jnp.zeros((PADDING_ROWS, BLOCK), y.dtype)
        triton.store(y.at[row[:, None], d[None]], zero, mask=padding[:, None] & (d < D)[None])
        return nothing

    jax.lax.fori_loop(0, pl.cdiv(D, BLOCK) * padding.astype(jnp.int32).max(), clear, ())


def sum_rows(
    y_MD: Float[Array, "M D"], slot_TK: Integer[Array, "T K"], score_TK: Float[Array, "T K"] | None = None
) -> Float[Array, "T D"]:
    """out[t] = round(sum over k = 0..K-1 of y[slot[t,k]]), each times score[t,k] if there are scores, in float32.

    A slot past the end counts as zero. The compiler may round a product and its sum at once; PyTorch's kernel does not.
    """
    (T, K), D = slot_TK.shape, y_MD.shape[1]
    BLOCK, num_warps = _tile(D, K)
    chunks = pl.cdiv(D, BLOCK)
    scores = () if score_TK is None else (score_TK,)
    kernel = partial(_sum_rows_kernel, chunks=chunks, BLOCK=BLOCK, weighted=score_TK is not None)
    return _call(kernel, (T * chunks,), _like(y_MD, T, D), y_MD, slot_TK, *scores, num_warps=num_warps)


def _sum_rows_kernel(y, slot, *score_and_out, chunks: int, BLOCK: int, weighted: bool) -> None:
    """One program per token, or per chunk of a wide one."""
    *score, out = score_and_out
    accum_dtype = np.promote_types(y.dtype, np.float32)
    t = pl.program_id(0) // chunks
    d = pl.program_id(0) % chunks * BLOCK + jnp.arange(BLOCK)
    total = jnp.zeros(BLOCK, accum_dtype)
    for k in range(slot.shape[1]):
        source = slot[t, k]
        row = triton.load(y.at[source, d], mask=(d < y.shape[1]) & (source < y.shape[0]), other=0).astype(accum_dtype)
        total += score[0][t, k].astype(accum_dtype) * row if weighted else row
    triton.store(out.at[t, d], total.astype(out.dtype), mask=d < y.shape[1])


def weighted_sum_backward(
    dout_TD: Float[Array, "T D"],
    y_MD: Float[Array, "M D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
    assignment_M: Integer[Array, " M"],
) -> tuple[Float[Array, "M D"], Float[Array, "T K"]]:
    """dy[slot[t,k]] = round(score[t,k] * dout[t]) and dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d].

    A token's gradient is read once, and each of its rows is read and written once; padding is written as zero.

    Shapes: dy_MD, dscore_TK.
    """
    (T, K), (M, D) = slot_TK.shape, y_MD.shape
    BLOCK, num_warps = _tile(D, K)
    results = _like(y_MD, M, D), _like(y_MD, T, K, dtype=score_TK.dtype)
    kernel = partial(_weighted_sum_backward_kernel, BLOCK=BLOCK)
    grid = (pl.cdiv(M, PADDING_ROWS) + T,)
    num_warps = max(num_warps, 4)  # the warps share the sums of all rows
    return _call(kernel, grid, results, dout_TD, y_MD, score_TK, slot_TK, assignment_M, num_warps=num_warps)


def _weighted_sum_backward_kernel(dout, y, score, slot, assignment, dy, dscore, *, BLOCK: int) -> None:
    """One program per token: its K rows side by side, chunk by chunk. Earlier programs clear padding."""
    (T, K), (M, D) = slot.shape, y.shape
    accum_dtype = np.promote_types(y.dtype, np.float32)
    t, k = pl.program_id(0) - pl.cdiv(M, PADDING_ROWS), jnp.arange(_power_of_2(K))
    here = (t >= 0) & (k < K)
    row = triton.load(slot.at[t, k], mask=here, other=M)
    weight = triton.load(score.at[t, k], mask=here, other=0).astype(accum_dtype)

    def add(step, total):
        d = step * BLOCK + jnp.arange(BLOCK)
        inside = (row < M)[:, None] & (d < D)[None]
        gradient = triton.load(dout.at[t, d], mask=d < D, other=0).astype(accum_dtype)[None]
        y_tile = triton.load(y.at[row[:, None], d[None]], mask=inside, other=0).astype(accum_dtype)
        triton.store(dy.at[row[:, None], d[None]], (weight[:, None] * gradient).astype(dy.dtype), mask=inside)
        return total + gradient * y_tile

    total = jax.lax.fori_loop(
        0, pl.cdiv(D, BLOCK) * (t >= 0).astype(jnp.int32), add, jnp.zeros((k.size, BLOCK), accum_dtype)
    )
    triton.store(dscore.at[t, k], total.sum(axis=1).astype(dscore.dtype), mask=here)
    _clear_padding(assignment, dy, T * K)


def score_gradient(
    dout_TD: Float[Array, "T D"],
    y_MD: Float[Array, "M D"],
    score_TK: Float[Array, "T K"],
    slot_TK: Integer[Array, "T K"],
) -> Float[Array, "T K"]:
    """dscore[t,k] = sum over d of dout[t,d] * y[slot[t,k],d], in float32; zero for a slot past the end."""
    (T, K), D = slot_TK.shape, y_MD.shape[1]
    BLOCK, num_warps = _tile(D, K)
    result = _like(y_MD, T, K, dtype=score_TK.dtype)
    kernel = partial(_score_gradient_kernel, BLOCK=BLOCK)
    return _call(kernel, (T,), result, dout_TD, y_MD, slot_TK, num_warps=max(num_warps, 4))


def _score_gradient_kernel(dout, y, slot, dscore, *, BLOCK: int) -> None:
    """One program per token: its K rows side by side, chunk by chunk."""
    (_, K), (M, D) = slot.shape, y.shape
    accum_dtype = np.promote_types(y.dtype, np.float32)
    t, k = pl.program_id(0), jnp.arange(_power_of_2(K))
    row = triton.load(slot.at[t, k], mask=k < K, other=M)

    def add(step, total):
        d = step * BLOCK + jnp.arange(BLOCK)
        inside = (row < M)[:, None] & (d < D)[None]
        gradient = triton.load(dout.at[t, d], mask=d < D, other=0).astype(accum_dtype)[None]
        y_tile = triton.load(y.at[row[:, None], d[None]], mask=inside, other=0).astype(accum_dtype)
        return total + gradient * y_tile

    total = jax.lax.fori_loop(0, pl.cdiv(D, BLOCK), add, jnp.zeros((k.size, BLOCK), accum_dtype))
    triton.store(dscore.at[t, k], total.sum(axis=1).astype(dscore.dtype), mask=k < K)


def put_rows(
    x_MD: Float[Array, "M D"], place_MK: Integer[Array, "M K"], n_rows: int, axis_name: str | None, n_ranks: int
) -> Float[Array, "O D"]:
    """Store row m of x, for every k, to row place[m, k] among all ranks' rows; a negative place is nowhere.

    Row o of rank p is number p * `n_rows` + o. Returned is this rank's part, once all ranks have stored their rows.
    Rows that nobody stores hold anything.

    XLA starts such a kernel only when all ranks have come to it, so no rank stores into memory that still has another
    use.
    """
    from jax.experimental.pallas import mosaic_gpu as mosaic  # some releases of jax need more packages for it

    tile = _put_tile(x_MD.shape[1], x_MD.dtype.itemsize)
    assert tile is not None
    (rows, pieces, width), (M, D) = tile, x_MD.shape
    if n_rows == 0 or x_MD.size == 0:  # of all ranks, which have the same sizes
        return jnp.full((n_rows, D), _zero_of(x_MD, place_MK), x_MD.dtype)
    chunks = pl.cdiv(M, rows)
    per_core = max(1, min(PUT_BLOCKS, PUT_BYTES // (rows * D * x_MD.dtype.itemsize)))
    blocks = min(PUT_CORES * per_core, chunks)
    sizes = {"M": M, "n_rows": n_rows, "n_ranks": n_ranks, "chunks": chunks, "blocks": blocks}
    run = mosaic.kernel(
        partial(_put_rows_kernel, axis_name=axis_name, **sizes),
        out_type=_like(x_MD, n_rows, pieces, width),
        scratch_types=[
            mosaic.SMEM((rows, pieces, width), x_MD.dtype), mosaic.Barrier(), mosaic.SemaphoreType.REGULAR
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Lane),
    )  # fmt: skip
    y_OD = run(x_MD.reshape(M, pieces, width), place_MK.reshape(-1).astype(jnp.int32)).reshape(n_rows, D)
    # shard_map takes the kernel's result for the same on all ranks, and would sum its gradient over them.
    here, there = (jax.typeof(a).manual_axis_type.varying for a in (_zero_of(x_MD, place_MK), y_OD))
    return jax.lax.pcast(y_OD, tuple(here - there), to="varying") if here - there else y_OD


def put_stride(n_chunks: int) -> int:
    """The step from one chunk that is sent to the next: about 0.618 of the number of chunks, and coprime to it.

    Rows that follow each other often go to the same rank. If all ranks sent to one rank at a time, its link would be
    full and the others idle. With this step, what is sent at one time is spread evenly over all rows, so over ranks.
    """
    return next(n for n in range(max(1, round(0.618 * n_chunks)), n_chunks + 2) if math.gcd(n, n_chunks) == 1)


def _put_rows_kernel(
    x, place, y, chunk, arrived, done, *, M: int, n_rows: int, n_ranks: int, axis_name: str, chunks: int, blocks: int
) -> None:
    """A block takes one chunk of rows after the other into shared memory, and copies each row from there to its places.

    Which rank a copy goes to cannot depend on a value that is read. So there is a copy for each rank, each under its
    condition, and one of them runs. A chunk of which no row has a place is not read.
    """
    from jax.experimental.pallas import mosaic_gpu as mosaic

    rows, K, stride = chunk.shape[0], place.shape[0] // M, put_stride(chunks)
    own, block = jax.lax.axis_index(axis_name), jax.lax.axis_index("block")
    others = [jax.lax.rem(own + i, n_ranks) for i in range(1, n_ranks)]
    parts = [(own, y), *((p, mosaic.remote_ref(y, {axis_name: p})) for p in others)]  # type: ignore[arg-type]

    def place_of(first, a):
        """Place a % K of the chunk's row a // K, and -1 for rows past the last."""
        return jnp.where(first * K + a < M * K, place[jnp.minimum(first * K + a, M * K - 1)], -1)

    def put_chunk(_, c):
        first = c * rows

        @pl.when(reduce(jnp.maximum, [place_of(first, a) for a in range(rows * K)]) >= 0)
        def _():
            mosaic.copy_gmem_to_smem(x.at[pl.ds(first, rows)], chunk, arrived)
            mosaic.barrier_wait(arrived)
            jax.lax.fori_loop(0, rows * K, put_row, first)
            mosaic.wait_smem_to_gmem(0)

        return jax.lax.rem(c + blocks * stride % chunks, chunks)

    def put_row(a, first):
        target = place_of(first, a)
        for rank, part in parts:

            @pl.when((target >= 0) & (jax.lax.div(target, n_rows) == rank))
            def _(part=part):
                row = part.at[pl.ds(jax.lax.rem(target, n_rows), 1)]
                mosaic.copy_smem_to_gmem(chunk.at[pl.ds(jax.lax.div(a, K), 1)], row)

        return first

    jax.lax.fori_loop(0, (chunks - block + blocks - 1) // blocks, put_chunk, jax.lax.rem(block * stride, chunks))
    # A block waits for those of its number on other ranks: when all of a rank's blocks have ended, all rows are there.
    for rank in others:
        pl.semaphore_signal(done, device_id={axis_name: rank})
    pl.semaphore_wait(done, n_ranks - 1)


def _put_tile(D: int, size: int) -> tuple[int, int, int] | None:
    """How many rows of D elements a block takes at once, and the pieces of a row; None where rows do not fit.

    A row is cut into pieces, because no side of a copy may be longer than 256. An element has `size` bytes, a piece a
    multiple of 16 bytes, and a row a multiple of 128.
    """
    width = max((w for w in range(1, min(D, 256) + 1) if D % w == 0 and w * size % 16 == 0), default=0)
    if size not in (2, 4) or D * size % 128 or 256 * width < D or D * size > PUT_BYTES:
        return None
    return max(1, min(PUT_ROWS, PUT_BYTES // PUT_BLOCKS // (D * size))), D // width, width


def _tile(width: int, n_rows: int) -> tuple[int, int]:
    """How many columns of `n_rows` rows a program takes at once, and its number of warps.

    A thread holds 16 elements of a single row, or 8 of each of several rows.
    """
    BLOCK = max(128, min(_power_of_2(width), 2048, 8192 // _power_of_2(n_rows)))
    return BLOCK, max(1, BLOCK // (512 if n_rows == 1 else 256))


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n, because the sides of tiles are powers of two."""
    return 1 << (n - 1).bit_length()


def grouped_matmul(
    x_MD: Float[Array, "M D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "M F"]:
    """Rows of expert j times w[j]; rows past the last expert's come out as zero. Backward reads none of them either."""
    # Where replicas of the experts share weights, this zero makes JAX sum the weights' gradient over the replicas.
    zero = _zero_of(x_MD, w_eDF, counts_e).astype(x_MD.dtype)
    return _grouped_matmul(x_MD - zero, w_eDF - zero, counts_e)


@jax.custom_vjp
def _grouped_matmul(x_MD, w_eDF, counts_e):
    return rows_times_weights(x_MD, w_eDF, counts_e)


def _grouped_matmul_forward(x_MD, w_eDF, counts_e):
    return _grouped_matmul(x_MD, w_eDF, counts_e), (x_MD, w_eDF, counts_e)


def _grouped_matmul_backward(saved, dy_MF):
    x_MD, w_eDF, counts_e = saved
    dx_MD = rows_times_weights_transposed(dy_MF, w_eDF, counts_e)
    return dx_MD, weight_gradient(x_MD, dy_MF, counts_e), None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def rows_times_weights(
    x_MD: Float[Array, "M D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "M F"]:
    """Rows of expert j times w[j], summed in float32, rounded once; rows past the last expert's come out as zero."""
    return _rows_times(x_MD, w_eDF, counts_e, transposed=False)


def rows_times_weights_transposed(
    dy_MF: Float[Array, "M F"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "M D"]:
    """Rows of expert j times w[j] transposed, which is never written out: the gradient of the rows."""
    return _rows_times(dy_MF, w_eDF, counts_e, transposed=True)


def weight_gradient(
    x_MD: Float[Array, "M D"], dy_MF: Float[Array, "M F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "e D F"]:
    """For each expert, its rows of x, transposed, times its rows of dy; zero for an expert without rows."""
    e, D, F = counts_e.shape[0], x_MD.shape[1], dy_MF.shape[1]
    end_e = jnp.cumsum(counts_e).astype(jnp.int32)
    first_e = end_e - counts_e.astype(jnp.int32)
    grid = (e, pl.cdiv(D, ROWS), pl.cdiv(F, COLUMNS))
    return _call(_weight_gradient_kernel, grid, _like(x_MD, e, D, F), first_e, end_e, x_MD, dy_MF)


def _rows_times(x_MD: Array, w_eDF: Array, counts_e: Array, transposed: bool) -> Array:
    (M, _), width = x_MD.shape, w_eDF.shape[1 if transposed else 2]
    expert_V, first_V, end_V = tiles(counts_e, M)
    kernel = partial(_rows_times_kernel, transposed=transposed, n_experts=w_eDF.shape[0])
    grid = (expert_V.shape[0] * pl.cdiv(width, COLUMNS),)
    return _call(kernel, grid, _like(x_MD, M, width), expert_V, first_V, end_V, x_MD, w_eDF)


def tiles(counts_e: Integer[Array, " e"], n_rows: int) -> tuple[Array, Array, Array]:
    """The expert of each tile of rows, the tile's first row, and where that expert's rows end.

        counts 3, 0, 2 of 7 rows, tiles of 2     expert 0: 01 2_   expert 1: none   expert 2: 34   padding: 56

    Padding belongs to one more expert, number e. There are as many tiles as can be needed; unused ones have no rows.

    Shapes: [V] each, V = ceil(n_rows / ROWS) + e + 1.
    """
    e = counts_e.shape[0]
    count_G = jnp.append(counts_e, n_rows - counts_e.sum()).astype(jnp.int32)
    end_G = jnp.cumsum(count_G)
    tiles_G = -(-count_G // ROWS)
    last_G = jnp.cumsum(tiles_G)
    tile_V = jnp.arange(pl.cdiv(n_rows, ROWS) + e + 1, dtype=jnp.int32)
    expert_V = jnp.minimum((tile_V[:, None] >= last_G).sum(axis=1, dtype=jnp.int32), e)
    first_V = (end_G - count_G)[expert_V] + (tile_V - (last_G - tiles_G)[expert_V]) * ROWS
    return expert_V, first_V, end_G[expert_V]


def _rows_times_kernel(expert, first, end, x, w, y, *, transposed: bool, n_experts: int) -> None:
    """One program per tile of the result. Programs of the same rows are neighbours: the rows stay in the cache."""
    n_columns = pl.cdiv(y.shape[1], COLUMNS)
    v, n = pl.program_id(0) // n_columns, pl.program_id(0) % n_columns
    j, first_row, end_row = expert[v], first[v], end[v]
    row, column = first_row + jnp.arange(ROWS), n * COLUMNS + jnp.arange(COLUMNS)
    mine, real = row < end_row, column < y.shape[1]

    def add(step, total):
        d = step * DEPTH + jnp.arange(DEPTH)
        deep = d < x.shape[1]
        x_tile = triton.load(x.at[row[:, None], d[None]], mask=mine[:, None] & deep[None], other=0)
        if transposed:
            w_tile = triton.load(w.at[j, column[:, None], d[None]], mask=real[:, None] & deep[None], other=0)
        else:
            w_tile = triton.load(w.at[j, d[:, None], column[None]], mask=deep[:, None] & real[None], other=0)
        return total + triton.dot(x_tile, w_tile, trans_b=transposed)

    steps = pl.cdiv(x.shape[1], DEPTH) * ((j < n_experts) & (first_row < end_row)).astype(jnp.int32)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    triton.store(y.at[row[:, None], column[None]], total.astype(y.dtype), mask=mine[:, None] & real[None])


def _weight_gradient_kernel(first, end, x, dy, dw) -> None:
    """One program per expert and tile of its weights, over all of its rows."""
    _, D, F = dw.shape
    j, first_row, end_row = pl.program_id(0), first[pl.program_id(0)], end[pl.program_id(0)]
    d, f = pl.program_id(1) * ROWS + jnp.arange(ROWS), pl.program_id(2) * COLUMNS + jnp.arange(COLUMNS)

    def add(step, total):
        row = first_row + step * DEPTH + jnp.arange(DEPTH)
        mine = row < end_row
        x_tile = triton.load(x.at[row[:, None], d[None]], mask=mine[:, None] & (d < D)[None], other=0)
        dy_tile = triton.load(dy.at[row[:, None], f[None]], mask=mine[:, None] & (f < F)[None], other=0)
        return total + triton.dot(x_tile, dy_tile, trans_a=True)

    steps = -(-(end_row - first_row) // DEPTH)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    triton.store(dw.at[j, d[:, None], f[None]], total.astype(dw.dtype), mask=(d < D)[:, None] & (f < F)[None])


def _like(array: Array, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a result; the dtype is the array's unless one is given."""
    return jax.ShapeDtypeStruct(shape, dtype or array.dtype)


def _zero_of(*arrays: Array) -> Array:
    """Zero, which under shard_map varies over every axis that one of the arrays varies over."""
    return sum((a.reshape(-1)[:0].sum().astype(jnp.float32) for a in arrays), jnp.zeros(()))


def _call(kernel: Callable, grid: tuple[int, ...], results: Any, *operands: Array, num_warps: int = WARPS) -> Any:
    """Run the kernel's programs. Where there is nothing to read or to write, all results are zero or empty."""

    def zeros(*operands: Array) -> Any:
        return jax.tree.map(lambda result: jnp.full(result.shape, _zero_of(*operands), result.dtype), results)

    if 0 in grid or any(a.size == 0 for a in operands):
        return zeros(*operands)
    run = jax.custom_jvp(
        pl.pallas_call(
            kernel,
            out_shape=jax.eval_shape(zeros, *operands),
            grid=grid,
            compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=STAGES),
            interpret=INTERPRET,
        )
    )
    run.defjvp(_refuse_gradient)
    return run(*operands)


def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    """Kernels are differentiated as a whole, once, by the custom VJPs that call them."""
    raise NotImplementedError(
        "kernels have no second derivative: for the gradient of a gradient use the plain versions, by setting "
        "jax_impl.kernels.use_kernels = lambda x: False before anything is traced"
    )
