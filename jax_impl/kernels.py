"""Matmuls of rows grouped by expert as Pallas kernels: each does what the plain version beside its call does.

`jax.lax.ragged_dot` on a GPU multiplies every row by every expert's weights and keeps one product of e. These read a
row once per tile of columns, and an expert's weights once per tile of its rows.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Integer

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile of the result, and of what it is summed over at a time
WARPS, STAGES = 8, 4
INTERPRET = False  # tests set it, to run without a GPU


def use_kernels(x: Array) -> bool:
    """Whether x can go through kernels: on a GPU, in a dtype that its matrix units multiply exactly."""
    return jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16)


@jax.custom_vjp
def grouped_matmul(
    x_SD: Float[Array, "S D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "S F"]:
    """Rows of expert j times w[j]; rows past the last expert's come out as zero. Backward reads none of them either."""
    return rows_times_weights(x_SD, w_eDF, counts_e)


def _grouped_matmul_forward(x_SD, w_eDF, counts_e):
    return grouped_matmul(x_SD, w_eDF, counts_e), (x_SD, w_eDF, counts_e)


def _grouped_matmul_backward(saved, dy_SF):
    x_SD, w_eDF, counts_e = saved
    dx_SD = rows_times_weights_transposed(dy_SF, w_eDF, counts_e)
    return dx_SD, weight_gradient(x_SD, dy_SF, counts_e), None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def rows_times_weights(
    x_SD: Float[Array, "S D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "S F"]:
    """Rows of expert j times w[j], summed in float32, rounded once; rows past the last expert's come out as zero."""
    return _rows_times(x_SD, w_eDF, counts_e, transposed=False)


def rows_times_weights_transposed(
    dy_SF: Float[Array, "S F"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "S D"]:
    """The same with w[j] transposed, which is never written out: the gradient of the rows."""
    return _rows_times(dy_SF, w_eDF, counts_e, transposed=True)


def weight_gradient(
    x_SD: Float[Array, "S D"], dy_SF: Float[Array, "S F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "e D F"]:
    """Rows of expert j of x, transposed, times those of dy; zero for an expert without rows."""
    result = jax.eval_shape(
        lambda x, dy, counts: jnp.einsum("sd,sf,e->edf", x, dy, counts.astype(x.dtype)), x_SD, dy_SF, counts_e
    )
    e, D, F = result.shape
    end_e = jnp.cumsum(counts_e).astype(jnp.int32)
    first_e = end_e - counts_e.astype(jnp.int32)
    grid = (e, pl.cdiv(D, ROWS), pl.cdiv(F, COLUMNS))
    return _call(_weight_gradient_kernel, grid, result, first_e, end_e, x_SD, dy_SF)


def _rows_times(x_SD: Array, w_eDF: Array, counts_e: Array, transposed: bool) -> Array:
    result = jax.eval_shape(
        lambda x, w, counts: jax.lax.ragged_dot(x, w.mT if transposed else w, counts), x_SD, w_eDF, counts_e
    )
    expert_V, first_V, end_V = tiles(counts_e, x_SD.shape[0])
    kernel = partial(_rows_times_kernel, transposed=transposed, n_experts=w_eDF.shape[0])
    grid = (expert_V.shape[0] * pl.cdiv(result.shape[1], COLUMNS),)
    return _call(kernel, grid, result, expert_V, first_V, end_V, x_SD, w_eDF)


def tiles(counts_e: Integer[Array, " e"], n_rows: int) -> tuple[Array, Array, Array]:
    """Which expert's rows each tile of rows has, its first row, and where that expert's rows end.

        counts 3, 0, 2 of 7 rows, tiles of 2     expert 0: 01 2_   expert 1: none   expert 2: 34   padding: 56

    Padding is one more expert's, whose number is e. So many tiles as there could be: those left over have no rows.

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
    """One program per tile of the result; those of the same rows one after the other, which find them in the cache."""
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

    steps = jnp.where((j < n_experts) & (first_row < end_row), pl.cdiv(x.shape[1], DEPTH), 0)
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

    steps = pl.cdiv(end_row - first_row, DEPTH)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    triton.store(dw.at[j, d[:, None], f[None]], total.astype(dw.dtype), mask=(d < D)[:, None] & (f < F)[None])


def _call(kernel: Callable, grid: tuple[int, ...], result: jax.ShapeDtypeStruct, *operands: Array) -> Array:
    """`result` is of the plain version: under shard_map it also says over which axes the result varies."""
    return pl.pallas_call(
        kernel,
        out_shape=result,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=INTERPRET,
    )(*operands)
