"""Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Unsupported(Exception):  # noqa: N818  it is no error
    """Raised by a layer of one's own in a case that it does not compute: neither passed nor failed."""


def backend(
    *, framework: str, supports: Callable[[Any], Any] = bool, drops: bool = False
) -> Callable[[Callable], Callable]:
    """Mark a function as a layer that `python -m parity check --backend FILE.py` can run.

    `framework` is "torch" or "jax", written out: it is read without running the file. `supports` takes a case, and
    returns whether the layer computes it, or the reason why not, as a string. `drops`: where the case has a capacity,
    the layer drops by itself as the case says, and need not be told by `keep`.

    What the function's arguments are called says what it is given (docs/own-layer.md).
    """
    assert framework in ("torch", "jax"), framework

    def mark(function: Callable) -> Callable:
        function.framework, function.supports, function.drops = framework, supports, drops  # type: ignore[attr-defined]
        return function

    return mark


def only(case: Any, *free: str, **has: Any) -> None:
    """Raises Unsupported in a case whose router or experts have an option that a layer has not.

        only(case, "scale", score_function=("softmax", "sigmoid"), renormalize=True)

    says of a layer that it scales by anything, has two score functions, always renormalises, and has the default of
    every other option (`python -m parity check --help` lists them). Nothing is said of options that change nothing in
    the case, as the precision of the router in float32.
    """
    options = case.router._asdict() | case.expert._asdict()
    defaults = case.router._field_defaults | case.expert._field_defaults
    if unknown := {*free, *has} - options.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no such option; there are {', '.join(options)}")
    for name, value in options.items():
        wanted = has.get(name, defaults.get(name, value))
        if name not in {*free, *case.idle} and value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            wanted = " or ".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
            raise Unsupported(f"it computes --{name.replace('_', '-')} {wanted} only")


class Recorded(NamedTuple):
    """An array that a layer hands over from its inside."""

    name: str
    array: Any
    rows: Any


_recorded: list[Recorded] | None = None


def record(name: str, array: Any, rows: Any = None) -> None:
    """Hand over an array from inside a layer, so that `check` compares it; outside of a check this does nothing.

    `name` is stage/value, as "apply_experts/y": docs/own-layer.md lists them. For an array of rows, `rows` says which
    row each is: integers [..., 3], (source rank, token, k), with -1 for padding; or the order that they are in:
    "token", as [T, K, D]; "grouped", by expert on the rank that has the tokens; "received", by source rank; or
    "expert_major". Without it, it is the order in which the stage returns rows, or "token" where the array has axes
    [T, K, D].
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


def check(*what: Any, timeout: float = 60, record: tuple[str, ...] = (), **changes: Any) -> Any:
    """Do these layers compute these cases? The report of it, which shows itself as `python -m parity check` does.

        parity.check(layer, "zipf")                          against the oracle
        parity.check(layer, "jax", "zipf", dtype="bfloat16") and against a backend; a preset, changed

    A layer is a function marked with `parity.backend`, in a module or in a notebook, or a backend as `--backend` names
    it. A case is a preset's name or a `parity.cases.case.Case`; `changes` are fields of all cases. `timeout` in
    seconds and `record` are as in `python -m parity check --help`.

    Raises ValueError on a case that cannot be, and `parity.run.backend.BackendError` where a layer cannot run at all.
    """
    from parity import api

    return api.check(*what, timeout=timeout, record=record, **changes)


def assert_match(*what: Any, timeout: float = 60, **changes: Any) -> None:
    """In a test: these layers compute these cases; `what` and `changes` are as for `check`.

    Raises AssertionError with the table, the first divergence and its worst row, also where nothing was compared.
    """
    __tracebackhide__ = True
    from parity import api

    api.assert_match(*what, timeout=timeout, **changes)
