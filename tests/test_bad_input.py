"""Wrong input is refused with the values and the fix, in both packages, before anything is sent to another rank."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

import jax_impl
import jax_impl.checks
import jax_impl.grouping
import jax_impl.layout
import torch_impl
import torch_impl.checks
import torch_impl.exchange
import torch_impl.layout
import torch_impl.static.checks
import torch_impl.static.layout
from jax_impl import Capacity

T, D, F, E, K = 3, 4, 8, 4, 2
IDS = [[0, 1], [2, 3], [1, 0]]


@pytest.fixture(autouse=True)
def _shapes_unchecked(monkeypatch):
    """As users run it: shapes in signatures are checked under test only, and would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def normal(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


class Torch:
    asarray = staticmethod(torch.as_tensor)
    layer = staticmethod(torch_impl.moe_layer)
    package = torch_impl


class Jax:
    asarray = staticmethod(jnp.asarray)
    layer = staticmethod(partial(jax_impl.moe_layer, capacity=Capacity(1, T * K)))
    package = jax_impl


both = pytest.mark.parametrize("side", [Torch, Jax])


def arguments(side, **changed) -> dict[str, Any]:
    good = {
        "x_TD": normal(T, D),
        "router_DE": normal(D, E),
        "w_gate_eDF": normal(E, D, F),
        "w_up_eDF": normal(E, D, F),
        "w_down_eFD": normal(E, F, D),
    }
    return {name: side.asarray(a) for name, a in (good | changed).items()}


def routing(side, score=None, ids=None, counts=(2, 2, 1, 1)):
    score = normal(T, K) if score is None else score
    return side.package.Routing(side.asarray(score), side.asarray(np.array(IDS if ids is None else ids)),
                                side.asarray(np.array(counts)))  # fmt: skip


@both
def test_good_input_passes(side):
    side.layer(**arguments(side), router=side.package.Router(K))
    side.layer(**arguments(side), router=side.package.Router(K), routing=routing(side))


WORDS = [{name: word} for name, words in jax_impl.checks.ROUTER_WORDS.items() for word in words if word != "input"]
EDGES = [{"top_k": 1, "score_on": "input"}, {"top_k": E}, {"epsilon": 0.0}, {"scale": 0.0}, {"groups": 2}]


@both
@pytest.mark.parametrize("how", [*WORDS, *EDGES], ids=str)
def test_what_a_router_may_be(side, how):
    x, router = side.asarray(normal(T, D)), side.asarray(normal(D, E))
    side.package.route(x, router, side.package.Router(**({"top_k": K} | how)))


@both
@pytest.mark.parametrize("n_experts", [1, 6])
def test_any_number_of_experts_beside_any_width(side, n_experts):
    """As many as D, and what should be of E could be of D."""
    x, router = side.asarray(normal(T, D)), side.asarray(normal(D, n_experts))
    per_expert = side.package.PerExpert(*[side.asarray(normal(n_experts))] * 3)
    k = max(1, n_experts - 1)
    ids = side.asarray(np.tile(np.arange(k)[::-1] + n_experts - k, (T, 1)))
    of = side.package.Router(k, groups=k // 2 + 1, top_groups=k // 2 + 1)
    side.package.route(x, router, of, expert_id_TK=ids, per_expert=per_expert)
    with pytest.raises(ValueError, match=f"top_k is {D} with {D - 1} experts: it must be between 1 and E"):
        side.package.route(x, side.asarray(normal(D, D - 1)), side.package.Router(D))


@pytest.mark.parametrize("k", [1, E])
@both
def test_any_number_of_choices(side, k):
    given = routing(side, normal(T, k), np.tile(np.arange(k), (T, 1)), [T] * k + [0] * (E - k))
    side.package.checks.check_routing(side.asarray(normal(T, D)), *given)


@both
def test_no_tokens(side):
    x, router, ids = (side.asarray(a) for a in (normal(0, D), normal(D, E), np.zeros((0, K), np.int32)))
    side.package.route(x, router, side.package.Router(K), expert_id_TK=ids)


@both
@pytest.mark.parametrize("dtype", jax_impl.checks.DTYPES)
@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_dtypes(side, dtype, integer):
    kinds, package = (torch if side is Torch else jnp), side.package
    with jax.enable_x64(True):
        x, router, gate, up, down = (side.asarray(a, dtype=getattr(kinds, dtype)) for a in arguments(side).values())
        given = routing(side)
        ids, counts = (side.asarray(a, dtype=getattr(kinds, integer)) for a in given[1:])
        package.checks.check_router(x, router, package.Router(K), None, package.PerExpert())
        package.checks.check_routing(x, given.score_TK, ids, counts)
        package.checks.check_experts(x, E, 1, gate, up, down, package.Experts(), package.Biases(), None)


@both
@pytest.mark.parametrize(
    ("changed", "how", "message"),
    [
        ({"x_TD": normal(2, T, D)}, {}, r"\(2, 3, 4\).*flatten the batch"),
        ({"x_TD": normal(2, D, T)}, {}, r"\(2, 4, 3\).*flatten the batch"),
        ({"router_DE": normal(D, E, 1)}, {}, r"\(4, 4, 1\): flatten the batch into T, and keep the router"),
        ({"router_DE": normal(E + 1, D)}, {}, r"\(5, 4\).*\[D, E\]"),
        ({"x_TD": np.ones((T, D), np.int32)}, {}, "x is .*int32.*must be float32, bfloat16, float16 or float64"),
        ({"router_DE": np.ones((D, E), np.int32)}, {}, "router .*int32.*floating point"),
        ({}, {"top_k": E + 1}, "top_k is 5 with 4 experts: it must be between 1 and E"),
        ({}, {"top_k": 0}, "top_k is 0 with 4 experts"),
        ({}, {"score_function": "relu"}, "score_function is 'relu': it must be one of 'softmax', 'sigmoid', 'sqrt_"),
        ({}, {"scale": float("nan")}, "scale is nan: it must be finite"),
        ({}, {"scale": float("-inf")}, "scale is -inf: it must be finite"),
        ({}, {"epsilon": -1e-20}, "epsilon is -1e-20: it must be finite, and not negative"),
        ({}, {"epsilon": float("nan")}, "epsilon is nan: it must be finite"),
        ({}, {"epsilon": float("inf")}, "epsilon is inf: it must be finite"),
        ({}, {"group_score": "top3"}, "group_score is 'top3': it must be one of 'top2', 'max'"),
        ({}, {"outside_groups": None}, "outside_groups is None: it must be one of 'minus_inf', 'zero'"),
        ({}, {"score_on": "both"}, "score_on is 'both': it must be one of 'output', 'input'"),
        ({}, {"router_dtype": "bfloat16"}, "router_dtype is 'bfloat16': it must be one of 'wide', 'float32', 'activ"),
        ({}, {"score_on": "input"}, "score_on is 'input' with top_k 2: a token has one input, so it takes top_k 1"),
        ({}, {"groups": 0}, "groups is 0 and top_groups 1 with 4 experts: groups must divide"),
        ({}, {"groups": 3}, "groups is 3 and top_groups 1 with 4 experts: groups must divide"),
        ({}, {"groups": 2, "top_groups": 3}, "groups is 2 and top_groups 3 .* top_groups must be between 1 and groups"),
        ({}, {"groups": 2, "top_groups": 0}, "groups is 2 and top_groups 0 with 4 experts"),
        ({}, {"groups": 2, "top_k": 3}, "top_k is 3 with 1 groups of 2 experts to choose from: use more or larger"),
        ({}, {"groups": 4, "top_groups": 2}, "top_k is 2 with 2 groups of 1 experts .* at least two experts in each"),
        # F is that of w_up, which every layer has.
        ({"w_up_eDF": normal(E, D, F + 1)}, {}, r"w_gate has shape .4, 4, 8., expected .4, 4, 9."),
        ({"w_up_eDF": normal(E, D + 1, F)}, {}, r"w_up has shape .4, 5, 8., expected .4, 4, 8."),
        ({"w_gate_eDF": normal(E - 1, D, F)}, {}, r"w_gate has shape .3, 4, 8., expected .4, 4, 8.: this rank holds"),
        ({"w_down_eFD": normal(E, D, F)}, {}, r"w_down has shape .4, 4, 8., expected .4, 8, 4."),
        ({"w_down_eFD": np.ones((E, F, D), np.float16)}, {}, "w_down is .*float16.* and x is .*float32.*: convert"),
    ],
)
def test_layer(side, changed, how, message):
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side, **changed), router=side.package.Router(**({"top_k": K} | how)))


