"""What a user's own layer records from its inside, under the names of the table of quantities."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity import Recorded
from parity.cases.case import Case
from parity.oracle.problem import Problem
from parity.oracle.quantities import OUTSIDE, QUANTITIES
from parity.oracle.rows import PADDING, row_tables
from parity.run.backend import Backend
from parity.run.own import OwnLayerError

Array = np.ndarray

# By stage/value, the quantity that it is. The choice of experts is the router's own, from the same tokens as the
# oracle's; all else is of the whole layer.
CAN_GIVE = {
    name: f"{'isolated' if q.judged == 'choice' else 'e2e'}/{name}"
    for name, q in QUANTITIES.items()
    if "dynamic" in q.layouts and not q.backward and (q.e2e or q.judged == "choice") and f"e2e/{name}" not in OUTSIDE
}
ORDERS = ("token", "grouped", "received", "expert_major")  # which `parity.record` explains
ROWS = "rows/"  # begins the name of the array that says which rows another holds


class Hook(NamedTuple):
    """A module of a layer whose return value is recorded as a quantity."""

    module: str  # its name or its class, in which * stands for anything
    index: int  # of what it returns, where that is a tuple
    name: str  # stage/value
    order: str | None  # of rows

    @classmethod
    def parse(cls, text: str) -> "Hook":
        """`experts.down_proj=apply_experts/y`, `gate[1]=route/expert_id` or `experts.*.w2=apply_experts/y:grouped`.

        Raises ValueError on anything else.
        """
        found = re.fullmatch(r"([\w.*]+)(?:\[(\d+)\])?=(\w+/\w+)(?::(\w+))?", text)
        if not found:
            raise ValueError(
                f"--record {text}: write MODULE=STAGE/VALUE, such as experts.down_proj=apply_experts/y, "
                "gate[1]=route/expert_id or experts.*.w2=apply_experts/y:grouped"
            )
        module, index, name, order = found.groups()
        if name not in CAN_GIVE:
            raise ValueError(f"--record {text}: no array is called {name}: there are {', '.join(CAN_GIVE)}")
        if order and not QUANTITIES[name].order:
            raise ValueError(f"--record {text}: {name} has no rows, so it has no order: leave out :{order}")
        if order and order not in ORDERS:
            raise ValueError(f"--record {text}: no order is called {order}: there are {', '.join(ORDERS)}")
        return cls(module, int(index or 0), name, order)


class Given(NamedTuple):
    """What a layer returned."""

    out: Any
    arrays: dict[str, Any]  # stage/value, and rows/stage/value where identities were given
    orders: dict[str, str]  # of rows, where one was named


def split(result: Any, recorded: Sequence[Recorded], join: Callable[[list[Any]], Any], backend: Backend) -> Given:
    """The output, what the layer returned beside it, and what it recorded.

    An array that comes in parts, as from a loop over experts, is joined. Raises OwnLayerError on a name of no quantity.
    """
    where, more = backend.files[""], list(recorded)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result, beside = result
        more += [Recorded(name, *(a if isinstance(a, tuple) else (a, None))) for name, a in beside.items()]
    found = Given(result, {}, {})
    for name in dict.fromkeys(one.name for one in more):
        if name not in CAN_GIVE:
            raise OwnLayerError(f"{where} gives {name}, but no array is called that: there are {', '.join(CAN_GIVE)}")
        parts = [one for one in more if one.name == name]
        for part in (a for one in parts for a in (one.array, one.rows) if not isinstance(a, str | None)):
            if not hasattr(part, "shape"):
                raise OwnLayerError(f"{where} gives {name} as a {type(part).__name__}: it must be an array")
        found.arrays[name] = join([one.array for one in parts])
        if isinstance(parts[0].rows, str):
            found.orders[name] = parts[0].rows
        elif parts[0].rows is not None:
            found.arrays[ROWS + name] = join([one.rows for one in parts])
    return found


def of_all(backend: Backend, name: str, everybody: Sequence[Mapping[str, Array]]) -> list[Array]:
    """An array of each rank. Raises OwnLayerError where one has none."""
    if lacking := [rank for rank, arrays in enumerate(everybody) if name not in arrays]:
        gives = next(rank for rank, arrays in enumerate(everybody) if name in arrays)
        raise OwnLayerError(
            f"{backend.files['']} gives {name} on rank {gives}, but not on rank {lacking[0]}: record it on every rank, "
            "with zero rows where a rank has none"
        )
    return [arrays[name] for arrays in everybody]


def quantities(given: Iterable[str]) -> list[str]:
    """The names of what is compared, without those of arrays that say which rows another holds."""
    return [name for name in given if not name.startswith(ROWS)]


def placed(
    problem: Problem, backend: Backend, given: Mapping[str, list[Array]], orders: Mapping[str, str]
) -> dict[str, list[Array]]:
    """Arrays from a layer's inside, one for each rank, as a trace has them: named as quantities, rows with numbers.

    A layer may have its K choices in any order. Where it gives them, they are put into the oracle's.

    Raises OwnLayerError on an order that there is not, and on a row that there cannot be.
    """
    found: dict[str, list[Array]] = {}
    k_of = _choices(problem, given.get("route/expert_id", []))
    for name in [name for name in CAN_GIVE if name in given]:
        axes, arrays = QUANTITIES[name].axes, given[name]
        if len(arrays) != problem.case.ranks:
            raise OwnLayerError(
                f"{backend.files['']}: {name} has a first axis of {len(arrays)}: it must have one entry for each of "
                f"the {problem.case.ranks} ranks, or rows must come with identities, [n, 3]"
            )
        if axes == "P T K" and all(a.size == k.size for a, k in zip(arrays, k_of, strict=True)):
            places = zip(arrays, k_of, strict=True)
            arrays = [np.take_along_axis(a.reshape(k.shape), k.argsort(axis=1), 1) for a, k in places]
        if QUANTITIES[name].order:
            leading = [a.ndim - axes.count("D") for a in arrays]
            numbers = _numbers(problem, backend, name, given, orders.get(name), k_of)
            arrays = [a.reshape(-1, *a.shape[n:]) for a, n in zip(arrays, leading, strict=True)]
            found[ROWS + name] = [_as_many(problem, n, len(a)) for n, a in zip(numbers, arrays, strict=True)]
        found[CAN_GIVE[name]] = arrays
    return found


def _choices(problem: Problem, ids: Sequence[Array]) -> Array:
    """[P, T, K], which of the oracle's choices each of a layer's is; its own place where it is none of them."""
    expert_id, K = problem.expert_id, problem.case.top_k
    gave_all = len(ids) > 0 and sum(a.size for a in ids) == expert_id.size
    own = np.stack(ids).reshape(expert_id.shape) if gave_all else expert_id
    k_of = np.empty_like(expert_id)
    np.put_along_axis(k_of, own.argsort(axis=2, kind="stable"), expert_id.argsort(axis=2, kind="stable"), 2)
    same = (np.sort(expert_id, axis=2) == np.sort(own, axis=2)).all(axis=2, keepdims=True)
    return np.where(same, k_of, np.arange(K))


def _numbers(
    problem: Problem, backend: Backend, name: str, given: Mapping[str, list[Array]], order: str | None, k_of: Array
) -> list[Array]:
    """The numbers of the rows on each rank, from their identities or from the order that they are in."""
    case, where = problem.case, backend.files[""]
    in_order = (np.arange(k_of.size) - np.arange(k_of.size) % case.top_k + k_of.reshape(-1)).astype(np.int64)
    in_order = np.append(in_order, PADDING)  # padding stays padding
    if ROWS + name in given:
        return [in_order[_ravelled(case, rows, name, where)] for rows in given[ROWS + name]]
    tail = QUANTITIES[name].axes.count("D")
    by_token = all(a.shape[: a.ndim - tail] == (case.tokens, case.top_k) for a in given[name])
    order = order or ("token" if by_token else QUANTITIES[name].order)
    if order == "token":
        return list(in_order[:-1].reshape(case.ranks, -1))
    if order not in ORDERS:
        raise OwnLayerError(f"{where} gives {name} in order {order!r}: the orders are {', '.join(ORDERS)}")
    numbers = row_tables(case, problem.expert_id, problem.keep, "dynamic")[order]
    for rank, (a, there) in enumerate(zip(given[name], numbers, strict=True)):
        rows, kept = math.prod(a.shape[: a.ndim - tail]), int(problem.keep.reshape(-1)[there].sum())
        if rows < kept:
            raise OwnLayerError(
                f"{where}: {name} has {rows} rows on rank {rank}, but order {order!r} has {kept} there: say "
                "which rows they are, by identities or another order; a layer that exchanges nothing has them 'grouped'"
            )
    return numbers


def _ravelled(case: Case, identity: Array, name: str, where: str) -> Array:
    """Row numbers of identities [..., 3]."""
    if identity.shape[-1:] != (3,) or not np.issubdtype(identity.dtype, np.integer):
        raise OwnLayerError(
            f"{where}: the row identities of {name} are {identity.dtype} {list(identity.shape)}: they must be "
            "integers [..., 3], (source rank, token, k)"
        )
    identity = identity.reshape(-1, 3)
    sizes = np.array((case.ranks, case.tokens, case.top_k))
    too_large = np.any(identity >= sizes, axis=1)
    if too_large.any():
        row = identity[too_large][0].tolist()
        raise OwnLayerError(
            f"{where}: {name} has the row identity {row}: (source rank, token, k) must be below {sizes.tolist()}"
        )
    real = identity.min(axis=1, initial=0) >= 0
    return np.where(real, np.ravel_multi_index(tuple(identity.clip(min=0).T), sizes), PADDING)


def _as_many(problem: Problem, numbers: Array, rows: int) -> Array:
    """The numbers of so many rows: those dropped may be left out, and past the last is padding."""
    if rows < len(numbers):
        numbers = numbers[np.append(problem.keep.reshape(-1), True)[numbers]]
    return np.append(numbers, np.full(max(rows - len(numbers), 0), PADDING))
