"""A command that is told to end does so within two seconds, says it, and leaves nothing: no process and no folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parity.run.patience import under

LARGE = ["--ranks", "4", "--tokens", "4096", "--width", "128", "--hidden", "128", "--experts", "16", "--top-k", "4"]

# In a long computation that lets no signal in, or waiting for threads in one.
STUCK = """
import sys, time
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from parity.cli import main, report
from parity.run.ending import temporary_folder

def large():
    print("begun", flush=True)
    a = np.ones((9000, 9000))
    a @ a @ a

def in_threads():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(large).result()

def run(_):
    with temporary_folder():
        {"main": large, "threads": in_threads}[sys.argv.pop()]()

report.run = run
main()
"""


def told(command: list[str], folder: Path, sent: signal.Signals, ready) -> tuple[int, float, str, list[int]]:
    """Its exit code, for how long it went on, what it said, and what is left running."""
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ready(process)
            started, begin = under(process.pid), time.perf_counter()
            process.send_signal(sent)
            _, said = process.communicate(timeout=30)
            took = time.perf_counter() - begin
        finally:
            process.kill()
    time.sleep(0.3)
    return process.returncode, took, said, [pid for pid in started if Path(f"/proc/{pid}/cwd").exists()]


def wait_for(done) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
@pytest.mark.parametrize("where", ["main", "threads"])
def test_in_a_computation_that_lets_no_signal_in(tmp_path, where, sent):
    def ready(process):
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.3)

    command = [sys.executable, "-c", STUCK, "report", where]
    code, took, said, left = told(command, tmp_path, sent, ready)
    assert (code, said, left) == (128 + sent, "stopped; nothing is left running\n", [])
    assert took < 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_check_whose_oracle_draws_in_threads(tmp_path, sent):
    """While a backend runs."""

    def ready(process):
        wait_for(lambda: len(under(process.pid)) > 1)
        time.sleep(1.5)
        assert any(tmp_path.glob("parity-*"))

    command = [sys.executable, "-m", "parity", "check", *LARGE, "--backend", "torch"]
    code, took, said, left = told(command, tmp_path, sent, ready)
    assert (code, left) == (128 + sent, [])
    assert "stopped; nothing is left running\n" in said
    assert "Traceback" not in said
    assert took < 2
    assert not [*tmp_path.glob("parity-*")]


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from parity.run import ending; "
    code += "ending.end_when_told(); signal.raise_signal(signal.SIGHUP); import time; time.sleep(2); print('on')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "on\n")
