"""The four corners in one table: PyTorch and JAX, each dynamic and static, one whole layer forward and backward.

Static ones run at the capacity factor at which this routing drops nothing, so that all four do the same work, and at
those asked for, beside what they drop. Both static ones drop the same rows. JAX's dynamic one needs GPUs for more than
one rank. `--flags` runs JAX's again under XLA's flags for their exchanges, one after the other.

    python -m parity.study.corners                      on one GPU, or a CPU
    python -m parity.study.corners --ranks 2 --flags    on two
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import msgspec
import tyro
from rich.console import Console
from rich.table import Table

from parity.bench.plan import Figure
from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.run.ours import BACKENDS
from parity.run.supervisor import Process, gpus
from parity.study.routing import Routing, counts, zipf_routing
from parity.study.sweep import measure

# XLA's for its exchanges on GPUs (jaxlib 0.10.2 and 0.11.2), each against none of them. Of a flag that the jaxlib at
# hand does not know, the table says so.
REGISTERED = "--xla_gpu_enable_nccl_user_buffers_in_default_space=true"
FLAGS = {
    "jax": (REGISTERED,),
    "jax-dynamic": (
        "--xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel=true",
        "--xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel=false "
        "--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true",
        "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true",
        "--xla_gpu_ragged_all_to_all_mode=symmetric",
        "--xla_gpu_ragged_all_to_all_mode=peer",
        "--xla_gpu_experimental_ragged_all_to_all_use_barrier_with_nccl=true",
        "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true",
        "--xla_gpu_ragged_all_to_all_mode=symmetric --xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true",
        "--xla_gpu_experimental_ragged_all_to_all_zero_copy=true",
        "--xla_gpu_enable_nccl_user_buffers=true",
        "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true",
        REGISTERED,
    ),
}


class Plan(msgspec.Struct, frozen=True):
    """What every corner runs."""

    case: Case
    skew: float
    seconds: float
    factor: str | None = None  # of a static corner
    corner: str = ""


def routing_of(plan: Plan) -> Routing:
    """One step, the same for all corners."""
    return zipf_routing(plan.case, plan.skew, 1)


def no_drop_factor(routing: Routing) -> str:
    """The least capacity factor at which this routing drops nothing, a bin per rank, as a fraction."""
    P, N = routing.case.ranks, routing.case.tokens * routing.case.top_k
    fullest = counts(routing).reshape(P, P, -1).sum(axis=-1).max()
    return str(Fraction(int(fullest) * P, N))


def run(plan: Plan, flags: str = "", cpu: bool = True) -> Figure:
    """One corner in a process of its own; where it fails, a figure with the error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    if cpu:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    module = f"parity.study.corners_in_{BACKENDS[plan.corner].framework}"
    command = [sys.executable, "-m", module, msgspec.json.encode(plan).decode()]
    with Process(command, environment=environment) as process:
        lines = [line for line in process.lines(limit=120) if line.startswith("{")]
    if process.error or not lines:
        said = [line for line in process.error.splitlines() if re.match(r"[\w.]*Error: ", line)]
        last = (said or process.error.splitlines() or ["it printed no figure"])[-1]
        return Figure("", BACKENDS[plan.corner].framework, "", "", "", 0, 0, 0, 0, error=last[:500])
    return msgspec.json.decode(lines[-1], type=Figure)


def corners(plan: Plan, factors: tuple[str, ...], flags: bool, cpu: bool) -> Iterator[tuple[Figure, float]]:
    """Each corner's figure, and the rate of assignments that it drops."""
    routing = routing_of(plan)
    for corner in BACKENDS:
        static = BACKENDS[corner].layout == "static"
        for factor in dict.fromkeys([no_drop_factor(routing), *factors]) if static else [None]:
            one = msgspec.structs.replace(plan, corner=corner, factor=factor)
            dropped = measure(routing, factor, "rank", "token").dropped if static else 0.0
            name = f"{corner}, factor {float(Fraction(factor)):.2f}" if factor else corner
            for under in ("", *FLAGS.get(corner, ())) if flags else ("",):
                figure = run(one, under, cpu)
                figure.shape, figure.part, figure.direction = plan.case.name, "layer", "forward+backward"
                figure.variant = f"{name} {under}".strip()
                yield figure, dropped


def main(
    model: str = "", ranks: int = 1, tokens: int = 0, skew: float = 0.5, factors: tuple[str, ...] = ("1", "1.25"),
    flags: bool = False, device: str = "cuda", seconds: float = 1.0, save: Path | None = None,
) -> None:  # fmt: skip
    """The four corners in one table: time per step beside the rate dropped, memory, waits of the host, launches.

    Args:
        model: a real model's shape (see `check --help`); left out, qwen3-30b-a3b on cuda and a small layer on cpu.
        ranks: a GPU each.
        tokens: on each rank; 0 for 8192 on cuda, 64 on cpu.
        skew: Zipf's exponent of the routing.
        factors: capacity factors of the static corners besides the one at which nothing drops.
        flags: run JAX's corners under each of XLA's flags for their exchanges too.
        device: cuda or cpu.
        seconds: to spend on each figure.
        save: write the figures to this file, a JSON object a line.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device is {device}: it must be cuda or cpu")
    small = Case("small", width=64, hidden=64, experts=8, top_k=2)
    if model and model not in MODELS:
        raise ValueError(f"no model is called {model}. There are: {', '.join(MODELS)}")
    if device == "cuda" and not gpus():
        raise ValueError("there is no NVIDIA GPU here: --device cpu measures a small layer")
    base = MODELS[model] if model else MODELS["qwen3-30b-a3b"] if device == "cuda" else small
    tokens = tokens or (8192 if device == "cuda" else 64)
    plan = Plan(replace(base, ranks=ranks, tokens=tokens, pattern="random"), skew, seconds)
    table = Table(title=f"{plan.case.name}, {ranks} ranks of {tokens} tokens, forward and backward", box=None,
                  title_justify="left", header_style="bold", padding=(0, 2, 0, 0))  # fmt: skip
    for column in ("corner", "ms a step", "dropped", "peak MB", "host waits", "launches", "device"):
        table.add_column(column, justify="left" if column in ("corner", "device") else "right")
    lines = []
    for figure, dropped in corners(plan, factors, flags, device == "cpu"):
        lines.append(msgspec.json.encode({"dropped": dropped} | msgspec.to_builtins(figure)).decode())
        if save:
            save.write_text("\n".join(lines) + "\n")
        if figure.error:
            table.add_row(figure.variant, figure.error[:90])
            continue
        count = ("?" if n is None else str(n) for n in (figure.syncs, figure.launches))
        peak = "?" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f}"
        table.add_row(
            figure.variant, f"{1e3 * figure.median:.3f}", f"{100 * dropped:.1f}%", peak, *count, figure.device
        )
    Console(width=None if sys.stdout.isatty() else 170, highlight=False).print(table)


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m parity.study.corners")
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
