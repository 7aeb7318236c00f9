"""How ranks are had in PyTorch: processes, forked here or started by torchrun."""

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from parity.oracle.problem import Problem
from parity.run.backend import Backend, Setting
from parity.run.supervisor import DONE
from parity.run.trace import Trace

Arrays = dict[str, np.ndarray]
At = Callable[[str], None]  # notes that a stage begins
Work = Callable[[Problem, Backend, int, torch.device, At], Trace | None]  # one rank's part of a problem

START_UP = 60.0  # seconds more, for ranks to find each other on a machine that is busy


def run_all(backend: Backend, folder: Path, setting: Setting, work: Work) -> None:
    """Run every problem in `folder`, as many processes as each has ranks, and save the traces there."""
    torch.set_num_threads(1)
    own = folder / backend.name  # where ranks meet, and say where they are
    own.mkdir()
    paths = sorted(folder.glob("*.problem"))
    ranks = {path: Problem.load(path).case.ranks for path in paths}
    for P in sorted(set(ranks.values())):
        mine = [path for path in paths if ranks[path] == P]
        # Forked, so that PyTorch is imported once and not once per rank.
        fork = multiprocessing.get_context("fork")
        group = [fork.Process(target=_rank, args=(backend, rank, P, own, mine, setting, work)) for rank in range(P)]
        for process in group:
            process.start()
        _wait_for_all(group, own, setting.timeout)