@both
def test_unknown_activation(side):
    experts = side.package.Experts("relu")
    with pytest.raises(ValueError, match="activation is 'relu': it must be one of 'silu', 'gelu', 'gelu_tanh', "):
        side.layer(**arguments(side), router=side.package.Router(K), experts=experts)


@both
def test_groups_of_one_expert_go_by_the_largest(side):
    side.layer(**arguments(side), router=side.package.Router(K, groups=E, top_groups=2, group_score="max"))


@both
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias_E": normal(E + 1)}, r"bias_E is .*float32 .5,.: it must be floating point, .4."),
        ({"selection_bias_E": np.ones(E, np.int32)}, r"selection_bias_E is .*int32 .4,.: it must be floating point"),
        ({"scale_E": normal(1, E)}, r"scale_E is .*float32 .1, 4.: it must be floating point, .4."),
    ],
)
def test_per_expert(side, given, message):
    per_expert = side.package.PerExpert(**{name: side.asarray(a) for name, a in given.items()})
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side), router=side.package.Router(K), per_expert=per_expert)


@both
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clamp": 0.0}, "clamp is 0.0: it must be positive, or None"),
        ({"clamp": -7.0}, "clamp is -7.0: it must be positive"),
        ({"clamp": float("nan")}, "clamp is nan: it must be positive"),
    ],
)
def test_expert_options(side, given, message):
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side), router=side.package.Router(K), experts=side.package.Experts(**given))


