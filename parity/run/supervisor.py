"""Every process that this project starts is started, watched and ended here; ranks that are forked, in `ranks`.

A command runs in a session of its own, so that all of it can be ended, and ends itself when its standard input closes:
whoever started it is gone. So nothing is left after success, an error, Ctrl-C, or a signal, SIGKILL included.
"""

import math
import multiprocessing
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import msgspec

from parity.cases.case import Case
from parity.run.backend import Backend, BackendError, MissingError, Setting
from parity.run.faults import ROOT
from parity.run.patience import START_UP, TURN, Patience, under

READING, WRITING = "reading its input", "writing its trace"  # where a rank is while no layer runs


class Failure(msgspec.Struct, frozen=True):
    """A case that a backend has no trace of. Only of one that raised is it known that the layer is to blame."""

    backend: str
    case: str  # empty: no case had begun, or all were done
    rank: int
    stage: str
    error: str  # the exception; of a hang, for how long
    ranks: int = 1  # processes; JAX often has all ranks in one
    how: str = "failed"  # it raised an exception; or "was ended by SIGKILL", "hangs", "was not run"
    line: str = ""  # of the source, where that is known: "exchange.py:71"

    @property
    def raised(self) -> bool:
        """Whether the failure is an answer about the layer. A process that was killed, or hangs, gives none."""
        return self.how == "failed" and self.case != "" and self.stage not in (READING, WRITING)

    def __str__(self) -> str:
        rank = f"rank {self.rank} of {self.ranks} " if self.ranks > 1 else ""
        place = f" in {self.stage}" * (self.stage != "")
        place += f" {'of' if self.stage else 'in'} case {self.case}" * (self.case != "")
        line = f" ({self.line})" * (self.line != "")
        return f"{self.backend}: {rank}{self.how}{place}{line}" + f": {self.error}" * (self.error != "")


Answer = tuple[str, Failure | None]  # of a worker, in JSON: a case is done, or why it is not; ("", None): it began


