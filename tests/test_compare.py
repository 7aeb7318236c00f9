"""The judge on trial: a perfect trace passes; spoiled in one place, it is caught there and the right side blamed."""

from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
import torch
from problems import bits, gamma, within
from safetensors.numpy import save_file

import jax_impl.direct.layer
import jax_impl.dynamic.exchange
import jax_impl.dynamic.layer
import jax_impl.layer
import torch_impl.direct.layer
import torch_impl.exchange
import torch_impl.layer
import torch_impl.static.layer
from parity.cases.case import Case
from parity.cases.presets import PRESETS, command
from parity.judge.blame import Blame, blame
from parity.judge.compare import Check, MismatchError, Where, canonical, choice_of_experts, compare
from parity.judge.picture import blank
from parity.oracle import arrays as arrays_of_oracle
from parity.oracle import vectorised
from parity.oracle.evaluation import Evaluation
from parity.oracle.expected import Expected, Oracle
from parity.oracle.problem import NOTHING, Problem, draw
from parity.oracle.quantities import ALWAYS, OUTSIDE, STAGES, names
from parity.oracle.reference import Layer
from parity.oracle.rows import PADDING, Layout, Table, indices, lay_out, row_tables
from parity.oracle.tolerances import allowance, numpy_dtype
from parity.run.naming import MADE_BY, MAIN, named, named_stages, stem
from parity.run.ours import BACKENDS
from parity.run.trace import Trace, load_folder

Array = np.ndarray
Wanted = dict[Layout, dict[str, Expected]]

# D, F and K all differ; K is 3, so that the order of sums is checked; some assignments drop and some slots are padding.
CASE = Case(ranks=2, tokens=4, width=8, hidden=5, experts=4, top_k=3, capacity_factor="3/4", seed=149)
PROBLEM = draw(CASE)
SIDES: dict[str, Layout] = {"torch": "dynamic", "jax": "static"}
CHOICE = "isolated/route/expert_id"
INDICES = ("slot", "assignment", "source", "target")


def expectations(problem: Problem) -> Wanted:
    """What each side's arrays should hold."""
    oracle = Oracle(problem)
    return {layout: oracle.expected(names(layout), layout) for layout in SIDES.values()}


def test_draws_that_nobody_waits_for_are_given_up():
    """Those of a second step, too, which has an oracle of its own."""
    for way, mode in (("eager", "e2e"), ("in_flight", "second")):
        oracle = Oracle(draw(replace(PRESETS["p1"], way=way)))
        oracle.stop()
        with pytest.raises(CancelledError):
            oracle.expected([f"{mode}/combine/out"], "dynamic")


WANTED, EXACT = expectations(PROBLEM), Evaluation(PROBLEM)
TABLES = {backend: row_tables(CASE, PROBLEM.expert_id, PROBLEM.keep, layout) for backend, layout in SIDES.items()}


def kind(want: Expected) -> str:
    """How its ranks hold it: a row each of some, a part for each rank or expert, all of them all, or a number."""
    if want.mode == "repeat" or want.quantity.summed:
        return "repeat" if want.mode == "repeat" else "sum"
    return {"A": "rows", "P": "rank", "E": "expert"}[want.axes[0]]


def laid_out(case: Case, want: Expected, values: Array, table: Table) -> list[Array]:
    """What the oracle says, as the ranks' arrays would hold it."""
    if kind(want) == "rows":
        return lay_out(values, table[want.quantity.order], 0)
    if kind(want) == "rank":
        return [np.array(a) for a in values]
    if kind(want) == "expert":
        return [np.array(a) for a in np.split(values, case.ranks)]
    return [np.array(values if kind(want) == "sum" else 0) for _ in range(case.ranks)]


def perfect(problem: Problem, backend: str, wanted: Wanted) -> Trace:
    """A trace that holds what the oracle says, rounded to the dtype it is stored in."""
    case, layout = problem.case, BACKENDS[backend].layout
    table = row_tables(case, problem.expert_id, problem.keep, layout)
    index = [indices(case, table, rank) for rank in range(case.ranks)]
    arrays = {}
    for name, want in wanted[layout].items():
        if name not in BACKENDS[backend].provides:
            continue
        values = want.values.astype(np.int64 if want.dtype == "int" else numpy_dtype(want.dtype))
        arrays[name] = laid_out(case, want, values, table)
        if want.quantity.value in INDICES and want.mode != "repeat":
            arrays[name] = [i[want.quantity.value].copy() for i in index]
    return Trace(case, BACKENDS[backend], {}, arrays=arrays)


