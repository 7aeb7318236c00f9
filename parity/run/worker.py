"""A process that runs some of the cases of one backend: `python -m parity.run.worker FOLDER BACKEND SETTING`.

With one more argument it stays, and runs the requests that it reads from standard input.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import msgspec

from parity.run.backend import Backend, Setting, resolve
from parity.run.supervisor import answer, end_with_parent, only_answers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe-parity"


def keep_what_xla_compiles(folder: Path) -> None:
    """Cache every compiled program for all processes and the next run, because compiling takes longer than running.

    JAX finds a program by its text, its options and its own version; machines that differ have folders of their own.
    Environment variables about JAX's cache are left as they are.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    machine = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / f"jax-{machine}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def more(heard: "SimpleQueue[bytes]") -> Iterator[list[str]]:
    """Yield each request from standard input (folder, backend and setting, a line each) until it closes."""
    rest = b""
    while True:
        *lines, rest = (rest + heard.get()).split(b"\n")
        yield from (msgspec.json.decode(line, type=list[str]) for line in lines)


if __name__ == "__main__":
    heard: SimpleQueue[bytes] = SimpleQueue()
    end_with_parent(heard.put)
    only_answers()
    asked = sys.argv[1:4]
    keep_what_xla_compiles(CACHE)
    kept = bool(sys.argv[4:])
    for folder, backend, setting in chain([asked], more(heard) if kept else ()):
        record = msgspec.json.decode(backend, type=Backend)
        run = resolve(record.run)
        answer("")
        run(record, Path(folder), msgspec.json.decode(setting, type=Setting))
        if kept:
            answer("")  # all that it started has ended: nobody writes into the folder any more
