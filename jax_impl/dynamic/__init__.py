"""The same layer in JAX with sizes known only on the device: `ragged_all_to_all`, which needs GPUs. Nothing drops."""

from jax_impl.dynamic.layer import Stages, moe_layer
from jax_impl.routing import Routing, route

__all__ = ["Routing", "Stages", "moe_layer", "route"]
