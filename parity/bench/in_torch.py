"""PyTorch's part of `bench`: ours, the straightforward version, and that under torch.compile."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from parity.bench.peers import TORCH_PEERS, TORCH_PEERS_OVER_RANKS, find_peers
from parity.bench.plan import (
    ACROSS_RANKS,
    DIRECTIONS,
    N_SETS,
    STAGES,
    Figure,
    Movement,
    Plan,
    Ran,
    Step,
    choose_shapes,
    draw_routing,
    emit,
    expert_flops,
    failure,
    leaving_rows,
    note_launches,
    row_passes,
    summarize,
)
from parity.cases.case import Case
from parity.run.ranks import Notes, run_group
from parity.run.supervisor import end_with_parent
from torch_impl import direct
from torch_impl.direct import exchange as direct_exchange
from torch_impl.direct import grouping as direct_grouping
from torch_impl.direct.layout import to_expert_major as to_places
from torch_impl.exchange import exchange_counts, return_tokens, send_tokens
from torch_impl.experts import apply_experts
from torch_impl.grouping import combine, group_by_expert
from torch_impl.layout import to_expert_major, to_rank_major
from torch_impl.rows import expert_major_source

RUNS_TOGETHER = 20  # timed runs with several ranks, which must agree on the number
QUEUED = 20  # runs queued at once: after about a thousand launches the host waits for room in the queue
CYCLES = 2e9  # upper bound of the clock cycles of a GPU per second


def plain_group_by_expert(
    x_TD: Tensor,
    expert_id_TK: Tensor,
    counts_E: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather rows by indexing; autograd's backward adds their gradients up at the source rows."""
    assignment_N = expert_id_TK.reshape(-1).argsort(stable=True)
    token_N = assignment_N // expert_id_TK.shape[1]
    return x_TD[token_N], token_N, assignment_N


