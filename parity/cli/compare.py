"""`python -m parity compare`."""

import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import tyro

from parity.cases.case import Case, flag
from parity.cli.report import publish
from parity.cli.shared import Json, check_writable, not_a_terminal
from parity.judge import records
from parity.judge.engine import judge, make_report, progress
from parity.oracle.problem import draw
from parity.run.trace import Trace, load_folder


@dataclass
class Command:
    """Do traces that `check --save` wrote, on one machine or several, agree with the oracle and with each other?

    Exit code: 0 match, 1 mismatch, 2 wrong usage, 5 nothing was compared.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity compare A B                       what `check --backend torch --save A` and jax's B hold
        python -m parity compare traces --html page.html   a folder with several
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of traces: one per backend, or one that holds all."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, the default when output is not a terminal; --no-json prints the table."""
    between: bool = False
    """Judge backends by each other; the oracle's verdict is printed beside theirs."""
    html: Path | None = None
    """File to write the report to as well, as an HTML page."""


def run(command: Command) -> int:
    """Run `compare`; its exit code."""
    check_writable(command.html)
    if not command.folders:
        raise ValueError("which traces? Name the folders that `python -m parity check --save` wrote")
    traces: dict[str, list[Trace]] = {}
    for folder in command.folders:
        for trace in load_folder(folder):
            traces.setdefault(trace.case.name, []).append(trace)
    for name, found in traces.items():
        if len({trace.case for trace in found}) > 1:
            differ = [
                f"--{flag(f.name)} {' and '.join(str(getattr(t.case, f.name)) for t in found)}"
                for f in fields(Case)
                if len({getattr(t.case, f.name) for t in found}) > 1
            ]
            raise ValueError(f"{name} is not the same case in every folder: {', '.join(differ)}")
        names = [trace.backend.name for trace in found]
        if len(set(names)) < len(names):
            raise ValueError(f"{name} has traces of {names}: give one of each backend")
        if len(names) < 2:
            raise ValueError(f"{name} has traces of {names} only: give a folder of another backend too")
    backends = {trace.backend.name: trace.backend for found in traces.values() for trace in found}
    head, start = records.header(backends.values()), time.perf_counter()
    with progress() as bar:
        judged = {
            name: judge(draw(found[0].case), found, between=command.between)
            for name, found in bar.track(traces.items(), description="compare")
        }
    report = make_report(head, list(traces), judged, {"compare": time.perf_counter() - start})
    return publish(report, command.json, command.html)
