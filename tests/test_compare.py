"""The judge on trial: a perfect trace passes; spoiled in one place, it is caught there and the right side blamed."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import bits
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.presets import command
from parity.judge.blame import Blame, blame
from parity.judge.compare import (
    Check,
    Expected,
    MismatchError,
    Where,
    canonical,
    choice_of_experts,
    compare,
    expectations,
)
from parity.oracle.problem import Problem, draw
from parity.oracle.rows import PADDING, Strategy, Table, lay_out, row_tables
from parity.oracle.tolerances import numpy_dtype
from parity.run.trace import STAGES, Trace, load_folder

Array = np.ndarray
Wanted = dict[Strategy, dict[str, Expected]]

# D, F and K all differ; K is 3, so that the order of sums is checked; some assignments drop and some slots are padding.
CASE = Case(ranks=2, tokens=4, width=8, hidden=5, experts=4, top_k=3, capacity_factor="3/4")
PROBLEM = draw(CASE)
WANTED = expectations(PROBLEM)
SIDES: dict[str, Strategy] = {"torch": "dynamic", "jax": "static"}
CHOICE = "isolated/route/expert_id"


TABLES = {backend: row_tables(CASE, PROBLEM.expert_id, PROBLEM.keep, strategy) for backend, strategy in SIDES.items()}


def laid_out(case: Case, want: Expected, values: Array, table: Table) -> list[Array]:
    """What the oracle says, as the ranks' arrays would hold it."""
    if want.kind == "rows":
        return lay_out(values, table[want.order], 0)
    if want.kind == "rank":
        return [np.array(a) for a in values]
    if want.kind == "expert":
        return [np.array(a) for a in np.split(values, case.ranks)]
    return [np.array(values if want.kind == "sum" else 0) for _ in range(case.ranks)]


def perfect(problem: Problem, backend: str, wanted: Wanted) -> Trace:
    """A trace that holds what the oracle says, rounded to the dtype it is stored in."""
    strategy = SIDES[backend]
    table = row_tables(problem.case, problem.expert_id, problem.keep, strategy)
    arrays = {CHOICE: list(problem.expert_id.copy())}
    for name, want in wanted[strategy].items():
        values = want.values.astype(np.int64 if want.dtype == "int" else numpy_dtype(want.dtype))
        arrays[name] = laid_out(problem.case, want, values, table)
    return Trace(problem.case, backend, strategy, {}, arrays=arrays)


@pytest.fixture
def torch_and_jax(monkeypatch) -> dict[str, Trace]:
    """Both sides of the case, perfect; what the oracle expects of them is not worked out again."""
    monkeypatch.setattr("parity.judge.compare.expectations", lambda problem: WANTED)
    return {backend: perfect(PROBLEM, backend, WANTED) for backend in SIDES}


def failures(traces: dict[str, Trace]) -> list[Check]:
    return [check for check in compare(PROBLEM, list(traces.values())) if not check.ok]


def name_of(check: Check) -> str:
    return f"{check.mode}/{check.stage}/{check.value}"


def of_kind(*kinds: str) -> list[tuple[str, str]]:
    return [(backend, name) for backend, s in SIDES.items() for name, want in WANTED[s].items() if want.kind in kinds]


ALL = of_kind("rows", "rank", "expert", "sum", "repeat")
FLOATS = [(backend, name) for backend, name in ALL if WANTED[SIDES[backend]][name].dtype != "int"]


# ---- Perfect traces pass


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, capacity_factor=None),
        replace(CASE, capacity_per="expert", dtype="bfloat16"),
        replace(CASE, top_k=2, dtype="float16", pattern="idle_rank", experts=6),
        replace(CASE, ranks=1, top_k=1, dtype="float64", priority="score"),
        replace(CASE, tokens=1, score_function="sigmoid", renormalize=True, scale=2.5, align=4),
    ],
    ids=lambda case: command(case).removeprefix("python -m parity check "),
)
def test_a_perfect_trace_passes(case):
    problem = draw(case)
    wanted = expectations(problem)
    traces = [perfect(problem, backend, wanted) for backend in SIDES]
    checks = list(compare(problem, traces))
    assert all(check.ok and check.worst < 1 and check.rows for check in checks)
    for trace in traces:
        mine = [check for check in checks if check.left == trace.backend and check.right == "oracle"]
        assert sorted(name_of(check) for check in mine) == sorted(trace.arrays)  # each once, none left out
        assert {check.stage for check in mine if check.mode == "isolated"} == set(STAGES)
    common = {name for name in wanted["dynamic"] if case.capacity_factor is None or "exchange_counts" not in name}
    assert {name_of(check) for check in checks if check.right == "jax"} >= common - {"repeat/exchange_counts/counts"}
    assert blame(checks) is None


