"""Finds the presets by pairs: they cover the pairs that the other presets lack, and overflow nowhere."""

import numpy as np

from parity.cases import pairs
from parity.cases.case import Case
from parity.cases.presets import PLAIN
from parity.oracle.problem import draw
from parity.oracle.tolerances import numpy_dtype


def fits(case: Case) -> bool:
    """Whether the dtype holds twice every value that the oracle computes, because infinities are not judged."""
    with np.errstate(over="ignore"):
        exact = draw(case).exact
        arrays = [*exact._asdict().values(), *exact.gradients.values()]
        values = [2 * a.astype(numpy_dtype(case.dtype)) for a in arrays if isinstance(a, np.ndarray)]
    return all(bool(np.isfinite(a.astype(np.float64)).all()) for a in values)


if __name__ == "__main__":
    pairs.write([*PLAIN.values()], fits)
