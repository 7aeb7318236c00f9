"""How far from exact an implementation may be, per row, derived from the dtype and the case."""

import ml_dtypes
import numpy as np

# Draws of the perturbed oracle. The largest of 8 is under half its typical size about once in 10,000 scalar rows.
DRAWS = 8

# A row may be this many times as far off as the worst draw: that rare small draw, and float32 sums in an order whose
# roundings add up (same-signed terms) where the draws' random walk lets them cancel.
FACTOR = 8.0


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def unit_roundoff(dtype: str) -> float:
    """u, the largest relative error of rounding to nearest: half the gap between 1 and the next number."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2


def smallest_step(dtype: str) -> float:
    """The distance between subnormal numbers."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_subnormal)


def allowance(exact: np.ndarray, draws: list[np.ndarray], dtype: str) -> np.ndarray:
    """The largest error that still counts as a match, elementwise, for `exact` [..., n], rows along the last axis.

    Half a step of the dtype the result is stored in, for the last rounding, and FACTOR times the row's yardstick: its
    largest error over all draws of the oracle, with rounding at every documented point before the last.
    """
    half_step = np.maximum(unit_roundoff(dtype) * np.abs(exact), smallest_step(dtype) / 2)
    yardstick = np.zeros(exact.shape[:-1])
    for draw in draws:
        yardstick = np.maximum(yardstick, np.abs(draw - exact).max(axis=-1, initial=0))
    return half_step + FACTOR * yardstick[..., None]
