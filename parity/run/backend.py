"""Run the problems in a folder in each framework, in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from parity.cases.case import Case

# The two sides, and the other two corners: strategy and framework apart.
BACKENDS = ("torch", "jax", "torch-static", "jax-dynamic")
SIDES = BACKENDS[:2]
DONE = "done: "  # before the name of a case whose trace is written


class BackendError(Exception):
    """A framework is not installed, or its run ended with an error: whose, and in which stage, where that is known."""

    def __init__(self, backend: str, message: str) -> None:
        super().__init__(message)
        self.backend = backend
        place = re.search(r" in (\w+) of case ", message)
        self.stage = place[1] if place else ""


class MissingError(BackendError):
    """A framework is not installed."""


@dataclass
class Worker:
    """One process that runs some of the cases of one backend."""

    backend: str
    command: list[str]
    stderr: Path
    cwd: Path
    device: str
    seconds: float = 0.0
    error: str = ""

    def start(self, done: Queue[tuple[str, str] | None]) -> None:
        """Start the process, in a session of its own so that all of it can be ended, and follow it in a thread."""
        # Forked ranks must not find a machine's worth of threads each, nor one framework take all of a GPU's memory.
        own = {"JAX_PLATFORMS": self.device, "OMP_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment = os.environ | own
        self.began = time.perf_counter()
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=environment, start_new_session=True, cwd=self.cwd,
            )  # fmt: skip
        self.thread = threading.Thread(target=self._follow, args=(done,), daemon=True)
        self.thread.start()

    def _follow(self, done: Queue[tuple[str, str] | None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print there too
            if line.startswith(DONE):
                done.put((self.backend, line.removeprefix(DONE).strip()))
        if self.process.wait():
            self.error = self.stderr.read_text().strip() or f"ended with exit code {self.process.returncode}"
        self.seconds = time.perf_counter() - self.began
        done.put(None)

    def end(self) -> None:
        """End the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.thread.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def run(
    folder: Path, homes: dict[str, Path], cases: Sequence[Case], device: str, jax_ranks: str, timeout: float,
    seconds: dict[str, float],
) -> Generator[tuple[str, str]]:  # fmt: skip
    """Start every backend, each from its home folder, and yield (backend, case) as each trace is written.

    All at once, and JAX, which spends its time compiling, as a process for each core, up to eight; but one after the
    other where a case's weights are so large that only one of them fits a GPU. Whatever happens, no process is left.
    Fills in `seconds` by backend.

    Raises BackendError with the cause of the first that failed.
    """
    one_by_one = any(case.real_size for case in cases)
    jax_shares = 1 if one_by_one or jax_ranks == "processes" else min(8, os.cpu_count() or 1, len(cases))
    torch = [[str(timeout), device]]
    jax = [[jax_ranks, str(share), str(jax_shares)] for share in range(jax_shares)]
    workers = [
        Worker(
            backend,
            [sys.executable, "-m", f"parity.run.in_{framework(backend)}", backend, str(folder), *more],
            folder / f"{backend}-{share}.stderr",
            home,
            device,
        )
        for backend, home in homes.items()
        for share, more in enumerate(torch if framework(backend) == "torch" else jax)
    ]
    done: Queue[tuple[str, str] | None] = Queue()
    started: list[Worker] = []
    try:
        for group in [[worker] for worker in workers] if one_by_one else [workers]:
            for worker in group:
                worker.start(done)
                started.append(worker)
            for _ in group:
                yield from iter(done.get, None)
                for worker in group:
                    if worker.error:
                        raise _explain(worker)
    finally:
        for worker in started:
            worker.end()
    for worker in workers:
        seconds[worker.backend] = max(seconds.get(worker.backend, 0), worker.seconds)


def gpus() -> int:
    """How many NVIDIA GPUs programs may use here, without a framework asking, which could keep memory."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([gpu for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")) or list(Path("/dev").glob("dxg")))  # dxg: under WSL


def framework(backend: str) -> str:
    """torch or jax."""
    return backend.split("-")[0]


def _explain(worker: Worker) -> BackendError:
    name = framework(worker.backend)
    if f"No module named '{name}'" in worker.error:
        what = f"{name} is not installed: pip install -e '.[{name}]', or --backend to run the other side only"
        return MissingError(worker.backend, what)
    return BackendError(worker.backend, f"{worker.backend}: {worker.error[-2000:]}")


def end_with_parent() -> None:
    """End this process and all that it started when the one that started it is gone: its standard input closes."""

    def wait_for_the_end() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a forked rank would inherit
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
