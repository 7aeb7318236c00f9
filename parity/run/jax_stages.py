"""The stages of a case in JAX, each on its own and all of them as the layer, and their compiled programs."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import jax_impl
from jax_impl import direct, dynamic, exchange, experts, grouping, layer, layout, routing
from jax_impl.direct import exchange as direct_exchange
from jax_impl.direct import grouping as direct_grouping
from jax_impl.direct import layout as direct_layout
from jax_impl.dynamic import exchange as dynamic_exchange
from jax_impl.dynamic import grouping as dynamic_grouping
from jax_impl.dynamic import layout as dynamic_layout
from jax_impl.grouping import Capacity, plan_capacity
from parity.cases.case import Case, not_default
from parity.cases.parameters import BY_NAME, Parameter, parameters_of
from parity.oracle import reference
from parity.oracle.problem import Problem
from parity.oracle.quantities import QUANTITIES
from parity.oracle.rows import Layout, Table, indices, lay_out, padded, row_tables, straight
from parity.oracle.vectorised import small
from parity.oracle.windows import STRIDE, Windows
from parity.run import jax_ranks
from parity.run.backend import Backend, Setting, resolve
from parity.run.jax_ranks import AXIS, At, Eager, Program, fetch, over_ranks, put
from parity.run.naming import MAIN, named, named_stages, together
from parity.run.trace import Trace, differing_bits

Arrays = dict[str, jax.Array]
Ranks = dict[str, list[np.ndarray]]


def run_all(backend: Backend, folder: Path, setting: Setting) -> None:
    """Run this process's share of the problems in `folder` and save the traces there.

    Cases that share a compilation go to the same share, one after the other.
    """
    if setting.device == "cpu":
        quickly = " ".join(f"--{flag}={value}" for flag, value in _QUICKLY.items())
        os.environ["XLA_FLAGS"] = f"{quickly} {os.environ.get('XLA_FLAGS', '')}"
    cases = {path: Problem.load(path).case for path in sorted(folder.glob("*.problem"))}
    by_program: dict[tuple[Case, Capacity], list[Path]] = {}
    for path, case in cases.items():
        by_program.setdefault((_static(case), _capacity(case)), []).append(path)
    paths = [path for same in list(by_program.values())[setting.share :: setting.shares] for path in same]
    jax_ranks.run_all(backend, folder, setting, {path: cases[path].processes for path in paths}, run)


def work(backend: Backend, setting: Setting) -> jax_ranks.Work:  # noqa: ARG001  the same for all
    """The function that runs one problem."""
    return run


def run(problem: Problem, backend: Backend, how: str, at: At) -> Trace:
    """All ranks of a problem: on these inputs, on others, and on these again, which must give the same bits.

    Where the case has a second step, it is in flight with the first in the same program, in both orders, or runs in a
    second group of the same mesh. Whatever a kernel leaves unwritten is NaN.
    """
    case = problem.case
    stages_of: Stages = resolve(backend.stages)
    trace = Trace(case, backend, environment() | ({} if case.way == "eager" else host_waits()))
    how_whole = "vmap" if case.way == "eager" else how  # under shard_map, each operation would be a program of its own
    groups = case.processes // case.ranks
    with jax.enable_x64(case.dtype == "float64"), poisoned_memory():
        whole_layer, isolated = programs(
            stages_of, _static(case), _capacity(case), case.capacity, how,
            bool(problem.second and problem.second.own_choice), frozenset(backend.provides),
        )  # fmt: skip
        learned = _learned(problem, how_whole, groups)

        def whole(first: Problem, stage: str) -> Arrays:
            steps = [stages_of.inputs(one) for one in (first, problem.second) if one]
            if groups > 1:
                steps = [{name: np.stack([step[name] for step in steps]) for name in steps[0]}]
            inputs = [put(step, case.ranks, how_whole, groups=groups) for step in steps]
            # Outside a program, checks read the arguments, so a step may make the host wait.
            guard = "allow" if case.way == "eager" else "disallow"
            with jax.transfer_guard_device_to_host(guard):
                return whole_layer(at, stage, learned, *inputs)

        first = fetch(whole(problem, "the first step"), how_whole)
        for other in problem.steps_between():
            whole(other, "steps on other inputs")
        again = fetch(whole(problem, "the first step, repeated"), how_whole)
        differ = _differing(_per_rank(first, groups), arrays := _per_rank(again, groups))
        del first, again
        of_stages = learned if how == how_whole and groups == 1 else _learned(problem, how)
        for program, rows in zip(isolated, parts_of(case), strict=True):
            feeds = put(_feeds(problem, stages_of, rows), case.ranks, how)
            alone = program(at, "the stages on their own", of_stages, feeds)
            del feeds
            arrays |= differ | _per_rank(fetch(alone, how), 1)
    arrays = without_missing(case, arrays) if stages_of is Direct and case.uneven else arrays
    trace.arrays = {name: arrays[name] for name in backend.provides if name in arrays}
    return trace


def _differing(first: Ranks, again: Ranks) -> Ranks:
    """In how many numbers two runs differ, or two backwards of steps in flight, by repeat/stage/value."""
    counted: Ranks = {}
    for name, ranks in first.items():
        mode, _, quantity = name.partition("/")
        if name.endswith(TURNED) or mode not in ("e2e", "second"):
            continue
        others = [again[n] for n in (name, name + TURNED) if n in again]
        differ = [sum(differing_bits(a, b) for b in of_rank) for a, *of_rank in zip(ranks, *others, strict=True)]
        before = counted.get(f"repeat/{quantity}", [np.array(0)] * len(ranks))
        counted[f"repeat/{quantity}"] = [np.array(a + b) for a, b in zip(before, differ, strict=True)]
    return counted


def without_missing(case: Case, arrays: Ranks) -> Ranks:
    """Slots of a rank's own tokens, as a layer has them that is given no tokens that are padding."""

    def own(name: str, rank: int, a: np.ndarray) -> np.ndarray:
        quantity, N = QUANTITIES.get(name.partition("/")[2].removesuffix(TURNED)), case.tokens_of(rank) * case.top_k
        if quantity is None or name.startswith("repeat"):
            return a
        if quantity.name == "group_by_expert/slot":
            return np.where(a == case.assignments, N, a)
        return a[:N] if quantity.order == "grouped" else a

    return {name: [own(name, rank, a) for rank, a in enumerate(ranks)] for name, ranks in arrays.items()}


