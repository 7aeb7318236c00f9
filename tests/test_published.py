"""Published layers, where their packages are installed (make test-published); and what is said where they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from published_table import LAYERS, SOFTMAX

from parity.run import ours

ROOT = Path(__file__).parent.parent


def check(*arguments: str, home: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "parity", "check", *arguments, "--no-json"]
    environment = {name: a for name, a in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment)


@pytest.mark.published
@pytest.mark.parametrize("layer", [
    "transformers:qwen3_moe", "transformers:olmoe", "transformers:jamba", "transformers:mixtral",
    "transformers:granitemoe", "transformers:deepseek_v3", "megatron", "tokamax", "maxtext:dense",
    "maxtext:dense_over_ranks", "maxtext:ring_over_ranks",
])  # fmt: skip
def test_a_layer_matches_over_four_ranks(layer):
    run = check("zipf", *LAYERS[layer], "--backend", layer)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.published
def test_megatron_over_two_ranks():
    run = check("zipf", "--ranks", "2", "--backend", "megatron")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.published
@pytest.mark.parametrize(("layer", "said"), [
    ("transformers:jamba", "never renormalises (1)"), ("torchtitan", "its experts compute in bfloat16"),
])  # fmt: skip
def test_what_a_layer_does_not_compute_it_says(layer, said):
    run = check("zipf", *SOFTMAX, "--backend", layer)
    assert run.returncode == 5, run.stdout + run.stderr
    assert said in " ".join(run.stdout.split())


@pytest.mark.published
def test_half_a_percent_shows_in_bfloat16(tmp_path):
    """Each row may be off by more, but not all of them to the same side."""
    text = (ROOT / "parity/published/megatron.py").read_text()
    last = "(x_TD[:, None],))[0][:, 0]"
    assert text.count(last) == 1
    for scale, code in ((1, 0), (1.005, 1)):
        (tmp_path / "scaled.py").write_text(text.replace(last, f"{last} * {scale}"))
        run = check("bfloat16", "--backend", "scaled.py", home=tmp_path)
        assert run.returncode == code, run.stdout + run.stderr
    assert "times what they should be" in run.stdout


def test_each_is_found_by_its_name_and_imports_nothing():
    assert ours.find("transformers:mixtral").name == "transformers.mixtral"
    assert ours.find("megatron").asked == "megatron"
    assert not {"transformers", "megatron", "maxtext", "torchtitan"} & sys.modules.keys()
    with pytest.raises(ValueError, match=r"transformers\.py has no function nosuch"):
        ours.find("transformers:nosuch")


def test_one_that_is_missing_is_said_in_words(tmp_path):
    for name in ours.PUBLISHED:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")
    command = [sys.executable, "-m", "parity", "check", "p1", "--backend", "torchtitan"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "torchtitan is not installed: pip install -e '.[torchtitan]'" in " ".join(run.stderr.split())
