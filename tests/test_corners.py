"""The other two corners: static capacity in PyTorch, and rows exchanged by sizes on the device in JAX."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax_ranks import AXIS, over_ranks, to_jax, trace_over_data_and_experts
from problems import STANDARD, WEIGHTS, bits, close, dense, draw, who_stays
from ragged_exchange import ragged_all_to_all
from test_one_sync import OnDevice, on_device
from torch_ranks import TorchRanks, detach, layer_arguments

import jax_impl
import jax_impl.dynamic
import jax_impl.dynamic.grouping
import jax_impl.grouping
import jax_impl.routing
import torch_impl.static
import torch_impl.static.experts
import torch_impl.static.layer
import torch_impl.static.matmul
from jax_impl import dynamic
from jax_impl.dynamic import exchange
from parity.cases.presets import PRESETS
from parity.judge.compare import compare
from parity.oracle.problem import draw as draw_case
from parity.run import jax_stages
from parity.run.ours import BACKENDS
from torch_impl import Router, checks
from torch_impl.static import grouping

NAN = float("nan")


# ---- static PyTorch against static JAX

T, K, E = 6, 3, 6
drawn_ids = st.lists(st.permutations(range(E)).map(lambda order: order[:K]), min_size=T, max_size=T).map(np.array)
drawn_scores = st.lists(
    st.lists(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0]), min_size=K, max_size=K), min_size=T, max_size=T
)
X = np.random.default_rng(0).normal(size=(T, 4)).astype(np.float32)


@lru_cache
def grouped_by_jax(capacity: jax_impl.Capacity, n_experts: int):
    @jax.jit
    def group(x, ids, score):
        counts = jax_impl.routing.count_per_expert(ids, n_experts)
        return jax_impl.grouping.group_by_expert(x, ids, score, counts, capacity)

    return group


def assert_same_rows(x, ids, score, n_experts: int, capacity: tuple[int, int, str]) -> grouping.Grouped:
    """Both keep the same assignments in the same slots, bit for bit; PyTorch's."""
    theirs = grouped_by_jax(jax_impl.Capacity(*capacity), n_experts)(x, ids, score)
    counts = torch.from_numpy(np.bincount(ids[(ids >= 0) & (ids < n_experts)].reshape(-1), minlength=n_experts))
    ours = grouping.group_by_expert(
        torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(score), counts, grouping.Capacity(*capacity)
    )
    for name in ("x_BCD", "slot_TK", "assignment_BC", "kept_E"):
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(theirs, name), name)
    assert bits(ours.x_BCD) == bits(np.asarray(theirs.x_BCD))
    return ours


@pytest.mark.parametrize("n_bins", [2, E])
@pytest.mark.parametrize("priority", ["token", "choice", "score"])
@given(drawn_ids, drawn_scores)
def test_static_pytorch_keeps_what_static_jax_keeps(n_bins, priority, ids, score):
    score = np.array(score, np.float32)
    ours = assert_same_rows(X, ids, score, E, (n_bins, 2, priority))
    keep = who_stays(ids, score, E, n_bins, 2, priority)
    np.testing.assert_array_equal(ours.slot_TK.numpy() < n_bins * 2, keep)


@pytest.mark.parametrize("name", PRESETS)
def test_both_keep_what_the_oracle_keeps_in_every_preset(name):
    problem = draw_case(PRESETS[name])
    case = problem.case
    for rank in range(case.ranks):
        ours = assert_same_rows(
            problem.x[rank].astype(np.float32), problem.expert_id[rank].astype(np.int64),
            problem.score[rank].astype(case.accum_dtype), case.experts, (case.bins, case.capacity, case.priority),
        )  # fmt: skip
        np.testing.assert_array_equal(ours.slot_TK.numpy() < case.bins * case.capacity, problem.keep[rank])


