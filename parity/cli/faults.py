"""`python -m parity faults`."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import tyro

from parity.cases.presets import PRESETS
from parity.cli.check import ranks_of_jax, require_of
from parity.cli.shared import MATCH, MISMATCH, Page
from parity.judge.engine import progress, run_cases
from parity.judge.power import power
from parity.report.terminal import Found, describe, power_table, print_faults
from parity.run import faults, ours
from parity.run.backend import BackendError, MissingError, Setting


@dataclass
class Command:
    """Would a bug be caught, and blamed on the right backend and stage?

    Lists the faults that can be planted, each with its source: a public report of such a bug, or "constructed".
    With --run, plants each fault and checks whether it is caught.

    Exit code with --run: 0 when all were caught and blamed, 1 otherwise.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity faults
        python -m parity faults torch-row-lost --run
        python -m parity faults --power
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of faults. Default: all."""
    run: bool = False
    """Plant each fault and check whether it is caught and blamed correctly."""
    power: bool = False
    """Print the smallest relative error that is caught in each array instead, in float32 and bfloat16:
    when one row is off (the median and the worst of all rows), and when all rows are."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to run on. Faults too large for any preset are skipped and not counted, as on a CPU are those of a GPU."""


def run(command: Command) -> int:
    """Run `faults`; its exit code."""
    chosen = [faults.find(name) for name in command.names or faults.FAULTS]
    console = Page(172)
    if command.power:
        base = replace(PRESETS["zipf"], hidden=48)
        console.print(power_table([power(replace(base, dtype=dtype)) for dtype in ("float32", "bfloat16")]))
        return MATCH
    if not command.run:
        print_faults(console, [(fault, None) for fault in chosen])
        return MATCH
    ready = [fault for fault in chosen if not fault.shown_by and (command.device == "cuda" or not fault.gpu_only)]
    require_of([ours.BACKENDS[fault.backend] for fault in ready])
    with progress() as bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        trials = pool.map(partial(try_fault, device=command.device), ready)
        tried = list(zip(ready, bar.track(trials, total=len(ready), description="faults"), strict=True))
    print_faults(console, tried)
    for fault in chosen:
        if fault not in ready:
            why = f"no preset shows it, but {fault.shown_by}" if fault.shown_by else fault.gpu_only
            console.print(f"{fault.name}: not run, and not counted: {why}")
    caught = sum(result.caught for _, result in tried)
    blamed = sum((result.backend, result.stage) == (fault.backend, fault.stage) for fault, result in tried)
    console.print(f"caught {caught} of {len(tried)}, blamed {blamed} of {len(tried)}")
    return MATCH if caught == blamed == len(tried) else MISMATCH


def try_fault(fault: faults.Fault, device: str = "cpu") -> Found:
    """Plant a fault, run its preset on its backend only, and say who was blamed.

    A run that ends in an error, or a rank that raises one, counts as caught only where the fault is one that does that.
    """
    try:
        cases, ranks = [PRESETS[fault.preset]], ranks_of_jax("auto", device, PRESETS[fault.preset].ranks)
        setting = Setting(device, ranks, timeout=10 if device == "cpu" else 60)
        report = run_cases(cases, [ours.BACKENDS[fault.backend]], setting, fault=fault, show_progress=False)
    except MissingError:
        raise
    except BackendError as error:
        return Found(fault.name in faults.END_THE_RUN, error.backend, error.stage, "the run ended: " + str(error))
    assert report is not None
    verdict = report.blamed(fault.preset)
    if verdict is None:
        return Found(False, "", "", "")
    compared = any(check.rows for check in report.checks[fault.preset])
    caught = compared or fault.name in faults.END_THE_RUN
    return Found(caught, " and ".join(verdict.backends), verdict.stage, describe(verdict.check))
