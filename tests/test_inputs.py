"""Inputs are repeatable, each preset has what it promises, and recordings and cases that cannot be used are refused."""

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_origin

import numpy as np
import pytest
from problems import bits, gamma, within
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.pairs import CORE, covered, pairs_in, possible_pairs, row_of
from parity.cases.parameters import parameters_of
from parity.cases.presets import PLAIN, PRESETS, USUAL
from parity.cases.recording import case_of_recording, load_recording
from parity.judge.engine import noted
from parity.oracle import reference
from parity.oracle.problem import NOTHING, Problem, draw, exact_inputs
from parity.oracle.reference import Exact
from parity.oracle.tolerances import numpy_dtype

Array = np.ndarray
SMALL = Case(ranks=2, tokens=4, width=8, hidden=4, experts=4)


def values(problem: Problem) -> dict[str, Array]:
    """Every array of a problem, and of the step beside it."""
    apart = ("case", "parameters", "exact", "second", "own_choice", "chosen_otherwise")
    own = {f.name: getattr(problem, f.name) for f in fields(problem) if f.name not in apart}
    exact = problem.exact._asdict() | problem.exact.gradients
    own |= problem.parameters.there() | {f"exact {k}": v for k, v in exact.items() if k != "gradients"}
    return own | ({f"second {k}": v for k, v in values(problem.second).items()} if problem.second else {})


def load(problem: Problem, kept: bool = True) -> Array:
    """Assignments that each rank sends to each expert, [P, E]: those kept, or all."""
    return reference.count(problem.case, problem.expert_id, problem.keep | (not kept))


# ---- Repeatable


@pytest.mark.parametrize("pattern", ["random", "zipf", "ties"])
def test_same_seed_same_bits(pattern):
    case = replace(SMALL, pattern=pattern)
    first = draw(case)
    draw(replace(case, seed=1))
    assert bits(values(draw(case))) == bits(values(first))
    assert bits(values(draw(replace(case, name="renamed")))) == bits(values(first))


def test_another_seed_draws_everything_anew():
    first, other = values(draw(SMALL)), values(draw(replace(SMALL, seed=1)))
    for name in ("x", "router", "w_gate", "w_up", "w_down", "dout"):
        assert np.intersect1d(first[name], other[name]).size == 0
    assert (first["expert_id"] != other["expert_id"]).any()


def test_what_is_dropped_decides_nothing_else():
    free, tight = (draw(replace(SMALL, capacity_factor=factor)) for factor in (None, "1/2"))
    assert free.keep.all()
    assert not tight.keep.all()
    for name in ("x", "parameters", "expert_id", "score", "dout", "y"):
        assert bits(getattr(free, name)) == bits(getattr(tight, name))


def test_saved_and_loaded(tmp_path):
    problem = draw(replace(SMALL, dtype="bfloat16"))
    problem.save(tmp_path / "problem")
    again = Problem.load(tmp_path / "problem")
    assert again.case == problem.case
    assert again.x.dtype == problem.x.dtype
    assert bits(values(again)) == bits(values(replace(problem, exact=NOTHING)))  # which runners have no use for


# ---- Presets


