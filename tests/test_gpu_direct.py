"""What only GPUs can show of rows that go straight to their places: kernels, barriers, no wait, a CUDA graph."""

import subprocess
import sys

import pytest
import torch
from direct_ranks import on_gpu
from torch.multiprocessing.spawn import spawn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_that_share_one_gpu(ranks, tmp_path):
    """They take turns on it, so that what waits for another rank waits long. See `on_gpu` for what is looked at."""
    spawn(on_gpu, (ranks, str(tmp_path / "store"), True), nprocs=ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_gpu_a_rank(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and there are {torch.cuda.device_count()}: run it where there are")
    spawn(on_gpu, (ranks, str(tmp_path / "store"), False), nprocs=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_check_beside_the_readable_corner(ranks):
    presets = ["zipf", "bfloat16", "idle-rank", "in-flight", "recomputed", "uneven"]
    command = [sys.executable, "-m", "parity", "check", "--device", "cuda", "--no-json", "--ranks", str(ranks)]
    command += [*presets, "--backend", "torch-direct", "--backend", "torch"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
