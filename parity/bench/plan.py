"""How long the row movements take, beside the time that the memory itself needs: the engine behind `bench`.

A figure is a median. Its floor is the bytes that have to move, each row read once and written once, over the copy
bandwidth measured in the same run. Each framework runs in a process of its own, one after the other.
"""

import os
import statistics
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.run.backend import BackendError
from parity.run.ending import temporary_folder
from parity.run.ours import FRAMEWORKS
from parity.run.supervisor import Process

# In this order, these stages are one layer's data movement on one rank; the exchange and the experts come in between.
STAGES = ("group_by_expert", "to_expert_major", "to_rank_major", "combine")
PARTS = (*STAGES, "whole", "experts")
DIRECTIONS = ("forward", "forward+backward")
ACROSS_RANKS = ("exchange", "whole")  # the parts measured when rows go to other ranks
N_SETS = 3  # sets of inputs to rotate among: with their N-row intermediate arrays, far larger than any cache


# Each shape has the rows of one rank of eight, which JAX pads to a capacity factor of 1.
SHAPES = {
    **{
        name: replace(MODELS[name], tokens=tokens, capacity_factor="1")
        for name, tokens in (("deepseek-v3", 4096), ("mixtral-8x7b", 8192), ("qwen3-30b-a3b", 8192))
    },
    "small": Case(
        "small", ranks=8, tokens=1024, width=256, hidden=256, experts=16, top_k=4, capacity_factor="1",
    ),
}  # fmt: skip


class Movement(NamedTuple):
    """One variant of the four stages that move rows. The first argument of each stage is a row array.

    `prepare` turns scores, expert ids, counts_E and counts_Pe into what the variant takes instead. It is not timed,
    as the variant's own router would pass them in that form.
    """

    group_by_expert: Callable[..., Any]
    to_expert_major: Callable[..., Any]
    to_rank_major: Callable[..., Any]
    combine: Callable[..., Any]
    prepare: Callable[..., Any] = lambda *routing: routing


Step = Callable[[int], Any]  # runs once, on the set of inputs with this number


class Plan(msgspec.Struct, frozen=True):
    """What to measure."""

    shapes: tuple[Case, ...] = ()  # empty: the three models' on a GPU, the small one on a CPU
    frameworks: tuple[str, ...] = FRAMEWORKS
    parts: tuple[str, ...] = PARTS  # empty: only the copies that give the bandwidth for floors
    baselines: bool = True
    compiled: bool = True  # the baseline under torch.compile, which takes minutes to compile
    ranks: int = 1  # above 1: the exchange and the whole with it, over as many GPUs or, on a CPU, processes
    seconds: float = 0.3  # spent timing each figure
    dtype: str = "bfloat16"
    seed: int = 0


class Figure(msgspec.Struct):
    """One measurement. Times in seconds; None where a device or framework cannot tell."""

    shape: str
    framework: str
    variant: str
    part: str
    direction: str
    median: float
    low: float  # quartiles
    high: float
    runs: int  # timings
    batch: int = 1  # number of runs that each timing averages
    bytes: int = 0  # bytes that have to move in this rank's memory
    link_bytes: int = 0  # bytes that have to leave this rank; as many arrive
    flops: int = 0  # operations that the part needs
    peak_bytes: int | None = None  # peak allocation beyond the inputs, results included
    launches: int | None = None  # kernels, copies and fills on the device, in one more run, under a profiler
    syncs: int | None = None  # how often the host waited in that run
    span: float | None = None  # seconds from the first of its launches to the end of the last
    busy: float | None = None  # seconds of that span in which the device ran something
    host: float | None = None  # seconds that one run held the host: above the median, a model may be host-bound
    kernels: dict[str, float] | None = None  # seconds of the longest kernels, by name
    device: str = ""
    error: str = ""  # why there is no figure, for example out of memory
    floor: float | None = None
    share: float | None = None  # of the floor: floor / median


def row_passes(part: str, direction: str, tokens: int, rows: int) -> int:
    """Rows read plus rows written, T tokens and N assignments (P*C where they are padded to a capacity).

        forward    T+N, 2N, 2N, N+T     in all 6N + 2T
        backward   N+T, 2N, 2N, T+2N    in all 7N + 2T

    Backward, combine reads the tokens' gradients once and every row once, and writes every row's gradient.
    """
    T, N = tokens, rows
    forward = {"group_by_expert": T + N, "to_expert_major": 2 * N, "to_rank_major": 2 * N, "combine": N + T}
    backward = forward | {"combine": T + 2 * N}
    names = STAGES if part == "whole" else (part,)
    return sum(forward[name] + (backward[name] if direction != "forward" else 0) for name in names)


