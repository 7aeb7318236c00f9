"""What XLA sees of the dispatch, for one P: shapes are static, so the program need not grow with P."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import msgspec
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from jax_impl import exchange, layout, plan_capacity
from parity.capture.measure import Clock, D, K, Measured, T, e, peak_mib
from parity.run.supervisor import end_with_parent

AXIS = "ranks"


def measure(P: int, way: str) -> Measured:
    """Trace, lower and compile one step forward and backward for P ranks, without running it."""
    found = Measured("jax", jax.__version__, P, way)
    program, shapes = over_devices(P) if way == "shard_map" else on_one_device(P)
    jax.jit(jnp.cumsum).lower(jnp.zeros(8)).compile()  # the first compilation has one-time costs
    before, clock = peak_mib(), Clock()
    lowered = program.lower(*shapes)
    found.capture_s = clock.seconds()
    executable = lowered.compile()
    found.compile_s = clock.seconds()
    found.peak_mib = round(peak_mib() - before, 1)
    found.nodes = lowered.as_text().count(" stablehlo.")
    found.instructions = (executable.as_text() or "").count(" = ")
    return found


def over_devices(P: int) -> tuple[jax.stages.Wrapped, list[jax.ShapeDtypeStruct]]:
    """The step and its gradient on P devices, and the shapes it takes: those of all ranks, concatenated."""
    mesh = jax.make_mesh((P,), (AXIS,), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(AXIS)
    sharded = jax.shard_map(value_and_gradient, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    return jax.jit(sharded), [jax.ShapeDtypeStruct((P * a.shape[0], *a.shape[1:]), a.dtype) for a in of_one_rank(P)]


def on_one_device(P: int) -> tuple[jax.stages.Wrapped, list[jax.ShapeDtypeStruct]]:
    """The step and its gradient with P ranks on one device, as an axis of `vmap`."""
    mapped = jax.vmap(value_and_gradient, axis_name=AXIS)
    return jax.jit(mapped), [jax.ShapeDtypeStruct((P, *a.shape), a.dtype) for a in of_one_rank(P)]


def of_one_rank(P: int) -> list[jax.ShapeDtypeStruct]:
    """A rank's bins of rows, and how many rows are for each expert."""
    capacity = plan_capacity("1", T, K, P * e, P)
    return [
        jax.ShapeDtypeStruct((P, capacity.rows, D), jnp.float32),
        jax.ShapeDtypeStruct((P * e,), jnp.int32),
    ]


def value_and_gradient(x_PCD: Array, kept_E: Array) -> tuple[Array, Array]:
    """One rank's step, and the gradient of its rows."""
    y_PCD, vjp = jax.vjp(partial(step, kept_E=kept_E), x_PCD)
    return y_PCD, vjp(y_PCD)[0]


def step(x_PCD: Array, kept_E: Array) -> Array:
    """Move bins to the ranks of their experts, into expert-major order, and back: stages 3, 4, 5, 7 and 8."""
    counts_Pe = exchange.exchange_counts(kept_E, AXIS)
    x_SD, source_S, target_PC = layout.to_expert_major(exchange.send_tokens(x_PCD, AXIS), counts_Pe)
    return exchange.return_tokens(layout.to_rank_major(x_SD, source_S, target_PC), AXIS)


if __name__ == "__main__":
    end_with_parent()
    P, way = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", P if way == "shard_map" else 1)
    print(msgspec.json.encode(measure(P, way)).decode())
