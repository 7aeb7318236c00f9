"""Pallas kernels against one matmul per expert in float64: every tile, no row of another expert, no padding.

On a GPU as they are (`make test-gpu`); on a CPU in Pallas's interpreter, and lowered for a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_impl import kernels
from jax_impl.experts import apply_experts

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
    x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in ((S, D), (len(counts), D, F), (S, F)))
    padding = slice(sum(counts), None)
    return x.at[padding].set(jnp.nan), w, dy.at[padding].set(jnp.nan), jnp.asarray(counts, jnp.int32)


def close(ours, exact, size, terms, dtype):
    """Summed in float32, whose error grows at most with the number of terms, and rounded once."""
    ours, finfo = np.asarray(ours, np.float64), jnp.finfo(dtype)
    allowed = float(finfo.eps) / 2 * np.abs(exact) + (terms + 1) * 2.0**-24 * size + float(finfo.tiny)
    assert ours.shape == exact.shape
    assert (np.abs(ours - exact) <= allowed * (1 + 1e-9)).all()


@groups
@dtypes
def test_each_expert_its_own_rows(backend, group, dtype):
    x, w, dy, counts = draw(group, dtype)
    y, vjp = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, counts), x, w)
    dx, dw = vjp(dy)
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
        close(ours, theirs, size, terms, dtype)
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


@pytest.mark.parametrize("kernel", [kernels.rows_times_weights, kernels.rows_times_weights_transposed])
def test_rows_lower_for_a_gpu(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert "triton" in jax.jit(kernel).trace(x, w, counts).lower(lowering_platforms=("cuda",)).as_text()


def test_weights_lower_for_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    lowered = jax.jit(kernels.weight_gradient).trace(x, x, counts).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_under_vmap():
    """Ranks on one device: a leading axis on everything."""
    x, w, _, counts = (jnp.stack([a, a]) for a in draw(GROUPS[0], "bfloat16"))
    y = jax.vmap(kernels.grouped_matmul, axis_name="ranks")(x, w, counts.at[1].set(jnp.array([0, 9, 0, 1])))
    np.testing.assert_array_equal(y[0], kernels.grouped_matmul(x[0], w[0], counts[0]))
    np.testing.assert_array_equal(y[1], kernels.grouped_matmul(x[1], w[1], jnp.array([0, 9, 0, 1])))


def test_a_cpu_takes_the_plain_way():
    if jax.default_backend() == "cpu":
        assert not kernels.use_kernels(jnp.zeros(1, jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", id="float32-stays-plain")])
def test_experts_go_through_them(dtype, monkeypatch):
    """The whole of SwiGLU, both ways, as if this were a GPU."""
    called = []
    x, w, _, counts = draw(GROUPS[0], dtype)
    w_down = w.mT
    plain = apply_experts(x, counts, w, w, w_down)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: x.dtype == jnp.bfloat16 and not called.append(x.shape))
    ours = apply_experts(x, counts, w, w, w_down)
    assert len(called) == (3 if dtype == "bfloat16" else 0)
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(plain, np.float32), rtol=0.02, atol=2)