def test_ids_out_of_range_are_dropped_by_both():
    ids = np.array([[0, 6, -1], [1, 2, 3], [7, 0, 5], [0, 1, 2], [-3, 4, 0], [5, 0, 1]])
    assert_same_rows(X, ids, np.ones((T, K), np.float32), E, (2, 2, "token"))


@pytest.mark.parametrize("factor", [None, "1.25", 4.05, "5/4", 1])
def test_both_plan_the_same_capacity(factor):
    for per in ("rank", "expert"):
        for align in (1, 8):
            arguments = (factor, 7680, 1, 16, 8, per, "score", align)
            assert tuple(torch_impl.static.plan_capacity(*arguments)) == tuple(jax_impl.plan_capacity(*arguments))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"factor": "0"}, "it must be finite and positive"),
        ({"factor": "nan"}, "it must be finite and positive"),
        ({"per": "token"}, "it must be 'rank' or 'expert'"),
        ({"align": 0}, "it must be at least 1"),
        ({"n_experts": 5}, "do not divide over 2 ranks"),
    ],
)
def test_both_refuse_the_same_capacities(wrong, words):
    arguments = {"factor": "1", "n_tokens": 4, "top_k": 2, "n_experts": 4, "n_ranks": 2} | wrong
    said = []
    for plan in (torch_impl.static.plan_capacity, jax_impl.plan_capacity):
        with pytest.raises(ValueError, match=words) as refused:
            plan(**arguments)
        said.append(str(refused.value))
    assert said[0] == said[1]


def static_layer(x, router, weights, dout, chosen_by, ids, capacity, group=None):
    x, router, *weights = (a.detach().clone().requires_grad_() for a in (x, router, *weights))
    routing = torch_impl.static.route(x, router, chosen_by, expert_id_TK=ids)
    routing.score_TK.retain_grad()
    stages = torch_impl.static.moe_layer(
        x, router, *weights, router=chosen_by, capacity=capacity, routing=routing, group=group
    )
    stages.out_TD.backward(dout)
    return detach(stages), [a.grad for a in (x, router, routing.score_TK, *weights)]


@pytest.mark.parametrize("n_bins", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # float64 goes through a matmul for each expert
def test_static_pytorch_over_ranks_is_the_dense_layer_with_score_times_keep(torch_ranks: TorchRanks, n_bins, dtype):
    problem, P = draw(P=2, T=6, D=4, F=8, E=8, K=3), 2
    arguments = [layer_arguments(problem, rank, P, getattr(torch, dtype)) for rank in range(P)]
    capacity = grouping.Capacity(n_bins, 9 if n_bins == 2 else 2, "score")
    results = torch_ranks(static_layer, *map(list, zip(*arguments, strict=True)), [capacity] * P)
    keeps = []
    for rank, (stages, gradients) in enumerate(results):
        ids, score = problem.expert_id_PTK[rank], stages.routing.score_TK
        keep = who_stays(ids.numpy(), score.numpy(), 8, n_bins, capacity.rows, "score")
        assert int(stages.dropped) == (~keep).sum() == int(stages.dropped_E.sum())
        expected = dense(
            problem.x_PTD[rank], problem.router_DE, problem.weights, problem.dout_PTD[rank], problem.how, ids,
            torch.from_numpy(keep), dtype=dtype,
        )  # fmt: skip
        close(stages.out_TD, expected, "out")
        for name, gradient in zip(("x", "router", "score"), gradients, strict=False):
            close(gradient, expected, name)
        keeps.append(torch.from_numpy(keep))
    assert not torch.cat(keeps).all()
    x, dout, ids = (a.flatten(0, 1) for a in (problem.x_PTD, problem.dout_PTD, problem.expert_id_PTK))
    together = dense(x, problem.router_DE, problem.weights, dout, problem.how, ids, torch.cat(keeps), dtype=dtype)
    for i, name in enumerate(WEIGHTS):
        close(torch.cat([gradients[3 + i] for _, gradients in results]), together, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_in_padding_reaches_nothing(dtype):
    """Rows past the groups hold NaN on the way in, forward and backward."""
    counts, e, D, F, S = torch.tensor([3, 0, 2]), 3, 4, 8, 9
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng, dtype=dtype) for shape in [(e, D, F), (e, D, F), (e, F, D)]]
    x, dy = (torch.randn(S, D, generator=rng, dtype=dtype) for _ in range(2))

    def run(padding: float) -> list[bytes]:
        rows = torch.cat([x[:5], torch.full((4, D), padding, dtype=dtype)]).requires_grad_()
        gate, up, down = (w.clone().requires_grad_() for w in weights)
        y = torch_impl.static.layer.apply_experts(rows, counts, gate, up, down)
        gradients = torch.autograd.grad(
            y, (rows, gate, up, down), torch.cat([dy[:5], torch.full((4, D), padding, dtype=dtype)])
        )
        assert not y[5:].any()
        assert not gradients[0][5:].any()
        return bits([y.detach(), *gradients])

    assert run(0.0) == run(NAN)


