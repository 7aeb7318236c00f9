"""The oracle: its forward against plain formulas, its backward against complex steps, its drops on paper."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from statistics import NormalDist
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from on_paper import CLAMPED, GROUPS, SCORES_BY_GROUP, SELECTION_BIAS
from problems import gamma, who_stays, within

from parity.cases.case import Case, Experts, Router
from parity.cases.parameters import BY_NAME, Parameters, parameters_of, shape
from parity.oracle import reference, vectorised
from parity.oracle.reference import Exact, Numbers, Perturbed
from parity.oracle.tolerances import DRAWS, allowance

Array = np.ndarray
SMALL = Case(ranks=2, tokens=2, width=2, hidden=2, experts=4, top_k=3, scale=2.5, dtype="float64")


def slope(f: Callable[[Array], Array], at: Array, cotangent: Array) -> Array:
    """d/da of sum(f(a) * cotangent), one element at a time, by complex steps: f(a + ih) = f(a) + ih f'(a) for tiny h.

    Nothing is subtracted, so it is as exact as f (Squire and Trapp 1998, "Using Complex Variables to Estimate
    Derivatives of Real Functions").
    """
    result = np.zeros(at.shape)
    for i in np.ndindex(at.shape):
        step = at.astype(complex)
        step[i] += 1e-100j
        result[i] = (np.imag(f(step)) * cotangent).sum() / 1e-100
    return result


def slopes(backward: Callable[[Numbers], dict[str, Array]], expected: dict[str, Array]) -> dict[str, Array]:
    """The oracle's gradients, by name: all of those expected, each within what `check` allows a layer in float64."""
    exact, draws = backward(Exact()), [backward(Perturbed(np.random.default_rng(i))) for i in range(DRAWS)]
    assert exact.keys() == expected.keys()
    for name, gradient in exact.items():
        within(gradient, expected[name], allowance(gradient, [draw[name] for draw in draws], "float64"))
    return exact


def same(actual: Array, expected: Array) -> None:
    """The same formula in another order, of fewer than 64 roundings, of numbers no larger than the largest result."""
    within(actual, expected, gamma(64, "float64") * np.abs(expected).max())


def drawn(case: Case, *, drops: bool) -> tuple[Array, Parameters, Array, Array, Array]:
    """x, what is learned, dout, expert ids and keep. With drops, one token keeps nothing and others keep a part."""
    rng = np.random.default_rng(case.top_k)
    P, T, D, E, K = case.ranks, case.tokens, case.width, case.experts, case.top_k
    x, dout = rng.standard_normal((2, P, T, D))
    learned = {one.name: rng.standard_normal(shape(case, one)) for one in parameters_of(case)}
    ids = rng.permuted(np.tile(np.arange(E), (P, T, 1)), axis=2)[..., :K]
    keep = np.arange(P * T * K).reshape(P, T, K) % 3 != 1 if drops else np.ones((P, T, K), bool)
    keep[0, 0] &= not drops
    return x, Parameters(**learned), dout, ids, keep


def share_below(g: Array) -> Array:
    """The normal distribution's; of a complex step too, in which its derivative is its density."""
    share = np.vectorize(NormalDist().cdf)(np.real(g))
    return share + 1j * np.imag(g) * np.vectorize(NormalDist().pdf)(np.real(g)) if np.iscomplexobj(g) else share


# The whole layer in whole-array operations, one formula for each option and no derivative.
SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "sqrt_softplus": lambda a: np.sqrt(np.log(1 + np.exp(a))),
    "softmax_of_chosen": np.exp,
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu": lambda g: g * share_below(g),
    "gelu_tanh": lambda g: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
    "quick_gelu": lambda g: g / (1 + np.exp(-1.702 * g)),
    "relu2": lambda g: np.where(g > 0, g, 0) ** 2,
}


def dense_scores(case: Case, x: Array, w: Parameters, ids: Array) -> Array:
    logits = x @ w.router + (w.router_bias if case.router_bias else 0)
    score = np.take_along_axis(SCORES[case.score_function](logits), ids, -1)
    if case.score_function == "softmax_of_chosen":
        score = score / score.sum(-1, keepdims=True)
    if case.renormalize:
        score = score / (score.sum(-1, keepdims=True) + case.epsilon)
    return case.scale * score * (w.expert_scale[ids] if case.expert_scale else 1)


def dense_hidden(case: Case, gate: Array | None, up: Array) -> Array:
    act, up_to = ACTIVATIONS[case.activation], case.clamp or np.inf
    if gate is None:
        return act(up)
    return act(np.minimum(gate, up_to)) * (np.clip(up, -up_to, up_to) + case.up_offset)


