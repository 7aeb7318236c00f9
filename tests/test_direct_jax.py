"""Rows straight to their places in JAX: the bits of the readable corner, places by hand, every way to map ranks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_ranks import AXIS, both_ways, over_ranks, to_jax
from problems import STANDARD, bits, close, dense, draw
from ragged_exchange import ragged_all_to_all

from jax_impl import Router, Routing, direct, dynamic, kernels
from jax_impl.direct.exchange import return_tokens, send_tokens
from jax_impl.direct.grouping import combine, group_by_expert
from jax_impl.direct.rows import expert_major_rows, put_rows, ranks_of
from jax_impl.dynamic import exchange
from jax_impl.routing import count_per_expert
from parity.cases.presets import PRESETS
from parity.judge.engine import run_cases
from parity.run.backend import Setting
from parity.run.ours import BACKENDS
from torch_impl.direct import rows as torch_rows
from torch_impl.kernels import put_stride


def step(layer, x, score, weights, dout, ids, *, E, axis_name):
    """A layer with this routing, forward and backward."""

    def out(x, score, weights):
        routing = Routing(score, ids, count_per_expert(ids, E))
        stages = layer(
            x, jnp.zeros((x.shape[1], E)), *weights, router=Router(ids.shape[1]), routing=routing, axis_name=axis_name
        )
        return stages.out_TD, stages.dropped

    y, vjp, dropped = jax.vjp(out, x, score, weights, has_aux=True)
    return y, vjp(dout), dropped


def arguments_of(problem, dtype):
    """Of each rank, with scores that are none of the router's."""
    P, T, K = problem.expert_id_PTK.shape
    weights = tuple(w.reshape(P, -1, *w.shape[1:]) for w in problem.weights)
    x, weights, dout = to_jax([problem.x_PTD, weights, problem.dout_PTD], dtype)
    score = jnp.asarray(np.random.default_rng(1).random((P, T, K), np.float32))
    return x, score, weights, dout, jnp.asarray(problem.expert_id_PTK.numpy(), jnp.int32)


# ---- the readable corner's bits

IDLE = [[0, 1, 2]] * 24  # all choices are of the first rank's experts


@pytest.mark.parametrize(("P", "what"), [(1, "drawn"), (2, "idle"), (4, "drawn")])
def test_the_readable_corner_s_bits(monkeypatch, P, what):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(exchange, "check_ragged_exchange", lambda _: None)
    problem = draw(P=P, T=24, D=32, F=32, E=12, K=3)
    arguments = arguments_of(problem.with_ids(IDLE) if what == "idle" else problem, "float32")
    readable, ours = (
        jax.device_get(over_ranks(partial(step, layer, E=12, axis_name=AXIS))(*arguments))
        for layer in (dynamic.moe_layer, direct.moe_layer)
    )
    assert np.isfinite(readable[0]).all()
    assert bits(ours) == bits(readable)


