"""The oracle without loops equals the oracle with loops: exactly rounded, and in how far its draws stray."""

from dataclasses import replace

import numpy as np
import pytest
from problems import within

from parity.cases.case import Case, Dtype
from parity.cases.presets import PRESETS
from parity.oracle import arrays as arrays_of_oracle
from parity.oracle import reference, vectorised
from parity.oracle.arrays import to_numpy
from parity.oracle.expected import Oracle
from parity.oracle.problem import draw, exact_inputs
from parity.oracle.quantities import names
from parity.oracle.reference import Exact, Perturbed
from parity.oracle.tolerances import DRAWS, allowance, unit_roundoff

CASES = [
    PRESETS["sigmoid"],
    PRESETS["drop-expert-choice"],
    replace(PRESETS["bfloat16"], renormalize=True, capacity_factor="1/2"),
    replace(PRESETS["uneven-drop"], renormalize=True),
    *(PRESETS[name] for name in PRESETS if name.startswith("like-")),
    PRESETS["groups-at-zero"],
    Case(tokens=0),
]


def layers(case: Case, oracle, numbers, dtype: Dtype | None = None) -> reference.Layer:
    """The layer of a case, with the roundings of its dtype, or of another."""
    problem = draw(case)
    x, w, dout = exact_inputs(problem)
    case = replace(case, dtype=dtype or case.dtype)
    return oracle.layer(case, x, w, dout, problem.expert_id, problem.keep, numbers)


def arrays(layer: reference.Layer) -> dict[str, np.ndarray]:
    """Every value and every gradient, by name."""
    return {name: a for name, a in (layer._asdict() | layer.gradients).items() if name != "gradients"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_but_for_the_order_of_sums(case):
    """And so within the allowance that float64 has."""
    plain, fast = layers(case, reference, Exact()), layers(case, vectorised, Exact())
    drawn = [layers(case, vectorised, Perturbed(np.random.default_rng(i)), "float64") for i in range(DRAWS)]
    plain, fast, *drawn = map(arrays, (plain, fast, *drawn))
    assert plain.keys() == fast.keys() == drawn[0].keys()
    for name, a in plain.items():
        within(fast[name], a, allowance(fast[name], [one[name] for one in drawn], "float64"))


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_draws_stray_as_far(case):
    """The mean over a tensor of each row's largest error, of 16 draws: as close as that mean strays by itself."""
    exact = arrays(layers(case, reference, Exact()))
    drawn = [
        [arrays(layers(case, oracle, Perturbed(np.random.default_rng([seed, 7])))) for seed in range(16)]
        for oracle in (reference, vectorised)
    ]
    for name, values in exact.items():
        plain, fast = ([np.abs(a[name] - values).max(axis=-1).mean() for a in of_oracle] for of_oracle in drawn)
        if not any(plain):  # what experts are given where no score is on it, and the shared expert where there is none
            assert not any(fast)
            assert name == "input" or (name == "shared" and not values.any())
        else:
            standard_error = np.sqrt((np.var(plain) + np.var(fast)) / 15)
            assert abs(np.mean(fast) - np.mean(plain)) < 4 * standard_error, name


def test_selection_breaks_ties_alike():
    problem = draw(PRESETS["ties"])
    x, w, _ = exact_inputs(problem)
    logits, _ = vectorised.route(problem.case, x, w, Exact())
    ids = vectorised.select(problem.case, logits, w)
    np.testing.assert_array_equal(ids, reference.select(problem.case, logits, w))
    assert (np.diff(np.sort(logits, axis=-1), axis=-1) == 0).any(axis=-1).mean() > 0.5


def test_big_cases_do_without_loops():
    assert vectorised.oracle_for(PRESETS["pydoc"]) is reference
    assert vectorised.oracle_for(Case(tokens=512, top_k=2)) is vectorised


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The oracle in PyTorch, as at real size on a GPU; here PyTorch has its arrays on the CPU, whatever the size."""
    monkeypatch.setattr(arrays_of_oracle, "DEVICE", "cpu")
    for module in (vectorised, reference):
        if hasattr(module, "on_gpu"):
            monkeypatch.setattr(module, "on_gpu", lambda case: True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_in_pytorch(case, as_on_a_gpu, monkeypatch):
    """All that is expected of every array: exact values but for the order of sums, and allowances of the same size."""
    problem = draw(case)
    there = Oracle(problem).expected(names("static"), "static")
    monkeypatch.undo()
    here = Oracle(draw(case)).expected(names("static"), "static")
    assert here.keys() == there.keys()
    for name, want in here.items():
        got = to_numpy(there[name].values)
        if want.allowed is None or not want.values.size:
            # Rows that move are those of the exact layer, rounded: a sum in another order may round otherwise.
            most = 2 * unit_roundoff(case.dtype) * np.abs(want.values).max(initial=0) if "int" not in want.dtype else 0
            assert np.abs(got - want.values).max(initial=0) <= most, name
            continue
        within(got, want.values, want.allowed)
        # The largest of 16 draws, of all rows: 1.5 times as large is more than they differ by.
        allowed = there[name].allowed
        assert allowed is not None
        assert 2 / 3 <= to_numpy(allowed).mean() / want.allowed.mean() <= 1.5, name
