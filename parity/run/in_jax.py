"""Case -> Trace in JAX: a device per rank under `shard_map`, in one process or in one each; or one for all, `vmap`."""

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_impl import dynamic, exchange, experts, grouping, layer, layout, routing
from jax_impl.dynamic import exchange as dynamic_exchange
from jax_impl.dynamic import grouping as dynamic_grouping
from jax_impl.dynamic import layout as dynamic_layout
from jax_impl.grouping import Capacity, plan_capacity
from parity.cases.case import Case
from parity.oracle import reference
from parity.oracle.problem import Problem
from parity.oracle.rows import Strategy, indices, lay_out, row_tables
from parity.oracle.windows import STRIDE, Windows
from parity.run.backend import DONE, end_with_parent
from parity.run.trace import Trace, differing_bits

AXIS = "ranks"
Arrays = dict[str, jax.Array]


def main(backend: str, folder: Path, how: str, share: int, shares: int) -> None:
    """Run this share of the problems in `folder` and save the traces there; `how` says how ranks are had.

    Cases that share a compilation go to the same share, one after the other.
    """
    cases = {path: Problem.load(path).case for path in sorted(folder.glob("*.problem"))}
    by_program: dict[tuple[Case, Capacity], list[Path]] = {}
    for path, case in cases.items():
        by_program.setdefault((_static(case), _capacity(case)), []).append(path)
    paths = [path for same in list(by_program.values())[share::shares] for path in same]
    if how == "processes":
        for P in sorted({cases[path].ranks for path in paths}):
            _start_processes(backend, folder, P, [path for path in paths if cases[path].ranks == P])
        return
    jax.config.update("jax_num_cpu_devices", max([cases[path].ranks for path in paths], default=1))
    run_all(backend, folder, paths, how)


def run_all(backend: str, folder: Path, paths: list[Path], how: str) -> None:
    """Run the problems in these files one after the other, and say which is done."""
    for path in paths:
        start = time.perf_counter()
        trace = run(Problem.load(path), how, backend)
        trace.seconds = time.perf_counter() - start
        if jax.process_index() == 0:
            trace.save(folder)
            print(DONE + trace.case.name, flush=True)


def _start_processes(backend: str, folder: Path, P: int, paths: list[Path]) -> None:
    """A process per rank, each with one device, that find each other by `jax.distributed`. All end when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = "from parity.run.in_jax import join; join()"
    names = [path.name for path in paths]
    group = [
        subprocess.Popen([sys.executable, "-c", code, backend, str(folder), address, str(P), str(rank), *names])
        for rank in range(P)
    ]
    while any(process.poll() is None for process in group):
        time.sleep(0.1)
        failed = [rank for rank, process in enumerate(group) if process.poll()]
        if failed:
            for process in group:
                process.kill()
            sys.exit(f"rank {failed[0]} of {P} ended with exit code {group[failed[0]].returncode}")


def join() -> None:
    """One rank of several processes."""
    backend, folder, address, P, rank, *names = sys.argv[1:]
    local = [int(rank)] if jax.config.jax_platforms != "cpu" else None  # type: ignore[attr-defined]
    jax.config.update("jax_num_cpu_devices", 1)
    if int(P) > 1:
        jax.distributed.initialize(address, int(P), int(rank), local_device_ids=local)
    run_all(backend, Path(folder), [Path(folder) / name for name in names], "processes")


def run(problem: Problem, how: str, backend: str = "jax") -> Trace:
    """All ranks of a problem: on these inputs, on others, and on these again, which must give the same bits."""
    case = problem.case
    corner = _CORNERS[backend]
    trace = Trace(case, backend, corner.strategy, environment())
    with jax.enable_x64(case.dtype == "float64"):
        end_to_end, isolated = programs(corner, _static(case), _capacity(case), case.capacity, how)
        weights = _weights(problem, how)

        def whole(problem: Problem) -> dict[str, np.ndarray]:
            inputs = put(corner.inputs(problem), case.ranks, how)
            with jax.transfer_guard_device_to_host("disallow"):
                arrays = jax.block_until_ready(end_to_end(weights, inputs))
            return fetch(arrays, how)

        first = whole(problem)
        for other in problem.steps_between():
            whole(other)
        again = whole(problem)
        arrays = again | fetch(isolated(weights, put(_feeds(problem, corner), case.ranks, how)), how)
    trace.arrays = {name: _per_rank(name, a) for name, a in arrays.items()}
    for name, before in first.items():
        repeat = [differing_bits(a, b) for a, b in zip(_per_rank(name, before), trace.arrays[name], strict=True)]
        trace.arrays[name.replace("e2e", "repeat", 1)] = repeat
    return trace


def put(tree: dict[str, np.ndarray], P: int, how: str) -> Arrays:
    """On the devices: a rank's part on the rank's device, the router on all."""
    if how == "vmap" or P == 1:
        return {name: jnp.asarray(a) for name, a in tree.items()}

    def place(name: str, a: np.ndarray) -> jax.Array:
        # Not device_put, which compares what the processes give it, and to which NaN is not equal to NaN.
        return jax.make_array_from_callback(a.shape, _sharding(P, name != "router"), lambda index: a[index])

    return {name: place(name, np.asarray(a)) for name, a in tree.items()}


def fetch(arrays: Arrays, how: str) -> dict[str, np.ndarray]:
    """On the host, those of every process's devices."""
    if how == "processes" and jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_get(arrays)