class Process:
    """A command. Leaving the `with` ends it and all that it started, come what may."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.began, self.seconds = time.perf_counter(), 0.0
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, bufsize=0,
            env=environment, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        self.patience = Patience([self.popen.pid], math.inf)
        self.ended = False
        self.error = ""  # why it ended, where that was in error
        self.rest = b""

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def lines(self, limit: float = math.inf) -> Iterator[str]:
        """What it writes, by line, until it ends; or until it had `limit` seconds, not counting waits for a CPU."""
        limited = limit < math.inf  # else there is nothing to do beside what may be a measurement
        while not self.ended:
            if not limited or wait([self.stdout], TURN):
                yield from self.read()
            if limited:
                self.patience.tick()
            if self.patience.seconds > limit:
                self.end()
                self.error = f"stopped after {limit:g} s"

    @property
    def stdout(self) -> Any:
        """The stream to wait for."""
        return self.popen.stdout

    def read(self) -> list[str]:
        """Lines that are there; waits for some. After the last ones it has ended, and `error` says if in error."""
        data = os.read(self.stdout.fileno(), 2**16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if not data:
            lines += [self.rest] * (self.rest != b"")
            if hasattr(os, "waitid"):  # macOS has none. Not waited for to the end: its number stays its own until then
                os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
            else:
                self.popen.wait()
            self.end(by_itself=True)
        return [line.decode(errors="replace") for line in lines]

    def end(self, by_itself: bool = False) -> None:
        """End it and everything it started; if it ended by itself, that."""
        if not self.ended:
            self.ended, self.seconds = True, time.perf_counter() - self.began
            end_all(self.popen.pid)
            if self.popen.wait() and by_itself:
                self.stderr.seek(0)
                said = self.stderr.read().decode(errors="replace").strip()
                self.error = said or how_it_ended(self.popen.returncode)
            for stream in (self.popen.stdin, self.popen.stdout, self.stderr):
                assert stream is not None
                stream.close()


def run(
    folder: Path, homes: Mapping[str, Path], backends: Sequence[Backend], cases: Sequence[Case], setting: Setting,
    seconds: dict[str, float],
) -> Generator[tuple[str, str, Failure | None]]:  # fmt: skip
    """Start every backend, each from its home folder; yield (backend, case, None) as each trace is written.

    Or the reason why there is none. All at once, and JAX, which spends its time compiling, as a process for each core,
    up to eight; but one after the other where a case's weights are so large that only one of them fits a GPU. Whatever
    happens, no process is left. Fills in `seconds` by backend.

    Raises BackendError with the cause when a backend cannot run at all.
    """
    one_by_one = any(case.real_size for case in cases)
    compiling = 1 if one_by_one or setting.jax_ranks == "processes" else min(8, os.cpu_count() or 1, len(cases))
    parts = []
    for backend in backends:
        shares = compiling if backend.framework == "jax" else 1
        parts += [(backend, msgspec.structs.replace(setting, share=share, shares=shares)) for share in range(shares)]
    for group in [[part] for part in parts] if one_by_one else [parts]:
        with ExitStack() as stack:
            workers = [_Worker(stack, folder, homes[backend.name], backend, part) for backend, part in group]
            while not all(worker.process.ended for worker in workers):
                for worker, case, failure in _heard(workers):
                    yield worker.backend.name, case, failure
        for worker in workers:
            name = worker.backend.name
            seconds[name] = max(seconds.get(name, 0), worker.process.seconds)


class Kept:
    """Processes of one backend that run folders of problems one after the other: what they import is imported once.

    Leaving the `with` ends them and all that they started.
    """

    def __init__(self, backend: Backend, setting: Setting, home: Path) -> None:
        self.backend, self.setting, self.home = backend, setting, home
        self.stack, self.workers = ExitStack(), list[_Worker]()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def run(self, folder: Path, cases: Sequence[Case]) -> Iterator[tuple[str, Failure | None]]:
        """Run the problems in the folder; yield (case, None) as each trace is written, or the reason why not.

        Raises BackendError with the cause when the backend cannot run at all, or ends.
        """
        name, left = self.backend.name, {case.name for case in cases}
        alone = self.backend.framework != "jax" or self.setting.jax_ranks == "processes"
        n = 1 if alone else min(8, os.cpu_count() or 1, len(cases))
        for share in range(n):
            part = msgspec.structs.replace(self.setting, share=share, shares=n)
            if share < len(self.workers):
                self.workers[share].more(folder, self.backend, part)
            else:
                self.workers.append(_Worker(self.stack, folder, self.home, self.backend, part, kept=True))
        while left or any(worker.busy for worker in self.workers):
            if all(worker.process.ended for worker in self.workers):
                raise BackendError(name, f"{name}: it ended before it had run {', '.join(sorted(left))}")
            for _, case, failure in _heard(self.workers):
                if failure and not failure.case:
                    raise BackendError(name, str(failure))
                left.discard(case)
                yield case, failure


def _heard(workers: Sequence["_Worker"]) -> Iterator[tuple["_Worker", str, Failure | None]]:
    """The answers of running workers within one turn."""
    running = [worker for worker in workers if not worker.process.ended]
    heard = wait([worker.process.stdout for worker in running], TURN)
    for worker in running:
        for case, failure in worker.answers(heard):
            yield worker, case, failure


def _records(*records: Backend | Setting) -> list[str]:
    return [msgspec.json.encode(record).decode() for record in records]


class _Worker:
    """A process that runs some of the cases of one backend: see `worker`."""

    def __init__(
        self, stack: ExitStack, folder: Path, home: Path, backend: Backend, setting: Setting, kept: bool = False
    ) -> None:
        command = [backend.python or sys.executable, "-m", "parity.run.worker", str(folder)]
        command += [*_records(backend, setting), *["kept"] * kept]
        # Forked ranks must not find a machine's worth of threads each, nor one framework take all of a GPU's memory.
        own = {"JAX_PLATFORMS": setting.device, "OMP_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # Memory in pages of 2 MB, where the C library can: a large case spends its time in being given it. From 4 MB on
        # given back at once: else a process keeps half a GB that it has no use for.
        tunables = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4194304"
        own["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", tunables)
        if backend.framework == "jax" and setting.device == "cpu":
            own["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENT_XLA}".strip()
        if backend.python:
            own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.backend, self.setting, self.began = backend, setting, False
        self.busy = 2  # answers still to come that are of no case: it begins, and, if it is kept, it is done
        self.process = stack.enter_context(Process(command, environment=os.environ | own, cwd=home))

    def more(self, folder: Path, backend: Backend, setting: Setting) -> None:
        """Give another folder to a kept worker that has finished its earlier ones."""
        self.backend, self.setting, self.busy = backend, setting, 2
        assert self.process.popen.stdin
        with suppress(BrokenPipeError):  # it has ended in error: `answers` says so
            self.process.popen.stdin.write(msgspec.json.encode([str(folder), *_records(backend, setting)]) + b"\n")

    def answers(self, heard: Sequence[Any]) -> Iterator[tuple[str, Failure | None]]:
        """The answers that have arrived. Raises BackendError when it has ended in error, or does not even begin."""
        process, name = self.process, self.backend.name
        for line in process.read() if process.stdout in heard else ():
            case, failure = msgspec.json.decode(line, type=Answer)
            self.began = True
            if case:
                yield case, failure
            elif failure:
                raise BackendError(name, str(failure))
            else:
                self.busy -= 1
        if process.error:
            raise self._explain()
        if not self.began and not process.ended:  # after that, the worker watches its ranks itself
            process.patience.tick()
            if process.patience.asleep > self.setting.timeout + START_UP:
                raise BackendError(name, f"{name}: hangs while it is imported, for {process.patience.asleep:.0f} s")

    def _explain(self) -> BackendError:
        name, error = self.backend.name, self.process.error
        missing = re.search(r"No module named '(\w+)", error)
        if self.backend.python and missing:
            needs = " ".join(["numpy", "ml_dtypes", "msgspec", "safetensors", "jaxtyping", *self.backend.needs])
            what = f"{missing[1]} is not installed there: {shlex.quote(self.backend.python)} -m pip install {needs}"
            return MissingError(name, f"{name}: {what}")
        for package in self.backend.needs:
            if f"No module named '{package}'" in error:
                what = f"{package} is not installed: pip install -e '.[{package}]', or name the other --backend only"
                return MissingError(name, what)
        return BackendError(name, f"{name}: {error[-2000:]}")


# XLA ends a process whose ranks wait 40 s for each other, which on a busy machine is no hang. Here it waits a day.
PATIENT_XLA = "--xla_cpu_collective_call_terminate_timeout_seconds=86400 --xla_cpu_collective_timeout_seconds=86400"

_answers = 1  # the file descriptor that a worker answers on


def only_answers() -> None:
    """Keep standard output for answers: what libraries print there goes to standard error."""
    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)


def answer(case: str, failure: Failure | None = None) -> None:
    """A worker's answer: this case's trace is written, or the reason why there is none."""
    os.write(_answers, msgspec.json.encode((case, failure)) + b"\n")


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for functions that return something. They end with this one, and at once on an error."""
    before = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as executor:
        try:
            yield executor
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
            raise


