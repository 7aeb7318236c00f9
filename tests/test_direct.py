"""Rows straight to their places: the bits of the readable corner, places by hand, and what buffers are for."""

import re

import numpy as np
import pytest
import torch
from direct_ranks import (
    Inputs,
    both_corners,
    buffers_for,
    different_offsets,
    different_sizes,
    put,
    put_once,
    routing_of,
    step,
    with_any_ids,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import WEIGHTS, bits, close, dense, draw
from test_one_sync import OnDevice, on_device
from torch.utils.checkpoint import checkpoint
from torch_ranks import TorchRanks

from parity.cases.presets import PRESETS
from parity.judge.engine import run_cases
from parity.run.backend import Setting
from parity.run.ours import BACKENDS
from torch_impl import Router, Routing, checks, direct
from torch_impl.direct import rows
from torch_impl.direct.exchange import sends_once
from torch_impl.direct.grouping import group_by_expert
from torch_impl.direct.rows import expert_major_rows, put_here, put_rows
from torch_impl.routing import count_per_expert
from torch_impl.static.rows import sum_rows

NAN = float("nan")
CPU = torch.device("cpu")


def inputs_of(problem, dtype=torch.bfloat16, tokens=None):
    P, T, _ = problem.x_PTD.shape
    return [Inputs(problem, rank, dtype, T if tokens is None else tokens[rank]) for rank in range(P)]


# ---- the readable corner's bits
#
# In bfloat16, in which both multiply an expert's rows by themselves on a CPU. In float32 they are made to: this corner
# multiplies all rows with each expert's weights, and how many rows there are changes a product's last bits.

IDLE = [[0, 1, 2]] * 24  # all choices are of the first rank's experts


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("what", ["drawn", "idle", "uneven", "two choices", "few experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_readable_corner_s_bits(torch_ranks: TorchRanks, P, what, dtype):
    K = 2 if what == "two choices" else 3
    assert sends_once(P, K) == (P > 1 and K == 3)
    E = 8 if what == "few experts" else 12  # two on a rank of four, and three choices
    problem = draw(P=P, T=24, D=32, F=32, E=E, K=K, renormalize=True)
    problem = problem.with_ids(IDLE) if what == "idle" else problem
    inputs = inputs_of(problem, dtype, [24, 0, 7, 1][:P] if what == "uneven" else None)
    for readable, *steps in torch_ranks(both_corners, inputs, [2] * P):
        assert readable[0].isfinite().all()
        for found in steps:
            assert bits(found) == bits(readable)


def test_a_sum_in_another_order_would_be_seen(monkeypatch):
    (inputs,) = inputs_of(draw(P=1, T=24, D=32, F=32, E=12, K=3), torch.float32)
    monkeypatch.setattr("torch_impl.direct.exchange.sum_rows", lambda rows, slot: sum_rows(rows, slot.flip(1)))
    readable, found = both_corners(inputs, 1, None)
    same = [a == b for a, b in zip(bits(readable), bits(found), strict=True)]
    assert same == [True, False, *[True] * 5]  # of out and six gradients, that of x alone


# ---- ids that are none


@pytest.mark.parametrize("P", [1, 2])
def test_ids_that_are_none_are_dropped_and_counted(torch_ranks: TorchRanks, P):
    """The dense layer with score * keep. On a CPU such ids are refused, unless nobody looks."""
    problem = draw(P=P, T=6, D=4, F=8, E=8, K=3)
    ids = problem.expert_id_PTK.clone()
    ids[:, 0, 1], ids[0, 2, 0], ids[-1, 3, 2], ids[-1, 5] = 8, -1, 2**40, torch.tensor([-7, 99, 8])
    keep = (ids >= 0) & (ids < 8)
    inputs = inputs_of(problem._replace(expert_id_PTK=ids), torch.float64)
    for one in inputs:  # so that there is a slot past this step's, which nobody fills
        one.sizes = (7, *one.sizes[1:])
    results = torch_ranks(with_any_ids, inputs)
    clamped = ids.clamp(0, 7)
    for p, (stages, gradients) in enumerate(results):
        assert int(stages.dropped) == int((~keep[p]).sum()) > 0
        assert (stages.grouped.slot_TK < 18).equal(keep[p])
        want = dense(problem.x_PTD[p], problem.router_DE, problem.weights, problem.dout_PTD[p], problem.how, clamped[p],
                     keep[p])  # fmt: skip
        close(stages.out_TD, want, "out")
        for name in ("x", "router", "score"):
            close(gradients[name], want, name)
    x, dout = (a.flatten(0, 1) for a in (problem.x_PTD, problem.dout_PTD))
    together = dense(
        x, problem.router_DE, problem.weights, dout, problem.how, clamped.flatten(0, 1), keep.flatten(0, 1)
    )
    for name in WEIGHTS:
        close(torch.cat([gradients[name] for _, gradients in results]), together, name)


def test_an_id_that_repeats_in_its_token_is_sent_once():
    """Or more rows could arrive than the buffers hold: with one expert on a rank, at most one of a token's choices."""
    ids = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 2, 5]])
    grouped = group_by_expert(ids, count_per_expert(ids, 2))
    assert grouped.kept_E.tolist() == [2, 2]
    assert grouped.slot_TK.tolist() == [[0, 9, 9], [2, 1, 9], [3, 9, 9]]