def test_what_is_expected():
    ids, keep, P = PROBLEM.expert_id, PROBLEM.keep, range(2)
    wanted = WANTED["dynamic"] | WANTED["static"]
    sent, kept = (np.array([np.bincount(ids[p][which[p]], minlength=4) for p in P]) for which in (keep | True, keep))
    assert not keep.all()
    integers = {
        "isolated/route/counts": np.roll(sent, 1, axis=1),  # of a replay with the next expert for each
        "isolated/group_by_expert/capacity": [5, 5],  # ceil(3/4 * 4*3 / 2)
        "e2e/group_by_expert/dropped": sent - kept,
        "e2e/group_by_expert/dropped_in_all": 12 - keep.sum(axis=(1, 2)),
    }
    for mode in ("isolated", "e2e"):
        for strategy in SIDES.values():
            counts = sent if strategy == "dynamic" else kept
            got = WANTED[strategy][f"{mode}/exchange_counts/counts"].values
            assert got.tolist() == [[counts[p, 2 * q : 2 * q + 2].tolist() for p in P] for q in P]
    for name, values in integers.items():
        np.testing.assert_array_equal(wanted[name].values, values)
    x = np.repeat(PROBLEM.x, 3, axis=1).reshape(24, 8)
    moved = {"/x": x, "/dx": PROBLEM.dx_rows, "/y": PROBLEM.y, "/dy": PROBLEM.dy}
    exact = PROBLEM.exact._asdict() | {"x": x}
    for name, want in wanted.items():
        value = name[name.rindex("/") :]
        if want.kind == "rows" and want.allowed is None:
            np.testing.assert_array_equal(want.values, moved[value].reshape(24, 8))
        elif name.startswith("e2e") and want.dtype != "int":
            np.testing.assert_array_equal(want.values, exact[value[1:]].reshape(want.values.shape))
        elif want.kind != "repeat" and want.dtype != "int" and not name.endswith("order"):
            # fed the oracle's values rounded to float32, a stage makes nearly what it makes within the whole layer
            whole = {"group_by_expert/dx": "dx_experts", "apply_experts/dx": "dx_rows"}
            value = whole.get(name.removeprefix("isolated/"), value[1:])
            expected = replayed()[value] if "/route/" in name else exact[value]
            np.testing.assert_allclose(want.values, expected.reshape(want.values.shape), rtol=1e-4, atol=1e-5)


def replayed() -> dict[str, np.ndarray]:
    """What PyTorch makes in float64 of the router, and of its gradients, with the next expert for each."""
    x, router, dscore = (torch.from_numpy(a.astype(np.float64)) for a in (PROBLEM.x, PROBLEM.router, PROBLEM.dscore))
    leaves = x.requires_grad_(), router.requires_grad_()
    others = (torch.from_numpy(PROBLEM.expert_id).long() + 1) % PROBLEM.case.experts
    assert (PROBLEM.case.score_function, PROBLEM.case.renormalize, PROBLEM.case.scale) == ("softmax", False, 1)
    score = (x @ router).softmax(dim=-1).gather(2, others)
    dx, drouter = torch.autograd.grad(score, leaves, dscore)
    return {"score": score.detach().numpy(), "dx": dx.numpy(), "drouter": drouter.numpy()}


