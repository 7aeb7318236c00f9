"""A whole layer on every backend, timed: one step forward and backward, beside what it drops.

Backends of static layout run at the capacity factor at which this routing drops nothing, so that all do the same work,
and at the factors asked for, at which all of them drop the same rows.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import msgspec
from rich.table import Table

from parity.bench.plan import Figure
from parity.cases.case import Case
from parity.run.backend import Backend
from parity.run.ours import BACKENDS
from parity.run.supervisor import Process
from parity.study.routing import Routing, counts, zipf_routing
from parity.study.sweep import measure

# XLA's flags for its exchanges on GPUs (jaxlib 0.10.2 and 0.11.2), by layout. Each is compared with no flag; the
# table says if the installed jaxlib does not know a flag.
REGISTERED = "--xla_gpu_enable_nccl_user_buffers_in_default_space=true"
FLAGS = {
    "static": (REGISTERED,),
    "ragged": (
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
    """What every backend runs."""

    case: Case
    skew: float
    seconds: float
    layout: str = ""  # of the backend that runs it
    factor: str | None = None  # capacity factor of a static layout


def routing_of(plan: Plan) -> Routing:
    """The routing of one step, the same for all backends."""
    return zipf_routing(plan.case, plan.skew, 1)


def no_drop_factor(routing: Routing) -> str:
    """The least capacity factor at which this routing drops nothing, with one bin per rank, as a fraction."""
    P, N = routing.case.ranks, routing.case.tokens * routing.case.top_k
    fullest = counts(routing).reshape(P, P, -1).sum(axis=-1).max()
    return str(Fraction(int(fullest) * P, N))


def run(backend: Backend, plan: Plan, flags: str = "", cpu: bool = True) -> Figure:
    """Run one backend in a process of its own; if it fails, return a figure with the error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    if cpu:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    module = f"parity.study.layer_in_{backend.framework}"
    command = [sys.executable, "-m", module, msgspec.json.encode(plan).decode()]
    with Process(command, environment=environment) as process:
        lines = [line for line in process.lines(limit=120) if line.startswith("{")]
    if process.error or not lines:
        said = [line for line in process.error.splitlines() if re.match(r"[\w.]*Error: ", line)]
        last = (said or process.error.splitlines() or ["it printed no figure"])[-1]
        return Figure("", backend.framework, "", "", "", 0, 0, 0, 0, error=last[:500])
    return msgspec.json.decode(lines[-1], type=Figure)


def layers(plan: Plan, factors: Sequence[str], flags: bool, cpu: bool) -> Iterator[tuple[Figure, float]]:
    """Yield each backend's figures and the rate of assignments that it drops."""
    routing = routing_of(plan)
    for backend in BACKENDS.values():
        static = backend.layout == "static"
        under = FLAGS.get(backend.layout, ()) if flags and backend.framework == "jax" else ()
        for factor in dict.fromkeys([no_drop_factor(routing), *factors]) if static else [None]:
            one = msgspec.structs.replace(plan, layout=backend.layout, factor=factor)
            dropped = measure(routing, factor, "rank", "token").dropped if static else 0.0
            name = f"{backend.name}, factor {float(Fraction(factor)):.2f}" if factor else backend.name
            for flag in ("", *under):
                figure = run(backend, one, flag, cpu)
                figure.shape, figure.part, figure.direction = plan.case.name, "layer", "forward+backward"
                figure.variant = f"{name} {flag}".strip()
                yield figure, dropped


def layer_table(case: Case, found: Sequence[tuple[Figure, float]]) -> Table:
    """One row per figure, or the reason why there is none."""
    table = Table(title=f"{case.name}, {case.ranks} ranks of {case.tokens} tokens, forward and backward", box=None,
                  title_justify="left", header_style="bold", padding=(0, 2, 0, 0))  # fmt: skip
    for column in ("backend", "ms a step", "dropped", "peak MB", "host waits", "launches", "device"):
        table.add_column(column, justify="left" if column in ("backend", "device") else "right")
    for figure, dropped in found:
        if figure.error:
            table.add_row(figure.variant, figure.error[:90])
            continue
        count = ("?" if n is None else str(n) for n in (figure.syncs, figure.launches))
        peak = "?" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f}"
        table.add_row(
            figure.variant, f"{1e3 * figure.median:.3f}", f"{100 * dropped:.1f}%", peak, *count, figure.device
        )
    return table
