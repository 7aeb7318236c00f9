"""A whole layer on every backend: on a CPU, that it runs, drops what it says, and tells what cannot run there."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest

from parity.cases.case import Case
from parity.study.layers import Plan, no_drop_factor, routing_of
from parity.study.sweep import measure

LAYER = [sys.executable, "-m", "parity", "layer"]


def test_the_factor_that_drops_nothing_is_the_least():
    plan = Plan(Case(ranks=2, tokens=50, experts=8, top_k=2), 1.0, 1.0)
    routing, factor = routing_of(plan), Fraction(no_drop_factor(routing_of(plan)))
    assert measure(routing, str(factor), "rank", "token").dropped == 0
    assert measure(routing, str(factor - Fraction(2, 100)), "rank", "token").dropped > 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_table(tmp_path, ranks):
    save = tmp_path / "layers.jsonl"
    command = [*LAYER, "--ranks", str(ranks), "--seconds", "0.05", "--factors", "0.5"]
    command += ["--save", str(save)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    found = {line["variant"]: line for line in map(json.loads, save.read_text().splitlines())}
    assert len(found) == 8
    ragged = found.pop("jax-dynamic")
    assert ("not implemented on XLA:CPU" in ragged["error"]) == (ranks > 1)
    assert "ms a step" in run.stdout
    assert all(line["median"] > 0 and not line["error"] for line in found.values())
    by_factor = {name: line["dropped"] for name, line in found.items()}
    assert by_factor["jax, factor 0.50"] == by_factor["torch-static, factor 0.50"] > 0.4
    assert sorted(by_factor.values())[:5] == [0] * 5


def test_wrong_usage():
    run = subprocess.run([*LAYER, "--model", "none"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "no model is called none" in run.stderr
