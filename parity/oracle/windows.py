"""Expert weights of real size in little memory: every expert's matrix is a window of one bank of random numbers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray

# Each expert's window begins this much further on: a prime, so that no window is another one shifted by whole rows.
STRIDE = 4099


@dataclass(frozen=True)
class Windows:
    """[E, rows, columns], of which only the bank is stored. Looks like an array as far as its readers need."""

    bank: Array
    shape: tuple[int, int, int]
    first: int = 0  # expert

    def __getitem__(self, g: int) -> Any:
        """Expert g's matrix, [rows, columns]: in float64 on a GPU, where there is one, as the oracle needs it."""
        start, (_, rows, columns) = (self.first + g) * STRIDE, self.shape
        if self.bank.dtype == np.float64 and gpu_is_there():
            return OnGPU(_on_gpu(self).narrow(0, start, rows * columns).view(rows, columns))
        return self.bank[start : start + rows * columns].reshape(rows, columns)

    def of_experts(self, mine: slice) -> "Windows":
        """The windows of consecutive experts."""
        return Windows(self.bank, (mine.stop - mine.start, *self.shape[1:]), self.first + mine.start)

    def astype(self, dtype: Any) -> "Windows":
        """The same in another dtype."""
        return Windows(self.bank.astype(dtype), self.shape, self.first)


def draw_windows(shape: tuple[int, int, int], rng: np.random.Generator, size: float = 1) -> Windows:
    """Random weights [E, rows, columns], scaled as a linear layer's are, and by `size`."""
    E, rows, columns = shape
    bank = rng.standard_normal(rows * columns + (E - 1) * STRIDE, dtype=np.float32)
    return Windows(bank * np.float32(size / np.sqrt(rows)), shape)


@dataclass(frozen=True)
class OnGPU:
    """A float64 matrix on the GPU that NumPy's arrays are multiplied by there: in a second, not in minutes."""

    matrix: Any
    __array_ufunc__ = None  # NumPy leaves `array @ this` to __rmatmul__

    @property
    def T(self) -> "OnGPU":  # noqa: N802  as NumPy calls it
        """Transposed."""
        return OnGPU(self.matrix.T)

    def __mul__(self, other: "OnGPU") -> "OnGPU":
        """Number by number."""
        return OnGPU(self.matrix * other.matrix)

    def __abs__(self) -> "OnGPU":
        return OnGPU(self.matrix.abs())

    def __rmatmul__(self, a: Array) -> Array:
        import torch

        return (torch.from_numpy(np.ascontiguousarray(a)).to(self.matrix.device) @ self.matrix).cpu().numpy()


@cache
def gpu_is_there() -> bool:
    """Whether PyTorch is there and has a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


_banks: dict[int, Any] = {}


def _on_gpu(windows: Windows) -> Any:
    """The bank on the GPU, copied there once."""
    import torch

    key = id(windows.bank)
    if key not in _banks:
        _banks.clear() if len(_banks) >= 3 else None  # those of one problem
        _banks[key] = (windows.bank, torch.from_numpy(windows.bank).cuda())
    return _banks[key][1]