def test_a_trace_survives_the_disk(tmp_path):
    problem = draw(replace(CASE, dtype="bfloat16"))
    trace = replace(perfect(problem, "jax", expectations(problem)), environment={"jax": "0"}, seconds=1.5)
    trace.arrays["e2e/route/many"] = [np.array([rank, np.nan]) for rank in range(11)]  # 10 comes after 9
    trace.save(tmp_path / "folder")
    (again,) = load_folder(tmp_path / "folder")
    assert (again.case, again.backend, again.strategy) == (trace.case, "jax", "static")
    assert (again.environment, again.seconds) == ({"jax": "0"}, 1.5)
    assert [a.dtype for name in trace.arrays for a in again.arrays[name]] == [
        a.dtype for per_rank in trace.arrays.values() for a in per_rank
    ]
    assert again.arrays.keys() == trace.arrays.keys()
    assert all(bits(again.arrays[name]) == bits(trace.arrays[name]) for name in trace.arrays)


def test_what_is_no_trace(tmp_path):
    with pytest.raises(ValueError, match=r"holds no traces: write some with .*--save"):
        load_folder(tmp_path)
    save_file({"expert_id": np.zeros((1, 1))}, tmp_path / "recording.safetensors")
    with pytest.raises(ValueError, match=r"recording.safetensors is not a trace written by .*--save"):
        load_folder(tmp_path)


# ---- One element


def bit(a: Array, at: tuple[int, ...]) -> None:
    """Flip the last bit."""
    a.view(f"u{a.itemsize}")[at] ^= 1


def place(backend: str, name: str) -> tuple[int, tuple[int, ...], Where]:
    """Some element of an array, never in padding: the rank, its index there, and what the report should say."""
    want, rng = WANTED[SIDES[backend]][name], np.random.default_rng(list(f"{backend} {name}".encode()))
    rank, shape, e = int(rng.integers(2)), want.values.shape, 2

    def anywhere(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(rng.integers(n)) for n in shape)

    if want.kind == "rows":
        rows = TABLES[backend][want.order][rank]
        slot, d = int(rng.choice(np.flatnonzero(rows != PADDING))), int(rng.integers(8))
        p, t, k = rows[slot] // 12, rows[slot] // 3 % 4, rows[slot] % 3
        return rank, (slot, d), Where(rank, p, t, k, int(PROBLEM.expert_id[p, t, k]), slot, [d])
    if want.kind == "expert":
        g, *index = anywhere(shape)
        return g // e, (g % e, *index), Where(rank=g // e, expert=g, index=index)
    at = anywhere(() if want.kind == "repeat" else shape if want.kind == "sum" else shape[1:])
    where = Where(rank=rank, source_rank=rank, index=list(at))
    if want.kind == "sum":
        where = Where(index=list(at))
    if want.kind == "repeat":
        where = Where()
    if want.kind == "rank" and want.dtype != "int":
        where.token, where.index = at[0], list(at[1:])
        if shape[-1] == CASE.top_k:
            where.k, where.expert = at[1], PROBLEM.expert_id[rank, *at]
    if want.kind == "rank" and want.dtype == "int" and len(at) == 1:  # of each expert
        where.expert = at[0]
    if want.kind == "rank" and want.dtype == "int" and len(at) == 2:  # from each rank, for each local expert
        where.source_rank, where.expert = at[0], e * rank + at[1]
    return rank, at, where


def spoil(trace: Trace, name: str, change: Callable[[Array], None]) -> Array:
    """Change one rank's array, or all ranks' where they hold the same; that array."""
    rank, _, _ = place(trace.backend, name)
    everywhere = WANTED[trace.strategy][name].kind == "sum"
    for i, a in enumerate(trace.arrays[name]):
        if everywhere or i == rank:
            change(a)
    return trace.arrays[name][rank]


def allowances(backend: str, name: str) -> list[Array]:
    want = WANTED[SIDES[backend]][name]
    assert want.allowed is not None
    return laid_out(CASE, want, want.allowed, TABLES[backend])


def fault(backend: str, name: str) -> Callable[[Array], None]:
    """The smallest there is where data moves, four allowances where it is computed."""
    rank, at, _ = place(backend, name)
    if WANTED[SIDES[backend]][name].allowed is None:
        return lambda a: bit(a, at)
    much = 4 * allowances(backend, name)[rank][at]
    return lambda a: a.__setitem__(at, a[at] + much)