@pytest.mark.parametrize("checks", [torch_impl.checks, jax_impl.checks])
def test_what_experts_may_be(checks):
    for activation in checks.ACTIVATIONS:
        checks.check_expert_options(torch_impl.Experts(activation), gated=True)
        checks.check_expert_options(torch_impl.Experts(activation), gated=False)
    checks.check_expert_options(torch_impl.Experts(clamp=0.5, up_offset=1.0), gated=True)


@both
@pytest.mark.parametrize("given", [{"clamp": 7.0}, {"up_offset": 1.0}])
def test_what_needs_a_gate(side, given):
    experts = side.package.Experts("relu2", **given)
    with pytest.raises(ValueError, match="clamp and up_offset need experts with a gate: pass w_gate, or leave them"):
        side.layer(**arguments(side) | {"w_gate_eDF": None}, router=side.package.Router(K), experts=experts)


@both
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate_eF": normal(E, D)}, r"b_gate has shape .4, 4., expected .4, 8.: this rank holds e = 4 // 1 = 4"),
        ({"up_eF": normal(F)}, r"b_up has shape .8,., expected .4, 8."),
        ({"down_eD": normal(E, F)}, r"b_down has shape .4, 8., expected .4, 4."),
        ({"down_eD": np.ones((E, D), np.float16)}, "b_down is .*float16.* and x is .*float32.*: convert one to"),
    ],
)
def test_biases(side, given, message):
    biases = side.package.Biases(**{name: side.asarray(a) for name, a in given.items()})
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side), router=side.package.Router(K), biases=biases)


@both
def test_a_bias_of_a_gate_that_there_is_not(side):
    biases = side.package.Biases(gate_eF=side.asarray(normal(E, F)))
    with pytest.raises(ValueError, match="b_gate is given without w_gate: pass both, or neither"):
        side.layer(**arguments(side) | {"w_gate_eDF": None}, router=side.package.Router(K), biases=biases)


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w_gate_DH": None}, "only one of w_gate and shared w_gate is given: pass both, or neither"),
        ({"w_gate_DH": normal(D, 6)}, r"shared w_gate has shape .4, 6., expected .4, 5."),
        ({"w_up_DH": normal(D + 1, 5)}, r"shared w_up has shape .5, 5., expected .4, 5."),
        ({"w_down_HD": normal(D, 5)}, r"shared w_down has shape .4, 5., expected .5, 4."),
        ({"score_D": normal(D, 1)}, r"shared score has shape .4, 1., expected .4,."),
        ({"score_D": np.ones(D, np.float16)}, "shared score is .*float16.* and x is .*float32.*: convert"),
    ],
)
def test_shared_expert(side, changed, message):
    good = {"w_gate_DH": normal(D, 5), "w_up_DH": normal(D, 5), "w_down_HD": normal(5, D), "score_D": normal(D)}
    shared = side.package.Shared(**{n: a if a is None else side.asarray(a) for n, a in (good | changed).items()})
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side), router=side.package.Router(K), shared=shared)


