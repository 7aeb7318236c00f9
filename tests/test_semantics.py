"""What the layer promises beyond its values: rounding, gradients, repeatability, drops and padding."""

from functools import partial

import jax
import jax.numpy as jnp
import jax_ranks
import numpy as np
import pytest
import torch
import torch_ranks
from jax_ranks import AXIS, capacity_of, over_ranks, run_problem
from problems import STANDARD, Problem, bits, close, dense, dense_experts, draw, who_stays
from torch_ranks import layer_arguments

import jax_impl.dynamic
import jax_impl.grouping
import jax_impl.layer
import jax_impl.layout
import jax_impl.routing
import jax_impl.rows
import torch_impl.experts
import torch_impl.grouping
import torch_impl.layer
import torch_impl.routing
import torch_impl.rows
from jax_impl import Capacity, kernels
from torch_impl import static

NAN = float("nan")

# Rounding. A token's three experts are 2, 0, 1, so its rows lie in another order than k. Terms k = 0, 1, 2 of a sum:
#
#     2^24 1 -2^24     in order, in float32: 2^24 + 1 = 2^24 (to even), and 0. By row or backwards, or in float64: 1
#     1 2^24 -2^24     the same, 0; and 1 if it began with the last two
#     256 1 -256       1; in bfloat16 256 + 1 = 256, and 0
#     1 2^-8 2^-8      1 + 2^-7, a bfloat16; rounded after every step 1 (1 + 2^-8 is a tie, to even)

TERMS_KD = [[2.0**24, 1, 256, 1], [1, 2.0**24, 1, 2.0**-8], [-(2.0**24), -(2.0**24), -256, 2.0**-8]]
SUM = [[0, 0, 1, 1 + 2.0**-7]]
IDS = [[2, 0, 1]]
ROWS = [TERMS_KD[1], TERMS_KD[2], TERMS_KD[0]]  # in the order of experts