def _learned(problem: Problem, how: str, groups: int = 1) -> Arrays:
    """Of the experts [P, e, ...], the same on all ranks of the rest; for several groups with one more axis.

    Weights of real size are put together from their bank where they are needed.
    """
    P, e = problem.case.ranks, problem.case.experts // problem.case.ranks
    split = None if how == "vmap" or P == 1 else jax_ranks.sharding(P, True)

    def on_devices(parameter: Parameter, w: np.ndarray | Windows) -> jax.Array:
        if not isinstance(w, Windows):
            of_ranks = w.reshape(P, e, *w.shape[1:]) if parameter.per_rank else w
            of_groups = np.stack([of_ranks] * groups) if groups > 1 else of_ranks
            return put({"w": of_groups}, P, how, split=parameter.per_rank, groups=groups)["w"]
        _, rows, columns = w.shape

        def windows(bank):
            starts = jnp.arange(P * e) * STRIDE
            flat = jax.vmap(lambda start: jax.lax.dynamic_slice(bank, (start,), (rows * columns,)))(starts)
            return flat.reshape(P, e, rows, columns)

        bank = put({"w": w.bank}, P, how, split=False)["w"]
        return jax.jit(windows, out_shardings=split)(bank)

    return {name: on_devices(BY_NAME[name], w) for name, w in problem.parameters.there().items()}


TURNED = "'"  # ends the name of an array of two steps in flight whose backwards came in the other order


def _per_rank(arrays: dict[str, np.ndarray], groups: int) -> dict[str, list[np.ndarray]]:
    """One array per rank; the router's gradient of the layer, of a replicated argument, is one for all.

    With two groups their arrays have one more axis: the second's are those of the second step.
    """
    if groups > 1:
        of_group = enumerate(("e2e", "second"))
        arrays = {name.replace("e2e", mode, 1): a[g] for g, mode in of_group for name, a in arrays.items()}
    summed = {one.gradient for one in BY_NAME.values() if not one.per_rank}

    def one_for_all(name: str) -> bool:
        mode, _, value = name.removesuffix(TURNED).partition("/")
        return mode in ("e2e", "second") and value in summed

    return {name: [a] if one_for_all(name) else list(a) for name, a in arrays.items()}


