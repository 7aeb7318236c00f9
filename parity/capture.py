"""What a compiler sees of the dispatch as P grows: one measurement in one process, a table of them, and a plot."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
from rich.table import Table

Way = Literal["none", "list_sum", "received_shape", "cpu_tensor_sum", "torch_impl"]
WAYS: tuple[Way, ...] = get_args(Way)


class Measured(msgspec.Struct):
    """One P and one way to size the permute (PyTorch), or the static path (JAX). None: not measured."""

    framework: str
    version: str
    ranks: int
    way: str
    error: str = ""
    nodes: int | None = None  # of the graphs, forward and backward; for JAX, instructions of the compiled program
    symbols: int | None = None  # unbacked symbols in sizes of tensors
    symbols_in_all: int | None = None  # all symbols that the compiler keeps a range of
    terms: int | None = None  # of the longest size of any tensor
    permute_terms: int | None = None  # of the permute's size
    permute_terms_backward: int | None = None
    size: str = ""  # the permute's size
    range: list[str] = []
    guards: int | None = None
    runtime_asserts: int | None = None
    syncs: int | None = None  # device-to-host waits of one eager step
    capture_s: float | None = None  # until the graphs are there; for JAX, to trace and lower
    compile_s: float | None = None  # the same and Inductor; for JAX, XLA alone
    peak_mib: float | None = None  # memory on top of what importing takes
    text_kib: float | None = None  # JAX: size of the lowered program


def measure_all(
    ranks: Sequence[int], ways: Sequence[Way], frameworks: Sequence[str], inductor: bool, timeout: float
) -> Iterator[Measured]:
    """Measure every combination, each in a process of its own, one at a time, as they share the machine."""
    for P in ranks:
        if "torch" in frameworks:
            for way in ways:
                yield measured("torch", P, way, timeout, [way, "inductor" if inductor else "-"])
        if "jax" in frameworks:
            yield measured("jax", P, "static", timeout, [])


def measured(framework: str, P: int, way: str, timeout: float, arguments: list[str]) -> Measured:
    """One measurement; what went wrong is part of it."""
    command = [sys.executable, "-m", f"parity.capture_{framework}", str(P), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Measured(framework, "", P, way, error=f"not done after {timeout:g} s")
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return Measured(framework, "", P, way, error=last)
    return msgspec.json.decode(run.stdout.splitlines()[-1], type=Measured)