def end_with_parent(tell: Callable[[bytes], object] = bytes) -> None:
    """End this process and all that it started when the one that started it is gone; `tell` what it writes till then.

    That is seen by standard input, which it held open, or as `multiprocessing` sees it. Started by hand, from a
    terminal, a file or nothing, there is nobody to wait for. Its group may then be a shell's: only a session that it
    leads itself ends as a whole.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        try:
            held = stat.S_ISFIFO(os.fstat(0).st_mode)
        except OSError:  # it has none
            held = False
        if not held:
            return
        with suppress(PermissionError):  # it leads one, or a shell's job
            os.setsid()

    def wait_for_the_end() -> None:
        if parent is None:
            while data := os.read(0, 2**16):  # not sys.stdin, whose lock a forked rank would inherit
                tell(data)
        else:
            wait([parent.sentinel])
        end_all(os.getpid())

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def end_all(*pids: int) -> None:
    """Kill these processes and all that they started; this one last."""
    for pid in sorted(under(*pids), key=lambda pid: pid == os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """How a process ended, by its exit code."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def require(packages: Iterable[str], instead: str, trying: bool = False) -> None:
    """Before anything is started. Raises MissingError naming all that are not installed; `instead`: what else to do.

    `trying` imports them too, in processes of their own, where it would be found out late: that takes seconds.
    """
    packages = list(dict.fromkeys(packages))
    why = {package: "is not installed" for package in packages if not _installed(package)}
    if trying:
        there = [package for package in packages if package not in why]
        with ExitStack() as stack:
            tried = {p: stack.enter_context(Process([sys.executable, "-c", f"import {p}"])) for p in there}
            for package, process in tried.items():
                list(process.lines())
                if process.error:
                    why[package] = f"cannot be imported ({process.error.splitlines()[-1]})"
    if why:
        said = ", ".join(f"{package} {reason}: pip install -e '.[{package}]'" for package, reason in why.items())
        raise MissingError(" and ".join(why), f"{said}; {instead}")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def gpus() -> int:
    """How many NVIDIA GPUs programs may use here, without a framework asking, which could keep memory."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([gpu for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")) or list(Path("/dev").glob("dxg")))  # dxg: under WSL
