"""Every stage on an example small enough to check on paper. Expected values are literals.

The running example: two ranks, two tokens each, four experts (0 and 1 on rank 0, 2 and 3 on rank 1), K = 2.

    rank 0   t0 -> 2,0   t1 -> 0,1      assignments a0:2 a1:0 | a2:0 a3:1      sorted  e0: a1 a2  e1: a3  e2: a0
    rank 1   t0 -> 1,0   t1 -> 1,3                  a0:1 a1:0 | a2:1 a3:3      sorted  e0: a1  e1: a0 a2  e3: a3
"""

from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_ranks import AXIS, both_ways, over_ranks
from on_paper import CLAMPED, GROUPS, SCORES_BY_GROUP, SELECTION_BIAS
from problems import gamma
from torch_ranks import TorchRanks, run_exchange

import jax_impl.exchange
import jax_impl.experts
import jax_impl.glu
import jax_impl.grouping
import jax_impl.layout
import jax_impl.matmul
import jax_impl.routing
import torch_impl.exchange
import torch_impl.experts
import torch_impl.glu
import torch_impl.grouping
import torch_impl.layout
import torch_impl.matmul
import torch_impl.routing
from jax_impl import Capacity, plan_capacity

NAN = float("nan")
IDS = [[2, 0], [0, 1]]
IDS_OF_RANK_1 = [[1, 0], [1, 3]]


def same(actual, expected) -> None:
    """Equal without any tolerance, and of the same shape."""
    actual = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual)
    expected = np.array(expected, actual.dtype)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


def close(actual, expected) -> None:
    """Up to 16 roundings of float32, of logits, powers, their sum and quotients; where 0 is expected, 0."""
    np.testing.assert_allclose(np.asarray(actual), np.array(expected), rtol=gamma(16, "float32"), atol=0)


# 1. route. x is the identity, so a token's logits are a row of the router.
#
#     logits   t0: ln 1, ln 3, ln 3, ln 1      softmax  1/8 3/8 3/8 1/8
#              t1: 0, 0, 0, 0                           1/4 1/4 1/4 1/4
#
# Equal logits: the lower expert first.

ROUTER = np.array([np.log([1, 3, 3, 1]), [0, 0, 0, 0]], np.float32)
ROUTE_CASES = pytest.mark.parametrize(
    ("how", "scores"),
    [
        ({}, [[3 / 8, 3 / 8], [1 / 4, 1 / 4]]),
        ({"score_function": "sigmoid"}, [[3 / 4, 3 / 4], [1 / 2, 1 / 2]]),  # 3/(1+3), 1/(1+1)
        ({"renormalize": True}, [[1 / 2, 1 / 2], [1 / 2, 1 / 2]]),
        ({"scale": 4.0}, [[3 / 2, 3 / 2], [1, 1]]),
        ({"score_function": "sigmoid", "renormalize": True, "scale": 2.5}, [[5 / 4, 5 / 4], [5 / 4, 5 / 4]]),
        ({"renormalize": True, "epsilon": 0.25}, [[3 / 8, 3 / 8], [1 / 3, 1 / 3]]),  # 3/8 / (3/4+1/4), 1/4 / (1/2+1/4)
        ({"score_function": "sqrt_softplus"}, np.sqrt(np.log([[4, 4], [2, 2]]))),  # log(1+3), log(1+1)
        ({"score_function": "softmax_of_chosen", "scale": 4.0}, [[2, 2], [2, 2]]),
    ],
)


@ROUTE_CASES
def test_route_torch(how, scores):
    routing = torch_impl.routing.route(torch.eye(2), torch.from_numpy(ROUTER), torch_impl.Router(2, **how))
    same(routing.expert_id_TK, [[1, 2], [0, 1]])
    same(routing.counts_E, [1, 2, 1, 0])
    close(routing.score_TK, scores)


@ROUTE_CASES
def test_route_jax(how, scores):
    routing = jax.jit(partial(jax_impl.routing.route, router=jax_impl.Router(2, **how)))(jnp.eye(2), ROUTER)
    same(routing.expert_id_TK, [[1, 2], [0, 1]])
    same(routing.counts_E, [1, 2, 1, 0])
    close(routing.score_TK, scores)


# Replayed ids: their scores, whether the router would choose them or not, in the order given.
REPLAYED_IDS = [[3, 1], [2, 0]]
REPLAYED_SCORES = [[1 / 8, 3 / 8], [1 / 4, 1 / 4]]
REPLAYED_COUNTS = [1, 1, 1, 1]
# Cotangent 1 for t0's first score, 0 for the rest. With s = 1/8 3/8 3/8 1/8: ds_3 / dlogit_j = s_3 * ([j = 3] - s_j).
DLOGITS_T0 = [-1 / 64, -3 / 64, -3 / 64, 7 / 64]
DX_T0 = [-6 / 64 * np.log(3), 0]  # dlogits @ router.T