@pytest.fixture(scope="module")
def presets() -> dict[str, Problem]:
    return {name: draw(case) for name, case in PRESETS.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_draws(presets, name):
    problem, case = presets[name], PRESETS[name]
    assert problem.case == case
    assert case.name == name
    P, T, D, F, E, K = case.ranks, case.tokens, case.width, case.hidden, case.experts, case.top_k
    shapes = {"x": (P, T, D), "router": (D, E), "w_up": (E, D, F), "w_down": (E, F, D)}
    shapes |= {"w_gate": (E, D, F)} if case.gated else {}
    shapes |= {"dout": (P, T, D), "expert_id": (P, T, K), "keep": (P, T, K), "score": (P, T, K), "y": (P, T, K, D)}
    found = values(problem)
    assert {name: found[name].shape for name in shapes} == shapes
    learned = {one.name: case.dtype_of(one.dtype) for one in parameters_of(case)}
    assert {name: found[name].dtype for name in learned} == {name: numpy_dtype(of) for name, of in learned.items()}
    assert problem.parameters.there().keys() == learned.keys()
    assert {found[name].dtype for name in ("x", "dout", "y", "dy", "dx_rows")} == {numpy_dtype(case.dtype)}
    wide = "float64" if case.dtype == "float64" and case.router_dtype != "float32" else "float32"
    wide = case.dtype if case.cast_scores else wide
    assert {found[name].dtype for name in ("score", "dscore", "aux")} == {numpy_dtype(wide)}
    assert all(np.isfinite(a.astype(np.float64)).all() for a in found.values())
    assert problem.expert_id.dtype == np.int32
    real = np.arange(T) < np.array([case.tokens_of(p) for p in range(P)])[:, None]
    assert (problem.expert_id[~real] == -1).all()
    in_order = np.sort(problem.expert_id[real], axis=-1)
    assert (in_order[..., 1:] != in_order[..., :-1]).all()

    x, w, _ = exact_inputs(problem)  # the ids are the router's own choice
    logits, _ = reference.route(case, x, w, Exact())
    by = reference.scores_to_choose_by(case, logits)
    np.testing.assert_array_equal(problem.expert_id[real], reference.select(case, by, w)[real])
    if case.pattern != "ties" and case.groups == 1 and not case.selection_bias:  # and no close one
        best = np.sort(logits, axis=-1)[..., ::-1]
        assert np.diff(best[..., : K + 1]).max(initial=-1) < -1e-4


def test_balanced(presets):
    assert (load(presets["balanced"]) == 16 * 2 / 8).all()


def test_zipf(presets):
    total_E = load(presets["zipf"]).sum(axis=0)
    assert total_E[0] == total_E.max()
    assert total_E[0] > 2 * total_E.mean()
    assert total_E[:2].sum() > total_E[2:].sum()
    assert (load(presets["p8"]).sum(axis=0)[:2] > 2 * 8 * 8 * 2 / 16).all()


def test_one_expert(presets):
    assert (presets["one-expert"].expert_id[..., 0] == 0).all()
    assert set(presets["one-expert"].expert_id[..., 1].flat) == set(range(1, 8))


def test_empty_expert(presets):
    assert (load(presets["empty-expert"]).sum(axis=0) == 0).tolist() == [g == 4 for g in range(8)]


def test_idle_rank(presets):
    at_rank = load(presets["idle-rank"]).reshape(4, 4, 2).sum(axis=(0, 2))
    assert (at_rank == 0).tolist() == [False, False, True, False]


def test_stay_home(presets):
    sent = load(presets["stay-home"]).reshape(4, 4, 2).sum(axis=2)  # from rank, to rank
    assert (sent > 0).tolist() == [[True, False, False, False], *[[False, True, True, True]] * 3]


def test_ties(presets):
    problem = presets["ties"]
    x, w, _ = exact_inputs(problem)
    best = np.sort(x @ w.router, axis=-1)[..., ::-1]
    assert np.array_equal(best, best.round())
    tied = best[..., :-1] == best[..., 1:]
    assert tied[..., 0].any()  # which comes first
    assert tied[..., 1].any()  # which comes at all


def test_sizes(presets):
    assert presets["k1"].case.top_k == 1
    assert (np.sort(presets["k-all"].expert_id) == np.arange(8)).all()
    assert presets["t1"].x.shape[1] == 1
    assert [presets[f"p{P}"].case.ranks for P in (1, 4, 8)] == [1, 4, 8]


def assert_scores_sum_to(problem: Problem, scale: float) -> None:
    """As far as float32 scores can: each is rounded once."""
    total = problem.score.astype(np.float64).sum(axis=-1)
    within(total, np.full(total.shape, scale), scale * gamma(1, "float32"))


def test_sigmoid(presets):
    problem = presets["sigmoid"]
    assert_scores_sum_to(problem, 2.5)
    logits = (problem.x.astype(np.float64) @ problem.parameters.router)[0, 0, problem.expert_id[0, 0]]
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(problem.score[0, 0], 2.5 * expected / expected.sum(), rtol=gamma(1, "float32"))


DROPPING = [name for name in PRESETS if "drop" in name]
DROPPING += ["under-bound", "pydoc", "capacity-exact", "wide", "groups-at-zero"]


@pytest.mark.parametrize("name", PLAIN)
def test_who_drops(presets, name):
    problem = presets[name]
    assert problem.keep[problem.expert_id >= 0].all() == (name not in DROPPING)


@pytest.mark.parametrize("name", PRESETS)
def test_a_bin_keeps_as_many_as_it_holds(presets, name):
    problem, case = presets[name], PRESETS[name]
    bin_of = problem.expert_id // (case.experts // case.bins)
    for ids, keep in zip(bin_of, problem.keep, strict=True):
        wanted, kept = (np.bincount(a.reshape(-1), minlength=case.bins) for a in (ids[ids >= 0], ids[keep]))
        assert kept.tolist() == np.minimum(wanted, case.capacity).tolist()


def test_at_the_bound_and_under_it(presets):
    """Every rank sends its 16 rows to one expert."""
    at, under = presets["at-bound"], presets["under-bound"]
    assert (at.case.capacity, under.case.capacity) == (16, 15)
    assert load(at).max(axis=1).tolist() == [16] * 4
    assert (~under.keep).sum(axis=(1, 2)).tolist() == [1] * 4
    assert not under.keep[:, -1].any()


def test_a_capacity_that_is_exact(presets):
    """In float32 it is one row more, in which something would be kept that is not."""
    problem = presets["capacity-exact"]
    one_more = replace(problem.case, capacity_factor=str(Fraction(16 * 4, 25 * 2)))
    assert (problem.case.capacity, one_more.capacity) == (15, 16)
    assert np.ceil(np.float32(1.2) * np.float32(50) / np.float32(4)) == 16
    more = reference.keep_within_capacity(one_more, problem.expert_id, problem.score)
    assert more.sum() > problem.keep.sum()


def test_bins_of_experts_have_room_and_none_is_full(presets):
    assert presets["expert-bins"].case.capacity == 16
    assert load(presets["expert-bins"]).max() < 16
    assert load(presets["expert-bins"]).min() == 0


@pytest.mark.parametrize("per", ["rank", "expert"])
def test_heavy_drops_by_each_priority(presets, per):
    token, choice, score = (presets[f"drop-{per}-{priority}"] for priority in ("token", "choice", "score"))
    for problem in (token, choice, score):
        assert 0.2 < (~problem.keep).mean() < 0.7
        assert (load(problem, kept=False) - load(problem)).sum(axis=1).min() > 0  # on every rank
        assert (problem.keep.any(axis=-1) & ~problem.keep.all(axis=-1)).any()  # a token that lost a part
        assert (~problem.keep).all(axis=-1).any()  # and one that lost all
    assert bits(token.expert_id) == bits(choice.expert_id) == bits(score.expert_id)
    assert len({bits(problem.keep)[0] for problem in (token, choice, score)}) == 3


def test_dtypes(presets):
    assert [presets[name].case.dtype for name in ("bfloat16", "bfloat16-drop", "pydoc-bfloat16", "float16")] == [
        *["bfloat16"] * 3, "float16"
    ]  # fmt: skip
    assert draw(replace(SMALL, dtype="float64")).score.dtype == np.float64


def test_a_trained_router(presets):
    """What was recorded, not what was drawn; its load is not even."""
    problem, recorded = presets["pydoc"], load_recording(PRESETS["pydoc"])
    assert recorded.keys() == {"expert_id", "x", "router", "w_gate", "w_up", "w_down"}
    for name, a in recorded.items():
        np.testing.assert_array_equal(values(problem)[name], a)
    total_E = load(problem, kept=False).sum(axis=0)
    assert total_E.max() > 1.5 * total_E.mean()


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "float64"}])
def test_the_order_of_a_sum_shows(changes):
    problem = draw(replace(SMALL, top_k=3, capacity_factor="3/4", **changes))
    rows, in_order = problem.order_probe()
    assert rows.dtype == numpy_dtype(problem.case.dtype)
    first, second, third = np.moveaxis(rows.astype(problem.case.accum_dtype) * problem.keep[..., None], 2, 0)
    assert bits((first + second + third).astype(np.float64)) == bits(in_order)
    whole = problem.keep.all(axis=-1)
    assert 0 < whole.sum() < whole.size
    assert (in_order[whole] == 2.0 ** (-39 if problem.case.dtype == "float64" else -10)).all()
    assert not (third + first + second)[whole].any()
    assert not (second + third + first)[whole].any()