@pytest.mark.parametrize(("backend", "name"), ALL)
def test_one_element_is_caught_where_it_is(torch_and_jax, backend, name):
    trace, want = torch_and_jax[backend], WANTED[SIDES[backend]][name]
    rank, at, where = place(backend, name)
    expected = float(trace.arrays[name][rank][at])
    got = float(spoil(trace, name, fault(backend, name))[at])
    assert got != expected

    bad = failures(torch_and_jax)
    assert all(backend in (check.left, check.right) for check in bad)
    (check,) = [check for check in bad if check.right == "oracle"]
    assert name_of(check) == name
    assert check.left == backend
    assert (check.failing, check.got, check.note) == (1, got, "")
    assert check.worst == np.inf if want.allowed is None else 3 < check.worst < 5
    assert check.expected == pytest.approx(expected, rel=1e-6)
    assert [row.where for row in check.worst_rows] == [check.where]
    assert check.where == where

    verdict = blame(bad)
    assert verdict
    assert (verdict.sides, verdict.stage, name_of(verdict.check)) == ([backend], check.stage, name)
    assert verdict.check is check


@pytest.mark.parametrize(
    ("backend", "name", "value"),
    [(*each, np.nan) for each in FLOATS]
    + [("torch", f"isolated/{name}", sign * np.inf) for name in ("send_tokens/x", "combine/out") for sign in (1, -1)],
)
def test_what_is_no_number_is_caught(torch_and_jax, backend, name, value):
    _, at, where = place(backend, name)
    spoil(torch_and_jax[backend], name, lambda a: a.__setitem__(at, value))
    (check,) = [check for check in failures({backend: torch_and_jax[backend]}) if check.right == "oracle"]
    assert (name_of(check), check.failing, check.worst, check.where) == (name, 1, np.inf, where)


def test_a_score_is_no_row_though_there_are_as_many():
    problem = draw(replace(CASE, width=3))
    trace = perfect(problem, "torch", expectations(problem))
    trace.arrays["isolated/route/score"][1][2, 1] += 1
    (check,) = [check for check in compare(problem, [trace]) if not check.ok]
    assert check.where
    assert (check.where.token, check.where.k, check.where.expert) == (2, 1, problem.expert_id[1, 2, 1])


def test_moved_data_is_compared_bit_for_bit(torch_and_jax):
    a = torch_and_jax["torch"].arrays["isolated/return_tokens/dy"][0]
    a[a == 0] = -0.0  # rows whose scores count for nothing
    assert failures(torch_and_jax)


# ---- Arrays that cannot be compared at all


def lose_a_rank(arrays: list[Array]) -> None:
    arrays.pop()


def lose_all_ranks(arrays: list[Array]) -> None:
    arrays.clear()


def another_dtype(arrays: list[Array]) -> None:
    arrays[-1] = arrays[-1].astype(np.float64 if arrays[-1].dtype == np.float32 else np.float32)


def another_axis(arrays: list[Array]) -> None:
    arrays[-1] = arrays[-1][None]


def one_more(arrays: list[Array]) -> None:
    arrays[-1] = np.concatenate([arrays[-1], arrays[-1][-1:]])


def no_axes(arrays: list[Array]) -> None:
    arrays[-1] = np.zeros((), arrays[-1].dtype)


WAYS = {
    "rows": (lose_a_rank, lose_all_ranks, another_dtype, another_axis, one_more, no_axes),
    "rank": (lose_a_rank, lose_all_ranks, another_dtype, another_axis),
    "expert": (lose_a_rank, lose_all_ranks, another_dtype, another_axis, one_more, no_axes),
    "sum": (lose_all_ranks, another_dtype, another_axis, one_more, no_axes),  # one array for all ranks will do
    "repeat": (lose_all_ranks, another_dtype, another_axis),
}
NOTES = {lose_a_rank: "1 arrays, expected one for each", lose_all_ranks: "0 arrays", another_dtype: "dtype is "}


@pytest.mark.parametrize(("backend", "name"), ALL)
def test_an_array_of_another_form_is_caught(torch_and_jax, backend, name):
    trace, want = torch_and_jax[backend], WANTED[SIDES[backend]][name]
    for way in WAYS[want.kind]:
        arrays = list(trace.arrays[name])
        way(arrays)
        with pytest.raises(MismatchError, match=NOTES.get(way, "shapes are .* expected")):
            canonical(2, arrays, want, TABLES[backend])
    del trace.arrays[name]
    (check,) = failures({backend: trace})
    assert (name_of(check), check.note, check.worst) == (name, "missing from the trace", np.inf)
    assert check.bitwise == (want.allowed is None)