def test_route_replayed_torch():
    x, router = torch.eye(2, requires_grad=True), torch.from_numpy(ROUTER.copy()).requires_grad_()
    routing = torch_impl.routing.route(x, router, torch_impl.Router(2), expert_id_TK=torch.tensor(REPLAYED_IDS))
    same(routing.expert_id_TK, REPLAYED_IDS)
    same(routing.counts_E, REPLAYED_COUNTS)
    close(routing.score_TK.detach(), REPLAYED_SCORES)
    dx, drouter = torch.autograd.grad(routing.score_TK, (x, router), torch.tensor([[1.0, 0], [0, 0]]))
    close(dx, [DX_T0, [0, 0]])
    close(drouter, [DLOGITS_T0, [0, 0, 0, 0]])


def test_route_replayed_jax():
    def scores(x, router):
        routing = jax_impl.routing.route(x, router, jax_impl.Router(2), expert_id_TK=jnp.array(REPLAYED_IDS))
        return routing.score_TK, routing

    score_TK, vjp, routing = jax.vjp(jax.jit(scores), jnp.eye(2), jnp.asarray(ROUTER), has_aux=True)
    same(routing.expert_id_TK, REPLAYED_IDS)
    same(routing.counts_E, REPLAYED_COUNTS)
    close(score_TK, REPLAYED_SCORES)
    dx, drouter = vjp(jnp.array([[1.0, 0], [0, 0]]))
    close(dx, [DX_T0, [0, 0]])
    close(drouter, [DLOGITS_T0, [0, 0, 0, 0]])


# What a router knows of each expert. The bias on logits turns t0's 1 3 3 1 into 1 3 3 9, and t1's into 1 1 1 9; the one
# on scores lets 0 win over 1 and 2, and weighs nothing; the scale multiplies what is chosen.
BIASED = {"bias_E": [0, 0, 0, np.log(9)]}, [[3, 1], [3, 0]], [[9 / 16, 3 / 16], [9 / 12, 1 / 12]]
SELECTED = {"selection_bias_E": [1.0, 0, 0, 0]}, [[0, 1], [0, 1]], [[1 / 8, 3 / 8], [1 / 4, 1 / 4]]
SCALED = {"scale_E": [8.0, 16, 32, 64]}, [[1, 2], [0, 1]], [[6, 12], [2, 4]]
of_each_expert = pytest.mark.parametrize(("given", "ids", "scores"), [BIASED, SELECTED, SCALED])


@of_each_expert
def test_route_per_expert_torch(given, ids, scores):
    per_expert = torch_impl.PerExpert(**{name: torch.tensor(a, dtype=torch.float32) for name, a in given.items()})
    routing = torch_impl.route(torch.eye(2), torch.from_numpy(ROUTER), torch_impl.Router(2), per_expert=per_expert)
    same(routing.expert_id_TK, ids)
    close(routing.score_TK, scores)


@of_each_expert
def test_route_per_expert_jax(given, ids, scores):
    per_expert = jax_impl.PerExpert(**{name: jnp.array(a, jnp.float32) for name, a in given.items()})
    routing = jax_impl.route(jnp.eye(2), jnp.array(ROUTER), jax_impl.Router(2), per_expert=per_expert)
    same(routing.expert_id_TK, ids)
    close(routing.score_TK, scores)


def test_a_selection_bias_has_no_gradient():
    """Nothing goes into it, and nothing through it: scores are what the chosen logits make of them."""
    bias, x = torch.tensor([1.0, 0, 0, 0], requires_grad=True), torch.eye(2, requires_grad=True)
    per_expert = torch_impl.PerExpert(selection_bias_E=bias)
    score = torch_impl.route(x, torch.from_numpy(ROUTER), torch_impl.Router(2), per_expert=per_expert).score_TK
    assert torch.autograd.grad(score.sum(), (bias, x), allow_unused=True)[0] is None

    def scores(bias):
        per_expert = jax_impl.PerExpert(selection_bias_E=bias)
        return jax_impl.route(jnp.eye(2), jnp.array(ROUTER), jax_impl.Router(2), per_expert=per_expert).score_TK.sum()

    same(jax.grad(scores)(jnp.array([1.0, 0, 0, 0])), [0, 0, 0, 0])


@GROUPS
def test_groups_torch(changes, bias, ids):
    router = torch_impl.Router(**({"top_k": 2, "groups": 2} | changes))
    chosen = torch_impl.routing.choose(
        torch.tensor([SCORES_BY_GROUP]), router, torch.tensor(SELECTION_BIAS) if bias else None
    )
    same(chosen, [ids])


@GROUPS
def test_groups_jax(changes, bias, ids):
    router = jax_impl.Router(**({"top_k": 2, "groups": 2} | changes))
    chosen = jax_impl.routing.choose(jnp.array([SCORES_BY_GROUP]), router, jnp.array(SELECTION_BIAS) if bias else None)
    same(chosen, [ids])


# Where scores are on the input, x = [1, 2] and [3, 4] are multiplied by 1/2 and 1/4, and the output by 1.


def test_weigh_input_torch():
    x, score = torch.tensor(X, requires_grad=True), torch.tensor([[1 / 2], [1 / 4]], requires_grad=True)
    given, weight = torch_impl.routing.weigh_input(x, score, "input")
    same(given, [[1 / 2, 1], [3 / 4, 1]])
    same(weight, [[1], [1]])
    dx, dscore = torch.autograd.grad(given, (x, score), torch.tensor([[1.0, 10], [2, 20]]))
    same(dx, [[1 / 2, 5], [1 / 2, 5]])
    same(dscore, [[21], [86]])  # 1*1 + 2*10, 3*2 + 4*20
    given, weight = torch_impl.routing.weigh_input(x.bfloat16(), score, "input")
    assert (given.dtype, weight.dtype) == (torch.bfloat16, torch.float32)


