"""Run cases through backends and compare: the engine behind `check` and `faults --run`."""

import math
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parity.cases.case import Case
from parity.cases.files import writing
from parity.cases.presets import command
from parity.judge.blame import blame
from parity.judge.compare import Check, compare
from parity.judge.picture import blank
from parity.judge.records import CaseRecord, Header, Report, footer, header
from parity.oracle.arrays import give_back_memory
from parity.oracle.evaluation import unreached
from parity.oracle.expected import Oracle
from parity.oracle.problem import Problem, draw
from parity.oracle.quantities import STAGES
from parity.oracle.size import check_size
from parity.oracle.vectorised import on_gpu, small
from parity.run import supervisor
from parity.run.backend import Backend, BackendError, Setting, resolve
from parity.run.ending import temporary_folder
from parity.run.faults import Fault, plant
from parity.run.naming import MAIN
from parity.run.supervisor import Failure
from parity.run.trace import Trace


class DiedError(BackendError):
    """Processes were killed or hung in some cases; what was found in all others is in `report`."""

    def __init__(self, failure: Failure, report: Report) -> None:
        super().__init__(failure.backend, str(failure))
        self.report = report


def run_cases(
    cases: Sequence[Case],
    backends: Sequence[Backend],
    setting: Setting,
    *,
    fault: Fault | None = None,
    join: str = "",
    between: bool = False,
    save: Path | None = None,
    show_progress: bool = True,
) -> Report | None:
    """Draw every case, run the backends at once in processes of their own, compare as their traces come in.

    `join` is a framework whose process group, started by torchrun or a cluster, this process is in: backends of that
    framework run in the group. `between`: backends are judged by each other, and the oracle's verdict stands beside.

    Returns None on every process of such a group except the first.

    Raises BackendError when a package is missing or a backend cannot run, DiedError when it did not survive a case.
    """
    for case in cases:
        if not on_gpu(case):
            check_size(case, tuple(backend.layout for backend in backends))
    head = header(backends, fault.name if fault else "")
    begin, seconds = time.perf_counter(), {"oracle": 0.0, "compare": 0.0}
    joined = [backend for backend in backends if backend.framework == join]
    started = [backend for backend in backends if backend not in joined]
    results: dict[str, dict[str, Trace | Failure]] = {case.name: {} for case in cases}
    died: list[Failure] = []
    judged: dict[str, tuple[CaseRecord, list[Check]]] = {}
    shown = {backend.name: backend for backend in backends}
    flags = "" if setting.device == "cpu" else f" --device {setting.device}"
    flags += " --between" * between + "".join(f" --record {shlex.quote(text)}" for text in setting.record)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        bar = stack.enter_context(progress(show_progress))
        problems = {case.name: draw(case) for case in bar.track(cases, description="oracle")}
        for name, problem in problems.items():
            problem.save(folder / f"{name}.problem")
        give_back_memory()
        seconds["oracle"] = time.perf_counter() - begin
        if join and _join(join, folder, list(problems.values()), setting, joined) != 0:
            return None
        done = [(backend.name, case.name, None) for case in cases for backend in joined]
        homes = {backend.name: Path.cwd() for backend in started}
        if fault:
            homes[fault.backend] = plant(fault, folder / "planted")
        oracles = stack.enter_context(_ahead(problems.values(), backends))
        tasks = {backend.name: bar.add_task(backend.name, total=len(cases)) for backend in backends}

        def judge_one(name: str) -> None:
            start, found = time.perf_counter(), results.pop(name)
            for side, trace in found.items():
                if isinstance(trace, Trace):
                    shown[side] = shown[side].providing(trace.backend.provides)
            oracle = oracles.pop(name).result() if name in oracles else None
            of_backends = [found[backend.name] for backend in backends]
            judged[name] = judge(problems.pop(name), of_backends, flags, between, oracle)
            seconds["compare"] += time.perf_counter() - start

        with closing(supervisor.run(folder, homes, started, cases, setting, seconds)) as running:
            for backend, name, failure in chain(done, running):
                if failure and not failure.case:
                    raise BackendError(backend, str(failure))
                died += [failure] if failure and not failure.raised else []
                bar.advance(tasks[backend])
                results[name][backend] = failure or Trace.load(folder / f"{name}.{backend}.safetensors")
                if len(results[name]) == len(backends) and not on_gpu(problems[name].case):
                    judge_one(name)
        for name in [name for name in results if len(results[name]) == len(backends)]:  # on a GPU, which is free now
            judge_one(name)
        if save:
            save.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.safetensors"):
                with writing(save / path.name):
                    shutil.copy(path, save)
    seconds["in all"] = time.perf_counter() - begin
    head = msgspec.structs.replace(head, backends=list(shown.values()))
    report = make_report(head, [case.name for case in cases], judged, seconds)
    if died:
        raise DiedError(died[0], report)
    return report