class Remembered:
    """The oracle of `PROBLEM`, which is not asked again."""

    def __init__(self, problem: Problem) -> None:
        assert problem is PROBLEM

        self.exact = EXACT

    def measure(self, names: set[str]) -> None:
        pass

    def expected(self, names: tuple[str, ...], layout: Layout) -> dict[str, Expected]:
        return {name: WANTED[layout][name] for name in names if name in WANTED[layout]}


@pytest.fixture
def torch_and_jax(monkeypatch) -> dict[str, Trace]:
    """Both sides of the case, perfect; what the oracle expects of them is not worked out again."""
    monkeypatch.setattr("parity.judge.compare.Oracle", Remembered)
    return {backend: perfect(PROBLEM, backend, WANTED) for backend in SIDES}


def failures(traces: dict[str, Trace]) -> list[Check]:
    return [check for check in compare(PROBLEM, list(traces.values())) if not check.ok]


def name_of(check: Check) -> str:
    return f"{check.mode}/{check.stage}/{check.value}"


def of_kind(*kinds: str) -> list[tuple[str, str]]:
    return [
        (backend, name)
        for backend, layout in SIDES.items()
        for name, want in WANTED[layout].items()
        if kind(want) in kinds and name != CHOICE and name in BACKENDS[backend].provides
    ]


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
        replace(CASE, way="in_flight", capacity_per="expert"),
        replace(CASE, tokens=1, score_function="sigmoid", renormalize=True, scale=2.5, align=4),
    ],
    ids=lambda case: command(case).removeprefix("python -m parity check "),
)
def test_a_perfect_trace_passes(case):
    problem = draw(case)
    wanted = expectations(problem)
    traces = [perfect(problem, backend, wanted) for backend in SIDES]
    everything = list(compare(problem, traces))
    assert all(check.ok and check.worst < 1 and bool(check.rows) == (not check.scale) for check in everything)
    checks = [check for check in everything if not check.scale]
    for trace in traces:
        mine = [check for check in checks if check.left == trace.backend.name and check.right == "oracle"]
        assert sorted(name_of(check) for check in mine) == sorted(trace.arrays)  # each once, none left out
        assert {check.stage for check in mine if check.mode == "isolated"} == set(STAGES)
        assert trace.arrays.keys() == wanted[trace.backend.layout].keys() & {*trace.backend.provides}
    in_both = traces[0].arrays.keys() & traces[1].arrays.keys()
    sent = {"exchange_counts/counts"} if case.capacity_factor else set()  # what is sent is for each layout to know
    rows = {f"group_by_expert/{name}" for name in INDICES} | {f"to_expert_major/{name}" for name in INDICES}
    common = {name for name in in_both if name.split("/", 1)[1] not in sent | rows or name.startswith("repeat")}
    assert {name_of(check) for check in checks if check.right == "jax"} >= common - {CHOICE}
    assert blame(checks, BACKENDS) is None


def by_name(layer: Layer) -> dict[str, Array]:
    """Every value and every gradient of the oracle's layer."""
    return layer._asdict() | {f"d{name}": a for name, a in layer.gradients.items()}


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
        for layout in SIDES.values():
            counts = sent if layout == "dynamic" else kept
            got = WANTED[layout][f"{mode}/exchange_counts/counts"].values
            assert got.tolist() == [[counts[p, 2 * q : 2 * q + 2].tolist() for p in P] for q in P]
        to_rank = np.stack([sent[:, :2].sum(axis=1), sent[:, 2:].sum(axis=1)], axis=1)
        integers[f"{mode}/exchange_counts/send"] = to_rank
        integers[f"{mode}/exchange_counts/receive"] = to_rank.T
        integers[f"{mode}/group_by_expert/assignment"] = np.tile(np.arange(12), 2)
        integers[f"{mode}/group_by_expert/kept"] = kept
    for name, values in integers.items():
        np.testing.assert_array_equal(wanted[name].values, values)
    x = np.repeat(PROBLEM.x, 3, axis=1).reshape(24, 8)
    moved = {"/x": x, "/dx": PROBLEM.dx_rows, "/y": PROBLEM.y, "/dy": PROBLEM.dy}
    exact, drawn = by_name(PROBLEM.exact) | {"x": x}, by_name(Evaluation(PROBLEM, range(16)).layer)
    for name, want in wanted.items():
        value = name[name.rindex("/") :]
        if want.axes == "A D" and want.allowed is None:
            np.testing.assert_array_equal(want.values, moved[value].reshape(24, 8))
        elif name.startswith("e2e") and want.dtype != "int":
            np.testing.assert_array_equal(want.values, exact[value[1:]].reshape(want.values.shape))
        elif want.mode != "repeat" and want.dtype != "int" and not name.endswith("order"):
            # Fed the oracle's values rounded to float32, a stage makes what it makes within the whole layer, but for
            # those roundings: it is as far off as the layer's float32 numbers may be.
            whole = {"group_by_expert/dx": "dx_experts", "apply_experts/dx": "dx_rows"}
            value = whole.get(name.removeprefix("isolated/"), value[1:])
            expected = replayed()[value] if "/route/" in name else exact[value]
            allowed = allowance(exact[value], drawn[value], "float32")
            within(want.values, expected.reshape(want.values.shape), allowed.reshape(want.values.shape))