def test_weigh_input_jax():
    x, score = jnp.array(X), jnp.array([[1 / 2], [1 / 4]])
    (given, weight), vjp = jax.vjp(lambda x, score: jax_impl.routing.weigh_input(x, score, "input"), x, score)
    same(given, [[1 / 2, 1], [3 / 4, 1]])
    same(weight, [[1], [1]])
    dx, dscore = vjp((jnp.array([[1.0, 10], [2, 20]]), jnp.zeros((2, 1))))
    same(dx, [[1 / 2, 5], [1 / 2, 5]])
    same(dscore, [[21], [86]])
    given, weight = jax_impl.routing.weigh_input(x.astype("bfloat16"), score, "input")
    assert (given.dtype, weight.dtype) == (jnp.bfloat16, jnp.float32)


def integer_ties() -> tuple[np.ndarray, list[list[int]]]:
    """Logits with many ties, zeros of both signs among them, and their order: larger first, then lower id."""
    logits = np.array([[2, 1, 2, 2, 1], [-1, 0, -0.0, 0, -1], [0, 3, 0, -0.0, 3], [-2, -2, -2, -2, -2]], np.float32)
    return logits, [[0, 2, 3, 1, 4], [1, 2, 3, 0, 4], [1, 4, 0, 2, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"])
def test_scores_alike_take_the_lower_id(score_function):
    """Zeros of both signs among the logits, which softmax_of_chosen chooses by."""
    logits, order = integer_ties()
    x, router = torch.eye(4), torch.from_numpy(logits)
    same(torch_impl.route(x, router, torch_impl.Router(5, score_function)).expert_id_TK, order)
    same(jax_impl.route(jnp.eye(4), jnp.array(logits), jax_impl.Router(5, score_function)).expert_id_TK, order)


@pytest.mark.parametrize(("dtype", "logit"), [("wide", 1 + 2**-8), ("float32", 1 + 2**-8), ("activations", 1)])
def test_logits_are_rounded_to_the_dtype_that_the_router_has(dtype, logit):
    """1 + 1/256 is halfway between two bfloat16, and becomes the even one."""
    x, router = [[1, 2**-8]], [[1.0], [1.0]]
    same(torch_impl.routing.logits(torch.tensor(x, dtype=torch.bfloat16), torch.tensor(router), dtype, None), [[logit]])
    same(jax_impl.routing.logits(jnp.array(x, jnp.bfloat16), jnp.array(router), dtype, None), [[logit]])


# 2. group_by_expert. On rank 0, with t0 = [1, 2] and t1 = [3, 4]:
#
#     PyTorch          row 0: a1 = t0   row 1: a2 = t1   row 2: a3 = t1   row 3: a0 = t0
#     JAX, C = 2       rank 0: a1 = t0 | a2 = t1  (a3 dropped)            rank 1: a0 = t0 | padding

X = [[1.0, 2.0], [3.0, 4.0]]


def test_group_by_expert_torch():
    x = torch.tensor(X, requires_grad=True)
    grouped = torch_impl.grouping.group_by_expert(x, torch.tensor(IDS), torch.tensor([2, 1, 1, 0]))
    same(grouped.x_ND, [[1, 2], [3, 4], [3, 4], [1, 2]])
    same(grouped.slot_TK, [[3, 0], [1, 2]])
    same(grouped.assignment_N, [1, 2, 3, 0])
    # t0 gathers rows 3 and 0, t1 rows 1 and 2.
    (dx,) = torch.autograd.grad(grouped.x_ND, x, torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80]]))
    same(dx, [[9, 90], [6, 60]])


@lru_cache  # one compilation for all ids
def group_jax(capacity):
    @jax.jit
    def group(x, ids):
        scores, counts_E = jnp.array([[0.5, 0.25], [0.25, 0.75]]), jax_impl.routing.count_per_expert(ids, 4)
        grouped = jax_impl.grouping.group_by_expert(x, ids, scores, counts_E, capacity)
        return grouped.x_BCD, grouped

    return group


def test_group_by_expert_jax():
    x_BCD, vjp, grouped = jax.vjp(lambda x: group_jax(Capacity(2, 2))(x, jnp.array(IDS)), jnp.array(X), has_aux=True)
    same(x_BCD, [[[1, 2], [3, 4]], [[1, 2], [0, 0]]])
    same(grouped.slot_TK, [[2, 0], [1, 4]])  # 4 = B*C: dropped
    same(grouped.assignment_BC, [[1, 2], [0, 4]])  # 4 = T*K: padding
    same(grouped.kept_E, [2, 0, 1, 0])
    # t0 gathers rows 2 and 0, t1 only row 1: a3 was dropped. The padding's gradient goes nowhere.
    (dx,) = vjp(jnp.array([[[1.0, 10], [2, 20]], [[4, 40], [NAN, NAN]]]))
    same(dx, [[5, 50], [2, 20]])