def dense_experts(case: Case, x: Array, w: Parameters) -> Array:
    """Every expert on every token: [P, T, E, D]."""
    b_gate, b_up, b_down = (w.b_gate, w.b_up, w.b_down) if case.expert_bias else (0, 0, 0)
    gate = np.einsum("ptd,edf->ptef", x, w.w_gate) + b_gate if case.gated else None
    up = np.einsum("ptd,edf->ptef", x, w.w_up) + b_up
    return np.einsum("ptef,efd->pted", dense_hidden(case, gate, up), w.w_down) + b_down


def dense_shared(case: Case, x: Array, w: Parameters) -> Array | float:
    if not case.shared_hidden:
        return 0.0
    gate = x @ w.shared_w_gate if case.gated else None
    y = dense_hidden(case, gate, x @ w.shared_w_up) @ w.shared_w_down
    return y / (1 + np.exp(-(x @ w.shared_score)))[..., None] if case.shared_score else y


def dense(case: Case, x: Array, w: Parameters, ids: Array, keep: Array) -> Array:
    score = dense_scores(case, x, w, ids) * keep
    if case.score_on == "input":
        y, score = dense_experts(case, x * score, w), keep * 1.0
    else:
        y = dense_experts(case, x, w)
    y = np.take_along_axis(y, ids[..., None], 2)
    return (score[..., None] * y).sum(2) + dense_shared(case, x, w)


how = pytest.mark.parametrize(
    ("score_function", "renormalize"), list(product(get_args(Case.__annotations__["score_function"]), (False, True)))
)
choices = pytest.mark.parametrize("top_k", [1, 2, 3])
dropping = pytest.mark.parametrize("drops", [False, True], ids=["all", "drops"])

# Every option beside score function, renormalisation and the number of choices, and some that meet.
OPTIONS: list[dict[str, Any]] = [
    {"router_bias": True},
    {"expert_scale": True},
    {"expert_scale": True, "renormalize": True, "epsilon": 0.5, "router_bias": True, "score_function": "sqrt_softplus"},
    {"renormalize": True, "epsilon": 0.5},
    {"score_on": "input", "top_k": 1, "score_function": "sigmoid"},
    {"score_on": "input", "top_k": 1, "shared_hidden": 3, "shared_score": True, "expert_scale": True},
    *({"activation": name} for name in ACTIVATIONS),
    {"clamp": 0.7},
    {"up_offset": 1.0},
    {"activation": "quick_gelu", "clamp": 0.7, "up_offset": 1.0, "expert_bias": True, "router_bias": True,
     "score_function": "softmax_of_chosen"},
    {"expert_bias": True},
    {"gated": False},
    *({"gated": False, "activation": name, "expert_bias": True, "shared_hidden": 3} for name in ACTIVATIONS),
    {"shared_hidden": 3},
    {"shared_hidden": 3, "shared_score": True, "clamp": 0.7, "up_offset": 1.0},
    {"selection_bias": True, "groups": 2, "top_groups": 2, "outside_groups": "zero"},
]  # fmt: skip
options = pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())))


# ---- Values and gradients


def check_the_layer(case: Case, *, drops: bool) -> None:
    """Both oracles' values are the formula's, and their gradients its slopes; none of them is nothing."""
    x, w, dout, ids, keep = drawn(case, drops=drops)
    expected = {"x": slope(lambda a: dense(case, a, w, ids, keep), x, dout)} | {
        name: slope(lambda a, name=name: dense(case, x, w._replace(**{name: a}), ids, keep), value, dout)
        for name, value in w.there().items() if BY_NAME[name].learned
    }  # fmt: skip
    for oracle in (reference, vectorised):
        layer = oracle.layer(case, x, w, dout, ids, keep, Exact())
        same(layer.score, dense_scores(case, x, w, ids))
        same(layer.out, dense(case, x, w, ids, keep))

        def backward(numbers: Numbers, oracle=oracle) -> dict[str, Array]:
            made = oracle.layer(case, x, w, dout, ids, keep, numbers)
            return {"x": made.dx} | made.gradients

        for gradient in slopes(backward, expected).values():
            # Of one choice, a share of all is 1 whatever its logit is.
            share = case.top_k == 1 and (case.renormalize or case.score_function == "softmax_of_chosen")
            assert np.abs(gradient).max() > 0.01 or share


@how
@choices
@dropping
def test_the_layer_and_its_gradients(score_function, renormalize, top_k, drops):
    case = replace(SMALL, score_function=score_function, renormalize=renormalize, top_k=top_k)
    check_the_layer(case, drops=drops)