def test_steps_between_change_tokens_and_experts():
    problem = draw(SMALL)
    elsewhere, same_experts = problem.steps_between()
    assert (elsewhere.x == -problem.x).all()
    assert (elsewhere.expert_id == (problem.expert_id + 1) % 4).all()
    assert (same_experts.x == -problem.x).all()
    assert (same_experts.expert_id == problem.expert_id).all()


# ---- Recordings

IDS = np.array([[0, 1], [2, 3], [1, 0], [3, 2], [0, 3]])


@pytest.fixture
def record(tmp_path) -> Callable[..., Case]:
    """Writes a recording, with five tokens' ids unless given, and returns the case that it fixes on two ranks."""

    def write(metadata: dict[str, str] | None = None, **tensors: Array | None) -> Case:
        held = {name: np.ascontiguousarray(a) for name, a in ({"expert_id": IDS} | tensors).items() if a is not None}
        save_file(held, tmp_path / "recording.safetensors", metadata=metadata)
        return case_of_recording(Case(ranks=2, tokens=0, recording=str(tmp_path / "recording.safetensors")))

    return write


def recorded_layer(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (5, 6), "router": (6, 4), "w_gate": (4, 6, 3), "w_up": (4, 6, 3), "w_down": (4, 3, 6)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_ids_alone(record, dtype):
    case = record(expert_id=IDS.astype(dtype))
    assert (case.tokens, case.top_k, case.experts, case.width) == (2, 2, 4, 32)
    problem = draw(case)
    assert problem.expert_id.tolist() == IDS[:4].reshape(2, 2, 2).tolist()  # the fifth is left over
    x, w, _ = exact_inputs(problem)  # tokens are made that choose them
    np.testing.assert_array_equal(reference.select(case, x @ w.router, w), problem.expert_id)
    assert draw(replace(case, tokens=1)).expert_id.tolist() == IDS[:2].reshape(2, 1, 2).tolist()


def test_a_whole_layer(record):
    tensors = recorded_layer()
    case = record({"score_function": "sigmoid", "renormalize": "True", "scale": "2.5"}, **tensors)
    assert (case.width, case.hidden, case.experts) == (6, 3, 4)
    assert (case.score_function, case.renormalize, case.scale) == ("sigmoid", True, 2.5)
    problem = draw(case)
    for name in ("router", "w_gate", "w_up", "w_down"):
        np.testing.assert_array_equal(values(problem)[name], tensors[name])
    np.testing.assert_array_equal(problem.x, tensors["x"][:4].reshape(2, 2, 6))
    assert problem.expert_id.tolist() == IDS[:4].reshape(2, 2, 2).tolist()  # whatever this router would choose
    assert_scores_sum_to(problem, 2.5)


def test_experts_that_nobody_chose(record):
    case = record({"n_experts": "6"})
    assert case.experts == 6
    assert load(draw(case)).sum(axis=0).tolist() == [2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"expert_id": None, "x": np.zeros((5, 6))},
            r"needs a tensor expert_id of integers, \[M, K\], and has x of float64",
        ),
        ({"expert_id": IDS.astype(np.float32)}, r"needs a tensor expert_id of integers"),
        ({"expert_id": IDS[0]}, r"expert_id has shape \(2,\), expected \[M K\]"),
        ({"x": np.zeros((5, 6))}, "x and router come together or not at all"),
        ({"router": np.zeros((6, 4))}, "x and router come together or not at all"),
        ({"x": np.zeros((1, 5, 6)), "router": np.zeros((6, 4))}, r"x has shape \(1, 5, 6\), expected \[M D\]"),
        ({"x": np.zeros((4, 6)), "router": np.zeros((6, 4))}, r"x has shape \(4, 6\), but M is 5"),
        ({"x": np.zeros((5, 6)), "router": np.zeros((7, 4))}, r"router has shape \(7, 4\), but D is 6"),
        ({"w_gate": np.zeros((4, 6, 3)), "w_down": np.zeros((4, 6, 3))}, r"w_down has shape .*, but F is 3"),
        ({"score": np.ones((5, 2))}, "it has scores, which are computed from x and router"),
        ({"expert_id": IDS + 1}, "--experts 5 do not divide over --ranks 2: use a multiple"),
    ],
)
def test_a_recording_of_the_wrong_form(record, tensors, message):
    with pytest.raises(ValueError, match=message):
        record(**tensors)


