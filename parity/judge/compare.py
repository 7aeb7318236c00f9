"""Trace against oracle, and trace against trace: bitwise where data moves, within an allowance per row elsewhere."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar

import msgspec
import numpy as np

from parity.judge.picture import Picture
from parity.oracle import reference, vectorised
from parity.oracle.problem import Problem, exact_inputs
from parity.oracle.reference import Exact, Numbers, Perturbed
from parity.oracle.rows import PADDING, Strategy, Table, identity, row_tables
from parity.oracle.tolerances import DRAWS, allowance, numpy_dtype
from parity.run.trace import Trace

Array = np.ndarray


class Where(msgspec.Struct, omit_defaults=True):
    """The worst element: rank that holds it, row identity, expert, slot in that rank's array, and place in the row."""

    rank: int | None = None
    source_rank: int | None = None
    token: int | None = None
    k: int | None = None
    expert: int | None = None
    slot: int | None = None
    index: list[int] = []


class Row(msgspec.Struct, omit_defaults=True):
    """A failing row, by its worst number."""

    where: Where
    got: float
    expected: float
    error: float
    allowed: float


class Check(msgspec.Struct, omit_defaults=True, tag_field="kind", tag="comparison"):
    """One array of one case, compared with one other."""

    case: str
    mode: str
    stage: str
    value: str
    left: str
    right: str
    ok: bool
    bitwise: bool
    rows: int
    failing: int = 0
    worst: float = 0.0  # error over allowance; for bitwise ones, 0 or infinity
    error: float = 0.0
    allowed: float = 0.0
    got: float | None = None
    expected: float | None = None
    where: Where | None = None
    common: list[str] = []  # what the failing rows, and not all rows, have in common
    worst_rows: list[Row] = []  # of those that fail, worst first
    note: str = ""


# NumPy lets go of the interpreter's lock on large arrays.
_THREADS = ThreadPoolExecutor()
T = TypeVar("T")

# How many failing rows of one array a report lists.
LISTED = 20

Kind = Literal["rows", "rank", "expert", "sum", "repeat"]


@dataclass(frozen=True)
class Expected:
    """What an array should hold, in a form no layout touches.

    kind "rows": [A, D] by row number, laid out on each rank as the table `order` says; "rank": [P, ...];
    "expert": [E, ...], e of them on each rank; "sum": the same on every rank; "repeat": [1], how many elements
    differed between two runs.
    """

    kind: Kind
    values: Array
    allowed: Array | None  # None: bitwise
    dtype: str
    order: str = ""
    zero_padding: bool = False  # the stage promises that what it pads with is zero
    once: bool = False  # one array may stand for all ranks: what it holds is the same for them


