"""Every field of a case matters, is called as the layers call it, and is a flag: none is carried along for nothing."""

import inspect
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import MISSING, Field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from problems import bits
from safetensors.numpy import save_file

import jax_impl
import torch_impl
from parity.cases import case as cases
from parity.cases.case import Case, flag
from parity.cli.check import Command, Flags, chosen_cases
from parity.cli.main import parse
from parity.oracle.expected import Oracle
from parity.oracle.problem import Problem, draw
from parity.oracle.quantities import names

# Three choices, so that the order of sums is checked; bins that overflow, and one row more if they are aligned.
BASE = Case(
    name="base", ranks=2, tokens=5, width=8, hidden=6, experts=6, top_k=3, renormalize=True, scale=1.5,
    capacity_factor="2/3", seed=1,
)  # fmt: skip

# What matters, or can be, only beside something else, and what that is.
BESIDE: dict[str, dict[str, Any]] = {
    "top_groups": {"groups": 3, "top_groups": 2},
    "group_score": {"groups": 3, "experts": 12, "tokens": 16},
    "outside_groups": {"groups": 3, "top_groups": 2, "score_function": "softmax_of_chosen"},  # some are below zero
    "score_on": {"top_k": 1, "renormalize": False},
    "router_dtype=float32": {"dtype": "float64"},
    "router_dtype=activations": {"dtype": "bfloat16"},
    "cast_scores": {"dtype": "bfloat16"},
    "shared_score": {"shared_hidden": 3},
}

# What changes nothing that is drawn or expected, and why it is a field nevertheless.
INERT = {
    "name": "what the report calls the case",
    "way=eager": "how a backend runs the layer; what comes out is the same",
    "way=compiled": "how a backend runs the layer; what comes out is the same",
    "way=recomputed": "how a backend runs the layer; what comes out is the same",
}

# Another value of a field for which none can be thought up from its type, or where that would not do.
OTHER: dict[str, list[Any]] = {
    "name": ["other"],
    "ranks": [1, 3],
    "experts": [8],
    "align": [4],
    "clamp": [0.5],
    "capacity_factor": [None, "1/2", "5"],
    "recording": ["recording.safetensors"],
}


def other_values(f: Field, base: Any) -> list[Any]:
    """Values that the base does not have: each of a choice, and of a number or a switch one."""
    mine = getattr(base, f.name)
    if f.name in OTHER:
        return OTHER[f.name]
    if get_origin(f.type) is Literal:
        return [value for value in get_args(f.type) if value != mine]
    if isinstance(mine, bool):
        return [not mine]
    assert isinstance(mine, int | float), f"say in OTHER which other value {f.name} may have"
    return [mine + 1]


def arrays(value: Any) -> Iterator[Any]:
    """Every array of a problem, and of the problem beside it."""
    for f in fields(Problem):
        part = getattr(value, f.name)
        if isinstance(part, Problem):
            yield from arrays(part)
        elif f.name != "case":
            yield part


def drawn(case: Case) -> tuple[list[bytes], list[bytes]]:
    """The bits of all that a problem holds, and of all that a run of it should hold in either layout."""
    problem = draw(case)
    inputs = [part for part in arrays(problem) if part is not None]
    oracle = Oracle(problem)
    wanted = [oracle.expected(names(layout), layout) for layout in ("dynamic", "static")]
    told = [
        np.asarray([str((want.name, want.dtype, want.values.shape)) for want in found.values()]) for found in wanted
    ]
    return bits(inputs), bits([told, [want.values for found in wanted for want in found.values()]])


def base_of(f: Field, value: Any = None) -> Case:
    """The case that a field is changed in."""
    return replace(BASE, **BESIDE.get(f"{f.name}={value}", BESIDE.get(f.name, {})))


@cache
def drawn_before(base: Case) -> tuple[list[bytes], list[bytes]]:
    return drawn(base)


def changed(f: Field, value: Any, folder: Path) -> Case:
    if f.name == "recording":
        ids = (draw(BASE).expert_id.reshape(-1, BASE.top_k) + 1) % BASE.experts
        save_file({"expert_id": ids}, folder / value, metadata={"n_experts": str(BASE.experts)})
        value = str(folder / value)
    return replace(base_of(f, value), **{f.name: value})


# What a checkpoint fixes is in test_checkpoints.py: sizes, options and weights at once.
EACH = [
    (f, value) for f in fields(Case) if f.name not in ("checkpoint", "layer") for value in other_values(f, base_of(f))
]


