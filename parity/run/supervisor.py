"""Run the problems in a folder in each framework, in processes of their own."""

import os
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

import msgspec

from parity.cases.case import Case
from parity.run.backend import Backend, BackendError, MissingError, Setting

DONE = "done: "  # before the name of a case whose trace is written


@dataclass
class Worker:
    """One process that runs some of the cases of one backend."""

    backend: Backend
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
                done.put((self.backend.name, line.removeprefix(DONE).strip()))
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
    folder: Path, homes: dict[str, Path], backends: Sequence[Backend], cases: Sequence[Case], setting: Setting,
    seconds: dict[str, float],
) -> Generator[tuple[str, str]]:  # fmt: skip
    """Start every backend, each from its home folder, and yield (backend, case) as each trace is written.

    All at once, and JAX, which spends its time compiling, as a process for each core, up to eight; but one after the
    other where a case's weights are so large that only one of them fits a GPU. Whatever happens, no process is left.
    Fills in `seconds` by backend.

    Raises BackendError with the cause of the first that failed.
    """
    one_by_one = any(case.real_size for case in cases)
    compiling = 1 if one_by_one or setting.jax_ranks == "processes" else min(8, os.cpu_count() or 1, len(cases))
    workers = []
    for backend in backends:
        shares = compiling if backend.framework == "jax" else 1
        for share in range(shares):
            part = msgspec.structs.replace(setting, share=share, shares=shares)
            asked = [msgspec.json.encode(a).decode() for a in (backend, part)]
            command = [sys.executable, "-m", "parity.run.worker", str(folder), *asked]
            stderr = folder / f"{backend.name}-{share}.stderr"
            workers.append(Worker(backend, command, stderr, homes[backend.name], setting.device))
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
        seconds[worker.backend.name] = max(seconds.get(worker.backend.name, 0), worker.seconds)


def gpus() -> int:
    """How many NVIDIA GPUs programs may use here, without a framework asking, which could keep memory."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([gpu for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")) or list(Path("/dev").glob("dxg")))  # dxg: under WSL


def _explain(worker: Worker) -> BackendError:
    backend = worker.backend
    for package in backend.needs:
        if f"No module named '{package}'" in worker.error:
            what = f"{package} is not installed: pip install -e '.[{package}]', or name the other --backend only"
            return MissingError(backend.name, what)
    return BackendError(backend.name, f"{backend.name}: {worker.error[-2000:]}")


def end_with_parent() -> None:
    """End this process and all that it started when the one that started it is gone: its standard input closes."""

    def wait_for_the_end() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a forked rank would inherit
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
