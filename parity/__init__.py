"""Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


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


class Recorded(NamedTuple):
    """An array that a layer hands over from its inside."""

    name: str
    array: Any
    rows: Any


_recorded: list[Recorded] | None = None


def record(name: str, array: Any, rows: Any = None) -> None:
    """Hand over an array from inside a layer, so that `check` compares it; outside of a check this does nothing.

    `name` is stage/value, as "apply_experts/y": the README lists them. For an array of rows, `rows` says which row each
    is: integers [..., 3], (source rank, token, k), with -1 for padding; or the order that they are in: "token", as
    [T, K, D]; "grouped", by expert on the rank that has the tokens; "received", by source rank; or "expert_major".
    Without it, it is the order in which the stage returns rows, or "token" where the array has axes [T, K, D].
    """
    if _recorded is not None:
        _recorded.append(Recorded(name, array, rows))


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """What is recorded within this block, in order."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
