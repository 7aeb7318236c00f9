"""Case -> Trace in PyTorch: one process per rank."""

import faulthandler
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

from parity import reference
from parity.backends import DONE, end_with_parent
from parity.case import Case
from parity.inputs import Problem
from parity.rows import indices, lay_out, row_tables
from parity.trace import Trace, differing_bits
from parity.windows import STRIDE, Windows
from torch_impl import exchange, experts, grouping, layer, layout, routing

Arrays = dict[str, np.ndarray]
START_UP = 60.0  # seconds more, for ranks to find each other on a machine that is busy


def main(folder: Path, timeout: float, on: str) -> None:
    """Run every problem in `folder`, as many processes as each has ranks, and save the traces there."""
    torch.set_num_threads(1)
    paths = sorted(folder.glob("*.problem"))
    ranks = {path: Problem.load(path).case.ranks for path in paths}
    for P in sorted(set(ranks.values())):
        mine = [path for path in paths if ranks[path] == P]
        # Forked, so that PyTorch is imported once and not once per rank.
        fork = multiprocessing.get_context("fork")
        group = [fork.Process(target=_rank, args=(rank, P, folder, mine, timeout, on)) for rank in range(P)]
        for process in group:
            process.start()
        _wait_for_all(group, folder, timeout)


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


def _rank(rank: int, P: int, folder: Path, paths: list[Path], timeout: float, on: str) -> None:
    progress = Progress(folder / f"at-{rank}")
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        if P > 1:
            rendezvous = f"file://{folder.resolve()}/rendezvous-{P}"
            # Longer than the launcher's patience: it, not a rank that waits, should say who hangs.
            patience = timedelta(seconds=10 * timeout)
            backend = collectives(on, P)
            dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=P, timeout=patience)
        device = device_of(on, rank)
        _run_all(folder, (Problem.load(path) for path in paths), rank, device, _say_done, progress)
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


def _run_all(
    folder: Path, problems: Iterable[Problem], rank: int, device: torch.device, case_done: Callable[[str], None],
    progress: Progress,
) -> None:  # fmt: skip
    for problem in problems:
        start = time.perf_counter()
        trace = run(problem, rank, device, progress)
        if trace is not None:
            trace.seconds = time.perf_counter() - start
            trace.save(folder)
            case_done(trace.case.name)


