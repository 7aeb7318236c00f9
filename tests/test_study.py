"""The study's figures against the plain oracle and against real runs of the implementations."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import gamma
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.presets import PRESETS
from parity.oracle import reference
from parity.oracle.problem import draw, parameters_in_float64
from parity.run import jax_stages
from parity.run.ours import BACKENDS
from parity.study import sweep as study
from parity.study.routing import PER, PRIORITIES, Routing, places, recorded_routing, zipf_routing
from parity.study.sweep import measure, sweep

JAX = next(b for b in BACKENDS.values() if (b.framework, b.layout) == ("jax", "static"))
# As much of it as is looked at here: the whole layer, once.
STATIC_JAX = msgspec.structs.replace(JAX, provides=tuple(name for name in JAX.provides if name.startswith("e2e/")))


def routing_of(problem) -> Routing:
    """A problem's own routing, one step."""
    return Routing(problem.case.name, problem.case, problem.expert_id[None], problem.score[None])


@st.composite
def routed(draw_from: st.DrawFn) -> Routing:
    P, e, T, n = (draw_from(st.integers(1, most)) for most in (3, 3, 6, 3))
    K = draw_from(st.integers(1, min(P * e, 3)))
    rng = np.random.default_rng(draw_from(st.integers(0, 999)))
    ids = rng.permuted(np.tile(np.arange(P * e, dtype=np.int32), (n, P, T, 1)), axis=3)[..., :K]
    score = rng.integers(0, 3, ids.shape).astype(np.float32)  # with ties
    return Routing("drawn", Case(ranks=P, tokens=T, experts=P * e, top_k=K), ids, score)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("priority", PRIORITIES)
@given(routed(), st.sampled_from(["1/4", "1/2", "1", "5/3"]))
def test_who_is_dropped_is_whom_the_oracle_drops(per, priority, routing, factor):
    case = replace(routing.case, capacity_factor=factor, capacity_per=per, priority=priority)
    keep = places(routing, per, priority) < case.capacity
    expected = [
        reference.keep_within_capacity(case, ids, score)
        for ids, score in zip(routing.expert_id, routing.score, strict=True)
    ]
    np.testing.assert_array_equal(keep, expected)
    found = measure(routing, factor, per, priority)
    assert found.dropped == np.mean(~np.array(expected))
    assert found.capacity == case.capacity


@given(routed())
def test_the_factor_needed_is_the_least_at_which_nothing_drops(routing):
    for per in PER:
        one = routing._replace(expert_id=routing.expert_id[:1], score=routing.score[:1])
        needed = measure(one, "1", per, "token").needed
        assert needed.median == needed.worst
        exact = str(np.round(needed.worst * 10**6) / 10**6)
        bins = one.case.ranks if per == "rank" else one.case.experts
        fullest = round(needed.worst * one.case.tokens * one.case.top_k / bins)
        enough = f"{fullest * bins}/{one.case.tokens * one.case.top_k}"
        assert measure(one, enough, per, "token").dropped == 0, exact
        if fullest > 1:
            less = f"{(fullest - 1) * bins}/{one.case.tokens * one.case.top_k}"
            assert measure(one, less, per, "token").dropped > 0


# ---- Against a run of JAX: every figure of one step

RUN = ["drop-rank-token", "drop-rank-choice", "drop-rank-score", "drop-expert-score", "pydoc", "expert-bins", "p1"]


@pytest.fixture(scope="module", params=RUN)
def run(request):
    """A preset, what the study says of it, and what JAX made of it."""
    problem = draw(PRESETS[request.param])
    case = problem.case
    found = measure(routing_of(problem), case.capacity_factor, case.capacity_per, case.priority)
    return problem, found, jax_stages.run(problem, STATIC_JAX, "vmap", lambda _: None)


def test_rows_dropped_are_those_of_a_run(run):
    problem, found, trace = run
    case, N = problem.case, problem.case.tokens * problem.case.top_k
    dropped_PE = np.array(trace.arrays["e2e/group_by_expert/dropped"])
    chosen_E = np.bincount(problem.expert_id.reshape(-1), minlength=case.experts)
    assert found.dropped == dropped_PE.sum() / (case.ranks * N)
    np.testing.assert_array_equal(found.dropped_by_rank, dropped_PE.sum(axis=1) / N)
    np.testing.assert_array_equal(found.dropped_by_expert, dropped_PE.sum(axis=0) / np.maximum(chosen_E, 1))
    # A row of tokens that is all zero is padding; those kept say, by elimination, which position was dropped.
    kept_T = np.zeros(case.tokens)
    for rank, x_rows in enumerate(trace.arrays["e2e/group_by_expert/x"]):
        tokens = problem.x[rank].astype(np.float64)
        for row in x_rows.astype(np.float64):
            if row.any():
                kept_T[np.abs(tokens - row).max(axis=1).argmin()] += 1
    tenth = np.arange(case.tokens) * 10 // case.tokens
    of_tenth = np.bincount(tenth, minlength=10)
    kept = np.bincount(tenth, kept_T, minlength=10)
    expected = np.where(of_tenth, 1 - kept / np.maximum(of_tenth * case.ranks * case.top_k, 1), 0)
    np.testing.assert_allclose(found.dropped_by_position, expected, rtol=0, atol=gamma(4, "float64"))  # 1 - kept share