# ---- no sync at all


@pytest.mark.parametrize("n_bins", [1, 4])
@pytest.mark.parametrize("priority", ["token", "choice", "score"])
@pytest.mark.parametrize("width", [8, 5], ids=["grouped_mm", "dense"])
def test_static_pytorch_reads_no_value(monkeypatch, n_bins, priority, width):
    monkeypatch.setattr(OnDevice, "reads", [])
    monkeypatch.setattr(checks, "check_expert_ids", lambda *_: None)  # reads values on a CPU, and only there
    problem = draw(P=1, T=12, D=width, F=8, E=4, K=2)
    inputs = [on_device(a.float()) for a in (problem.x_PTD[0], problem.router_DE, *problem.weights)]
    capacity = grouping.Capacity(n_bins, 4, priority)
    stages = torch_impl.static.moe_layer(*inputs, router=Router(2), capacity=capacity)  # type: ignore[arg-type]
    assert isinstance(stages.out_TD, OnDevice)
    stages.out_TD.backward(on_device(problem.dout_PTD[0].float()))
    assert all(a.grad is not None for a in inputs)
    assert OnDevice.reads == []
    assert int(stages.dropped) > 0  # which is a read
    assert OnDevice.reads == ["__int__"]


class Garbage(torch.autograd.Function):
    """The first n rows, from whose gradient NaN comes back for the others."""

    @staticmethod
    def forward(ctx, x, n):
        ctx.others = len(x) - n
        return x[:n].clone()

    @staticmethod
    def backward(ctx, dx):  # type: ignore[override]
        return torch.cat([dx, dx.new_full((ctx.others, dx.shape[1]), NAN)]), None


def test_garbage_past_the_groups_reaches_no_gradient(monkeypatch):
    """As `grouped_mm` leaves it, forward and backward."""
    plain, n, rows = torch_impl.static.matmul.grouped_matmul, 5, 8

    def leaving_garbage(x, w, counts):
        y = plain(Garbage.apply(x, n), w, counts)
        return torch.cat([y, y.new_full((rows - n, y.shape[1]), NAN)])

    monkeypatch.setattr(torch_impl.static.matmul, "grouped_matmul", leaving_garbage)
    shapes = (rows, 4), (2, 4, 6), (2, 4, 6), (2, 6, 4), (2, 6), (2, 6), (2, 4)
    x, gate, up, down, *biases = leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    counts, biases = torch.tensor([2, 3]), torch_impl.static.Biases(*biases)
    y = torch_impl.static.experts.apply_experts(x, counts, gate, up, down, biases=biases)
    assert y[n:].eq(0).all()
    assert all(a.isfinite().all() for a in torch.autograd.grad(y, leaves, torch.randn_like(y)))


# ---- dynamic JAX: its collective needs GPUs, so here it is replaced by what its documentation says


