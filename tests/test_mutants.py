"""The mutator: what it changes and what not, that each change is one, and that a sample of them is killed."""

import re
import subprocess
import sys

import mutants
import pytest
from mutants import Finder, Known, Mutant

from parity.cases.presets import PRESETS
from parity.run.faults import ROOT
from parity.run.ours import BACKENDS

SOURCE = b'''"""A docstring with 1 + 1."""
from typing import TYPE_CHECKING

__all__ = ["f"]
if TYPE_CHECKING:
    import g


def f(x: "Float[Array, 'N 3']", bold: bool = True) -> "1":
    """And 2 < 3."""
    if x.ndim != 2:
        raise ValueError(f"{x.ndim + 1} axes, not 2" + "4")
    y = x.sum(dim=-1, keepdim=False)[:, None]  # 1 + 1
    return g(y, y - 1, x, upper=y.mean, lower=x.mean) if bold else y[: x.size]
'''


def changes(source: bytes) -> set[tuple[str, str]]:
    """Of each mutant its kind, and what it puts where."""
    return {(m.kind, f"{source[m.start : m.end].decode()} -> {m.new.decode()}") for m in Finder(source, "a.py").found}


def test_everything_that_runs_is_changed_and_nothing_else():
    assert changes(SOURCE) == {
        ("flag", "True -> False"),
        ("comparison", "x.ndim != 2 -> (x.ndim == 2)"),
        ("constant", "2 -> 3"),
        ("constant", "2 -> 1"),
        ("axis", "-1 -> 0"),
        ("flag", "False -> True"),
        ("index", ":, None -> None, :"),
        ("condition", "bold -> (not bold)"),
        ("order", "y, y - 1 -> y - 1, y"),
        ("order", "y - 1, x -> x, y - 1"),
        ("order", "y.mean, lower=x.mean -> x.mean, lower=y.mean"),
        ("operator", "y - 1 -> (y + 1)"),
        ("constant", "1 -> 2"),
        ("constant", "1 -> 0"),
        ("index", "x.size -> x.size + 1"),
        ("index", "x.size -> x.size - 1"),
    }


@pytest.mark.parametrize(
    ("source", "change"),
    [
        (b"a // b", ("operator", "a // b -> (a * b)")),
        (b"(a) ** (b)", ("operator", "(a) ** (b) -> ((a) * (b))")),
        (b"a * b + c", ("operator", "a * b -> (a + b)")),
        (b"a is not b", ("comparison", "a is not b -> (a is b)")),
        (b"0 <= a < b", ("comparison", "0 <= a < b -> (0 <= a <= b)")),
        (b"a and b or c", ("operator", "a and b -> (a or b)")),
        (b"not a", ("operator", "not -> ")),
        (b"f(1e-20)", ("constant", "1e-20 -> 1.01e-20")),
        (b"f(0.0)", ("constant", "0.0 -> 1.0")),
        (b"a == 'silu'", ("constant", " -> _")),
        ("f('größer', 1)".encode(), ("constant", "1 -> 2")),
    ],
)  # fmt: skip
def test_what_becomes_of(source, change):
    found = changes(b"x = " + source)
    assert change in found, found


@pytest.mark.parametrize(
    "source",
    [
        b"y = f(x) if a is None and kernels.use_kernels(x) else x",
        b"if x.ndim == 2 and kernels.use_kernels(x):\n    y = x + 1",
        b"fits = fits_grouped_mm(x, w)",
        b"y = min(a, b)",
    ],
)
def test_what_a_cpu_cannot_tell_is_left_as_it_is(source):
    assert changes(source) == set()


def test_each_mutant_of_the_implementations_is_another_program():
    everything = mutants.mutants()
    assert len({m.id for m in everything}) == len({m.name for m in everything}) == len(everything) > 1000
    for mutant in everything[::20]:
        fault = mutant.fault
        assert fault.old == (ROOT / mutant.file).read_text() != fault.new
        compile(fault.new, mutant.file, "exec")
    assert {m.backend for m in everything} == {*BACKENDS}


@pytest.mark.parametrize("pattern", [*mutants.EQUIVALENT, *mutants.REACHED_BY])
def test_what_is_said_of_mutants_is_of_some(pattern):
    assert any(re.search(pattern, m.name) for m in mutants.mutants())


@pytest.mark.parametrize("pattern", mutants.REACHED_BY)
def test_what_few_cases_reach_is_judged_by_them_all(pattern):
    """And by no other, which runs none of it."""
    mutant = next(m for m in mutants.mutants() if re.search(pattern, m.name) and not m.equivalent)
    reaches = mutants.REACHED_BY[pattern]
    found = [name for name, cases in mutants.presets().items() if any(reaches(PRESETS[case]) for case in cases)]
    rounds = [name for name in mutants.rounds_of(mutant, tests=False) if "/" not in name]
    assert rounds == (found[: mutants.ROUNDS_OF_CHECKS] if mutant.in_checks else found)
    assert 0 < len(found) < len(mutants.presets()) / 2


def test_what_another_corner_imports_is_judged_by_it_too():
    rounds = {m.backend: mutants.rounds_of(m, tests=False) for m in mutants.mutants() if not m.in_checks}
    assert {backend: names[-1] for backend, names in rounds.items() if "/" in names[-1]} == {
        "torch": "sigmoid/torch-static", "jax": "sigmoid/jax-dynamic"
    }  # fmt: skip


def test_every_program_is_in_a_round_and_every_file_of_tests_is_one():
    in_rounds = [name for names in mutants.presets().values() for name in names]
    assert len(set(in_rounds)) == len(in_rounds)
    assert all(mutants.compiles(name) and name[-1] != "a" for name in PRESETS.keys() - set(in_rounds))
    assert all(mutants.presets().values())
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in mutants.TESTS)


def test_no_round_is_run_twice_on_the_same_text(tmp_path):
    mutant = next(m for m in mutants.mutants() if m.backend == "torch" and not m.in_checks)
    first, second, *_ = mutants.rounds_of(mutant, tests=False)
    known = Known(tmp_path / "none")
    assert known.next_round(mutant, tests=False) == 0
    known.add(line(mutant, first, "match"))
    assert known.next_round(mutant, tests=False) == 1
    assert known.outcome(mutant) == "not done"
    known.add(line(mutant, second, "hang"))
    assert known.next_round(mutant, tests=True) is None
    assert known.outcome(mutant) == "check"
    tests = "test_bad_input.py"
    known.add(line(itself := mutants.unchanged()[0], tests, "match") | {"tests": "others"})
    assert tests not in known.of(itself)
    known.add(line(itself, tests, "match") | {"tests": mutants.hash_of(f"tests/{tests}")})
    assert tests in known.of(itself)
    older = Known(tmp_path / "none")
    older.add(line(mutant, first, "mismatch") | {"hash": "another text"})
    assert older.next_round(mutant, tests=False) == 0


def line(mutant: Mutant, name: str, verdict: str) -> dict:
    return {"id": mutant.id, "hash": mutant.hash, "round": name, "verdict": verdict, "how": ""}


@pytest.mark.slow
@pytest.mark.parametrize("side", ["torch", "jax"])
def test_a_sample_is_killed(tmp_path, side):
    results = tmp_path / "mutants.jsonl"
    arguments = ["--only", side, "--sample", "120", "--jobs", "2", "--tests", "--results", str(results)]
    done = subprocess.run([sys.executable, mutants.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOTHING HERE COUNTS" not in done.stdout
