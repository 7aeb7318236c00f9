"""Pallas kernels: rows against the plain versions they stand for, matmuls against one per expert in float64.

On a GPU as they are (`make test-gpu`); on a CPU in Pallas's interpreter, and lowered for a GPU.
"""

from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jax_ranks import trace_over_data_and_experts
from problems import WEIGHTS, bits, close, dense, dense_experts, gamma, who_stays, within

from jax_impl import Router, direct, dynamic, kernels, moe_layer, plan_capacity
from jax_impl.experts import apply_experts
from jax_impl.grouping import Capacity, group_by_expert
from jax_impl.routing import route
from jax_impl.rows import expand_rows, inverse_permutation, permute_rows, rank_bins_source, score_gradient, weighted_sum
from parity.oracle.tolerances import underflow, unit_roundoff
from parity.run.jax_stages import poisoned_memory

# Counts of rows, rows in all, D, F: tiles with one row and with all, experts without rows, padding and none, widths
# that are no multiple of a tile's.
GROUPS = [
    ([3, 0, 200, 7], 300, 40, 72),
    ([130, 128, 0, 256], 514, 130, 200),
    ([0, 0], 5, 16, 16),
    ([129], 129, 64, 128),
    ([1] * 9, 9, 24, 8),
]
LARGE = [([1000, 0, 3000, 96], 8192, 1024, 2048), ([128] * 32, 4096, 2048, 768)]
groups = pytest.mark.parametrize(
    ("backend", "group"),
    [pytest.param("cpu", group, id=f"cpu-{i}") for i, group in enumerate(GROUPS)]
    + [pytest.param("gpu", group, id=f"gpu-{i}", marks=pytest.mark.gpu) for i, group in enumerate(GROUPS + LARGE)],
)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _interpreted_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", jax.default_backend() == "cpu")


def draw(group, dtype):
    """Padding is NaN: what reads it shows."""
    counts, S, D, F = group
    rng = np.random.default_rng(S)
    x, w, dy = (rng.normal(size=s) for s in ((S, D), (len(counts), D, F), (S, F)))
    x[sum(counts) :] = dy[sum(counts) :] = np.nan
    return *(jnp.asarray(a, dtype) for a in (x, w, dy)), jnp.asarray(counts, jnp.int32)


@jax.jit
def matmul_and_gradients(x, w, dy, counts):
    y, vjp = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, counts), x, w)
    return y, *vjp(dy)


def summed_in_float32(ours, exact, size, terms, dtype):
    """Each a sum of so many products, in any order, that is then rounded once: `size` is the sum of magnitudes."""
    summed = gamma(terms, "float32") * size
    within(ours, exact, summed + unit_roundoff(dtype) * (np.abs(exact) + summed) + underflow(dtype))


@groups
@dtypes
def test_each_expert_its_own_rows(backend, group, dtype):
    x, w, dy, counts = draw(group, dtype)
    y, dx, dw = matmul_and_gradients(x, w, dy, counts)
    X, W, DY = (np.asarray(a, np.float64) for a in (x, w, dy))
    S, D, F = X.shape[0], X.shape[1], W.shape[2]
    exact = [np.zeros((S, F)), np.zeros((S, D)), np.zeros(W.shape)]
    sizes = [np.zeros_like(a) for a in exact]
    begin = 0
    for j, n in enumerate(group[0]):
        rows = slice(begin, begin := begin + n)
        for result, f in ((exact, lambda a: a), (sizes, np.abs)):
            result[0][rows], result[1][rows] = f(X[rows]) @ f(W[j]), f(DY[rows]) @ f(W[j]).T
            result[2][j] = f(X[rows]).T @ f(DY[rows])
    for ours, theirs, size, terms in zip((y, dx, dw), exact, sizes, (D, F, S), strict=True):
        summed_in_float32(ours, theirs, size, terms, dtype)
        assert (np.asarray(ours)[size == 0] == 0).all()


def test_in_whatever_order(monkeypatch):
    """Tiles write apart from each other. The interpreter runs them in order, in which a later one would hide it."""
    x, w, _, counts = draw(GROUPS[0], "bfloat16")
    y, tiles = kernels.rows_times_weights(x, w, counts), kernels.tiles
    monkeypatch.setattr(kernels, "tiles", lambda *a: tuple(v[::-1] for v in tiles(*a)))
    np.testing.assert_array_equal(kernels.rows_times_weights(x, w, counts), y)


