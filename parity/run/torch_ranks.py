"""How PyTorch runs ranks: as processes, forked here or started by torchrun."""

import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from parity.oracle.problem import Problem
from parity.run.backend import Backend, Setting, resolve
from parity.run.ranks import Notes, run_cases
from parity.run.supervisor import READING, WRITING
from parity.run.trace import Trace

Arrays = dict[str, np.ndarray]
At = Callable[[str], None]  # notes that a stage begins
Work = Callable[[Problem, Backend, int, torch.device, At], Trace | None]  # one rank's part of a problem

WAIT = timedelta(days=1)  # of waiting for another rank: the supervisor, not a waiting rank, should say who hangs


def run_all(backend: Backend, folder: Path, setting: Setting, work: Work) -> None:
    """Run every problem in `folder`, as many processes as each has ranks, and save the traces there."""
    torch.set_num_threads(1)
    by_size: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*.problem")):
        case = Problem.load(path).case
        by_size.setdefault(case.processes, []).append(path)
        # The first compilation's imports run once, before ranks are forked. With a GPU they would begin to use it.
        if case.way == "compiled" and setting.device == "cpu":
            for module in ("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.pattern_matcher"):
                import_module(module)
    for P, paths in sorted(by_size.items()):
        run_cases(backend, folder, paths, P, setting.timeout, partial(_rank, backend, P, setting, work))


def _rank(
    backend: Backend, P: int, setting: Setting, work: Work, rank: int, notes: Notes, own: Path, paths: list[Path]
) -> None:
    if P > 1:
        meet = f"file://{own.resolve()}/rendezvous"
        dist.init_process_group(collectives(setting.device, P), init_method=meet, rank=rank, world_size=P, timeout=WAIT)
        dist.all_reduce(torch.zeros(()))  # a rank with nothing to exchange would end while others still connect to it
    device = device_of(setting.device, rank)
    for path in paths:
        notes.at(path.stem, READING)
        _run(backend, own.parent, Problem.load(path), rank, device, notes, work)
    notes.at("", "shutdown")
    if P > 1:
        dist.destroy_process_group()


def _run(
    backend: Backend, folder: Path, problem: Problem, rank: int, device: torch.device, notes: Notes, work: Work
) -> None:
    start, case = time.perf_counter(), problem.case.name
    trace = work(problem, backend, rank, device, partial(notes.at, case))
    if trace is not None:
        trace.seconds = time.perf_counter() - start
        notes.at(case, WRITING)
        trace.save(folder)
        notes.done(case)


def alone(device: torch.device) -> None:
    """A process group of one rank, for a layer that asks for its group where none was started."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(collectives(device.type, 1), store=store, rank=0, world_size=1)


def collectives(on: str, P: int) -> str:
    """NCCL where every rank has a GPU of its own. gloo where they share one, or a CPU: NCCL takes one rank a GPU."""
    return "cpu:gloo,cuda:nccl" if on == "cuda" and torch.cuda.device_count() >= P else "gloo"


def device_of(on: str, rank: int) -> torch.device:
    """The rank's device. GPUs are assigned round-robin."""
    if on == "cpu":
        return torch.device("cpu")
    # Sums of bfloat16 products are float32 in this layer. This must also hold for sums that a matmul splits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # For memory that ranks share: several of them on one GPU are meant, and nothing here uses multicast.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(folder: Path, problems: list[Problem], setting: Setting, backends: Iterable[Backend]) -> int:
    """Run problems in the group that torchrun gave; rank 0 saves the traces. This process's rank."""
    torch.set_num_threads(1)
    device = device_of(setting.device, int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(collectives(setting.device, int(os.environ["WORLD_SIZE"])))
    rank = dist.get_rank()
    for backend in backends:
        work: Work = resolve(backend.run.replace(":run_all", ":work"))(backend, setting)
        for problem in problems:
            _run(backend, folder, problem, rank, device, Notes(), work)
    dist.destroy_process_group()
    return rank


def gathered(mine: Arrays, P: int, rank: int) -> list[Arrays]:
    """Every rank's arrays, on rank 0."""
    if P == 1:
        return [mine]
    everybody: list[Arrays | None] = [None] * P
    dist.gather_object(mine, everybody if rank == 0 else None, dst=0)
    return [arrays for arrays in everybody if arrays is not None]


@cache
def my_group(groups: int, rank: int) -> tuple[int, dist.ProcessGroup | None]:
    """This process's rank in its group, and the group: one of several that share the world, or None for all of it.

    Ranks of a group are not neighbours in the world, so that a rank of the world is none of the group.
    """
    if groups == 1:
        return rank, None
    world = range(dist.get_world_size())
    made = [dist.new_group(list(world[g::groups])) for g in range(groups)]  # every process takes part in making each
    return rank // groups, made[rank % groups]  # type: ignore[return-value]  a group of which this is no member is an int


def all_sum(a: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over ranks of the group, as data-parallel training does for a replicated parameter."""
    if dist.is_initialized():
        # A copy, because a gradient may share memory with another. It is float32, in which ranks sum 16-bit gradients.
        total = a.to(torch.promote_types(a.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        a = total.to(a.dtype)
    return a
