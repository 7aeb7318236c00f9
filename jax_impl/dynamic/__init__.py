"""The same layer in JAX with sizes known only on the device: `ragged_all_to_all`, which needs GPUs. Nothing drops.

The exception is an id that is out of range, or repeated within a token. A traced function cannot refuse it, so it is
sent nowhere, and counted.
"""

from jax_impl.dynamic.layer import Stages, moe_layer
from jax_impl.experts import Biases, Experts, Shared
from jax_impl.routing import PerExpert, Router, Routing, route

__all__ = ["Biases", "Experts", "PerExpert", "Router", "Routing", "Shared", "Stages", "moe_layer", "route"]
