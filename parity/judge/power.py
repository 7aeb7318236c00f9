"""The smallest error that the allowances catch, array by array."""

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.oracle.expected import Oracle
from parity.oracle.problem import draw
from parity.oracle.quantities import names

Array = np.ndarray


class Power(msgspec.Struct):
    """The smallest relative error of an array that is caught: in one row (the median, the worst), and in all rows."""

    name: str
    dtype: str
    one_row: float
    worst_row: float
    all_rows: float


def power(case: Case) -> list[Power]:
    """Of every array of a case that is judged within an allowance.

    A row that was right and is multiplied by 1 + e is caught once e exceeds the least ratio of allowance to number in
    it; an array in which every row is, once e exceeds the least of all, or how far off its scale may be.
    """
    found = []
    for name, expected in Oracle(draw(case)).expected(names("dynamic"), "dynamic").items():
        if expected.allowed is None:
            continue
        with np.errstate(divide="ignore"):
            least = (expected.allowed / np.abs(expected.values)).reshape(-1, expected.values.shape[-1]).min(axis=1)
        rows = least[np.isfinite(least)]
        scale = np.inf if expected.slope is None else expected.slope.min()
        all_rows = min(float(rows.min()), float(scale))
        found.append(Power(name, case.dtype, float(np.median(rows)), float(rows.max()), all_rows))
    return found
