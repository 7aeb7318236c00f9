"""Processes that have imported PyTorch and JAX before they start: forks of one that did, for tests that start many.

A test sees `python -m parity ...` as ever: a command with its own arguments, folder, environment, files and exit code,
which imports this project afresh from where it stands. Only what others wrote is there already. Not for tests of how
processes are watched and ended: what is forked is no child of the command.

    command (this file, as a script)  --its arguments, folder, environment and files-->  server  --fork-->  its program
                                      <----------------- exit code ------------------
"""

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path

HEAVY = (
    "torch.distributed", "torch.fx.experimental.symbolic_shapes", "jax.numpy", "jax.experimental.multihost_utils",
    "ml_dtypes", "safetensors.numpy", "rich.progress", "rich.table", "tyro",
)  # fmt: skip

# Read when what is imported here is imported: with others of these, a command runs as it would without a server.
AT_IMPORT = ("PYTHON", "JAX_", "OMP_", "OPENBLAS_", "MKL_", "LD_", "TORCH_", "PYTORCH_")

OPTIMIZE_LITTLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"


def at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """What was read of an environment, less what can be changed afterwards. Without a platform, JAX takes the CPU."""
    found = {name: value for name, value in environment.items() if name.startswith(AT_IMPORT)}
    return {"JAX_PLATFORMS": "cpu"} | found | {"PYTHONPATH": "", OPTIMIZE_LITTLE: ""}


def path_of(environment: Mapping[str, str]) -> list[str]:
    return [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]


class Server:
    """Started when it is made; `python` is an executable for those who would start `sys.executable -m module`."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python, path = folder / "python", folder / "socket"
        # Without what Python reads at its start, it starts in a hundredth of a second.
        self.python.write_text(f'#!/bin/sh\nexec "{python}" -I -S "{__file__}" "{path}" "{python}" "$@"\n')
        self.python.chmod(0o755)
        command = [python, "-c", f"import warm; warm.serve({str(path)!r}, {str(self.python)!r})"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        (folder / "environment").write_text(json.dumps(at_import(environment)))
        self.process = subprocess.Popen(
            command, cwd=Path(__file__).parent, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it is ready

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(path: str, python: str) -> None:
    """Import, then fork whatever is asked for, until standard input closes."""
    for name in HEAVY:
        import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    os.write(1, b"ready\n")
    os.dup2(2, 1)
    running: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor of the process: its number, and who asked
    while True:
        ready, _, _ = select.select([0, listening, *running, *(asker for _, asker in running.values())], [], [])
        if 0 in ready:  # whoever started it is gone
            return
        if listening in ready:
            asker, _ = listening.accept()
            pid = _start(asker, python, [listening, *(asker for _, asker in running.values())])
            running[os.pidfd_open(pid)] = pid, asker
        for process, (pid, asker) in list(running.items()):
            if process in ready:
                del running[process]
                os.close(process)
                _, status = os.waitpid(pid, 0)
                _end(pid)
                with suppress(BrokenPipeError), asker:
                    asker.send(str(os.waitstatus_to_exitcode(status)).encode())
            elif asker in ready:  # it was ended, and so should be what it asked for
                _end(pid)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _start(asker: socket.socket, python: str, others: list[socket.socket]) -> int:
    """Fork a process that runs what is asked for."""
    fds = array.array("i")
    data, ancillary, _, _ = asker.recvmsg(2**20, socket.CMSG_SPACE(3 * fds.itemsize))
    fds.frombytes(ancillary[0][2][: 3 * fds.itemsize])
    while not data.endswith(b"\n"):
        data += asker.recv(2**20)
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        return pid
    os.setsid()
    for one in (asker, *others):
        one.close()
    for to, fd in enumerate(fds):
        os.dup2(fd, to)
        os.close(fd)
    asked = json.loads(data)
    os.chdir(asked["cwd"])
    inherited = len(path_of(os.environ))
    os.environ.clear()
    os.environ |= asked["environment"]
    code = 1
    try:
        code = _run(asked["arguments"], python, inherited)
    finally:
        os._exit(code)


def _run(arguments: list[str], python: str, inherited: int) -> int:
    """`python -m module ...`, as Python itself would do it, from the first import to the last flush."""
    import atexit
    import io
    import runpy
    import threading
    import traceback

    sys.executable, sys.path[: 1 + inherited] = python, [os.getcwd(), *path_of(os.environ)]
    del sys.modules["warm"]
    sys.argv = ["-m", *arguments[2:]]
    for name, fd, mode in (("stdin", 0, "rb"), ("stdout", 1, "wb"), ("stderr", 2, "wb")):
        file = open(fd, mode, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(file, "utf-8", line_buffering=fd == 2 or os.isatty(fd))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import_module("jax").config.update(OPTIMIZE_LITTLE.lower(), os.environ.get(OPTIMIZE_LITTLE) == "1")
    code: object = 0
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    return code if isinstance(code, int) else 0


def ask(path: str, python: str, arguments: list[str]) -> int:
    """The command: have it run, and wait for its exit code."""
    environment = dict(os.environ)
    known = at_import(environment) == json.loads(Path(path).with_name("environment").read_text())
    others = {"sitecustomize", *(name.split(".")[0] for name in HEAVY)}
    instead = any(path.stem in others for folder in (".", *path_of(environment)) for path in Path(folder).glob("*"))
    if arguments[:1] != ["-m"] or not known or instead:
        os.execv(python, [python, *arguments])
    asked = {"arguments": arguments, "cwd": os.getcwd(), "environment": environment}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        for fd in (0, 1, 2):
            os.close(fd)
        code = int(server.recv(100) or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(ask(sys.argv[1], sys.argv[2], sys.argv[3:]))