@options
@dropping
def test_every_option_and_its_gradients(changes, drops):
    check_the_layer(replace(SMALL, **changes), drops=drops)


def test_no_option_is_left_out():
    elsewhere = {"top_k", "score_function", "renormalize", "scale"}  # above
    elsewhere |= {"group_score", "top_groups", "router_dtype", "cast_scores"}  # of which no formula here knows
    assert {*Router._fields, *Experts._fields} - elsewhere <= {name for changes in OPTIONS for name in changes}
    assert {one.name for changes in OPTIONS for one in parameters_of(replace(SMALL, **changes))} == BY_NAME.keys()


@how
@choices
def test_route_backward(score_function, renormalize, top_k):
    case = replace(SMALL, score_function=score_function, renormalize=renormalize, top_k=top_k)
    check_route_backward(replace(case, router_bias=True, expert_scale=True))
    check_route_backward(case)


def check_route_backward(case: Case) -> None:
    x, w, _, ids, _ = drawn(case, drops=False)
    dscore = np.random.default_rng(1).standard_normal(ids.shape)

    def scores(x: Array = x, **changed: Array) -> Array:
        return dense_scores(case, x, w._replace(**changed), ids)

    learned = [one.name for one in parameters_of(case) if one.stage == "route" and one.learned]
    expected = {n: slope(lambda a, n=n: scores(**{n: a}), getattr(w, n), dscore) for n in learned}
    expected["x"] = slope(scores, x, dscore)
    for oracle in (reference, vectorised):

        def backward(numbers: Numbers, oracle=oracle) -> dict[str, Array]:
            dx, gradients = oracle.route_backward(case, x, w, ids, dscore, numbers)
            return gradients | {"x": dx}

        slopes(backward, expected)


@options
def test_experts_backward(changes):
    case = replace(SMALL, **changes)
    x, w, _, ids, _ = drawn(case, drops=False)
    dy = np.random.default_rng(1).standard_normal((*ids.shape, 2))

    def experts(x: Array = x, **changed: Array) -> Array:
        return np.take_along_axis(dense_experts(case, x, w._replace(**changed)), ids[..., None], 2)

    of_x = [slope(lambda a, k=k: experts(a)[:, :, k], x, dy[:, :, k]) for k in range(case.top_k)]
    learned = [one.name for one in parameters_of(case) if one.per_rank]
    expected = {n: slope(lambda a, n=n: experts(**{n: a}), getattr(w, n), dy) for n in learned}
    expected["x"] = np.stack(of_x, axis=2)
    for oracle in (reference, vectorised):
        same(oracle.experts(case, x, ids, w, Exact()), experts())

        def backward(numbers: Numbers, oracle=oracle) -> dict[str, Array]:
            dx, gradients = oracle.experts_backward(case, x, ids, w, dy, numbers)
            return gradients | {"x": dx}

        slopes(backward, expected)


@choices
@dropping
def test_combine_and_group_backward(top_k, drops):
    case = replace(SMALL, top_k=top_k)
    x, _, dout, ids, keep = drawn(case, drops=drops)
    rng = np.random.default_rng(1)
    y, score, dx_rows = (rng.standard_normal(s) for s in [(*ids.shape, 2), ids.shape, (*ids.shape, 2)])

    def combined(y: Array = y, score: Array = score) -> Array:
        return ((score * keep)[..., None] * y).sum(2)

    expected = {
        "y": slope(lambda a: combined(y=a), y, dout),
        "score": slope(lambda a: combined(score=a), score, dout),
        "x": slope(lambda a: np.repeat(a[:, :, None], top_k, axis=2), x, dx_rows * keep[..., None]),
    }
    for oracle in (reference, vectorised):
        same(oracle.combine(case, y, score, keep, Exact()), combined())

        def backward(numbers: Numbers, oracle=oracle) -> dict[str, Array]:
            dy, dscore = oracle.combine_backward(case, y, score, keep, dout, numbers)
            return {"y": dy, "score": dscore, "x": oracle.group_backward(case, dx_rows, keep, numbers)}

        gradients = slopes(backward, expected)
        assert not gradients["y"][~keep].any()
        assert not gradients["score"][~keep].any()


# The whole layer on paper: one token x = ln 3, one number wide, of two experts.
#
#     logits  (0, ln 3)      softmax (1/4, 3/4)     sigmoid (1/2, 3/4)
#     gate = x, up = 4, down = g + 1 for expert g:  y_g = silu(ln 3) * 4 * (g + 1) = ln 3 * 3/4 * 4 * (g + 1)