def test_what_is_expected_of_an_uneven_exchange_in_jax():
    """Which XLA has on GPUs only; but who is told what runs anywhere."""
    problem = draw(replace(PROBLEM.case, ranks=3, experts=6, pattern="zipf"))
    wanted = Oracle(problem).expected(BACKENDS["jax-dynamic"].provides, "ragged")
    sent = np.array([np.bincount(ids.reshape(-1), minlength=6) for ids in problem.expert_id])
    told = jax.vmap(lambda counts: jax_impl.dynamic.exchange.exchange_counts(counts, "ranks"), axis_name="ranks")(sent)
    for name, got in named("exchange_counts", told).items():
        for mode in ("isolated", "e2e"):
            np.testing.assert_array_equal(wanted[f"{mode}/exchange_counts/{name}"].values, got)
    S = sent.reshape(3, 3, 2).sum(axis=2)
    by_hand = {
        "received_at": [[sum(S[:p, q]) for q in range(3)] for p in range(3)],
        "returned_at": [[sum(S[p, :q]) for p in range(3)] for q in range(3)],
    }
    for name, values in by_hand.items():
        np.testing.assert_array_equal(wanted[f"e2e/exchange_counts/{name}"].values, values)
    assert not problem.keep.all()
    assert wanted["e2e/group_by_expert/kept"].values.tolist() == sent.tolist()
    assert not wanted["e2e/group_by_expert/dropped_in_all"].values.any()  # what a capacity would drop, is masked


CORNERS = {
    "torch": torch_impl.layer, "torch-static": torch_impl.static.layer, "jax": jax_impl.layer,
    "jax-dynamic": jax_impl.dynamic.layer, "torch-direct": torch_impl.direct.layer,
    "jax-direct": jax_impl.direct.layer,
}  # fmt: skip


@pytest.mark.parametrize("backend", CORNERS)
def test_every_array_that_a_stage_returns_is_compared(backend):
    provided = {name.split("/", 1)[1] for name in BACKENDS[backend].provides if not name.startswith("repeat")}
    stages = set()
    for field, kind in CORNERS[backend].Stages.__annotations__.items():
        stage, _, value = (MADE_BY.get(field) or MADE_BY[stem(field)]).partition("/")
        parts = getattr(kind, "__annotations__", {})
        fields = {stem(name) for name, part in parts.items() if part is not int} if hasattr(kind, "_fields") else None
        returned = {value or MAIN[stage]} if fields is None else fields
        assert {f"{stage}/{name}" for name in returned} <= provided
        stages.add(stage)
    assert stages == {*STAGES} - ({"to_rank_major"} if backend.endswith("-direct") else set())


def test_fields_of_stages_that_changed_places_leave_something_out():
    splits = torch_impl.exchange.Splits(torch.tensor([2]), torch.tensor([2]), 2, 2)
    stages = namedtuple("Stages", ["counts_Pe", "splits"])
    assert {*named_stages(stages(torch.tensor([[2]]), splits))} >= {"exchange_counts/counts", "exchange_counts/send"}
    assert "exchange_counts/send" not in named_stages(stages(splits, torch.tensor([[2]])))


