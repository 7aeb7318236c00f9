"""Run cases through both frameworks and compare: the engine behind `check` and `faults --run`."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parity.cases.case import Case
from parity.cases.presets import command
from parity.judge.compare import Check, compare
from parity.judge.picture import blank
from parity.judge.records import CaseRecord, Header, Report, footer, header
from parity.oracle.problem import Problem, draw
from parity.run.backend import BACKENDS, framework, run
from parity.run.faults import Fault, plant
from parity.run.trace import Trace


def run_cases(
    cases: Sequence[Case],
    backends: tuple[str, ...],
    *,
    device: str = "cpu",
    jax_ranks: str = "shard_map",
    timeout: float = 60,
    fault: Fault | None = None,
    in_torchrun: bool = False,
    save: Path | None = None,
    show_progress: bool = True,
) -> Report | None:
    """Draw every case, run the backends at once in processes of their own, compare as their traces come in.

    None on every rank but 0 of a torchrun group, which then has nothing left to do.

    Raises BackendError when a framework is missing or its run ends in error.
    """
    head, begin, seconds = header(fault.name if fault else ""), time.perf_counter(), {"oracle": 0.0, "compare": 0.0}
    of_torch = [backend for backend in backends if in_torchrun and framework(backend) == "torch"]
    traces: dict[str, list[Trace]] = {case.name: [] for case in cases}
    judged: dict[str, tuple[CaseRecord, list[Check]]] = {}
    flags = "" if device == "cpu" else f" --device {device}"
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary, progress(show_progress) as bar:
        folder = Path(temporary)
        problems = {case.name: draw(case) for case in bar.track(cases, description="oracle")}
        for name, problem in problems.items():
            problem.save(folder / f"{name}.problem")
        seconds["oracle"] = time.perf_counter() - begin
        if in_torchrun:
            from parity.run.in_torch import join_torchrun

            if join_torchrun(folder, list(problems.values()), device, of_torch) != 0:
                return None
        joined = [(backend, case.name) for case in cases for backend in of_torch]
        homes = {backend: Path.cwd() for backend in backends if backend not in of_torch}
        if fault:
            homes[fault.side] = plant(fault, folder / "planted")
        tasks = {backend: bar.add_task(backend, total=len(cases)) for backend in backends}
        with closing(run(folder, homes, cases, device, jax_ranks, timeout, seconds)) as running:
            for backend, name in chain(joined, running):
                bar.advance(tasks[backend])
                traces[name].append(Trace.load(folder / f"{name}.{backend}.safetensors"))
                if len(traces[name]) == len(backends):
                    start = time.perf_counter()
                    judged[name] = judge(problems[name], traces.pop(name), flags)
                    seconds["compare"] += time.perf_counter() - start
        if save:
            save.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.safetensors"):
                shutil.copy(path, save)
    seconds["in all"] = time.perf_counter() - begin
    return make_report(head, [case.name for case in cases], judged, seconds)


def judge(problem: Problem, traces: list[Trace], flags: str = "") -> tuple[CaseRecord, list[Check]]:
    """Every comparison of one case, and what it looked like; `flags` are those that repeating it needs besides."""
    case, picture = problem.case, blank(problem)
    traces.sort(key=lambda trace: BACKENDS.index(trace.backend))
    checks = list(compare(problem, traces, picture))
    seconds = {trace.backend: trace.seconds for trace in traces}
    environment = {trace.backend: trace.environment for trace in traces}
    return CaseRecord(case, command(case) + flags, seconds, environment, picture), checks


def make_report(
    head: Header, names: list[str], judged: dict[str, tuple[CaseRecord, list[Check]]], seconds: dict[str, float]
) -> Report:
    """The report of cases in the order asked for; those that were never judged are missed in the footer."""
    order = [name for name in names if name in judged]
    checks = {name: judged[name][1] for name in order}
    return Report(head, {name: judged[name][0] for name in order}, checks, footer(checks, len(names), seconds))


def progress(show: bool = True) -> Progress:
    """Bars on standard error, where that is a terminal; gone when done."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
