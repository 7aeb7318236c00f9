"""Expert weights of real size in little memory: every expert's matrix is a window of one bank of random numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.oracle.arrays import Array, in_float64, put

# Each expert's window begins this much further on: a prime, so that no window is another one shifted by whole rows.
STRIDE = 4099


@dataclass(frozen=True)
class Windows:
    """[E, rows, columns], of which only the bank is stored. It has the array interface that its readers need."""

    bank: Array  # NumPy's, or, where the oracle computes there, on a GPU
    shape: tuple[int, int, int]
    first: int = 0  # expert

    def __getitem__(self, g: int) -> Any:
        """Expert g's matrix, [rows, columns], where the bank is."""
        start, (_, rows, columns) = (self.first + g) * STRIDE, self.shape
        return self.bank[start : start + rows * columns].reshape(rows, columns)

    def of_experts(self, mine: slice) -> "Windows":
        """The windows of consecutive experts."""
        return Windows(self.bank, (mine.stop - mine.start, *self.shape[1:]), self.first + mine.start)

    def astype(self, dtype: Any) -> "Windows":
        """The same in another dtype."""
        return Windows(self.bank.astype(dtype), self.shape, self.first)

    def in_float64(self, on_gpu: bool) -> "Windows":
        """The same for the oracle: in float64, on the GPU or where it is."""
        return Windows(in_float64(put(self.bank, on_gpu)), self.shape, self.first)


def draw_windows(shape: tuple[int, int, int], rng: np.random.Generator, size: float = 1) -> Windows:
    """Random weights [E, rows, columns], scaled as a linear layer's are, and by `size`."""
    E, rows, columns = shape
    bank = rng.standard_normal(rows * columns + (E - 1) * STRIDE, dtype=np.float32)
    return Windows(bank * np.float32(size / np.sqrt(rows)), shape)
