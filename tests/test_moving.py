"""From one published layer to another: what it says to do is done, and makes the one layer the other."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from surveyed import OURS, surveyed

from parity.cases.parameters import BY_NAME, Parameters, parameters_of, shape
from parity.judge.card import Finding
from parity.oracle import reference
from parity.oracle.problem import draw, exact_inputs
from parity.oracle.reference import Exact
from parity.survey.moving import UNEXPLAINED, Need, Remain, kept, measured, moving, percent, text
from parity.survey.records import Difference, Surveyed


def rearrange(a: Any, pattern: str, **sizes: int) -> np.ndarray:
    """What einops makes of it."""
    a = np.stack(a) if isinstance(a, list) else a
    left, right = (
        [re.findall(r"\w+", part) for part in re.findall(r"\([^)]*\)|\S+", side)] for side in pattern.split("->")
    )
    for group, n in zip(left, a.shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes and axis != "1"]
        assert len(unknown) <= 1
        for axis in unknown:
            sizes[axis] = n // int(np.prod([sizes[other] for other in group if other != axis]))
        assert n == np.prod([sizes.get(axis, 1) for axis in group])
    flat = [axis for group in left for axis in group if axis != "1"]
    a = a.reshape([sizes[axis] for axis in flat])
    a = a.transpose([flat.index(axis) for group in right for axis in group if axis != "1"])
    return a.reshape([int(np.prod([sizes.get(axis, 1) for axis in group])) for group in right])


def as_kept(one: Surveyed, w: dict[str, np.ndarray]) -> dict[str, Any]:
    """By the names that code has for them, what a layer keeps of these weights of ours."""
    found = {}
    for its in kept(one):
        axes = its.stacked.axes.replace("2", "two")
        ours = BY_NAME[its.ours[0]].axes.replace("H", "F")
        if len(its.ours) == 2:
            a = rearrange([w[name] for name in its.ours], f"two {ours} -> {axes}")
        else:
            a = rearrange(w[its.ours[0]], f"{ours} -> {axes}")
        found[its.called] = a if its.stacked == its else list(a)
    return found


def converted(a: Surveyed, b: Surveyed, w: dict[str, Any]) -> dict[str, Any]:
    """Arrays as `b` keeps them, from those as `a` does, by the code that there is."""
    values = dict(w)
    for need in moving(a, b).needs:
        exec(need.code.replace("; ", "\n"), {"rearrange": rearrange}, values)
    return values


GATE_AND_UP = (
    ("w_gate: E D F", "w_up: E D F"),
    ("w_gate: E F D", "w_up: E F D"),
    ("w_gate: D F", "w_up: D F"),  # each expert's own
    ("w_gate: F D", "w_up: F D"),
    ("w_gate and w_up: E (2 F) D",),
    ("w_gate and w_up: E D (2 F)",),
    ("gate_up: E D (F 2)",),
    ("w_up and w_gate: E (2 F) D",),
    ("up_gate: E (F 2) D",),
    ("w_gate and w_up: 2 E F D",),
    ("w_gate and w_up: (2 F) D",),
)


@pytest.mark.parametrize(("mine", "its"), list(product(GATE_AND_UP, repeat=2)))
def test_gate_and_up_are_brought_into_the_other_form(mine, its):
    rng = np.random.default_rng(0)
    ours = {"w_gate": rng.normal(size=(4, 6, 5)), "w_up": rng.normal(size=(4, 6, 5))}
    a, b = (surveyed(name, {f"its.{i}": one for i, one in enumerate(form)}) for name, form in (("a", mine), ("b", its)))
    for name, array in as_kept(b, ours).items():
        np.testing.assert_array_equal(np.array(converted(a, b, as_kept(a, ours))[name]), np.array(array))
    (need,) = moving(a, b).needs
    assert need.idle == (mine == its) == (not need.code and need.what == "as they are")
    assert need.of == ("w_gate", "w_up")


def test_other_axes_in_words():
    forms = {
        "router": ("D E", "E D"),
        "w_down": ("E F D", "E D F"),
        "shared_score": ("D", "1 D"),
        "b_down": ("E D", "D"),
    }
    a, b = (surveyed(str(i), {name: f"{name}: {axes[i]}" for name, axes in forms.items()}) for i in range(2))
    assert {need.of[0]: need.what for need in moving(a, b).needs} == {
        "router": "transpose", "w_down": "swap the last two axes", "shared_score": "add an axis of one",
        "b_down": "take the experts apart",
    }  # fmt: skip
    assert {need.of[0]: need.what for need in moving(b, a).needs} == {
        "router": "transpose", "w_down": "swap the last two axes", "shared_score": "drop the axis of one",
        "b_down": "stack the experts",
    }  # fmt: skip


FUSED = {
    "its.wide": "w_gate and w_up: E (F 2) D",
    "its.down": "w_down: E D F",
    "its.biases": "b_gate and b_up: E (2 F)",
}
SAME = {"score_function": "sigmoid", "renormalize": True}
MENDED = [
    ({"scale": 2.5}, {}),
    ({}, {"scale": 2.5}),
    ({"scale": 2.5, "expert_bias": True}, {"expert_bias": True}),
    ({"activation": "quick_gelu"}, {}),
    ({"expert_bias": True}, {"expert_bias": True, "activation": "quick_gelu"}),
    ({"activation": "quick_gelu", "gated": False}, {"gated": False}),
    ({"activation": "quick_gelu", "up_offset": 1.0}, {"up_offset": 1.0}),
    ({"expert_scale": True, "expert_bias": True}, {"expert_bias": True}),
    ({}, {"expert_scale": True}),
    ({}, {"router_bias": True}),
    ({}, {"selection_bias": True}),
    ({}, {"expert_bias": True}),
    ({}, {"shared_hidden": 8}),
    ({}, {"shared_hidden": 8, "shared_score": True}),
    ({"shared_hidden": 8}, {"shared_hidden": 8, "shared_score": True}),
    ({"expert_bias": True, "up_offset": 1.0}, {"expert_bias": True}),
]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("mine", "its"), MENDED, ids=str)
def test_what_weights_make_up_for_makes_one_layer_of_two(mine, its, stored):
    """Nothing is left to differ, and with converted weights the second case's oracle says what the first's does."""
    a, b = surveyed("a", **SAME, **mine), surveyed("b", **SAME, **its)
    for one in (a, b):
        assert one.card
        there = {parameter.name for parameter in parameters_of(one.card.case)}
        own = {name: OURS[name] for name in there}
        if stored:
            fused = {name: place for name, place in FUSED.items() if set(re.findall(r"[wb]_\w+", place)) <= there}
            gone = {ours for place in fused.values() for ours in re.findall(r"[wb]_\w+", place)}
            own = {name: place for name, place in own.items() if name not in gone} | fused
            one.stored = own
    found = moving(a, b)
    assert found.remains == found.unsure == []
    assert a.card
    assert b.card
    exact = {name: replace(one, dtype="float64", width=6, hidden=5, tokens=4) for name, one in
             (("a", a.card.case), ("b", b.card.case))}  # fmt: skip
    problem = draw(exact["a"])
    x, w, dout = exact_inputs(problem)
    values = converted(a, b, w.there() | as_kept(a, w.there()))
    ours = {name: values[name] for name in w.there()}
    for one in kept(b):
        if one.called in values and len(one.ours) == 2:
            plain = BY_NAME[one.ours[0]].axes
            pair = rearrange(values[one.called], f"{one.axes.replace('2', 'two')} -> two {plain}", two=2)
            ours |= dict(zip(one.ours, pair, strict=True))
        elif one.called in values:
            ours[one.ours[0]] = rearrange(
                values[one.called], f"{one.axes} -> {BY_NAME[one.ours[0]].axes.replace('H', 'F')}"
            )
    neutral = {name: float(" set one" in need.what) for need in found.needs if " set " in need.what for name in need.of}
    rng = np.random.default_rng(1)
    for parameter in parameters_of(exact["b"]):
        if parameter.name in neutral and parameter.name not in w.there():
            ours[parameter.name] = np.full(shape(exact["b"], parameter), neutral[parameter.name])
        ours.setdefault(parameter.name, rng.normal(size=shape(exact["b"], parameter)))
    there = {parameter.name for parameter in parameters_of(exact["b"])}
    its_own = Parameters(**{"router": None} | {name: ours[name] for name in there})
    outs = [
        reference.layer(case, x, weights, dout, problem.expert_id, problem.keep, Exact()).out
        for case, weights in ((exact["a"], w), (exact["b"], its_own))
    ]
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-6, atol=1e-9)  # numbers in code have seven digits


@pytest.mark.parametrize(
    ("mine", "its", "expected"),
    [
        ({"renormalize": True}, {}, [("scores", "function", "in every output")]),
        ({"selection_bias": True}, {}, [("selection bias", "some weights", "unless it is zero in {a}")]),
        ({"shared_hidden": 8}, {}, [("shared expert", "some weights", "unless its way down is zero in {a}")]),
        (
            {"shared_hidden": 8, "shared_score": True},
            {"shared_hidden": 8},
            [("shared expert", "function", "in every output")],
        ),
        ({"clamp": 7.0}, {}, [("clamp", "some inputs", "where a gate or an up is beyond it")]),
        # Not where the other clamps: a gate that is stretched would be clamped elsewhere.
        ({"activation": "quick_gelu"}, {"clamp": 7.0}, [("activation", "function", ""), ("clamp", "some inputs", "")]),
        ({"gated": False}, {}, [("experts", "function", "")]),
        (
            {"scale": 2.0, "top_k": 1, "score_on": "input"},
            {"top_k": 1, "score_on": "input"},
            [("scale", "function", "")],
        ),
    ],
)
def test_what_no_conversion_mends(mine, its, expected):
    a, b = (surveyed(name, said={"gate and up": None}, **fields) for name, fields in (("a", mine), ("b", its)))
    found = moving(a, b)
    assert [(one.key, one.level) for one in found.remains] == [(key, level) for key, level, _ in expected]
    assert all(one.shows.startswith(shows) for one, (*_, shows) in zip(found.remains, expected, strict=True))
    assert found.unsure == []


@pytest.mark.parametrize(
    ("key", "mine", "its", "sure", "level"),
    [
        ("of equal scores", "the lower expert id is chosen", "the higher expert id is chosen", True, "some inputs"),
        ("added to the sum", "1e-06", "1e-20", True, "some inputs"),
        ("added to the sum", "1e-06", "nothing, or less than 3e-07", True, "some inputs"),
        ("added to the sum", "1e-20", "nothing, or less than 3e-07", False, "some inputs"),
        ("sum over the chosen", "in order of k, in float32", "in order of expert, in float32", True, "roundings"),
        ("sum over the chosen", "in order of k, in float32", "cannot tell: in order of expert, in float32; or in order "
         "of k, in float32", False, "roundings"),
        ("sum over the chosen", "in order of k, in float32", "cannot tell: behind a clamp", False, "roundings"),
        ("precision of logits", "float32", "bfloat16", True, "roundings"),
        ("precision of logits", "float32", Finding("precision of logits", "unclear", "unknown"), False, "roundings"),
        ("scores", "sigmoid", "given to the layer", False, "function"),
        ("clamp", "none", None, False, "some inputs"),
        ("gradient dx", None, "zero", True, "training"),
        ("other tokens", "change nothing, bit for bit", "change nothing but roundings", True, "roundings"),
        ("other tokens", "change nothing, bit for bit", "change the output of 3 of 8 tokens", True, "some inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_no_difference(key, mine, its, sure, level):
    def one(name: str, what: Any) -> Surveyed:
        if isinstance(what, str) and what.startswith("cannot tell"):
            what = Finding(key, what, "cannot tell")
        return surveyed(name, said={key: what})

    for a, b in ((mine, its), (its, mine)):
        found = moving(one("a", a), one("b", b))
        (different,) = found.remains if sure else found.unsure
        assert not (found.unsure if sure else found.remains)
        assert (different.key, different.level) == (key, level)


def test_who_wins_a_tie_goes_by_how_many_there_are():
    """Which of equal scores a library takes is another in a case of other sizes, unless it is the lower ones."""
    key, higher, neither = "of equal scores", "the higher expert id is chosen", "neither the lower nor the higher ids"
    few = surveyed("few", said={key: Finding(key, neither, "odd")}, top_k=2)
    for of, sure in ((surveyed("many", said={key: higher}), False), (surveyed("lower"), True),
                     (surveyed("few, too", said={key: higher}, top_k=2), True)):  # fmt: skip
        found = moving(few, of)
        assert [one.key for one in found.remains if one.key == key] == [key] * sure
        assert [one.key for one in found.unsure if one.key == key] == [key] * (not sure)


def test_a_setting_of_the_other_is_named():
    a, b = surveyed("a", renormalize=True), surveyed("b")
    b.states = {"renormalize": False, "scale": 1.0}
    assert (
        moving(a, b).remains[0].shows.endswith("; the configuration of {b} has a setting for it, now renormalize False")
    )
    a = surveyed("a", scale=2.5)
    assert any(
        "or set the scale in the configuration of {b}, which has one" in need.what for need in moving(a, b).needs
    )


VERDICTS: list[tuple[dict[str, Any], str]] = [
    ({}, "One function: moving weights is all"),
    ({"scale": 2.0}, "One function: moving weights is all"),
    ({"said": {"sum over the chosen": "in order of expert, in float32"}}, "One function, rounded elsewhere: sum over"),
    ({"clamp": 7.0}, "One function for most inputs; for some they differ: clamp."),
    ({"said": {"gradient dx": "zero"}}, "One function with other gradients: gradient dx."),
    ({"selection_bias": True}, "One function for some weights of {a} only, because of its selection bias."),
    ({"clamp": 7.0, "renormalize": True}, "Two functions: they differ in scores."),
]


@pytest.mark.parametrize(("fields", "begins"), VERDICTS)
def test_verdicts(fields, begins):
    assert moving(surveyed("other", **fields), surveyed("plain")).verdict.startswith(begins)


def test_as_text():
    a = surveyed("of:a", {"gate_up": "w_gate and w_up: E (2 F) D", "gate": "router: E D"}, renormalize=True)
    b = surveyed("of:b", {"w13": "w_up and w_gate: E (2 F) D", "gate": "router: E D"})
    assert text(a, b, [Difference("plain", {"out": 0.25, "dx": 0.5}, {"dx": 1e-9})]) == (
        "### From of:a to of:b, float32\n\nTwo functions: they differ in scores.\n\nWhat moving weights needs:\n\n"
        "- w_gate, w_up (gate_up \N{RIGHTWARDS ARROW} w13): gate and up have to stand one after the other, up first: "
        "`w_gate, w_up = rearrange(gate_up, 'E (two F) D -> two E F D', two=2); "
        "up_gate = rearrange([w_up, w_gate], 'two E F D -> E (two F) D')`\n"
        "- router (gate): as it is\n\nWhat no conversion mends:\n\n| | of:a | of:b | shows |\n|---|---|---|---|\n"
        "| scores | softmax over all experts, renormalised | softmax over all experts | in every output |\n\n"
        "Measured, as a part of the largest number:\n\n- plain: 25% apart, most in out\n"
    )
    assert text(a, a, [Difference("plain", {"out": 0.25})]).endswith(
        "\n\nNo finding explains how far apart they are.\n"
    )
    assert UNEXPLAINED not in text(
        a, surveyed("of:b", renormalize=True, scale=2.0), [Difference("plain", {"out": 0.25})]
    )
    assert a.card
    a.card.proved, a.card.proof, a.states = False, "the output does not match", {"renormalize": False}
    assert text(a, b).splitlines()[4:7] == [
        "- of:a is not proved: the output does not match",
        "- of:a: its configuration says renormalize False, the layer does True",
        "",
    ]
    a = surveyed("of:a", said={"scores": "a|b"})
    assert r"| scores | a\|b | softmax over all experts | in every output |" in text(a, surveyed("b")).splitlines()


def test_a_layer_without_a_router_is_given_what_that_makes():
    a = surveyed("a", OURS, selection_bias=True)
    b = surveyed(
        "b", {name: OURS[name] for name in ("w_gate", "w_up", "w_down")}, said={"scores": "given to the layer"}
    )
    for one, other, none in ((a, b, "{b}"), (b, a, "{a}")):
        found = moving(one, other)
        assert any(need.what.startswith(f"{none} has no router: it is given") for need in found.needs)
        assert "selection bias" not in {remain.key for remain in found.remains}


@pytest.mark.parametrize(("apart", "words"), [
    ({"out": 1e-5, "dx": 0.0}, "the same to rounding"), ({"out": 2e-5}, "0.002% apart, most in out"),
    ({"out": 0.013, "dx": 0.2}, "20% apart, most in dx"), ({"out": 1.0}, "100% apart, most in out"),
    ({"out": 200.0}, "200 times apart, most in out"),
    ({"out": float("nan"), "dx": 1.0}, "without bound apart, most in out"),
])  # fmt: skip
def test_measured(apart, words):
    (one,) = measured([Difference("plain", apart)])
    assert one.words("float32") == words


def test_nothing_is_made_up_of_a_layer_whose_parameters_are_not_known():
    (need,) = moving(surveyed("a", {"gate": "router: E D"}), surveyed("b")).needs
    assert need == Need("how weights are kept is not known of {b}: transposes are left out here")
    assert percent(0.5) == "50%"
    assert Remain("a", "b", "c").level == "function"