def judge(f: Field, value: Any, before: Any, after: Any) -> None:
    inert = f.name in INERT or f"{f.name}={value}" in INERT
    assert inert or after != before, f"this field decides nothing: {f.name}"
    assert not inert or after == before, f"it matters, so take it off the list: {f.name}"


@pytest.mark.parametrize(("f", "value"), EACH, ids=[f"{f.name}={value}" for f, value in EACH])
def test_a_field_matters_or_is_said_not_to(tmp_path, f, value):
    judge(f, value, drawn_before(base_of(f, value)), drawn(changed(f, value, tmp_path)))


def test_what_has_to_stand_beside_a_field_has_to():
    """Without it the field is refused, or decides nothing."""
    for f, value in EACH:
        if beside := BESIDE.get(f"{f.name}={value}", BESIDE.get(f.name)):
            assert f.name in beside or not matters(f.name, value)


def matters(name: str, value: Any) -> bool:
    try:
        return drawn(replace(BASE, **{name: value})) != drawn_before(BASE)
    except ValueError:
        return False


def test_bits_are_of_all_that_matters():
    assert drawn(BASE) == drawn_before(BASE)
    assert not draw(BASE).keep.all()
    assert {*INERT} <= {f.name for f in fields(Case)} | {f"{f.name}={value}" for f, value in EACH}
    assert all(INERT.values())


def test_a_field_that_does_nothing_is_found_out():
    """The test on trial: a case with one field more, which nobody reads."""
    source = inspect.getsource(cases).replace("    seed: int = _field(", "    dummy: int = 0\n    seed: int = _field(")
    exec(compile(source, cases.__file__, "exec"), more := {"__name__": "parity.cases.case"})
    (dummy,) = [f for f in fields(more["Case"]) if f.name == "dummy"]
    one = more["Case"](**vars(BASE))
    assert other_values(dummy, one) == [1]
    with pytest.raises(AssertionError, match="this field decides nothing"):
        judge(dummy, 1, drawn(one), drawn(replace(one, dummy=1)))


# ---- The layers' own words for them


@pytest.mark.parametrize("kind", ["Router", "Experts"])
def test_the_layers_call_them_the_same(kind):
    mine = getattr(cases, kind)
    defaults = {f.name: f.default for f in fields(Case) if f.default is not MISSING}
    assert {*mine._fields} <= defaults.keys()
    for package in (torch_impl, jax_impl):
        theirs = getattr(package, kind)
        assert theirs._fields == mine._fields
        assert theirs._field_defaults == {name: defaults[name] for name in theirs._field_defaults}
        assert [*theirs._fields] == [f for f in defaults if f in theirs._fields]  # in the order of a case
        assert {*theirs._fields} - theirs._field_defaults.keys() <= {"top_k"}  # which only the user can know


def test_a_case_hands_them_on():
    case = replace(BASE, score_function="sigmoid", activation="gelu_tanh")
    assert case.router[:5] == (3, "sigmoid", True, 1e-20, 1.5)
    assert case.expert[:1] == ("gelu_tanh",)
    for mine in (case.router, case.expert):
        assert mine._asdict() == {name: getattr(case, name) for name in mine._fields}
    assert torch_impl.Router(*case.router) == jax_impl.Router(*case.router) == case.router
    assert torch_impl.Experts(*case.expert) == jax_impl.Experts(*case.expert) == case.expert


# ---- Flags


@pytest.fixture(scope="module")
def help_of_check() -> str:
    with redirect_stdout(said := io.StringIO()), pytest.raises(SystemExit):
        parse(["check", "--help"])
    return re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[\d;]*m", "", said.getvalue()))


@pytest.mark.parametrize("f", fields(Case), ids=lambda f: f.name)
def test_a_field_is_a_flag_with_help(help_of_check, f):
    about = " ".join(f.metadata["help"].split())
    assert len(about) > 8
    assert about.endswith(".")
    told = re.escape(f"{about} (default: {f.default})")
    assert re.search(f" --{flag(f.name)}[ ,](?:(?! --(?!trace)).){{,150}}{told}", help_of_check)


@pytest.mark.parametrize(("f", "value"), EACH, ids=[f"{f.name}={value}" for f, value in EACH])
def test_a_flag_sets_its_field(tmp_path, f, value):
    case = changed(f, value, tmp_path)
    given = {name: v for name, v in vars(case).items() if v != getattr(Case(), name) or name == f.name}
    given = {name: "none" if v is None else v for name, v in given.items()}
    assert chosen_cases(Command(case=Flags(**given))) == [case]
