"""Case -> Trace in JAX: one device per rank under `shard_map`, or all ranks on one device under `vmap`."""

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jax_impl import exchange, experts, grouping, layer, layout, routing
from jax_impl.grouping import Capacity, plan_capacity
from parity import reference
from parity.backends import end_with_parent
from parity.case import Case
from parity.inputs import Problem
from parity.rows import indices, lay_out, row_tables
from parity.trace import Trace, differing_bits

AXIS = "ranks"
Arrays = dict[str, jax.Array]


def main(folder: Path, how: str, share: int, shares: int) -> None:
    """Run this share of the problems in `folder` and save the traces there; `how` is shard_map or vmap.

    Cases that share a compilation go to the same share.
    """
    problems = [Problem.load(path) for path in sorted(folder.glob("*.problem"))]
    programs = {(_static(problem.case), _capacity(problem.case)): None for problem in problems}
    mine = list(programs)[share::shares]
    problems = [problem for problem in problems if (_static(problem.case), _capacity(problem.case)) in mine]
    jax.config.update("jax_num_cpu_devices", max([problem.case.ranks for problem in problems], default=1))
    for problem in problems:
        start = time.perf_counter()
        trace = run(problem, how)
        trace.seconds = time.perf_counter() - start
        trace.save(folder)
        print(trace.case.name, flush=True)


def run(problem: Problem, how: str) -> Trace:
    """All ranks of a problem: on these inputs, on others, and on these again, which must give the same bits."""
    case = problem.case
    trace = Trace(case, "jax", "static", environment())
    with jax.enable_x64(case.dtype == "float64"):
        compiled = everything(_static(case), _capacity(case), case.capacity, how)
        feeds = _feeds(problem)
        first = jax.device_get(compiled(_end_to_end_inputs(problem), feeds))
        for other in problem.steps_between():
            compiled(_end_to_end_inputs(other), feeds)
        arrays = jax.device_get(compiled(_end_to_end_inputs(problem), feeds))
    trace.arrays = {name: _per_rank(name, a) for name, a in arrays.items()}
    for name in [name for name in arrays if name.startswith("e2e")]:
        before, after = _per_rank(name, first[name]), trace.arrays[name]
        repeat = [differing_bits(a, b) for a, b in zip(before, after, strict=True)]
        trace.arrays[name.replace("e2e", "repeat", 1)] = repeat
    return trace


def _per_rank(name: str, a: jax.Array) -> list[np.ndarray]:
    """One array per rank; the end-to-end router gradient, of a replicated argument, is one for all."""
    return [np.asarray(a)] if name == "e2e/route/drouter" else list(np.asarray(a))


def environment() -> dict[str, str]:
    """Versions and devices, for the report."""
    return {"jax": jax.__version__, "python": platform.python_version(), "platform": platform.platform()}


def _static(case: Case) -> Case:
    """The case less what does not change the program: cases that differ in these share one compilation."""
    irrelevant = ("name", "pattern", "seed", "trace", "capacity_factor", "capacity_per", "priority", "align")
    return replace(case, **{field: getattr(Case(), field) for field in irrelevant})


def over_ranks(f: Callable, P: int, how: str, *, replicated: tuple[int, ...] = ()) -> Callable:
    """`f` on every rank: arguments and results have a leading rank axis, but for the arguments `replicated`."""
    axis = AXIS if P > 1 else None
    if how == "vmap" and P > 1:
        return lambda *args: jax.vmap(
            f, in_axes=tuple(None if i in replicated else 0 for i in range(len(args))), axis_name=axis
        )(*args)

    def block(*args):
        args = [a if i in replicated else jax.tree.map(lambda a: a[0], a) for i, a in enumerate(args)]
        return jax.tree.map(lambda a: a[None], f(*args))

    if P == 1:
        return block

    def sharded(*args):
        specs = tuple(PartitionSpec() if i in replicated else PartitionSpec(AXIS) for i in range(len(args)))
        mesh = jax.make_mesh((P,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:P])
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS))(*args)

    return sharded


@lru_cache(maxsize=4)  # cases with the same program come one after the other; more would only fill memory
def everything(case: Case, capacity: Capacity, oracle_rows: int, how: str) -> Callable:
    """One compiled function for all that a case asks for, end to end and stage by stage.

    The whole layer runs with its own capacity; a stage on its own is fed bins of the oracle's.
    """
    axis = AXIS if case.ranks > 1 else None
    each = partial(over_ranks, P=case.ranks, how=how)

    def compiled(whole: Arrays, feeds: Arrays) -> Arrays:
        return _end_to_end(case, capacity, axis, each, whole) | each(
            partial(_isolated, case, capacity, oracle_rows, axis)
        )(feeds)

    return jax.jit(compiled)


def _capacity(case: Case) -> Capacity:
    return plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks,
        case.capacity_per, case.priority, case.align,
    )  # fmt: skip


