"""The same layer in JAX with every row written straight to its place on the GPU of its expert. Nothing drops.

A kernel writes the rows where one process has all the GPUs. Elsewhere all rows go to all ranks, and each takes its own.

The exception is an id that is out of range, or repeated within a token. A traced function cannot refuse it, so it is
sent nowhere, and counted.
"""

from jax_impl.direct.layer import Stages, moe_layer
from jax_impl.experts import Biases, Experts, Shared
from jax_impl.routing import PerExpert, Router, Routing, route

__all__ = ["Biases", "Experts", "PerExpert", "Router", "Routing", "Shared", "Stages", "moe_layer", "route"]