def _sharding(P: int, split: bool) -> NamedSharding:
    return NamedSharding(_mesh(P), PartitionSpec(AXIS) if split else PartitionSpec())


def _mesh(P: int) -> jax.sharding.Mesh:
    return jax.make_mesh((P,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:P])


def _weights(problem: Problem, how: str) -> Arrays:
    """[P, e, ...]; those of real size are put together from their bank where they are needed."""
    P, e = problem.case.ranks, problem.case.experts // problem.case.ranks
    split = None if how == "vmap" or P == 1 else _sharding(P, True)

    def on_devices(w: np.ndarray | Windows) -> jax.Array:
        if not isinstance(w, Windows):
            return put({"w": w.reshape(P, e, *w.shape[1:])}, P, how)["w"]
        _, rows, columns = w.shape

        def windows(bank):
            starts = jnp.arange(P * e) * STRIDE
            flat = jax.vmap(lambda start: jax.lax.dynamic_slice(bank, (start,), (rows * columns,)))(starts)
            return flat.reshape(P, e, rows, columns)

        bank = put({"router": w.bank}, P, how)["router"]
        return jax.jit(windows, out_shardings=split)(bank)

    return {name: on_devices(w) for name, w in problem.weights._asdict().items()}


def _per_rank(name: str, a: np.ndarray) -> list[np.ndarray]:
    """One array per rank; the end-to-end router gradient, of a replicated argument, is one for all."""
    return [np.asarray(a)] if name == "e2e/route/drouter" else list(np.asarray(a))


