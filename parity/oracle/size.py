"""How much memory a case takes at least. A case that cannot fit is refused before hours are spent on it."""

import math
import os
from contextlib import suppress
from pathlib import Path

from parity.cases.case import Case
from parity.oracle.rows import Layout
from parity.oracle.tolerances import numpy_dtype
from parity.oracle.windows import STRIDE

FLOAT64 = 8


def of_oracle(case: Case) -> int:
    """Bytes that are there at once when a case is drawn. Measured peaks were up to several times as many, never fewer.

    For each row, output and gradients count in float64 and as stored, and as much again for temporaries. Weights count
    as stored and as computed with. Their gradients count too; at real size only some of their rows are there.
    """
    stored, rows = numpy_dtype(case.dtype).itemsize, case.ranks * case.assignments
    of_rows = rows * case.width * (6 * FLOAT64 + 4 * stored)
    of_scores = case.ranks * case.tokens * case.experts * 4 * FLOAT64
    return of_rows + of_scores + case.width * case.experts * FLOAT64 + _weights(case) * (stored + FLOAT64 * _held(case))


def of_run(case: Case, layout: Layout) -> int:
    """Bytes that one run of a backend holds and returns in one step: each stage on its own, and the whole layer."""
    rows = case.ranks * case.assignments
    if layout == "static":
        rows = max(rows, case.ranks * case.bins * case.capacity)
    return (8 * rows * case.width + _weights(case)) * numpy_dtype(case.dtype).itemsize


def _weights(case: Case) -> int:
    """How many numbers all experts' matrices are made of. At real size each is a window of its bank."""
    matrices, one = 2 + case.gated, case.width * case.hidden
    drawn = case.real_size and case.checkpoint is None and case.recording is None
    return matrices * (one + (case.experts - 1) * STRIDE if drawn else one * case.experts)


def _held(case: Case) -> int:
    """How many arrays in float64 there are of them: what is computed with, and its gradient."""
    return 1 if case.real_size else 2


# Where Linux says how much memory a container may use, in the two versions of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available() -> float:
    """Bytes that programs can still get by the system, swap included, or that the container may use in all."""
    limits = [math.inf]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            limits.append(float(int(path.read_text())))
    return min(of_system(), *limits)


def of_system() -> float:
    """Bytes that the system says programs can still get, swap included."""
    with suppress(OSError, ValueError, IndexError):
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * sum(int(found[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    with suppress(OSError, ValueError, AttributeError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def check_size(case: Case, layouts: tuple[Layout, ...] = ()) -> None:
    """Raises ValueError where the oracle, and the largest of runs in these layouts beside it, cannot be in memory."""
    oracle, run = of_oracle(case), max((of_run(case, layout) for layout in layouts), default=0)
    if oracle + run <= (there := available()):
        return
    of_which = f" ({_gb(oracle)} for the oracle, {_gb(run)} for a run)" if run else ""
    raise ValueError(
        f"case {case.name} needs at least {_gb(oracle + run)} of memory{of_which}, and {_gb(there)} are available: "
        f"use fewer --tokens ({case.tokens} on each of {case.ranks} ranks), --experts ({case.experts}) or a smaller "
        f"--width ({case.width}), --hidden ({case.hidden}) or --capacity-factor"
    )


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB"
