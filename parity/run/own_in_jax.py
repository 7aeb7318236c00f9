"""A layer of the user's own in JAX: called once with all ranks' tokens, or on each rank; gradients by `vjp`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_impl
from jax_impl import routing
from parity import Unsupported, recording
from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, parameters_of
from parity.oracle.problem import Problem
from parity.run import inside, jax_ranks, own
from parity.run.backend import Backend, Setting
from parity.run.jax_ranks import AXIS, At, Eager, Program, fetch, over_ranks
from parity.run.jax_stages import compared, environment, options_of
from parity.run.naming import together
from parity.run.own import OwnLayerError, Signature
from parity.run.trace import Trace, differing_bits

Arrays = dict[str, jax.Array]
Found = tuple[tuple[jax.Array, jax.Array], Arrays]  # output and scores; what the layer gives from its inside


def run_all(backend: Backend, folder: Path, setting: Setting) -> None:
    """Run this process's share of the problems in `folder` and save the traces there."""
    if backend.stages.startswith("parity.published"):  # whose files use no JAX when they are imported: once for all
        own.load(backend)
    paths = sorted(folder.glob("*.problem"))[setting.share :: setting.shares]
    ranks = {path: Problem.load(path).case.processes for path in paths}
    jax_ranks.run_all(backend, folder, setting, ranks, run)


def work(backend: Backend, setting: Setting) -> jax_ranks.Work:  # noqa: ARG001  the same for all
    """The function that runs one problem."""
    return run


def run(problem: Problem, backend: Backend, how: str, at: At) -> Trace:
    """A problem on all ranks, twice on the same inputs."""
    case, (layer, takes) = problem.case, own.load(backend)
    try:
        if why := own.refusal(layer, takes, problem):
            raise Unsupported(why)
        with jax.enable_x64(case.dtype == "float64"):
            inputs = jax_ranks.everywhere(_inputs(problem), case.ranks, how)
            key = layer, replace(case, name=""), how
            program, orders = PROGRAMS.pop(key, None) or _program(layer, takes, case, backend, how)
            first, _ = fetch(program(at, "the first step", inputs), how)
            again, within = fetch(program(at, "the first step, repeated", inputs), how)
            PROGRAMS[key] = program, orders
            if len(PROGRAMS) > KEPT:
                del PROGRAMS[next(iter(PROGRAMS))]
    except Unsupported as reason:
        return Trace(case, backend, environment() | {"not supported": str(reason)})
    arrays = {name: _per_rank(case, name, a) for name, a in again.items()}
    for name, a in first.items():
        differ = differing_bits(a, again[name])
        arrays[name.replace("e2e", "repeat", 1)] = [differ, *[np.zeros_like(differ)] * (len(arrays[name]) - 1)]
    given = inside.placed(problem, backend, _per_rank_inside(case, within), orders)
    return Trace(case, backend.providing(inside.quantities(given)), environment(), arrays=arrays | given)


# Recently used programs, by layer, case and mapping of ranks. Cases that differ only in inputs share one.
PROGRAMS: dict[tuple[object, ...], tuple[Program | Eager, dict[str, str]]] = {}
KEPT = 4


def _program(
    layer: Callable[..., Any], takes: Signature, case: Case, backend: Backend, how: str
) -> tuple[Program | Eager, dict[str, str]]:
    """What runs a case, and where it notes the orders of rows that the layer names."""
    orders: dict[str, str] = {}
    step = partial(_step, layer, takes, case, backend, how, orders)
    return Eager(step) if case.way == "eager" else Program(jax.jit(step)), orders


def _inputs(problem: Problem) -> dict[str, np.ndarray]:
    """The inputs of all ranks, [P, T, ...], and the weights of all experts."""
    names = ("x", "expert_id", "keep", "dout", "aux")
    return {name: getattr(problem, name) for name in names} | problem.parameters.there()