def _end_to_end_inputs(problem: Problem) -> Arrays:
    names = ("x", "router", "expert_id", "dout")
    P = problem.case.ranks
    weights = {n: w.reshape(P, -1, *w.shape[1:]) for n, w in problem.weights._asdict().items()}
    return {n: jnp.asarray(a) for n, a in ({n: getattr(problem, n) for n in names} | weights).items()}


def _end_to_end(case: Case, capacity: Capacity, axis: str | None, each: Callable, whole: Arrays) -> Arrays:
    """The whole layer and its gradients, with the oracle's expert ids."""

    def forward(x, router, ids, *weights):
        how = (case.top_k, case.score_function, case.renormalize, case.scale)
        chosen = routing.route(x, router, *how, expert_id_TK=ids)
        stages = layer.moe_layer(
            x, router, *weights, top_k=case.top_k, capacity=capacity, routing=chosen, axis_name=axis
        )
        return stages.out_TD, stages

    def differentiable(x, router, *weights):
        return each(forward, replicated=(1,))(x, router, whole["expert_id"], *weights)

    inputs = tuple(whole[n] for n in ("x", "router", "w_gate", "w_up", "w_down"))
    _, vjp, stages = jax.vjp(differentiable, *inputs, has_aux=True)
    dx, drouter, dw_gate, dw_up, dw_down = vjp(whole["dout"])

    def score_gradient(y, score, slot, assignment, dout):
        return jax.vjp(lambda score: grouping.combine(y, score, slot, assignment), score)[1](dout)[0]

    grouped = stages.grouped
    dscore = each(score_gradient)(
        stages.returned_BCD, stages.routing.score_TK, grouped.slot_TK, grouped.assignment_BC, whole["dout"]
    )
    values = {
        "route/score": stages.routing.score_TK,
        "group_by_expert/x": _flat(grouped.x_BCD),
        "group_by_expert/dropped": stages.dropped_E,
        "group_by_expert/dropped_in_all": stages.dropped,
        "exchange_counts/counts": stages.counts_Pe,
        "send_tokens/x": _flat(stages.received_BCD),
        "to_expert_major/x": _flat(stages.expert_major.x_SD),
        "apply_experts/y": _flat(stages.y_SD),
        "to_rank_major/y": _flat(stages.rank_major_BCD),
        "return_tokens/y": _flat(stages.returned_BCD),
        "combine/out": stages.out_TD,
        "combine/dscore": dscore,
        "apply_experts/dw_gate": dw_gate,
        "apply_experts/dw_up": dw_up,
        "apply_experts/dw_down": dw_down,
        "route/drouter": drouter,
        "route/dx": dx,
    }
    return {f"e2e/{name}": value for name, value in values.items()}


def _flat(a: jax.Array) -> jax.Array:
    """[P, ..., D] as rows, [P, rows, D]."""
    return a.reshape(a.shape[0], -1, a.shape[-1])


# What each isolated stage is fed: the oracle's value, and the row order it comes in. Padding is NaN where the stage
# must not let it through, and zero where the stage before has promised that.
_FEEDS = {
    "x_grouped": ("x", "grouped", np.nan),
    "x_received": ("x", "received", np.nan),
    "x_expert_major": ("x", "expert_major", 0),
    "y_expert_major": ("y", "expert_major", np.nan),
    "y_received": ("y", "received", np.nan),
    "y_grouped": ("y", "grouped", np.nan),
    "dx_grouped": ("dx_rows", "grouped", np.nan),
    "dx_received": ("dx_rows", "received", np.nan),
    "dx_expert_major": ("dx_rows", "expert_major", np.nan),
    "dy_expert_major": ("dy", "expert_major", 0),
    "dy_received": ("dy", "received", np.nan),
    "dy_grouped": ("dy", "grouped", np.nan),
    "order_grouped": ("order", "grouped", np.nan),
}


def _feeds(problem: Problem) -> Arrays:
    case, P = problem.case, problem.case.ranks
    table = row_tables(case, problem.expert_id, problem.keep, "static")
    rows = {"x": np.repeat(problem.x.reshape(-1, case.width), case.top_k, axis=0)}
    rows |= {n: getattr(problem, n).reshape(-1, case.width) for n in ("y", "dy", "dx_rows")}
    rows["order"] = problem.order_probe()[0].reshape(-1, case.width)
    feeds = {n: np.stack(lay_out(rows[of], table[where], fill)) for n, (of, where, fill) in _FEEDS.items()}
    if case.bins == P:  # rows past the groups, which no expert may read
        feeds["x_expert_major"] = np.stack(lay_out(rows["x"], table["expert_major"], np.nan))
    feeds |= {n: getattr(problem, n) for n in ("x", "expert_id", "score", "dscore", "dout")}
    feeds |= {n: w.reshape(P, -1, *w.shape[1:]) for n, w in problem.weights._asdict().items()}
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, "static")
    feeds |= {"sent_E": sent_PE.astype(np.int32), "counts_Pe": reference.received(case, sent_PE).astype(np.int32)}
    index = [indices(case, table, rank) for rank in range(P)]
    feeds |= {name: np.stack([i[name] for i in index]).astype(np.int32) for name in index[0]}
    feeds["router"] = np.broadcast_to(problem.router, (P, *problem.router.shape))
    return {n: jnp.asarray(a) for n, a in feeds.items()}


