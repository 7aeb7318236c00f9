"""A layer of the user's own in JAX: called once with all ranks' tokens, or on each rank; gradients by `vjp`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import routing
from parity import Unsupported
from parity.cases.case import Case
from parity.oracle.problem import Problem
from parity.run import jax_ranks, own
from parity.run.backend import Backend, Setting
from parity.run.jax_ranks import AXIS, At, Eager, Program, over_ranks
from parity.run.jax_stages import compared, environment
from parity.run.own import WEIGHTS, Signature
from parity.run.trace import Trace, differing_bits

Arrays = dict[str, jax.Array]


def run_all(backend: Backend, folder: Path, setting: Setting) -> None:
    """Run this process's share of the problems in `folder` and save the traces there."""
    paths = sorted(folder.glob("*.problem"))[setting.share :: setting.shares]
    ranks = {path: Problem.load(path).case.processes for path in paths}
    jax_ranks.run_all(backend, folder, setting, ranks, run)


def run(problem: Problem, backend: Backend, how: str, at: At) -> Trace:
    """A problem on all ranks, twice on the same inputs."""
    case, (layer, takes) = problem.case, own.load(backend)
    try:
        if why := own.refusal(layer, takes, problem):
            raise Unsupported(why)
        with jax.enable_x64(case.dtype == "float64"):
            inputs = {name: jnp.asarray(a) for name, a in _inputs(problem).items()}
            step = partial(_step, layer, takes, case, backend, how)
            program = Eager(step) if case.way == "eager" else Program(jax.jit(step))
            first = jax.device_get(program(at, "the first step", inputs))
            again = jax.device_get(program(at, "the first step, repeated", inputs))
    except Unsupported as reason:
        return Trace(case, backend, environment() | {"not supported": str(reason)})
    arrays = {name: _per_rank(case, name, a) for name, a in again.items()}
    for name, a in first.items():
        differ = differing_bits(a, again[name])
        arrays[name.replace("e2e", "repeat", 1)] = [differ, *[np.zeros_like(differ)] * (len(arrays[name]) - 1)]
    return Trace(case, backend, environment(), arrays=arrays)


def _inputs(problem: Problem) -> dict[str, np.ndarray]:
    """Of all ranks: [P, T, ...], and the weights of all experts."""
    names = ("x", "router", "expert_id", "keep", "dout", "aux")
    return {name: getattr(problem, name) for name in names} | problem.weights._asdict()


def _step(
    layer: Callable[..., Any], takes: Signature, case: Case, backend: Backend, how: str, inputs: Arrays
) -> Arrays:
    """Output and gradients, by name."""
    P, e = case.ranks, case.experts // case.ranks
    taken = ["x", *(n for n in ("router", *WEIGHTS) if takes.given(n) or (n == "router" and takes.given("score")))]

    def call(x: jax.Array, ids: jax.Array, keep: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = {"x": x, "expert_id": ids, "keep": keep, "case": case, "axis_name": AXIS if P > 1 else None}
        values |= dict(zip(taken[1:], leaves, strict=True))
        score = jnp.zeros(ids.shape, inputs["router"].dtype)
        if takes.given("score"):

            def chosen(x: jax.Array, ids: jax.Array) -> jax.Array:
                return routing.route(x, values["router"], routing.Router(*case.router), expert_id_TK=ids).score_TK

            values["score"] = score = chosen(x, ids) if takes.per_rank else jax.vmap(chosen)(x, ids)
        out = layer(**own.arguments(takes, values))
        own.checked(out, x.shape, x.dtype, backend)
        return out, score

    def whole(x: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not takes.per_rank:
            return call(x, inputs["expert_id"], inputs["keep"], *leaves)
        replicated = [3 + i for i, n in enumerate(taken[1:]) if n == "router" or takes.all_experts]
        split = [a if 3 + i in replicated else a.reshape(P, e, *a.shape[1:]) for i, a in enumerate(leaves)]
        each = over_ranks(call, P, how, replicated=tuple(replicated))
        return each(x, inputs["expert_id"], inputs["keep"], *split)

    whole = jax.checkpoint(whole) if case.way == "recomputed" else whole
    (out, _), vjp = jax.vjp(whole, *(inputs[name] for name in taken))
    dx, *found = vjp((inputs["dout"], inputs["aux"]))
    gradients = dict(zip(taken[1:], found, strict=True))
    values = {"combine/out": out, "route/dx": dx}
    values |= {"route/drouter": gradients["router"]} if "router" in gradients else {}
    weights = [gradients[name] for name in WEIGHTS if name in gradients]
    values |= {f"apply_experts/{n}": a for n, a in compared(case, weights).items()} if weights else {}
    return {f"e2e/{name}": a for name, a in values.items()}


def _per_rank(case: Case, name: str, a: np.ndarray) -> list[np.ndarray]:
    """An array for each rank; one in all of the router's gradient."""
    if name.endswith("drouter"):
        return [a]
    return list(a) if "dw_" not in name else [own.of_rank(case, a, rank) for rank in range(case.ranks)]