def test_sums_are_float32_in_order_of_k_torch():
    x = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    grouped = torch_impl.grouping.group_by_expert(x, torch.tensor(IDS), torch.tensor([1, 1, 1]))
    rows = torch.tensor(ROWS, dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(grouped.x_ND, x, rows)
    assert dx.dtype == torch.bfloat16
    assert dx.tolist() == SUM
    out = torch_impl.grouping.combine(rows, torch.ones(1, 3), grouped.slot_TK, grouped.assignment_N)
    assert out.dtype == torch.bfloat16
    assert out.tolist() == SUM


@pytest.mark.parametrize("capacity", [Capacity(1, 4), Capacity(3, 1)])
def test_sums_are_float32_in_order_of_k_jax(capacity):
    @jax.jit
    def both(rows):
        def group(x):
            ids, ones = jnp.array(IDS), jnp.ones((1, 3))
            grouped = jax_impl.grouping.group_by_expert(x, ids, ones, jnp.array([1, 1, 1]), capacity)
            return grouped.x_BCD, grouped

        _, vjp, grouped = jax.vjp(group, jnp.zeros((1, 4), jnp.bfloat16), has_aux=True)
        out = jax_impl.grouping.combine(rows, jnp.ones((1, 3)), grouped.slot_TK, grouped.assignment_BC)
        return vjp(rows)[0], out

    rows = jnp.array([*ROWS, [NAN] * 4][: capacity.n_bins * capacity.rows], jnp.bfloat16)
    dx, out = both(rows.reshape(capacity.n_bins, capacity.rows, 4))
    assert dx.dtype == out.dtype == jnp.bfloat16
    assert dx.tolist() == out.tolist() == SUM


# Scores stay float32, they are not rounded to y's bfloat16 (where 1 + 2^-9 is 1), nor is their gradient.
#
#     out = (1 + 2^-9) * 256 - 256 = 1/2        dscore = dout . y = 256 * 256 + 1 * 1 = 65537, which is no bfloat16


def test_scores_stay_float32_torch():
    y = torch.tensor([[256.0, 1], [-256, 1]], dtype=torch.bfloat16, requires_grad=True)
    score = torch.tensor([[1 + 2.0**-9, 1]], requires_grad=True)
    out = torch_impl.grouping.combine(y, score, torch.tensor([[0, 1]]), torch.tensor([0, 1]))
    assert out[0, 0] == 0.5
    dy, dscore = torch.autograd.grad(out, (y, score), torch.tensor([[256, 1]], dtype=torch.bfloat16))
    assert dy.dtype == torch.bfloat16
    assert dscore.dtype == torch.float32
    assert dscore.tolist() == [[65537, -65535]]


def test_scores_stay_float32_jax():
    combine = partial(jax_impl.grouping.combine, slot_TK=jnp.array([[0, 1]]), assignment_BC=jnp.array([[0, 1]]))
    y = jnp.array([[[256.0, 1], [-256, 1]]], jnp.bfloat16)
    out, vjp = jax.vjp(jax.jit(combine), y, jnp.array([[1 + 2.0**-9, 1]]))
    assert out[0, 0] == 0.5
    dy, dscore = vjp(jnp.array([[256, 1]], jnp.bfloat16))
    assert dy.dtype == jnp.bfloat16
    assert dscore.dtype == jnp.float32
    assert dscore.tolist() == [[65537, -65535]]


# The backward passes that are written by hand, against finite differences in float64.


def test_hand_written_backward_torch():
    problem = draw(P=1, T=3, D=2, F=3, E=4, K=3)
    ids = problem.expert_id_PTK[0]
    counts = ids.reshape(-1).bincount(minlength=4)
    x = problem.x_PTD[0].clone().requires_grad_()
    score = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    grouped = torch_impl.grouping.group_by_expert(x.detach(), ids, counts)
    rows = grouped.x_ND.clone().requires_grad_()
    source = torch.tensor([3, 0, 1, 2, 8, 4, 6, 5, 7])
    check = torch.autograd.gradcheck
    assert check(lambda x: torch_impl.grouping.group_by_expert(x, ids, counts).x_ND, (x,))
    assert check(torch_impl.grouping.combine, (rows, score, grouped.slot_TK, grouped.assignment_N))
    assert check(torch_impl.rows.permute_rows, (rows, source, torch_impl.rows.inverse_permutation(source)))
    inputs = [a.clone().requires_grad_() for a in (x, problem.router_DE, *problem.weights)]
    router = torch_impl.Router(3, renormalize=True)
    assert check(lambda *inputs: torch_impl.layer.moe_layer(*inputs, router=router).out_TD, inputs)


@pytest.mark.parametrize("capacity", [Capacity(1, 7), Capacity(4, 2)])
def test_hand_written_backward_jax(capacity):
    """Against autodiff of plain indexing, with padding and drops. (The whole layer is compared with `dense` below.)"""
    problem = draw(P=1, T=3, D=2, F=3, E=4, K=3)
    ids = problem.expert_id_PTK[0].numpy()

    @jax.jit
    def gradients(x, score, y, dx_BCD, dout, dy):
        counts = jnp.bincount(jnp.array(ids).reshape(-1), length=4)
        grouped = jax_impl.grouping.group_by_expert(x, jnp.array(ids), score, counts, capacity)
        slot, assignment = grouped.slot_TK, grouped.assignment_BC
        major = jax_impl.layout.to_expert_major(y, grouped.kept_E[None])
        source, target = major.source_S, major.target_BC

        def with_zero(a):
            return jnp.concatenate([a.reshape(-1, a.shape[-1]), jnp.zeros((1, a.shape[-1]))])

        def plain_combine(y, score):
            return (with_zero(y)[slot] * score[..., None]).sum(1)

        pairs = [
            (jax_impl.rows.expand_rows, (x, slot, assignment), dx_BCD, lambda x: with_zero(x)[assignment // 3]),
            (
                jax_impl.rows.permute_rows,
                (y, source, target),
                dy.reshape(major.x_SD.shape),
                lambda y: with_zero(y)[source],
            ),
            (jax_impl.grouping.combine, (y, score, slot, assignment), dout, plain_combine),
        ]
        differences = []
        for ours, (*inputs, index, inverse), cotangent, plain in pairs:
            a, ours_vjp = jax.vjp(lambda *inputs, f=ours, i=index, j=inverse: f(*inputs, i, j), *inputs)
            b, plain_vjp = jax.vjp(plain, *inputs)
            assert a.shape == b.shape
            differences += [(a, b), *zip(ours_vjp(cotangent), plain_vjp(cotangent), strict=True)]
        return differences, grouped.kept_E

    rng = np.random.default_rng(0)
    bins = (capacity.n_bins, capacity.rows, 2)
    with jax.enable_x64(True):
        # Small integers, whose products and sums are exact.
        inputs = [rng.integers(-9, 10, shape).astype(float) for shape in [(3, 2), (3, 3), bins, bins, (3, 2), bins]]
        differences, kept_E = jax.device_get(gradients(*inputs))
    assert kept_E.sum() < 9
    for ours, plain in differences:
        assert np.any(ours)
        np.testing.assert_array_equal(ours, plain)


# Repeatability.


def test_repeatable_torch():
    problem = draw(P=1, T=64, D=16, F=32, E=8, K=3)
    runs = [bits(torch_ranks.run_layer(*layer_arguments(problem, 0, 1, torch.bfloat16))[1]) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


def test_repeatable_jax():
    runs = [bits(run_problem(STANDARD, capacity_of(STANDARD, "1"))) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


# Drops: the dense computation with score * keep.


@pytest.mark.parametrize(
    ("problem", "capacity"),
    [
        (STANDARD, Capacity(2, 9, "token")),
        (STANDARD, Capacity(2, 9, "score")),
        (STANDARD, Capacity(8, 2, "choice")),
        (draw(P=1, T=6, D=4, F=8, E=4, K=3), Capacity(1, 13, "choice")),
    ],
)
def test_drops_equal_score_times_keep(problem: Problem, capacity: Capacity):
    stages, gradients = run_problem(problem, capacity, dtype="float64")
    scores = torch.softmax(problem.x_PTD @ problem.router_DE, -1).gather(2, problem.expert_id_PTK).numpy()
    E, ids = problem.router_DE.shape[1], problem.expert_id_PTK.numpy()
    keep = np.stack([who_stays(ids[r], scores[r], E, *capacity) for r in range(len(ids))])
    assert stages.dropped.tolist() == (~keep).sum((1, 2)).tolist()
    assert stages.dropped_E.tolist() == [np.bincount(ids[r][~keep[r]], minlength=E).tolist() for r in range(len(ids))]
    assert (stages.dropped > 0).all()

    together = [a.flatten(0, 1) for a in (problem.x_PTD, problem.dout_PTD, problem.expert_id_PTK)]
    keep = torch.from_numpy(keep).flatten(0, 1)
    expected = dense(together[0], problem.router_DE, problem.weights, together[1], problem.how, together[2], keep)
    close(stages.out_TD.reshape(-1, 4), expected, "out")
    gradients["router"] = gradients["router"].sum(0)
    for name, gradient in expected.gradients.items():
        close(gradients[name].reshape(gradient.shape), expected, name)
    assert not gradients["score"].reshape(keep.shape)[~keep].any()


@pytest.mark.parametrize("per", ["rank", "expert"])
def test_the_no_drop_bound_is_reached(per):
    """Every token wants the same experts: nothing drops, and with one row less something does."""
    capacity = capacity_of(STANDARD, None, per)
    ids, counts = jnp.array([[0, 1, 2]] * 6), jnp.array([6, 6, 6, 0, 0, 0, 0, 0])
    for rows, kept in ((capacity.rows, 18), (capacity.rows - 1, 17 if per == "rank" else 15)):
        group = partial(jax_impl.grouping.group_by_expert, capacity=capacity._replace(rows=rows))
        assert jax.jit(group)(jnp.ones((6, 4)), ids, jnp.ones((6, 3)), counts).kept_E.sum() == kept


# Padding. Every padding row is NaN wherever a stage says it may hold anything, on the way out and on the way back.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def poison(x, real, forward, backward):
    """NaN in place of all rows but the real ones, in x, in its gradient or in both."""
    return jnp.where(real[..., None], x, NAN) if forward else x


poison.defvjp(
    lambda x, real, forward, backward: (poison(x, real, forward, backward), real),
    lambda forward, backward, real, dx: (jnp.where(real[..., None], dx, NAN) if backward else dx, None),
)


@pytest.mark.usefixtures("as_users_compile")  # two programs, the same bits
@pytest.mark.parametrize("capacity", [Capacity(2, 9), Capacity(8, 2)])
def test_padding_reaches_nothing(monkeypatch, capacity):
    layer, real = jax_impl.layer, {}

    def group_by_expert(*arguments):
        grouped = stages["group_by_expert"](*arguments)
        real["sent"] = grouped.assignment_BC < arguments[1].size
        return grouped._replace(x_BCD=poison(grouped.x_BCD, real["sent"], True, True))

    def to_expert_major(x_BCD, counts_Pe):
        held_B = counts_Pe.sum(1) if capacity.n_bins == 2 else counts_Pe.reshape(-1)
        real["received"] = jnp.arange(capacity.rows) < held_B[:, None]
        major = stages["to_expert_major"](poison(x_BCD, real["received"], True, True), counts_Pe)
        real["major"] = major.source_S < held_B.size * capacity.rows
        # Stage 6 was promised zero in its input; the gradient that it returns may hold anything.
        return major._replace(x_SD=poison(major.x_SD, real["major"], False, True))

    def apply_experts(*arguments):
        # Stage 6 was promised zero in the gradient; what it returns may hold anything.
        return poison(stages["apply_experts"](*arguments), real["major"], True, False)

    def to_rank_major(*arguments):
        return poison(stages["to_rank_major"](*arguments), real["received"], True, True)

    def return_tokens(*arguments):
        return poison(stages["return_tokens"](*arguments), real["sent"], True, True)

    poisoned = (group_by_expert, to_expert_major, apply_experts, to_rank_major, return_tokens)
    stages = {stage.__name__: getattr(layer, stage.__name__) for stage in poisoned}
    run = partial(jax_ranks.run_layer, router=jax_impl.Router(**STANDARD.how), capacity=capacity, axis_name=AXIS)
    clean = jax.device_get(over_ranks(run)(*jax_ranks.layer_arguments(STANDARD)))
    for stage in poisoned:
        monkeypatch.setattr(layer, stage.__name__, stage)
    after, gradients = jax.device_get(over_ranks(run)(*jax_ranks.layer_arguments(STANDARD)))
    for rows in (after.grouped.x_BCD, after.y_SD, after.rank_major_BCD, after.returned_BCD):
        assert np.isnan(rows).any()
    assert bits((after.out_TD, gradients)) == bits((clean[0].out_TD, clean[1]))


# Dtypes, shapes, strides.


def rounded_dense(problem: Problem, dtype: str):
    """The dense computation, for a layer of one rank in `dtype`."""
    x, router, weights, dout, _, ids = layer_arguments(problem, 0, 1)
    return dense(x, router, weights, dout, problem.how, ids, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("F", [8, 5])  # 5: no whole 16-byte units, which grouped_mm does not take
def test_dtypes_torch(dtype, F):
    problem = draw(P=1, T=12, D=8, F=F, E=4, K=2)
    stages, gradients = torch_ranks.run_layer(*layer_arguments(problem, 0, 1, getattr(torch, dtype)))
    expected = rounded_dense(problem, dtype)
    assert str(stages.out_TD.dtype) == str(gradients["w_up"].dtype) == f"torch.{dtype}"
    close(stages.out_TD.double(), expected, "out")
    for name, gradient in gradients.items():
        close(gradient.double(), expected, name)


@pytest.mark.parametrize(("dtype", "per"), [("float32", "rank"), ("float16", "rank"), ("bfloat16", "expert")])
def test_dtypes_jax(dtype, per):
    problem = draw(P=1, T=12, D=8, F=8, E=4, K=2)
    stages, gradients = run_problem(problem, capacity_of(problem, None, per), "no axis", dtype)
    expected = rounded_dense(problem, dtype)
    assert str(stages.out_TD.dtype) == str(gradients["w_up"].dtype) == dtype
    close(stages.out_TD[0], expected, "out")
    for name, gradient in gradients.items():
        close(gradient[0], expected, name)


@pytest.mark.parametrize("per", ["rank", "expert"])
@pytest.mark.parametrize("through_kernels", [False, True])
@pytest.mark.parametrize("T", [4, 0])
def test_no_hidden_promotion(monkeypatch, per, T, through_kernels):
    """bfloat16 and float32 meet only where one is converted."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: through_kernels)
    problem = draw(P=1, T=T, D=4, F=4, E=4, K=2)
    arguments = jax.tree.map(lambda a: a[0], jax_ranks.layer_arguments(problem, "bfloat16"))
    run = partial(
        jax_ranks.run_layer, router=jax_impl.Router(**problem.how), capacity=capacity_of(problem, "1/2", per, "score")
    )
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(run, *arguments)


# The layer as it is trained: nothing replayed, the router's own choice, and its gradient through the scores.

TRAINED = draw(P=1, T=6, D=4, F=8, E=8, K=3, renormalize=True, scale=2.5)


def expected_of_own_choice(ids: torch.Tensor, dtype: str):
    x, dout = TRAINED.x_PTD[0], TRAINED.dout_PTD[0]
    return dense(x, TRAINED.router_DE, TRAINED.weights, dout, TRAINED.how, ids, dtype=dtype)


@pytest.mark.parametrize("layer", ["dynamic", "static"])
def test_own_routing_torch(layer):
    """What comes in stays as it is, and a second backward through the same graph gives the same bits."""
    tensors = (TRAINED.x_PTD[0], TRAINED.router_DE, *TRAINED.weights, TRAINED.dout_PTD[0])
    x, router, gate, up, down = leaves = [a.clone().requires_grad_() for a in tensors[:-1]]
    dout = tensors[-1].clone()
    if layer == "dynamic":
        out = torch_impl.layer.moe_layer(x, router, gate, up, down, torch_impl.Router(**TRAINED.how)).out_TD
    else:
        capacity = static.plan_capacity(None, 6, 3, 8, 1)
        out = static.moe_layer(x, router, gate, up, down, torch_impl.Router(**TRAINED.how), capacity=capacity).out_TD
    first, again = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(2))
    assert bits(list(first)) == bits(list(again))
    assert bits([a.detach() for a in (*leaves, dout)]) == bits(list(tensors))
    expected = expected_of_own_choice(
        torch_impl.routing.route(x, router, torch_impl.Router(**TRAINED.how)).expert_id_TK, "float64"
    )
    close(out.detach(), expected, "out")
    for name, gradient in zip(("x", "router", "w_gate", "w_up", "w_down"), first, strict=True):
        close(gradient, expected, name)


@pytest.mark.parametrize("layer", ["rank", "expert", "dynamic"])
def test_own_routing_jax(layer):
    tensors = (TRAINED.x_PTD[0], TRAINED.router_DE, *TRAINED.weights, TRAINED.dout_PTD[0])
    *leaves, dout = (jnp.asarray(a.numpy(), "float32") for a in tensors)

    def run(*leaves):
        if layer == "dynamic":
            return jax_impl.dynamic.moe_layer(*leaves, router=jax_impl.Router(**TRAINED.how)).out_TD
        capacity = jax_impl.grouping.plan_capacity(None, 6, 3, 8, 1, per=layer)
        return jax_impl.layer.moe_layer(*leaves, router=jax_impl.Router(**TRAINED.how), capacity=capacity).out_TD

    out, vjp = jax.vjp(run, *leaves)
    ids = jax_impl.routing.route(leaves[0], leaves[1], jax_impl.Router(**TRAINED.how)).expert_id_TK
    expected = expected_of_own_choice(torch.from_numpy(np.array(ids, np.int64)), "float32")
    close(out, expected, "out")
    for name, gradient in zip(("x", "router", "w_gate", "w_up", "w_down"), vjp(dout), strict=True):
        close(gradient, expected, name)


def test_one_compilation_serves_every_routing():
    capacity = Capacity(2, 9)
    run_problem(STANDARD, capacity)
    layer = jax_ranks.compiled_layer(capacity, "shard_map", 3)
    compilations = layer._cache_size()  # type: ignore[attr-defined]
    for ids in ([[7, 6, 5]] * 6, [[0, 1, 2]] * 6, [[k % 8, (k + 3) % 8, (k + 4) % 8] for k in range(6)]):
        run_problem(STANDARD.with_ids(ids), capacity)
    assert layer._cache_size() == compilations  # type: ignore[attr-defined]


def test_no_tokens_torch():
    problem = draw(P=1, T=0, D=4, F=4, E=4, K=2)
    stages, gradients = torch_ranks.run_layer(*layer_arguments(problem, 0, 1))
    assert stages.out_TD.shape == gradients["x"].shape == (0, 4)
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "how_mapped",
    [
        "vmap",
        pytest.param(
            "shard_map",
            marks=pytest.mark.skipif(
                jax.__version_info__ >= (0, 11), reason="compiling empty arrays crashes XLA:CPU of jaxlib 0.11"
            ),
        ),
    ],
)
def test_no_tokens_jax(how_mapped):
    problem = draw(P=2, T=0, D=4, F=4, E=4, K=2)
    stages, gradients = run_problem(problem, capacity_of(problem, "1"), how_mapped)
    assert stages.out_TD.shape == gradients["x"].shape == (2, 0, 4)
    assert not any(gradient.any() for gradient in gradients.values())


def every_second(a: torch.Tensor) -> torch.Tensor:
    """The same values, as a slice of something twice as wide."""
    return torch.stack([a, a], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("dtype", ["float64", "float32"])  # float32 goes through grouped_mm
def test_weights_that_grouped_mm_does_not_take(dtype):
    """Gate and up interleaved in one array, as gpt-oss has them; rows that are no whole 16-byte units apart."""
    fused, x = torch.randn(4, 8, 16, dtype=getattr(torch, dtype)), torch.randn(6, 8, dtype=getattr(torch, dtype))
    wide, counts = torch.randn(4, 8, 9, dtype=fused.dtype), torch.tensor([2, 0, 3, 1])

    def of(*weights):
        leaves = [a.detach().requires_grad_() for a in (x, *weights)]
        assert [a.stride() for a in leaves[1:]] == [a.stride() for a in weights]
        rows, gate, up, down = leaves
        y = torch_impl.experts.apply_experts(rows, counts, gate, up, down)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    strided = fused[..., ::2], fused[..., 1::2], wide[..., :-1]
    expected = dense_experts(x, counts, strided, dtype)
    for weights in (strided, [w.contiguous() for w in strided]):
        for name, a in zip(("out", "x", "w_gate", "w_up", "w_down"), of(*weights), strict=True):
            close(a, expected, name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])  # float32 goes through grouped_mm
def test_input_that_is_not_contiguous(dtype):
    """x, ids and the gradient as slices, the router transposed, the weights chunks of a fused one, and transposed."""
    problem = draw(P=1, T=6, D=8, F=8, E=4, K=2)
    x, router, (gate, up, down), dout, chosen_by, ids = layer_arguments(problem, 0, 1, getattr(torch, dtype))
    strided_gate, strided_up = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
    strided_down = down.mT.contiguous().mT
    strided = [every_second(x), router.T.contiguous().T, strided_gate, strided_up, strided_down]
    assert not any(a.is_contiguous() for a in strided)

    leaves = [a.detach().requires_grad_() for a in strided]
    routing = torch_impl.routing.route(leaves[0], leaves[1], chosen_by, expert_id_TK=every_second(ids))
    x_TD, router_DE, *weights = leaves
    out = torch_impl.layer.moe_layer(x_TD, router_DE, *weights, router=chosen_by, routing=routing).out_TD
    gradients = torch.autograd.grad(out, leaves, every_second(dout))
    expected = dense(x, router, (gate, up, down), dout, problem.how, ids, dtype=dtype)
    close(out.detach(), expected, "out")
    for name, gradient in zip(("x", "router", "w_gate", "w_up", "w_down"), gradients, strict=True):
        close(gradient, expected, name)