def test_padding_bytes_and_memory_are_those_of_a_run(run):
    problem, found, trace = run
    case = problem.case
    names = ("group_by_expert/x", "send_tokens/x", "to_expert_major/x", "apply_experts/y", "to_rank_major/y",
             "return_tokens/y")  # fmt: skip
    arrays = [trace.arrays[f"e2e/{name}"] for name in names]
    assert found.memory == max(sum(a[rank].nbytes for a in arrays) for rank in range(case.ranks))
    real = np.array([[row.any() for row in x] for x in trace.arrays["e2e/group_by_expert/x"]])
    assert found.padded == pytest.approx(1 - real.mean(), abs=gamma(4, "float64"))
    # Bins that go to another rank, and of those the rows that hold something.
    to_rank = np.arange(case.bins) // (case.bins // case.ranks)
    leaves = np.repeat(to_rank[None] != np.arange(case.ranks)[:, None], case.capacity, axis=1)
    row = arrays[0][0][0].nbytes
    assert found.useful_bytes == 2 * (real & leaves).sum() * row
    assert found.wasted_bytes == 2 * (~real & leaves).sum() * row


@pytest.mark.parametrize("name", ["drop-rank-score", "drop-expert-token", "pydoc"])
def test_errors_are_those_of_a_run(name):
    """Output and gradients of a run with drops, against a run of the same without."""
    with_drops = draw(PRESETS[name])
    case = with_drops.case
    dropless = draw(replace(case, capacity_factor=None))
    runs = [jax_stages.run(problem, STATIC_JAX, "vmap", lambda _: None).arrays for problem in (dropless, with_drops)]

    def relative(*names: str) -> float:
        a, b = (np.concatenate([np.stack(r[f"e2e/{n}"]).reshape(-1) for n in names]).astype(float) for r in runs)
        return float(np.linalg.norm(a - b) / np.linalg.norm(a))

    inputs = study.Inputs(
        with_drops.x.astype(float), parameters_in_float64(with_drops.parameters), with_drops.dout.astype(float),
        with_drops.expert_id,
    )  # fmt: skip
    everything = np.ones(with_drops.keep.shape, bool)
    found = study.errors(*(study.evaluate(case, inputs, keep) for keep in (everything, with_drops.keep)))
    weights = [f"apply_experts/dw_{n}" for n in ("gate", "up", "down")]
    # Of float32 runs, whose numbers are off by u = 6e-8 of the norm: of a hundredth of it at least, by 100 times that.
    assert min(found) > 0.01
    wanted = (relative("combine/out"), relative("route/dx"), relative(*weights))
    assert found == pytest.approx(wanted, rel=gamma(1, "float32") / 0.01)


def test_dynamic_bytes_and_memory_are_those_of_a_run(torch_ranks):
    """Rows that PyTorch's dynamic exchange sends to other ranks, and the rows its busiest rank holds."""
    import torch
    from problems import STANDARD
    from torch_ranks import layer_arguments, run_layer

    P, T, K = STANDARD.expert_id_PTK.shape
    arguments = [layer_arguments(STANDARD, rank, P, torch.float32) for rank in range(P)]
    results = torch_ranks(run_layer, *map(list, zip(*arguments, strict=True)))
    case = Case(ranks=P, tokens=T, experts=8, top_k=K, width=STANDARD.x_PTD.shape[2])
    ids = STANDARD.expert_id_PTK.numpy()[None]
    found = measure(Routing("standard", case, ids, np.ones(ids.shape)), "1", "rank", "token")
    row, sent, held = case.width * 4, 0, []
    for rank, (stages, _) in enumerate(results):
        sent += sum(stages.splits.send_P) - stages.splits.send_P[rank]
        rows = (stages.grouped.x_ND, stages.received_RD, stages.expert_major.x_RD, stages.y_RD, stages.rank_major_RD,
                stages.returned_ND)  # fmt: skip
        held.append(sum(a.numel() * a.element_size() for a in rows))
    assert found.dynamic_bytes == 2 * sent * row
    assert found.dynamic_memory == max(held)


