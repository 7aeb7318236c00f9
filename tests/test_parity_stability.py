"""A rank that dies or hangs ends the run, with the rank, the stage and the cause, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_supervisor import alive

from parity.run.faults import PACKAGES, ROOT, Fault, plant
from parity.run.patience import under

CHECK = [sys.executable, "-m", "parity", "check", "zipf", "--timeout", "5"]
TORCH = ("torch", "    check_splits(splits.sent, x_ND.shape[0])\n", "dist.is_initialized() and dist.get_rank() == 2")
JAX = ("jax", "    return _all_to_all(x_BCD, axis_name)\n", "jax.process_index() == 2 or jax.process_count() == 1")


def broken(tmp_path: Path, line: str, side: tuple[str, str, str] = TORCH) -> Path:
    """A copy of the packages in which rank 2 does `line` before it sends its tokens; JAX, as it traces that."""
    backend, old, where = side
    new = f"    import os, signal, time\n    if {where}:\n        {line}\n{old}"
    return plant(
        Fault("broken", backend, "send_tokens", "", f"{backend}_impl/exchange.py", old, new), tmp_path / "copy"
    )


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        # isolated stages come first in PyTorch, and note where they are
        ("os.kill(os.getpid(), signal.SIGKILL)", "torch: rank 2 of 4 was ended by SIGKILL in send_tokens of case zipf"),
        (
            "raise RuntimeError('no more')",
            "torch: rank 2 of 4 failed in send_tokens of case zipf: RuntimeError: no more",
        ),
        # whichever rank notices first; gloo, which notices by the size of a message, may abort its process
        ("x_ND = x_ND[:, :5]", "in send_tokens of case zipf"),
        (
            "time.sleep(600)",
            r"torch: rank 2 of 4 hangs in send_tokens of case zipf \(exchange.py:\d+\): no rank got on for 5 s; "
            "the others are in send_tokens of case zipf",
        ),
    ],
    ids=["killed", "raises", "disagrees-on-shapes", "hangs"],
)
def test_a_rank_that_dies_or_hangs_is_named(tmp_path, line, cause):
    said(cause, [*CHECK, "--backend", "torch"], broken(tmp_path, line))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("raise RuntimeError('no more')", "failed in send_tokens of case zipf: RuntimeError: no more"),
        ("time.sleep(600)", r"hangs in send_tokens of case zipf \(exchange.py:\d+\): no rank got on for 5 s"),
    ],
    ids=["raises", "hangs"],
)
@pytest.mark.parametrize(("how", "rank"), [("shard_map", ""), ("processes", "rank 2 of 4 ")])
def test_so_it_is_in_jax(tmp_path, how, rank, line, cause):
    said(f"jax: {rank}{cause}", [*CHECK, "--backend", "jax", "--jax-ranks", how], broken(tmp_path, line, JAX))


def said(cause: str, command: list[str], home: Path) -> None:
    run = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stdout + run.stderr
    assert re.search(cause, " ".join(run.stderr.split())), run.stderr


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "killed"]
)
def test_nothing_is_left_running(tmp_path, sent, code):
    process = subprocess.Popen(
        [*CHECK[:-1], "60"], cwd=broken(tmp_path, "time.sleep(600)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(under(process.pid)) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    started = under(process.pid)
    assert len(started) >= 8  # this one, PyTorch's launcher and four ranks, JAX's and one
    os.kill(process.pid, sent)
    process.communicate(timeout=30)
    assert process.returncode == code
    deadline = time.monotonic() + 10
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(started) == []


def test_groups_of_several_sizes(tmp_path):
    """What one group of ranks wrote is none of the next one's, whose start takes longer than --timeout."""
    command = [sys.executable, "-m", "parity", "check", "p8", "zipf", "p1", "--backend", "torch", "--timeout", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


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
