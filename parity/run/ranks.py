"""Ranks as processes: start them, watch them, say why one failed, end all. Independent of any framework."""

import faulthandler
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from parity.oracle.quantities import STAGES
from parity.run.backend import Backend
from parity.run.patience import TURN, Patience
from parity.run.supervisor import Failure, answer, end_all, end_with_parent, how_it_ended

Rank = Callable[[int, "Notes", Path, list[Path]], None]  # rank, what it notes, the group's own folder, its problems

HANGS = 2  # hangs and deaths before the other cases are given up: each may cost a whole timeout


def run_cases(backend: Backend, folder: Path, paths: Sequence[Path], n: int, timeout: float, rank: Rank) -> None:
    """Run problems in `n` ranks forked from this process, and answer for each.

    A rank that fails ends its case only: new ranks run those that are left. So it is with one that dies or hangs, but
    the second of those ends the run, and what is left is answered for as not run. Each group has a folder of its own.
    """
    left = {path.stem: path for path in paths}
    given_up = 0
    while left:
        own = Path(tempfile.mkdtemp(prefix=f"{backend.name}-", dir=folder))

        def tell(done: Path = own / "done") -> None:
            for name in _read(done).split("\n")[:-1]:
                if left.pop(name, None):
                    answer(name)

        failure = run_group(backend.name, own, n, rank, (own, list(left.values())), timeout, tell=tell)
        if failure is None and left:
            failure = Failure(backend.name, "", 0, "shutdown", f"it gave no answer for {', '.join(left)}", n)
        if failure is None:
            return
        if failure.case not in left:  # nothing to try again: whoever asked ends it all
            answer("", msgspec.structs.replace(failure, case=""))
            return
        answer(failure.case, failure)
        del left[failure.case]
        given_up += not failure.raised
        if given_up == HANGS:
            for name in left:
                why = f"{given_up} cases before it died or hung"
                answer(name, Failure(backend.name, name, 0, "", why, how="was not run"))
            return


def run_group(
    name: str, folder: Path, n: int, work: Callable[..., None], arguments: tuple, timeout: float,
    *, method: str = "fork", running: float | None = None, tell: Callable[[], None] = lambda: None,
) -> Failure | None:  # fmt: skip
    """`work(rank, notes, *arguments)` in `n` processes of this one; why the first failed, if one did.

    When one dies or hangs (see `patience`) the others would wait for ever, so all are ended. `tell` is called now and
    then, and at the end. Forked, what this process has imported need not be imported once per rank.
    """
    context: Any = multiprocessing.get_context(method)
    group = [context.Process(target=_as_rank, args=(rank, folder, work, arguments)) for rank in range(n)]
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by ranks too, until they can say where they are
    try:
        for process in group:
            process.start()
        return _watch(_Group(name, group, folder), Patience([p.pid for p in group], timeout, running), tell)
    finally:
        end_all(*(process.pid for process in group if process.pid and process.exitcode is None))
        for process in group:
            if process.pid:
                process.join()
        tell()
        signal.signal(signal.SIGUSR1, ignored)


def _watch(group: "_Group", patience: Patience, tell: Callable[[], None]) -> Failure | None:
    last = group.steps()
    while group.running():
        wait([process.sentinel for process in group.running()], timeout=TURN)
        tell()
        failure = group.failure()
        if not failure:
            now = group.steps()
            patience.tick()
            if now != last:
                last = now
                patience.step()
            elif why := patience.over():
                failure = group.hang(why)
                if group.steps() != last:  # it did get on, after all
                    failure = None
        if failure:
            group.settle()
            return group.failure() or failure
    return group.failure()


@dataclass
class _Group:
    """Some ranks, and what they say of themselves in a folder."""

    name: str
    processes: list[BaseProcess]
    folder: Path

    def running(self) -> list[BaseProcess]:
        return [process for process in self.processes if process.exitcode is None]

    def settle(self) -> None:
        """Wait until ranks had half a second of their own: those that saw the failure may still be writing it down."""
        pids = [process.pid for process in self.running() if process.pid]
        patience = Patience(pids, math.inf)
        while patience.seconds < 0.5 and self.running():
            time.sleep(0.1)
            patience.tick()

    def steps(self) -> list[tuple[int, int | None]]:
        """How many steps each rank has made. Its end counts as one more step."""
        return [(self.note(rank).steps, process.exitcode) for rank, process in enumerate(self.processes)]

    def note(self, rank: int) -> "_Note":
        text = _read(self.folder / f"at-{rank}")
        return msgspec.json.decode(text, type=_Note) if text else _Note()

    def failure(self) -> Failure | None:
        """What ended the first rank to end in error: a signal, or the earliest exception; None while all is well.

        A rank that is killed makes the others raise; one that raises may make the others' libraries abort.
        """
        codes = {rank: p.exitcode for rank, p in enumerate(self.processes) if p.exitcode not in (0, None)}
        signals = {rank: code for rank, code in codes.items() if code is not None and code < 0}
        killed = [rank for rank, code in signals.items() if code != -signal.SIGABRT]
        raised = [msgspec.json.decode(path.read_bytes(), type=_Raised) for path in self.folder.glob("error-*.json")]
        if raised and not killed:
            first = min(raised, key=lambda error: error.when)
            also = "".join(f"; rank {rank} {how_it_ended(code)}" for rank, code in signals.items())
            return self.failed(first.rank, first.note, first.error + also, line=first.line)
        dead = killed or list(signals) or list(codes)
        if not dead:
            return None
        return self.failed(dead[0], self.note(dead[0]), "", how=how_it_ended(codes[dead[0]] or 0))

    def hang(self, why: str) -> Failure:
        """Which rank the others wait for, and where it is: the furthest behind that is not itself in an exchange."""
        n = len(self.processes)
        for process in self.running():
            os.kill(process.pid or 0, signal.SIGUSR1)  # faulthandler writes its stack
        self.settle()
        stacks = [_frames(_read(self.folder / f"stack-{rank}")) for rank in range(n)]
        at = [self.note(rank).inside(name for _, _, name in reversed(stack)) for rank, stack in enumerate(stacks)]
        behind = min(range(n), key=lambda rank: (at[rank].steps, _waits(stacks[rank])))
        others = sorted({note.place for rank, note in enumerate(at) if rank != behind})
        why += f"; the other ranks are in {', '.join(others)}" if others else ""
        return self.failed(behind, at[behind], why, how="hangs", line=_line(stacks[behind]))

    def failed(self, rank: int, note: "_Note", error: str, *, how: str = "failed", line: str = "") -> Failure:
        return Failure(self.name, note.case, rank, note.stage, error, len(self.processes), how, line)