def replayed() -> dict[str, np.ndarray]:
    """What PyTorch makes in float64 of the router, and of its gradients, with the next expert for each."""
    inputs = PROBLEM.x, PROBLEM.parameters.router, PROBLEM.dscore
    x, router, dscore = (torch.from_numpy(a.astype(np.float64)) for a in inputs)
    leaves = x.requires_grad_(), router.requires_grad_()
    others = (torch.from_numpy(PROBLEM.expert_id).long() + 1) % PROBLEM.case.experts
    assert (PROBLEM.case.score_function, PROBLEM.case.renormalize, PROBLEM.case.scale) == ("softmax", False, 1)
    score = (x @ router).softmax(dim=-1).gather(2, others)
    dx, drouter = torch.autograd.grad(score, leaves, dscore)
    return {"score": score.detach().numpy(), "dx": dx.numpy(), "drouter": drouter.numpy()}


def test_a_trace_survives_the_disk(tmp_path):
    problem = draw(replace(CASE, dtype="bfloat16"))
    trace = replace(perfect(problem, "jax", expectations(problem)), environment={"jax": "0"}, seconds=1.5)
    many = [np.array([rank, np.nan]) for rank in range(11)]  # 10 comes after 9
    trace.arrays = {**trace.arrays, "e2e/route/drouter": many}
    trace.save(tmp_path / "folder")
    (again,) = load_folder(tmp_path / "folder")
    assert (again.case, again.backend) == (trace.case, BACKENDS["jax"])
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
    with pytest.raises(
        ValueError, match=r"recording.safetensors is not a trace: its metadata lack case and backend, which .*--save"
    ):
        load_folder(tmp_path)


# ---- One element


def bit(a: Array, at: tuple[int, ...]) -> None:
    """Flip the last bit."""
    a.view(f"u{a.itemsize}")[at] ^= 1


def place(backend: str, name: str) -> tuple[int, tuple[int, ...], Where]:
    """Some element of an array, never in padding: the rank, its index there, and what the report should say."""
    want, rng = WANTED[SIDES[backend]][name], np.random.default_rng(list(f"{backend} {name}".encode()))
    rank, shape, e, value = int(rng.integers(2)), want.values.shape, 2, want.quantity.value

    def anywhere(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(rng.integers(n)) for n in shape)

    if kind(want) == "rows":
        rows = TABLES[backend][want.quantity.order][rank]
        slot, index = int(rng.choice(np.flatnonzero(rows != PADDING))), anywhere(shape[1:])
        p, t, k = rows[slot] // 12, rows[slot] // 3 % 4, rows[slot] % 3
        assert shape[1:] == (() if value in INDICES else (8,))
        return rank, (slot, *index), Where(rank, p, t, k, int(PROBLEM.expert_id[p, t, k]), slot, list(index))
    if kind(want) == "expert":
        g, *index = anywhere(shape)
        return g // e, (g % e, *index), Where(rank=g // e, expert=g, index=index)
    at = anywhere(() if kind(want) == "repeat" else shape if kind(want) == "sum" else shape[1:])
    where = Where(rank=rank, source_rank=rank, index=list(at))
    if kind(want) == "sum":
        where = Where(index=list(at))
    if kind(want) == "repeat":
        where = Where()
    if kind(want) == "rank" and (want.dtype != "int" or value == "slot"):
        where.token, where.index = at[0], list(at[1:])
        if shape[-1] == CASE.top_k:
            where.k, where.expert = at[1], PROBLEM.expert_id[rank, *at]
    elif kind(want) == "rank" and value in ("counts", "dropped", "kept") and len(at) == 1:  # of each expert
        where.expert = at[0]
    elif kind(want) == "rank" and value == "receive":  # from each rank
        where.source_rank = at[0]
    elif kind(want) == "rank" and len(at) == 2:  # from each rank, for each local expert
        where.source_rank, where.expert = at[0], e * rank + at[1]
    return rank, at, where


def spoil(trace: Trace, name: str, change: Callable[[Array], None]) -> Array:
    """Change one rank's array, or all ranks' where they hold the same; that array."""
    rank, _, _ = place(trace.backend.name, name)
    everywhere = kind(WANTED[trace.backend.layout][name]) == "sum"
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
    assert check.expected == pytest.approx(expected, rel=gamma(1, "float32"), abs=0)  # `perfect` rounded it
    assert [row.where for row in check.worst_rows] == [check.where]
    assert check.where == where

    verdict = blame(bad, BACKENDS)
    assert verdict
    assert (verdict.backends, verdict.stage, name_of(verdict.check)) == ([backend], check.stage, name)
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
    "repeat": (lose_a_rank, lose_all_ranks, another_dtype, another_axis),
}
NOTES = {lose_a_rank: "1 arrays, expected one for each", lose_all_ranks: "0 arrays", another_dtype: "dtype is "}


