"""From a notebook or a test: layers as functions, a report instead of an exit code."""

import io
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console

from parity.cases.case import Case, changed
from parity.cases.presets import PRESETS
from parity.explain.identify import explain_failures
from parity.judge.engine import run_cases
from parity.judge.records import Report
from parity.report.terminal import print_report
from parity.run import ours, own
from parity.run.backend import Backend, Setting
from parity.run.ending import temporary_folder


class Checked(Report):
    """A report that shows itself as the table."""

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=120, highlight=False)
        print_report(console, self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    __str__ = __repr__

    def __bool__(self) -> bool:
        """Whether all matched, and something was compared."""
        return self.footer.exit_code == 0


def check(*what: Callable[..., Any] | Case | str, timeout: float, record: tuple[str, ...], **changes: Any) -> Checked:
    """See `parity.check`."""
    layers = [one for one in what if callable(one)]
    named = [one for one in what if isinstance(one, str) and one not in PRESETS]
    presets = [PRESETS[one] for one in what if isinstance(one, str) and one in PRESETS]
    cases = presets + [one for one in what if isinstance(one, Case)]
    if len(layers) + len(named) + len(cases) != len(what):
        raise TypeError("a layer is a function, a backend's name or its file; a case is a preset's name or a Case")
    backends = list(map(ours.find, named))
    if not layers and not backends:
        raise ValueError("which layer? Give a function marked with @parity.backend, or a backend's name")
    if not cases:
        raise ValueError("on which case? Name a preset, such as 'zipf', or give a Case")
    cases = [changed(case, changes) for case in cases]
    with temporary_folder() as folder:
        written = [own.written(layer, folder / f"{i}.pickle") for i, layer in enumerate(layers)]
        backends = _told_apart([*written, *backends])
        setting = Setting(timeout=timeout, record=record)
        report = run_cases(cases, backends, setting)
        assert report is not None  # as it is only in a group that torchrun started
        explain_failures(report, backends, setting)
    return Checked(**{field: getattr(report, field) for field in Report.__struct_fields__})


def assert_match(*what: Callable[..., Any] | Case | str, timeout: float, **changes: Any) -> None:
    """See `parity.assert_match`."""
    __tracebackhide__ = True
    report = check(*what, timeout=timeout, record=(), **changes)
    if not report:
        raise AssertionError(f"{report.footer.verdict}\n{report}")


def _told_apart(backends: list[Backend]) -> list[Backend]:
    """Functions of one name in several modules get numbers."""
    names, told = [backend.name for backend in backends], []
    for i, backend in enumerate(backends):
        nth = f".{names[: i + 1].count(backend.name)}" * (names.count(backend.name) > 1)
        told.append(msgspec.structs.replace(backend, name=backend.name + nth))
    return told