def leaving_rows(rows: int, ranks: int, direction: str) -> int:
    """Of N rows spread evenly, those for other ranks: out in dispatch, back in combine, and again in backward."""
    return rows * (ranks - 1) // ranks * (1 if direction == "forward" else 2)


def expert_flops(shape: Case, rows: int, direction: str) -> int:
    """Operations of SwiGLU's three matmuls. Backward has two for each: one for its input, one for its weights."""
    return 3 * 2 * rows * shape.width * shape.hidden * (1 if direction == "forward" else 3)


def choose_shapes(plan: Plan, on_gpu: bool) -> list[Case]:
    """The shapes asked for; by default three models' on a GPU, the small one on a CPU."""
    return list(plan.shapes) or [case for name, case in SHAPES.items() if (name == "small") != on_gpu]


def draw_routing(shape: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [T, K] in float32, expert ids [T, K] and counts [E]: K different experts for each token, at random."""
    rng = np.random.default_rng(seed)
    key_TE = rng.random((shape.tokens, shape.experts), dtype=np.float32)
    expert_id_TK = np.argpartition(key_TE, shape.top_k - 1, axis=1)[:, : shape.top_k].astype(np.int64)
    score_TK = rng.random((shape.tokens, shape.top_k), dtype=np.float32)
    return score_TK, expert_id_TK, np.bincount(expert_id_TK.reshape(-1), minlength=shape.experts)


def summarize(seconds: Iterable[float]) -> dict[str, float]:
    """Median, quartiles and number of runs."""
    seconds = sorted(seconds)
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median": median, "low": low, "high": high, "runs": len(seconds)}


def emit(figure: Figure) -> None:
    """Print a JSON line at once, so that figures survive a run that is cut off."""
    print(msgspec.json.encode(figure).decode(), flush=True)


def failure(framework: str, error: Exception, shape: str = "", variant: str = "", part: str = "") -> Figure:
    """A figure that says why there is none."""
    return Figure(shape, framework, variant, part, "", 0, 0, 0, 0, error=f"{type(error).__name__}: {error}"[:500])


class Ran(NamedTuple):
    """Something that ran on the device, by the profiler's clock in seconds."""

    name: str
    start: float
    end: float


def note_launches(figure: Figure, ran: Sequence[Ran]) -> None:
    """Fill in the number of launches, the busy time of the device, their span, and the longest kernels by name."""
    if not ran:  # the profiler does not reach this device
        return
    seconds: dict[str, float] = {}
    busy, until = 0.0, 0.0
    ran = sorted(ran, key=lambda one: one.start)
    for name, start, end in ran:
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        seconds[name[:80]] = seconds.get(name[:80], 0) + end - start
    figure.launches, figure.busy, figure.span = len(ran), busy, until - ran[0].start
    figure.kernels = dict(sorted(seconds.items(), key=lambda item: -item[1])[:10])


def run_bench(plan: Plan) -> Generator[Figure]:
    """Yield every figure as it is measured. Copies of all frameworks come first: floors use the fastest.

    A floor is bytes in memory over the copy bandwidth, plus bytes between ranks over the bandwidth between GPUs.

    Raises BackendError when a framework is missing or its run ends in error.
    """
    copying = msgspec.structs.replace(plan, parts=())
    copies = [figure for framework in plan.frameworks for figure in _measure(copying, framework)]
    yield from copies
    memory = max((figure.bytes / figure.median for figure in copies if figure.part == "copy"), default=0)
    link = max((figure.link_bytes / figure.median for figure in copies if figure.part == "link"), default=0)
    for framework in plan.frameworks:
        for figure in _measure(plan, framework):
            if not figure.error:
                note_floor(figure, memory, link)
            yield figure


def note_floor(figure: Figure, memory: float, link: float) -> None:
    """Fill in a figure's floor and share of it, if the bandwidths that it needs are known, in bytes per second."""
    if (figure.bytes or figure.link_bytes) and memory and (link or not figure.link_bytes):
        figure.floor = figure.bytes / memory + (figure.link_bytes / link if link else 0)
        figure.share = figure.floor / figure.median


def _measure(plan: Plan, framework: str) -> Generator[Figure]:
    command = [sys.executable, "-m", f"parity.bench.in_{framework}", msgspec.json.encode(plan).decode()]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if plan.ranks > 1 else {})  # ranks share the cores of a CPU
    with (
        temporary_folder() as folder,
        Process(command, environment=environment | {"TMPDIR": str(folder)}) as process,
    ):  # the reader of the figures may stop early
        for line in process.lines():
            if line.startswith("{"):
                yield msgspec.json.decode(line, type=Figure)
    if process.error:
        raise BackendError(framework, f"{framework}: {process.error[-2000:]}")
