"""The same MoE layer in JAX, with every row written straight to its place on the GPU of its expert.

A kernel writes the rows where one process has all the GPUs. Elsewhere all rows go to all ranks, and each rank takes the
rows that are for it.

No assignment is dropped, unless its expert id is out of range, or repeated within a token. Outside of a trace the layer
refuses such an id. A traced function cannot, so there it is sent nowhere, and counted in `Stages.dropped`.
"""

from jax_impl.direct.layer import Stages, moe_layer
from jax_impl.experts import Biases, Experts, Shared
from jax_impl.routing import PerExpert, Router, Routing, route

__all__ = ["Biases", "Experts", "PerExpert", "Router", "Routing", "Shared", "Stages", "moe_layer", "route"]
