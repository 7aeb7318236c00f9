"""Cases that cannot be in memory are refused with an estimate, which is never more than what they take."""

import subprocess
import sys

import pytest

from parity.cases.case import Case
from parity.cases.presets import MODELS, PRESETS
from parity.cli import main
from parity.judge.engine import run_cases
from parity.oracle import problem, size
from parity.run.backend import Setting
from parity.run.ours import DEFAULT

TAKES = """
import sys
from dataclasses import replace
from pathlib import Path
from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.oracle.problem import draw
from parity.oracle import size

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

case, before = eval(sys.argv[1]), peak()
draw(case)
print(size.of_oracle(case), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the largest memory of a process is read as Linux has it")
@pytest.mark.parametrize(
    "case",
    [
        "Case(ranks=4, tokens=512, width=128, hidden=32, experts=16, top_k=4)",
        "Case(ranks=4, tokens=1024, width=8, hidden=8, experts=256, top_k=1)",
        "Case(ranks=4, tokens=4, width=256, hidden=256, experts=64, top_k=1)",
        "replace(MODELS['olmoe-1b-7b'], ranks=1, tokens=4)",
    ],
)
def test_no_case_takes_less_than_its_estimate(case):
    run = subprocess.run([sys.executable, "-c", TAKES, case], capture_output=True, text=True, timeout=120, check=True)
    estimate, took = map(int, run.stdout.split())
    assert 0.1 * took < estimate < took


def test_real_models_with_few_tokens_are_small():
    """Their weights are windows of one bank. A laptop has as much."""
    for case in MODELS.values():
        assert size.of_oracle(case) + size.of_run(case, "static") < 8e9, case.name
    for case in PRESETS.values():
        assert size.of_oracle(case) + size.of_run(case, "static") < 1e8, case.name


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokens", "1000000000"],
        ["--experts", "1000000000"],
        ["--width", "10000000", "--hidden", "10000000"],
        ["--capacity-factor", "100000000"],
        ["--tokens", "1000000000000000000000000"],
    ],
    ids=lambda flags: flags[0],
)
def test_what_cannot_fit_is_refused_at_once(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", *flags])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "error: case custom needs at least " in err
    assert "GB of memory (" in err
    assert "GB are available: use fewer --tokens" in err


def test_it_is_what_is_available_that_counts(monkeypatch):
    case = Case(ranks=1, tokens=4)
    monkeypatch.setattr(size, "available", lambda: float(size.of_oracle(case)))
    size.check_size(case)
    with pytest.raises(
        ValueError, match=r"case custom needs at least .* GB of memory \(.* for the oracle, .* for a run"
    ):
        run_cases([case], DEFAULT, Setting(), show_progress=False)
    monkeypatch.setattr(size, "available", lambda: size.of_oracle(case) - 1.0)
    with pytest.raises(ValueError, match=r"GB of memory, and .* GB are available"):
        problem.draw(case)


@pytest.mark.parametrize(("text", "limited"), [("1000000\n", True), ("max\n", False), ("9223372036854771712\n", False)])
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, text, limited):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(size, "LIMITS", (tmp_path / "memory.max", tmp_path / "not there"))
    monkeypatch.setattr(size, "of_system", lambda: 2e9)
    assert size.available() == (1e6 if limited else 2e9)


def test_memory_that_runs_out_all_the_same(monkeypatch, capsys):
    monkeypatch.setattr("parity.judge.records.read", _too_much)
    with pytest.raises(SystemExit) as end:
        main(["report", "report.jsonl"])
    assert end.value.code == 2
    assert "error: not enough memory: " in capsys.readouterr().err


def _too_much(_: object) -> None:
    raise MemoryError("Unable to allocate 745. GiB")
