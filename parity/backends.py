"""Run the problems in a folder in each framework, in processes of their own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("torch", "jax")


class BackendError(Exception):
    """A framework is not installed, or its run ended with an error."""


@dataclass
class Result:
    """How long a backend took, and what went wrong."""

    seconds: float = 0.0
    error: str = ""


def run(folder: Path, backends: tuple[str, ...], jax_ranks: str, case_done: Callable[[str], None]) -> dict[str, float]:
    """Start every backend at once; `case_done(backend)` is called after each case. Seconds taken, by backend.

    Raises BackendError with the end of the standard error of the first that failed.
    """
    commands = {
        "torch": [sys.executable, "-m", "parity.run_torch", str(folder)],
        "jax": [sys.executable, "-m", "parity.run_jax", str(folder), jax_ranks],
    }
    # A rank is a CPU device here; and forked ranks must not find a machine's worth of threads each.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    results = {backend: Result() for backend in backends}

    def follow(backend: str) -> None:
        start = time.perf_counter()
        with (folder / f"{backend}.stderr").open("w+") as stderr:
            process = subprocess.Popen(
                commands[backend], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
            assert process.stdout is not None
            for _ in process.stdout:
                case_done(backend)
            if process.wait():
                stderr.seek(0)
                results[backend].error = stderr.read()
        results[backend].seconds = time.perf_counter() - start

    threads = [threading.Thread(target=follow, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for backend, result in results.items():
        if f"No module named '{backend}'" in result.error:
            raise BackendError(
                f"{backend} is not installed: pip install -e '.[{backend}]', or --backend for one side only"
            )
        if result.error:
            raise BackendError(f"{backend} crashed. The end of what it said:\n{result.error[-2000:]}")
    return {backend: result.seconds for backend, result in results.items()}