# The same under other capacities and priorities: bins, C, priority, ids; slot, assignment, kept. A dropped slot is B*C,
# padding is assignment 4.
#
#   scores   a0 1/2   a1 1/4   a2 1/4   a3 3/4
GROUP_CASES = [
    # C = 1: the lower assignment of a1 a2 a3 stays.
    (2, 1, "token", IDS, [[1, 0], [2, 2]], [[1], [0]], [1, 0, 1, 0]),
    # C = 3: all stay, the slots run on over the bins.
    (2, 3, "token", IDS, [[3, 0], [1, 2]], [[1, 2, 3], [0, 4, 4]], [2, 1, 1, 0]),
    # a2 is t1's first choice, a1 and a3 are second choices: a2, then a1.
    (2, 1, "choice", IDS, [[1, 2], [0, 2]], [[2], [0]], [1, 0, 1, 0]),
    (2, 2, "choice", IDS, [[2, 0], [1, 4]], [[1, 2], [0, 4]], [2, 0, 1, 0]),
    # a3 has the highest score, a1 and a2 tie and a1 comes first. Kept rows stay sorted by expert: a1 before a3.
    (2, 1, "score", IDS, [[1, 2], [2, 0]], [[3], [0]], [0, 1, 1, 0]),
    (2, 2, "score", IDS, [[2, 0], [4, 1]], [[1, 3], [0, 4]], [1, 1, 1, 0]),
    # Rank 1's ids, a1 is of expert 0, a0 and a2 of expert 1, a3 of expert 3.
    (2, 2, "token", IDS_OF_RANK_1, [[1, 0], [4, 2]], [[1, 0], [3, 4]], [1, 1, 0, 1]),
    (2, 2, "choice", IDS_OF_RANK_1, [[0, 4], [1, 2]], [[0, 2], [3, 4]], [0, 2, 0, 1]),
    (2, 2, "score", IDS_OF_RANK_1, [[1, 0], [4, 2]], [[1, 0], [3, 4]], [1, 1, 0, 1]),
    (2, 1, "score", IDS_OF_RANK_1, [[0, 2], [2, 1]], [[0], [3]], [0, 1, 0, 1]),
    # A bin per expert.
    (4, 1, "token", IDS, [[2, 0], [4, 1]], [[1], [3], [0], [4]], [1, 1, 1, 0]),
    (4, 1, "choice", IDS, [[2, 4], [0, 1]], [[2], [3], [0], [4]], [1, 1, 1, 0]),
    (4, 1, "score", IDS, [[2, 0], [4, 1]], [[1], [3], [0], [4]], [1, 1, 1, 0]),
    (4, 2, "token", IDS, [[4, 0], [1, 2]], [[1, 2], [3, 4], [0, 4], [4, 4]], [2, 1, 1, 0]),
    (4, 1, "score", IDS_OF_RANK_1, [[1, 0], [4, 3]], [[1], [0], [4], [3]], [1, 1, 0, 1]),
    # Ids out of range, which only a traced layer lets through, are dropped and take no room.
    (2, 2, "token", [[9, 0], [-1, 1]], [[4, 0], [4, 1]], [[1, 3], [4, 4]], [1, 1, 0, 0]),
    (4, 1, "score", [[9, 0], [-1, 1]], [[4, 0], [4, 1]], [[1], [3], [4], [4]], [1, 1, 0, 0]),
]


@pytest.mark.parametrize(("n_bins", "rows", "priority", "ids", "slot", "assignment", "kept"), GROUP_CASES)
def test_who_is_dropped(n_bins, rows, priority, ids, slot, assignment, kept):
    x_BCD, grouped = group_jax(Capacity(n_bins, rows, priority))(jnp.array(X), jnp.array(ids))
    same(grouped.slot_TK, slot)
    same(grouped.assignment_BC, assignment)
    same(grouped.kept_E, kept)
    token = {0: X[0], 1: X[0], 2: X[1], 3: X[1], 4: [0, 0]}  # of each assignment; 4 is padding
    same(x_BCD, [[token[a] for a in assignments] for assignments in assignment])


@pytest.mark.parametrize(
    ("factor", "n_tokens", "top_k", "n_experts", "n_ranks", "rows"),
    [
        # 7680 * 81/20 / 8 = 3888; 4.05 in float32 is a little more than 81/20, which would make 3889.
        ("4.05", 960, 8, 64, 8, 3888),
        (4.05, 960, 8, 64, 8, 3888),
        (Decimal("4.05"), 960, 8, 64, 8, 3888),
        ("81/20", 960, 8, 64, 8, 3888),
        (Fraction(81, 20), 960, 8, 64, 8, 3888),
        (1.1, 50, 2, 4, 1, 110),  # 1.1 * 100 in float64 is a little more than 110
        ("5/4", 10, 2, 8, 4, 7),  # 20 * 5/4 / 4 = 6.25
        (1.25, 10, 2, 8, 4, 7),
        (1, 10, 2, 8, 4, 5),
        ("1e-3", 10, 2, 8, 4, 1),  # at least 1
        (1, 0, 2, 8, 4, 1),
        # No drop: all of a token's min(K, e) choices may be on one rank.
        (None, 10, 4, 8, 4, 20),
        (None, 10, 2, 8, 1, 20),
        (None, 10, 1, 8, 4, 10),
        (None, 0, 4, 8, 4, 1),
    ],
)
def test_plan_capacity_per_rank(factor, n_tokens, top_k, n_experts, n_ranks, rows):
    assert plan_capacity(factor, n_tokens, top_k, n_experts, n_ranks) == Capacity(n_ranks, rows, "token")