def plain_to_expert_major(x_RD: Tensor, counts_Pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by indexing."""
    source_R = expert_major_source(counts_Pe, x_RD.shape[0])
    return x_RD[source_R], source_R, source_R


def plain_to_rank_major(y_RD: Tensor, source_R: Tensor, target_R: Tensor) -> Tensor:  # noqa: ARG001
    """Rows by scatter."""
    return torch.empty_like(y_RD).index_copy_(0, source_R, y_RD)


def plain_combine(y_ND: Tensor, score_TK: Tensor, token_N: Tensor, assignment_N: Tensor) -> Tensor:
    """Multiply every row by its score and add it to its token."""
    weighted_ND = (y_ND.float() * score_TK.reshape(-1)[assignment_N][:, None]).to(y_ND.dtype)
    out_TD = y_ND.new_zeros(score_TK.shape[0], y_ND.shape[1])
    return out_TD.scatter_add(0, token_N[:, None].expand_as(weighted_ND), weighted_ND)


OURS = Movement(group_by_expert, to_expert_major, to_rank_major, combine)
PLAIN = Movement(plain_group_by_expert, plain_to_expert_major, plain_to_rank_major, plain_combine)


def main(plan: Plan) -> None:
    """Measure, and print a line of JSON for each figure."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not plan.parts:
        emit(copy_figure(plan, device))
        if plan.ranks > 1 and on_gpu:
            check_gpus(plan.ranks)
            emit(link_figure(plan))
        return
    if plan.ranks > 1:
        start_ranks(one_rank, plan, plan.ranks)
        if on_gpu:
            peers_over_ranks(plan)
        return
    peers = find_peers("torch", TORCH_PEERS) if plan.baselines else {}
    for shape in choose_shapes(plan, on_gpu):
        variants = {"ours": OURS}
        if plan.baselines:
            variants |= {"plain": PLAIN} | peers
        if plan.baselines and plan.compiled:
            # Each stage is compiled on its own, as the exchange and the experts come between stages.
            torch.compiler.reset()
            compiled = {stage: torch.compile(getattr(PLAIN, stage), dynamic=False) for stage in STAGES}
            variants["plain, compiled"] = Movement(**compiled)
        for variant, movement in variants.items():
            for part in [part for part in (*STAGES, "whole") if part in plan.parts]:
                if part == "whole" or variant != "plain, compiled":
                    try:
                        movement_figures(plan, shape, device, variant, movement, part)
                    except Exception as error:  # a peer may raise any exception before it is measured
                        emit(failure("torch", error, shape.name, variant, part))
        if "experts" in plan.parts:
            try:
                expert_figures(plan, shape, device)
            except Exception as error:  # for example out of memory while inputs are drawn
                emit(failure("torch", error, shape.name, "grouped_mm", "experts"))


def copy_figure(plan: Plan, device: torch.device) -> Figure:
    """The bandwidth behind all floors: one large copy, bytes read plus bytes written."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.randint(256, (2, size), dtype=torch.uint8, device=device) for _ in range(2))
    figure = measure(plan, device, lambda i: target[i % 2].copy_(source[i % 2]))
    figure.part, figure.bytes = "copy", 2 * size
    return figure


def movement_figures(
    plan: Plan, shape: Case, device: torch.device, variant: str, movement: Movement, part: str
) -> None:
    """Figures of one stage or the whole chain, forward alone and with backward."""
    sets = [draw_inputs(plan, shape, device, movement, part, plan.seed + i) for i in range(N_SETS)]
    for direction in DIRECTIONS:

        def forward(i: int) -> Any:
            run, inputs, _, _ = sets[i % N_SETS]
            with torch.no_grad():
                return run(*inputs)

        def both(i: int) -> Any:
            run, inputs, wanted, cotangent = sets[i % N_SETS]
            out = run(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            return out.detach(), torch.autograd.grad(out, wanted, cotangent)

        figure = measure(plan, device, forward if direction == "forward" else both)
        figure.shape, figure.variant, figure.part, figure.direction = shape.name, variant, part, direction
        size = torch.empty((), dtype=getattr(torch, plan.dtype)).element_size()
        figure.bytes = row_passes(part, direction, shape.tokens, shape.assignments) * shape.width * size
        emit(figure)


def draw_inputs(
    plan: Plan, shape: Case, device: torch.device, movement: Movement, part: str, seed: int
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Tensor, ...], Tensor]:
    """The function to run, its arguments, those to differentiate by, and the gradient of the output."""
    score_TK, ids_TK, counts_E = (torch.from_numpy(a).to(device) for a in draw_routing(shape, seed))
    # The rank's own rows stand in for received ones: equally many from each rank, for equally many experts.
    counts_Pe = counts_E.reshape(shape.ranks, -1)
    score_TK, ids_TK, counts_E, counts_Pe = movement.prepare(score_TK, ids_TK, counts_E, counts_Pe)
    score_TK.requires_grad_()
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, generator=generator, device=device).to(getattr(torch, plan.dtype))

    def whole(x_TD: Tensor, score_TK: Tensor, ids_TK: Tensor, counts_E: Tensor, counts_Pe: Tensor) -> Tensor:
        x_ND, slot, assignment = movement.group_by_expert(x_TD, ids_TK, counts_E)
        x_RD, source_R, target_R = movement.to_expert_major(x_ND, counts_Pe)
        y_RD = movement.to_rank_major(x_RD, source_R, target_R)
        return movement.combine(y_RD, score_TK, slot, assignment)

    indices = ()
    if part == "combine":
        indices = movement.group_by_expert(draw(shape.tokens), ids_TK, counts_E)[1:]
    if part == "to_rank_major":
        indices = movement.to_expert_major(draw(shape.assignments), counts_Pe)[1:]
    x = draw(shape.tokens if part in ("group_by_expert", "whole") else shape.assignments).requires_grad_()
    cotangent = draw(shape.tokens if part in ("combine", "whole") else shape.assignments)
    rest = {
        "group_by_expert": (ids_TK, counts_E),
        "to_expert_major": (counts_Pe,),
        "to_rank_major": indices,
        "combine": (score_TK, *indices),
        "whole": (score_TK, ids_TK, counts_E, counts_Pe),
    }[part]
    wanted = (x, score_TK) if part in ("combine", "whole") else (x,)
    return whole if part == "whole" else getattr(movement, part), (x, *rest), wanted, cotangent


def expert_figures(plan: Plan, shape: Case, device: torch.device) -> None:
    """SwiGLU over equal groups, by `grouped_mm` where it takes the dtype."""
    dtype, e, D, F = getattr(torch, plan.dtype), shape.experts // shape.ranks, shape.width, shape.hidden

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(sizes, device=device, dtype=dtype) * sizes[-2] ** -0.5).requires_grad_()

    x_RD, dy_RD = draw(shape.assignments, D), draw(shape.assignments, D).detach()
    weights = draw(e, D, F), draw(e, D, F), draw(e, F, D)
    counts_e = torch.full((e,), shape.assignments // e, device=device)
    counts_e[: shape.assignments % e] += 1

    def forward(i: int) -> Any:  # noqa: ARG001  the weights alone are past the cache
        with torch.no_grad():
            return apply_experts(x_RD, counts_e, *weights)

    def both(i: int) -> Any:  # noqa: ARG001
        return torch.autograd.grad(apply_experts(x_RD, counts_e, *weights), (x_RD, *weights), dy_RD)

    for direction, step in zip(DIRECTIONS, (forward, both), strict=True):
        figure = measure(plan, device, step)
        figure.shape, figure.variant, figure.part, figure.direction = shape.name, "grouped_mm", "experts", direction
        figure.flops = expert_flops(shape, shape.assignments, direction)
        emit(figure)


def check_gpus(n_ranks: int) -> None:
    """Raises ValueError when there are GPUs, but fewer than ranks."""
    if 0 < torch.cuda.device_count() < n_ranks:
        raise ValueError(f"--ranks {n_ranks} needs a GPU for each rank, and there are {torch.cuda.device_count()}")


def start_ranks(one_rank: Callable[[int, Any, str], None], plan: Any, n_ranks: int) -> None:
    """Do as `run_ranks` does, and exit with an error when a rank fails."""
    if failure := run_ranks(one_rank, plan, n_ranks):
        sys.exit(failure)


def run_ranks(one_rank: Callable[[int, Any, str], None], plan: Any, n_ranks: int) -> str:
    """Run `one_rank(rank, plan, address)` in one process per rank. They meet at the address: see `join_ranks`.

    When a rank fails, all are ended, and why is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Spawned, not forked, as this process has asked for GPUs. The plan, not a timeout, limits the time.
        work = (one_rank, plan, f"file://{folder}/store")
        failure = run_group("torch", Path(folder), n_ranks, _rank, work, 60, method="spawn", running=math.inf)
    return str(failure or "")


def _rank(rank: int, notes: Notes, one_rank: Callable[[int, Any, str], None], plan: Any, address: str) -> None:
    notes.at("", "its measurements")
    one_rank(rank, plan, address)


def join_ranks(rank: int, n_ranks: int, address: str) -> torch.device:
    """Join the process group, NCCL with a GPU per rank or gloo on a CPU, and return this rank's device.

    Raises ValueError when there are fewer GPUs than ranks.
    """
    check_gpus(n_ranks)
    meet = partial(dist.init_process_group, init_method=address, rank=rank, world_size=n_ranks)
    if not torch.cuda.is_available():
        meet("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    meet("cpu:gloo,cuda:nccl", device_id=device)
    return device


def one_rank(rank: int, plan: Plan, address: str) -> None:
    """Measure the exchange and the whole with it on one of several ranks; the first rank prints the figures."""
    P, device = plan.ranks, join_ranks(rank, plan.ranks, address)
    for shape in choose_shapes(plan, device.type == "cuda"):
        shape = replace(shape, ranks=P)
        for part in ACROSS_RANKS:
            if part in plan.parts:
                figures_on_rank(rank, plan, shape, device, part, f"{P} ranks", draw_for_ranks)
        if "whole" in plan.parts:  # the direct layer has no exchange apart from the rest
            draw = partial(draw_direct, buffers=buffers_for(plan, shape, device))
            figures_on_rank(rank, plan, shape, device, "whole", f"{P} ranks, direct", draw)
    dist.destroy_process_group()


def peers_over_ranks(plan: Plan) -> None:
    """Measure other projects' wholes, each in processes of its own: where one rank fails, all ranks can be ended."""
    wanted = TORCH_PEERS_OVER_RANKS if plan.baselines and "whole" in plan.parts else {}
    for package in find_peers("torch", wanted):
        if failed := run_ranks(partial(one_rank_of_peer, package), plan, plan.ranks):
            emit(failure("torch", RuntimeError(failed), variant=f"{plan.ranks} ranks, {package}", part="whole"))


def one_rank_of_peer(package: str, rank: int, plan: Plan, address: str) -> None:
    """Measure another project's whole on one of several ranks."""
    P, device = plan.ranks, join_ranks(rank, plan.ranks, address)
    draw = partial(draw_of_peer, prepare=TORCH_PEERS_OVER_RANKS[package]())
    for shape in choose_shapes(plan, device.type == "cuda"):
        figures_on_rank(rank, plan, replace(shape, ranks=P), device, "whole", f"{P} ranks, {package}", draw)
    dist.destroy_process_group()


def figures_on_rank(
    rank: int, plan: Plan, shape: Case, device: torch.device, part: str, variant: str, draw: Callable[..., Any]
) -> None:
    """Figures of one part on one of several ranks, forward alone and with backward."""
    sets = [draw(plan, shape, device, part, plan.seed + N_SETS * rank + i) for i in range(N_SETS)]
    for direction in DIRECTIONS:

        def step(i: int, backward: bool = direction != "forward") -> Any:
            run, inputs, cotangent = sets[i % N_SETS]
            with torch.set_grad_enabled(backward):
                out = run(*inputs)
            return torch.autograd.grad(out, inputs, cotangent) if backward else out

        figure = measure(plan, device, step, runs=RUNS_TOGETHER)
        figure.shape, figure.variant, figure.part, figure.direction = shape.name, variant, part, direction
        row_bytes = shape.width * torch.empty((), dtype=getattr(torch, plan.dtype)).element_size()
        ways = 2 if part == "whole" else 1  # there and back
        figure.link_bytes = ways * leaving_rows(shape.assignments, plan.ranks, direction) * row_bytes
        if part == "whole":  # the same floor for all variants, so that their shares compare
            figure.bytes = row_passes(part, direction, shape.tokens, shape.assignments) * row_bytes
        if rank == 0:
            emit(figure)


def link_figure(plan: Plan) -> Figure:
    """The bandwidth of one copy between two GPUs, with which exchanges are compared."""
    size = 2**30
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    figure = measure(plan, torch.device("cuda", 0), lambda _: target.copy_(source))
    figure.part, figure.link_bytes = "link", size
    return figure


def draw_for_ranks(
    plan: Plan, shape: Case, device: torch.device, part: str, seed: int
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The function to run, its arguments to differentiate by, and the gradient of the output."""
    score_TK, ids_TK, counts_E = (torch.from_numpy(a).to(device) for a in draw_routing(shape, seed))
    _, splits = exchange_counts(counts_E)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, device=device).to(getattr(torch, plan.dtype))

    if part == "exchange":
        return partial(send_tokens, splits=splits), (draw(shape.assignments).requires_grad_(),), draw(splits.n_received)

    def whole(x_TD: Tensor, score_TK: Tensor) -> Tensor:
        x_ND, slot_TK, assignment_N = group_by_expert(x_TD, ids_TK, counts_E)
        counts_Pe, splits = exchange_counts(counts_E)
        x_RD, source_R, target_R = to_expert_major(send_tokens(x_ND, splits), counts_Pe, splits.n_received)
        y_ND = return_tokens(to_rank_major(x_RD, source_R, target_R), splits)
        return combine(y_ND, score_TK, slot_TK, assignment_N)

    return whole, (draw(shape.tokens).requires_grad_(), score_TK.requires_grad_()), draw(shape.tokens)


def buffers_for(plan: Plan, shape: Case, device: torch.device) -> direct.Buffers:
    """One set of buffers for all inputs, as each step runs forward and backward before the next."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # NVLink multicast, which nothing here uses
    sizes = (shape.tokens, shape.top_k, shape.experts, shape.width)
    return direct.make_buffers(*sizes, getattr(torch, plan.dtype), device)


def draw_direct(
    plan: Plan, shape: Case, device: torch.device, part: str, seed: int, buffers: direct.Buffers
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The inputs of `draw_for_ranks`, for the whole in which rows go straight to their places."""
    _, inputs, cotangent = draw_for_ranks(plan, shape, device, part, seed)
    _, ids_TK, counts_E = (torch.from_numpy(a).to(device) for a in draw_routing(shape, seed))

    def whole(x_TD: Tensor, score_TK: Tensor) -> Tensor:
        grouped = direct_grouping.group_by_expert(ids_TK, counts_E)
        counts_PE = direct_exchange.exchange_counts(grouped.kept_E, buffers)
        places = to_places(grouped.slot_TK, counts_PE, buffers)
        y_RD = direct_exchange.send_tokens(x_TD, grouped.slot_TK, *places, buffers)
        returned_ND = direct_exchange.return_tokens(y_RD, *places, buffers)
        return direct_grouping.combine(y_RD, returned_ND, score_TK, grouped.slot_TK, places.place_N, buffers)

    return whole, inputs, cotangent


def draw_of_peer(
    plan: Plan, shape: Case, device: torch.device, part: str, seed: int, prepare: Callable[..., Any]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The inputs of `draw_for_ranks`, with scores and choices in the form in which the peer's router returns them."""
    _, (x_TD, score_TK), cotangent = draw_for_ranks(plan, shape, device, part, seed)
    _, ids_TK, counts_E = (torch.from_numpy(a).to(device) for a in draw_routing(shape, seed))
    whole, scores = prepare(shape, score_TK.detach(), ids_TK, counts_E)
    return whole, (x_TD, scores.requires_grad_()), cotangent


def measure(plan: Plan, device: torch.device, step: Step, runs: int | None = None) -> Figure:
    """Time a step and count its launches; if it fails, return a figure with the error, so that others are measured.

    Ranks agree on `runs` and end together: a rank that went on alone would send collectives that no other expects.
    """
    try:
        return measure_well(plan, device, step, runs)
    except Exception as error:  # a peer may raise any exception
        if runs:
            raise
        return failure("torch", error)


def measure_well(plan: Plan, device: torch.device, step: Step, runs: int | None) -> Figure:
    """Warm up, time, then count once each: peak memory, launches and waits."""
    for i in range(N_SETS):  # this compiles the step and fills the allocator's pool
        step(i)
    if device.type == "cpu":
        seconds, host = time_on_cpu(step, plan.seconds, runs), None
    else:
        seconds, host = time_on_gpu(step, plan.seconds, runs)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    figure = Figure("", "torch", "", "", "", **summarize(seconds), device=name, host=host)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        torch.cuda.synchronize()
        figure.peak_bytes = torch.cuda.max_memory_allocated() - before
        try:
            count_on_gpu(figure, step)
        except RuntimeError as error:  # the times are valid without a profiler
            print(f"not profiled: {error}", file=sys.stderr)
    return figure


def time_on_gpu(step: Step, budget: float, runs: int | None = None) -> tuple[list[float], float]:
    """Seconds of each run, between two events on the device, and the seconds that one run holds the host.

    Runs are queued while the device sleeps, so that it never waits for the host: in a model, other work hides the host.
    A run that waits for the device cannot be queued, and neither can one of more than 50 launches.
    """
    host, whole = [], []
    for i in range(N_SETS):
        begin = time.perf_counter()
        step(i)
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    once = min(whole)
    runs = runs or max(10, min(200, int(budget / once)))
    seconds: list[float] = []
    while len(seconds) < runs:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(min(QUEUED, runs))]
        torch.cuda._sleep(int(min(0.1, 2 * len(events) * once) * CYCLES))
        for i, (start, end) in enumerate(events):
            start.record()
            step(i)
            end.record()
        torch.cuda.synchronize()
        seconds += [start.elapsed_time(end) / 1000 for start, end in events]
    return seconds, min(host)


def time_on_cpu(step: Step, budget: float, runs: int | None = None) -> list[float]:
    """Seconds of each run by the host's clock."""
    seconds: list[float] = []
    while len(seconds) < (runs or 5) or (not runs and sum(seconds) < budget and len(seconds) < 200):
        begin = time.perf_counter()
        step(len(seconds))
        seconds.append(time.perf_counter() - begin)
    return seconds


def count_on_gpu(figure: Figure, step: Step) -> None:
    """Fill in what one run launches, how long the device is busy with it, and how often the host waits."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(()))  # host barrier: no rank's kernels wait for another's profiler
        step(0)
    events = profiled.events() or []
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    note_launches(figure, [Ran(e.name, 1e-6 * e.time_range.start, 1e-6 * e.time_range.end) for e in on_device])
    figure.syncs = sum(e.name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy") for e in events)


if __name__ == "__main__":
    end_with_parent()
    main(msgspec.json.decode(sys.argv[1], type=Plan))