def test_tiles_on_paper(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 2)
    expert, first, end = (a.tolist() for a in kernels.tiles(jnp.array([3, 0, 2]), 7))
    assert len(expert) == 4 + 3 + 1
    assert [(j, r, s) for j, r, s in zip(expert, first, end, strict=True) if r < s] == [
        (0, 0, 3), (0, 2, 3), (2, 3, 5), (3, 5, 7)
    ]  # fmt: skip


def lowered_for_a_gpu(kernel, *shapes) -> str:
    """Since jax 0.11 lowering asks for which."""
    card = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
        return jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kernel", [kernels.rows_times_weights, kernels.rows_times_weights_transposed])
def test_rows_lower_for_a_gpu(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert "triton" in lowered_for_a_gpu(kernel, x, w, counts)


def test_weights_lower_for_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert "triton" in lowered_for_a_gpu(kernels.weight_gradient, x, x, counts)


def test_under_vmap():
    """Ranks on one device: a leading axis on everything."""
    x, w, _, counts = (np.stack([a, a]) for a in draw(GROUPS[0], "bfloat16"))
    counts[1] = [0, 9, 0, 1]
    y = jax.jit(jax.vmap(kernels.grouped_matmul, axis_name="ranks"))(x, w, counts)
    for rank, one in enumerate(zip(x, w, counts, strict=True)):
        np.testing.assert_array_equal(y[rank], jax.jit(kernels.grouped_matmul)(*one))


def test_a_cpu_takes_the_plain_way():
    if jax.default_backend() == "cpu":
        assert not kernels.use_kernels(jnp.zeros(1, jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", id="float32-stays-plain")])
def test_experts_go_through_them(dtype, monkeypatch):
    """The whole of SwiGLU, both ways, as if this were a GPU."""
    x, w, _, counts = draw(GROUPS[0], dtype)
    w_down = w.mT
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "use_kernels", lambda x: False)
        plain = jax.jit(lambda *a: apply_experts(*a))(x, counts, w, w, w_down)
    called, matmul = [], kernels.grouped_matmul
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    monkeypatch.setattr(kernels, "grouped_matmul", lambda *a: called.append(a) or matmul(*a))
    ours = jax.jit(lambda *a: apply_experts(*a))(x, counts, w, w, w_down)
    if dtype == "float32":
        assert not called
        np.testing.assert_array_equal(ours, plain)
    else:
        assert len(called) == 3
        n = sum(GROUPS[0][0])
        x_RD, w_eDF, w_eFD = (torch.from_numpy(np.array(a, np.float32)) for a in (x[:n], w, w_down))
        expected = dense_experts(x_RD, torch.tensor(GROUPS[0][0]), (w_eDF, w_eDF, w_eFD), dtype)
        for y in (ours, plain):
            close(np.asarray(y, np.float32)[:n], expected, "out")
            assert not np.asarray(y, np.float32)[n:].any()


# T, D, E, K, C of two bins: a token with one expert and with all, drops and padding, wider than a program's tile.
ROWS = [(1, 8, 2, 1, 1), (7, 24, 4, 3, 9), (16, 32, 8, 2, 40), (33, 130, 6, 6, 50), (5, 9000, 4, 2, 7)]
LARGE_ROWS = [(512, 7168, 256, 8, 2048), (1024, 4096, 8, 2, 1000), (515, 2048, 128, 7, 1800)]
rows = pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [("cpu", shape, "float32") for shape in ROWS]
    + [("cpu", shape, "bfloat16") for shape in ROWS[1:4:2]]
    + [
        pytest.param("gpu", shape, dtype, marks=pytest.mark.gpu)
        for shape in ROWS + LARGE_ROWS
        for dtype in ("float32", "bfloat16")
    ],
    ids=str,
)


@pytest.fixture
def both_ways(monkeypatch):
    """A function's result the plain way, and through kernels as if this were a GPU; each compiled, as on a GPU."""

    def call(function, *arguments):
        results = []
        for answer in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "use_kernels", lambda x, answer=answer: answer)
                results.append(jax.jit(lambda *a: function(*a))(*arguments))  # a new one, or its trace is found again
        return results

    return call


@cache
def draw_ids(shape):
    """Where assignments go: slots of tokens, assignments of slots, how many of each expert are kept."""
    T, D, E, K, C = shape
    rng = np.random.default_rng(D)
    ids = np.argsort(rng.random((T, E)) + (np.arange(E) % 3 > 0), axis=1)[:, -K:].astype(np.int32)
    counts = np.bincount(ids.reshape(-1), minlength=E).astype(np.int32)
    group = jax.jit(partial(group_by_expert, capacity=Capacity(2, C)))
    return jax.device_get(group(np.ones((T, 1), np.float32), ids, np.ones((T, K), np.float32), counts)[1:])