def test_plan_capacity_per_expert():
    plan = partial(plan_capacity, n_tokens=10, top_k=2, n_experts=8, n_ranks=4, per="expert", priority="choice")
    assert plan("1") == Capacity(8, 3, "choice")  # 20 / 8 = 2.5
    assert plan(None) == Capacity(8, 10, "choice")  # a token chooses an expert once


@pytest.mark.parametrize(("align", "rows"), [(1, 7), (4, 8), (7, 7), (8, 8), (128, 128)])
def test_plan_capacity_rounds_up_to_align(align, rows):
    assert plan_capacity("5/4", 10, 2, 8, 4, align=align).rows == rows


# 3. exchange_counts.    counts   rank 0: 2 1 | 1 0      rank 0 gets   from 0: 2 1   rank 1 gets   from 0: 1 0
#                                 rank 1: 1 2 | 0 1                    from 1: 1 2                 from 1: 0 1
# 4. send_tokens.        rows     rank 0: 10 11 12 | 13  rank 0 gets   10 11 12 20 21 22
#                                 rank 1: 20 21 22 | 23  rank 1 gets   13 23
# Backward, the gradients 1..6 of rank 0 and 7, 8 of rank 1 go back the same way.
# 8. return_tokens is the inverse of 4, forward and backward.


def test_exchange_torch(torch_ranks: TorchRanks):
    rows = [torch.tensor([[10.0], [11], [12], [13]]), torch.tensor([[20.0], [21], [22], [23]])]
    counts = [torch.tensor([2, 1, 1, 0]), torch.tensor([1, 2, 0, 1])]
    dreceived = [torch.tensor([[1.0], [2], [3], [4], [5], [6]]), torch.tensor([[7.0], [8]])]
    rank_0, rank_1 = torch_ranks(run_exchange, rows, counts, dreceived)

    same(rank_0.counts_Pe, [[2, 1], [1, 2]])
    same(rank_1.counts_Pe, [[1, 0], [0, 1]])
    assert [a.tolist() for a in rank_0.splits[:2]] == [[3, 1], [3, 3]]
    assert rank_0.splits[2:] == (4, 6)
    assert [a.tolist() for a in rank_1.splits[:2]] == [[3, 1], [1, 1]]
    assert rank_1.splits[2:] == (4, 2)
    same(rank_0.received_RD, [[10], [11], [12], [20], [21], [22]])
    same(rank_1.received_RD, [[13], [23]])
    same(rank_0.dx_ND, [[1], [2], [3], [7]])
    same(rank_1.dx_ND, [[4], [5], [6], [8]])
    for result, of_rank in zip((rank_0, rank_1), rows, strict=True):
        same(result.returned_ND, of_rank.tolist())
        same(result.dreceived_RD, result.received_RD.tolist())  # as the gradient that went in was x itself


@both_ways
def test_exchange_jax(how_mapped):
    counts = jnp.array([[2, 1, 1, 0], [1, 2, 0, 1]])
    counts_Pe = over_ranks(partial(jax_impl.exchange.exchange_counts, axis_name=AXIS), how_mapped)(counts)
    same(counts_Pe, [[[2, 1], [1, 2]], [[1, 0], [0, 1]]])


# Bins go whole, padding with them: one row each below, as the bins of C = 2 (a bin per rank) or C = 1 (per expert).
#
#     rank 0:  10 11 | 12 __      rank 0 gets   10 11 | 20 21
#     rank 1:  20 21 | 22 __      rank 1 gets   12 __ | 22 __
@both_ways
@pytest.mark.parametrize("stage", [jax_impl.exchange.send_tokens, jax_impl.exchange.return_tokens])
@pytest.mark.parametrize("bins", [(2, 2), (4, 1)])
def test_exchange_of_rows_jax(how_mapped, stage, bins):
    rows = jnp.array([[10.0, 11, 12, 0], [20, 21, 22, 0]]).reshape(2, *bins, 1)
    cotangent = jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]).reshape(2, *bins, 1)
    received, vjp = jax.vjp(over_ranks(partial(stage, axis_name=AXIS), how_mapped), rows)
    same(received.reshape(2, 4), [[10, 11, 20, 21], [12, 0, 22, 0]])
    same(vjp(cotangent)[0].reshape(2, 4), [[1, 2, 5, 6], [3, 4, 7, 8]])


def test_one_rank_keeps_its_rows():
    counts_Pe, splits = torch_impl.exchange.exchange_counts(torch.tensor([2, 1, 1, 0]))
    same(counts_Pe, [[2, 1, 1, 0]])
    assert [a.tolist() for a in splits[:2]] == [[4], [4]]
    assert splits[2:] == (4, 4)
    same(torch_impl.exchange.send_tokens(torch.tensor([[1.0], [2], [3], [4]]), splits), [[1], [2], [3], [4]])
    same(jax_impl.exchange.exchange_counts(jnp.array([2, 1, 1, 0])), [[2, 1, 1, 0]])
    same(jax_impl.exchange.send_tokens(jnp.array([[[1.0], [2]]])), [[[1], [2]]])