def expectations(problem: Problem) -> dict[Strategy, dict[str, Expected]]:
    """The oracle's word on every array of a trace, by strategy: only the counts differ, where something was dropped."""
    case, D = problem.case, problem.case.width
    x, router, w, dout = exact_inputs(problem)
    ids, keep, others = problem.expert_id, problem.keep, problem.other_experts
    score, y, dscore, dy, dx_rows = (
        getattr(problem, n).astype(np.float64) for n in ("score", "y", "dscore", "dy", "dx_rows")
    )
    draws = [Perturbed(np.random.default_rng([case.seed, 1, i])) for i in range(DRAWS)]

    def oracle(numbers: Numbers) -> ModuleType:
        return vectorised.oracle_for(case) if isinstance(numbers, Exact) else vectorised

    def drawn(f: Callable[[Numbers], T]) -> list[T]:
        return list(_THREADS.map(f, draws))  # each draw has a generator of its own, so threads change nothing

    def arithmetic(kind: Kind, f, dtype: str, order: str = "", **more: bool) -> Expected:
        return judged(kind, f(Exact()), drawn(f), dtype, order, **more)

    def judged(kind: Kind, exact: Array, others: list[Array], dtype: str, order: str = "", **more: bool) -> Expected:
        if kind == "rows":
            exact, others = exact.reshape(-1, D), [a.reshape(-1, D) for a in others]
        return Expected(kind, exact, allowance(exact, others, dtype), dtype, order, once=kind == "sum", **more)

    def moved(values: Array, order: str, **more: bool) -> Expected:
        return Expected("rows", values.reshape(-1, D).astype(np.float64), None, case.dtype, order, **more)

    def counted(values: Array) -> Expected:
        return Expected("rank", values, None, "int")

    x_rows = np.repeat(x[:, :, None], case.top_k, axis=2)
    everything, kept = (reference.sent(case, ids, keep, strategy) for strategy in ("dynamic", "static"))

    def score_of_others(numbers):
        _, score_PTE = oracle(numbers).route(case, x, router, numbers)
        return reference.chosen_scores(case, score_PTE, others, numbers)

    def backward_of_route(numbers):
        return oracle(numbers).route_backward(case, x, router, others, dscore, numbers)

    def backward_of_experts(numbers):
        return oracle(numbers).experts_backward(case, x, ids, w, dy, numbers)

    def backward_of_combine(numbers):
        return oracle(numbers).combine_backward(case, y, score, keep, dout, numbers)

    route_exact, route_drawn = backward_of_route(Exact()), drawn(backward_of_route)
    experts_exact, experts_drawn = backward_of_experts(Exact()), drawn(backward_of_experts)
    combine_exact, combine_drawn = backward_of_combine(Exact()), drawn(backward_of_combine)
    layers = drawn(lambda numbers: vectorised.layer(case, x, router, w, dout, ids, keep, numbers))

    def end_to_end(kind: Kind, name: str, dtype: str, order: str = "", **more: bool) -> Expected:
        return judged(kind, getattr(problem.exact, name), [getattr(a, name) for a in layers], dtype, order, **more)

    def out_of_combine(numbers):
        return oracle(numbers).combine(case, y, score, keep, numbers)

    def dx_of_group(numbers):
        return oracle(numbers).group_backward(case, dx_rows, keep, numbers)

    score_e2e = end_to_end("rank", "score", case.wide)
    y_e2e = end_to_end("rows", "y", case.dtype, "expert_major")
    weights = {f"apply_experts/dw_{n}": (i, f"dw_{n}") for i, n in enumerate(("gate", "up", "down"))}
    expected = {
        "isolated/route/score": arithmetic("rank", score_of_others, case.wide),
        "isolated/route/counts": counted(reference.sent(case, others, keep, "dynamic")),
        "isolated/route/dx": judged("rank", route_exact[0], [d[0] for d in route_drawn], case.dtype),
        "isolated/route/drouter": judged("sum", route_exact[1], [d[1] for d in route_drawn], case.wide),
        "isolated/group_by_expert/x": moved(x_rows, "grouped", zero_padding=True),
        "isolated/group_by_expert/dx": arithmetic("rank", dx_of_group, case.dtype),
        "isolated/send_tokens/x": moved(x_rows, "received"),
        "isolated/send_tokens/dx": moved(dx_rows, "grouped"),
        "isolated/to_expert_major/x": moved(x_rows, "expert_major", zero_padding=True),
        "isolated/to_expert_major/dx": moved(dx_rows, "received", zero_padding=True),
        "isolated/apply_experts/y": y_e2e,
        "isolated/apply_experts/dx": judged(
            "rows", experts_exact[0], [d[0] for d in experts_drawn], case.dtype, "expert_major"
        ),
        **{
            f"isolated/{name}": judged("expert", experts_exact[1][i], [d[1][i] for d in experts_drawn], case.dtype)
            for name, (i, _) in weights.items()
        },
        "isolated/to_rank_major/y": moved(y, "received", zero_padding=True),
        "isolated/to_rank_major/dy": moved(dy, "expert_major", zero_padding=True),
        "isolated/return_tokens/y": moved(y, "grouped"),
        "isolated/return_tokens/dy": moved(dy, "received"),
        "isolated/combine/out": arithmetic("rank", out_of_combine, case.dtype),
        "isolated/combine/dy": judged(
            "rows", combine_exact[0], [d[0] for d in combine_drawn], case.dtype, "grouped", zero_padding=True
        ),
        "isolated/combine/dscore": judged("rank", combine_exact[1], [d[1] for d in combine_drawn], case.wide),
        "e2e/route/score": score_e2e,
        "e2e/group_by_expert/x": moved(x_rows, "grouped", zero_padding=True),
        "e2e/send_tokens/x": moved(x_rows, "received", zero_padding=True),
        "e2e/to_expert_major/x": moved(x_rows, "expert_major", zero_padding=True),
        "e2e/apply_experts/y": y_e2e,
        "e2e/to_rank_major/y": end_to_end("rows", "y", case.dtype, "received", zero_padding=True),
        "e2e/return_tokens/y": end_to_end("rows", "y", case.dtype, "grouped", zero_padding=True),
        "e2e/combine/out": end_to_end("rank", "out", case.dtype),
        "e2e/combine/dscore": end_to_end("rank", "dscore", case.wide),
        **{f"e2e/{name}": end_to_end("expert", attribute, case.dtype) for name, (_, attribute) in weights.items()},
        "e2e/route/dx": end_to_end("rank", "dx", case.dtype),
        "e2e/route/drouter": end_to_end("sum", "drouter", case.wide),
    }

    if case.top_k >= 3:
        in_order = Expected("rank", problem.order_probe()[1], None, case.dtype)
        expected |= {f"isolated/{name}": in_order for name in ("group_by_expert/dx_order", "combine/order")}

    def exchanged(sent_PE: Array) -> dict[str, Expected]:
        counts = counted(reference.received(case, sent_PE))
        return {f"{mode}/exchange_counts/counts": counts for mode in ("isolated", "e2e")}

    dropped = {
        "isolated/group_by_expert/capacity": counted(np.full(case.ranks, case.capacity)),
        "e2e/group_by_expert/dropped": counted(everything - kept),
        "e2e/group_by_expert/dropped_in_all": counted((everything - kept).sum(axis=1)),
    }
    by_strategy: dict[Strategy, dict[str, Expected]] = {
        "dynamic": expected | exchanged(everything),
        "ragged": expected | exchanged(everything),
        "static": expected | exchanged(kept) | dropped,
    }
    for each in by_strategy.values():
        for name in [name for name in each if name.startswith("e2e")]:
            once = each[name].once
            each[name.replace("e2e", "repeat", 1)] = Expected("repeat", np.zeros(1), None, "int", once=once)
    return by_strategy