def _isolated(case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> Arrays:
    """Every stage of one rank fed the oracle's input, forward and backward."""
    out: Arrays = {}
    capacity = planned._replace(rows=oracle_rows)
    bins = (capacity.n_bins, capacity.rows, case.width)
    in_bins = {n: a.reshape(bins) for n, a in feeds.items() if n.endswith(("_grouped", "_received"))}
    per_expert = capacity.n_bins != case.ranks
    major = {
        n: a.reshape(case.experts // case.ranks, -1, case.width) if per_expert else a
        for n, a in feeds.items()
        if n.endswith("_expert_major")
    }

    def stage(name: str, **values: jax.Array) -> None:
        out.update({f"isolated/{name}/{key}": value for key, value in values.items()})

    x, router, ids, score = (feeds[n] for n in ("x", "router", "expert_id", "score"))
    how = (case.top_k, case.score_function, case.renormalize, case.scale)
    own = routing.route(x, router, *how)
    counts = routing.count_per_expert(ids, case.experts)
    chosen, vjp = jax.vjp(lambda x, router: routing.route(x, router, *how, expert_id_TK=ids).score_TK, x, router)
    dx, drouter = vjp(feeds["dscore"])
    drouter = drouter if axis is None else jax.lax.psum(drouter, axis)
    stage("route", expert_id=own.expert_id_TK, score=chosen, counts=counts, dx=dx, drouter=drouter)

    x_BCD, group_vjp = jax.vjp(lambda x: grouping.group_by_expert(x, ids, score, counts, capacity).x_BCD, x)
    stage("group_by_expert", capacity=jnp.array(planned.rows), x=_rows(x_BCD), dx=group_vjp(in_bins["dx_grouped"])[0])

    stage("exchange_counts", counts=exchange.exchange_counts(feeds["sent_E"], axis))
    counts_Pe, slot = feeds["counts_Pe"], feeds["slot"]
    assignment, target = (feeds[n].reshape(bins[:2]) for n in ("assignment", "target"))
    source = feeds["source"].reshape(major["y_expert_major"].shape[:-1])

    x_BCD, vjp = jax.vjp(lambda x: exchange.send_tokens(x, axis), in_bins["x_grouped"])
    stage("send_tokens", x=_rows(x_BCD), dx=_rows(vjp(in_bins["dx_received"])[0]))

    x_SD, vjp = jax.vjp(lambda x: layout.to_expert_major(x, counts_Pe).x_SD, in_bins["x_received"])
    stage("to_expert_major", x=_rows(x_SD), dx=_rows(vjp(major["dx_expert_major"])[0]))

    weights = tuple(feeds[n] for n in ("w_gate", "w_up", "w_down"))
    y_SD, vjp = jax.vjp(
        lambda x, *w: experts.apply_experts(x, counts_Pe.sum(axis=0), *w), major["x_expert_major"], *weights
    )
    dx, dw_gate, dw_up, dw_down = vjp(major["dy_expert_major"])
    stage("apply_experts", y=_rows(y_SD), dx=_rows(dx), dw_gate=dw_gate, dw_up=dw_up, dw_down=dw_down)

    y_BCD, vjp = jax.vjp(lambda y: layout.to_rank_major(y, source, target), major["y_expert_major"])
    stage("to_rank_major", y=_rows(y_BCD), dy=_rows(vjp(in_bins["dy_received"])[0]))

    y_BCD, vjp = jax.vjp(lambda y: exchange.return_tokens(y, axis), in_bins["y_received"])
    stage("return_tokens", y=_rows(y_BCD), dy=_rows(vjp(in_bins["dy_grouped"])[0]))

    out_TD, vjp = jax.vjp(lambda y, score: grouping.combine(y, score, slot, assignment), in_bins["y_grouped"], score)
    dy, dscore = vjp(feeds["dout"])
    stage("combine", out=out_TD, dy=_rows(dy), dscore=dscore)

    if case.top_k >= 3:
        ones = jnp.ones_like(score)
        order = grouping.combine(in_bins["order_grouped"], ones, slot, assignment)
        stage("combine", order=order)
        stage("group_by_expert", order=group_vjp(in_bins["order_grouped"])[0])
    return out


def _rows(a: jax.Array) -> jax.Array:
    """[..., D] as [rows, D]."""
    return a.reshape(-1, a.shape[-1])


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