# 5. to_expert_major and 7. to_rank_major.
#
#   PyTorch        p0: e0 e1 | p1: e0 e0 e1            row   0 1 | 2 3 4
#                  e0: p0 p1 p1 | e1: p0 p1            row   0 2 3 | 1 4
#
#   rank bins      p0: e0 e0 e1 __ | p1: e0 e1 __ __   row   0 1 2 3 | 4 5 6 7
#                  e0: p0 p0 p1 | e1: p0 p1 | __ ...   row   0 1 4 | 2 5 | and 8, past the end
#
#   expert bins    p0e0: a __ | p0e1: b c | p1e0: d __ | p1e1: __ __      row   0 1 | 2 3 | 4 5 | 6 7
#                  e0: a __ d __ | e1: b c __ __                          row   0 8 4 8 | 2 3 8 8


def test_layout_torch():
    counts_Pe = torch.tensor([[1, 1], [2, 1]])
    x = torch.tensor([[10.0], [11], [12], [13], [14]], requires_grad=True)
    major = torch_impl.layout.to_expert_major(x, counts_Pe, output_size=5)
    same(major.x_RD, [[10], [12], [13], [11], [14]])
    same(major.source_R, [0, 2, 3, 1, 4])
    same(major.target_R, [0, 3, 1, 2, 4])
    cotangent = torch.tensor([[1.0], [2], [3], [4], [5]])
    same(torch.autograd.grad(major.x_RD, x, cotangent)[0], [[1], [4], [2], [3], [5]])
    back = torch_impl.layout.to_rank_major(x, major.source_R, major.target_R)
    same(back, [[10], [13], [11], [12], [14]])
    same(torch.autograd.grad(back, x, cotangent)[0], [[1], [3], [4], [2], [5]])


LAYOUT_CASES = pytest.mark.parametrize(
    ("counts", "bins", "out", "source", "target"),
    [
        ([[2, 1], [1, 1]], (2, 4), (8,), [0, 1, 4, 2, 5, 8, 8, 8], [[0, 1, 3, 8], [2, 4, 8, 8]]),
        ([[1, 2], [1, 0]], (4, 2), (2, 4), [[0, 8, 4, 8], [2, 3, 8, 8]], [[0, 8], [4, 5], [2, 8], [8, 8]]),
        # Nothing arrived; and every row is taken.
        ([[0, 0], [0, 0]], (2, 2), (4,), [4, 4, 4, 4], [[4, 4], [4, 4]]),
        ([[1, 1], [0, 2]], (2, 2), (4,), [0, 1, 2, 3], [[0, 1], [2, 3]]),
        ([[0, 2], [2, 0]], (2, 2), (4,), [2, 3, 0, 1], [[2, 3], [0, 1]]),
    ],
)


@LAYOUT_CASES
def test_layout_jax(counts, bins, out, source, target):
    """What a row becomes is read off `source` and `target`; the sentinel reads the zero after the last row."""
    n = bins[0] * bins[1]
    flat_source, flat_target = np.reshape(source, -1), np.reshape(target, -1)

    def both(x, y):
        major = jax_impl.layout.to_expert_major(x, jnp.array(counts))
        back = jax_impl.layout.to_rank_major(y, major.source_S, major.target_BC)
        return (major.x_SD, back), major

    x = np.arange(1.0, n + 1, dtype=np.float32)
    poisoned_in = np.where(np.isin(np.arange(n), flat_source), x, NAN)  # padding may hold anything
    poisoned_out = np.where(np.isin(np.arange(n), flat_target), x, NAN)
    (x_SD, y_BCD), vjp, major = jax.vjp(
        jax.jit(both), poisoned_in.reshape(*bins, 1), poisoned_out.reshape(*out, 1), has_aux=True
    )
    same(major.source_S, source)
    same(major.target_BC, target)
    x_and_zero = np.append(x, 0)
    same(x_SD.reshape(-1), x_and_zero[flat_source])
    same(y_BCD.reshape(-1), x_and_zero[flat_target])
    dx, dy = vjp((poisoned_out.reshape(*out, 1), poisoned_in.reshape(*bins, 1)))
    same(dx.reshape(-1), x_and_zero[flat_target])
    same(dy.reshape(-1), x_and_zero[flat_source])


# 6. apply_experts, with D = F = 1 and gates of 0 and 64 or more, where silu(0) = 0 and silu'(0) = 1/2, and for large g
# silu(g) = g and silu'(g) = 1 exactly.
#
#   expert 0   w_gate 32, w_up 3, w_down 1/2    x = 2: gate 64, up 6, hidden 384, y 192      dy = 1
#                                               x = 4: gate 128, up 12, hidden 1536, y 768   dy = 2
#   expert 1   nothing
#   expert 2   w_gate 0, w_up 5, w_down 7       x = 4: gate 0, up 20, hidden 0, y 0          dy = 1
#
#   dhidden = dy w_down      1/2, 1, 7
#   dup = dhidden silu(gate) 32, 128, 0         dgate = dhidden up silu'(gate)   3, 12, 70
#   dx = dgate w_gate + dup w_up                96+96, 384+384, 0
#   dw_gate = sum x dgate    2*3 + 4*12, 4*70   dw_up = sum x dup   2*32 + 4*128, 0
#   dw_down = sum hidden dy  384 + 3072, 0

