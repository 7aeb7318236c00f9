"""A whole layer in JAX, timed: a device per rank under shard_map."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array

from jax_impl import Router, direct, dynamic, moe_layer, plan_capacity
from jax_impl.routing import Routing, count_per_expert
from parity.bench.in_jax import measure as timed
from parity.bench.in_jax import program
from parity.bench.plan import Plan as Timing
from parity.bench.plan import emit
from parity.run.jax_ranks import AXIS, over_ranks, put
from parity.run.supervisor import end_with_parent
from parity.study.layers import Plan, routing_of


def main(plan: Plan) -> None:
    """The layer forward and backward, over and over."""
    case, P = plan.case, plan.case.ranks
    jax.config.update("jax_num_cpu_devices", P)
    if jax.device_count() < P:
        raise ValueError(f"--ranks {P} with {jax.device_count()} devices: it is measured with a GPU a rank")
    axis, e = AXIS if P > 1 else None, case.experts // case.ranks
    capacity = plan_capacity(plan.factor, case.tokens, case.top_k, case.experts, P)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_normal((P, *shape), np.float32) / np.float32(shape[-2] ** 0.5)
        return values.astype(jnp.dtype(case.dtype))

    routing = routing_of(plan)
    D, F = case.width, case.hidden
    host = {
        "x": draw(case.tokens, D), "score": routing.score[0], "w_gate": draw(e, D, F), "w_up": draw(e, D, F),
        "w_down": draw(e, F, D), "ids": routing.expert_id[0], "dout": draw(case.tokens, D),
    }  # fmt: skip
    x, score, gate, up, down, ids, dout = put(host, P, "shard_map").values()

    def layer(x: Array, score: Array, gate: Array, up: Array, down: Array, ids: Array) -> Array:
        chosen = Routing(score, ids, count_per_expert(ids, case.experts))
        router = jnp.zeros((D, case.experts))
        how: dict[str, Any] = {"router": Router(case.top_k), "routing": chosen, "axis_name": axis}
        if plan.layout == "static":
            return moe_layer(x, router, gate, up, down, capacity=capacity, **how).out_TD
        without_bins = {"ragged": dynamic.moe_layer, "direct": direct.moe_layer}[plan.layout]
        return without_bins(x, router, gate, up, down, **how).out_TD

    over = over_ranks(layer, P, "shard_map")

    def step(x: Array, score: Array, gate: Array, up: Array, down: Array, ids: Array, dout: Array) -> Any:
        out, vjp = jax.vjp(lambda *leaves: over(*leaves, ids), x, score, gate, up, down)
        return out, vjp(dout)

    run = program(step)
    emit(timed(Timing(seconds=plan.seconds), lambda _: run(x, score, gate, up, down, ids, dout)))


if __name__ == "__main__":
    end_with_parent()
    main(msgspec.json.decode(sys.argv[1], type=Plan))