@contextmanager
def _ahead(problems: Iterable[Problem], backends: Sequence[Backend]) -> Iterator[dict[str, Future[Oracle]]]:
    """Oracles of large cases, by name. They draw while backends run, which wait for each other and leave a core."""
    names = {name for backend in backends for name in backend.provides}
    large = [Oracle(problem) for problem in problems if not small(problem.case) and not on_gpu(problem.case)]
    with ThreadPoolExecutor(1) as thread:

        def measured(oracle: Oracle) -> Oracle:
            oracle.measure(names)
            return oracle

        try:
            yield {oracle.case.name: thread.submit(measured, oracle) for oracle in large}
        except BaseException:
            thread.shutdown(wait=False, cancel_futures=True)
            for oracle in large:
                oracle.stop()
            raise


def _join(framework: str, folder: Path, problems: list[Problem], setting: Setting, backends: list[Backend]) -> int:
    """Run problems in this process's group and return its rank there. Raises BackendError if that fails."""
    try:
        return resolve(f"parity.run.{framework}_ranks:join")(folder, problems, setting, backends)
    except (ValueError, BackendError):
        raise
    except Exception as error:
        names = ", ".join(backend.name for backend in backends)
        raise BackendError(names, f"{names}: {type(error).__name__}: {error}") from error


def judge(
    problem: Problem,
    results: Sequence[Trace | Failure],
    flags: str = "",
    between: bool = False,
    oracle: Oracle | None = None,
) -> tuple[CaseRecord, list[Check]]:
    """Make every comparison of one case, and its record. `flags` are added to the command that repeats the case.

    `between`: comparisons with the oracle do not count, except that two runs of one backend must agree.
    """
    case, picture = problem.case, blank(problem)
    traces = [result for result in results if isinstance(result, Trace) and not result.not_supported]
    checks, beside = list(compare(problem, traces, picture, oracle)), {}
    if between:
        names = {trace.backend.name: trace.backend for trace in traces}
        with_oracle = [check for check in checks if check.right not in names and check.mode != "repeat"]
        beside = {name: blame([c for c in with_oracle if c.left == name], names) for name in names}
        checks = [check for check in checks if check.right in names or check.mode == "repeat"]
    checks += [raised(result) for result in results if isinstance(result, Failure)]
    seconds = {trace.backend.name: trace.seconds for trace in traces}
    seconds |= {failure.backend: 0.0 for failure in results if isinstance(failure, Failure)}
    environment = {trace.backend.name: trace.environment for trace in traces}
    not_supported = {r.backend.name: r.not_supported for r in results if isinstance(r, Trace) and r.not_supported}
    said, sides = command(case) + flags, unreached(problem)
    return CaseRecord(case, said, seconds, environment, picture, not_supported, sides, noted(problem), beside), checks


def noted(problem: Problem) -> list[str]:
    """Remarks on unusual inputs of a case. Every layer is given the same inputs."""
    n, case = problem.chosen_otherwise, problem.case
    if not n:
        return []
    return [
        f"in {n} of {case.ranks * case.tokens} tokens the recorded experts are not those that the recording's router "
        "chooses in float64: near ties, or ids of another layer or step"
    ]


def raised(failure: Failure) -> Check:
    """A failed comparison that stands for an exception or a crash, in a stage on its own or in the layer."""
    alone = failure.stage in STAGES
    stage = failure.stage if alone else STAGES[-1]
    rank = f"rank {failure.rank} " if failure.ranks > 1 else ""
    how = f"raised {failure.error}" if failure.raised else f"{failure.how}: {failure.error}".removesuffix(": ")
    note = f"{rank}{how}" + f" ({failure.line})" * (failure.line != "")
    return Check(
        failure.case, "isolated" if alone else "e2e", stage, MAIN[stage], failure.backend, "oracle", False, False, 0,
        failing=1, worst=math.inf, note=note, raised=True,
    )  # fmt: skip


def make_report(
    head: Header, names: list[str], judged: dict[str, tuple[CaseRecord, list[Check]]], seconds: dict[str, float]
) -> Report:
    """The report of cases in the order asked for. Its footer counts the cases that were never judged."""
    order = [name for name in names if name in judged]
    records = {name: judged[name][0] for name in order}
    checks = {name: judged[name][1] for name in order}
    return Report(head, records, checks, footer(head, records, checks, len(names), seconds))


def progress(show: bool = True) -> Progress:
    """Progress bars on standard error, if that is a terminal. They vanish when done."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