def join_torchrun(folder: Path, problems: list[Problem], on: str) -> int:
    """Run problems in the group that torchrun gave; rank 0 saves the traces. This process's rank."""
    torch.set_num_threads(1)
    device = device_of(on, int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(collectives(on, int(os.environ["WORLD_SIZE"])))
    rank = dist.get_rank()
    _run_all(folder, problems, rank, device, lambda _: None, Progress())
    dist.destroy_process_group()
    return rank


def run(problem: Problem, rank: int, device: torch.device, progress: Progress) -> Trace | None:
    """This rank's part of a problem; rank 0 gets everybody's and returns the trace.

    The layer runs on these inputs, on others, and on these again, with fresh memory full of NaN: what it keeps from a
    step, or reads before writing, shows as a difference between the first run and the last.
    """

    def at(stage: str) -> None:
        progress.at(problem.case.name, stage)

    with poisoned_memory():
        mine = _isolated(problem, rank, device, at)
    at("the first step")
    first = _end_to_end(problem, rank, device, waits := HostWaits(device))
    at("steps on other inputs")
    for other in problem.steps_between():
        _end_to_end(other, rank, device, HostWaits(device))
    at("the first step, repeated")
    with poisoned_memory():
        again = _end_to_end(problem, rank, device, HostWaits(device))
    mine |= again | {name.replace("e2e", "repeat", 1): differing_bits(a, again[name]) for name, a in first.items()}
    at("gathering")
    everybody: list[Arrays] = [mine]
    if problem.case.ranks > 1:
        gathered: list[Arrays | None] = [None] * problem.case.ranks
        dist.gather_object(mine, gathered if rank == 0 else None, dst=0)
        everybody = [arrays for arrays in gathered if arrays is not None]
    if rank:
        return None
    trace = Trace(problem.case, "torch", "dynamic", environment(device) | waits.found())
    trace.arrays = {name: [arrays[name] for arrays in everybody] for name in mine}
    return trace


@dataclass
class HostWaits:
    """How often one forward and backward pass made the host wait for the GPU, as PyTorch's own debug mode has it."""

    device: torch.device
    count: int = 0

    def found(self) -> dict[str, str]:
        """For the report; a CPU has nothing to wait for."""
        return {"host waits": f"{self.count} a step"} if self.device.type == "cuda" else {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count those of this block."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.count += sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, as PyTorch's deterministic mode fills them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    torch.use_deterministic_algorithms(before)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and devices, for the report."""
    about = {"torch": str(torch.__version__), "python": platform.python_version(), "platform": platform.platform()}
    if dist.is_initialized():
        about["collectives"] = dist.get_backend_config()
    if device.type == "cuda":
        about["devices"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return about


def _isolated(problem: Problem, rank: int, device: torch.device, at: Callable[[str], None]) -> Arrays:
    """Every stage fed the oracle's input, forward and backward."""
    case, out = problem.case, {}
    e = case.experts // case.ranks
    mine = slice(rank * e, (rank + 1) * e)
    table = row_tables(case, problem.expert_id, problem.keep, "dynamic")
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, "dynamic")
    received_Pe = reference.received(case, sent_PE)[rank]

    def put(a: np.ndarray, *, grad: bool = False) -> torch.Tensor:
        return to_torch(a).to(device).requires_grad_(grad)

    def rows(values: np.ndarray, where: str, *, grad: bool = False) -> torch.Tensor:
        values = values.reshape(-1, case.width)
        return put(lay_out(values, table[where], np.nan)[rank], grad=grad)

    def stage(name: str, values: Mapping[str, object]) -> None:
        out.update({f"isolated/{name}/{key}": to_numpy(value) for key, value in values.items()})

    def vjp(f: Callable, inputs: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> tuple:
        result = f(*inputs)
        return result.detach(), *torch.autograd.grad(result, inputs, cotangent)

    ids, keep = put(problem.expert_id[rank]), put(problem.keep[rank])
    x_rows = np.repeat(problem.x.reshape(-1, case.width), case.top_k, axis=0)

    at("route")
    x, router = put(problem.x[rank], grad=True), put(problem.router, grad=True)
    how = (case.top_k, case.score_function, case.renormalize, case.scale)
    own = routing.route(x, router, *how)
    replayed = routing.route(x, router, *how, expert_id_TK=ids)
    dx, drouter = torch.autograd.grad(replayed.score_TK, (x, router), put(problem.dscore[rank]))
    stage(
        "route",
        {"expert_id": own.expert_id_TK, "score": replayed.score_TK, "dx": dx, "drouter": all_sum(drouter)},
    )
    counts = replayed.counts_E
    stage("route", {"counts": counts})

    at("group_by_expert")
    grouped = grouping.group_by_expert(x, ids, put(sent_PE[rank]))
    (dx,) = torch.autograd.grad(grouped.x_ND, x, rows(problem.dx_rows, "grouped"), retain_graph=True)
    stage("group_by_expert", {"x": grouped.x_ND, "dx": dx})

    at("exchange_counts")
    stage("exchange_counts", {"counts": exchange.exchange_counts(put(sent_PE[rank]))[0]})
    index = {name: put(a) for name, a in indices(case, table, rank).items()}
    counts_Pe = put(received_Pe)
    send_P, receive_P = (torch.from_numpy(a.reshape(case.ranks, -1).sum(axis=1)) for a in (sent_PE[rank], received_Pe))
    splits = exchange.Splits(send_P, receive_P, int(send_P.sum()), int(receive_P.sum()))

    at("send_tokens")
    x_sent, dx_received = rows(x_rows, "grouped", grad=True), rows(problem.dx_rows, "received")
    result = vjp(lambda x: exchange.send_tokens(x, splits), (x_sent,), dx_received)
    stage("send_tokens", dict(zip(("x", "dx"), result, strict=True)))

    at("to_expert_major")
    x_received, dx_expert_major = rows(x_rows, "received", grad=True), rows(problem.dx_rows, "expert_major")
    major = layout.to_expert_major(x_received, counts_Pe, splits.total)
    (dx,) = torch.autograd.grad(major.x_RD, x_received, dx_expert_major)
    stage("to_expert_major", {"x": major.x_RD, "dx": dx})

    at("apply_experts")
    weights = tuple(weights_of(w, mine, device) for w in problem.weights)
    result = vjp(
        lambda x, *w: experts.apply_experts(x, counts_Pe.sum(0), *w),
        (rows(x_rows, "expert_major", grad=True), *weights),
        rows(problem.dy, "expert_major"),
    )
    y, dx, *dw = result
    stage("apply_experts", {"y": y, "dx": dx} | compared(case, dw))
    del weights, result, dw

    at("to_rank_major")
    y, dy = rows(problem.y, "expert_major", grad=True), rows(problem.dy, "received")
    result = vjp(lambda y: layout.to_rank_major(y, index["source"], index["target"]), (y,), dy)
    stage("to_rank_major", dict(zip(("y", "dy"), result, strict=True)))

    at("return_tokens")
    y, dy = rows(problem.y, "received", grad=True), rows(problem.dy, "grouped")
    result = vjp(lambda y: exchange.return_tokens(y, splits), (y,), dy)
    stage("return_tokens", dict(zip(("y", "dy"), result, strict=True)))

    at("combine")
    result = vjp(
        lambda y, score: grouping.combine(y, score * keep, index["slot"], index["assignment"]),
        (rows(problem.y, "grouped", grad=True), put(problem.score[rank], grad=True)),
        put(problem.dout[rank]),
    )
    stage("combine", dict(zip(("out", "dy", "dscore"), result, strict=True)))

    if case.top_k >= 3:
        probe = rows(problem.order_probe()[0], "grouped")
        weight = put(problem.keep[rank].astype(case.wide))
        order = grouping.combine(probe, weight, index["slot"], index["assignment"])
        stage("combine", {"order": order})
        probe = probe * put(problem.keep[rank]).reshape(-1)[index["assignment"], None]
        stage("group_by_expert", {"dx_order": torch.autograd.grad(grouped.x_ND, x, probe)[0]})
    return out


def _end_to_end(problem: Problem, rank: int, device: torch.device, waits: HostWaits) -> Arrays:
    """The whole layer and its gradients, with the oracle's expert ids; what a capacity drops has its score masked."""
    case = problem.case
    e = case.experts // case.ranks
    x, router = (to_torch(a).to(device).requires_grad_() for a in (problem.x[rank], problem.router))
    weights = [weights_of(w, slice(rank * e, (rank + 1) * e), device) for w in problem.weights]
    ids, keep = to_torch(problem.expert_id[rank]).to(device), to_torch(problem.keep[rank]).to(device)
    dout, how = to_torch(problem.dout[rank]).to(device), (case.score_function, case.renormalize, case.scale)
    with waits.counted():
        chosen = routing.route(x, router, case.top_k, *how, expert_id_TK=ids)
        masked = chosen._replace(score_TK=chosen.score_TK * keep)
        stages = layer.moe_layer(x, router, *weights, top_k=case.top_k, routing=masked)
        dx, dscore, drouter, *dw = torch.autograd.grad(stages.out_TD, (x, chosen.score_TK, router, *weights), dout)
    values = {
        "route/score": chosen.score_TK,
        "group_by_expert/x": stages.grouped.x_ND,
        "exchange_counts/counts": stages.counts_Pe,
        "send_tokens/x": stages.received_RD,
        "to_expert_major/x": stages.expert_major.x_RD,
        "apply_experts/y": stages.y_RD,
        "to_rank_major/y": stages.rank_major_RD,
        "return_tokens/y": stages.returned_ND,
        "combine/out": stages.out_TD,
        "combine/dscore": dscore,
        **{f"apply_experts/{name}": a for name, a in compared(case, dw).items()},
        "route/drouter": all_sum(drouter),
        "route/dx": dx,
    }
    return {f"e2e/{name}": to_numpy(value) for name, value in values.items()}


def weights_of(w: np.ndarray | Windows, mine: slice, device: torch.device) -> torch.Tensor:
    """The weights of a rank's experts, to differentiate by."""
    if isinstance(w, np.ndarray):
        return to_torch(w[mine]).to(device).requires_grad_()
    bank, (_, rows, columns) = to_torch(w.bank).to(device), w.shape
    size, strides = (mine.stop - mine.start, rows, columns), (STRIDE, columns, 1)
    return bank.as_strided(size, strides, (w.first + mine.start) * STRIDE).clone().requires_grad_()


def compared(case: Case, dw: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the weights' gradients, the rows that are compared."""
    names = ("dw_gate", "dw_up", "dw_down")
    return {name: a[:, case.compared_rows(a.shape[1])] for name, a in zip(names, dw, strict=True)}


def all_sum(a: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as data-parallel training does for a replicated parameter."""
    if dist.is_initialized():
        dist.all_reduce(a)
    return a


def to_torch(a: np.ndarray) -> torch.Tensor:
    """A tensor with the array's bits."""
    is_bfloat16 = a.dtype == ml_dtypes.bfloat16
    source = torch.from_numpy(np.array(a.view(np.int16) if is_bfloat16 else a))
    # copy_, because an empty NumPy array brings strides of zero, which grouped_mm refuses
    tensor = torch.empty(source.shape, dtype=source.dtype).copy_(source)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def to_numpy(a: object) -> np.ndarray:
    """An array with the tensor's bits."""
    assert isinstance(a, torch.Tensor)
    a = a.detach().cpu().contiguous()
    return a.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if a.dtype == torch.bfloat16 else a.numpy()


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
