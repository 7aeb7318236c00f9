"""A rank that dies or hangs ends the run, with the rank, the stage and the cause, and no process is left."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_supervisor import alive, wait_until

from parity.run.faults import PACKAGES, ROOT, Fault, plant
from parity.run.patience import under

QUIETLY: Any = {"capture_output": True, "text": True, "timeout": 300}
CHECK = [sys.executable, "-m", "parity", "check", "zipf", "--timeout", "5"]
TORCH = ("torch", "    check_splits(splits.n_sent, x_ND.shape[0])\n", "dist.is_initialized() and dist.get_rank() == 2")
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
            "time.sleep(600)",
            r"torch: rank 2 of 4 hangs in send_tokens of case zipf \(exchange.py:\d+\): no rank made progress for 5 s; "
            "the other ranks are in send_tokens of case zipf",
        ),
    ],
    ids=["killed", "hangs"],
)
def test_a_rank_that_dies_or_hangs_is_named(tmp_path, line, cause):
    run = subprocess.run([*CHECK, "--backend", "torch"], cwd=broken(tmp_path, line), **QUIETLY)
    assert run.returncode == 3, run.stdout + run.stderr
    assert re.search(cause, " ".join(run.stderr.split())), run.stderr


@pytest.mark.parametrize(
    ("how", "rank"), [("shard_map", ""), pytest.param("processes", "rank 2 of 4 ", marks=pytest.mark.slow)]
)
def test_so_it_is_in_jax(tmp_path, how, rank):
    home = broken(tmp_path, "time.sleep(600)", JAX)
    run = subprocess.run([*CHECK, "--backend", "jax", "--jax-ranks", how], cwd=home, **QUIETLY)
    assert run.returncode == 3, run.stdout + run.stderr
    cause = rf"jax: {rank}hangs in send_tokens of case zipf \(exchange.py:\d+\): no rank made progress for 5 s"
    assert re.search(cause, " ".join(run.stderr.split())), run.stderr


@pytest.mark.parametrize(
    ("side", "how", "rank"),
    [(TORCH, "shard_map", "rank 2 "), (JAX, "shard_map", ""), (JAX, "processes", "rank 2 ")],
    ids=["torch", "jax", "jax-processes"],
)
def test_a_rank_that_raises_is_a_mismatch_of_its_case(tmp_path, side, how, rank):
    """The other case goes on, in new processes."""
    home = broken(tmp_path, "raise RuntimeError('no more')", side)
    command = [*CHECK[:-2], "balanced", "--backend", side[0], "--jax-ranks", how, "--json"]
    run = subprocess.run(command, cwd=home, **QUIETLY)
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    failed = [line for line in lines if line["kind"] == "comparison"]
    assert [(line["case"], line["stage"]) for line in failed] == [(c, "send_tokens") for c in ("zipf", "balanced")]
    assert all(f"{rank}raised RuntimeError: no more (exchange.py:" in str(line) for line in failed)


def test_ranks_that_disagree_on_shapes(tmp_path):
    """Whichever notices first is named; gloo, which notices by the size of a message, may abort its process."""
    command = [*CHECK, "--backend", "torch", "--json"]
    run = subprocess.run(command, cwd=broken(tmp_path, "x_ND = x_ND[:, :5]"), **QUIETLY)
    assert run.returncode in (1, 3), run.stdout + run.stderr
    assert '"send_tokens"' in run.stdout or "in send_tokens of case zipf" in " ".join(run.stderr.split())


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "killed"]
)
def test_nothing_is_left_running(tmp_path, sent, code):
    command, home = [*CHECK[:-1], "60", "--backend", "torch"], broken(tmp_path, "time.sleep(600)")
    with subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: len(under(process.pid)) == 6)  # this one, the launcher and four ranks
            started = under(process.pid)
            process.send_signal(sent)
            process.wait(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    wait_until(lambda: not alive(started))


def test_groups_of_several_sizes(tmp_path):
    """What one group of ranks wrote is none of the next one's, whose start takes longer than --timeout."""
    command = [sys.executable, "-m", "parity", "check", "p8", "zipf", "p1", "--backend", "torch", "--timeout", "3"]
    run = subprocess.run(command, **QUIETLY)
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
