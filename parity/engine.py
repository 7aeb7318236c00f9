"""Run cases through both frameworks and compare: the engine behind `check` and `faults --run`."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parity.backends import BACKENDS, run
from parity.case import Case
from parity.compare import Check, compare
from parity.faults import Fault, plant
from parity.inputs import draw
from parity.trace import Trace


@dataclass
class Outcome:
    """What came of a run, by case, and the seconds that each part took."""

    checks: dict[str, list[Check]] = field(default_factory=dict)
    traces: dict[str, list[Trace]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_cases(
    cases: Sequence[Case],
    backends: tuple[str, ...],
    *,
    jax_ranks: str = "shard_map",
    timeout: float = 60,
    fault: Fault | None = None,
    in_torchrun: bool = False,
    save: Path | None = None,
    show_progress: bool = True,
) -> Outcome | None:
    """Draw every case, run the backends at once in processes of their own, compare as their traces come in.

    None on every rank but 0 of a torchrun group, which then has nothing left to do.

    Raises BackendError when a framework is missing or its run ends in error.
    """
    outcome, begin, comparing = Outcome(traces={case.name: [] for case in cases}), time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary, progress(show_progress) as bar:
        folder = Path(temporary)
        problems = {case.name: draw(case) for case in bar.track(cases, description="oracle")}
        for name, problem in problems.items():
            problem.save(folder / f"{name}.problem")
        outcome.seconds["oracle"] = time.perf_counter() - begin
        if in_torchrun:
            from parity.run_torch import join_torchrun

            if join_torchrun(folder, list(problems.values())) != 0:
                return None
        joined = [("torch", case.name) for case in cases if in_torchrun]
        homes = {backend: Path.cwd() for backend in backends if not (in_torchrun and backend == "torch")}
        if fault:
            homes[fault.side] = plant(fault, folder / "planted")
        tasks = {backend: bar.add_task(backend, total=len(cases)) for backend in backends}
        with closing(run(folder, homes, len(cases), jax_ranks, timeout, outcome.seconds)) as running:
            for backend, name in chain(joined, running):
                bar.advance(tasks[backend])
                traces = outcome.traces[name]
                traces.append(Trace.load(folder / f"{name}.{backend}.safetensors"))
                if len(traces) == len(backends):
                    start = time.perf_counter()
                    traces.sort(key=lambda trace: BACKENDS.index(trace.backend))
                    outcome.checks[name] = list(compare(problems[name], traces))
                    comparing += time.perf_counter() - start
        if save:
            save.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.safetensors"):
                shutil.copy(path, save)
    outcome.seconds |= {"compare": comparing, "in all": time.perf_counter() - begin}
    outcome.checks = {case.name: outcome.checks[case.name] for case in cases if case.name in outcome.checks}
    return outcome


def progress(show: bool = True) -> Progress:
    """Bars on standard error, where that is a terminal; gone when done."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
