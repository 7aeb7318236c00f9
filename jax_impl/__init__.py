"""Expert-parallel MoE in JAX: static shapes, padded to a capacity, no sync."""

from jax_impl.experts import Biases, Experts, Shared
from jax_impl.grouping import Capacity, plan_capacity
from jax_impl.layer import Stages, moe_layer
from jax_impl.routing import PerExpert, Router, Routing, route

__all__ = [
    "Biases",
    "Capacity",
    "Experts",
    "PerExpert",
    "Router",
    "Routing",
    "Shared",
    "Stages",
    "moe_layer",
    "plan_capacity",
    "route",
]