@pytest.mark.parametrize(
    ("metadata", "ids", "message"),
    [
        ({"n_experts": "2"}, IDS, "expert ids run from 0 to 3 with 2 experts: set n_experts in the metadata"),
        ({"n_experts": "4"}, IDS - 1, "expert ids run from -1 to 2 with 4 experts"),
        (None, np.array([[0, 1], [3, 3], [1, 0], [3, 2]]), r"token 1 chose experts \[3 3\]: they must differ"),
    ],
)
def test_ids_that_cannot_be(record, metadata, ids, message):
    case = record(metadata, expert_id=ids)
    with pytest.raises(ValueError, match=message):
        draw(case)


def test_more_tokens_than_recorded(record):
    with pytest.raises(ValueError, match="--tokens 3 on --ranks 2, but the recording has 5 tokens"):
        draw(replace(record(), tokens=3))


def test_a_case_that_is_not_the_recordings(record):
    with pytest.raises(ValueError, match=r"recording.safetensors: --top-k is 1, but the recording has 2$"):
        draw(replace(record(), top_k=1))
    with pytest.raises(ValueError, match=r"--recording pydoc: --experts is 32, but the recording has 16$"):
        draw(replace(PRESETS["pydoc"], experts=32))


def test_no_recording(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / "junk"):
        Path(tmp_path / "junk").write_bytes(b"junk")
        with pytest.raises(ValueError, match=r"--recording .*cannot read .* as safetensors"):
            draw(Case(recording=str(path)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ".",
            r"and this is a folder. For a layer of a checkpoint use --checkpoint .*gpt_oss$",
        ),
        ("config.json", "this is JSON. For a layer of a checkpoint use --checkpoint .*gpt_oss$"),
        (
            "model*.safetensors",
            r"has .*layers\..*: it is part of a checkpoint. For a layer of it use --checkpoint .*gpt_oss",
        ),
    ],
)
def test_a_checkpoint_that_is_taken_for_a_recording(given, message):
    path = (
        next((Path(__file__).parent / "checkpoints" / "gpt_oss").glob(given))
        if given != "."
        else (Path(__file__).parent / "checkpoints" / "gpt_oss")
    )
    with pytest.raises(ValueError, match=message):
        case_of_recording(Case(ranks=1, tokens=0, recording=str(path)))


