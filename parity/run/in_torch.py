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
from torch import Tensor

from parity.cases.case import Case
from parity.oracle import reference
from parity.oracle.problem import Problem
from parity.oracle.rows import Strategy, indices, lay_out, row_tables
from parity.oracle.windows import STRIDE, Windows
from parity.run.backend import DONE, end_with_parent
from parity.run.trace import Trace, differing_bits
from torch_impl import exchange, experts, grouping, layer, layout, routing, static
from torch_impl.static import exchange as static_exchange
from torch_impl.static import experts as static_experts
from torch_impl.static import grouping as static_grouping
from torch_impl.static import layout as static_layout

Arrays = dict[str, np.ndarray]
START_UP = 60.0  # seconds more, for ranks to find each other on a machine that is busy


def main(backend: str, folder: Path, timeout: float, on: str) -> None:
    """Run every problem in `folder`, as many processes as each has ranks, and save the traces there."""
    torch.set_num_threads(1)
    own = folder / backend  # where ranks meet, and say where they are
    own.mkdir()
    paths = sorted(folder.glob("*.problem"))
    ranks = {path: Problem.load(path).case.ranks for path in paths}
    for P in sorted(set(ranks.values())):
        mine = [path for path in paths if ranks[path] == P]
        # Forked, so that PyTorch is imported once and not once per rank.
        fork = multiprocessing.get_context("fork")
        group = [fork.Process(target=_rank, args=(backend, rank, P, own, mine, timeout, on)) for rank in range(P)]
        for process in group:
            process.start()
        _wait_for_all(group, own, timeout)


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


def _rank(backend: str, rank: int, P: int, folder: Path, paths: list[Path], timeout: float, on: str) -> None:
    progress = Progress(folder / f"at-{rank}")
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        if P > 1:
            rendezvous = f"file://{folder.resolve()}/rendezvous-{P}"
            # Longer than the launcher's patience: it, not a rank that waits, should say who hangs.
            patience = timedelta(seconds=10 * timeout)
            dist.init_process_group(
                collectives(on, P), init_method=rendezvous, rank=rank, world_size=P, timeout=patience
            )
        device = device_of(on, rank)
        _run_all(backend, folder.parent, (Problem.load(path) for path in paths), rank, device, _say_done, progress)
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
    backend: str, folder: Path, problems: Iterable[Problem], rank: int, device: torch.device,
    case_done: Callable[[str], None], progress: Progress,
) -> None:  # fmt: skip
    for problem in problems:
        start = time.perf_counter()
        trace = run(problem, backend, rank, device, progress)
        if trace is not None:
            trace.seconds = time.perf_counter() - start
            trace.save(folder)
            case_done(trace.case.name)