@pytest.mark.parametrize(("backend", "name"), ALL)
def test_an_array_of_another_form_is_caught(torch_and_jax, backend, name):
    trace, want = torch_and_jax[backend], WANTED[SIDES[backend]][name]
    for way in WAYS["sum"][:3] if name == "repeat/route/drouter" else WAYS[kind(want)]:
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
    trace, order = torch_and_jax[backend], WANTED[SIDES[backend]][name].quantity.order
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
    assert f"{(len(rows) - 1, *before.shape[1:])}], expected" in check.note


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
    *(f"isolated/{n}" for n in ("group_by_expert/x", "to_expert_major/x", "to_expert_major/dx", "apply_experts/y",
                                "to_rank_major/y", "to_rank_major/dy", "combine/dy")),
    *(f"e2e/{n}" for n in ("group_by_expert/x", "send_tokens/x", "to_expert_major/x", "apply_experts/y",
                           "to_rank_major/y", "return_tokens/y")),
}  # fmt: skip


PROMISED_PAST_THE_END = {
    f"{mode}/{name}"
    for mode in ("isolated", "e2e")
    for name in ("group_by_expert/assignment", "to_expert_major/source", "to_expert_major/target")
}


@pytest.mark.parametrize("value", [1, np.nan])
@pytest.mark.parametrize(("per", "biases"), [("rank", False), ("rank", True), ("expert", False), ("expert", True)])
def test_dirty_padding(per, biases, value):
    problem = draw(replace(CASE, capacity_per=per, expert_bias=biases))
    wanted = expectations(problem)
    table = row_tables(problem.case, problem.expert_id, problem.keep, "static")
    past_the_end = {"assignment": 12} | dict.fromkeys(("source", "target"), {"rank": 10, "expert": 12}[per])
    clean, dirty = perfect(problem, "jax", wanted), {}
    for name in clean.arrays:
        want = wanted["static"][name]
        tables = table[want.quantity.order] if kind(want) == "rows" else []
        promised = past_the_end.get(want.quantity.value, "zero")
        for rank, rows in enumerate(tables):
            for slot in np.flatnonzero(rows == PADDING)[-1:]:
                a = clean.arrays[name][rank]
                if a.ndim > 1:
                    a[slot, -1] = value
                else:  # an index that leads somewhere
                    a[slot] = 0
                dirty.setdefault(name, f"padding is not {promised} in 1 slots of rank {rank}; the first, {slot},")
    assert dirty.keys() == {name for name, want in wanted["static"].items() if kind(want) == "rows"}
    bad = {name_of(check): check.note for check in compare(problem, [clean]) if not check.ok}
    of_a_bias = {f"{mode}/apply_experts/y" for mode in ("isolated", "e2e") if biases and per == "expert"}
    assert bad.keys() == (PROMISED_ZERO | PROMISED_PAST_THE_END) - of_a_bias
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
    name, rounded = "e2e/combine/out", 0.0
    for sign, (backend, trace) in zip((1, -1), torch_and_jax.items(), strict=True):
        allowed = allowances(backend, name)[1][2, 3]
        trace.arrays[name][1][2, 3] += sign * 0.8 * allowed
        rounded = 2 * gamma(1, "float32") * abs(trace.arrays[name][1][2, 3]) / allowed  # once before, and once added
    found = compare(PROBLEM, list(torch_and_jax.values()))
    checks = [check for check in found if name_of(check) == name and not check.scale]
    assert [(check.right, check.ok) for check in checks] == [("oracle", True), ("oracle", True), ("jax", True)]
    assert [check.worst for check in checks] == pytest.approx([0.8] * 3, abs=rounded)
    assert checks[2].allowed == 2 * checks[0].allowed
    assert {(check.where.token, *check.where.index) for check in checks if check.where} == {(2, 3)}


