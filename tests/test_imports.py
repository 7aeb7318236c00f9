"""Who may import whom: the contracts in pyproject.toml hold, and each breaks where it should."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LINT = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]

# What each contract forbids: a file, a line in it, and how it is named.
FORBIDDEN = {
    "folders": ("parity/oracle/rows.py", "from parity.judge import blame", "parity.oracle.rows -> parity.judge.blame"),
    "interop": ("parity/interop.py", "import parity.cases", "parity.interop -> parity.cases"),
    "torch_impl": (
        "torch_impl/layer.py",
        "def late():\n    import jax_impl.layer",
        "torch_impl.layer -> jax_impl.layer",
    ),
    "jax_impl": ("jax_impl/rows.py", "import parity.cases", "jax_impl.rows -> parity.cases"),
    "who-runs-them": ("parity/judge/compare.py", "import torch_impl", "parity.judge.compare -> torch_impl"),
    "frameworks": ("parity/cli/check.py", "def late():\n    import jax", "parity.cli.check -> jax"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """What is said of a copy with all of those lines."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in ("parity", "torch_impl", "jax_impl"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file, line, _ in FORBIDDEN.values():
        with (copy / file).open("a") as text:
            text.write(f"\n{line}\n")
    run = subprocess.run(LINT, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    return run.stdout


def test_the_contracts_hold():
    run = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_line_is_forbidden_for_each():
    assert FORBIDDEN.keys() == {contract["id"] for contract in CONTRACTS}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["id"])
def test_a_forbidden_import_is_refused(said, contract):
    assert f"{contract['name']} BROKEN" in said
    _, _, reasons = said.partition(f"\n{contract['name']}\n")  # where the broken ones are explained
    assert f"{FORBIDDEN[contract['id']][2]} (l." in reasons.split("---\n\n")[1]
