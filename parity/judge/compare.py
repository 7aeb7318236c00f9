"""Trace against oracle, and trace against trace: bitwise where data moves, within an allowance per row elsewhere."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.judge.picture import Magnitudes, Picture
from parity.oracle import reference, vectorised
from parity.oracle.arrays import put, put_beside, space_of, to_numpy
from parity.oracle.expected import Expected, Oracle, in_groups, mapped
from parity.oracle.problem import Problem, exact_inputs, parameters_in_float64
from parity.oracle.quantities import OUTSIDE
from parity.oracle.reference import Exact
from parity.oracle.rows import PADDING, Table, identity, lay_out
from parity.oracle.tolerances import allowance, allowed, numpy_dtype, slope
from parity.run.trace import Trace

Array = np.ndarray


class Where(msgspec.Struct, omit_defaults=True):
    """The worst element: rank that holds it, row identity, expert, slot in that rank's array, and place in the row."""

    rank: int | None = None
    """The rank that holds the row."""
    source_rank: int | None = None
    """The rank that holds the row's token."""
    token: int | None = None
    """The token's number on its source rank."""
    k: int | None = None
    """Which of the token's experts it is, from 0."""
    expert: int | None = None
    """The expert's number among all experts."""
    slot: int | None = None
    """The row's place in its rank's array."""
    index: list[int] = []
    """The place of the number within the row."""


class Row(msgspec.Struct, omit_defaults=True):
    """A failing row, by its worst number."""

    where: Where
    """Which row, and which of its numbers."""
    got: float
    """The number that the backend has."""
    expected: float
    """The number that it should be."""
    error: float
    """Their distance."""
    allowed: float
    """How large that may be."""


class Check(msgspec.Struct, omit_defaults=True, tag_field="kind", tag="comparison"):
    """One array of one case, compared with one other."""

    case: str
    """The case's name."""
    mode: str
    """How the array came about: isolated (a stage fed the oracle's values), e2e (the whole layer), second (a second
    step beside the first), repeat (numbers that differ between two runs)."""
    stage: str
    """The stage that makes the array."""
    value: str
    """The array's name within its stage."""
    left: str
    """The backend that is judged."""
    right: str
    """What it is compared with: the oracle, or another backend."""
    ok: bool
    """Whether every row is within its allowance."""
    bitwise: bool
    """Whether rows must be equal bit for bit."""
    rows: int
    """Number of rows compared."""
    failing: int = 0
    """Number of rows that fail."""
    worst: float = 0.0
    """The largest error over its allowance; for bitwise arrays 0 or infinity."""
    error: float = 0.0
    """The error of the worst number."""
    allowed: float = 0.0
    """The allowance of the worst number."""
    got: float | None = None
    """The worst number as the backend has it."""
    expected: float | None = None
    """The worst number as it should be."""
    where: Where | None = None
    """Which row and number is worst; null where the array as a whole fails."""
    common: list[str] = []
    """What the failing rows, and not all rows, have in common."""
    worst_rows: list[Row] = []
    """The failing rows, worst first, 20 at most."""
    raised: bool = False
    """Whether this stands for an exception or a crash of the backend."""
    scale: bool = False
    """Whether this compares the common factor by which all numbers of a rank or an expert are off."""
    note: str = ""
    """Why an array could not be compared row by row, such as an exception or a wrong shape."""


def largest_error(checks: Iterable[Check]) -> float:
    """The largest error over its allowance of arrays that are not compared bit for bit; NaN where there are none."""
    return max((check.worst for check in checks if not check.bitwise), default=math.nan)


# How many failing rows of one array a report lists.
LISTED = 20


@dataclass(frozen=True)
class Canonical:
    """An array in the form of its `Expected`, and which of its rows the trace has."""

    held: Array  # the array as ranks hold it, rows of all ranks concatenated
    at: Array | None  # position of each row in `held`
    present: Array  # mask over the leading axis
    slots: Array | None = None  # slot of each row on the rank that held it
    holders: Array | None = None  # rank that held each row

    def rows(self, some: Array) -> Array:
        """The rows at these positions of the leading axis."""
        return self.held[some] if self.at is None else lay_out(self.held, [self.at[some]], 0)[0]