def environment() -> dict[str, str]:
    """Versions and devices, for the report."""
    about = {"jax": jax.__version__, "python": platform.python_version(), "platform": platform.platform()}
    waits = {} if jax.default_backend() == "cpu" else {"host waits": "0 a step"}  # more raise, see `run`
    return about | {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"} | waits


def _static(case: Case) -> Case:
    """The case less what does not change the program: cases that differ in these share one compilation."""
    irrelevant = ("name", "pattern", "seed", "recording", "capacity_factor", "capacity_per", "priority", "align")
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
        return jax.shard_map(block, mesh=_mesh(P), in_specs=specs, out_specs=PartitionSpec(AXIS))(*args)

    return sharded


# Compiling is most of what a check costs on a CPU, and the code for stages on their own runs once. The whole layer is
# compiled as users compile it.
_COMPILED_QUICKLY = {"cpu": {"xla_backend_optimization_level": 0}}


class _Static:
    """`jax_impl`'s stages of a case, called as those of `_Dynamic` are: with rows as [rows, D], whatever their bins.

    The whole layer runs with its own capacity; a stage on its own is fed bins of the oracle's.
    """

    strategy: Strategy = "static"

    def __init__(self, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> None:
        self.planned, self.capacity, self.axis = planned, planned._replace(rows=oracle_rows), axis
        per_rank = planned.n_bins == case.ranks
        self.major = (case.ranks * oracle_rows,) if per_rank else (case.experts // case.ranks, -1)
        self.counts_Pe = feeds["counts_Pe"]

    @staticmethod
    def inputs(problem: Problem) -> dict[str, np.ndarray]:
        return {name: getattr(problem, name) for name in ("x", "router", "expert_id", "dout")}

    def in_bins(self, rows: jax.Array) -> jax.Array:
        return rows.reshape(self.capacity.n_bins, self.capacity.rows, *rows.shape[1:])

    def group_by_expert(self, x, ids, score, counts):
        return _rows(grouping.group_by_expert(x, ids, score, counts, self.capacity).x_BCD)

    def exchange_counts(self, counts):
        return exchange.exchange_counts(counts, self.axis)

    def send_tokens(self, x):
        return _rows(exchange.send_tokens(self.in_bins(x), self.axis))

    def to_expert_major(self, x):
        return _rows(layout.to_expert_major(self.in_bins(x), self.counts_Pe).x_SD)

    def apply_experts(self, x, *weights):
        major = x.reshape(*self.major, x.shape[1])
        return _rows(experts.apply_experts(major, self.counts_Pe.sum(axis=0), *weights))

    def to_rank_major(self, y, source, target):
        major = y.reshape(*self.major, y.shape[1])
        return _rows(layout.to_rank_major(major, source.reshape(major.shape[:-1]), self.in_bins(target)))

    def return_tokens(self, y):
        return _rows(exchange.return_tokens(self.in_bins(y), self.axis))

    def combine(self, y, score, keep, slot, assignment):  # noqa: ARG002
        return grouping.combine(self.in_bins(y), score, slot, self.in_bins(assignment))

    def planned_rows(self) -> Arrays:
        return {"capacity": jnp.array(self.planned.rows)}

    @staticmethod
    def layer(case, capacity, axis, x, router, weights, chosen, keep):  # noqa: ARG004
        """The output, every intermediate, and what the gradient of the scores needs."""
        stages = layer.moe_layer(
            x, router, *weights, top_k=case.top_k, capacity=capacity, routing=chosen, axis_name=axis
        )
        grouped = stages.grouped
        values = {
            "route/score": chosen.score_TK,
            "group_by_expert/x": _rows(grouped.x_BCD),
            "group_by_expert/dropped": stages.dropped_E,
            "group_by_expert/dropped_in_all": stages.dropped,
            "exchange_counts/counts": stages.counts_Pe,
            "send_tokens/x": _rows(stages.received_BCD),
            "to_expert_major/x": _rows(stages.expert_major.x_SD),
            "apply_experts/y": _rows(stages.y_SD),
            "to_rank_major/y": _rows(stages.rank_major_BCD),
            "return_tokens/y": _rows(stages.returned_BCD),
        }
        return stages.out_TD, values, (stages.returned_BCD, chosen.score_TK, grouped.slot_TK, grouped.assignment_BC)

    @staticmethod
    def weigh(y, score, slot, assignment, keep):  # noqa: ARG004
        return grouping.combine(y, score, slot, assignment)


class _Dynamic:
    """`jax_impl.dynamic`'s stages of a case, in buffers of the most rows that a rank can receive."""

    strategy: Strategy = "ragged"

    def __init__(self, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> None:  # noqa: ARG002
        self.case, self.axis, self.counts_Pe = case, axis, feeds["counts_Pe"]
        _, self.splits = dynamic_exchange.exchange_counts(feeds["sent_E"], axis)

    @staticmethod
    def inputs(problem: Problem) -> dict[str, np.ndarray]:
        return _Static.inputs(problem) | {"keep": problem.keep}

    def group_by_expert(self, x, ids, score, counts):  # noqa: ARG002
        return dynamic_grouping.group_by_expert(x, ids, counts).x_ND

    def exchange_counts(self, counts):
        return dynamic_exchange.exchange_counts(counts, self.axis)[0]

    def send_tokens(self, x):
        return dynamic_exchange.send_tokens(x, self.splits, self.case.most_received, self.axis)

    def to_expert_major(self, x):
        return dynamic_layout.to_expert_major(x, self.counts_Pe).x_RD

    def apply_experts(self, x, *weights):
        return experts.apply_experts(x, self.counts_Pe.sum(axis=0), *weights)

    def to_rank_major(self, y, source, target):
        return dynamic_layout.to_rank_major(y, source, target)

    def return_tokens(self, y):
        return dynamic_exchange.return_tokens(y, self.splits, self.case.tokens * self.case.top_k, self.axis)

    def combine(self, y, score, keep, slot, assignment):
        return dynamic_grouping.combine(y, score * keep, slot, assignment)

    def planned_rows(self) -> Arrays:
        return {}

    @staticmethod
    def layer(case, capacity, axis, x, router, weights, chosen, keep):  # noqa: ARG004
        """As `_Static.layer`; what a capacity would drop has its score masked."""
        masked = chosen._replace(score_TK=chosen.score_TK * keep)
        stages = dynamic.moe_layer(x, router, *weights, top_k=case.top_k, routing=masked, axis_name=axis)
        grouped = stages.grouped
        values = {
            "route/score": chosen.score_TK,
            "group_by_expert/x": grouped.x_ND,
            "exchange_counts/counts": stages.counts_Pe,
            "send_tokens/x": stages.received_RD,
            "to_expert_major/x": stages.expert_major.x_RD,
            "apply_experts/y": stages.y_RD,
            "to_rank_major/y": stages.rank_major_RD,
            "return_tokens/y": stages.returned_ND,
        }
        return stages.out_TD, values, (stages.returned_ND, chosen.score_TK, grouped.slot_TK, grouped.assignment_N)

    @staticmethod
    def weigh(y, score, slot, assignment, keep):
        return dynamic_grouping.combine(y, score * keep, slot, assignment)


_CORNERS: dict[str, type[_Static] | type[_Dynamic]] = {"jax": _Static, "jax-dynamic": _Dynamic}
Corner = type[_Static] | type[_Dynamic]


@lru_cache(maxsize=4)  # cases with the same program come one after the other; more would only fill memory
def programs(corner: Corner, case: Case, capacity: Capacity, oracle_rows: int, how: str) -> tuple[Callable, Callable]:
    """The whole layer and the stages on their own, each compiled once for all cases of these shapes."""
    axis = AXIS if case.ranks > 1 else None
    each = partial(over_ranks, P=case.ranks, how=how)

    def end_to_end(weights: Arrays, inputs: Arrays) -> Arrays:
        return _end_to_end(corner, case, capacity, axis, each, weights | inputs)

    def isolated(weights: Arrays, feeds: Arrays) -> Arrays:
        return each(partial(_isolated, corner, case, capacity, oracle_rows, axis))(weights | feeds)

    return jax.jit(end_to_end), jax.jit(isolated, compiler_options=_COMPILED_QUICKLY.get(jax.default_backend()))


def _capacity(case: Case) -> Capacity:
    return plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks,
        case.capacity_per, case.priority, case.align,
    )  # fmt: skip


def _end_to_end(
    corner: Corner, case: Case, capacity: Capacity, axis: str | None, each: Callable, whole: Arrays
) -> Arrays:
    """The whole layer and its gradients, with the oracle's expert ids."""
    keep = whole.get("keep", whole["expert_id"])  # of use to the corner that asks for it

    def forward(x, router, ids, keep, *weights):
        how = (case.top_k, case.score_function, case.renormalize, case.scale)
        chosen = routing.route(x, router, *how, expert_id_TK=ids)
        out, *more = corner.layer(case, capacity, axis, x, router, weights, chosen, keep)
        return out, more

    def differentiable(x, router, *weights):
        return each(forward, replicated=(1,))(x, router, whole["expert_id"], keep, *weights)

    inputs = tuple(whole[n] for n in ("x", "router", "w_gate", "w_up", "w_down"))
    out, vjp, (values, combined) = jax.vjp(differentiable, *inputs, has_aux=True)
    dx, drouter, *dw = vjp(whole["dout"])

    def score_gradient(y, score, slot, assignment, keep, dout):
        return jax.vjp(lambda score: corner.weigh(y, score, slot, assignment, keep), score)[1](dout)[0]

    values |= {
        "combine/out": out,
        "combine/dscore": each(score_gradient)(*combined, keep, whole["dout"]),
        **{f"apply_experts/{name}": a for name, a in compared(case, dw).items()},
        "route/drouter": drouter,
        "route/dx": dx,
    }
    return {f"e2e/{name}": value for name, value in values.items()}


def compared(case: Case, dw: Sequence[jax.Array]) -> Arrays:
    """Of the weights' gradients, the rows that are compared."""
    names = ("dw_gate", "dw_up", "dw_down")
    rows = [case.compared_rows(a.shape[-2]) for a in dw]
    return {n: a[..., r if isinstance(r, slice) else np.array(r), :] for n, a, r in zip(names, dw, rows, strict=True)}


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


def _feeds(problem: Problem, corner: Corner) -> dict[str, np.ndarray]:
    case, P = problem.case, problem.case.ranks
    table = row_tables(case, problem.expert_id, problem.keep, corner.strategy)
    rows = {"x": np.repeat(problem.x.reshape(-1, case.width), case.top_k, axis=0)}
    rows |= {n: getattr(problem, n).reshape(-1, case.width) for n in ("y", "dy", "dx_rows")}
    rows["order"] = np.where(problem.keep[..., None], problem.order_probe()[0], 0).reshape(-1, case.width)
    feeds = {n: np.stack(lay_out(rows[of], table[where], fill)) for n, (of, where, fill) in _FEEDS.items()}
    if case.bins == P or corner is _Dynamic:  # rows past the groups, which no expert may read
        feeds["x_expert_major"] = np.stack(lay_out(rows["x"], table["expert_major"], np.nan))
    feeds |= {n: getattr(problem, n) for n in ("x", "expert_id", "other_experts", "score", "dscore", "dout", "keep")}
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, corner.strategy)
    feeds |= {"sent_E": sent_PE.astype(np.int32), "counts_Pe": reference.received(case, sent_PE).astype(np.int32)}
    index = [indices(case, table, rank) for rank in range(P)]
    feeds |= {name: np.stack([i[name] for i in index]).astype(np.int32) for name in index[0]}
    return feeds | {"router_of_rank": np.broadcast_to(problem.router, (P, *problem.router.shape))}


def _isolated(
    corner: Corner, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays
) -> Arrays:
    """Every stage of one rank fed the oracle's input, forward and backward."""
    out: Arrays = {}
    stages = corner(case, planned, oracle_rows, axis, feeds)

    def stage(name: str, **values: jax.Array) -> None:
        out.update({f"isolated/{name}/{key}": value for key, value in values.items()})

    x, router, ids, score, keep = (feeds[n] for n in ("x", "router_of_rank", "expert_id", "score", "keep"))
    how = (case.top_k, case.score_function, case.renormalize, case.scale)
    own = routing.route(x, router, *how)

    def replay(x: jax.Array, router: jax.Array) -> tuple[jax.Array, jax.Array]:
        replayed = routing.route(x, router, *how, expert_id_TK=feeds["other_experts"])
        return replayed.score_TK, replayed.counts_E

    replayed, vjp, replayed_counts = jax.vjp(replay, x, router, has_aux=True)
    dx, drouter = vjp(feeds["dscore"])
    drouter = drouter if axis is None else jax.lax.psum(drouter, axis)
    stage("route", expert_id=own.expert_id_TK, score=replayed, counts=replayed_counts, dx=dx, drouter=drouter)
    counts = routing.count_per_expert(ids, case.experts)

    x_grouped, group_vjp = jax.vjp(lambda x: stages.group_by_expert(x, ids, score, counts), x)
    stage("group_by_expert", x=x_grouped, dx=group_vjp(feeds["dx_grouped"])[0], **stages.planned_rows())

    stage("exchange_counts", counts=stages.exchange_counts(feeds["sent_E"]))

    x_received, vjp = jax.vjp(stages.send_tokens, feeds["x_grouped"])
    stage("send_tokens", x=x_received, dx=vjp(feeds["dx_received"])[0])

    x_major, vjp = jax.vjp(stages.to_expert_major, feeds["x_received"])
    stage("to_expert_major", x=x_major, dx=vjp(feeds["dx_expert_major"])[0])

    weights = tuple(feeds[n] for n in ("w_gate", "w_up", "w_down"))
    y, vjp = jax.vjp(stages.apply_experts, feeds["x_expert_major"], *weights)
    dx, *dw = vjp(feeds["dy_expert_major"])
    stage("apply_experts", y=y, dx=dx, **compared(case, dw))

    y, vjp = jax.vjp(lambda y: stages.to_rank_major(y, feeds["source"], feeds["target"]), feeds["y_expert_major"])
    stage("to_rank_major", y=y, dy=vjp(feeds["dy_received"])[0])

    y, vjp = jax.vjp(stages.return_tokens, feeds["y_received"])
    stage("return_tokens", y=y, dy=vjp(feeds["dy_grouped"])[0])

    def combine(y, score):
        return stages.combine(y, score, keep, feeds["slot"], feeds["assignment"])

    result, vjp = jax.vjp(combine, feeds["y_grouped"], score)
    dy, dscore = vjp(feeds["dout"])
    stage("combine", out=result, dy=dy, dscore=dscore)

    if case.top_k >= 3:
        stage("combine", order=combine(feeds["order_grouped"], keep.astype(score.dtype)))
        stage("group_by_expert", dx_order=group_vjp(feeds["order_grouped"])[0])
    return out


def _rows(a: jax.Array) -> jax.Array:
    """[..., D] as [rows, D]."""
    return a.reshape(-1, a.shape[-1])


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
