"""A rank that dies or hangs ends the run, with the rank, the stage and the cause, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parity.run.faults import PACKAGES, ROOT, Fault, plant

CHECK = [sys.executable, "-m", "parity", "check", "zipf", "--backend", "torch", "--timeout", "10"]


def broken(tmp_path: Path, line: str) -> Path:
    """A copy of the packages in which rank 2 does `line` before it sends its tokens."""
    old = "    check_splits(splits.sent, x_ND.shape[0])\n"
    new = f"{old}    import os, signal, time\n    if dist.is_initialized() and dist.get_rank() == 2:\n        {line}\n"
    return plant(Fault("broken", "torch", "send_tokens", "", "torch_impl/exchange.py", old, new), tmp_path / "copy")


def descendants(pid: int) -> list[int]:
    """Every process whose session began under `pid`: its children, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.append(pid)
    return running


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "torch: rank 2 of 4 was ended by SIGKILL in send_tokens of case zipf"),
        (
            "raise RuntimeError('no more')",
            "torch: rank 2 of 4 failed in send_tokens of case zipf: RuntimeError: no more",
        ),
        # whichever rank notices first; gloo, which notices by the size of a message, may abort its process
        ("x_ND = x_ND[:, :5]", "in send_tokens of case zipf"),
        (
            "time.sleep(600)",
            r"torch: rank 2 of 4 hangs in send_tokens of case zipf \(exchange.py:\d+\): no rank got on for 10 s; "
            "the others are in send_tokens of case zipf",
        ),
    ],
    ids=["killed", "raises", "disagrees-on-shapes", "hangs"],
)
def test_a_rank_that_dies_or_hangs_is_named(tmp_path, line, cause):
    start = time.monotonic()
    run = subprocess.run(CHECK, cwd=broken(tmp_path, line), capture_output=True, text=True, timeout=120)
    assert run.returncode == 3, run.stdout + run.stderr
    assert re.search(cause, " ".join(run.stderr.split())), run.stderr
    assert time.monotonic() - start < 90


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "killed"]
)
def test_nothing_is_left_running(tmp_path, sent, code):
    process = subprocess.Popen(
        [*CHECK[:-1], "60"], cwd=broken(tmp_path, "time.sleep(600)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(descendants(process.pid)) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    started = descendants(process.pid)
    assert len(started) >= 5  # the launcher and four ranks
    os.kill(process.pid, sent)
    process.communicate(timeout=30)
    assert process.returncode == code
    deadline = time.monotonic() + 10
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(started) == []


def test_two_checks_at_once(tmp_path):
    small = ["--ranks", "2", "--tokens", "2", "--experts", "4", "--backend", "torch"]
    runs = [
        subprocess.Popen([sys.executable, "-m", "parity", "check", *small, "--seed", str(seed)], stdout=subprocess.PIPE)
        for seed in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs


def test_the_copy_is_of_this_project():
    assert all((ROOT / package / "__init__.py").exists() for package in PACKAGES)