def _step(
    layer: Callable[..., Any], takes: Signature, case: Case, backend: Backend, how: str, orders: dict[str, str],
    inputs: Arrays,
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Output and gradients by name, and what the layer records from its inside. Named row orders go into `orders`."""
    P, e = case.ranks, case.experts // case.ranks
    learned = {one.name: one.learned for one in parameters_of(case) if own.needs(takes, one.name)}
    taken = ["x", *(name for name in learned if learned[name])]
    known = {name: inputs[name] for name in learned if not learned[name]}

    def call(x: jax.Array, ids: jax.Array, keep: jax.Array, *leaves: jax.Array) -> Found:
        values = {"x": x, "expert_id": ids, "keep": keep, "case": case, "axis_name": AXIS if P > 1 else None}
        values |= dict(zip(taken[1:], leaves, strict=True)) | known
        score = jnp.zeros(ids.shape, inputs["aux"].dtype)
        if takes.given("score"):

            def chosen(x: jax.Array, ids: jax.Array) -> jax.Array:
                more = together(jax_impl, values, "per_expert")
                return routing.route(x, values["router"], options_of(case)["router"], ids, **more).score_TK

            values["score"] = score = chosen(x, ids) if takes.per_rank else jax.vmap(chosen)(x, ids)
        with recording() as recorded:
            result = layer(**own.arguments(takes, values))
        if inner := [one.name for one in recorded if _trace(one.array) not in (None, _trace(x))]:
            raise OwnLayerError(
                f"{backend.files['']} records {inner[0]} inside a function that it jits, maps, scans or recomputes: "
                "return the array from that function, and record it outside"
            )
        found = inside.split(result, recorded, jnp.concatenate, backend)
        orders.update(found.orders)
        own.checked(found.out, x.shape, x.dtype, backend)
        return (found.out, score), found.arrays

    def whole(x: jax.Array, *leaves: jax.Array) -> Found:
        if not takes.per_rank:
            return call(x, inputs["expert_id"], inputs["keep"], *leaves)
        replicated = [3 + i for i, n in enumerate(taken[1:]) if not BY_NAME[n].per_rank or takes.all_experts]
        split = [a if 3 + i in replicated else a.reshape(P, e, *a.shape[1:]) for i, a in enumerate(leaves)]
        each = over_ranks(call, P, how, replicated=tuple(replicated))
        return each(x, inputs["expert_id"], inputs["keep"], *split)

    whole = jax.checkpoint(whole) if case.way == "recomputed" else whole
    (out, _), vjp, within = jax.vjp(whole, *(inputs[name] for name in taken), has_aux=True)
    dx, *found = vjp((inputs["dout"], inputs["aux"]))
    gradients = dict(zip(taken[1:], found, strict=True))
    values = {"combine/out": out, "route/dx": dx}
    values |= {BY_NAME[name].gradient: a for name, a in compared(case, gradients).items()}
    return {f"e2e/{name}": a for name, a in values.items()}, within


def _trace(array: Any) -> object:
    """What traces an array, below gradients and vmap; None where nothing does, or "ended" where that is over."""
    trace = getattr(array, "_trace", None)
    if trace is not None and not trace.is_valid():
        return "ended"
    below = "primal" if hasattr(array, "primal") else "val" if hasattr(array, "batch_dim") else ""
    return _trace(getattr(array, below)) if below else trace


def _per_rank_inside(case: Case, given: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What a layer records from its inside, for each rank. Rows of all ranks together go to the ranks that own them."""
    found = {name: list(a) for name, a in given.items()}
    for name, a in given.items():
        rows = given.get(inside.ROWS + name)
        if rows is not None and rows.ndim == 2 and not name.startswith(inside.ROWS):
            for what, array in ((name, a), (inside.ROWS + name, rows)):
                found[what] = [array[rows[:, 0] == rank] for rank in range(case.ranks)]
    return found


def _per_rank(case: Case, name: str, a: np.ndarray) -> list[np.ndarray]:
    """One array per rank, or a single one for a gradient that is summed over ranks."""
    learned = BY_NAME.get(name.rpartition("/d")[2])
    if not learned or name.startswith(inside.ROWS):
        return list(a)
    return [own.of_rank(case, a, rank) for rank in range(case.ranks)] if learned.per_rank else [a]