WIDE = {"w_gate": np.zeros((4, 6, 3)), "w_up": np.zeros((4, 6, 3))}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (WIDE | {"w_up": np.zeros((4, 3, 6))}, r"w_up .* D is 6 in w_gate, so axis 1 should be 6, not 3: .*\[E D F\]"),
        (WIDE | {"w_down": np.zeros((4, 6, 3))}, "so axis 1 should be 3, not 6: .* the other way round"),
        (WIDE | {"w_down": np.zeros((4, 3, 7))}, r"so axis 2 should be 6, not 7: expected \[E F D\]$"),
        (WIDE | {"b_up": np.zeros((4, 6))}, r"F is 3 in w_gate, so axis 1 should be 3, not 6: expected \[E F\]$"),
        (recorded_layer() | {"x": np.ones((5, 6), np.int32)}, "x is of int32: it must be floating point"),
        (recorded_layer() | {"router": np.ones((6, 4), bool)}, "router is of bool: it must be floating point"),
        ({"expert_id": np.where(np.eye(5, 2, dtype=int), 10**6, IDS)}, "chose expert 1000000, the largest of 5 ids"),
        ({"expert_id": IDS + np.eye(5, 2, dtype=int) * 96}, "nothing says how many experts there are: set n"),
    ],
)  # fmt: skip
def test_a_recording_with_a_mistake_in_it(record, tensors, message):
    with pytest.raises(ValueError, match=message):
        record(**tensors)