def test_a_stage_moves_the_bits_that_the_run_itself_made(torch_and_jax):
    name = "e2e/to_rank_major/y"
    bit(torch_and_jax["torch"].arrays[name][0], (4, 5))  # the oracle allows as much
    bad = failures(torch_and_jax)
    assert [(name_of(c), c.right) for c in bad] == [
        (name, "its own apply_experts"), ("e2e/return_tokens/y", "its own to_rank_major")
    ]  # fmt: skip
    verdict = blame(bad, BACKENDS)
    assert verdict
    assert (verdict.backends, verdict.stage) == (["torch"], "to_rank_major")


# ---- What the failing rows have in common


@pytest.mark.parametrize("expert", range(4))
def test_rows_of_one_expert(torch_and_jax, expert):
    name = "isolated/apply_experts/y"
    for a, rows in zip(torch_and_jax["torch"].arrays[name], TABLES["torch"]["expert_major"], strict=True):
        a[PROBLEM.expert_id.reshape(-1)[rows] == expert] += 1
    torch_and_jax["torch"].arrays["isolated/apply_experts/dw_up"][expert // 2][expert % 2] *= 2
    rows, weight = [check for check in failures(torch_and_jax) if check.right == "oracle"]
    assert f"all have expert {expert} and no passing row has it" in rows.common
    assert f"all have rank {expert // 2}" in rows.common
    assert rows.failing == (PROBLEM.expert_id == expert).sum()
    assert f"all have expert {expert} and no passing row has it" in weight.common


def test_tokens_that_lost_an_assignment(torch_and_jax):
    dropped = (~PROBLEM.keep).sum(axis=-1)
    for a, lost in zip(torch_and_jax["jax"].arrays["isolated/combine/out"], dropped, strict=True):
        a[lost == 2] = 0
    (check,) = [check for check in failures(torch_and_jax) if check.right == "oracle"]
    said = "all have {} and no passing row has it"
    assert check.common == [said.format("token 3"), said.format("assignments dropped 2")]


def test_tokens_of_one_rank(torch_and_jax):
    torch_and_jax["torch"].arrays["isolated/combine/out"][1] += 1
    (check,) = [check for check in failures(torch_and_jax) if check.right == "oracle"]
    assert "all have a token from rank 1 and no passing row has it" in check.common


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
def test_equal_logits(whole):
    """Two experts with one column: either may come first where rounding decides, but not where logits are exact."""
    router = PROBLEM.parameters.router.copy()
    router[:, 3] = router[:, 1]
    router = (4 * router).round() if whole else router
    problem = replace(PROBLEM, parameters=PROBLEM.parameters._replace(router=router))
    problem = replace(problem, x=(4 * PROBLEM.x).round()) if whole else problem
    ids = np.argsort(-(problem.x @ router), axis=-1, kind="stable")[..., : CASE.top_k]
    want = WANTED["dynamic"][CHOICE]
    assert choice_of_experts(problem, want, "torch", ids).ok
    other = np.where(np.isin(ids, (1, 3)), 4 - ids, ids)  # 3 before 1, or in its place
    check = choice_of_experts(problem, want, "torch", other)
    swapped = np.isin(ids, (1, 3)).any(axis=-1).sum()
    assert (check.ok, check.failing) == ((False, swapped) if whole else (True, 0))
    assert check.note == ("" if whole else f"{swapped} tokens too close to call")


# ---- Blame


def verdict_on(traces: dict[str, Trace], *spoiled: tuple[str, str]) -> Blame:
    for backend, name in spoiled:
        spoil(traces[backend], name, fault(backend, name))
    verdict = blame(list(compare(PROBLEM, list(traces.values()))), BACKENDS)
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
    # what two runs of it did not have in common, in the same order
    "repeat/route/score",
    "repeat/combine/out",
    "repeat/apply_experts/dw_up",
    "repeat/route/dx",
]


@pytest.mark.parametrize(("first", "then"), list(pairwise(ORDER)))
@pytest.mark.parametrize("backend", SIDES)
def test_the_first_divergence_is_blamed(torch_and_jax, backend, first, then):
    verdict = verdict_on(torch_and_jax, (backend, then), (backend, first))
    assert (name_of(verdict.check), verdict.backends) == (first, [backend])


def test_both_sides_are_blamed(torch_and_jax):
    name = "isolated/to_expert_major/x"
    verdict = verdict_on(torch_and_jax, ("torch", name), ("jax", name))
    assert verdict.backends == ["jax", "torch"]
    assert verdict.function == "jax_impl/layout.py: to_expert_major and torch_impl/layout.py: to_expert_major"