class _Note(msgspec.Struct):
    """Where a rank is in its work."""

    steps: int = 0
    case: str = ""
    stage: str = "start-up"

    @property
    def place(self) -> str:
        return self.stage + f" of case {self.case}" * (self.case != "")

    def inside(self, functions: Iterable[str]) -> "_Note":
        """Where it is more exactly: the innermost function that is a stage's, of those that are running."""
        inner = [name for name in functions if name in STAGES][-1:]
        return _Note(self.steps, self.case, inner[0]) if inner else self


class _Raised(msgspec.Struct):
    """An exception that ended a rank."""

    rank: int
    when: int
    note: _Note
    error: str
    line: str = ""


class Notes:
    """What a rank writes down: where it is, what is done, and why it failed. Without a folder, nobody reads it."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.folder, self.rank, self.note = folder, rank, _Note()
        self.file = os.open(folder / f"at-{rank}", os.O_WRONLY | os.O_CREAT, 0o644) if folder else None

    def at(self, case: str, stage: str) -> None:
        """Note that a stage begins. Without a case, it is the process's start or end."""
        self.note = _Note(self.note.steps + 1, case, stage)
        if self.file is not None:  # in one call: whoever reads must never see a part. Padded over what was there
            os.pwrite(self.file, msgspec.json.encode(self.note).ljust(1000), 0)

    def done(self, case: str) -> None:
        """Note that the case's trace is written."""
        if self.folder:
            with (self.folder / "done").open("a") as file:
                file.write(f"{case}\n")

    def failed(self, error: BaseException) -> None:
        """Note the exception that ended the rank."""
        assert self.folder
        frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)]
        note = self.note.inside(name for _, _, name in frames)
        said = f"{type(error).__name__}: {error}"[:2000]
        raised = _Raised(self.rank, time.monotonic_ns(), note, said, _raised_at(frames[::-1]))
        (whole := self.folder / f"error-{self.rank}").write_bytes(msgspec.json.encode(raised))
        whole.rename(whole.with_suffix(".json"))


def _as_rank(rank: int, folder: Path, work: Callable[..., None], arguments: tuple) -> None:
    end_with_parent()
    faulthandler.register(signal.SIGUSR1, (folder / f"stack-{rank}").open("w"))
    notes = Notes(folder, rank)
    try:
        work(rank, notes, *arguments)
        notes.at("", "shutdown")
    except BaseException as error:
        notes.failed(error)
        sys.exit(1)


Frame = tuple[str, int, str]  # file, line, function


def _frames(stack: str) -> list[Frame]:
    """Of what faulthandler wrote, innermost first; of the thread that the process began with, then of the others."""
    threads = re.split(r"\n(?=Thread |Current thread )", stack)
    threads.sort(key=lambda thread: not thread.startswith("Current"))
    found = re.findall(r'File "(.*)", line (\d+) in (.*)', "\n".join(threads))
    return [(file, int(line), name) for file, line, name in found]


def _waits(stack: Sequence[Frame]) -> bool:
    """Whether a rank is in an exchange, as far as its stack tells: it may wait for others."""
    return any("torch/distributed/" in file for file, _, _ in stack) or any("/jax/" in file for file, _, _ in stack[:1])


def _line(stack: Sequence[Frame]) -> str:
    """The innermost line that is neither of a library nor of this harness, as "exchange.py:71"."""
    theirs = ("site-packages", "dist-packages", "/lib/python3", "<", "parity/run/", "multiprocessing/")
    return next((f"{Path(file).name}:{line}" for file, line, _ in stack if not any(t in file for t in theirs)), "")


def _raised_at(stack: Sequence[Frame]) -> str:
    """That line of an exception. If all are a library's or the harness's: the innermost of a library, or of all."""
    of_files = [frame for frame in stack if not frame[0].startswith("<")]
    of_library = [frame for frame in of_files if "parity/run/" not in frame[0]]
    innermost = [f"{Path(file).name}:{line}" for file, line, _ in of_library or of_files]
    return _line(stack) or next(iter(innermost), "")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