def join_torchrun(folder: Path, problems: list[Problem], on: str, backends: Iterable[str]) -> int:
    """Run problems in the group that torchrun gave; rank 0 saves the traces. This process's rank."""
    torch.set_num_threads(1)
    device = device_of(on, int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(collectives(on, int(os.environ["WORLD_SIZE"])))
    rank = dist.get_rank()
    for backend in backends:
        _run_all(backend, folder, problems, rank, device, lambda _: None, Progress())
    dist.destroy_process_group()
    return rank


def run(problem: Problem, backend: str, rank: int, device: torch.device, progress: Progress) -> Trace | None:
    """This rank's part of a problem; rank 0 gets everybody's and returns the trace.

    The layer runs on these inputs, on others, and on these again, with fresh memory full of NaN: what it keeps from a
    step, or reads before writing, shows as a difference between the first run and the last.
    """

    def at(stage: str) -> None:
        progress.at(problem.case.name, stage)

    corner = _CORNERS[backend]
    with poisoned_memory():
        mine = _isolated(problem, corner, rank, device, at)
    at("the first step")
    first = _end_to_end(problem, corner, rank, device, waits := HostWaits(device))
    at("steps on other inputs")
    for other in problem.steps_between():
        _end_to_end(other, corner, rank, device, HostWaits(device))
    at("the first step, repeated")
    with poisoned_memory():
        again = _end_to_end(problem, corner, rank, device, HostWaits(device))
    mine |= again | {name.replace("e2e", "repeat", 1): differing_bits(a, again[name]) for name, a in first.items()}
    at("gathering")
    everybody: list[Arrays] = [mine]
    if problem.case.ranks > 1:
        gathered: list[Arrays | None] = [None] * problem.case.ranks
        dist.gather_object(mine, gathered if rank == 0 else None, dst=0)
        everybody = [arrays for arrays in gathered if arrays is not None]
    if rank:
        return None
    trace = Trace(problem.case, backend, corner.strategy, environment(device) | waits.found())
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


class _Dynamic:
    """`torch_impl`'s stages of a case, called as those of `_Static`: with rows as [rows, D], whatever their bins."""

    strategy: Strategy = "dynamic"
    padding = np.nan  # what stage 6 is fed where it has no row

    def __init__(self, case: Case, send_P: Sequence[int], receive_P: Sequence[int]) -> None:
        self.case = case
        self.splits = exchange.Splits(torch.tensor(send_P), torch.tensor(receive_P), sum(send_P), sum(receive_P))

    def group_by_expert(self, x: Tensor, ids: Tensor, score: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG002
        return grouping.group_by_expert(x, ids, counts).x_ND

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return exchange.exchange_counts(counts)[0]

    def send_tokens(self, x: Tensor) -> Tensor:
        return exchange.send_tokens(x, self.splits)

    def to_expert_major(self, x: Tensor, counts_Pe: Tensor) -> Tensor:
        return layout.to_expert_major(x, counts_Pe, self.splits.total).x_RD

    def apply_experts(self, x: Tensor, counts_e: Tensor, *weights: Tensor) -> Tensor:
        return experts.apply_experts(x, counts_e, *weights)

    def to_rank_major(self, y: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return layout.to_rank_major(y, source, target)

    def return_tokens(self, y: Tensor) -> Tensor:
        return exchange.return_tokens(y, self.splits)

    def combine(self, y: Tensor, score: Tensor, keep: Tensor, slot: Tensor, assignment: Tensor) -> Tensor:
        return grouping.combine(y, score * keep, slot, assignment)

    def planned(self) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def layer(
        case: Case, x: Tensor, router: Tensor, weights: Sequence[Tensor], chosen: routing.Routing, keep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and every intermediate; what a capacity would drop has its score masked."""
        masked = chosen._replace(score_TK=chosen.score_TK * keep)
        stages = layer.moe_layer(x, router, *weights, top_k=case.top_k, routing=masked)
        return stages.out_TD, {
            "group_by_expert/x": stages.grouped.x_ND,
            "exchange_counts/counts": stages.counts_Pe,
            "send_tokens/x": stages.received_RD,
            "to_expert_major/x": stages.expert_major.x_RD,
            "apply_experts/y": stages.y_RD,
            "to_rank_major/y": stages.rank_major_RD,
            "return_tokens/y": stages.returned_ND,
        }


class _Static:
    """`torch_impl.static`'s stages of a case, with bins of the oracle's capacity."""

    strategy: Strategy = "static"

    def __init__(self, case: Case, *_: object) -> None:
        self.case, self.capacity = case, plan(case)._replace(rows=case.capacity)
        self.bins = (case.bins, case.capacity)
        per_rank = case.bins == case.ranks
        self.major = (case.bins * case.capacity,) if per_rank else (case.experts // case.ranks, -1)
        self.padding = np.nan if per_rank else 0  # an expert's bin is multiplied whole: stage 5 has promised zeros

    def in_bins(self, rows: Tensor) -> Tensor:
        return rows.reshape(*self.bins, *rows.shape[1:])

    def group_by_expert(self, x: Tensor, ids: Tensor, score: Tensor, counts: Tensor) -> Tensor:
        return static_grouping.group_by_expert(x, ids, score, counts, self.capacity).x_BCD.flatten(0, 1)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return static_exchange.exchange_counts(counts)

    def send_tokens(self, x: Tensor) -> Tensor:
        return static_exchange.send_tokens(self.in_bins(x)).flatten(0, 1)

    def to_expert_major(self, x: Tensor, counts_Pe: Tensor) -> Tensor:
        return flat(static_layout.to_expert_major(self.in_bins(x), counts_Pe).x_SD)

    def apply_experts(self, x: Tensor, counts_e: Tensor, *weights: Tensor) -> Tensor:
        return flat(static_experts.apply_experts(x.reshape(*self.major, x.shape[1]), counts_e, *weights))

    def to_rank_major(self, y: Tensor, source: Tensor, target: Tensor) -> Tensor:
        major = y.reshape(*self.major, y.shape[1])
        return flat(static_layout.to_rank_major(major, source.reshape(major.shape[:-1]), self.in_bins(target)))

    def return_tokens(self, y: Tensor) -> Tensor:
        return static_exchange.return_tokens(self.in_bins(y)).flatten(0, 1)

    def combine(self, y: Tensor, score: Tensor, keep: Tensor, slot: Tensor, assignment: Tensor) -> Tensor:  # noqa: ARG002
        return static_grouping.combine(self.in_bins(y), score, slot, self.in_bins(assignment))

    def planned(self) -> dict[str, Tensor]:
        return {"capacity": torch.tensor(plan(self.case).rows)}

    @staticmethod
    def layer(
        case: Case,
        x: Tensor,
        router: Tensor,
        weights: Sequence[Tensor],
        chosen: routing.Routing,
        keep: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and every intermediate; its own capacity drops."""
        stages = static.moe_layer(x, router, *weights, top_k=case.top_k, capacity=plan(case), routing=chosen)
        return stages.out_TD, {
            "group_by_expert/x": flat(stages.grouped.x_BCD),
            "group_by_expert/dropped": stages.dropped_E,
            "group_by_expert/dropped_in_all": stages.dropped,
            "exchange_counts/counts": stages.counts_Pe,
            "send_tokens/x": flat(stages.received_BCD),
            "to_expert_major/x": flat(stages.expert_major.x_SD),
            "apply_experts/y": flat(stages.y_SD),
            "to_rank_major/y": flat(stages.rank_major_BCD),
            "return_tokens/y": flat(stages.returned_BCD),
        }


_CORNERS: dict[str, type[_Dynamic] | type[_Static]] = {"torch": _Dynamic, "torch-static": _Static}


def plan(case: Case) -> static.Capacity:
    """The capacity that the implementation itself computes."""
    return static.plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks,
        case.capacity_per, case.priority, case.align,
    )  # fmt: skip


def flat(a: Tensor) -> Tensor:
    """[..., D] as [rows, D]."""
    return a.reshape(-1, a.shape[-1])


def _isolated(
    problem: Problem, corner: type[_Dynamic] | type[_Static], rank: int, device: torch.device, at: Callable[[str], None]
) -> Arrays:
    """Every stage fed the oracle's input, forward and backward."""
    case, out = problem.case, {}
    e = case.experts // case.ranks
    mine = slice(rank * e, (rank + 1) * e)
    table = row_tables(case, problem.expert_id, problem.keep, corner.strategy)
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, corner.strategy)
    received_Pe = reference.received(case, sent_PE)[rank]

    def put(a: np.ndarray, *, grad: bool = False) -> torch.Tensor:
        return to_torch(a).to(device).requires_grad_(grad)

    def rows(values: np.ndarray, where: str, *, grad: bool = False, fill: float = np.nan) -> torch.Tensor:
        return put(lay_out(values.reshape(-1, case.width), table[where], fill)[rank], grad=grad)

    def stage(name: str, values: Mapping[str, object]) -> None:
        out.update({f"isolated/{name}/{key}": to_numpy(value) for key, value in values.items()})

    def vjp(f: Callable, inputs: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> tuple:
        result = f(*inputs)
        # A copy now, in the caller's stream: autograd waits at its end for streams that f may have forgotten.
        return result.detach().clone(), *torch.autograd.grad(result, inputs, cotangent)

    ids, keep = put(problem.expert_id[rank]), put(problem.keep[rank])
    x_rows = np.repeat(problem.x.reshape(-1, case.width), case.top_k, axis=0)

    at("route")
    x, router = put(problem.x[rank], grad=True), put(problem.router, grad=True)
    how = (case.top_k, case.score_function, case.renormalize, case.scale)
    own = routing.route(x, router, *how)
    replayed = routing.route(x, router, *how, expert_id_TK=put(problem.other_experts[rank]))
    dx, drouter = torch.autograd.grad(replayed.score_TK, (x, router), put(problem.dscore[rank]))
    stage(
        "route",
        {"expert_id": own.expert_id_TK, "score": replayed.score_TK, "counts": replayed.counts_E, "dx": dx,
         "drouter": all_sum(drouter)},
    )  # fmt: skip
    counts = routing.count_per_expert(ids, case.experts)

    received_P = received_Pe.sum(axis=1).tolist()
    stages = corner(case, sent_PE[rank].reshape(case.ranks, -1).sum(axis=1).tolist(), received_P)
    at("group_by_expert")
    x_grouped = stages.group_by_expert(x, ids, put(problem.score[rank]), counts)
    (dx,) = torch.autograd.grad(x_grouped, x, rows(problem.dx_rows, "grouped"), retain_graph=True)
    stage("group_by_expert", {"x": x_grouped, "dx": dx} | stages.planned())

    at("exchange_counts")
    stage("exchange_counts", {"counts": stages.exchange_counts(put(sent_PE[rank]))})
    index = {name: put(a) for name, a in indices(case, table, rank).items()}
    counts_Pe = put(received_Pe)

    at("send_tokens")
    x_sent, dx_received = rows(x_rows, "grouped", grad=True), rows(problem.dx_rows, "received")
    result = vjp(stages.send_tokens, (x_sent,), dx_received)
    stage("send_tokens", dict(zip(("x", "dx"), result, strict=True)))

    at("to_expert_major")
    x_received, dx_expert_major = rows(x_rows, "received", grad=True), rows(problem.dx_rows, "expert_major")
    result = vjp(lambda x: stages.to_expert_major(x, counts_Pe), (x_received,), dx_expert_major)
    stage("to_expert_major", dict(zip(("x", "dx"), result, strict=True)))

    at("apply_experts")
    weights = tuple(weights_of(w, mine, device) for w in problem.weights)
    result = vjp(
        lambda x, *w: stages.apply_experts(x, counts_Pe.sum(0), *w),
        (rows(x_rows, "expert_major", grad=True, fill=stages.padding), *weights),
        rows(problem.dy, "expert_major", fill=stages.padding),
    )
    y, dx, *dw = result
    stage("apply_experts", {"y": y, "dx": dx} | compared(case, dw))
    del weights, result, dw

    at("to_rank_major")
    y, dy = rows(problem.y, "expert_major", grad=True), rows(problem.dy, "received")
    result = vjp(lambda y: stages.to_rank_major(y, index["source"], index["target"]), (y,), dy)
    stage("to_rank_major", dict(zip(("y", "dy"), result, strict=True)))

    at("return_tokens")
    y, dy = rows(problem.y, "received", grad=True), rows(problem.dy, "grouped")
    result = vjp(stages.return_tokens, (y,), dy)
    stage("return_tokens", dict(zip(("y", "dy"), result, strict=True)))

    at("combine")
    result = vjp(
        lambda y, score: stages.combine(y, score, keep, index["slot"], index["assignment"]),
        (rows(problem.y, "grouped", grad=True), put(problem.score[rank], grad=True)),
        put(problem.dout[rank]),
    )
    stage("combine", dict(zip(("out", "dy", "dscore"), result, strict=True)))

    if case.top_k >= 3:
        probe = rows(np.where(problem.keep[..., None], problem.order_probe()[0], 0), "grouped")
        weight = put(problem.keep[rank].astype(case.wide))
        stage("combine", {"order": stages.combine(probe, weight, keep, index["slot"], index["assignment"])})
        stage("group_by_expert", {"dx_order": torch.autograd.grad(x_grouped, x, probe)[0]})
    return out


def _end_to_end(
    problem: Problem, corner: type[_Dynamic] | type[_Static], rank: int, device: torch.device, waits: HostWaits
) -> Arrays:
    """The whole layer and its gradients, with the oracle's expert ids."""
    case = problem.case
    e = case.experts // case.ranks
    x, router = (to_torch(a).to(device).requires_grad_() for a in (problem.x[rank], problem.router))
    weights = [weights_of(w, slice(rank * e, (rank + 1) * e), device) for w in problem.weights]
    ids, keep = to_torch(problem.expert_id[rank]).to(device), to_torch(problem.keep[rank]).to(device)
    dout, how = to_torch(problem.dout[rank]).to(device), (case.score_function, case.renormalize, case.scale)
    with waits.counted():
        chosen = routing.route(x, router, case.top_k, *how, expert_id_TK=ids)
        result, intermediate = corner.layer(case, x, router, weights, chosen, keep)
        dx, dscore, drouter, *dw = torch.autograd.grad(result, (x, chosen.score_TK, router, *weights), dout)
    values = intermediate | {
        "route/score": chosen.score_TK,
        "combine/out": result,
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
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
