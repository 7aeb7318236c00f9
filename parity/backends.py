"""Run the problems in a folder in each framework, in processes of their own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

BACKENDS = ("torch", "jax")


class BackendError(Exception):
    """A framework is not installed, or its run ended with an error."""


@dataclass
class Worker:
    """One process that runs some of the cases of one backend."""

    backend: str
    command: list[str]
    stderr: Path
    seconds: float = 0.0
    error: str = ""

    def follow(self, done: Queue[tuple[str, str] | None]) -> None:
        """Run to the end, reporting (backend, case) for each case done, and None at last."""
        start = time.perf_counter()
        # A rank is a CPU device here; and forked ranks must not find a machine's worth of threads each.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        with self.stderr.open("w+") as stderr:
            process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
            assert process.stdout is not None
            for line in process.stdout:
                done.put((self.backend, line.strip()))
            if process.wait():
                stderr.seek(0)
                self.error = stderr.read() or f"exit code {process.returncode}"
        self.seconds = time.perf_counter() - start
        done.put(None)


def run(
    folder: Path, backends: tuple[str, ...], jax_ranks: str, seconds: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """Start every backend at once and yield (backend, case) as each case's trace is written; fill in `seconds`.

    JAX spends its time compiling, so it gets a process for each core, up to four.

    Raises BackendError with the end of the standard error of the first that failed.
    """
    shares = {"torch": 1, "jax": min(4, os.cpu_count() or 1)}
    workers = [
        Worker(
            backend,
            [sys.executable, "-m", f"parity.run_{backend}", str(folder)]
            + ([jax_ranks, str(share), str(shares[backend])] if backend == "jax" else []),
            folder / f"{backend}-{share}.stderr",
        )
        for backend in backends
        for share in range(shares[backend])
    ]
    done: Queue[tuple[str, str] | None] = Queue()
    for worker in workers:
        threading.Thread(target=worker.follow, args=(done,)).start()
    for _ in workers:
        yield from iter(done.get, None)
    for worker in workers:
        if f"No module named '{worker.backend}'" in worker.error:
            raise BackendError(
                f"{worker.backend} is not installed: pip install -e '.[{worker.backend}]', "
                "or --backend to run the other side only"
            )
        if worker.error:
            raise BackendError(f"{worker.backend} crashed. The end of what it said:\n{worker.error[-2000:]}")
        seconds[worker.backend] = max(seconds.get(worker.backend, 0), worker.seconds)