def test_many_experts_of_which_few_are_chosen(record):
    """As the metadata say."""
    assert record({"n_experts": "100"}, expert_id=IDS + np.eye(5, 2, dtype=int) * 96).experts == 100


def test_recorded_experts_that_the_router_does_not_choose(record):
    """Are replayed, and the report says of how many tokens."""
    tensors = recorded_layer()
    problem = draw(record(**tensors))
    own = reference.select(problem.case, problem.x.astype(float) @ tensors["router"], exact_inputs(problem)[1])
    n = int((np.sort(own) != np.sort(problem.expert_id)).any(axis=-1).sum())
    assert n > 0
    (said,) = noted(problem)
    assert said.startswith(f"in {n} of 4 tokens the recorded experts are not those that the recording's router chooses")
    assert noted(draw(record(**tensors, expert_id=np.concatenate([own.reshape(4, 2), IDS[4:]])))) == []
    assert noted(draw(record())) == []
    assert noted(draw(PRESETS["pydoc"])) == []


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"renormalise": "true"}, {}, "its metadata has renormalise: should that be renormalize"),
        ({"score_function": "relu"}, {}, "score_function 'relu'.*softmax or sigmoid"),
        ({"renormalize": "yes"}, {}, "renormalize 'yes'.*true or false"),
        ({"scale": "abc"}, {}, "scale 'abc'.*a number"),
        ({"n_experts": "many"}, {}, "n_experts 'many'.*an integer"),
        ({"n_experts": "8"}, recorded_layer(), "n_experts is 8, but its tensors have 4 experts"),
        ({}, {"expert_id": np.zeros((0, 2), np.int64)}, r"expert_id has shape \(0, 2\)"),
        ({}, recorded_layer() | {"x": np.full((5, 6), np.nan)}, "x holds numbers that are not finite"),
    ],
)
def test_a_recording_that_says_what_cannot_be(record, metadata, tensors, message):
    with pytest.raises(ValueError, match=f"--recording .*{message}"):
        record(metadata, **tensors)


