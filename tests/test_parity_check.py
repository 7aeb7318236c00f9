"""`python -m parity check` end to end, in real processes."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("warm", "as_users_compile")


@pytest.mark.parametrize(
    "case",
    [
        ["idle-rank", "bfloat16-drop", "pydoc"],
        ["drop-expert-choice", "--jax-ranks", "vmap"],
        ["--ranks", "2", "--tokens", "3", "--width", "5", "--hidden", "7", "--dtype", "float64"],
        ["--checkpoint", "tests/checkpoints/gpt_oss", "--tokens", "4"],
        ["like-deepseek-v3", "like-qwen3-next", "like-llama4"],
    ],
    ids=lambda case: "-".join(case).replace("/", "-"),
)
def test_pytorch_jax_and_the_oracle_match(case):
    command = [sys.executable, "-m", "parity", "check", "--no-json", *case]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("match\n")