def environment() -> dict[str, str]:
    """Versions and devices, for the report."""
    about = {"jax": jax.__version__, "python": platform.python_version(), "platform": platform.platform()}
    return about | {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def host_waits() -> dict[str, str]:
    """How often a step made the host wait for the device: more raise, see `run`. On a CPU the host never waits."""
    return {} if jax.default_backend() == "cpu" else {"host waits": "0 a step"}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In programs traced in this block, what a Pallas kernel does not write is NaN, or the largest integer.

    XLA has no option that fills fresh memory. Its own operations write all of their results, and only a kernel's may
    be left as they were: so each kernel is given arrays that its results take the place of. Those that say more of
    their arguments than ours do, as blocks, are left alone.
    """
    plain = pl.pallas_call

    def pallas_call(kernel: Callable, out_shape: Any, **how: Any) -> Callable:
        results = jax.tree.leaves(out_shape)
        if how.keys() & {"grid_spec", "in_specs", "out_specs", "input_output_aliases", "scratch_shapes"}:
            return plain(kernel, out_shape, **how)

        def call(*operands: jax.Array) -> Any:
            n, m = len(operands), len(results)
            poison = [_poison(result, operands) for result in results]
            aliases = {n + i: i for i in range(m)}

            def over(*refs: Any) -> None:
                kernel(*refs[:n], *refs[n + m :])

            return plain(over, out_shape, input_output_aliases=aliases, **how)(*operands, *poison)

        return call

    pl.pallas_call = pallas_call
    try:
        yield
    finally:
        pl.pallas_call = plain


def _poison(result: Any, operands: Iterable[jax.Array]) -> jax.Array:
    """An array as the result is; under shard_map it varies, as that does, over what an operand varies over."""
    value = jnp.iinfo(result.dtype).max if jnp.issubdtype(result.dtype, jnp.integer) else jnp.nan
    zero = sum(a.reshape(-1)[:0].sum().astype(result.dtype) for a in operands)
    return jnp.full(result.shape, zero + jnp.array(value, result.dtype), result.dtype)


def _static(case: Case) -> Case:
    """The case less what does not change the program: cases that differ in these share one compilation."""
    numbers = ("name", "pattern", "seed", "recording", "logit_scale", "logit_offset", "outlier")
    in_capacity = ("capacity_factor", "capacity_per", "priority", "align")
    return replace(case, **{field: getattr(Case(), field) for field in numbers + in_capacity})


# Compiling is most of what a check costs on a CPU. So XLA compiles at its quickest there, which takes a third of the
# time; the way "compiled" is compiled as users compile it. From 0.11 on there is no other emitter to choose.
_QUICKLY = {"xla_backend_optimization_level": 0}
_AS_USERS_DO: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    _QUICKLY["xla_cpu_use_fusion_emitters"] = 0
    # In an order that lets memory be used again, not one that keeps cores busy, which ranks do: half the memory.
    _QUICKLY["xla_cpu_enable_concurrency_optimized_scheduler"] = 0
    _AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True


class Static:
    """`jax_impl`'s stages of a case, called as those of `Ragged`; rows come and go as [rows, D], whatever their bins.

    The whole layer runs with its own capacity; a stage on its own is fed bins of the oracle's.
    """

    layout: Layout = "static"

    def __init__(self, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> None:
        self.planned, self.capacity, self.axis = planned, planned._replace(rows=oracle_rows), axis
        self.how = options_of(case)["experts"]
        per_rank = planned.n_bins == case.ranks
        self.major = (case.ranks * oracle_rows,) if per_rank else (case.experts // case.ranks, -1)
        self.counts_Pe = feeds["counts_Pe"]

    @staticmethod
    def inputs(problem: Problem) -> dict[str, np.ndarray]:
        return {name: getattr(problem, name) for name in ("x", "expert_id", "score", "dout", "aux")}

    def in_bins(self, rows: jax.Array) -> jax.Array:
        return rows.reshape(self.capacity.n_bins, self.capacity.rows, *rows.shape[1:])

    def group_by_expert(self, x, ids, score, counts):
        return grouping.group_by_expert(x, ids, score, counts, self.capacity)

    def exchange_counts(self, counts):
        return exchange.exchange_counts(counts, self.axis)

    def send_tokens(self, x):
        return exchange.send_tokens(self.in_bins(x), self.axis)

    def to_expert_major(self, x):
        return layout.to_expert_major(self.in_bins(x), self.counts_Pe)

    def apply_experts(self, x, learned):
        major, counts_e = x.reshape(*self.major, x.shape[1]), self.counts_Pe.sum(axis=0)
        return experts.apply_experts(major, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def to_rank_major(self, y, source, target):
        major = y.reshape(*self.major, y.shape[1])
        return layout.to_rank_major(major, source.reshape(major.shape[:-1]), self.in_bins(target))

    def return_tokens(self, y):
        return exchange.return_tokens(self.in_bins(y), self.axis)

    def combine(self, y, score, keep, slot, assignment):  # noqa: ARG002
        return grouping.combine(self.in_bins(y), score, slot, self.in_bins(assignment))

    def planned_rows(self) -> Arrays:
        return {"capacity": jnp.array(self.planned.rows)}

    @staticmethod
    def layer(case, capacity, axis, x, learned, chosen, keep) -> tuple[Any, tuple]:  # noqa: ARG004
        """The whole layer, and what the gradient of the scores needs."""
        how = options_of(case) | together(jax_impl, learned) | {"routing": chosen, "axis_name": axis}
        stages = layer.moe_layer(x, learned["router"], *weights_in(learned), **how, capacity=capacity)
        grouped = stages.grouped
        return stages, (stages.returned_BCD, stages.routing.score_TK, grouped.slot_TK, grouped.assignment_BC)

    @staticmethod
    def weigh(y, score, slot, assignment, keep, axis):  # noqa: ARG004
        return grouping.combine(y, score, slot, assignment)


class Ragged:
    """`jax_impl.dynamic`'s stages of a case, in buffers of the most rows that a rank can receive."""

    layout: Layout = "ragged"

    def __init__(self, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> None:  # noqa: ARG002
        self.case, self.axis, self.counts_Pe = case, axis, feeds["counts_Pe"]
        self.how = options_of(case)["experts"]
        _, self.splits = dynamic_exchange.exchange_counts(feeds["sent_E"], axis)

    @staticmethod
    def inputs(problem: Problem) -> dict[str, np.ndarray]:
        return Static.inputs(problem) | {"keep": problem.keep}

    def group_by_expert(self, x, ids, score, counts):  # noqa: ARG002
        return dynamic_grouping.group_by_expert(x, ids, counts)

    def exchange_counts(self, counts):
        return dynamic_exchange.exchange_counts(counts, self.axis)

    def send_tokens(self, x):
        return dynamic_exchange.send_tokens(x, self.splits, self.case.most_received, self.axis)

    def to_expert_major(self, x):
        return dynamic_layout.to_expert_major(x, self.counts_Pe)

    def apply_experts(self, x, learned):
        counts_e = self.counts_Pe.sum(axis=0)
        return experts.apply_experts(x, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def to_rank_major(self, y, source, target):
        return dynamic_layout.to_rank_major(y, source, target)

    def return_tokens(self, y):
        return dynamic_exchange.return_tokens(y, self.splits, self.case.assignments, self.axis)

    def combine(self, y, score, keep, slot, assignment):
        return dynamic_grouping.combine(y, score * keep, slot, assignment)

    def planned_rows(self) -> Arrays:
        return {}

    @staticmethod
    def layer(case, capacity, axis, x, learned, chosen, keep) -> tuple[Any, tuple]:  # noqa: ARG004
        """As `Static.layer`; what a capacity would drop has its score masked."""
        masked = chosen and chosen._replace(score_TK=chosen.score_TK * keep)
        how = options_of(case) | together(jax_impl, learned) | {"routing": masked, "axis_name": axis}
        stages = dynamic.moe_layer(x, learned["router"], *weights_in(learned), **how)
        grouped = stages.grouped
        own = chosen or stages.routing
        return stages, (stages.returned_ND, own.score_TK, grouped.slot_TK, grouped.assignment_N)

    @staticmethod
    def weigh(y, score, slot, assignment, keep, axis):  # noqa: ARG004
        return dynamic_grouping.combine(y, score * keep, slot, assignment)


class Direct:
    """`jax_impl.direct`'s stages of a case. Rows move once each way, so its stages take other arguments."""

    layout: Layout = "direct"

    def __init__(self, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, feeds: Arrays) -> None:  # noqa: ARG002
        self.axis, self.counts_Pe = axis, feeds["counts_Pe"]
        self.how = options_of(case)["experts"]

    @staticmethod
    def inputs(problem: Problem) -> dict[str, np.ndarray]:
        return Ragged.inputs(problem)

    def group_by_expert(self, x, ids, score, counts):  # noqa: ARG002
        return direct_grouping.group_by_expert(ids, counts)

    def exchange_counts(self, counts):
        return direct_exchange.exchange_counts(counts, self.axis)

    def to_expert_major(self, slot, counts_PE):
        return direct_layout.to_expert_major(slot, counts_PE, self.axis)

    def send_tokens(self, x, slot, place, origin):
        return direct_exchange.send_tokens(x, slot, place, origin, self.axis)

    def apply_experts(self, x, learned):
        counts_e = self.counts_Pe.sum(axis=0)
        return experts.apply_experts(x, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def return_tokens(self, y, place, origin):
        return direct_exchange.return_tokens(y, place, origin, self.axis)

    def combine(self, y, returned, score, keep, slot, place):
        return direct_grouping.combine(y, returned, score * keep, slot, place, self.axis)

    def planned_rows(self) -> Arrays:
        return {}

    @staticmethod
    def layer(case, capacity, axis, x, learned, chosen, keep) -> tuple[Any, tuple]:  # noqa: ARG004
        """As `Ragged.layer`; rows without what stands past the last."""
        masked = chosen and chosen._replace(score_TK=chosen.score_TK * keep)
        how = options_of(case) | together(jax_impl, learned) | {"routing": masked, "axis_name": axis}
        stages = direct.moe_layer(x, learned["router"], *weights_in(learned), **how)
        place_N, origin_R = stages.expert_major
        seen = stages._replace(
            placed_RD=jnp.where(origin_R[:, None] >= 0, stages.placed_RD, 0),
            returned_ND=jnp.where(place_N[:, None] >= 0, stages.returned_ND, 0),
        )
        own = chosen or stages.routing
        return seen, ((stages.y_RD, stages.returned_ND), own.score_TK, stages.grouped.slot_TK, place_N)

    @staticmethod
    def weigh(y, score, slot, place, keep, axis):
        y_RD, returned_ND = y
        return direct_grouping.combine(y_RD, returned_ND, score * keep, slot, place, axis)


Stages = type[Static] | type[Ragged] | type[Direct]


def options_of(case: Case) -> dict[str, Any]:
    """How the layer routes and computes, for `moe_layer`."""
    of_router, of_experts = not_default(case.router), not_default(case.expert)
    return {"router": routing.Router(**of_router), "experts": experts.Experts(**of_experts)}


def weights_in(learned: Arrays) -> tuple[Any, Any, Any]:
    """The experts' weights; None for a gate that there is not."""
    return learned.get("w_gate"), learned["w_up"], learned["w_down"]


def biases_in(learned: Arrays) -> dict[str, Any]:
    """The experts' biases, as the argument of `apply_experts`; nothing where there are none."""
    return together(jax_impl, learned, "biases")


@lru_cache(maxsize=4)  # cases with the same program come one after the other; more would only fill memory
def programs(
    stages_of: Stages, case: Case, capacity: Capacity, oracle_rows: int, how: str, choose: bool, wanted: frozenset[str]
) -> tuple[Program | Eager, list[Program]]:
    """The whole layer, and the stages on their own in parts, each compiled once for all cases of these shapes."""
    axis = AXIS if case.ranks > 1 else None

    def provided(arrays: Arrays) -> Arrays:
        return {name: a for name, a in arrays.items() if name.removesuffix(TURNED) in wanted}

    def layer_of(learned: Arrays, inputs: Arrays, choose: bool = False) -> WholeLayer:
        how_whole, groups = ("vmap" if case.way == "eager" else how), case.processes // case.ranks
        each = partial(over_ranks, P=case.ranks, how=how_whole, groups=groups)
        return WholeLayer(stages_of, case, capacity, axis, each, learned, inputs, choose)

    def end_to_end(learned: Arrays, *steps: Arrays) -> Arrays:
        if len(steps) == 1:
            return provided(layer_of(learned, *steps).backward("e2e"))
        found: Arrays = {}
        for turned in (False, True):  # both forwards before both backwards
            both = [layer_of(learned, steps[0]), layer_of(learned, steps[1], choose)]
            for i in (1, 0) if turned else (0, 1):
                arrays = both[i].backward(("e2e", "second")[i])
                found |= {name + TURNED * turned: a for name, a in arrays.items()}
        return provided(found)

    def isolated(learned: Arrays, feeds: Arrays) -> Arrays:
        # Parameters that are the same on all ranks get one copy per rank here, so that each rank has its own gradient.
        own = {
            name: a if BY_NAME[name].per_rank else jnp.broadcast_to(a, (case.ranks, *a.shape))
            for name, a in learned.items()
        }
        each = over_ranks(partial(_isolated, stages_of, case, capacity, oracle_rows, axis), case.ranks, how)
        return provided(each(own, feeds))

    as_users_do = case.way == "compiled" or not small(case)  # a large case takes longer to run than to compile
    options = _AS_USERS_DO if as_users_do and jax.default_backend() == "cpu" else None
    whole = Eager(end_to_end) if case.way == "eager" else Program(jax.jit(end_to_end, compiler_options=options))
    of_stages = options if not small(case) else None
    return whole, [Program(jax.jit(isolated, compiler_options=of_stages)) for _ in parts_of(case)]


def _capacity(case: Case) -> Capacity:
    return plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks, **not_default(case.capacity_options),
    )  # fmt: skip


def without_padding(chosen: routing.Routing, ids: jax.Array) -> routing.Routing:
    """The routing with scores of zero for tokens that are padding, whose ids are -1."""
    return chosen._replace(score_TK=jnp.where(ids >= 0, chosen.score_TK, 0))


class WholeLayer:
    """The whole layer on all ranks, with the oracle's expert ids or those that the router chooses: forward at once."""

    def __init__(
        self, stages_of: Stages, case: Case, capacity: Capacity, axis: str | None, each: Callable, learned: Arrays,
        whole: Arrays, choose: bool,
    ) -> None:  # fmt: skip
        self.stages_of, self.case, self.axis, self.each, self.whole = stages_of, case, axis, each, whole
        self.names = [one.name for one in parameters_of(case) if one.learned]
        known = {name: a for name, a in learned.items() if name not in self.names}
        self.keep = whole.get("keep", whole["expert_id"])  # of use to the layout that asks for it

        def forward(x, ids, keep, score, *values):
            learned, chosen = dict(zip([*self.names, *known], values, strict=True)), None
            if not choose:
                more = together(jax_impl, learned, "per_expert")
                chosen = routing.route(x, learned["router"], options_of(case)["router"], expert_id_TK=ids, **more)
                chosen = without_padding(chosen, ids) if case.uneven else chosen
                own = chosen.score_TK
                if capacity.priority == "score":  # drops depend on the last bit of scores: take the oracle's
                    chosen = chosen._replace(score_TK=own + jax.lax.stop_gradient(score - own))
            stages, combined = stages_of.layer(case, capacity, axis, x, learned, chosen, keep)
            own = stages.routing.score_TK if choose else own
            return (stages.out_TD, own), (named_stages(stages) | {"route/score": own}, combined)

        forward = jax.checkpoint(forward) if case.way == "recomputed" else forward

        replicated = tuple(4 + i for i, name in enumerate([*self.names, *known]) if not BY_NAME[name].per_rank)

        def differentiable(x, *values):
            inputs = (x, whole["expert_id"], self.keep, whole["score"])
            return each(forward, replicated=replicated)(*inputs, *values, *known.values())

        values = (learned[name] for name in self.names)
        _, self.vjp, (self.values, self.combined) = jax.vjp(differentiable, whole["x"], *values, has_aux=True)

    def backward(self, mode: str) -> Arrays:
        """Every value and every gradient, as mode/stage/value."""
        dx, *found = self.vjp((self.whole["dout"], self.whole["aux"]))
        gradients = compared(self.case, dict(zip(self.names, found, strict=True)))

        def score_gradient(y, score, slot, where, keep, dout):
            def weigh(score):
                return self.stages_of.weigh(y, score, slot, where, keep, self.axis)

            return jax.vjp(weigh, score)[1](dout)[0]

        values = self.values | {
            "combine/dscore": self.each(score_gradient)(*self.combined, self.keep, self.whole["dout"])
            + self.whole["aux"],
            **{BY_NAME[name].gradient: a for name, a in gradients.items()},
            "route/dx": dx,
        }
        return {f"{mode}/{name}": value for name, value in values.items()}


def compared(case: Case, gradients: Arrays) -> Arrays:
    """The compared rows of the gradients of what is learned, by name."""

    def some(name: str, a: jax.Array) -> jax.Array:
        if len(BY_NAME[name].axes.split()) < 3:
            return a
        rows = case.compared_rows(a.shape[-2])
        return a[..., rows if isinstance(rows, slice) else np.array(rows), :]

    return {name: some(name, a) for name, a in gradients.items()}


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
    "order_expert_major": ("order", "expert_major", np.nan),
}


# Those of the experts, and of the stages before them.
_EXPERTS = ("x_expert_major", "dy_expert_major")
_BEFORE = ("x_grouped", "x_received", "dx_grouped", "dx_received", "dx_expert_major")


def parts_of(case: Case) -> list[tuple[str, ...]]:
    """Which rows isolated stages are fed together: all, or one part after the other where there are many."""
    after = tuple(name for name in _FEEDS if name not in _EXPERTS + _BEFORE)
    return [tuple(_FEEDS)] if small(case) else [_EXPERTS, _BEFORE, after]


def _feeds(problem: Problem, stages_of: Stages, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    case, P = problem.case, problem.case.ranks
    table, is_direct = row_tables(case, problem.expert_id, problem.keep, stages_of.layout), stages_of is Direct
    if is_direct:  # rows are expert-major, or in slots, of which there is one for each assignment
        slots = [padded(a, case.assignments) for a in table["grouped"]]
        table = {"grouped": slots, "expert_major": table["expert_major"]}
    rows = {"x": np.repeat(problem.given.reshape(-1, case.width), case.top_k, axis=0)}
    rows |= {n: getattr(problem, n).reshape(-1, case.width) for n in ("y", "dy", "dx_rows")}
    rows["order"] = np.where(problem.keep[..., None], problem.order_probe()[0], 0).reshape(-1, case.width)
    everywhere = {where: [np.stack(of_ranks)] for where, of_ranks in table.items()}
    past_the_groups = case.bins == P or stages_of is not Static  # there are rows, which no expert may read
    poisoned = [*["x_expert_major"] * past_the_groups, *["dy_expert_major"] * is_direct]
    feeds = {
        n: lay_out(rows[of], everywhere[where], np.nan if n in poisoned else fill)[0]
        for n, (of, where, fill) in _FEEDS.items()
        if n in wanted and where in everywhere
    }
    tokens = ("x", "given", "expert_id", "other_experts", "score", "dscore", "dout", "keep")
    feeds |= {name: getattr(problem, name) for name in tokens}
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, stages_of.layout)
    feeds |= {"sent_E": sent_PE.astype(np.int32), "counts_Pe": reference.received(case, sent_PE).astype(np.int32)}
    index = [_index(case, table, rank, is_direct) for rank in range(P)]
    feeds |= {name: np.stack([i[name] for i in index]).astype(np.int32) for name in index[0]}
    return feeds | ({"sent_PE": np.tile(sent_PE.astype(np.int32), (P, 1, 1))} if is_direct else {})


def _index(case: Case, table: Table, rank: int, is_direct: bool) -> dict[str, np.ndarray]:
    """The indices that stages are fed."""
    if not is_direct:
        return indices(case, table, rank)
    by_row = straight(case, table)
    return {
        "slot": indices(case, table | {"received": table["grouped"]}, rank)["slot"],
        "place": by_row["place"][table["grouped"][rank]],
        "origin": by_row["origin"][table["expert_major"][rank]],
    }


def _isolated(
    stages_of: Stages, case: Case, planned: Capacity, oracle_rows: int, axis: str | None, learned: Arrays, feeds: Arrays
) -> Arrays:
    """Every stage of one rank that is fed: the oracle's input, forward and backward."""
    out: Arrays = {}
    fed = feeds.get
    stages: Any = stages_of(case, planned, oracle_rows, axis, feeds)

    def keep_values(stage: str, values: Arrays) -> None:
        out.update({f"isolated/{stage}/{key}": value for key, value in values.items()})

    def alone(
        stage: str, f: Callable[..., Any], inputs: dict, cotangent: jax.Array | None, returns: str = ""
    ) -> Arrays:
        """What the stage returns, and the gradient of each input from the cotangent of what the next stage takes.

        `returns` is the name of that, where it is not what the next stage takes. Empty for a stage that is not fed.
        """
        if cotangent is None or any(a is None for a in inputs.values()):
            return {}

        def named_result(*leaves: jax.Array) -> tuple[jax.Array, Arrays]:
            values = {returns: f(*leaves)} if returns else named(stage, f(*leaves))
            return values[returns or MAIN[stage]], values

        _, vjp, values = jax.vjp(named_result, *inputs.values(), has_aux=True)
        found = values | {f"d{name}": g for name, g in zip(inputs, vjp(cotangent), strict=True)}
        keep_values(stage, found)
        return found

    ids, score, keep = (feeds[n] for n in ("expert_id", "score", "keep"))
    how = options_of(case)

    def of_stage(wanted: Callable[[Parameter], bool]) -> Arrays:
        return {one.name: learned[one.name] for one in parameters_of(case) if one.learned and wanted(one)}

    def summed(found: Arrays, names: Iterable[str]) -> Arrays:
        gradients = {f"d{name}": found[f"d{name}"] for name in names}
        return gradients if axis is None else jax.lax.psum(gradients, axis)

    def route(x: jax.Array, of_router: Arrays, ids: jax.Array | None) -> routing.Routing:
        values = learned | of_router
        more = together(jax_impl, values, "per_expert")
        return routing.route(x, values["router"], how["router"], expert_id_TK=ids, **more)

    of_router = of_stage(lambda one: one.stage == "route")

    def replay(x: jax.Array, *w: jax.Array) -> Any:
        chosen = route(x, dict(zip(of_router, w, strict=True)), feeds["other_experts"])
        return without_padding(chosen, feeds["other_experts"])

    replayed = alone("route", replay, {"x": feeds["x"]} | of_router, feeds["dscore"])
    own = route(feeds["x"], {}, None)
    keep_values("route", {"expert_id": jnp.where(ids >= 0, own.expert_id_TK, -1)} | summed(replayed, of_router))
    counts = routing.count_per_expert(ids, case.experts)

    def group(x: jax.Array) -> Any:
        return stages.group_by_expert(x, ids, score, counts)

    is_direct, told = stages_of is Direct, stages.exchange_counts(feeds["sent_E"])
    keep_values("group_by_expert", stages.planned_rows())
    keep_values("exchange_counts", {"counts_of_all": told} if is_direct else named("exchange_counts", told))

    def send(tokens: jax.Array) -> Any:
        return stages.send_tokens(tokens, feeds["slot"], feeds["place"], feeds["origin"])

    if is_direct:
        keep_values("group_by_expert", named("group_by_expert", group(feeds["given"])))
        places = stages.to_expert_major(feeds["slot"], feeds["sent_PE"])
        keep_values("to_expert_major", named("to_expert_major", places))
        alone("send_tokens", send, {"tokens": feeds["given"]}, fed("dx_expert_major"), "rows")
    else:
        alone("group_by_expert", group, {"x": feeds["given"]}, fed("dx_grouped"))
        alone("send_tokens", stages.send_tokens, {"x": fed("x_grouped")}, fed("dx_received"))
        alone("to_expert_major", stages.to_expert_major, {"x": fed("x_received")}, fed("dx_expert_major"))

    of_experts = of_stage(lambda one: one.per_rank)

    def apply_experts(x: jax.Array, *w: jax.Array) -> Any:
        return stages.apply_experts(x, dict(zip(of_experts, w, strict=True)))

    found = alone("apply_experts", apply_experts, {"x": fed("x_expert_major")} | of_experts, fed("dy_expert_major"))
    gradients = compared(case, {name: found[f"d{name}"] for name in of_experts if found})
    keep_values("apply_experts", {f"d{name}": a for name, a in gradients.items()})
    of_shared = of_stage(lambda one: one.shared)
    if of_shared:

        def shared_expert(x: jax.Array, *w: jax.Array) -> jax.Array:
            shared = together(jax_impl, dict(zip(of_shared, w, strict=True)), "shared")
            return experts.shared_expert(x, **shared, experts=how["experts"])

        found = alone("apply_experts", shared_expert, {"shared_x": feeds["x"]} | of_shared, feeds["dout"], "shared")
        keep_values("apply_experts", summed(found, of_shared))

    def back(y: jax.Array) -> Any:
        return stages.to_rank_major(y, feeds["source"], feeds["target"])

    if not is_direct:
        alone("to_rank_major", back, {"y": fed("y_expert_major")}, fed("dy_received"))
        alone("return_tokens", stages.return_tokens, {"y": fed("y_received")}, fed("dy_grouped"))
    elif "y_expert_major" in feeds:  # the gradient of what returns is `combine`'s
        returned = stages.return_tokens(feeds["y_expert_major"], feeds["place"], feeds["origin"])
        keep_values("return_tokens", {"y": returned})

    def combine(y: jax.Array, score: jax.Array) -> Any:
        return stages.combine(y, score, keep, feeds["slot"], feeds["assignment"])

    def combine_returned(y: jax.Array, score: jax.Array, returned: jax.Array) -> Any:
        return stages.combine(y, returned, score, keep, feeds["slot"], feeds["place"])

    if is_direct:
        inputs = {"rows": fed("y_expert_major"), "score": score}
        alone("combine", lambda y, score: combine_returned(y, score, feeds["y_grouped"]), inputs, feeds["dout"])
    else:
        alone("combine", combine, {"y": fed("y_grouped"), "score": score}, feeds["dout"])

    if case.top_k >= 3 and "order_grouped" in feeds:
        probe, ones = feeds["order_grouped"], keep.astype(score.dtype)
        if is_direct:
            keep_values("combine", {"order": combine_returned(feeds["y_expert_major"], ones, probe)})
            keep_values("send_tokens", {"dtokens_order": jax.vjp(send, feeds["x"])[1](feeds["order_expert_major"])[0]})
        else:
            keep_values("combine", {"order": combine(probe, ones)})
            _, vjp = jax.vjp(lambda x: named("group_by_expert", group(x))["x"], feeds["x"])
            keep_values("group_by_expert", {"dx_order": vjp(probe)[0]})
    return out
