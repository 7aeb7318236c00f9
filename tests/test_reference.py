"""The oracle: its forward against plain formulas, its backward against finite differences, its drops on paper."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import gamma, who_stays, within

from parity.cases.case import Case
from parity.oracle import reference
from parity.oracle.reference import Exact, Weights

Array = np.ndarray
SMALL = Case(ranks=2, tokens=2, width=2, hidden=2, experts=4, top_k=3, scale=2.5)


def slope(f: Callable[[Array], Array], at: Array, cotangent: Array) -> Array:
    """d/da of sum(f(a) * cotangent), one element at a time, by central differences."""
    result = np.zeros(at.shape)
    for i in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[i] = 1e-5
        result[i] = ((f(at + step) - f(at - step)) * cotangent).sum() / 2e-5
    return result


def close(actual: Array, expected: Array) -> None:
    """As a slope: a step h of 1e-5 is off by h**2 / 6 of the third derivative and 1e-16 / h, here by 5e-10 at most."""
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-8)


def same(actual: Array, expected: Array) -> None:
    """The same formula in another order, of fewer than 64 roundings, of numbers no larger than the largest result."""
    within(actual, expected, gamma(64, "float64") * np.abs(expected).max())


def drawn(case: Case, *, drops: bool) -> tuple[Array, Array, dict[str, Array], Array, Array, Array]:
    """x, router, weights, dout, expert ids and keep. With drops, one token keeps nothing and others keep a part."""
    rng = np.random.default_rng(case.top_k)
    P, T, D, F, E, K = case.ranks, case.tokens, case.width, case.hidden, case.experts, case.top_k
    x, router, dout = (rng.standard_normal(s) for s in [(P, T, D), (D, E), (P, T, D)])
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    ids = rng.permuted(np.tile(np.arange(E), (P, T, 1)), axis=2)[..., :K]
    keep = np.arange(P * T * K).reshape(P, T, K) % 3 != 1 if drops else np.ones((P, T, K), bool)
    keep[0, 0] &= not drops
    return x, router, weights, dout, ids, keep


def dense_scores(case: Case, x: Array, router: Array, ids: Array) -> Array:
    logits = x @ router
    if case.score_function == "sigmoid":
        score = 1 / (1 + np.exp(-logits))
    else:
        score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    score = np.take_along_axis(score, ids, -1)
    return case.scale * (score / score.sum(-1, keepdims=True) if case.renormalize else score)


def dense(case: Case, x: Array, router: Array, w: dict[str, Array], ids: Array, keep: Array) -> Array:
    """Every expert on every token, in whole-array operations."""
    gate, up = (np.einsum("ptd,edf->ptef", x, a) for a in (w["w_gate"], w["w_up"]))
    y = np.einsum("ptef,efd->pted", gate / (1 + np.exp(-gate)) * up, w["w_down"])
    y = np.take_along_axis(y, ids[..., None], 2)
    return ((dense_scores(case, x, router, ids) * keep)[..., None] * y).sum(2)


how = pytest.mark.parametrize(
    ("score_function", "renormalize"), [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)]
)
choices = pytest.mark.parametrize("top_k", [1, 2, 3])
dropping = pytest.mark.parametrize("drops", [False, True], ids=["all", "drops"])


# ---- Values and gradients


@how
@choices
@dropping
def test_the_layer_and_its_gradients(score_function, renormalize, top_k, drops):
    case = replace(SMALL, score_function=score_function, renormalize=renormalize, top_k=top_k)
    x, router, w, dout, ids, keep = drawn(case, drops=drops)
    layer = reference.layer(case, x, router, Weights(**w), dout, ids, keep, Exact())
    same(layer.score, dense_scores(case, x, router, ids))
    same(layer.out, dense(case, x, router, w, ids, keep))
    close(layer.dx, slope(lambda a: dense(case, a, router, w, ids, keep), x, dout))
    close(layer.drouter, slope(lambda a: dense(case, x, a, w, ids, keep), router, dout))
    for name, value in w.items():
        expected = slope(lambda a, name=name: dense(case, x, router, w | {name: a}, ids, keep), value, dout)
        close(getattr(layer, f"d{name}"), expected)
    assert np.abs(layer.dx).max() > 0.01


@how
@choices
def test_route_backward(score_function, renormalize, top_k):
    case = replace(SMALL, score_function=score_function, renormalize=renormalize, top_k=top_k)
    x, router, _, _, ids, _ = drawn(case, drops=False)
    dscore = np.random.default_rng(1).standard_normal(ids.shape)
    dx, drouter = reference.route_backward(case, x, router, ids, dscore, Exact())

    def scores(x: Array, router: Array) -> Array:
        return reference.chosen_scores(case, reference.route(case, x, router, Exact())[1], ids, Exact())

    close(dx, slope(lambda a: scores(a, router), x, dscore))
    close(drouter, slope(lambda a: scores(x, a), router, dscore))


def test_experts_backward():
    x, _, w, _, ids, _ = drawn(SMALL, drops=False)
    dy = np.random.default_rng(1).standard_normal((*ids.shape, 2))

    def experts(x: Array = x, **changed: Array) -> Array:
        return reference.experts(SMALL, x, ids, Weights(**(w | changed)), Exact())

    dx, dw = reference.experts_backward(SMALL, x, ids, Weights(**w), dy, Exact())
    for k in range(3):
        close(dx[:, :, k], slope(lambda a, k=k: experts(a)[:, :, k], x, dy[:, :, k]))
    for (name, value), gradient in zip(w.items(), dw, strict=True):
        close(gradient, slope(lambda a, name=name: experts(**{name: a}), value, dy))


@choices
@dropping
def test_combine_and_group_backward(top_k, drops):
    case = replace(SMALL, top_k=top_k)
    x, _, _, dout, ids, keep = drawn(case, drops=drops)
    rng = np.random.default_rng(1)
    y, score, dx_rows = (rng.standard_normal(s) for s in [(*ids.shape, 2), ids.shape, (*ids.shape, 2)])
    dy, dscore = reference.combine_backward(case, y, score, keep, dout, Exact())
    close(dy, slope(lambda a: reference.combine(case, a, score, keep, Exact()), y, dout))
    close(dscore, slope(lambda a: reference.combine(case, y, a, keep, Exact()), score, dout))
    assert not dy[~keep].any()
    assert not dscore[~keep].any()
    dx = reference.group_backward(case, dx_rows, keep, Exact())
    close(dx, slope(lambda a: np.repeat(a[:, :, None], top_k, axis=2), x, dx_rows * keep[..., None]))


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
    w = Weights(np.ones((2, 1, 1)), np.full((2, 1, 1), 4 / np.log(3)), np.array([1, 2]).reshape(2, 1, 1))
    logits, _ = reference.route(case, x, np.array([[0.0, 1.0]]), Exact())
    ids = reference.select(case, logits)
    assert ids[0, 0].tolist() == [1, 0][: case.top_k]
    keep = np.ones(ids.shape, bool)
    layer = reference.layer(case, x, np.array([[0.0, 1.0]]), w, np.ones((1, 1, 1)), ids, keep, Exact())
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
    assert reference.select(case, np.array(logits).reshape(1, 1, 4)).tolist() == [[ids]]


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
