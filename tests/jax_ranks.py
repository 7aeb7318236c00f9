"""JAX ranks: virtual CPU devices under shard_map, or one device under vmap; and what the tests have them do."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from problems import Problem

from jax_impl import Capacity, Router, Stages, moe_layer, plan_capacity, route

AXIS = "ranks"
both_ways = pytest.mark.parametrize("how_mapped", ["shard_map", "vmap"])


def to_jax(tree: Any, dtype: str | None = None) -> Any:
    """The same tree with JAX arrays for torch tensors; floating point ones become `dtype`."""
    return jax.tree.map(lambda a: jnp.asarray(a.numpy(), dtype if a.is_floating_point() else None), tree)


def over_ranks(program: Callable, how_mapped: str = "shard_map") -> Callable:
    """`program` on every rank, compiled. Arguments and results get a leading axis of ranks, P of them."""
    if how_mapped == "vmap":
        return jax.jit(jax.vmap(program, axis_name=AXIS))

    def block(*arguments):
        result = program(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], result)

    def sharded(*arguments):
        P = jax.tree.leaves(arguments)[0].shape[0]
        mesh = jax.make_mesh((P,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:P])
        return jax.shard_map(block, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS))(*arguments)

    return jax.jit(sharded)


def trace_over_data_and_experts(layer: Callable, dtype: str) -> None:
    """The layer and its gradients on a mesh of 2 by 2, traced: experts over one axis, tokens over both."""
    T, D, F, E, axes = 6, 16, 16, 4, ("data", "experts")
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((4 * T, D), (D, E), (E, D, F), (E, D, F), (E, F, D))]
    specs = PartitionSpec(axes), PartitionSpec(), *[PartitionSpec("experts")] * 3

    def loss(*arguments):
        return jax.lax.psum((layer(*arguments).astype(jnp.float32) ** 2).sum(), axes)

    over_both = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    jax.jit(jax.grad(over_both, argnums=tuple(range(5)))).trace(*shapes)  # type: ignore[attr-defined]


def run_layer(
    x_TD: Array,
    router_DE: Array,
    weights: tuple[Array, Array, Array],
    dout_TD: Array,
    expert_id_TK: Array,
    *,
    router: Router,
    capacity: Capacity,
    axis_name: str | None = None,
) -> tuple[Stages, dict[str, Array]]:
    """The layer forward and backward. The router's gradient is this rank's part of it."""

    def layer(x_TD, router_DE, weights, dscore_TK):
        routing = route(x_TD, router_DE, router, expert_id_TK=expert_id_TK)
        routing = routing._replace(score_TK=routing.score_TK + dscore_TK)  # for the gradient with respect to scores
        stages = moe_layer(
            x_TD, router_DE, *weights, router=router, capacity=capacity, routing=routing, axis_name=axis_name
        )
        return stages.out_TD, stages

    accum_dtype = np.promote_types(x_TD.dtype, np.float32)
    # Not jnp.zeros, which all ranks would share: its gradient would be their sum.
    zero_TK = 0 * expert_id_TK.astype(accum_dtype)
    _, vjp, stages = jax.vjp(layer, x_TD, router_DE, weights, zero_TK, has_aux=True)
    dx_TD, drouter_DE, dweights, dscore_TK = vjp(dout_TD)
    gradients = {"x": dx_TD, "router": drouter_DE, "score": dscore_TK}
    return stages, gradients | dict(zip(("w_gate", "w_up", "w_down"), dweights, strict=True))


def layer_arguments(problem: Problem, dtype: str = "float32") -> list:
    """All ranks' arguments of `run_layer`, with a leading axis of P ranks."""
    P = problem.x_PTD.shape[0]
    weights = tuple(w.reshape(P, -1, *w.shape[1:]) for w in problem.weights)
    router_PDE = problem.router_DE.expand(P, -1, -1)
    return to_jax([problem.x_PTD, router_PDE, weights, problem.dout_PTD, problem.expert_id_PTK], dtype)


@lru_cache
def compiled_layer(capacity: Capacity, how_mapped: str, top_k: int) -> Callable:
    """`run_layer` over ranks, or of one rank without an axis; compiled once for all that ask for it."""
    run = partial(run_layer, router=Router(top_k), capacity=capacity)
    if how_mapped == "no axis":
        return jax.jit(lambda *of: jax.tree.map(lambda a: a[None], run(*jax.tree.map(lambda a: a[0], of))))
    return over_ranks(partial(run, axis_name=AXIS), how_mapped)


def run_problem(
    problem: Problem, capacity: Capacity, how_mapped: str = "shard_map", dtype: str = "float32"
) -> tuple[Any, dict[str, np.ndarray]]:
    """Stages and gradients of all ranks, as NumPy arrays."""
    with jax.enable_x64(dtype == "float64"):
        run = compiled_layer(capacity, how_mapped, problem.how["top_k"])
        return jax.device_get(run(*layer_arguments(problem, dtype)))


def capacity_of(problem: Problem, factor: str | None, per: str = "rank", priority: str = "token") -> Capacity:
    P, T, K = problem.expert_id_PTK.shape
    return plan_capacity(factor, T, K, problem.router_DE.shape[1], P, per, priority)