class MismatchError(Exception):
    """An array cannot be compared at all: missing, or of another shape or dtype."""


def canonical(
    P: int, per_rank: list[Array] | None, expected: Expected, table: Table, numbers: list[Array] | None = None,
    inside: bool = False,
) -> Canonical:  # fmt: skip
    """Strip padding and layout from a trace's array; `numbers` are the ids of its rows, if the layout does not say.

    Values recorded inside a layer may have any float dtype: the allowance is the same.

    Raises MismatchError when it is missing, has a shape or dtype of its own, or its padding is not what is promised.
    """
    if per_rank is None:
        raise MismatchError("missing from the trace")
    dtypes = {a.dtype for a in per_rank}
    wanted = {np.dtype("int32"), np.dtype("int64")} if expected.dtype == "int" else {numpy_dtype(expected.dtype)}
    any_float = inside and expected.dtype != "int" and not any(np.issubdtype(dtype, np.integer) for dtype in dtypes)
    if not dtypes <= wanted and not any_float:
        raise MismatchError(f"dtype is {', '.join(map(str, dtypes))}, expected {expected.dtype}")
    if len(per_rank) != P and not (expected.quantity.summed and len(per_rank) == 1):
        raise MismatchError(f"{len(per_rank)} arrays, expected one for each of {P} ranks")
    arrays = [a.astype(np.int64) for a in per_rank] if expected.dtype == "int" else per_rank
    axes, shape = "" if expected.mode == "repeat" else expected.axes[:1], expected.shape
    axes = "summed" if expected.quantity.summed and axes else axes
    if axes == "A":
        return _canonical_rows(arrays, expected, table[expected.quantity.order], numbers, inside)
    each = {"": (), "P": shape[1:], "E": (shape[0] // P, *shape[1:])}.get(axes, shape)
    if any(a.shape != each for a in arrays):
        raise MismatchError(f"shapes are {[a.shape for a in arrays]}, expected {P} x {each}")
    if axes == "":
        values = np.abs(arrays).sum(keepdims=True)
    elif axes == "E":
        values = np.concatenate(arrays)
    elif axes == "P":
        values = np.stack(arrays)
    else:
        if any(not np.array_equal(a, arrays[0], equal_nan=True) for a in arrays):
            raise MismatchError("ranks disagree on a value that is the same for all of them")
        values = arrays[0]
    return Canonical(values, None, np.ones(shape[0], bool))


def _canonical_rows(
    arrays: list[Array], expected: Expected, order: list[Array], numbers: list[Array] | None, inside: bool
) -> Canonical:
    quantity, shape = expected.quantity, expected.shape
    if numbers is None and inside:
        raise MismatchError("nothing says which rows these are")
    order = order if numbers is None else numbers
    if any(not np.issubdtype(rows.dtype, np.signedinteger) or rows.ndim != 1 for rows in order) or any(
        rows.size and (rows.min() < PADDING or rows.max() >= shape[0]) for rows in order
    ):
        raise MismatchError(f"the numbers of its rows must be integers below {shape[0]}, and {PADDING} for padding")
    if [a.shape for a in arrays] != [(rows.size, *shape[1:]) for rows in order]:
        raise MismatchError(
            f"shapes are {[a.shape for a in arrays]}, expected {[(rows.size, *shape[1:]) for rows in order]}"
        )
    at, slots, holders = np.full((3, shape[0]), -1)
    first = np.cumsum([0, *(rows.size for rows in order)])
    for rank, (a, rows) in enumerate(zip(arrays, order, strict=True)):
        real = np.flatnonzero(rows != PADDING)
        seen_before = (at[rows[real]] >= 0).any()
        at[rows[real]], slots[rows[real]], holders[rows[real]] = first[rank] + real, real, rank
        if seen_before or (slots[rows[real]] != real).any():  # a repeated row keeps only its last slot
            raise MismatchError(f"a row is there twice, the second time on rank {rank}")
        promised = (
            quantity.padding(expected.mode, expected.case, rows.size, expected.layout) if numbers is None else None
        )
        if promised is None or real.size == rows.size:
            continue
        padding = np.flatnonzero(rows == PADDING)
        wrong = padding[(a[padding] != promised).any(axis=tuple(range(1, a.ndim)))]
        if wrong.size:
            raise MismatchError(
                f"padding is not {promised or 'zero'} in {wrong.size} slots of rank {rank}; "
                f"the first, {wrong[0]}, holds {float(a[wrong[0]].flat[0])}"
            )
    held = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return Canonical(held, at, at >= 0, slots, holders)


def _all_there(problem: Problem, have: Canonical) -> None:
    """Raise MismatchError if a row that is not dropped is missing."""
    if have.slots is None:
        return
    missing = np.flatnonzero(~have.present & problem.keep.reshape(-1) & (problem.expert_id.reshape(-1) >= 0))
    if missing.size:
        p, t, k = identity(problem.case, missing[0])
        raise MismatchError(f"{missing.size} rows are missing; the first is that of source rank {p}, token {t}, k {k}")


def compare(
    problem: Problem, traces: list[Trace], picture: Picture | None = None, oracle: Oracle | None = None
) -> Iterator[Check]:
    """Compare every array that a backend declares with the oracle, and every array that two traces share.

    Arrays are compared one at a time, to save memory. Fills in `picture`. `oracle` is an oracle of this problem that
    has made its draws already.
    """
    oracle = oracle or Oracle(problem)
    oracle.measure({name for trace in traces for name in trace.backend.provides})
    sides = [
        _Side(trace, oracle.expected(backend.provides, backend.layout), oracle.exact.table(backend.layout))
        for trace in traces
        for backend in [trace.backend]
    ]
    against_the_oracle: dict[str, dict[str, Check]] = {side.name: {} for side in sides}
    scales: dict[str, list[Check]] = {side.name: [] for side in sides}
    against: dict[tuple[str, str], list[Check]] = {(a.name, b.name): [] for a, b in combinations(sides, 2)}

    def of(name: str) -> tuple[dict[str, list[Check]], dict[tuple[str, str], Check]]:
        """Checks of each side against the oracle, and of each pair of sides."""
        found: dict[str, Canonical] = {}
        checks: dict[str, list[Check]] = {}
        for side in sides:
            if name in side.expected:
                checks[side.name] = _of_side(problem, side, name, found, picture)
        return checks, {
            (a.name, b.name): check
            for a, b in combinations(sides, 2)
            if a.name in found and b.name in found
            if (check := _of_two(problem, name, a, b, found))
        }

    names = list(dict.fromkeys(name for side in sides for name in side.expected))
    for name, (checks, pairs) in zip(names, mapped(problem.case, of, names), strict=True):
        for side, (check, *more) in checks.items():
            against_the_oracle[side][name] = check
            scales[side] += more
        for pair, check in pairs.items():
            against[pair].append(check)
    for side in sides:
        yield from (against_the_oracle[side.name][name] for name in side.expected)
        if side.trace.backend.layout != "opaque":  # arrays of opaque layers may differ in dtype
            yield from _moves_its_own_rows(problem, side)
        yield from scales[side.name]
    for checks in against.values():
        yield from checks


@dataclass(frozen=True)
class _Side:
    """A trace, what it should hold, and where its rows lie."""

    trace: Trace
    expected: dict[str, Expected]
    table: Table

    @property
    def name(self) -> str:
        return self.trace.backend.name

    def canonical(self, problem: Problem, name: str) -> Canonical:
        """One array of the trace in canonical form. Raises MismatchError if it cannot be compared."""
        want, arrays = self.expected[name], self.trace.arrays
        inside = self.trace.backend.layout == "opaque" and name not in OUTSIDE
        numbers = arrays.get(f"rows/{want.quantity.name}")
        have = canonical(problem.case.ranks, arrays.get(name), want, self.table, numbers, inside)
        _all_there(problem, have)
        return have


def _of_side(
    problem: Problem, side: _Side, name: str, found: dict[str, Canonical], picture: Picture | None
) -> list[Check]:
    """Compare an array with the oracle, and, if its rows are right, its scale. Adds the array to `found`."""
    want = side.expected[name]
    try:
        have = side.canonical(problem, name)
    except MismatchError as mismatch:
        return [_failed(problem, want, side.name, "oracle", str(mismatch))]
    if want.quantity.judged == "choice":
        return [choice_of_experts(problem, want, side.name, have.held)]
    found[side.name] = have
    checks = [_judge(problem, want, side.name, "oracle", have, have.present, picture=picture)]
    if checks[-1].ok and want.slope is not None:  # failing rows describe the error better than its scale
        values = put_beside(have.held, want.values)
        checks.append(_scale(problem, want, side.name, values))
        if checks[-1].ok and want.choices is not None:
            checks.append(_share_of_choices(problem, want, side.name, values))
    return checks


def _of_two(problem: Problem, name: str, a: _Side, b: _Side, found: dict[str, Canonical]) -> Check | None:
    """Compare the rows that both sides have. Each may be off by one allowance, so they may differ by two.

    Returns None if layouts differ or one side dropped rows: each was compared with what the oracle expects of it.
    """
    want, left, right = a.expected[name], found[a.name], found[b.name]
    if want.yardstick is None:
        values, other = want.values, b.expected[name].values
        if not space_of(values).all(values == other):
            return None
    return _judge(problem, want, a.name, b.name, left, left.present & right.present, other=right)


def _moves_its_own_rows(problem: Problem, side: _Side) -> Iterator[Check]:
    """Check that stages 7 and 8 move exactly the bits that stage 6 of the same run made."""
    for before, after in (("apply_experts", "to_rank_major"), ("to_rank_major", "return_tokens")):
        if f"e2e/{before}/y" not in side.expected or f"e2e/{after}/y" not in side.expected:
            continue
        try:
            a, b = (side.canonical(problem, f"e2e/{stage}/y") for stage in (before, after))
        except MismatchError:  # another check reports this already
            continue
        want = side.expected[f"e2e/{after}/y"]
        yield _judge(problem, want, side.name, f"its own {before}", b, a.present & b.present, other=a, bitwise=True)


def _scale(problem: Problem, want: Expected, backend: str, values: Array) -> Check:
    """Compare the common factor of all numbers, of each rank and of each expert with 1; every row may be allowed.

    If only some ranks or experts are off, the check names the worst.
    """
    assert want.slope is not None
    with np.errstate(invalid="ignore"):
        pairs = zip(in_groups(want.axes, values), in_groups(want.axes, want.values), strict=True)
        found = np.concatenate([to_numpy(slope(got, exact)) for got, exact in pairs])
    off = found - 1
    ratio = _over(off, want.slope)
    bad = ratio > 1
    some = bad[1:].any() and not bad[1:].all()
    worst = 1 + int(ratio[1:].argmax()) if some else int(ratio.argmax())
    group = worst - 1 if worst else None
    where = Where(rank=group) if want.axes[0] == "P" else Where(expert=group)
    return _factor(problem, want, backend, off, want.slope, worst, where)


def _share_of_choices(problem: Problem, want: Expected, backend: str, values: Array) -> Check:
    """Compare with 1 the factor of what each of the K choices adds to the output, over all tokens."""
    assert want.choices is not None
    assert want.share is not None
    off = to_numpy(want.choices @ (values - want.values).reshape(-1))
    k = int(_over(off, want.share).argmax())
    return _factor(problem, want, backend, off, want.share, k, Where(k=k))


def _over(off: Array, allowed: Array) -> Array:
    """How far factors are from 1, over what is allowed."""
    return np.where(np.isfinite(off), np.abs(off) / allowed, np.inf)


def _factor(
    problem: Problem, want: Expected, backend: str, off: Array, allowed: Array, worst: int, where: Where
) -> Check:
    """The comparison of factors with 1. It shows the factor at index `worst`, of the numbers at `where`."""
    ratio = _over(off, allowed)
    check = _check(problem, want, backend, "oracle", ok=not (ratio > 1).any(), bitwise=False)
    check.scale, check.failing, check.worst, check.where = True, int((ratio > 1).sum()), float(ratio[worst]), where
    check.got, check.expected = float(1 + off[worst]), 1.0
    check.error, check.allowed = float(abs(off[worst])), float(allowed[worst])
    return check


def choice_of_experts(problem: Problem, want: Expected, backend: str, ids: Array) -> Check:
    """The router's own choice against the oracle's.

    A choice between scores that float32 cannot tell apart counts as right, and is counted. If the logits are exact in
    float32 (small integers), equal logits have equal scores, and the lower expert id must be chosen.
    """
    case = problem.case
    on_gpu, oracle = vectorised.on_gpu(case), vectorised.oracle_for(case)
    parameters = parameters_in_float64(problem.parameters._replace(w_gate=None, w_up=None, w_down=None))
    x, router = problem.x.astype(np.float64), parameters.router
    on_device = parameters_in_float64(parameters, on_gpu)
    tokens = put(x, on_gpu)
    logits, score = oracle.route(case, tokens, on_device, Exact(space_of(tokens)))
    drawn = vectorised.drawn_scores(case, tokens, on_device, [case.seed, 2])
    close = 2 * to_numpy(allowance(score, drawn, case.score_dtype)).max(axis=-1)
    logits = to_numpy(logits)
    alone = parameters.router_bias is None and parameters.selection_bias is None
    whole = alone and np.array_equal(x, x.round()) and np.array_equal(router, router.round())
    exact = whole and case.groups == 1 and (np.abs(x) @ np.abs(router)).max(initial=0) < 2**24
    by = reference.scores_to_choose_by(case, logits)
    expected = oracle.select(case, by, parameters)
    keys = reference.stored_keys(case, by, parameters)
    wrong, near = [], 0
    expected[problem.expert_id < 0] = -1  # padding makes no choice
    for p, t in np.argwhere((ids != expected).any(axis=-1)):
        in_order = not exact or _lower_first(logits[p, t], ids[p, t])
        if in_order and _defensible(case, keys[p, t], ids[p, t], close[p, t]):
            near += 1
        else:
            wrong.append((int(p), int(t)))
    check = _check(problem, want, backend, "oracle", ok=not wrong, bitwise=True)
    check.rows, check.failing = ids[..., 0].size, len(wrong)
    check.note = f"{near} tokens too close to call" if near else ""
    if wrong:
        p, t = wrong[0]
        k = int(np.argmax(ids[p, t] != expected[p, t]))
        check.worst, check.got, check.expected = np.inf, float(ids[p, t, k]), float(expected[p, t, k])
        check.where = Where(rank=p, source_rank=p, token=t, k=k, expert=int(expected[p, t, k]))
    return check


def _defensible(case: Case, score_E: Array, id_K: Array, close: float) -> bool:
    """Whether each choice in turn was the best of those left, within `close`, and so was each choice of groups."""
    if not 0 <= id_K.min(initial=0) <= id_K.max(initial=0) < case.experts:
        return False
    if case.groups > 1:
        group_G = reference.group_scores(case, score_E)
        last = -np.sort(-group_G)[case.top_groups - 1]
        chosen = {*(id_K // (case.experts // case.groups)).tolist()}
        surely = {*np.flatnonzero(group_G > last + 2 * close).tolist()}
        perhaps = {*np.flatnonzero(group_G >= last - 2 * close).tolist()}
        within = surely | (chosen & perhaps)
        others = sorted(perhaps - within, key=lambda group: -group_G[group])
        score_E = reference.within(case, score_E, [*within, *others][: case.top_groups])
    left = set(range(score_E.size))
    for g in id_K.tolist():
        if g not in left or score_E[g] < max(score_E[h] for h in left) - close:
            return False
        left.remove(g)
    return True


def _lower_first(logits_E: Array, id_K: Array) -> bool:
    """Whether, of experts with equal logits, the lower id was always chosen, and first."""
    before: set[int] = set()
    for g in id_K.tolist():
        if any(logits_E[h] == logits_E[g] and h not in before for h in range(g)):
            return False
        before.add(g)
    return True


def _check(problem: Problem, want: Expected, left: str, right: str, *, ok: bool, bitwise: bool) -> Check:
    mode, stage, value = want.name.split("/")
    return Check(problem.case.name, mode, stage, value, left, right, ok, bitwise, 0)


def _failed(problem: Problem, want: Expected, left: str, right: str, note: str) -> Check:
    check = _check(problem, want, left, right, ok=False, bitwise=want.yardstick is None)
    check.failing, check.worst, check.note = 1, np.inf, note
    return check


# How many numbers are compared at a time: their temporaries fit a core's cache, or, on a GPU, its memory.
AT_ONCE, AT_ONCE_ON_GPU = 2**17, 2**26


def _judge(
    problem: Problem, want: Expected, left: str, right: str, have: Canonical, present: Array, *,
    other: Canonical | None = None, bitwise: bool = False, picture: Picture | None = None,
) -> Check:  # fmt: skip
    """Compare the rows that are present with the oracle's or another array's, within both allowances or bitwise."""
    problem = problem.second if want.mode == "second" and problem.second else problem
    values, yardstick = want.values, None if bitwise else want.yardstick
    limit, rows = 0 if yardstick is None else 1, np.flatnonzero(present)
    xp = space_of(values)

    def compared(some: Array) -> tuple[Array, Array, Array, Array, Array]:
        """For rows by number: got, expected, error, allowed, and error over allowed."""
        got, exact = put_beside(have.rows(some), values), values[some]
        expected = exact if other is None else put_beside(other.rows(some), values)
        error = xp.abs(got - expected)
        if yardstick is None:
            same = (got == expected) & (xp.signbit(got) == xp.signbit(expected))
            return got, expected, error, xp.zeros_like(error), xp.where(same, 0.0, np.inf)
        of_rows = yardstick[some] if values.ndim > 1 else yardstick
        margin = allowed(exact, of_rows, want.dtype) * (1 if other is None else 2)
        ratio = error / xp.maximum(margin, 1e-300)
        # An error above the allowance has a ratio above 1, however small the excess; NaN has an infinite ratio.
        ratio = xp.where(error <= margin, ratio, xp.maximum(ratio, 1.0 + 2**-52))
        return got, expected, error, margin, xp.where(xp.isnan(error), np.inf, ratio)

    check = _check(problem, want, left, right, ok=True, bitwise=yardstick is None)
    check.rows = rows.size * math.prod(values.shape[1:-1])
    row_of = math.prod(values.shape[1:])
    if not rows.size * row_of:
        return check
    worst_of, magnitudes = [], Magnitudes() if picture and yardstick is not None else None
    size = max((AT_ONCE if xp is np else AT_ONCE_ON_GPU) // row_of, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, rows.size, size):
            _, expected, error, margin, ratio = compared(rows[first : first + size])
            worst_of.append(to_numpy(xp.max(ratio, axis=-1) if ratio.ndim > 1 else ratio).reshape(-1))
            if magnitudes:
                magnitudes.add(expected, error, margin)
    by_row = np.concatenate(worst_of)
    check.failing = int((by_row > limit).sum())
    check.ok = check.failing == 0
    middle = values.shape[1:-1]

    def row(index: int) -> Row:
        at = np.unravel_index(index, (rows.size, *middle))
        numbers = [to_numpy(a)[(0, *at[1:])] for a in compared(rows[at[0]][None])]
        last = (int(numbers[-1].argmax()),) if values.ndim > 1 else ()
        where = _where(problem, want, have, int(rows[at[0]]), tuple(int(i) for i in (*at, *last)))
        return Row(where, *(float(a[last]) for a in numbers[:4]))

    with np.errstate(invalid="ignore", divide="ignore"):
        worst_first = np.argsort(-by_row, kind="stable")
        worst, check.worst = row(int(worst_first[0])), float(by_row.max())
        check.worst_rows = [row(int(i)) for i in worst_first[: min(check.failing, LISTED)]]
    check.where, check.got, check.expected = worst.where, worst.got, worst.expected
    check.error, check.allowed = worst.error, worst.allowed
    if check.failing > 1:
        bad = (by_row > limit).reshape(rows.size, *middle)
        check.common = _in_common(problem, want, have, rows, bad)
    if picture and want.axes == "A D":
        rank, token, k = np.unravel_index(rows, problem.expert_id.shape)
        picture.add_rows(left, rank, problem.expert_id[rank, token, k], by_row)
    if picture and magnitudes:
        picture.magnitudes[f"{left} {want.name}"] = magnitudes.found()
    return check


FROM = "a token from rank"


def _in_common(problem: Problem, want: Expected, have: Canonical, present: Array, bad: Array) -> list[str]:
    """Properties that all failing rows share and some other row lacks: "all have expert 5"."""
    case, axes = problem.case, want.axes
    properties: dict[str, Array] = {}
    if axes.startswith("A"):
        assert have.slots is not None
        assert have.holders is not None
        source, token, k = np.unravel_index(present, (case.ranks, max(case.tokens, 1), case.top_k))
        expert = problem.expert_id[source, token, k]
        properties = {FROM: source, "token": token, "k": k, "expert": expert}
        properties |= {"rank": have.holders[present], "slot": have.slots[present]}
        properties["local expert"] = expert % (case.experts // case.ranks)
        properties["slot in its bin"] = have.slots[present] % case.capacity
    elif axes.startswith("E"):
        rows = np.bincount(problem.expert_id[problem.keep], minlength=case.experts)
        properties = {"expert": present, "rank": present // (case.experts // case.ranks)}
        properties |= {"rows for their expert": rows[present]}
        of_experts = (-1, *[1] * (bad.ndim - 1))
        properties = {name: np.broadcast_to(a.reshape(of_experts), bad.shape) for name, a in properties.items()}
    elif axes.startswith("P T"):
        properties = {FROM: present[:, None], "token": np.arange(bad.shape[-1])[None, :]}
        dropped = (~problem.keep & (problem.expert_id >= 0)).sum(axis=-1)
        if dropped.any() and dropped.shape == bad.shape:
            properties["assignments dropped"] = dropped
        properties = {name: np.broadcast_to(a, bad.shape) for name, a in properties.items()}
    shared = []
    for name, a in properties.items():
        values = np.unique(a[bad])
        if values.size == 1 and np.unique(a).size > 1:
            only = " and no passing row has it" if (bad == (a == values[0])).all() else ""
            shared.append(f"all have {name} {values[0]}{only}")
    if axes == "P T D" and not case.shared_hidden and not want.values[present][bad].any():
        shared.append("all should be zero: the case drops every assignment of these tokens")
    if axes.startswith("P T") and _tied(problem)[present][bad].all():
        shared.append("all have experts tied for the last choice, where the oracle chooses the lower id")
    return shared


def _tied(problem: Problem) -> Array:
    """[P, T] mask of tokens whose last choice scored the same as an expert that was not chosen."""
    case, (x, parameters, _) = problem.case, exact_inputs(problem)
    logits, _ = vectorised.route(case, x, parameters, Exact())
    by = reference.scores_to_choose_by(case, logits)
    best = -np.sort(-reference.stored_keys(case, by, parameters), axis=-1)
    return (
        best[..., case.top_k - 1] == best[..., case.top_k] if case.top_k < case.experts else np.zeros(x.shape[:2], bool)
    )


def _where(problem: Problem, want: Expected, have: Canonical, first: int, at: tuple[int, ...]) -> Where:
    """The place of an element, from the letters of its array's axes."""
    case, e = problem.case, problem.case.experts // problem.case.ranks
    if want.axes.startswith("A"):
        p, t, k = identity(case, first)
        assert have.slots is not None
        assert have.holders is not None
        expert = int(problem.expert_id[p, t, k])
        return Where(int(have.holders[first]), p, t, k, expert, int(have.slots[first]), list(at[1:]))
    axes, at = want.axes.split(), (first, *at[1:])
    if axes == ["E"]:
        return Where(expert=first)
    if axes[:1] == ["E"]:
        size = {"D": case.width, "F": case.hidden}[axes[1]]
        row = int(np.arange(size)[case.compared_rows(size)][at[1]]) if len(axes) == 3 else at[1]
        return Where(rank=first // e, expert=first, index=[row, *at[2:]])
    if axes[:1] != ["P"]:
        return Where(index=list(at) if axes else [])
    where = Where(rank=first, source_rank=first, index=list(at[1:]))
    if axes[1:2] == ["T"]:
        where.token, where.index = at[1], list(at[2:])
    if axes[2:] == ["K"]:
        where.k, where.expert = at[2], int(problem.expert_id[at])
    if axes == ["P", "E"]:
        where.expert = at[1]
    if axes[1:2] == ["P"]:
        where.source_rank = at[1]
    if axes[2:] == ["e"]:
        where.expert = first * e + at[2]
    return where