def draw_rows(shape, dtype):
    """Tokens, scores, indices, and rows of which the padding is NaN: what reads it shows."""
    T, D, _, K, C = shape
    slot, assignment, kept = draw_ids(shape)
    rng = np.random.default_rng(D)
    x, dx, score = (rng.normal(size=s) for s in ((T, D), (2, C, D), (T, K)))
    y = np.where((assignment < T * K)[..., None], dx, np.nan)
    dx[:, ::3] = -0.0
    x, dx, y = (a.astype(jnp.dtype(dtype)) for a in (x, dx, y))
    return x, dx, y, score.astype(np.float32), slot, assignment, kept.reshape(2, -1)


def same(ours, theirs):
    """Bit for bit, the sign of zero and all."""
    assert ours.dtype == theirs.dtype
    integers = {2: np.int16, 4: np.int32}[ours.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(ours).view(integers), np.asarray(theirs).view(integers))


def expand_gradient(dx, x, slot, assignment):
    return jax.vjp(lambda x: expand_rows(x, slot, assignment), x)[1](dx)[0]


def combine_gradients(y, score, slot, assignment, dout):
    return jax.vjp(lambda y, score: weighted_sum(y, score, slot, assignment), y, score)[1](dout)


@rows
def test_rows_moved_and_summed_are_bitwise_equal(backend, shape, dtype, both_ways):
    x, dx, y, _, slot, assignment, _ = draw_rows(shape, dtype)
    same(*both_ways(expand_rows, x, slot, assignment))
    # Sums start from 0, so none is -0. Where XLA sees that 0 it leaves it out.
    same(*(np.asarray(a) + np.zeros((), a.dtype) for a in both_ways(expand_gradient, dx, x, slot, assignment)))
    source = np.argsort(assignment.reshape(-1) * 7919 % 104729, kind="stable")[::-1].astype(np.int32)
    index = np.where(source % 4 == 1, source.size, source)  # some are past the end
    plain, ours = both_ways(permute_rows, y, index, np.argsort(source).astype(np.int32).reshape(assignment.shape))
    same(ours, plain)
    assert (np.asarray(ours)[index == source.size] == 0).all()


@rows
def test_combine_and_its_gradients(backend, shape, dtype, both_ways):
    x, _, y, score, slot, assignment, _ = draw_rows(shape, dtype)
    plain, ours = both_ways(weighted_sum, y, score, slot, assignment)
    gathered = np.append(y.reshape(-1, y.shape[-1]), np.zeros((1, y.shape[-1])), axis=0)[slot].astype(float)
    terms = np.asarray(score, np.float64)[..., None] * gathered
    # A compiler may round a product and a sum once, or each: K of them in float32, then once to the dtype.
    for out in (plain, ours):
        summed_in_float32(out, terms.sum(axis=1), np.abs(terms).sum(axis=1), terms.shape[1], dtype)

    plain, ours = both_ways(combine_gradients, y, score, slot, assignment, x)
    same(ours[0], plain[0])  # one product, one rounding; padding is zero
    products = np.asarray(x, np.float64)[:, None] * gathered
    alone = both_ways(score_gradient, x, y.reshape(-1, y.shape[-1]), score, slot)
    for dscore in (plain[1], ours[1], *alone):  # a sum over D, in any order
        summed_in_float32(dscore, products.sum(axis=2), np.abs(products).sum(axis=2), x.shape[1], "float32")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("N", "n_keys"), [(1, 1), (7, 3), (256, 31), (257, 32), (3000, 256)])
@pytest.mark.parametrize("dtype", ["int32", "int8", "int64"])
def test_sort_by_key(backend, N, n_keys, dtype):
    """What is no key goes last, in order."""
    key = np.random.default_rng(N).integers(-1, n_keys + 3, N).clip(None, np.iinfo(dtype).max)
    key[key == n_keys + 2] += 2**32 if dtype == "int64" else 0
    with jax.enable_x64(dtype == "int64"):
        order, place = jax.jit(kernels.sort_by_key, static_argnums=1)(jnp.asarray(key, dtype), n_keys)
    expected = np.argsort(np.where((key < 0) | (key > n_keys), n_keys, key), kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(np.asarray(place)[expected], np.arange(N))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("P", "e", "C"), [(1, 1, 1), (1, 3, 5), (2, 4, 7), (3, 1, 9), (4, 8, 2500)])