@pytest.mark.parametrize("how", ["vmap, not compiled", "vmap of a program", "vmap of a recomputation", "vmap in all"])
def test_a_gradient_that_is_taken_outside_of_vmap(how):
    """Where JAX runs a custom backward without the size of the axis, and the rank's place on it."""
    x, slot, score = jnp.arange(24.0).reshape(2, 3, 4), jnp.array([[0, 3], [1, 4], [2, 5]]), jnp.ones((3, 2))
    counts = jnp.array([[1, 2, 0, 3], [1, 2, 3, 0]])
    rows = [expert_major_rows(counts, rank, 6, 12) for rank in range(2)]
    place, origin = (jnp.stack(a) for a in zip(*rows, strict=True))

    def layer(x, place, origin):
        y = send_tokens(x, slot, place, origin, AXIS)
        y = jnp.where((origin >= 0)[:, None], y * (1 + jax.lax.axis_index(AXIS)), 0)
        returned = return_tokens(y, place, origin, AXIS)
        return combine(y, returned, score, slot, place, AXIS)

    layer = {"vmap of a program": jax.jit, "vmap of a recomputation": jax.checkpoint}.get(how, lambda f: f)(layer)
    over = jax.vmap(layer, axis_name=AXIS)
    over = jax.jit(over) if how == "vmap in all" else over
    out, vjp = jax.vjp(lambda x: over(x, place, origin), x)
    times = 1 + (place // 12)  # each row comes back as often as the number of its rank says
    scale = times[jnp.arange(2)[:, None, None], slot].sum(axis=2)[..., None]
    np.testing.assert_array_equal(out, x * scale)
    np.testing.assert_array_equal(vjp(jnp.ones_like(x))[0], jnp.broadcast_to(scale, x.shape))


# ---- ids that are none


def test_ids_that_are_none_are_dropped_and_counted():
    """The dense layer with score * keep, on ranks under vmap."""
    problem = STANDARD
    ids = problem.expert_id_PTK.clone()
    ids[:, 0, 1], ids[0, 2, 0], ids[-1, 3, 2], ids[-1, 5] = 8, -1, 2**30, torch.tensor([-7, 99, 8])
    keep = (ids >= 0) & (ids < 8)
    x, _, weights, dout, _ = arguments_of(problem, "float32")
    score = torch.stack([(a @ problem.router_DE).softmax(-1) for a in problem.x_PTD]).gather(2, ids.clamp(0, 7))
    arguments = (x, to_jax(score, "float32"), weights, dout, jnp.asarray(ids.numpy(), jnp.int32))
    out, (_, dscore, _), dropped = over_ranks(partial(step, direct.moe_layer, E=8, axis_name=AXIS), "vmap")(*arguments)
    assert dropped.tolist() == (~keep).sum(dim=(1, 2)).tolist()
    for p in range(2):
        want = dense(problem.x_PTD[p], problem.router_DE, problem.weights, problem.dout_PTD[p], problem.how,
                     ids[p].clamp(0, 7), keep[p], dtype="float32")  # fmt: skip
        close(out[p], want, "out")
        close(dscore[p], want, "score")
    assert not np.asarray(dscore)[~keep.numpy()].any()


def test_an_id_that_repeats_in_its_token_is_sent_once():
    """Or more rows could arrive than there is room for: with one expert on a rank, at most one of a token's choices."""
    ids = jnp.array([[0, 0, 0], [1, 0, 1], [1, 2, 5]])
    grouped = group_by_expert(ids, count_per_expert(ids, 2))
    assert grouped.kept_E.tolist() == [2, 2]
    assert grouped.slot_TK.tolist() == [[0, 9, 9], [2, 1, 9], [3, 9, 9]]


# ---- where rows go


def test_places_on_paper():
    """Two ranks of two experts, up to 8 rows to arrive and 4 slots: place, and back.

    slots   p0: e0 e0 e1 e3 | p1: e1 e2 e3 __        rows   rank 0: p0 p0 | p0 p1        rank 1: p1 | p0 p1
    """
    counts_PE = jnp.array([[2, 1, 0, 1], [0, 1, 1, 1]])
    places = [expert_major_rows(counts_PE, rank, 4, 8) for rank in range(2)]
    assert [place.tolist() for place, _ in places] == [[0, 1, 2, 9], [3, 8, 10, -1]]
    assert [origin.tolist() for _, origin in places] == [[0, 1, 2, 4, *[-1] * 4], [5, 3, 6, *[-1] * 5]]


@pytest.mark.parametrize(("P", "e"), [(1, 3), (3, 2), (4, 1)])
def test_places_are_those_of_pytorch(P, e):
    """Which are compared with a sort."""
    rng = np.random.default_rng(P)
    counts_PE = rng.multinomial(20, rng.dirichlet(np.ones(P * e)), P)
    for rank in range(P):
        ours = expert_major_rows(jnp.asarray(counts_PE), rank, 22, 24 * P)
        theirs = torch_rows.expert_major_rows(torch.from_numpy(counts_PE), rank, 22, 22, 24 * P)
        assert [a.tolist() for a in ours] == [a.tolist() for a in theirs]


@both_ways
@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_put_where_they_belong(how_mapped, P, weighted):
    """Those that nobody writes are NaN."""
    M, K, n_rows, dtype, rng = 5, 2, 12, jnp.bfloat16, np.random.default_rng(P)
    place_PMK = rng.permutation(P * n_rows)[: P * M * K].reshape(P, M, K)
    place_PMK[rng.random(place_PMK.shape) < 0.3] = -1
    x_PMD = jnp.asarray(rng.normal(size=(P, M, 3)), dtype)
    score_PMK = jnp.asarray(rng.random((P, M, K), np.float32))
    expected = np.full((P * n_rows, 3), np.nan, dtype)
    for p, m, k in np.ndindex(P, M, K):
        if place_PMK[p, m, k] >= 0:
            scale = score_PMK[p, m, k] if weighted else jnp.float32(1)
            expected[place_PMK[p, m, k]] = (scale * x_PMD[p, m].astype(jnp.float32)).astype(dtype)

    def put(x, place, score):
        return put_rows(x, place, n_rows, ranks_of(AXIS), score if weighted else None)

    found = over_ranks(put, how_mapped)(x_PMD, jnp.asarray(place_PMK, jnp.int32), score_PMK)
    assert bits(np.asarray(found).reshape(expected.shape)) == bits(expected)


# ---- the kernel's plan. What it does, only GPUs show: test_gpu_direct_jax.py


@pytest.mark.parametrize(
    ("width", "size", "tile"),
    [
        (4096, 2, (4, 16, 256)),  # 32 KB at once
        (7168, 2, (2, 28, 256)),
        (7168, 4, (1, 28, 256)),
        (2880, 2, (4, 12, 240)),
        (64, 2, (4, 1, 64)),
        (32, 2, None),  # 64 bytes
        (4096, 8, None),
        (64 * 257, 2, None),  # more than 256 pieces
        (2**17, 2, None),  # more than a core's memory, and more pieces
    ],
)
def test_rows_at_once(width, size, tile):
    assert kernels._put_tile(width, size) == tile


def test_chunks_go_out_in_the_order_of_pytorch_s_rows():
    assert [kernels.put_stride(n) for n in range(1, 300)] == [put_stride(n) for n in range(1, 300)]


def test_no_kernel_writes_to_ranks_on_a_cpu():
    assert not kernels.can_reach_ranks(AXIS)


# ---- the check


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "names",
    [
        ["zipf", "uneven"],
        pytest.param(
            ["idle-rank", "in-flight", "two-groups", "recomputed", "t0", "compiled", "eager", "bfloat16", "k-all"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_check_of_this_corner(names):
    cases = [PRESETS[name] for name in names]
    report = run_cases(cases, [BACKENDS["jax-direct"]], Setting(), show_progress=False)
    assert report is not None
    assert report.footer.verdict == "match"