def _wait_for_all(group: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    """Wait until every rank is done. When one dies or hangs, the others would wait for ever, so all are ended."""
    deadline = time.monotonic() + timeout + START_UP
    last = [""] * len(group)
    while any(process.exitcode is None for process in group):
        wait([process.sentinel for process in group if process.exitcode is None], timeout=0.2)
        now = [_read(folder / f"at-{rank}") for rank in range(len(group))]
        if now != last:
            last, deadline = now, time.monotonic() + timeout
        late = time.monotonic() > deadline
        cause = _cause_of_death(group, folder) or (_cause_of_hang(group, folder, timeout) if late else "")
        if cause:
            time.sleep(0.5)  # ranks that noticed may still be writing why
            cause = _cause_of_death(group, folder) or cause
            for process in group:
                process.kill()
            sys.exit(cause)


def _cause_of_death(group: Sequence[BaseProcess], folder: Path) -> str:
    """What ended the first rank to end in error: a signal, or the earliest exception; empty while all is well."""
    failed = {rank: process.exitcode for rank, process in enumerate(group) if process.exitcode not in (0, None)}
    for rank, code in failed.items():
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"rank {rank} of {len(group)} was ended by {name} in {_steps_and_place(folder, rank)[1]}"
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if failed and errors:
        return f"rank {errors[0].name.removeprefix('error-')} of {len(group)} failed in {errors[0].read_text()}"
    return f"rank {min(failed)} of {len(group)} ended with exit code {failed[min(failed)]}" if failed else ""


def _cause_of_hang(group: Sequence[BaseProcess], folder: Path, timeout: float) -> str:
    """Which rank the others wait for, and where it is: the furthest behind that is not itself in an exchange."""
    for process in group:
        if process.exitcode is None and process.pid:
            os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes its stack
    time.sleep(0.5)
    at = [_steps_and_place(folder, rank) for rank in range(len(group))]
    stacks = [re.findall(r'File "(.*)", line (\d+) in', _read(folder / f"stack-{rank}")) for rank in range(len(group))]
    waits = [any("torch/distributed/" in file for file, _ in stack) for stack in stacks]
    behind = min(range(len(group)), key=lambda rank: (at[rank][0], waits[rank]))
    line = next((f" ({Path(file).name}:{line})" for file, line in stacks[behind] if "_impl/" in file), "")
    others = sorted({place for rank, (_, place) in enumerate(at) if rank != behind})
    waiting = f"; the others are in {', '.join(others)}" if others else ""
    return f"rank {behind} of {len(group)} hangs in {at[behind][1]}{line}: no rank got on for {timeout:.0f} s{waiting}"


def _steps_and_place(folder: Path, rank: int) -> tuple[int, str]:
    """How many stages the rank has begun, and the last of them."""
    steps, _, place = _read(folder / f"at-{rank}").partition(" ")
    return (int(steps), place) if place else (0, "its start")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _rank(backend: Backend, rank: int, P: int, folder: Path, paths: list[Path], setting: Setting, work: Work) -> None:
    progress = Progress(folder / f"at-{rank}")
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        if P > 1:
            rendezvous = f"file://{folder.resolve()}/rendezvous-{P}"
            # Longer than the launcher's patience: it, not a rank that waits, should say who hangs.
            patience = timedelta(seconds=10 * setting.timeout)
            dist.init_process_group(
                collectives(setting.device, P), init_method=rendezvous, rank=rank, world_size=P, timeout=patience
            )
        device = device_of(setting.device, rank)
        problems = (Problem.load(path) for path in paths)
        _run_each(backend, folder.parent, problems, rank, device, _say_done, progress, work)
        if P > 1:
            dist.destroy_process_group()
    except BaseException as error:
        reason = f"{progress.place}: {type(error).__name__}: {error}"
        (folder / f"error-{rank}").write_text(reason)
        sys.exit(1)


@dataclass
class Progress:
    """Where a rank is, written down for whoever has to explain its death."""

    path: Path | None = None
    steps: int = 0
    place: str = "its start"

    def at(self, case: str, stage: str) -> None:
        """Note that a stage begins."""
        self.steps, self.place = self.steps + 1, f"{stage} of case {case}"
        if self.path:
            self.path.write_text(f"{self.steps} {self.place}")


def _say_done(case: str) -> None:
    print(DONE + case, flush=True)


def collectives(on: str, P: int) -> str:
    """NCCL where every rank has a GPU of its own. gloo where they share one, or a CPU: NCCL takes one rank a GPU."""
    return "cpu:gloo,cuda:nccl" if on == "cuda" and torch.cuda.device_count() >= P else "gloo"


def device_of(on: str, rank: int) -> torch.device:
    """The rank's device; GPUs are shared out in turn."""
    if on == "cpu":
        return torch.device("cpu")
    # Sums of bfloat16 products are float32 in this layer: so must be those that a matmul splits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _run_each(
    backend: Backend, folder: Path, problems: Iterable[Problem], rank: int, device: torch.device,
    case_done: Callable[[str], None], progress: Progress, work: Work,
) -> None:  # fmt: skip
    for problem in problems:
        start = time.perf_counter()
        trace = work(problem, backend, rank, device, partial(progress.at, problem.case.name))
        if trace is not None:
            trace.seconds = time.perf_counter() - start
            trace.save(folder)
            case_done(trace.case.name)


def join_torchrun(folder: Path, problems: list[Problem], on: str, backends: Iterable[Backend], work: Work) -> int:
    """Run problems in the group that torchrun gave; rank 0 saves the traces. This process's rank."""
    torch.set_num_threads(1)
    device = device_of(on, int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(collectives(on, int(os.environ["WORLD_SIZE"])))
    rank = dist.get_rank()
    for backend in backends:
        _run_each(backend, folder, problems, rank, device, lambda _: None, Progress(), work)
    dist.destroy_process_group()
    return rank


def gathered(mine: Arrays, P: int, rank: int) -> list[Arrays]:
    """Every rank's arrays, on rank 0."""
    if P == 1:
        return [mine]
    everybody: list[Arrays | None] = [None] * P
    dist.gather_object(mine, everybody if rank == 0 else None, dst=0)
    return [arrays for arrays in everybody if arrays is not None]


def all_sum(a: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as data-parallel training does for a replicated parameter."""
    if dist.is_initialized():
        dist.all_reduce(a)
    return a