def test_expert_major_rows(backend, P, e, C):
    """Full bins, empty ones, and between."""
    rng, plain = np.random.default_rng(C), jax.jit(partial(rank_bins_source, capacity=C))
    for share in (0, 0.4, 1):
        counts = jnp.asarray(rng.multinomial(int(C * share), np.full(e, 1 / e), size=P), jnp.int32)
        with jax.enable_x64(share == 1):
            source, target = jax.jit(kernels.expert_major_rows, static_argnums=1)(counts, C)
        expected = plain(counts)
        np.testing.assert_array_equal(source, expected)
        np.testing.assert_array_equal(target, jax.jit(inverse_permutation)(expected))


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [("rank bins", "bfloat16"), ("expert bins", "float64"), ("dynamic", "float64"), ("direct", "bfloat16")],
)
def test_the_layer_with_64_bits(layer, dtype, monkeypatch):
    """JAX then makes 64-bit integers where nothing says otherwise, and kernels take none but those they expect."""
    T, D, F, E, K = 5, 24, 16, 4, 2
    without_bins = {"dynamic": dynamic.moe_layer, "direct": direct.moe_layer}.get(layer)
    bins = None if without_bins else plan_capacity("1", T, K, E, 1, per=layer.split()[0])
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        inputs = [
            jnp.asarray(rng.normal(size=s), dtype) for s in ((T, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
        ]  # fmt: skip
        inputs[1] = inputs[1].astype(jnp.promote_types(dtype, jnp.float32))
        ids = np.array(route(inputs[0], inputs[1], Router(K)).expert_id_TK, np.int64)
        n_bins, C = (1, T * K) if bins is None else bins[:2]
        keep = torch.from_numpy(who_stays(ids, np.ones((T, K)), E, n_bins, C, "token"))
        x, router, *weights = (torch.from_numpy(np.array(a, float)) for a in inputs)
        expected = dense(
            x, router, (weights[0], weights[1], weights[2]), torch.ones_like(x), {"top_k": K}, torch.from_numpy(ids),
            keep, dtype=dtype,
        )  # fmt: skip
        for answer in (False, True):
            monkeypatch.setattr(kernels, "use_kernels", lambda x, answer=answer: answer)

            def run(*inputs):
                if bins is None:
                    assert without_bins
                    return without_bins(*inputs, router=Router(K)).out_TD
                return moe_layer(*inputs, router=Router(K), capacity=bins).out_TD

            out, vjp = jax.vjp(jax.jit(run), *inputs)
            for name, a in zip(("out", "x", "router", *WEIGHTS), (out, *vjp(jnp.ones_like(out))), strict=True):
                close(np.asarray(a, float), expected, name)


def test_rows_under_vmap(both_ways):
    """Ranks on one device: a leading axis on everything."""
    one = draw_rows(ROWS[1], "bfloat16")
    x, dx, y, score, slot, assignment, _ = (np.stack([a, b]) for a, b in zip(one, one, strict=True))
    for a in (x, dx, score):
        a[1] *= 3
    same(*both_ways(jax.vmap(expand_rows), x, slot, assignment))
    same(*both_ways(jax.vmap(expand_gradient), dx, x, slot, assignment))
    plain, ours = both_ways(jax.vmap(combine_gradients), y, score, slot, assignment, x)
    same(ours[0], plain[0])


@pytest.mark.parametrize("per", ["rank", "expert"])
@pytest.mark.parametrize("through", ["kernels", "kernels over poison", "plain versions"])
def test_experts_that_replicas_share_are_differentiated(monkeypatch, through, per):
    """Experts over one axis of a mesh, data over both: the gradient of the weights is summed over the other one."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: through != "plain versions")
    capacity = plan_capacity(None, 6, 2, 4, 2, per=per)
    with poisoned_memory() if through == "kernels over poison" else nullcontext():
        trace_over_data_and_experts(
            lambda *a: moe_layer(*a, router=Router(2), capacity=capacity, axis_name="experts").out_TD, "bfloat16"
        )


def test_a_gradient_of_a_gradient_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    slot, assignment = jnp.arange(4).reshape(2, 2), jnp.arange(4).reshape(1, 4)

    def penalty(x):
        return (jax.grad(lambda x: (weighted_sum(x, jnp.ones((2, 2)), slot, assignment) ** 2).sum())(x) ** 2).sum()

    with pytest.raises(NotImplementedError, match="kernels have no second derivative: for the gradient of a gradient"):
        jax.make_jaxpr(jax.grad(penalty))(jnp.ones((1, 4, 8)))


@pytest.mark.parametrize(
    "kernel", ["gather_rows", "expand_rows", "sum_rows", "weighted_sum_backward", "score_gradient"]
)
def test_rows_lower_for_a_gpu_too(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    T, K, S, D = 64, 4, 300, 512
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
    y, score, slot = (jax.ShapeDtypeStruct(*a) for a in (((S, D), bf16), ((T, K), f32), ((T, K), i32)))
    index, dout = jax.ShapeDtypeStruct((S,), i32), jax.ShapeDtypeStruct((T, D), bf16)
    arguments = {
        "gather_rows": (y, index), "expand_rows": (dout, slot, index), "sum_rows": (y, slot, score),
        "weighted_sum_backward": (dout, y, score, slot, index), "score_gradient": (dout, y, score, slot),
    }[kernel]  # fmt: skip
    assert "triton" in lowered_for_a_gpu(getattr(kernels, kernel), *arguments)


def write_every_other(x, y, n):
    i = kernels.pl.program_id(0)
    y[2 * i], n[2 * i] = x[2 * i], i


def every_other(x):
    shapes = jax.ShapeDtypeStruct((4,), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    how = {"compiler_params": kernels.triton.CompilerParams(), "interpret": kernels.INTERPRET}
    return kernels.pl.pallas_call(write_every_other, out_shape=shapes, grid=(2,), **how)(x)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_a_kernel_leaves_unwritten_is_poison(backend, mapped):
    """Elsewhere it is what the memory held; on a CPU, what the interpreter puts there, the least of integers."""
    x, plain = jnp.arange(1, 5, dtype=jnp.bfloat16), kernels.pl.pallas_call
    with poisoned_memory():
        y, n = jax.tree.map(lambda a: a[0], jax.vmap(every_other)(x[None])) if mapped else every_other(x)
    assert str(y.tolist()) == "[1.0, nan, 3.0, nan]"
    assert n.tolist() == [0, 2**31 - 1, 1, 2**31 - 1]
    assert kernels.pl.pallas_call is plain


def test_a_layer_over_poison_gives_the_same_bits(monkeypatch):
    """All of it goes through kernels, forward and backward, with padding and drops, under vmap too."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(2, 7, 16)), rng.normal(size=(16, 4)), *rng.normal(size=(3, 4, 16, 16))
    leaves = [jnp.asarray(a, jnp.bfloat16 if i != 1 else jnp.float32) for i, a in enumerate(arrays)]

    def layer(x, *w):
        return moe_layer(x, *w, router=Router(2), capacity=plan_capacity("5/4", 7, 2, 4, 1)).out_TD

    def run():
        out, vjp = jax.vjp(jax.vmap(layer, in_axes=(0, *[None] * 4)), *leaves)
        return bits([out, *vjp(out)])

    expected = run()
    with poisoned_memory():
        assert run() == expected


@pytest.mark.parametrize("poisoned", [False, True])
def test_poison_reaches_a_gpu_s_program(monkeypatch, poisoned):
    """The array that a kernel's result takes the place of is one of its arguments."""
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x, index = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16), jax.ShapeDtypeStruct((300,), jnp.int32)
    with poisoned_memory() if poisoned else nullcontext():
        text = lowered_for_a_gpu(lambda *a: kernels.gather_rows(*a), x, index)  # not what jit has traced before
    assert ("operand_index = 2" in text) == poisoned
    assert ("0x7FC0" in text) == poisoned  # NaN in bfloat16


def test_nothing_to_move(monkeypatch):
    empty, ids = jnp.zeros((0, 8)), jnp.zeros((0, 2), jnp.int32)
    assert kernels.gather_rows(empty, jnp.array([0, 0, 0])).tolist() == [[0.0] * 8] * 3
    assert kernels.expand_rows(empty, ids, jnp.zeros(3, jnp.int32)).tolist() == [[0.0] * 8] * 3
    assert kernels.sum_rows(jnp.ones((4, 8)), ids).shape == (0, 8)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    assert expand_rows(empty, ids, ids.reshape(-1)).shape == (0, 8)
    dy, dscore = kernels.weighted_sum_backward(empty, jnp.ones((4, 8)), jnp.zeros((0, 2)), ids, jnp.zeros(4, jnp.int32))
    assert dy.tolist() == [[0.0] * 8] * 4
    assert dscore.shape == (0, 2)
