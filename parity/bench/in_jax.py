"""JAX's part of `bench`: ours, and the straightforward version.

Each stage is one program, and so is the whole chain. The exchange and the experts would come between stages, so a
barrier keeps XLA from fusing one gather into the next there. Another barrier takes the place of the loss.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_impl import kernels
from jax_impl.direct import exchange as direct_exchange
from jax_impl.direct import grouping as direct_grouping
from jax_impl.direct.layout import to_expert_major as to_places
from jax_impl.dynamic import exchange as dynamic_exchange
from jax_impl.dynamic import grouping as dynamic_grouping
from jax_impl.dynamic import layout as dynamic_layout
from jax_impl.exchange import exchange_counts, return_tokens, send_tokens
from jax_impl.experts import apply_experts
from jax_impl.grouping import Capacity, combine, group_by_expert
from jax_impl.layout import to_expert_major, to_rank_major
from jax_impl.rows import inverse_permutation, rank_bins_source
from parity.bench.peers import JAX_PEERS, find_peers
from parity.bench.plan import (
    ACROSS_RANKS,
    DIRECTIONS,
    N_SETS,
    STAGES,
    Figure,
    Movement,
    Plan,
    Ran,
    Step,
    choose_shapes,
    draw_routing,
    emit,
    expert_flops,
    failure,
    leaving_rows,
    note_launches,
    row_passes,
    summarize,
)
from parity.cases.case import Case
from parity.run.supervisor import end_with_parent

BATCHES = 10


def plain_group_by_expert(
    x_TD: Array, expert_id_TK: Array, score_TK: Array, counts_E: Array, capacity: Capacity
) -> tuple[Array, Array, Array]:
    """Rows by indexing, padding by `where`; the first C of a bin are kept."""
    del score_TK
    (T, K), E, (P, C, _) = expert_id_TK.shape, counts_E.shape[0], capacity
    expert_N = expert_id_TK.reshape(-1)
    bin_N = expert_N // (E // P)
    place_NP = jnp.cumsum(bin_N[:, None] == jnp.arange(P), axis=0)
    keep_N = jnp.take_along_axis(place_NP, bin_N[:, None], axis=1)[:, 0] <= C
    kept_P = jnp.minimum(place_NP[-1], C)
    sorted_N = jnp.argsort(jnp.where(keep_N, expert_N, E), stable=True)
    bin_N = bin_N[sorted_N]
    place_N = jnp.arange(T * K) - (jnp.cumsum(kept_P) - kept_P)[bin_N]
    slot_N = jnp.where(keep_N[sorted_N], bin_N * C + place_N, P * C)
    token_S = jnp.zeros(P * C + 1, jnp.int32).at[slot_N].set(sorted_N // K)[:-1]
    full_S = jnp.zeros(P * C + 1, bool).at[slot_N].set(True)[:-1]
    x_PCD = jnp.where(full_S[:, None], x_TD[token_S], 0).reshape(P, C, -1)
    return x_PCD, jnp.zeros(T * K, jnp.int32).at[sorted_N].set(slot_N).reshape(T, K), token_S


def plain_to_expert_major(x_PCD: Array, counts_Pe: Array) -> tuple[Array, Array, Array]:
    """Rows by indexing, padding by `where`."""
    P, C, D = x_PCD.shape
    source_S = rank_bins_source(counts_Pe, C)
    return plain_gather(x_PCD.reshape(-1, D), source_S), source_S, inverse_permutation(source_S).reshape(P, C)


def plain_to_rank_major(y_SD: Array, source_S: Array, target_PC: Array) -> Array:
    """The inverse of `plain_to_expert_major`."""
    del source_S
    return plain_gather(y_SD, target_PC)


def plain_gather(x_SD: Array, index: Array) -> Array:
    """Row r is x[index[r]], and zero where the index is past the end."""
    full = index < x_SD.shape[0]
    return jnp.where(full[..., None], x_SD[jnp.where(full, index, 0)], 0)


def plain_combine(y_PCD: Array, score_TK: Array, slot_TK: Array, token_S: Array) -> Array:
    """Rows by indexing, weighted and summed by `einsum`."""
    del token_S
    y_TKD = plain_gather(y_PCD.reshape(-1, y_PCD.shape[-1]), slot_TK)
    return jnp.einsum("tk,tkd->td", score_TK, y_TKD.astype(jnp.float32)).astype(y_PCD.dtype)


OURS = Movement(group_by_expert, to_expert_major, to_rank_major, combine)
PLAIN = Movement(plain_group_by_expert, plain_to_expert_major, plain_to_rank_major, plain_combine)


class Meter:
    """The peak memory of a run: live arrays, and what each program that it calls allocates."""

    def __init__(self) -> None:
        self.on, self.peak = False, 0

    def before(self, compiled: Any) -> None:
        """Note that a program is about to run."""
        if self.on:
            memory = compiled.memory_analysis()
            new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.peak = max(self.peak, live_bytes() + new)

    def measure(self, step: Step) -> int:
        """Peak bytes allocated beyond what was alive before."""
        self.on, self.peak, before = True, 0, live_bytes()
        jax.block_until_ready(step(0))
        self.on = False
        return max(0, self.peak - before)


METER = Meter()


def live_bytes() -> int:
    """Bytes on the first device of every array that is alive; an array that two names share counts once."""
    shards = [shard for a in jax.live_arrays() if not a.is_deleted() for shard in a.addressable_shards]
    on_first = [shard.data for shard in shards if shard.device == jax.devices()[0]]
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in on_first}.values())


def program(run: Callable[..., Any]) -> Callable[..., Any]:
    """A program that is compiled at its first call, for the shapes of that call."""
    compiled: Any = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        compiled = compiled or jax.jit(run).lower(*arguments).compile()
        METER.before(compiled)
        return compiled(*arguments)

    return call


def main(plan: Plan) -> None:
    """Measure, and print a line of JSON for each figure."""
    jax.config.update("jax_num_cpu_devices", plan.ranks)
    # Virtual devices share threads: of two exchanges in flight, each can wait for a thread that the other holds.
    jax.config.update("jax_cpu_enable_async_dispatch", plan.ranks == 1)
    on_gpu = jax.default_backend() == "gpu"
    if len(jax.devices()) < plan.ranks:
        n = len(jax.devices())
        raise ValueError(f"--ranks {plan.ranks} needs a GPU for each rank, and there are {n}")
    if not plan.parts:
        emit(copy_figure(plan, on_gpu))
        if plan.ranks > 1 and on_gpu:
            emit(link_figure(plan))
        return
    if plan.ranks > 1:
        ways = [static_over_ranks]
        if on_gpu:  # XLA:CPU has no ragged exchange
            ways.append(ragged_over_ranks)
        if kernels.gpus_reach_each_other():  # otherwise the plain version would be measured
            ways.append(direct_over_ranks)
        across_ranks(plan, choose_shapes(plan, on_gpu), ways)
        return
    peers = find_peers("jax", JAX_PEERS) if plan.baselines and "experts" in plan.parts else {}
    for shape in choose_shapes(plan, on_gpu):
        for variant, movement in ({"ours": OURS, "plain": PLAIN} if plan.baselines else {"ours": OURS}).items():
            group = partial(movement.group_by_expert, capacity=Capacity(shape.ranks, shape.capacity))
            movement = movement._replace(group_by_expert=group)
            runs = {stage: getattr(movement, stage) for stage in STAGES} | {"whole": in_one_program(movement)}
            inference = {part: program(run) for part, run in runs.items()}
            training = {part: program(forward_and_backward(run)) for part, run in runs.items()}
            for part in [part for part in (*STAGES, "whole") if part in plan.parts]:
                try:
                    movement_figures(plan, shape, variant, inference, training, part)
                except Exception as error:  # for example out of memory while inputs are drawn
                    emit(failure("jax", error, shape.name, variant, part))
        if "experts" in plan.parts:
            try:
                expert_figures(plan, shape, peers)
            except Exception as error:
                emit(failure("jax", error, shape.name, "", "experts"))


def forward_and_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    """Output and gradients of a stage, of all, or of the experts, from the cotangent, which comes first.

    The leading floating-point arguments are differentiated. The barrier takes the place of the loss.
    """

    def both(cotangent: Array, *arguments: Array) -> Any:
        n = len(list(takewhile(lambda a: jnp.issubdtype(a.dtype, jnp.floating), arguments)))
        out, vjp = jax.vjp(lambda *leaves: first(run(*leaves, *arguments[n:])), *arguments[:n])
        out, cotangent = jax.lax.optimization_barrier((out, cotangent))
        return out, vjp(cotangent)

    return both


def first(out: Any) -> Array:
    """The rows among what a stage returns."""
    return out[0] if isinstance(out, tuple) else out


def copy_figure(plan: Plan, on_gpu: bool) -> Figure:
    """The bandwidth behind all floors: one large copy, bytes read plus bytes written."""
    size = 2**30 if on_gpu else 2**26
    sources = [jax.random.bits(jax.random.key(i), (size // 4,), jnp.uint32) for i in range(2)]
    copy = program(jnp.copy)
    figure = measure(plan, lambda i: copy(sources[i % 2]))
    figure.part, figure.bytes = "copy", 2 * size
    return figure


def in_one_program(movement: Movement) -> Callable[..., Any]:
    """The whole chain. Barriers take the place of the exchange and the experts."""
    between = jax.lax.optimization_barrier

    def whole(x_TD: Array, score_TK: Array, ids_TK: Array, counts_E: Array, kept_Pe: Array) -> Array:
        x_PCD, slot_TK, assignment_PC, *_ = movement.group_by_expert(x_TD, ids_TK, score_TK, counts_E)
        x_SD, source_S, target_PC = movement.to_expert_major(between(x_PCD), kept_Pe)
        y_PCD = movement.to_rank_major(between(x_SD), source_S, target_PC)
        return movement.combine(between(y_PCD), score_TK, slot_TK, assignment_PC)

    return whole


def movement_figures(
    plan: Plan, shape: Case, variant: str, inference: dict[str, Any], training: dict[str, Any], part: str
) -> None:
    """Figures of one stage or the whole chain, forward alone and with backward."""
    sets = [draw_inputs(plan, shape, inference, part, plan.seed + i) for i in range(N_SETS)]

    def forward(i: int) -> Any:
        x, rest, _ = sets[i % N_SETS]
        return inference[part](x, *rest)

    def both(i: int) -> Any:
        x, rest, cotangent = sets[i % N_SETS]
        return training[part](cotangent, x, *rest)

    for direction, step in zip(DIRECTIONS, (forward, both), strict=True):
        figure = measure(plan, step)
        figure.shape, figure.variant, figure.part, figure.direction = shape.name, variant, part, direction
        padded = shape.ranks * shape.capacity
        size = jnp.dtype(plan.dtype).itemsize
        figure.bytes = row_passes(part, direction, shape.tokens, padded) * shape.width * size
        emit(figure)


def draw_inputs(plan: Plan, shape: Case, inference: dict[str, Any], part: str, seed: int) -> tuple[Array, Any, Array]:
    """The input rows, the other arguments, and the gradient of the output."""
    P, C = shape.ranks, shape.capacity
    score_TK, ids_TK, counts_E = (jnp.asarray(a) for a in draw_routing(shape, seed))
    ids_TK = ids_TK.astype(jnp.int32)
    x_key, cotangent_key = jax.random.split(jax.random.key(seed))
    draw = partial(jax.random.normal, dtype=plan.dtype)
    x_TD, dout_TD = (draw(key, (shape.tokens, shape.width)) for key in (x_key, cotangent_key))
    if part == "group_by_expert":
        return x_TD, (ids_TK, score_TK, counts_E), draw(cotangent_key, (P, C, shape.width))
    x_PCD, slot_TK, assignment, *_ = inference["group_by_expert"](x_TD, ids_TK, score_TK, counts_E)
    # The rank's own rows stand in for received ones: equally many from each rank, for equally many experts.
    kept_Pe = kept_per_expert(ids_TK, slot_TK, shape)
    if part == "whole":
        return x_TD, (score_TK, ids_TK, counts_E, kept_Pe), dout_TD
    if part == "combine":
        return draw(x_key, x_PCD.shape), (score_TK, slot_TK, assignment), dout_TD
    dx_SD = draw(cotangent_key, (P * C, shape.width))
    if part == "to_expert_major":
        return x_PCD, (kept_Pe,), dx_SD
    x_SD, source, target = inference["to_expert_major"](x_PCD, kept_Pe)
    return x_SD, (source, target), dx_SD.reshape(x_PCD.shape)


def kept_per_expert(ids_TK: Array, slot_TK: Array, shape: Case) -> Array:
    """Rows of each expert that fit the capacity, [P, e]."""
    kept_N = (slot_TK < shape.ranks * shape.capacity).reshape(-1)
    return jnp.zeros(shape.experts, jnp.int32).at[ids_TK.reshape(-1)].add(kept_N).reshape(shape.ranks, -1)


def expert_figures(plan: Plan, shape: Case, peers: dict[str, Callable[..., Array]]) -> None:
    """SwiGLU over equal groups: a batched einsum over expert bins, a grouped matmul over rank bins, and peers."""
    e, D, F = shape.experts // shape.ranks, shape.width, shape.hidden
    keys = iter(jax.random.split(jax.random.key(plan.seed), 16))

    def draw(*sizes: int) -> Array:
        return jax.random.normal(next(keys), sizes, plan.dtype) * jnp.asarray(sizes[-2] ** -0.5, plan.dtype)

    weights = draw(e, D, F), draw(e, D, F), draw(e, F, D)
    rows = shape.assignments // e * e
    counts_e = jnp.full(e, rows // e, jnp.int32)
    variants = {"einsum over expert bins": ((e, rows // e, D), apply_experts), "rank bins": ((rows, D), apply_experts)}
    variants |= {f"rank bins, {name}": ((rows, D), experts) for name, experts in peers.items()}
    for variant, (sizes, experts) in variants.items():
        x_SD, dy_SD = draw(*sizes), draw(*sizes)

        def run_experts(x: Array, gate: Array, up: Array, down: Array, counts: Array, experts=experts) -> Array:
            return experts(x, counts, gate, up, down)

        forward, training = program(run_experts), program(forward_and_backward(run_experts))
        steps = (partial(forward, x_SD, *weights, counts_e), partial(training, dy_SD, x_SD, *weights, counts_e))
        for direction, run in zip(DIRECTIONS, steps, strict=True):
            step = lambda i, run=run: run()  # noqa: E731, ARG005  the weights alone are past the cache
            figure = measure(plan, step)
            figure.shape, figure.variant, figure.part, figure.direction = shape.name, variant, "experts", direction
            figure.flops = expert_flops(shape, rows, direction)
            emit(figure)


def link_figure(plan: Plan) -> Figure:
    """The bandwidth of one copy between two GPUs, with which exchanges are compared."""
    size, (first_gpu, second_gpu) = 2**30, jax.devices()[:2]
    source = jax.device_put(jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32), first_gpu)
    figure = measure(plan, lambda _: jax.device_put(source, second_gpu))
    figure.part, figure.link_bytes = "link", size
    return figure


class OverRanks(NamedTuple):
    """How rows reach other ranks: what one rank runs, and what its exchange takes and returns.

    `send` takes rows and what `splits` makes of counts_E, untimed; `whole` takes x_TD, score_TK, ids_TK and counts_E.
    `send` is None where there is no exchange apart from the rest.
    """

    variant: str
    send: Callable[..., Array] | None
    whole: Callable[..., Array]
    splits: Callable[[Array], tuple[Array, ...]]
    sent: tuple[int, ...]  # shape of the rows that a rank sends
    received: tuple[int, ...]
    rows: int  # that a floor counts, of all that are sent


def static_over_ranks(shape: Case) -> OverRanks:
    """Bins of a fixed capacity, which travel with their padding."""
    P, C, bins = shape.ranks, shape.capacity, (shape.ranks, shape.capacity, shape.width)
    send, back = (partial(f, axis_name="ranks") for f in (send_tokens, return_tokens))

    def whole(x_TD: Array, score_TK: Array, ids_TK: Array, counts_E: Array) -> Array:
        x_PCD, slot_TK, assignment_PC, kept_E = group_by_expert(x_TD, ids_TK, score_TK, counts_E, Capacity(P, C))
        counts_Pe = exchange_counts(kept_E, axis_name="ranks")
        x_SD, source_S, target_PC = to_expert_major(send(x_PCD), counts_Pe)
        y_PCD = to_rank_major(jax.lax.optimization_barrier(x_SD), source_S, target_PC)
        return combine(back(y_PCD), score_TK, slot_TK, assignment_PC)

    return OverRanks("", send, whole, lambda _: (), bins, bins, P * C)


def ragged_over_ranks(shape: Case) -> OverRanks:
    """As many rows as there are, into a buffer for the most there can be, as in the dynamic layer. Nothing drops."""
    P, T, K, N = shape.ranks, shape.tokens, shape.top_k, shape.assignments
    R = P * T * min(K, shape.experts // P)

    def send(x_ND: Array, *splits: Array) -> Array:
        return dynamic_exchange.send_tokens(x_ND, dynamic_exchange.Splits(*splits), R, "ranks")

    def whole(x_TD: Array, score_TK: Array, ids_TK: Array, counts_E: Array) -> Array:
        x_ND, slot_TK, assignment_N, kept_E = dynamic_grouping.group_by_expert(x_TD, ids_TK, counts_E)
        counts_Pe, splits = dynamic_exchange.exchange_counts(kept_E, "ranks")
        x_RD, source_R, target_R = dynamic_layout.to_expert_major(send(x_ND, *splits), counts_Pe)
        y_RD = dynamic_layout.to_rank_major(jax.lax.optimization_barrier(x_RD), source_R, target_R)
        y_ND = dynamic_exchange.return_tokens(y_RD, splits, N, "ranks")
        return dynamic_grouping.combine(y_ND, score_TK, slot_TK, assignment_N)

    def splits(counts_E: Array) -> tuple[Array, ...]:
        return dynamic_exchange.exchange_counts(counts_E, "ranks")[1]

    return OverRanks(", ragged", send, whole, splits, (N, shape.width), (R, shape.width), N)


def direct_over_ranks(shape: Case) -> OverRanks:
    """Rows go straight to their places, as in the direct layer. Nothing drops."""

    def whole(x_TD: Array, score_TK: Array, ids_TK: Array, counts_E: Array) -> Array:
        slot_TK, kept_E = direct_grouping.group_by_expert(ids_TK, counts_E)
        places = to_places(slot_TK, direct_exchange.exchange_counts(kept_E, "ranks"), "ranks")
        x_RD = direct_exchange.send_tokens(x_TD, slot_TK, *places, "ranks")
        y_RD = jax.lax.optimization_barrier(x_RD)
        returned_ND = direct_exchange.return_tokens(y_RD, *places, "ranks")
        return direct_grouping.combine(y_RD, returned_ND, score_TK, slot_TK, places.place_N, "ranks")

    return OverRanks(", direct", None, whole, lambda _: (), (), (), shape.assignments)


def across_ranks(plan: Plan, shapes: list[Case], ways: Sequence[Callable[[Case], OverRanks]]) -> None:
    """Figures of the exchange and of the whole with it, one device per rank; each is one program."""
    P = plan.ranks
    mesh = jax.make_mesh((P,), ("ranks",), axis_types=(AxisType.Auto,), devices=jax.devices()[:P])

    def on_ranks(stage: Callable[..., Any]) -> Callable[..., Any]:
        def block(*arguments: Any) -> Any:
            return jax.tree.map(lambda a: a[None], stage(*jax.tree.map(lambda a: a[0], arguments)))

        return jax.shard_map(block, mesh=mesh, in_specs=PartitionSpec("ranks"), out_specs=PartitionSpec("ranks"))

    split = NamedSharding(mesh, PartitionSpec("ranks"))

    def draw(seed: int, *sizes: int) -> Array:
        return jax.device_put(jax.random.normal(jax.random.key(seed), (P, *sizes), plan.dtype), split)

    for shape in [replace(shape, ranks=P) for shape in shapes]:
        for way in [over_ranks(shape) for over_ranks in ways]:
            splits_of = jax.jit(on_ranks(way.splits))
            inputs: dict[str, list] = {part: [] for part in ACROSS_RANKS}
            for i in range(N_SETS):
                routing = [draw_routing(shape, plan.seed + N_SETS * rank + i) for rank in range(P)]
                score, ids, counts = (jax.device_put(np.stack(a), split) for a in zip(*routing, strict=True))
                ids, counts = ids.astype(jnp.int32), counts.astype(jnp.int32)
                rows = draw(i + N_SETS, *way.received), draw(i, *way.sent)  # the cotangent comes first
                inputs["exchange"].append((*rows, *splits_of(counts)))
                cotangent, x = (draw(j, shape.tokens, shape.width) for j in (i + N_SETS, i))  # in this order
                inputs["whole"].append((cotangent, x, score, ids, counts))

            for part, stage in (("exchange", way.send), ("whole", way.whole)):
                if part not in plan.parts or stage is None:
                    continue
                run = on_ranks(stage)
                forward, training = program(run), program(forward_and_backward(run))
                steps = (
                    lambda i, run=forward, sets=inputs[part]: run(*sets[i % N_SETS][1:]),
                    lambda i, run=training, sets=inputs[part]: run(*sets[i % N_SETS]),
                )
                for direction, step in zip(DIRECTIONS, steps, strict=True):
                    figure = measure(plan, step)
                    figure.shape, figure.variant = shape.name, f"{P} ranks{way.variant}"
                    figure.part, figure.direction = part, direction
                    row_bytes, trips = shape.width * jnp.dtype(plan.dtype).itemsize, 2 if part == "whole" else 1
                    figure.link_bytes = trips * leaving_rows(way.rows, P, direction) * row_bytes
                    if part == "whole":
                        figure.bytes = row_passes(part, direction, shape.tokens, way.rows) * row_bytes
                    emit(figure)


def measure(plan: Plan, step: Step) -> Figure:
    """Time a step and count its launches; if it fails, return a figure with the error, so that others are measured."""
    try:
        return measure_well(plan, step)
    except Exception as error:  # a peer may raise any exception
        return failure("jax", error)


def measure_well(plan: Plan, step: Step) -> Figure:
    """Warm up, time, then count once each: peak memory and launches."""
    for i in range(N_SETS):
        jax.block_until_ready(step(i))
    seconds, batch, host = time_batches(step, plan.seconds)
    figure = Figure("", "jax", "", "", "", **summarize(seconds), batch=batch, host=host)  # type: ignore[arg-type]
    figure.device = jax.devices()[0].device_kind
    figure.peak_bytes = METER.measure(step)
    if jax.default_backend() == "gpu":
        try:
            count_on_gpu(figure, step)
        except (RuntimeError, ValueError) as error:  # the times are valid without a profiler
            print(f"not profiled: {error}", file=sys.stderr)
    return figure


def time_batches(step: Step, budget: float) -> tuple[list[float], int, float]:
    """Seconds per run, each the mean over a batch that is queued at once, with one wait at its end.

    Also returns the number of runs in a batch and the seconds that one run holds the host. JAX has no events on the
    device; on a GPU a batch is so long that its one wait, some 0.1 ms, hardly counts.
    """
    least = max(budget / BATCHES, 0.05 if jax.default_backend() == "gpu" else 0)
    host = min(time_batch(step, 1)[0] for _ in range(N_SETS))
    size = 1
    while time_batch(step, size)[1] < least:
        size *= 2
    return [time_batch(step, size)[1] / size for _ in range(BATCHES)], size, host


def time_batch(step: Step, size: int) -> tuple[float, float]:
    """Seconds until this many runs are queued, and seconds until the last one has ended."""
    begin = time.perf_counter()
    for i in range(size):
        out = step(i)
    queued = time.perf_counter() - begin
    jax.block_until_ready(out)
    return queued, time.perf_counter() - begin


def count_on_gpu(figure: Figure, step: Step) -> None:
    """Fill in what one run launches on the first device, and how long the device is busy with it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(step(0))
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU:0") for line in plane.lines]
        streams = [line for line in lines if line.name.startswith("Stream")]
        events = [event for line in streams for event in line.events]
        note_launches(figure, [Ran(e.name, 1e-9 * e.start_ns, 1e-9 * e.end_ns) for e in events])


if __name__ == "__main__":
    end_with_parent()
    main(msgspec.json.decode(sys.argv[1], type=Plan))
