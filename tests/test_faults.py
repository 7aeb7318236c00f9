"""Every planted fault is caught, and blamed on the side and the stage that it was planted in."""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from parity.cases.presets import PRESETS
from parity.cli.faults import try_fault
from parity.judge.engine import run_cases
from parity.oracle.quantities import STAGES
from parity.report.terminal import Found, fault_table, print_faults, print_report
from parity.run.backend import Setting
from parity.run.faults import FAULTS, ROOT, find, plant
from parity.run.ours import BACKENDS

pytestmark = pytest.mark.usefixtures("warm")

# One of each stage, of both sides, and of the ways to be caught: a crash, padding, a second step, a hang, a sum.
QUICK = [
    "torch-router-gradient-wrong", "torch-counts-of-wrong-expert", "torch-stale-buffer", "torch-idle-rank-detached",
    "torch-stale-weight-gradient", "torch-inverse-applied-twice", "torch-backward-splits-swapped",
    "jax-drop-by-lowest-score", "jax-padding-in-last-group", "jax-score-gradient-missing",
    "torch-static-padding-reaches-experts", "torch-direct-gradient-in-another-buffer",
]  # fmt: skip


def assert_blamed(name: str) -> None:
    fault = find(name)
    found = try_fault(fault)
    assert found.caught, fault.sentence
    assert (found.backend, found.stage) == (fault.backend, fault.stage), found.how


@pytest.mark.parametrize("name", QUICK)
def test_caught_and_blamed(name):
    assert_blamed(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in FAULTS.keys() - set(QUICK) if not FAULTS[name].gpu_only))
def test_the_others_too(name):
    assert_blamed(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.gpu_only and not fault.shown_by])
def test_those_that_show_on_a_gpu_only(name):
    fault = find(name)
    found = try_fault(fault, "cuda")
    assert found.caught, fault.sentence
    assert (found.backend, found.stage) == (fault.backend, fault.stage), found.how


def test_code_that_fails_by_itself_is_not_a_fault_that_was_caught():
    fault = find("torch-silu-on-the-wrong-half")
    found = try_fault(replace(fault, new="glu(no_such_name, gate_RF, experts.activation), w_down"))
    assert not found.caught
    assert "no_such_name" in found.how


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 30
    assert {(fault.backend, fault.stage) for fault in FAULTS.values()} >= {("torch", stage) for stage in STAGES}
    assert {find(name).stage for name in QUICK} == set(STAGES)
    assert all(fault.preset in PRESETS for fault in FAULTS.values())


def test_what_no_preset_shows_a_test_does():
    elsewhere = [fault for fault in FAULTS.values() if fault.shown_by]
    assert elsewhere
    for fault in elsewhere:
        assert fault.name.removeprefix(fault.backend) in (ROOT / fault.shown_by).read_text()


def test_each_says_where_it_comes_from():
    reported = {fault.source for fault in FAULTS.values()} - {"constructed"}
    assert len(reported) >= 10
    for source in reported:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", source)
    console = Console(width=160, file=StringIO())
    console.print(fault_table([(fault, None) for fault in FAULTS.values()]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("constructed") == sum(fault.source == "constructed" for fault in FAULTS.values())


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_still_fits_the_code(tmp_path, name):
    """Its text is in its file exactly once, and what it becomes can be compiled."""
    fault = FAULTS[name]
    path = plant(fault, tmp_path / "planted") / fault.file
    assert path.read_text() != (ROOT / fault.file).read_text()
    compile(path.read_text(), fault.file, "exec")


def test_what_is_said_of_a_fault():
    """Who, where, which row, by how much, what failing rows have in common, what to look at and what to type.

    In a narrow terminal too, each on one line: it gets copied.
    """
    fault = find("torch-gradient-of-last-k-lost")
    report = run_cases([PRESETS["zipf"]], [BACKENDS["torch"]], Setting(), fault=fault, show_progress=False)
    assert report is not None
    print_report(console := Console(width=40, file=StringIO()), report)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "zipf: torch is wrong at stage 2 group, backward, fed the oracle's input",
        "dx against oracle: 64 of 64 rows; worst: on rank",
        "allowed",
        "would need",
        "look at:  torch_impl/grouping.py: group_by_expert",
        "repeat:   python -m parity check zipf --backend torch --fault torch-gradient-of-last-k-lost",
    ):
        assert words in said, said


@pytest.mark.parametrize("width", [40, 80, 120, 172])
def test_nothing_of_a_listing_is_cut(width):
    """However narrow the terminal is."""
    for found in (None, Found(False, "torch-static", "exchange_counts", "")):
        console = Console(width=width, file=StringIO(), highlight=False)
        print_faults(console, [(fault, found) for fault in FAULTS.values()])
        shown = "".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        for fault in FAULTS.values():
            assert fault.name in shown
            if width < 150:  # as one line after the other, not side by side
                wanted = ("caught: NO; blamed: WRONG: torch-static exchange_counts",)
                for said in wanted if found else (fault.sentence, fault.source):
                    assert "".join(said.split()) in shown