@pytest.mark.parametrize(
    ("changes", "score"),
    [
        ({}, (3 / 4, 1 / 4)),
        ({"score_function": "sigmoid"}, (3 / 4, 1 / 2)),
        ({"score_function": "sigmoid", "renormalize": True, "scale": 5.0}, (3, 2)),
        ({"top_k": 1, "renormalize": True}, (1,)),
    ],
)
def test_one_token_on_paper(changes, score):
    case = replace(Case(ranks=1, tokens=1, width=1, hidden=1, experts=2, top_k=2), **changes)
    x = np.full((1, 1, 1), np.log(3))
    experts = np.ones((2, 1, 1)), np.full((2, 1, 1), 4 / np.log(3)), np.array([1, 2]).reshape(2, 1, 1)
    w = Parameters(np.array([[0.0, 1.0]]), *experts)
    ids = reference.select(case, reference.route(case, x, w, Exact())[1], w)
    assert ids[0, 0].tolist() == [1, 0][: case.top_k]
    keep = np.ones(ids.shape, bool)
    layer = reference.layer(case, x, w, np.ones((1, 1, 1)), ids, keep, Exact())
    y = np.array([6, 3])[: case.top_k] * np.log(3)
    same(layer.score[0, 0], np.array(score))
    same(layer.y[0, 0, :, 0], y)
    same(layer.out[0, 0, 0], score @ y)
    same(layer.dscore[0, 0], y)
    same(layer.dy[0, 0, :, 0], np.array(score))


@pytest.mark.parametrize(
    ("logits", "ids"),
    [([1, 3, 3, 2], [1, 2]), ([0, 0, 0, 0], [0, 1]), ([-0.0, -1, 0, -1], [0, 2]), ([1, 2, 3, 3], [2, 3])],
)
def test_ties_go_to_the_lower_id(logits, ids):
    case = Case(ranks=1, tokens=1, experts=4, top_k=2)
    assert reference.select(case, np.array(logits).reshape(1, 1, 4), Parameters(None)).tolist() == [[ids]]


@GROUPS
def test_groups_on_paper(changes, bias, ids):
    case = replace(Case(ranks=1, tokens=1, experts=4, top_k=2), selection_bias=bias, **({"groups": 2} | changes))
    w = Parameters(None, selection_bias=np.array(SELECTION_BIAS) if bias else None)
    score = np.array(SCORES_BY_GROUP).reshape(1, 1, 4)
    for oracle in (reference, vectorised):
        assert oracle.select(case, score, w).tolist() == [[ids]]
    # The bias never reaches a weight.
    weight = reference.chosen_scores(case, score, np.array([[ids]]), w, Exact()).weight
    assert weight.tolist() == [[[SCORES_BY_GROUP[g] for g in ids]]]


def test_gpt_oss_on_paper():
    case = Case(activation="quick_gelu", clamp=2.0, up_offset=1.0)
    gate, up, *expected = np.array(CLAMPED).T
    for got, want in zip(reference.hidden(case, gate, up, Exact()), expected, strict=True):
        assert got is not None
        same(got, want)


# ---- Capacity


@pytest.mark.parametrize(
    ("changes", "capacity"),
    [
        # ceil(cf * T*K / bins), where float32 or float64 arithmetic is off by one
        ({"ranks": 8, "tokens": 7680, "top_k": 1, "capacity_factor": "4.05"}, 3888),  # float32: 3889
        ({"ranks": 8, "tokens": 7680, "top_k": 1, "capacity_factor": "81/20"}, 3888),
        ({"ranks": 1, "tokens": 100, "top_k": 1, "capacity_factor": "0.07"}, 7),  # float64: 8
        ({"ranks": 4, "tokens": 25, "top_k": 2, "capacity_factor": "1.2"}, 15),  # float32: 16
        # rank bins and expert bins, 16*2 / 4 and / 8
        ({"capacity_factor": "1"}, 8),
        ({"capacity_factor": "1", "capacity_per": "expert"}, 4),
        ({"capacity_factor": "1.01"}, 9),
        # at least 1, before it is rounded up
        ({"capacity_factor": "1e-9"}, 1),
        ({"capacity_factor": "1e-9", "align": 8}, 8),
        ({"tokens": 0, "capacity_factor": "1"}, 1),
        ({"tokens": 0}, 1),
        ({"capacity_factor": "1", "align": 8}, 8),
        ({"capacity_factor": "1.01", "align": 8}, 16),
        ({"capacity_factor": "1.01", "align": 3}, 9),
        # the no-drop bound: a token sends at most min(K, e) rows to a rank and one to an expert
        ({}, 32),
        ({"top_k": 3}, 32),
        ({"top_k": 1}, 16),
        ({"ranks": 1, "top_k": 3}, 48),
        ({"top_k": 3, "capacity_per": "expert"}, 16),
        ({"top_k": 3, "align": 5}, 35),
    ],
)
def test_capacity(changes, capacity):
    assert replace(Case(), **changes).capacity == capacity  # P=4, T=16, E=8, K=2


