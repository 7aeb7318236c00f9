"""Where the oracle computes: in NumPy, or at real size in PyTorch on a GPU, both through the array API standard.

Functions that the oracle needs and the standard lacks are defined here.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np

Array = np.ndarray  # or PyTorch's on a GPU
Space = Any  # NumPy, or `array_api_compat.torch`

# How many random numbers a bank has. They fit into a core's cache. The size is a prime so that the rows of an array,
# which start one row width apart, do not get the same numbers.
BANK = 131_101

# The device of PyTorch's arrays. Tests set it to a CPU.
DEVICE = "cuda"


@cache
def gpu_is_there() -> bool:
    """Whether PyTorch is there and has a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def space_of(a: Array) -> Space:
    """The namespace that has functions of an array."""
    if isinstance(a, np.ndarray | np.generic):
        return np
    import array_api_compat.torch

    return array_api_compat.torch


def put(a: Array, on_gpu: bool) -> Any:
    """The same array, moved to the GPU if the oracle computes there."""
    if not on_gpu:
        return a
    import torch

    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(a, order="C").view(np.int16)).to(DEVICE).view(torch.bfloat16)
    return torch.from_numpy(np.array(a, order="C")).to(DEVICE)


def put_beside(a: Array, other: Array) -> Array:
    """The same numbers on another array's device, in float64 if that array is."""
    if isinstance(other, np.ndarray):
        return a.astype(other.dtype, copy=False)
    return put(a, on_gpu=True).to(other.dtype)


def to_numpy(a: Array) -> np.ndarray:
    """The same array in NumPy."""
    return a if isinstance(a, np.ndarray | np.generic) else a.cpu().numpy()


def give_back_memory() -> None:
    """Free the GPU memory that PyTorch caches, for other processes."""
    if gpu_is_there():
        import torch

        torch.cuda.empty_cache()


def stored(a: Array, dtype: str) -> np.ndarray:
    """Numbers as `dtype` stores them, in NumPy."""
    if isinstance(a, np.ndarray):
        return a.astype(dtype)
    import torch

    a = a.to(getattr(torch, dtype)).cpu()
    return a.view(torch.int16).numpy().view(dtype) if dtype == "bfloat16" else a.numpy()


def in_float64(a: Array) -> Array:
    """The same numbers in float64."""
    return a.astype(np.float64) if isinstance(a, np.ndarray) else a.double()


def zeros_beside(a: Array, shape: tuple[int, ...]) -> Array:
    """Zeros where an array is."""
    return np.zeros(shape) if isinstance(a, np.ndarray) else a.new_zeros(shape)


def rounded(a: Array, dtype: str) -> Array:
    """Float64 numbers as `dtype` stores them."""
    if isinstance(a, np.ndarray | np.generic):
        return a.astype(dtype).astype(np.float64)
    import torch

    return a.to(getattr(torch, dtype)).double()


def erf(a: Array) -> Array:
    """The error function."""
    if isinstance(a, np.ndarray | np.generic):
        from scipy.special import erf  # here, as an interpreter that only runs a layer need not have it

        return erf(a)
    return space_of(a).erf(a)


def put_along_last(into: Array, index: Array, values: Array) -> None:
    """Write values at places along the last axis."""
    if isinstance(into, np.ndarray):
        np.put_along_axis(into, index, values, axis=-1)
    else:
        into.scatter_(-1, index, values)


def largest_at(n: int, index: Array, values: Array) -> Array:
    """[n], the largest value at each index; 0 where there is none."""
    if isinstance(values, np.ndarray):
        found = np.zeros(n)
        np.maximum.at(found, index, values)
        return found
    xp = space_of(values)  # one after the other: a GPU's threads would wait for each other at few places
    return xp.stack([xp.max(xp.where(index == i, values, 0.0)) for i in range(n)])


class Random:
    """Random numbers near given ones.

    In NumPy they are read from a bank, starting at a random place: drawing them anew takes 4 to 16 times as long.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.generator = rng, None

    def near(self, a: Array, relative: float, least: float) -> Array:
        """Each number with a uniform error of up to `relative` of it, plus up to `least`."""
        if not isinstance(a, np.ndarray | np.generic | float):
            return a + self._of_torch("rand", a).mul_(2).sub_(1) * (relative * a.abs() + least)
        a = np.asarray(a)
        found, flat = np.empty(a.shape), a.reshape(-1)
        for piece in _pieces(flat.size):
            out, these = found.reshape(-1)[piece], flat[piece]
            np.multiply(these, self._from_bank(1.0, these.size), out=out)
            out *= relative
            out += these
            out += self._from_bank(least, these.size)
        return found

    def plus_normal(self, a: Array, deviation: Array) -> Array:
        """Each number plus a normal error of this standard deviation. Overwrites `a`."""
        if not isinstance(a, np.ndarray | np.generic | float):
            return a.addcmul_(self._of_torch("randn", a), deviation)
        a = np.asarray(a)
        flat, by = a.reshape(-1), deviation.reshape(-1)
        for piece in _pieces(flat.size):
            flat[piece] += by[piece] * self._from_bank(None, flat[piece].size)
        return a

    def _from_bank(self, size: float | None, n: int) -> np.ndarray:
        start = int(self.rng.random() * BANK)
        return _bank(size)[start : start + n]

    def _of_torch(self, kind: str, like: Array) -> Array:
        import torch

        if self.generator is None:
            self.generator = torch.Generator(like.device).manual_seed(int(self.rng.integers(2**62)))
        draw = getattr(torch, kind)
        return draw(like.shape, dtype=like.dtype, device=like.device, generator=self.generator)


def _pieces(n: int) -> Iterator[slice]:
    return (slice(first, min(first + BANK, n)) for first in range(0, n, BANK))


@cache
def _bank(size: float | None) -> np.ndarray:
    """Numbers up to `size` on both sides of zero, or of a standard deviation of one.

    The bank is stored twice in a row, so that it can be read in full from any place in it.
    """
    rng = np.random.default_rng(0 if size is None else 1)
    once = rng.standard_normal(BANK) if size is None else size * rng.uniform(-1, 1, BANK)
    return np.concatenate([once, once])
