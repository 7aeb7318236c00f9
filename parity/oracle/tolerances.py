"""How far from exact an implementation may be, per row, derived from the dtype and the case."""

import math
from collections.abc import Iterable
from functools import cache

import ml_dtypes
import numpy as np

from parity.oracle.arrays import Array, space_of, zeros_beside

# Draws of the perturbed oracle. The rows of a gradient may share one rounding, so that one random number decides them.
# FACTOR makes up for draws that fall short, unless all 16 are under a quarter of the largest possible error. That is
# so once in 4 billion.
DRAWS = 16

# How many times as far off as its worst draw a row may be. Roundings of the draws walk randomly, but those of float32
# sums of same-signed terms add up. Over all presets no row of 16 numbers or more was three times as far off.
FACTOR = 4.0


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@cache
def unit_roundoff(dtype: str) -> float:
    """u, the largest relative error of rounding to nearest: half the gap between 1 and the next number."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2


@cache
def noise(dtype: str) -> float:
    """The largest relative error that a draw puts on a rounded value: the unit roundoff.

    Four times that for float64: the draws and the oracle are float64 themselves, so a
    smaller error would be rounded away, and the oracle is as far off as the implementation.
    """
    return unit_roundoff(dtype) * (4 if dtype == "float64" else 1)


@cache
def underflow(dtype: str) -> float:
    """The largest error of a number below the normal range.

    Half a step of subnormal numbers in float16. In the others all of it: XLA on a CPU, and GPUs, flush them to zero.
    """
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    return float(info.smallest_subnormal) / 2 if dtype == "float16" else float(info.smallest_normal)


def allowance(exact: Array, draws: Iterable[Array], dtype: str) -> Array:
    """The largest error that still counts as a match, elementwise, for `exact` [..., n], rows along the last axis.

    It is `allowed` by the row's yardstick: its largest error over all draws of the oracle, with rounding at every
    documented point before the last.
    """
    yardstick = zeros_beside(exact, exact.shape[:-1])
    for draw in draws:
        yardstick = space_of(exact).maximum(strayed(draw, exact), yardstick)
    return allowed(exact, yardstick, dtype)


def strayed(draw: Array, exact: Array) -> Array:
    """The largest error of each row of a draw: [...] of [..., n]."""
    xp = space_of(exact)
    return xp.max(xp.abs(draw - exact), axis=-1) if exact.shape[-1] else xp.zeros_like(xp.sum(draw, axis=-1))


def allowed(exact: Array, yardstick: Array, dtype: str) -> Array:
    """Half a step of the stored dtype, for the last rounding, plus FACTOR times the row's yardstick."""
    xp = space_of(exact)
    half_step = xp.maximum(unit_roundoff(dtype) * xp.abs(exact), underflow(dtype))
    half_step += FACTOR * yardstick[..., None]
    return half_step


# Units of rounding, in float32 or wider, by which all numbers of an array may be off in one direction: what XLA's
# functions are off by (tanh 4.75, sigmoid 2.4, exp 1.4, of all numbers tried on a CPU), and a half for each rounding.
SYSTEMATIC = 8

# Products of 16 bits that a tensor core adds to a sum at a time. It cuts off what float32 has no room for, half a step
# on average, which is one unit of rounding; rounding would not lean to one side (Fasi, Higham, Mikaitis, Pranesh 2021,
# "Numerical behavior of NVIDIA tensor cores"). After sums of 18,432 products 4.3e-5 was seen on an H200, of 6.9e-5.
AT_A_TIME = 16


def leaning(n: int, dtype: str) -> float:
    """Units of rounding in float32 by which all numbers may be off in one direction, after sums of n products."""
    return SYSTEMATIC + (n / AT_A_TIME if numpy_dtype(dtype).itemsize == 2 else 0)


def slope(got: Array, exact: Array) -> Array:
    """How many times as large `got` is as `exact`, by least squares over the last axis; 1 where `exact` is zero."""
    xp = space_of(exact)
    square = xp.sum(exact * exact, axis=-1)
    return xp.where(square > 0, xp.sum(got * exact, axis=-1) / xp.where(square > 0, square, 1.0), 1.0)


def shares_of_slope(exact: Array) -> Array:
    """The weights whose product with numbers [..., n] sums up to how many times as large they are as `exact`."""
    xp = space_of(exact)
    return exact / xp.maximum(xp.sum(exact * exact, axis=-1, keepdims=True), 1e-300)


def shares_of(parts: Array) -> Array:
    """[K, n]: what to multiply numbers [n], a sum of `parts` [K, n], with to have each part's share by least squares.

    That is 1 for each part in the sum itself, and 0 for one that is zero everywhere.
    """
    return space_of(parts).linalg.pinv(parts @ parts.T, hermitian=True) @ parts


def alike(x: np.ndarray) -> float:
    """How many rows [..., D] are alike, on average over rows. Such rows are rounded alike, so their errors add up."""
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    of_bytes = rows.view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)
    _, times = np.unique(of_bytes, return_counts=True)
    return float((times * times).sum() / max(times.sum(), 1)) if times.size else 1.0


def shares_allowance(
    shares: Array, exact: Array, worst: Array, dtype: str, systematic: float, alike: float = 1.0
) -> Array:
    """How far off the sum over n of `shares` [..., n] times numbers may be, for `exact` [..., n].

    FACTOR times `worst`, the largest deviation of that sum in a draw, four standard deviations of what n last roundings
    make of it, each uniform in half a step, what is lost below the normal range, and what is `systematic`. Rounding
    averages out in it, so it sees what no row shows; of m tokens that are `alike`, less so, by the root of m.
    """
    xp = space_of(exact)
    last = unit_roundoff(dtype) / math.sqrt(3) * xp.sqrt(xp.sum((shares * exact) ** 2, axis=-1))
    lost = underflow(dtype) * xp.sum(xp.abs(shares), axis=-1)
    return math.sqrt(alike) * (FACTOR * worst + 4 * last) + lost + systematic