def test_the_side_of_the_first_divergence_is_blamed(torch_and_jax):
    verdict = verdict_on(torch_and_jax, ("torch", "isolated/combine/out"), ("jax", "isolated/send_tokens/dx"))
    assert (verdict.backends, verdict.stage, verdict.direction) == (["jax"], "send_tokens", "backward")
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


@pytest.fixture(scope="module")
def half_precision() -> tuple[Problem, Wanted]:
    """A case of bfloat16, where the allowance of a row is wide."""
    there = {"router_bias": True, "expert_scale": True, "expert_bias": True, "shared_hidden": 6, "shared_score": True}
    problem = draw(Case(ranks=2, tokens=64, width=16, hidden=12, experts=4, dtype="bfloat16", seed=7, **there))
    return problem, expectations(problem)


def found_in(half_precision: tuple[Problem, Wanted], name: str, factors: tuple[float, float]) -> list[Check]:
    """What fails when the arrays of a perfect run are too large by a factor on each rank."""
    problem, wanted = half_precision
    trace = perfect(problem, "torch", wanted)
    pairs = zip(trace.arrays[name], factors, strict=False)
    scaled = [(a.astype(np.float64) * factor).astype(a.dtype) for a, factor in pairs]
    trace.arrays = {**trace.arrays, name: scaled}
    return [check for check in compare(problem, [trace]) if not check.ok]


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name not in ALWAYS])
def test_of_what_has_few_numbers_it_takes_more(half_precision, name):
    """As last roundings average out less: twice what is allowed of the scale, 1% to 7%, is found by that or by rows."""
    allowed = half_precision[1]["dynamic"][name].slope[0]
    assert allowed < 0.07
    (check,) = found_in(half_precision, name, (1 + 2 * allowed,) * 2)
    assert name_of(check) == name


@pytest.mark.parametrize("name", ALWAYS)
def test_what_is_too_large_everywhere_is_caught_by_its_scale(half_precision, name):
    """By 1%, which is within the allowance of every row."""
    (check,) = found_in(half_precision, name, (1.01, 1.01))
    assert check.scale
    assert name_of(check) == name
    assert check.got == pytest.approx(1.01, abs=1e-3)  # the least that a step of bfloat16 averages to


def test_one_rank_or_expert_that_is_too_large_is_named(half_precision):
    (out,) = found_in(half_precision, "e2e/combine/out", (1, 1.015))
    assert out.where
    assert (out.scale, out.where.rank) == (True, 1)
    (dw_up,) = found_in(half_precision, "e2e/apply_experts/dw_up", (1, 1.015))
    assert dw_up.where
    assert dw_up.scale
    assert dw_up.where.expert in (2, 3)


# ---- On a GPU


@pytest.mark.parametrize(
    "name", ["isolated/to_expert_major/x", "e2e/apply_experts/y", "e2e/route/dx", "e2e/combine/out"]
)
def test_the_same_is_found_in_pytorch(half_precision, monkeypatch, name):
    """As at real size on a GPU; here PyTorch has its arrays on the CPU."""
    problem, wanted = half_precision
    traces = [perfect(problem, backend, wanted) for backend in SIDES]
    traces[0].arrays[name][1][5] *= 2
    here = list(compare(problem, traces, drawn_here := blank(problem)))
    monkeypatch.setattr(arrays_of_oracle, "DEVICE", "cpu")
    monkeypatch.setattr(vectorised, "on_gpu", lambda case: True)
    there = list(compare(replace(problem, exact=NOTHING), traces, drawn_there := blank(problem)))
    assert [(c.left, c.right, name_of(c), c.ok, c.failing, c.rows, c.common, c.note) for c in here] == [
        (c.left, c.right, name_of(c), c.ok, c.failing, c.rows, c.common, c.note) for c in there
    ]
    wrong = [(a, b) for a, b in zip(here, there, strict=True) if not a.ok]
    assert {name_of(a) for a, _ in wrong} >= {name}
    for a, b in wrong:
        assert (a.where, a.got) == (b.where, b.got)
        assert [row.where for row in a.worst_rows] == [row.where for row in b.worst_rows]
    assert [m.numbers for m in drawn_here.magnitudes["torch e2e/combine/out"]] == [
        m.numbers for m in drawn_there.magnitudes["torch e2e/combine/out"]
    ]