# ---- where rows go


def test_places_on_paper():
    """Two ranks of two experts, up to 8 rows to arrive and 4 slots: place, and back.

    slots   p0: e0 e0 e1 e3 | p1: e1 e2 e3 __        rows   rank 0: p0 p0 | p0 p1        rank 1: p1 | p0 p1
    """
    counts_PE = torch.tensor([[2, 1, 0, 1], [0, 1, 1, 1]])
    places = [expert_major_rows(counts_PE, rank, 4, 4, 8) for rank in range(2)]
    assert [place.tolist() for place, _ in places] == [[0, 1, 2, 9], [3, 8, 10, -1]]
    assert [origin.tolist() for _, origin in places] == [[0, 1, 2, 4, *[-1] * 4], [5, 3, 6, *[-1] * 5]]


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans()
)
def test_places_are_those_of_a_sort(P, e, T, K, seed, uneven):
    """Every row, by hand: sorted by (owner, expert, sender, slot), and numbered on its owner."""
    E, rng = P * e, np.random.default_rng(seed)
    tokens = rng.integers(0, T + 1, P) if uneven else np.full(P, T)
    ids = [torch.from_numpy(rng.integers(-1, E + 1, (t, K))) for t in tokens]
    of_rank = [group_by_expert(a, count_per_expert(a, E)) for a in ids]
    counts_PE, n_slots, n_rows = torch.stack([g.kept_E for g in of_rank]), T * K, P * T * min(K, e)
    rows = []
    for p, a in enumerate(ids):
        seen = [[int(g) for k, g in enumerate(token) if 0 <= g < E and g not in token[:k]] for token in a]
        rows += [(g // e, g, p, slot) for slot, g in enumerate(sorted(g for token in seen for g in token))]
    place, origin = [[-1] * (int(t) * K) for t in tokens], [[-1] * n_rows for _ in range(P)]
    filled = [0] * P
    for owner, _, p, slot in sorted(rows):
        place[p][slot] = owner * n_rows + filled[owner]
        origin[owner][filled[owner]] = p * n_slots + slot
        filled[owner] += 1
    for p in range(P):
        place_N, origin_R = expert_major_rows(counts_PE, p, ids[p].numel(), n_slots, n_rows)
        assert place_N.tolist() == place[p]
        assert origin_R.tolist() == origin[p]


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_put_where_they_belong(torch_ranks: TorchRanks, P, dtype):
    M, K, n_rows, rng = 5, 2, 12, torch.Generator().manual_seed(P)
    place_PMK = torch.randperm(P * n_rows, generator=rng)[: P * M * K].reshape(P, M, K)
    place_PMK[torch.rand(place_PMK.shape, generator=rng) < 0.3] = -1
    x_PMD = torch.randn(P, M, 3, generator=rng).to(dtype)
    expected = torch.full((P * n_rows, 3), NAN, dtype=dtype)
    for row, place in zip(x_PMD.flatten(0, 1), place_PMK.flatten(0, 1), strict=True):
        expected[place[place >= 0]] = row
    found = torch_ranks(put, list(x_PMD), list(place_PMK), [n_rows] * P, [None] * P)
    assert bits(torch.cat(found)) == bits(expected)


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_go_once_come_to_the_same_places(torch_ranks: TorchRanks, P, weighted, dtype):
    """Ranks have 5, 4, 3 and 2 tokens, of which some go nowhere and some to one rank alone."""
    K, n_rows, rng = 3, 40, torch.Generator().manual_seed(P)
    place_PTK = torch.randperm(P * n_rows, generator=rng)[: P * 5 * K].reshape(P, 5, K)
    place_PTK[torch.rand(place_PTK.shape, generator=rng) < 0.4] = -1
    place_PTK[:, 1] = -1
    tokens = [(torch.randn(5 - p, 3, generator=rng).to(dtype), place_PTK[p, : 5 - p]) for p in range(P)]
    score = [torch.rand(5 - p, K, generator=rng) if weighted else None for p in range(P)]
    x, place = (list(a) for a in zip(*tokens, strict=True))
    straight = torch_ranks(put, x, place, [n_rows] * P, score)
    once = torch_ranks(put_once, x, place, [n_rows] * P, score)
    for p in range(P):
        assert bits(once[p]) == bits(straight[p])
    places, written = torch.cat(place), torch.cat(straight)
    row_TKD = torch.cat(x)[:, None].expand(-1, K, -1)
    if weighted:
        row_TKD = (torch.cat(score)[..., None] * row_TKD.float()).to(dtype)  # type: ignore[arg-type]
    assert bits(written[places[places >= 0]]) == bits(row_TKD[places >= 0])
    assert int(written.isnan().all(dim=1).sum()) == P * n_rows - int((places >= 0).sum())


def test_nothing_is_put():
    own = torch.ones(4, 2)
    put_here(torch.zeros(0, 2), torch.zeros(0, 3, dtype=torch.int64), own)
    put_here(torch.zeros(2, 2), torch.full((2, 1), -1), own)
    assert own.eq(1).all()


# ---- buffers


def test_buffers_are_for_one_step_at_a_time():
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    mine, other = buffers_for(inputs), buffers_for(inputs)

    def forward(buffers):
        leaf = inputs["x"].detach().requires_grad_()
        weights = (inputs[name] for name in WEIGHTS)
        return leaf, direct.moe_layer(leaf, inputs["router"], *weights, router=Router(2), buffers=buffers).out_TD  # type: ignore[arg-type]

    (x, first), _ = forward(mine), forward(other)
    (expected,) = torch.autograd.grad(first, x, inputs.dout, retain_graph=True)
    forward(mine)
    forward(mine)
    said = "^2 forward passes have used these buffers since .* overwrote the rows .* make another set of buffers"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(first, x, inputs.dout)
    x, again = forward(mine)
    assert bits(torch.autograd.grad(again, x, inputs.dout)) == bits((expected,))


def test_scores_alone_need_the_rows_too():
    """Where nothing that is sent has a gradient, what returned is still read in backward."""
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    buffers, routing = buffers_for(inputs), routing_of(inputs)
    score = routing.score_TK.detach().requires_grad_()
    routing = Routing(score, *routing[1:])

    def forward():
        return direct.moe_layer(*inputs.values(), router=Router(2), routing=routing, buffers=buffers).out_TD

    first = forward()
    forward()
    with pytest.raises(RuntimeError, match="1 forward passes have used these buffers"):
        torch.autograd.grad(first, score, inputs.dout)


def test_rows_move_outside_of_autograd(monkeypatch):
    """Where a gradient could be asked for, no kernel serves."""
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    differentiated = []

    def put_here(*arguments):
        differentiated.append(torch.is_grad_enabled())
        return plain(*arguments)

    plain = rows.put_here
    monkeypatch.setattr(rows, "put_here", put_here)
    step(direct.moe_layer, inputs, buffers=buffers_for(inputs))
    assert differentiated[1:] == [False] * 4  # all but the counts, which are integers


def test_rows_that_arrived_are_guarded_too(monkeypatch):
    """A loss on what the experts return reads them in backward. The next forward fails before its rows return."""
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    buffers = buffers_for(inputs)
    leaves = {name: a.detach().requires_grad_() for name, a in inputs.items()}
    stages = direct.moe_layer(*leaves.values(), router=Router(2), buffers=buffers)  # type: ignore[arg-type]
    monkeypatch.setattr("torch_impl.direct.layer.apply_experts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(direct.moe_layer, inputs, buffers=buffers)
    for loss in (stages.y_RD, stages.out_TD):
        with pytest.raises(RuntimeError, match=r"^1 forward passes have used these buffers"):
            torch.autograd.grad(loss, [leaves["x"], leaves["w_down"]], torch.ones_like(loss), retain_graph=True)


def test_layers_that_are_recomputed_share_a_set():
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    shared, own = buffers_for(inputs), [buffers_for(inputs) for _ in range(2)]

    def layer(x, buffers):
        weights = (inputs[name] for name in WEIGHTS)
        return direct.moe_layer(x, inputs["router"], *weights, router=Router(2), buffers=buffers).out_TD  # type: ignore[arg-type]

    def gradient(run):
        x = inputs["x"].detach().requires_grad_()
        return torch.autograd.grad(run(x), x, inputs.dout)

    def recomputed(x):
        for _ in range(2):
            x = checkpoint(layer, x, shared, use_reentrant=False)
        return x

    assert bits(gradient(recomputed)) == bits(gradient(lambda x: layer(layer(x, own[0]), own[1])))


def test_a_gradient_of_a_gradient_is_refused():
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    x = inputs["x"].requires_grad_()
    out = direct.moe_layer(*inputs.values(), router=Router(2), buffers=buffers_for(inputs)).out_TD
    with pytest.raises(RuntimeError, match="leave no graph, so this gradient cannot be differentiated again"):
        torch.autograd.grad(out, x, inputs.dout, create_graph=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            [(5, 8, "float32"), (6, 8, "float32")],
            "'tokens': 5.* on rank 0 and for .*'tokens': 6.* on rank 1: .* the most",
        ),
        ([(5, 8, "float32"), (5, 8, "bfloat16")], "float32.* on rank 0 and for .*bfloat16.* on rank 1"),
        ([(5, 8, "float32"), (5, 9, "float32")], "'experts': 8.* on rank 0 and for .*'experts': 9.* on rank 1"),
        ([(5, 9, "float32")] * 2, "9 experts do not divide over 2 ranks"),
        ([(-1, 8, "float32")] * 2, "tokens at least 0"),
    ],
)
def test_ranks_that_ask_for_wrong_buffers_are_all_told(torch_ranks: TorchRanks, asked, said):
    tokens, experts, dtypes = (list(a) for a in zip(*asked, strict=True))
    for told in torch_ranks(different_sizes, tokens, experts, [getattr(torch, dtype) for dtype in dtypes]):
        assert re.search(said, told)


def test_buffers_that_lie_elsewhere_on_another_rank_are_told(torch_ranks: TorchRanks):
    for said in torch_ranks(different_offsets, [0, 512]):
        assert "a buffer lies at offsets [0, 512] in the memory of the ranks" in said
    assert torch_ranks(different_offsets, [512, 512]) == ["", ""]


@pytest.mark.parametrize(
    ("sizes", "dtype", "said"),
    [
        ((5, 2, 4, 8), "bfloat16", "room for 5 tokens of width 8, 2 of 4 experts each"),
        ((6, 1, 4, 8), "bfloat16", "room for 6 tokens of width 8, 1 of 4 experts"),
        ((6, 2, 8, 8), "bfloat16", "2 of 8 experts each, .* here are 6 tokens of width 8, 2 of 4 experts"),
        ((6, 2, 4, 16), "bfloat16", "of width 16"),
        ((6, 2, 4, 8), "float32", "the buffers are torch.float32 on cpu and x is torch.bfloat16 on cpu"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(sizes, dtype, said):
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    with pytest.raises(ValueError, match=said):
        step(direct.moe_layer, inputs, buffers=direct.make_buffers(*sizes, getattr(torch, dtype), CPU))  # type: ignore[call-arg]


@pytest.mark.parametrize("rows", [torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(2, 5)])
def test_rows_unlike_the_buffer_s_are_refused(rows):
    buffers = direct.make_buffers(6, 2, 4, 4, torch.float32, CPU)
    with pytest.raises(ValueError, match="what experts return must be like what they are given"):
        put_rows(rows, torch.zeros(2, 1, dtype=torch.int64), buffers.placed_RD)


def test_more_room_than_a_step_takes_is_no_matter():
    (inputs,) = inputs_of(draw(P=1, T=6, D=8, F=8, E=4, K=2))
    tight = step(direct.moe_layer, inputs, buffers=buffers_for(inputs))[1]
    wide = step(direct.moe_layer, inputs, buffers=direct.make_buffers(9, 2, 4, 8, torch.bfloat16, CPU))[1]
    assert bits(tight) == bits(wide)


@pytest.mark.parametrize("sizes", [(-1, 2, 4, 8), (6, 0, 4, 8), (6, 2, 4, 0)])
def test_buffers_of_no_size_are_refused(sizes):
    with pytest.raises(ValueError, match="every size must be at least 1, and tokens at least 0"):
        direct.make_buffers(*sizes, torch.float32, CPU)  # type: ignore[call-arg]


# ---- no sync at all


@pytest.mark.parametrize("width", [8, 5], ids=["grouped_mm", "dense"])
def test_no_value_is_read(monkeypatch, width):
    monkeypatch.setattr(OnDevice, "reads", [])
    monkeypatch.setattr(checks, "check_expert_ids", lambda *_: None)  # reads values on a CPU, and only there
    problem = draw(P=1, T=12, D=width, F=8, E=4, K=2)
    inputs = [on_device(a.float()) for a in (problem.x_PTD[0], problem.router_DE, *problem.weights)]
    buffers = direct.make_buffers(12, 2, 4, width, torch.float32, CPU)
    stages = direct.moe_layer(*inputs, router=Router(2), buffers=buffers)  # type: ignore[arg-type]
    assert isinstance(stages.out_TD, OnDevice)
    stages.out_TD.backward(on_device(problem.dout_PTD[0].float()))
    assert all(a.grad is not None for a in inputs)
    assert OnDevice.reads == []
    assert int(stages.dropped) == 0  # which is a read
    assert OnDevice.reads == ["__int__"]


# ---- the check


@pytest.mark.usefixtures("warm")
def test_check_of_this_corner():
    names = ["zipf", "idle-rank", "uneven", "in-flight", "two-groups", "recomputed", "t0", "compiled"]
    report = run_cases(
        [PRESETS[name] for name in names], [BACKENDS["torch-direct"], BACKENDS["torch"]], Setting(), show_progress=False
    )
    assert report is not None
    assert report.footer.verdict == "match"
