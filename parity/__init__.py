"""Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?"""

from collections.abc import Callable
from typing import Any


class Unsupported(Exception):  # noqa: N818  it is no error
    """Raised by a layer of one's own in a case that it does not compute: neither passed nor failed."""


def backend(*, framework: str, supports: Callable[[Any], Any] = bool) -> Callable[[Callable], Callable]:
    """Mark a function as a layer that `python -m parity check --backend FILE.py` can run.

    `framework` is "torch" or "jax", written out: it is read without running the file. `supports` takes a case, and
    returns whether the layer computes it, or the reason why not, as a string.

    What the function's arguments are called says what it is given (README, "A layer of your own").
    """
    assert framework in ("torch", "jax"), framework

    def mark(function: Callable) -> Callable:
        function.supports = supports  # type: ignore[attr-defined]
        return function

    return mark
