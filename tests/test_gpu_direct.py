"""What only GPUs can show of rows that go straight to their places: kernels, barriers, no wait, a CUDA graph."""

import subprocess
import sys

import pytest
import torch
from direct_ranks import on_gpu
from torch.multiprocessing.spawn import spawn

from torch_impl import kernels

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


def test_rows_past_2_to_the_31_elements():
    """The last rows of a buffer of 4.3 GB, and the first ones, which an offset in 32 bits would take for them."""
    n_rows, D = 300_000, 7168
    own_RD = torch.zeros(n_rows, D, dtype=torch.bfloat16, device="cuda")
    x_MD = torch.randn(7, D, device="cuda").bfloat16()
    place_MK = torch.tensor([[n_rows - 1 - m, m] for m in range(7)], device="cuda")
    kernels.put_rows(x_MD, place_MK, torch.tensor([own_RD.data_ptr()], device="cuda"), n_rows)
    assert own_RD[:7].equal(x_MD)
    assert own_RD[-7:].flip(0).equal(x_MD)
    assert own_RD.count_nonzero() == 2 * x_MD.count_nonzero()
    own_RD[-7:] = 0
    back_MD = torch.zeros(7, D, dtype=torch.bfloat16, device="cuda")
    origin_R1 = torch.full((n_rows, 1), -1, device="cuda")
    origin_R1[-7:, 0], own_RD[-7:] = torch.arange(7, device="cuda"), x_MD
    kernels.put_rows(own_RD, origin_R1, torch.tensor([back_MD.data_ptr()], device="cuda"), 7)
    assert back_MD.equal(x_MD)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_check_beside_the_readable_corner(ranks):
    presets = ["zipf", "bfloat16", "in-flight", "recomputed", "uneven", *["idle-rank"] * (ranks > 1)]
    command = [sys.executable, "-m", "parity", "check", "--device", "cuda", "--no-json", "--ranks", str(ranks)]
    command += [*presets, "--backend", "torch-direct", "--backend", "torch"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