@both
def test_a_shared_expert_without_a_gate_beside_experts_without(side):
    shared = side.package.Shared(None, side.asarray(normal(D, 5)), side.asarray(normal(5, D)))
    without = arguments(side) | {"w_gate_eDF": None}
    side.layer(**without, router=side.package.Router(K), experts=side.package.Experts("relu2"), shared=shared)
    with pytest.raises(ValueError, match="only one of w_gate and shared w_gate is given: pass both, or neither"):
        side.layer(**arguments(side), router=side.package.Router(K), shared=shared)


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": [[0, 1], [2, 4], [1, 0]]}, "expert ids run from 0 to 4 with 4 experts: they must be in .0, 4."),
        ({"ids": [[0, 1], [2, -1], [1, 0]]}, "expert ids run from -1 to 2 with 4 experts"),
        ({"ids": [[0, 1], [3, 3], [1, 0]]}, r"token 1 chose experts \[3, 3\]: a token's experts must differ"),
        ({"ids": [[0, 1], [3, 3], [2, 2]]}, r"token 1 chose experts \[3, 3\]: a token's experts must differ"),
        ({"ids": np.array(IDS, np.float32)}, "expert ids are .*float32: they must be int32 or int64"),
        ({"ids": [[0], [1], [2]]}, r"scores have shape .3, 2. and expert ids .3, 1"),
        ({"ids": IDS[:2], "score": normal(2, K)}, r"scores have shape .2, 2. .*x .3, 4.: both must be \[T, K\]"),
        ({"score": np.ones((T, K), np.int32)}, "scores are .*int32: they must be floating point"),
        ({"ids": np.zeros((T, 0), np.int32), "score": normal(T, 0)}, "K is 0 with 4 experts: a token chooses at least"),
        ({"counts": (6,)}, "K is 2 with 1 experts: a token chooses at least one"),
        ({"counts": (2, 1, 2, 1)}, r"counts per expert are \[2, 1, 2, 1\], which is not how often the expert ids name"),
        ({"counts": (2.0, 2, 1, 1)}, "counts are .*float.*: they must be integers"),
        ({"counts": ((2, 2, 1, 1),)}, r"counts are .*int.* .1, 4.*: they must be integers .E."),
    ],
)
def test_routing_made_before(side, changed, message):
    with pytest.raises(ValueError, match=message):
        side.layer(**arguments(side), router=side.package.Router(K), routing=routing(side, **changed))


@both
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1]], r"expert ids have shape .1, 2., scores will have .3, 2.: replay"),
        ([[0, 1], [2, 4], [1, 0]], "expert ids run from 0 to 4 with 4 experts"),
        ([[4]], "expert ids run from 4 to 4 with 4 experts"),
    ],
)
def test_replayed_ids(side, ids, message):
    x, router = side.asarray(normal(T if len(ids[0]) == K else 1, D)), side.asarray(normal(D, E))
    with pytest.raises(ValueError, match=message):
        side.package.route(x, router, side.package.Router(len(ids[0])), expert_id_TK=side.asarray(np.array(ids)))


@both
def test_replayed_ids_out_of_range_that_nobody_reads_get_a_finite_score(side, monkeypatch):
    x, router, ids = (side.asarray(a) for a in (normal(T, D), normal(D, E), np.array([[0, 1], [2, 9], [-1, 0]])))
    if side is Jax:
        score = jax.jit(lambda ids: jax_impl.route(x, router, jax_impl.Router(K), expert_id_TK=ids).score_TK)(ids)
    else:  # as on a GPU
        monkeypatch.setattr(torch_impl.checks, "is_captured", lambda: True)
        score = torch_impl.route(x, router, torch_impl.Router(K), expert_id_TK=ids).score_TK
    assert np.isfinite(np.asarray(score)).all()