GATE, UP, DOWN = ([[[32.0]], [[9]], [[0]]], [[[3.0]], [[9]], [[5]]], [[[0.5]], [[9]], [[7]]])
DGATE, DUP, DDOWN = ([[[54]], [[0]], [[280]]], [[[576]], [[0]], [[0]]], [[[3456]], [[0]], [[0]]])


def test_apply_experts_torch():
    x = torch.tensor([[2.0], [4], [4]], requires_grad=True)
    gate, up, down = weights = [torch.tensor(w, requires_grad=True) for w in (GATE, UP, DOWN)]
    y = torch_impl.experts.apply_experts(x, torch.tensor([2, 0, 1]), gate, up, down)
    same(y, [[192], [768], [0]])
    dx, *dweights = torch.autograd.grad(y, [x, *weights], torch.tensor([[1.0], [2], [1]]))
    same(dx, [[192], [768], [0]])
    for dw, expected in zip(dweights, (DGATE, DUP, DDOWN), strict=True):
        same(dw, expected)


@pytest.mark.parametrize("bins", [False, True])
def test_apply_experts_jax(bins):
    # [e, P*C, D] has padding in every bin; [P*C, D] has it at the end.
    x = jnp.array([[[2.0], [4]], [[0], [0]], [[0], [4]]] if bins else [[2.0], [4], [4], [0]])
    dy = jnp.array([[[1.0], [2]], [[0], [0]], [[0], [1]]] if bins else [[1.0], [2], [1], [0]])
    y_expected = [[[192], [768]], [[0], [0]], [[0], [0]]] if bins else [[192], [768], [0], [0]]
    weights = [jnp.array(w) for w in (GATE, UP, DOWN)]
    y, vjp = jax.vjp(jax.jit(lambda x, *w: jax_impl.experts.apply_experts(x, jnp.array([2, 0, 1]), *w)), x, *weights)
    same(y, y_expected)
    dx, *dweights = vjp(dy)
    same(dx, y_expected)  # by chance the numbers are the same: 192 and 768 once more
    for dw, expected in zip(dweights, (DGATE, DUP, DDOWN), strict=True):
        same(dw, expected)


# A bias and a scale, with relu2 and without a gate: relu(x w_up + b_up)**2 w_down + b_down.
#
#   expert 0   w_up 2, b_up 1, w_down 3, b_down 5    x = 1: up 3, hidden 9, y 32     dy = 1
#              and                                   x = -2: up -3, hidden 0, y 5    dy = 10
#   expert 1   w_up 4, b_up -2, w_down 1, b_down 0   x = 1: up 2, hidden 4, y 4      dy = 100
#
#   dup = dy w_down 2 up     18, 0, 400      dx = dup w_up   36, 0, 1600      db_up 18, 400      db_down 11, 100
UNGATED = [[[2.0]], [[4]]], [[[3.0]], [[1]]], [[1.0], [-2]], [[5.0], [0]]
UNGATED_X, UNGATED_Y, UNGATED_DX = [[1.0], [-2], [1]], [[32], [5], [4]], [[36], [0], [1600]]


def test_ungated_experts_with_biases_torch():
    x = torch.tensor(UNGATED_X, requires_grad=True)
    up, down, b_up, b_down = leaves = [torch.tensor(a, requires_grad=True) for a in UNGATED]
    biases = torch_impl.Biases(up_eF=b_up, down_eD=b_down)
    y = torch_impl.experts.apply_experts(x, torch.tensor([2, 1]), None, up, down, torch_impl.Experts("relu2"), biases)
    same(y, UNGATED_Y)
    dx, _, _, db_up, db_down = torch.autograd.grad(y, (x, *leaves), torch.tensor([[1.0], [10], [100]]))
    same(dx, UNGATED_DX)
    same(db_up, [[18], [400]])
    same(db_down, [[11], [100]])


def test_ungated_experts_with_biases_jax():
    def experts(x, up, down, b_up, b_down):
        biases = jax_impl.Biases(up_eF=b_up, down_eD=b_down)
        return jax_impl.experts.apply_experts(x, jnp.array([2, 1]), None, up, down, jax_impl.Experts("relu2"), biases)

    y, vjp = jax.vjp(jax.jit(experts), jnp.array([*UNGATED_X, [NAN]]), *map(jnp.array, UNGATED))
    same(y, [*UNGATED_Y, [0]])  # padding comes out as zero, without a bias
    dx, _, _, db_up, db_down = vjp(jnp.array([[1.0], [10], [100], [NAN]]))
    same(dx, [*UNGATED_DX, [0]])
    same(db_up, [[18], [400]])
    same(db_down, [[11], [100]])


