"""What a compiler sees of the dispatch as P grows: one measurement in one process, a table of them, and a plot."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
from rich.table import Table

from parity.cases.files import writing
from parity.run.supervisor import Process

Way = Literal["none", "list_sum", "received_shape", "cpu_tensor_sum", "torch_impl", "shard_map", "vmap"]
WAYS: tuple[Way, ...] = get_args(Way)
JAX_WAYS = ("shard_map", "vmap")

# Tokens, width, experts per token, experts per rank: one rank can send another T * min(K, e) = 65,536 rows.
T, D, K, e = 32_768, 8, 2, 2


class Measured(msgspec.Struct):
    """One P and one way to size the permute (PyTorch) or to have ranks (JAX). None: not measured or absent."""

    framework: str
    version: str
    ranks: int
    way: str
    error: str = ""
    nodes: int | None = None  # of the graphs, forward and backward; for JAX, operations of the lowered program
    instructions: int | None = None  # JAX: of XLA's program
    symbols: int | None = None  # unbacked symbols in sizes of tensors
    symbols_in_all: int | None = None  # all symbols for which the compiler keeps a range
    terms: int | None = None  # number of terms of the longest size of any tensor
    permute_terms: int | None = None  # of the permute's size
    permute_terms_backward: int | None = None
    size: str = ""  # the permute's size
    range: list[str] = []  # what the compiler derives for it
    guards: int | None = None
    runtime_asserts: int | None = None
    syncs: int | None = None  # device-to-host waits of one eager step
    capture_s: float | None = None  # CPU seconds until the graphs are there; for JAX, to trace and lower
    compile_s: float | None = None  # CPU seconds from nothing to Inductor's code; for JAX, to XLA's
    peak_mib: float | None = None  # peak memory beyond what imports take


class Clock:
    """CPU seconds of this process and its children: unlike wall time, they hardly grow on a busy machine."""

    def __init__(self) -> None:
        self.start = self._now()

    def seconds(self) -> float:
        """CPU seconds since the clock was made."""
        return round(self._now() - self.start, 2)

    def _now(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)


def peak_mib() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(P: int, way: Way, inductor: bool = False, timeout: float = 600) -> Measured:
    """Run one measurement in a process of its own. An error is part of it, beside what was found before.

    `timeout`: seconds, without those in which the process waits for a CPU.
    """
    framework = "jax" if way in JAX_WAYS else "torch"
    command = [sys.executable, "-m", f"parity.capture.in_{framework}", str(P), way, *["inductor"] * inductor]
    with Process(command) as process:
        lines = [line for line in process.lines(timeout) if line.startswith("{")]
    found = msgspec.json.decode(lines[-1], type=Measured) if lines else Measured(framework, "", P, way)
    found.error = found.error or process.error.split("\n")[-1]
    return found


def table(found: Sequence[Measured]) -> Table:
    """One line per measurement."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("way", no_wrap=True)
    columns = ("P", "nodes", "XLA", "symbols", "longest", "permute", "back", "at most", "asserts", "guards", "syncs")
    for column in (*columns, "capture s", "compile s", "MiB"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("error", style="red")
    for m in found:
        numbers = (m.nodes, m.instructions, m.symbols, m.terms, m.permute_terms, m.permute_terms_backward)
        upper = _upper(m.range)
        more = (upper, m.runtime_asserts, m.guards, m.syncs, m.capture_s, m.compile_s, m.peak_mib)
        result.add_row(m.way, str(m.ranks), *("-" if n is None else str(n) for n in (*numbers, *more)), m.error)
    return result


def _upper(bound: list[str]) -> str | None:
    if not bound:
        return None
    return f"{int(bound[1]):,}" if bound[1].isdigit() else "unbounded"


LEGEND = """
nodes: of the captured graphs, forward and backward (JAX: operations of the lowered program; XLA: instructions that
XLA makes of them). symbols: unknown numbers in sizes of tensors. longest: terms of the longest size. permute, back:
terms of the permute's size, forward and backward. at most: the bound that the compiler derives for it, where one rank
can send another 65,536 rows. asserts, guards: what compiled code checks. syncs: how often an eager step waits for the
device. capture, compile: CPU seconds. MiB: memory on top of what importing takes."""


def plot(found: Sequence[Measured], path: Path) -> None:
    """Plot the terms of the permute's size, and the CPU time to capture and to compile, against P."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = {
        "permute_terms": "terms in the permute's size",
        "capture_s": "CPU seconds to capture",
        "compile_s": "CPU seconds to capture and compile",
    }
    styles = dict(zip(WAYS, ("o-", "s-", "^--", "D-", "v-", "x:", "+:"), strict=True))
    for axes, (field, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for way, style in styles.items():
            points = [(m.ranks, y) for m in found if m.way == way and (y := getattr(m, field)) is not None]
            if points:
                label = f"{'JAX' if way in JAX_WAYS else 'PyTorch'}, {way}"
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(title=title, xlabel="ranks P", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if field == "capture_s":
            axes.legend(fontsize=8)
    with writing(path):
        figure.savefig(path, dpi=150)