def test_autocast():
    message = r"autocast to torch\.bfloat16 is on: .* call it under torch\.autocast\('cpu', enabled=False\)"
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=message):
            torch_impl.route(torch.ones(T, D), torch.ones(D, E), torch_impl.Router(K))
        with pytest.raises(ValueError, match=message):
            torch_impl.moe_layer(**arguments(Torch), router=torch_impl.Router(K), routing=routing(Torch))
        with torch.autocast("cpu", enabled=False):
            torch_impl.moe_layer(**arguments(Torch), router=torch_impl.Router(K))


def test_another_device():
    x, router, meta = torch.ones(T, D), torch.ones(D, E), torch.device("meta")
    with pytest.raises(ValueError, match="x is on cpu and router on meta: move one"):
        torch_impl.route(x, router.to(meta), torch_impl.Router(K))
    moved = arguments(Torch, w_up_eDF=torch.ones(E, D, F, device=meta))
    with pytest.raises(ValueError, match=r"w_up is torch\.float32 on meta and x is torch\.float32 on cpu"):
        torch_impl.moe_layer(**moved, router=torch_impl.Router(K))
    given = routing(Torch)._replace(score_TK=torch.ones(T, K, device=meta))
    with pytest.raises(ValueError, match="x is on cpu, scores on meta, expert ids on cpu: move them to one device"):
        torch_impl.moe_layer(**arguments(Torch), router=torch_impl.Router(K), routing=given)


def refused(_rank, group):
    """E = 6 does not divide over 4 ranks: every rank must refuse it alone, none may wait for another."""
    weights = [torch.ones(1, 4, 4)] * 3
    with pytest.raises(ValueError, match="6 experts do not divide over 4 ranks: E must be a multiple of P"):
        torch_impl.moe_layer(torch.ones(3, 4), torch.ones(4, 6), *weights, router=torch_impl.Router(2), group=group)


def refused_on_one(rank, group):
    """Only rank 1 has a bad id: it must refuse before the exchange, where the others would wait for it."""
    ids = torch.tensor([[0, 4 if rank == 1 else 1]])
    given = torch_impl.Routing(torch.ones(1, 2), ids, torch.tensor([1, 1, 0, 0]))
    w = torch.ones(1, 4, 4)
    if rank == 1:
        with pytest.raises(ValueError, match="expert ids run from 0 to 4 with 4 experts"):
            torch_impl.moe_layer(
                torch.ones(1, 4), torch.ones(4, 4), w, w, w, torch_impl.Router(2), routing=given, group=group
            )


def test_over_ranks_torch(torch_ranks):
    torch_ranks(refused, [0, 1, 2, 3])
    torch_ranks(refused_on_one, [0, 1, 2, 3])


def test_over_ranks_jax():
    weights: Any = [jnp.ones((4, 1, 4, 4))] * 3
    layer = jax.vmap(
        partial(jax_impl.moe_layer, router=jax_impl.Router(2), capacity=Capacity(4, 6), axis_name="ranks"),
        in_axes=(0, None, 0, 0, 0), axis_name="ranks",
    )  # fmt: skip
    with pytest.raises(ValueError, match="6 experts do not divide over 4 ranks: E must be a multiple of P"):
        layer(jnp.ones((4, 3, 4)), jnp.ones((4, 6)), *weights)


def test_ids_out_of_range_inside_a_trace_are_dropped_and_counted():
    """Their values cannot be read there: such an assignment contributes nothing, and shows in `dropped`."""

    @jax.jit
    def layer(ids):
        given = routing(Jax)._replace(expert_id_TK=ids, counts_E=jnp.array([2, 2, 1, 0]))
        return Jax.layer(**arguments(Jax), router=jax_impl.Router(K), routing=given)

    stages = layer(jnp.array([[0, 1], [2, 9], [1, 0]]))
    assert stages.dropped == 1
    assert stages.dropped_E.tolist() == [0, 0, 0, 0]
    assert stages.grouped.slot_TK[1, 1] == T * K
    np.testing.assert_array_equal(stages.out_TD[1] * 2, stages.out_TD[0])