# The shared expert, like expert 0 of those with a gate: of x = 2, 192; and the sigmoid of its score, ln 3, is 3/4.
def test_shared_expert():
    w = [[[32.0]], [[3.0]], [[0.5]], [np.log(3) / 2]]
    shared = torch_impl.Shared(*(torch.tensor(a, dtype=torch.float32) for a in w))
    x = torch.tensor([[2.0]])
    close(torch_impl.experts.shared_expert(x, shared, torch_impl.Experts()), [[144]])
    same(torch_impl.experts.shared_expert(x, shared._replace(score_D=None), torch_impl.Experts()), [[192]])
    shared = jax_impl.Shared(*(jnp.array(a, jnp.float32) for a in w))
    close(jax_impl.experts.shared_expert(jnp.array([[2.0]]), shared, jax_impl.Experts()), [[144]])
    same(jax_impl.experts.shared_expert(jnp.array([[2.0]]), shared._replace(score_D=None), jax_impl.Experts()), [[192]])


def test_clamped_torch():
    gate, up, hidden, dgate, dup = np.array(CLAMPED, np.float32).T
    gate, up = torch.tensor(gate, requires_grad=True), torch.tensor(up, requires_grad=True)
    y = torch_impl.glu.glu(gate, up, torch_impl.Experts("quick_gelu", 2.0, 1.0))
    slopes = torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    for got, expected in zip((y.detach(), *slopes), (hidden, dgate, dup), strict=True):
        close(got, expected)


def test_clamped_jax():
    gate, up, hidden, dgate, dup = np.array(CLAMPED, np.float32).T
    experts = jax_impl.Experts("quick_gelu", 2.0, 1.0)
    y, vjp = jax.vjp(lambda gate, up: jax_impl.glu.glu(gate, up, experts), jnp.array(gate), jnp.array(up))
    for got, expected in zip((y, *vjp(jnp.ones_like(y))), (hidden, dgate, dup), strict=True):
        close(got, expected)


# Four wide, so that PyTorch takes grouped_mm and not one matmul per expert; and D is not F, so that a transpose shows.
#
#   w[0] = [[1 2 3 4 0 0 0 0]     w[1] = 10 w[0]     x[0] = [1 0 0 0]   -> row 0 of w[0]
#           [5 6 7 8 0 0 0 0]                        x[1] = [0 1 0 0]   -> row 1 of w[1]
#           [0 ...] [0 ...]]                         x[2] = [1 1 0 0]   -> their sum
W = np.zeros((2, 4, 8), np.float32)
W[0, :2, :4] = [[1, 2, 3, 4], [5, 6, 7, 8]]
W[1] = 10 * W[0]
ROWS = [[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
PRODUCT = [[1, 2, 3, 4, 0, 0, 0, 0], [50, 60, 70, 80, 0, 0, 0, 0], [60, 80, 100, 120, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_grouped_matmul_torch(dtype):
    product = torch_impl.matmul.grouped_matmul(
        torch.tensor(ROWS).to(dtype), torch.from_numpy(W).to(dtype), torch.tensor([1, 2])
    )
    assert product.dtype == dtype
    same(product.float(), PRODUCT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_grouped_matmul_jax(dtype):
    product = jax_impl.matmul.grouped_matmul(jnp.array(ROWS, dtype), jnp.array(W, dtype), jnp.array([1, 2]))
    assert product.dtype == dtype
    same(product.astype("float32"), PRODUCT)


# 9. combine, on rank 0: row 0 is a1, row 1 a2, row 2 a3, row 3 a0.
#
#     scores   t0: 1/2 1/4   t1: 3/4 1      y = 1 2 3 4
#     out      t0: 1/2*4 + 1/4*1 = 9/4      t1: 3/4*2 + 1*3 = 9/2
#     dout     8, 16     dy = score * dout: 1/4*8, 3/4*16, 1*16, 1/2*8     dscore = dout . y: 8*4 8*1 | 16*2 16*3
#
# In JAX with C = 2, row 0 is a1, row 1 a2, row 2 a0, row 3 padding; a3 was dropped.


def test_combine_torch():
    y = torch.tensor([[1.0], [2], [3], [4]], requires_grad=True)
    score = torch.tensor([[0.5, 0.25], [0.75, 1]], requires_grad=True)
    slot, assignment = torch.tensor([[3, 0], [1, 2]]), torch.tensor([1, 2, 3, 0])
    out = torch_impl.grouping.combine(y, score, slot, assignment)
    same(out, [[2.25], [4.5]])
    dy, dscore = torch.autograd.grad(out, (y, score), torch.tensor([[8.0], [16]]))
    same(dy, [[2], [12], [16], [4]])
    same(dscore, [[32, 8], [32, 48]])


def test_combine_jax():
    y = jnp.array([[[1.0], [2]], [[4], [NAN]]])
    score = jnp.array([[0.5, 0.25], [0.75, 1]])
    slot, assignment = jnp.array([[2, 0], [1, 4]]), jnp.array([[1, 2], [0, 4]])
    out, vjp = jax.vjp(jax.jit(lambda y, score: jax_impl.grouping.combine(y, score, slot, assignment)), y, score)
    same(out, [[2.25], [1.5]])  # t1: 3/4*2, and nothing for a3
    dy, dscore = vjp(jnp.array([[8.0], [16]]))
    same(dy, [[[2], [12]], [[4], [0]]])
    same(dscore, [[32, 8], [32, 0]])