# ---- Cases that cannot exist


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"--{name.replace('_', '-')} is 0: it must be at least 1")
          for name in ("ranks", "width", "hidden", "experts", "top_k", "align", "groups", "top_groups")),
        *(({name: -1}, f"--{name.replace('_', '-')} is -1: it cannot be negative")
          for name in ("tokens", "shared_hidden", "epsilon")),
        ({"seed": -1}, "--seed is -1: it cannot be negative"),
        ({"experts": 6}, "--experts 6 do not divide over --ranks 4: use a multiple"),
        ({"top_k": 9}, "--top-k is 9 with --experts 8: a token cannot choose more"),
        *(({name: float(value)}, f"--{name.replace('_', '-')} is {value}: it must be finite")
          for name in ("scale", "up_offset", "epsilon") for value in ("inf", "nan")),
        ({"groups": 3}, "--groups 3 must divide --experts 8"),
        ({"groups": 2, "top_groups": 3}, "--groups 2 .* and --top-groups 3 cannot be more than --groups"),
        ({"groups": 4, "top_k": 3}, "--top-k 3 with --top-groups 1 of 2 experts each: use more or larger groups"),
        ({"groups": 8, "top_k": 1}, "--top-k 1 with --top-groups 1 of 1 experts each: .* at least two experts in each"),
        ({"score_on": "input"}, "--score-on input with --top-k 2: a token has one input, so use --top-k 1"),
        ({"score_on": "input", "top_k": 1, "expert_bias": True}, "--score-on input with --expert-bias: a dropped"),
        *(({"clamp": float(value)}, f"--clamp is {value}: it must be positive; leave it out for none")
          for value in ("0.0", "-7.0", "inf", "nan")),
        ({"gated": False, "clamp": 7.0}, "--clamp and --up-offset need experts with a gate: leave them out"),
        ({"gated": False, "up_offset": 1.0}, "--clamp and --up-offset need experts with a gate: leave them out"),
        ({"shared_score": True}, "--shared-score needs a shared expert: give its hidden width with --shared-hidden"),
        ({"shared_hidden": 4, "uneven": True}, "--shared-hidden with --uneven: in JAX, tokens that are padding"),
        *(({"capacity_factor": factor}, f"--capacity-factor is '{factor}': it must be finite and positive")
          for factor in ("0", "-1.5", "1/0", "nan", "inf", "plenty", "")),
        ({"pattern": "empty_expert", "top_k": 8}, "--pattern empty_expert .* leaves fewer than --top-k 8"),
        ({"pattern": "idle_rank", "top_k": 7}, "--pattern idle_rank with --experts 8 .* leaves fewer than --top-k 7"),
        ({"pattern": "idle_rank", "ranks": 1}, "--pattern idle_rank .* leaves fewer than"),
        ({"pattern": "stay_home", "top_k": 3}, "--pattern stay_home .* leaves fewer than"),
    ],
)  # fmt: skip
def test_a_case_that_cannot_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Case(), **changes)


@pytest.mark.parametrize(
    ("pattern", "ranks", "top_k"),
    [("empty_expert", 4, 7), ("idle_rank", 4, 6), ("idle_rank", 2, 4), ("stay_home", 4, 2)],
)
def test_a_case_that_just_exists(pattern, ranks, top_k):
    draw(replace(Case(), pattern=pattern, ranks=ranks, top_k=top_k, tokens=2))


@pytest.mark.parametrize("name", [f.name for f in fields(Case) if get_origin(f.type) is Literal])
def test_a_choice_that_is_none(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is 'other': it must be one of"):
        replace(Case(), **{name: "other"})


def test_pairs_of_values_that_no_case_has_are_named():
    n, missing = covered([PRESETS["zipf"], PRESETS["k1"]], PRESETS.values())
    assert n + len(missing) == len(possible_pairs())
    assert "ranks 1 with top_k 2" in missing
    assert "ranks 4 with top_k 2" not in missing
    assert pairs_in(map(row_of, PRESETS.values())) >= possible_pairs()
    assert pairs_in(map(row_of, (PRESETS[name] for name in USUAL)), CORE) >= possible_pairs(CORE)


@pytest.mark.parametrize("name", [name for name, case in PLAIN.items() if case.selection_bias])
def test_a_selection_bias_decides(name):
    """A layer that leaves it out chooses other experts for some token: not in another order only."""
    problem = draw(PLAIN[name])
    x, learned, _ = exact_inputs(problem)
    logits, _ = reference.route(problem.case, x, learned, Exact())
    by = reference.scores_to_choose_by(problem.case, logits)
    without = reference.select(problem.case, by, learned._replace(selection_bias=None))
    assert (np.sort(without) != np.sort(problem.expert_id)).any()