def test_counts_of_another_routing():
    """On a GPU an id out of range cannot be read without a sync; it is counted nowhere, and the sum says so."""
    x, splits = torch.ones(3, 4), torch_impl.exchange.Splits(torch.tensor([2]), torch.tensor([2]), 2, 2)
    with pytest.raises(
        ValueError, match="3 rows to send, but the counts per expert add up to 2: an expert id is out of"
    ):
        torch_impl.exchange.send_tokens(x, splits)


def test_output_size():
    counts = torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match="output_size is 3 but 2 rows were received: pass the total"):
        torch_impl.layout.to_expert_major(torch.ones(2, 4), counts, 3)


plans = pytest.mark.parametrize("plan", [torch_impl.static.plan_capacity, jax_impl.plan_capacity])


@plans
@pytest.mark.parametrize("factor", [0, -1, "-1/2", float("inf"), float("nan"), "none", "1/0"])
def test_capacity_factor(plan, factor):
    with pytest.raises(ValueError, match="must be finite and positive, as a decimal"):
        plan(factor, 8, 2, 4, 2)


@plans
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n_ranks": 3}, "4 experts do not divide over 3 ranks"),
        ({"per": "token"}, "capacity_per is 'token': it must be 'rank' or 'expert'"),
        ({"align": 0}, "align is 0: it must be at least 1"),
        ({"priority": "first"}, "priority is 'first': it must be 'token', 'choice' or 'score'"),
    ],
)
def test_plan_capacity(plan, how, message):
    with pytest.raises(ValueError, match=message):
        plan(**({"factor": 1, "n_tokens": 8, "top_k": 2, "n_experts": 4, "n_ranks": 2} | how))


@pytest.mark.parametrize("check", [torch_impl.static.checks.check_capacity, jax_impl.checks.check_capacity])
def test_bins_that_do_not_divide_the_experts(check):
    for n_bins in (3, 0):
        with pytest.raises(ValueError, match=f"{n_bins} bins for 4 experts: use one bin per rank, or one per expert"):
            check(n_bins, 4, "token", 4)
    check(2, 1, "token", 4)


@both
def test_bins_that_are_received(side):
    layout: Any = torch_impl.static.layout if side is Torch else jax_impl.layout
    with pytest.raises(ValueError, match="3 bins for 2 ranks of 4 experts in all"):
        layout.to_expert_major(side.asarray(normal(3, 2, D)), side.asarray(np.ones((2, 2), np.int32)))


def test_bins_are_looked_at_before_anything_is_sent(monkeypatch):
    for package in (jax_impl, torch_impl.static):
        for name in ("exchange_counts", "send_tokens"):
            monkeypatch.setattr(package.layer, name, lambda *_: pytest.fail("sent"))
    with pytest.raises(ValueError, match="2 bins for 1 ranks"):
        jax_impl.moe_layer(**arguments(Jax), router=jax_impl.Router(K), capacity=Capacity(2, 6))
    with pytest.raises(ValueError, match="2 bins for 1 ranks"):
        torch_impl.static.moe_layer(
            **arguments(Torch), router=torch_impl.Router(K), capacity=torch_impl.static.Capacity(2, 6)
        )


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (Capacity(1, 0), "the capacity is 0 rows per bin: it must be at least 1"),
        (Capacity(3, 4), "3 bins for 1 ranks of 4 experts in all: use one bin per rank, or one per expert"),
        (Capacity(2, 6), "2 bins for 1 ranks of 4 experts in all: use one bin per rank, or one per expert"),
        (Capacity(1, 4, "first"), "priority is 'first': it must be 'token', 'choice' or 'score'"),
    ],
)
def test_capacity(capacity, message):
    with pytest.raises(ValueError, match=message):
        jax_impl.moe_layer(**arguments(Jax), router=jax_impl.Router(K), capacity=capacity)
    with pytest.raises(ValueError, match=message):
        torch_impl.static.moe_layer(
            **arguments(Torch), router=torch_impl.Router(K), capacity=torch_impl.static.Capacity(*capacity)
        )