# Who is kept, on paper: two experts on each of two ranks, three tokens that choose two.
#
#     assignment   0  1  2  3  4  5        C = ceil(2/3 * 6 / 2) = 2 to a rank
#     token        0  0  1  1  2  2          = ceil(2/3 * 6 / 4) = 1 to an expert
#     k            0  1  0  1  0  1
#     expert       0  2  2  0  0  1
#     rank         0  1  1  0  0  0
#     score       .1 .3 .7 .5 .5 .9        3 and 4 tie: 3 comes first


@pytest.mark.parametrize(
    ("per", "priority", "kept"),
    [
        ("rank", "token", [0, 3, 1, 2]),
        ("rank", "choice", [0, 4, 1, 2]),
        ("rank", "score", [5, 3, 1, 2]),
        ("expert", "token", [0, 5, 1]),
        ("expert", "choice", [0, 5, 2]),
        ("expert", "score", [3, 5, 2]),
    ],
)
def test_who_is_kept(per, priority, kept):
    case = Case(ranks=2, tokens=3, experts=4, capacity_factor="2/3", capacity_per=per, priority=priority)
    ids = np.array([[[0, 2], [2, 0], [0, 1]]] * 2)  # both ranks alike: each fills bins of its own
    score = np.array([[[0.1, 0.3], [0.7, 0.5], [0.5, 0.9]]] * 2)
    keep = reference.keep_within_capacity(case, ids, score)
    assert [np.flatnonzero(each).tolist() for each in keep] == [sorted(kept)] * 2
    counts = reference.count(case, ids, keep)
    assert counts.tolist() == [np.bincount(ids[0].reshape(-1)[kept], minlength=4).tolist()] * 2


@given(st.data())
def test_who_is_kept_word_for_word(data):
    P, e, T = (data.draw(st.integers(1, n)) for n in (3, 3, 5))
    E = P * e
    K = data.draw(st.integers(1, min(E, 3)))
    factor = data.draw(st.fractions(Fraction(1, 8), 2, max_denominator=8))
    per = data.draw(st.sampled_from(["rank", "expert"]))
    priority = data.draw(st.sampled_from(["token", "choice", "score"]))
    case = replace(
        Case(ranks=P, tokens=T, experts=E, top_k=K), capacity_factor=str(factor), capacity_per=per, priority=priority
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    ids = rng.permuted(np.tile(np.arange(E), (P, T, 1)), axis=2)[..., :K]
    score = rng.integers(0, 3, ids.shape) / 2
    expected = [who_stays(i, s, E, case.bins, case.capacity, priority) for i, s in zip(ids, score, strict=True)]
    assert reference.keep_within_capacity(case, ids, score).tolist() == np.array(expected).tolist()


@pytest.mark.parametrize("per", ["rank", "expert"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_no_drop_bound_is_enough_and_no_more(per, top_k):
    case = Case(ranks=2, tokens=5, experts=4, top_k=top_k, capacity_per=per)
    ids = np.tile(np.arange(top_k), (2, 5, 1))  # as many as can be to experts 0 and 1 of rank 0
    score = np.zeros(ids.shape)
    assert reference.keep_within_capacity(case, ids, score).all()
    one_less = replace(case, capacity_factor=str(Fraction((case.capacity - 1) * case.bins, 5 * top_k)))
    assert one_less.capacity == case.capacity - 1
    dropped = ~reference.keep_within_capacity(one_less, ids, score)
    assert dropped.sum() == 2 * (1 if per == "rank" else top_k)


def test_counts_by_sender_and_receiver():
    case = Case(ranks=2, tokens=2, experts=4, top_k=2)
    ids = np.array([[[0, 1], [0, 2]], [[3, 2], [3, 1]]])
    keep = np.array([[[1, 1], [0, 1]], [[1, 1], [0, 1]]], bool)
    assert reference.sent(case, ids, keep, "dynamic").tolist() == [[2, 1, 1, 0], [0, 1, 1, 2]]
    assert reference.sent(case, ids, keep, "static").tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    received = reference.received(case, reference.sent(case, ids, keep, "dynamic"))
    assert received.tolist() == [[[2, 1], [0, 1]], [[1, 0], [1, 2]]]  # [receiver, sender, local expert]
