"""What a layer says that it has: options that it lacks are refused, and none that changes nothing in a case."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parity import Unsupported, only
from parity.cases.case import Case
from parity.oracle.problem import draw

SMALL = Case(ranks=1, tokens=3, width=5, hidden=4, experts=6)
# Another value of each option that can be idle.
OTHER: dict[str, Any] = {
    "epsilon": 1.0, "group_score": "max", "outside_groups": "zero", "router_dtype": "activations", "cast_scores": True,
}  # fmt: skip
IDLE = [
    (SMALL, {*OTHER, "top_groups"}),
    (replace(SMALL, dtype="float64"), {*OTHER, "top_groups"} - {"router_dtype"}),
    (replace(SMALL, groups=3), {"epsilon", "router_dtype", "cast_scores"}),
    (replace(SMALL, dtype="bfloat16", renormalize=True, groups=3), set()),
]


@pytest.mark.parametrize(("case", "idle"), IDLE, ids=["float32", "float64", "groups", "bfloat16"])
def test_what_is_idle_changes_no_number(case, idle):
    assert case.idle == idle
    problem = draw(case)
    for name in idle & OTHER.keys():
        other = draw(replace(case, **{name: OTHER[name]}))
        for one in ("expert_id", "score", "y", "dscore"):
            np.testing.assert_array_equal(getattr(other, one), getattr(problem, one), err_msg=f"{name}: {one}")
        np.testing.assert_array_equal(other.exact.out, problem.exact.out, err_msg=name)
        np.testing.assert_array_equal(other.exact.dx, problem.exact.dx, err_msg=name)


@pytest.mark.parametrize(("options", "said"), [
    ({}, ""),
    ({"router_dtype": "activations", "cast_scores": True}, ""),
    ({"dtype": "bfloat16"}, "it computes --router-dtype activations only"),
    ({"dtype": "bfloat16", "router_dtype": "activations"}, "it computes --cast-scores True only"),
    ({"renormalize": True}, "epsilon 0.0 only"),
    ({"epsilon": 1.0}, ""),
    ({"groups": 2}, "groups 1 only"),
    ({"activation": "gelu"}, "activation silu only"),
])  # fmt: skip
def test_a_layer_refuses_what_it_has_not(options, said):
    has = {"router_dtype": "activations", "cast_scores": True, "renormalize": (False, True), "epsilon": 0.0}
    if not said:
        return only(Case(**options), "top_k", **has)
    with pytest.raises(Unsupported, match=said):
        only(Case(**options), "top_k", **has)
    return None