@pytest.fixture
def emulated(monkeypatch):
    """The collective by its documentation, on any device."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(exchange, "check_ragged_exchange", lambda _: None)


def dynamic_layer(x, router, weights, dout, ids, *, top_k, axis_name):
    def layer(x, router, weights):
        routing = jax_impl.route(x, router, jax_impl.Router(top_k), expert_id_TK=ids)
        stages = jax_impl.dynamic.moe_layer(
            x, router, *weights, router=jax_impl.Router(top_k), routing=routing, axis_name=axis_name
        )
        return stages.out_TD, stages

    _, vjp, stages = jax.vjp(layer, x, router, weights, has_aux=True)
    return stages, vjp(dout)


def dynamic_arguments(problem):
    P = problem.x_PTD.shape[0]
    weights = tuple(w.reshape(P, -1, *w.shape[1:]) for w in problem.weights)
    router = problem.router_DE.expand(P, -1, -1)
    return to_jax([problem.x_PTD, router, weights, problem.dout_PTD, problem.expert_id_PTK], "float32")


def test_dynamic_jax_over_ranks_is_the_dense_layer(emulated):
    run = over_ranks(partial(dynamic_layer, top_k=3, axis_name=AXIS))
    stages, (dx, drouter, dweights) = jax.device_get(run(*dynamic_arguments(STANDARD)))
    x, dout, ids = STANDARD.x_PTD, STANDARD.dout_PTD, STANDARD.expert_id_PTK
    dense_of = partial(dense, router_DE=STANDARD.router_DE, weights=STANDARD.weights, how=STANDARD.how, dtype="float32")
    for p in range(2):
        want = dense_of(x[p], dout_TD=dout[p], expert_id_TK=ids[p])
        close(stages.out_TD[p], want, "out")
        close(dx[p], want, "x")
        close(drouter[p], want, "router")
    together = dense_of(x.flatten(0, 1), dout_TD=dout.flatten(0, 1), expert_id_TK=ids.flatten(0, 1))
    for got, name in zip(dweights, WEIGHTS, strict=True):
        close(got.reshape(together.gradients[name].shape), together, name)


DYNAMIC_PRESETS = [
    "zipf",
    "idle-rank",
    "p1",
    "t0",
    "bfloat16",
    "uneven",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("stay-home", "k-all", "t1", "pydoc")),
]


@pytest.mark.parametrize("name", DYNAMIC_PRESETS)
def test_dynamic_jax_passes_the_parity_suite(emulated, name):
    """Every comparison that `check` makes, in this process; what it leaves out is the collective itself."""
    problem = draw_case(PRESETS[name])
    jax_stages.programs.cache_clear()
    trace = jax_stages.run(problem, BACKENDS["jax-dynamic"], "shard_map", lambda stage: None)
    jax_stages.programs.cache_clear()
    checks = list(compare(problem, [trace]))
    assert len(checks) > 50
    assert [check for check in checks if not check.ok] == []


def test_no_ids_overflow_the_buffer(emulated):
    """Ids that repeat in a token, or are none, pass a traced function's checks: they are sent nowhere."""
    P, T, E, K = 2, 3, 4, 3
    ids = np.array([[[0, 0, 0], [1, 1, 0], [0, 1, 0]], [[1, 0, 1], [4, -1, 1], [0, 0, 1]]])
    x = np.random.default_rng(0).integers(-9, 10, (P, T, 4)).astype(np.float32)  # whose sums are exact

    def send(x, ids):
        grouped = jax_impl.dynamic.grouping.group_by_expert(x, ids, jnp.zeros(E, int))
        counts, splits = exchange.exchange_counts(grouped.kept_E, AXIS)
        received = exchange.send_tokens(grouped.x_ND, splits, P * T * min(K, E // P), AXIS)
        ends = splits.received_at_P + splits.send_P
        back = exchange.return_tokens(received, splits, T * K, AXIS)
        out = jax_impl.dynamic.grouping.combine(back, jnp.ones((T, K)), *grouped[1:3])
        return received, ends, counts, out, grouped.slot_TK

    received, ends, counts, out, slot = over_ranks(send)(x, ids)
    assert ends.max() <= received.shape[1] == P * T * 2
    expected = np.array([len({g for g in token if 0 <= g < E}) for token in ids.reshape(-1, K)]).reshape(P, T)
    assert counts.sum() == expected.sum()
    assert (slot < T * K).sum(axis=2).tolist() == expected.tolist()
    np.testing.assert_array_equal(out, x * expected[..., None])


@pytest.mark.parametrize("size", [7, 5, 4])
def test_sizes_past_a_buffer_are_cut(emulated, monkeypatch, size):
    """A buffer that is too small, which the layer never asks for: what fits arrives, and no size reaches past it."""
    asked = []

    def record(x, output, starts, sizes, places, received, **axis):
        asked.append((x.shape[0], output.shape[0]))
        bad = (starts + sizes > x.shape[0]) | (places + sizes > output.shape[0]) | (sizes < 0) | (received < 0)
        bad_here = received.sum() > output.shape[0]
        return ragged_all_to_all(x, output, starts, sizes, places, received, **axis) / ~(bad.any() | bad_here)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", record)
    counts = np.array([[3, 2, 1, 0], [4, 1, 0, 1]])
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)

    def there_and_back(x, counts):
        _, splits = exchange.exchange_counts(counts, AXIS)
        received = exchange.send_tokens(x, splits, size, AXIS)
        return received, exchange.return_tokens(received, splits, 6, AXIS)

    received, back = over_ranks(there_and_back)(x, counts)
    assert asked == [(6, size), (size, 6)]
    np.testing.assert_array_equal(received[0], np.concatenate([x[0, :5], x[1, :5]])[:size])
    x[0, size:5] = x[1, max(size - 5, 0) : 5] = 0
    np.testing.assert_array_equal(back, x)


def test_dynamic_jax_says_where_it_does_not_run(monkeypatch):
    arguments = dynamic_arguments(STANDARD)
    with pytest.raises(
        ValueError, match="ragged_all_to_all is not implemented on XLA:CPU: run the dynamic layer on GPU"
    ):
        over_ranks(partial(dynamic_layer, top_k=3, axis_name=AXIS))(*arguments)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(
        ValueError, match="'ranks' is not an axis of shard_map here, and ragged_all_to_all has no vmap rule"
    ):
        over_ranks(partial(dynamic_layer, top_k=3, axis_name=AXIS), "vmap")(*arguments)


def test_dynamic_jax_is_lowered_for_gpus_with_its_collective(monkeypatch):
    """Two exchanges, and their backward, as GPUs would be given them; on what runs there, tests marked gpu."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jax_impl.kernels.use_kernels", lambda x: False)
    arguments = dynamic_arguments(STANDARD)
    traced = over_ranks(partial(dynamic_layer, top_k=3, axis_name=AXIS)).trace(*arguments)  # type: ignore[attr-defined]
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@ragged_all_to_all") == 4


def test_dynamic_jax_beside_a_second_axis(monkeypatch):
    """Experts over one axis of a mesh, data over both: it is traced with every array on the axes it is on."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    trace_over_data_and_experts(
        lambda *a: dynamic.moe_layer(*a, router=jax_impl.Router(2), axis_name="experts").out_TD, "float32"
    )


def test_one_rank_needs_no_collective():
    problem = draw(P=1, T=6, D=4, F=8, E=8, K=3)
    arguments = [jax.tree.map(lambda a: a[0], a) for a in dynamic_arguments(problem)]
    stages, _ = jax.jit(partial(dynamic_layer, top_k=3, axis_name=None))(*arguments)
    want = dense(problem.x_PTD[0], problem.router_DE, problem.weights, problem.dout_PTD[0], problem.how,
                 problem.expert_id_PTK[0], dtype="float32")  # fmt: skip
    close(stages.out_TD, want, "out")
