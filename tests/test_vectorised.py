"""The oracle without loops equals the oracle with loops: exactly rounded, and in how far its draws stray."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import within

from parity.cases.case import Case, Dtype
from parity.cases.presets import PRESETS
from parity.oracle import reference, vectorised
from parity.oracle.problem import draw, exact_inputs
from parity.oracle.reference import Exact, Perturbed
from parity.oracle.tolerances import DRAWS, allowance
from parity.oracle.windows import OnGPU

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
    """The mean over a tensor of each row's largest error: of many numbers, so close."""
    exact = arrays(layers(case, reference, Exact()))
    drawn = [
        [arrays(layers(case, oracle, Perturbed(np.random.default_rng([seed, 7])))) for seed in range(4)]
        for oracle in (reference, vectorised)
    ]
    for name, values in exact.items():
        plain, fast = (np.mean([np.abs(a[name] - values).max(axis=-1) for a in of_oracle]) for of_oracle in drawn)
        if plain == 0:  # what experts are given where no score is on it, and the shared expert where there is none
            assert fast == 0
            assert name == "input" or (name == "shared" and not values.any())
        else:
            assert 0.8 < fast / plain < 1.25, name


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


@pytest.mark.parametrize("numbers", [lambda: Exact(), lambda: Perturbed(np.random.default_rng(1))])
def test_weights_on_a_gpu_are_multiplied_as_arrays_are(numbers):
    """Every product of the oracle, with a matrix as a GPU holds it; here PyTorch has it on the CPU."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 4))
    for a in (rng.standard_normal(6), rng.standard_normal((3, 6)), rng.standard_normal((2, 3, 6))):
        there = numbers().matmul(a, OnGPU(torch.from_numpy(matrix)), 6, "float32")
        # sums of 6 products in float64, in another order
        np.testing.assert_allclose(there, numbers().matmul(a, matrix, 6, "float32"), rtol=1e-13, atol=1e-13)