@dataclass(frozen=True)
class Canonical:
    """An array in the form of its `Expected`, and which of its rows the trace has."""

    values: Array
    present: Array  # over the leading axis
    slots: Array | None  # where each row lay, for kind "rows"
    holders: Array | None  # on which rank


class MismatchError(Exception):
    """An array cannot be compared at all: missing, or of another shape or dtype."""


def canonical(P: int, per_rank: list[Array] | None, expected: Expected, table: Table) -> Canonical:
    """Strip padding and layout from a trace's array.

    Raises MismatchError when it is missing, has a shape or dtype of its own, or its padding is not zero where promised.
    """
    if per_rank is None:
        raise MismatchError("missing from the trace")
    dtypes = {a.dtype for a in per_rank}
    wanted = {np.dtype("int32"), np.dtype("int64")} if expected.dtype == "int" else {numpy_dtype(expected.dtype)}
    if not dtypes <= wanted:
        raise MismatchError(f"dtype is {', '.join(map(str, dtypes))}, expected {expected.dtype}")
    if len(per_rank) != P and not (expected.once and len(per_rank) == 1):
        raise MismatchError(f"{len(per_rank)} arrays, expected one for each of {P} ranks")
    arrays = [a.astype(np.int64 if expected.dtype == "int" else np.float64) for a in per_rank]
    if expected.kind == "rows":
        return _canonical_rows(arrays, expected, table)
    shape = expected.values.shape
    if expected.kind == "repeat":
        if any(a.shape for a in arrays):
            raise MismatchError(f"shapes are {[a.shape for a in arrays]}, expected one number a rank")
        return Canonical(np.abs(arrays).sum(keepdims=True), np.ones(1, bool), None, None)
    if expected.kind == "expert":
        if any(a.shape != (shape[0] // P, *shape[1:]) for a in arrays):
            raise MismatchError(f"shapes are {[a.shape for a in arrays]}, expected {P} x {(shape[0] // P, *shape[1:])}")
        values = np.concatenate(arrays)
    elif expected.kind == "rank":
        if any(a.shape != shape[1:] for a in arrays):
            raise MismatchError(f"shapes are {[a.shape for a in arrays]}, expected {P} x {shape[1:]}")
        values = np.stack(arrays)
    else:
        if any(a.shape != shape for a in arrays):
            raise MismatchError(f"shapes are {[a.shape for a in arrays]}, expected {shape}")
        if any(not np.array_equal(a, arrays[0], equal_nan=True) for a in arrays):
            raise MismatchError("ranks disagree on a value that is the same for all of them")
        values = arrays[0]
    return Canonical(values, np.ones(shape[0], bool), None, None)


def _canonical_rows(arrays: list[Array], expected: Expected, table: Table) -> Canonical:
    order, shape = table[expected.order], expected.values.shape
    if [a.shape for a in arrays] != [(rows.size, shape[1]) for rows in order]:
        raise MismatchError(
            f"shapes are {[a.shape for a in arrays]}, expected {[(rows.size, shape[1]) for rows in order]}"
        )
    values, present = np.full(shape, np.nan), np.zeros(shape[0], bool)
    slots, holders = np.full(shape[0], -1), np.full(shape[0], -1)
    for rank, (a, rows) in enumerate(zip(arrays, order, strict=True)):
        real = np.flatnonzero(rows != PADDING)
        values[rows[real]], present[rows[real]] = a[real], True
        slots[rows[real]], holders[rows[real]] = real, rank
        dirty = np.flatnonzero((rows == PADDING) & (a != 0).any(axis=1))
        if expected.zero_padding and dirty.size:
            raise MismatchError(
                f"padding is not zero: rank {rank}, slot {dirty[0]} and {dirty.size - 1} more hold {a[dirty[0], 0]}"
            )
    return Canonical(values, present, slots, holders)


def compare(problem: Problem, traces: list[Trace], picture: Picture | None = None) -> Iterator[Check]:
    """Every array of every trace against the oracle, and of every two traces against each other.

    Fills in `picture` on the way.
    """
    found: dict[str, dict[str, Canonical]] = {}
    by_strategy = expectations(problem)
    expected = {trace.backend: by_strategy[trace.strategy] for trace in traces}
    for trace in traces:
        table = row_tables(problem.case, problem.expert_id, problem.keep, trace.strategy)
        mine = found[trace.backend] = {}

        def against_the_oracle(name: str, trace: Trace = trace, table: Table = table, mine: dict = mine) -> Check:
            want = expected[trace.backend][name]
            try:
                have = canonical(problem.case.ranks, trace.arrays.get(name), want, table)
            except MismatchError as mismatch:
                return _failed(problem, name, trace.backend, "oracle", str(mismatch), want.allowed is None)
            mine[name] = have
            return _judge(
                problem, name, trace.backend, "oracle", have, want.values, want.allowed, have.present, want, picture
            )

        yield from _THREADS.map(against_the_oracle, expected[trace.backend])
        yield from _moves_its_own_rows(problem, trace.backend, mine)
        yield choice_of_experts(problem, trace)
    for i, left in enumerate(traces):
        for right in traces[i + 1 :]:
            yield from _against(problem, left.backend, right.backend, found, expected)


def _against(
    problem: Problem, left: str, right: str, found: dict[str, dict[str, Canonical]], expected: dict
) -> Iterator[Check]:
    """Two traces: what both have, row by row. Each may be off by its own allowance, so they may differ by two."""

    def of(name: str) -> Check | None:
        a, b, want = found[left][name], found[right][name], expected[left][name]
        if name.endswith("exchange_counts/counts") and not np.array_equal(want.values, expected[right][name].values):
            return None  # one side dropped rows: each was held against the oracle's counts for it
        allowed = None if want.allowed is None else 2 * want.allowed
        return _judge(problem, name, left, right, a, b.values, allowed, a.present & b.present, want)

    names = [name for name in expected[left] if name in found[left] and name in found[right]]
    yield from filter(None, _THREADS.map(of, names))


def _moves_its_own_rows(problem: Problem, backend: str, found: dict[str, Canonical]) -> Iterator[Check]:
    """Stages 7 and 8 move the very bits that stage 6 of the same run made."""
    for before, after in (("apply_experts", "to_rank_major"), ("to_rank_major", "return_tokens")):
        a, b = found.get(f"e2e/{before}/y"), found.get(f"e2e/{after}/y")
        if a is not None and b is not None:
            want = Expected("rows", a.values, None, problem.case.dtype, "")
            yield _judge(
                problem, f"e2e/{after}/y", backend, f"its own {before}", b, a.values, None, a.present & b.present, want
            )


def choice_of_experts(problem: Problem, trace: Trace) -> Check:
    """The router's own choice against the oracle's.

    A choice between logits closer than float32 can tell apart counts as right, and is counted. Where the logits are
    exact in float32 (small integers), nothing is too close, and ties go to the lower id.
    """
    case, name = problem.case, "isolated/route/expert_id"
    want = Expected("rank", problem.expert_id, None, "int")
    try:
        ids = canonical(case.ranks, trace.arrays.get(name), want, {}).values
    except MismatchError as mismatch:
        return _failed(problem, name, trace.backend, "oracle", str(mismatch), True)
    x, router, _, _ = exact_inputs(problem)
    draws = [Perturbed(np.random.default_rng([case.seed, 2, i])) for i in range(DRAWS)]
    logits, _ = vectorised.oracle_for(case).route(case, x, router, Exact())
    close = 2 * allowance(logits, [vectorised.route(case, x, router, n)[0] for n in draws], case.wide).max(axis=-1)
    whole = np.array_equal(x, x.round()) and np.array_equal(router, router.round())
    if whole and (np.abs(x) @ np.abs(router)).max(initial=0) < 2**24:
        close[:] = 0
    expected = vectorised.oracle_for(case).select(case, logits)
    wrong, near = [], 0
    for p, t in np.argwhere((ids != expected).any(axis=-1)):
        if close[p, t] > 0 and _defensible(logits[p, t], ids[p, t], close[p, t]):
            near += 1
        else:
            wrong.append((int(p), int(t)))
    check = Check(
        case.name,
        "isolated",
        "route",
        "expert_id",
        trace.backend,
        "oracle",
        not wrong,
        True,
        ids[..., 0].size,
        len(wrong),
    )
    check.note = f"{near} tokens too close to call" if near else ""
    if wrong:
        p, t = wrong[0]
        k = int(np.argmax(ids[p, t] != expected[p, t]))
        check.worst, check.got, check.expected = np.inf, float(ids[p, t, k]), float(expected[p, t, k])
        check.where = Where(rank=p, source_rank=p, token=t, k=k, expert=int(expected[p, t, k]))
    return check


def _defensible(logits_E: Array, id_K: Array, close: float) -> bool:
    """Whether each choice, in turn, was as good as any left, but for `close`."""
    left = set(range(logits_E.size))
    for g in id_K.tolist():
        if g not in left or logits_E[g] < max(logits_E[h] for h in left) - close:
            return False
        left.remove(g)
    return True


def _failed(problem: Problem, name: str, left: str, right: str, note: str, bitwise: bool) -> Check:
    mode, stage, value = name.split("/")
    return Check(problem.case.name, mode, stage, value, left, right, False, bitwise, 0, 1, np.inf, note=note)


def _judge(
    problem: Problem, name: str, left: str, right: str, have: Canonical, values: Array, allowed: Array | None,
    present: Array, want: Expected, picture: Picture | None = None,
) -> Check:  # fmt: skip
    mode, stage, value = name.split("/")
    got, expected = have.values[present], values[present]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(got - expected)
        if allowed is None:
            ratio = np.where((got == expected) & (np.signbit(got) == np.signbit(expected)), 0.0, np.inf)
        else:
            ratio = np.where(error <= allowed[present], error / np.maximum(allowed[present], 1e-300), np.inf)
            ratio = np.where(np.isinf(ratio), np.maximum(error / allowed[present], 1.0), ratio)
            ratio = np.where(np.isnan(ratio), np.inf, ratio)
    check = Check(problem.case.name, mode, stage, value, left, right, True, allowed is None, 0)
    check.rows = int(np.prod(got.shape[:-1])) if want.kind != "rank" or got.ndim > 1 else got.size
    if not ratio.size:
        return check
    bad = ratio > (0 if allowed is None else 1)
    by_row = ratio.reshape(-1, ratio.shape[-1] if ratio.ndim > 1 else 1)
    check.failing = int(bad.reshape(by_row.shape).any(axis=1).sum())
    check.ok = check.failing == 0
    margin = np.zeros(ratio.shape) if allowed is None else allowed[present]

    def row(index: int) -> Row:
        at = np.unravel_index(index * by_row.shape[1] + int(by_row[index].argmax()), ratio.shape)
        at = tuple(int(i) for i in at)
        where = _where(problem, value, want, have, int(np.flatnonzero(present)[at[0]]), at)
        return Row(where, float(got[at]), float(expected[at]), float(error[at]), float(margin[at]))

    worst_first = np.argsort(-by_row.max(axis=1), kind="stable")
    worst, check.worst = row(int(worst_first[0])), float(ratio.max())
    check.where, check.got, check.expected = worst.where, worst.got, worst.expected
    check.error, check.allowed = worst.error, worst.allowed
    check.worst_rows = [row(int(i)) for i in worst_first[: min(check.failing, LISTED)]]
    if check.failing > 1 and ratio.ndim > 1:
        check.common = _in_common(problem, want, have, np.flatnonzero(present), np.asarray(bad.any(axis=-1)))
    if picture and want.kind == "rows":
        rank, token, k = np.unravel_index(np.flatnonzero(present), problem.expert_id.shape)
        picture.add_rows(left, rank, problem.expert_id[rank, token, k], ratio)
    if picture and allowed is not None:
        picture.add_magnitudes(f"{left} {name}", expected, error, margin)
    return check


def _in_common(problem: Problem, want: Expected, have: Canonical, present: Array, bad: Array) -> list[str]:
    """Properties that all failing rows share and some other row lacks: "all have expert 5"."""
    case = problem.case
    properties: dict[str, Array] = {}
    if want.kind == "rows":
        assert have.slots is not None
        assert have.holders is not None
        source, token, k = np.unravel_index(present, (case.ranks, max(case.tokens, 1), case.top_k))
        expert = problem.expert_id[source, token, k]
        properties = {"source rank": source, "token": token, "k": k, "expert": expert}
        properties |= {"rank": have.holders[present], "slot": have.slots[present]}
        properties["local expert"] = expert % (case.experts // case.ranks)
        properties["slot in its bin"] = have.slots[present] % case.capacity
    elif want.kind == "expert":
        rows = np.bincount(problem.expert_id[problem.keep], minlength=case.experts)
        properties = {"expert": present, "rank": present // (case.experts // case.ranks)}
        properties |= {"rows for their expert": rows[present]}
        properties = {name: np.broadcast_to(a[:, None], bad.shape) for name, a in properties.items()}
    elif want.kind == "rank" and want.values.ndim == 3:
        properties = {"source rank": present[:, None], "token": np.arange(bad.shape[-1])[None, :]}
        dropped = (~problem.keep).sum(axis=-1)
        if dropped.any() and dropped.shape == bad.shape:
            properties["assignments dropped"] = dropped
        properties = {name: np.broadcast_to(a, bad.shape) for name, a in properties.items()}
    shared = []
    for name, a in properties.items():
        values = np.unique(a[bad])
        if values.size == 1 and np.unique(a).size > 1:
            only = " and no others" if (bad == (a == values[0])).all() else ""
            shared.append(f"all have {name} {values[0]}{only}")
    return shared


def _where(problem: Problem, value: str, want: Expected, have: Canonical, first: int, at: tuple[int, ...]) -> Where:
    if want.kind == "rows":
        p, t, k = identity(problem.case, first)
        assert have.slots is not None
        assert have.holders is not None
        return Where(
            int(have.holders[first]), p, t, k, int(problem.expert_id[p, t, k]), int(have.slots[first]), list(at[1:])
        )
    if want.kind == "expert":
        e = problem.case.experts // problem.case.ranks
        size = {"dw_down": problem.case.hidden}.get(value, problem.case.width)
        rows = np.arange(size)[problem.case.compared_rows(size)]
        return Where(rank=first // e, expert=first, index=[int(rows[at[1]]), *at[2:]])
    if want.kind == "repeat":
        return Where()
    if want.kind == "sum":
        return Where(index=[first, *at[1:]])
    if want.dtype == "int":
        return _where_counted(problem, first, at)
    per_choice = value in ("score", "dscore")
    k = at[2] if per_choice else None
    expert = int(problem.expert_id[first, at[1], at[2]]) if per_choice else None
    return Where(rank=first, source_rank=first, token=at[1], k=k, expert=expert, index=list(at[2:]))


def _where_counted(problem: Problem, first: int, at: tuple[int, ...]) -> Where:
    """Of counts: [P, E] on the sender; [P, P, e] on the receiver, by sender; one number a rank."""
    if len(at) == 3:
        e = problem.case.experts // problem.case.ranks
        return Where(rank=first, source_rank=at[1], expert=first * e + at[2], index=list(at[1:]))
    if len(at) == 2:
        return Where(rank=first, source_rank=first, expert=at[1], index=list(at[1:]))
    return Where(rank=first, source_rank=first)