@pytest.mark.parametrize("way", [lose_a_rank, lose_all_ranks, another_dtype, another_axis, one_more, no_axes])
@pytest.mark.parametrize("name", ["isolated/send_tokens/x", CHOICE])
def test_an_array_of_another_form_is_one_failure(torch_and_jax, name, way):
    way(torch_and_jax["jax"].arrays[name])
    (check,) = failures(torch_and_jax)
    assert (name_of(check), check.left, check.where, check.worst) == (name, "jax", None, np.inf)
    assert "expected " in check.note


def test_differences_between_runs_are_of_every_rank_and_do_not_cancel(torch_and_jax):
    name = "repeat/combine/out"
    for differences in ([1, -1], [0, 1], [1]):
        torch_and_jax["torch"].arrays[name] = [np.array(n) for n in differences]
        (check,) = [check for check in failures(torch_and_jax) if check.right == "oracle"]
        assert name_of(check) == name


# ---- Rows


@pytest.mark.parametrize(("backend", "name"), of_kind("rows"))
def test_two_rows_swapped_or_one_lost(torch_and_jax, backend, name):
    trace, order = torch_and_jax[backend], WANTED[SIDES[backend]][name].order
    rows = TABLES[backend][order][1]
    kept = [slot for slot, row in enumerate(rows) if row != PADDING and PROBLEM.keep.reshape(-1)[row]]
    first = kept[0]
    second = next(slot for slot in kept if rows[slot] // CASE.top_k != rows[first] // CASE.top_k)  # of another token
    a = trace.arrays[name][1]
    before = a.copy()

    a[[first, second]] = a[[second, first]]
    (check,) = [check for check in failures({backend: trace}) if check.right == "oracle"]
    assert (name_of(check), check.failing) == (name, 2)
    assert {(row.where.rank, row.where.slot) for row in check.worst_rows} == {(1, first), (1, second)}

    a[:] = before
    a[second:-1] = before[second + 1 :]  # those behind move up
    a[-1] = 0
    bad = [check for check in failures({backend: trace}) if check.right == "oracle"]
    assert {name_of(check) for check in bad} == {name}
    assert all("padding" in check.note or (check.where and check.where.slot >= second) for check in bad)  # type: ignore[operator]

    trace.arrays[name][1] = np.delete(before, second, axis=0)
    (check,) = failures({backend: trace})
    assert name_of(check) == name
    assert f"({len(rows) - 1}, 8)], expected" in check.note


def test_two_tokens_swapped(torch_and_jax):
    for backend, name in of_kind("rank"):
        want = WANTED[SIDES[backend]][name]
        if want.dtype != "int" and not name.endswith("order"):  # nothing tells two probes apart
            a = torch_and_jax[backend].arrays[name][1]
            a[[0, 3]] = a[[3, 0]]
            (check,) = failures({backend: torch_and_jax[backend]})
            assert (name_of(check), check.failing) == (name, 2)
            a[[0, 3]] = a[[3, 0]]


PROMISED_ZERO = {
    *(f"isolated/{n}" for n in ("group_by_expert/x", "to_expert_major/x", "to_expert_major/dx", "to_rank_major/y",
                                "to_rank_major/dy", "combine/dy")),
    *(f"e2e/{n}" for n in ("group_by_expert/x", "send_tokens/x", "to_expert_major/x", "to_rank_major/y",
                           "return_tokens/y")),
}  # fmt: skip


@pytest.mark.parametrize("value", [1, np.nan])
@pytest.mark.parametrize("per", ["rank", "expert"])
def test_dirty_padding(per, value):
    problem = draw(replace(CASE, capacity_per=per))
    wanted = expectations(problem)
    table = row_tables(problem.case, problem.expert_id, problem.keep, "static")
    clean, dirty = perfect(problem, "jax", wanted), {}
    for name, want in wanted["static"].items():
        for rank, rows in enumerate(table[want.order] if want.kind == "rows" else []):
            for slot in np.flatnonzero(rows == PADDING)[-1:]:
                clean.arrays[name][rank][slot, -1] = value
                dirty[name] = f"padding is not zero: rank {rank}, slot {slot} and 0 more"
        if name in dirty and name in PROMISED_ZERO:
            ranks = [rank for rank, rows in enumerate(table[want.order]) if (rows == PADDING).any()]
            dirty[name] = f"padding is not zero: rank {ranks[0]}, slot "
    assert dirty.keys() == {name for name, want in wanted["static"].items() if want.kind == "rows"}
    bad = {name_of(check): check.note for check in compare(problem, [clean]) if not check.ok}
    assert bad.keys() == PROMISED_ZERO
    assert all(note.startswith(dirty[name]) for name, note in bad.items())


@pytest.mark.parametrize(("backend", "name"), of_kind("sum"))
def test_ranks_that_disagree(torch_and_jax, backend, name):
    bit(torch_and_jax[backend].arrays[name][1], (0, 0))
    (check,) = failures(torch_and_jax)
    assert (name_of(check), check.note) == (name, "ranks disagree on a value that is the same for all of them")
    torch_and_jax[backend].arrays[name].pop(1)
    assert not failures(torch_and_jax)


# ---- Two sides


def test_two_sides_may_differ_by_both_allowances(torch_and_jax):
    name = "e2e/combine/out"
    for sign, (backend, trace) in zip((1, -1), torch_and_jax.items(), strict=True):
        trace.arrays[name][1][2, 3] += sign * 0.8 * allowances(backend, name)[1][2, 3]
    checks = [check for check in compare(PROBLEM, list(torch_and_jax.values())) if name_of(check) == name]
    assert [(check.right, check.ok) for check in checks] == [("oracle", True), ("oracle", True), ("jax", True)]
    assert [check.worst for check in checks] == pytest.approx([0.8] * 3, abs=0.1)
    assert checks[2].allowed == pytest.approx(2 * checks[0].allowed)
    assert {(check.where.token, *check.where.index) for check in checks if check.where} == {(2, 3)}


def test_a_stage_moves_the_bits_that_the_run_itself_made(torch_and_jax):
    name = "e2e/to_rank_major/y"
    bit(torch_and_jax["torch"].arrays[name][0], (4, 5))  # the oracle allows as much
    bad = failures(torch_and_jax)
    assert [(name_of(c), c.right) for c in bad] == [
        (name, "its own apply_experts"), ("e2e/return_tokens/y", "its own to_rank_major")
    ]  # fmt: skip
    verdict = blame(bad)
    assert verdict
    assert (verdict.sides, verdict.stage) == (["torch"], "to_rank_major")


# ---- What the failing rows have in common


@pytest.mark.parametrize("expert", range(4))
def test_rows_of_one_expert(torch_and_jax, expert):
    name = "isolated/apply_experts/y"
    for a, rows in zip(torch_and_jax["torch"].arrays[name], TABLES["torch"]["expert_major"], strict=True):
        a[PROBLEM.expert_id.reshape(-1)[rows] == expert] += 1
    torch_and_jax["torch"].arrays["isolated/apply_experts/dw_up"][expert // 2][expert % 2] *= 2
    rows, weight = [check for check in failures(torch_and_jax) if check.right == "oracle"]
    assert f"all have expert {expert} and no others" in rows.common
    assert f"all have rank {expert // 2}" in rows.common
    assert rows.failing == (PROBLEM.expert_id == expert).sum()
    assert f"all have expert {expert} and no others" in weight.common


def test_tokens_that_lost_an_assignment(torch_and_jax):
    dropped = (~PROBLEM.keep).sum(axis=-1)
    for a, lost in zip(torch_and_jax["jax"].arrays["isolated/combine/out"], dropped, strict=True):
        a[lost == 2] = 0
    (check,) = [check for check in failures(torch_and_jax) if check.right == "oracle"]
    assert check.common == ["all have assignments dropped 2 and no others", "all have token 3 and no others"][::-1]


# ---- The router's choice


def test_a_wrong_choice(torch_and_jax):
    ids = torch_and_jax["jax"].arrays[CHOICE]
    right = ids[1][2].tolist()
    ids[1][2] = right[1], right[0], right[2]
    (check,) = failures(torch_and_jax)
    assert (name_of(check), check.left, check.failing) == (CHOICE, "jax", 1)
    assert (check.got, check.expected) == (right[1], right[0])
    assert check.where == Where(rank=1, source_rank=1, token=2, k=0, expert=right[0])
    ids[1][2] = right[0], right[0], right[2]
    assert failures(torch_and_jax)
    ids[1][2] = right[0], right[1], CASE.experts
    assert failures(torch_and_jax)
    del torch_and_jax["jax"].arrays[CHOICE]
    assert [name_of(check) for check in failures(torch_and_jax)] == [CHOICE]


@pytest.mark.parametrize("whole", [False, True], ids=["float", "integer"])
def test_equal_logits(torch_and_jax, whole):
    """Two experts with one column: either may come first where rounding decides, but not where logits are exact."""
    router = PROBLEM.router.copy()
    router[:, 3] = router[:, 1]
    problem = replace(PROBLEM, router=router)
    if whole:
        problem = replace(problem, x=(4 * PROBLEM.x).round(), router=(4 * router).round())
    ids = np.argsort(-(problem.x @ problem.router), axis=-1, kind="stable")[..., : CASE.top_k]
    trace = torch_and_jax["torch"]
    trace.arrays[CHOICE] = list(ids)
    assert choice_of_experts(problem, trace).ok
    trace.arrays[CHOICE] = list(np.where(np.isin(ids, (1, 3)), 4 - ids, ids))  # 3 before 1, or in its place
    check = choice_of_experts(problem, trace)
    swapped = np.isin(ids, (1, 3)).any(axis=-1).sum()
    assert (check.ok, check.failing) == ((False, swapped) if whole else (True, 0))
    assert check.note == ("" if whole else f"{swapped} tokens too close to call")


# ---- Blame


def verdict_on(traces: dict[str, Trace], *spoiled: tuple[str, str]) -> Blame:
    for backend, name in spoiled:
        spoil(traces[backend], name, fault(backend, name))
    verdict = blame(list(compare(PROBLEM, list(traces.values()))))
    assert verdict
    return verdict


ORDER = [
    # stages alone, from first to last, forward before backward
    "isolated/route/dx",
    "isolated/send_tokens/x",
    "isolated/apply_experts/y",
    "isolated/apply_experts/dw_up",
    "isolated/to_rank_major/y",
    "isolated/combine/dscore",
    # the whole layer, forward; then backward, from last to first
    "e2e/route/score",
    "e2e/apply_experts/y",
    "e2e/combine/out",
    "e2e/combine/dscore",
    "e2e/apply_experts/dw_down",
    "e2e/route/dx",
    # what two runs of it did not have in common
    "repeat/route/dx",
    "repeat/combine/out",
]


@pytest.mark.parametrize(("first", "then"), list(pairwise(ORDER)))
@pytest.mark.parametrize("backend", SIDES)
def test_the_first_divergence_is_blamed(torch_and_jax, backend, first, then):
    verdict = verdict_on(torch_and_jax, (backend, then), (backend, first))
    assert (name_of(verdict.check), verdict.sides) == (first, [backend])


def test_both_sides_are_blamed(torch_and_jax):
    name = "isolated/to_expert_major/x"
    verdict = verdict_on(torch_and_jax, ("torch", name), ("jax", name))
    assert verdict.sides == ["jax", "torch"]
    assert verdict.function == "jax_impl/layout.py: to_expert_major and torch_impl/layout.py: to_expert_major"


def test_the_side_of_the_first_divergence_is_blamed(torch_and_jax):
    verdict = verdict_on(torch_and_jax, ("torch", "isolated/combine/out"), ("jax", "isolated/send_tokens/dx"))
    assert (verdict.sides, verdict.stage, verdict.direction) == (["jax"], "send_tokens", "backward")
    assert verdict.function == "jax_impl/exchange.py: send_tokens"
    assert (verdict.case, verdict.arrays) == (CASE.name, 4)  # each of two against the oracle and against the other


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("e2e/group_by_expert/dropped", "forward"),
        ("e2e/group_by_expert/dropped_in_all", "forward"),
        ("e2e/combine/dscore", "backward"),
        ("isolated/combine/order", "forward"),
        ("isolated/group_by_expert/dx_order", "backward"),
    ],
)
def test_direction(torch_and_jax, name, direction):
    assert verdict_on(torch_and_jax, ("jax", name)).direction == direction