# ---- Routings, and the sweep


def test_first_choices_follow_zipfs_law():
    case = Case(ranks=4, tokens=2000, experts=8, top_k=2)
    for skew in (0.0, 1.0):
        first = zipf_routing(case, skew, 10).expert_id[..., 0]
        share = np.sort(np.bincount(first.reshape(-1), minlength=8) / first.size)[::-1]
        law = np.arange(1, 9) ** -skew
        np.testing.assert_allclose(share, law / law.sum(), rtol=0, atol=0.006)  # 4 standard errors of 80,000 draws


def test_a_recording_is_cut_in_order():
    case = Case(name="cut", ranks=2, tokens=40, recording="pydoc")
    routing = recorded_routing(case, 100)
    whole = recorded_routing(replace(case, ranks=1, tokens=512), 1)
    assert routing.expert_id.shape == (6, 2, 40, 2)  # 512 tokens are 6 steps of 80
    np.testing.assert_array_equal(routing.expert_id.reshape(-1, 2), whole.expert_id.reshape(-1, 2)[:480])
    assert (routing.score > 0).all()


def test_experts_are_placed_where_there_is_room():
    """The heaviest first, to the least loaded rank: by hand, also where that rank is full."""
    assert study.placed_evenly(np.array([5, 4, 3, 1, 1, 0]), 3) == [[0, 5], [1, 4], [2, 3]]
    assert study.placed_evenly(np.array([0, 1, 10, 1, 0, 1]), 2) == [[2, 0, 4], [1, 3, 5]]


def test_what_another_placement_needs_is_what_it_needs_with_its_experts_renumbered():
    routing = recorded_routing(Case(name="cut", ranks=4, tokens=40, recording="pydoc"), 100)
    facts = study.recorded_facts(routing)
    assert (facts.recorded, facts.used) == (512, 480)
    assert sorted(np.concatenate(facts.placed)) == list(range(16))
    renumbered = np.argsort(np.concatenate(facts.placed))[routing.expert_id]
    moved = measure(routing._replace(expert_id=renumbered), "1", "rank", "token")
    assert facts.needed_placed == moved.needed
    received_P = np.bincount(routing.expert_id.reshape(-1) // 4, minlength=4)
    assert facts.busiest_rank == received_P.argmax()
    assert facts.over_mean == received_P.max() / received_P.mean()
    load = np.bincount(routing.expert_id.reshape(-1), minlength=16)
    assert facts.busiest_experts[0] == 4 * facts.busiest_rank + load.reshape(4, 4)[facts.busiest_rank].argmax()
    assert all(load[g] > load.mean() for g in facts.busiest_experts)


def test_a_sweep_has_every_combination_once_and_more_capacity_never_drops_more():
    case = Case(tokens=16, width=8, hidden=8)
    found = list(sweep(zipf_routing(case, 1.0, 5), ("0.5", "1", "8")))
    assert len({(f.factor, f.per, f.priority) for f in found}) == len(found) == 18
    for per in PER:
        for priority in PRIORITIES:
            half, one, all_of_it = (f for f in found if (f.per, f.priority) == (per, priority))
            assert half.dropped > one.dropped > all_of_it.dropped == 0
            assert (half.out_error or 0) > (one.out_error or 0) > 0 == all_of_it.out_error
            assert half.padded < one.padded < all_of_it.padded


def test_figures_say_which_of_their_inputs_were_drawn(tmp_path):
    """None of a recording that has all of them; and a recording of expert ids alone has no errors."""
    rng = np.random.default_rng(0)
    x, router = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 24), (24, 8)))
    ids = np.argsort(-x @ router, axis=1)[:, :2].astype(np.int32).copy()
    save_file({"expert_id": ids, "x": x, "router": router}, tmp_path / "routed.safetensors")
    save_file({"expert_id": ids}, tmp_path / "ids.safetensors", {"n_experts": "8"})

    def first(recording: str):
        case = study.recorded_case(str(tmp_path / recording) if "." in recording else recording, 2, 16)
        return next(sweep(recorded_routing(case, 1), ("1/2",)))

    assert [first(name).drawn for name in ("pydoc", "routed.safetensors")] == ["", "expert weights"]
    assert next(sweep(zipf_routing(Case(width=8, hidden=8), 0.0, 1), ("1/2",))).drawn == "tokens and weights"
    assert [first(name).out_error is None for name in ("routed.safetensors", "ids.safetensors")] == [False, True]
