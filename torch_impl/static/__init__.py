"""The same layer in PyTorch with static shapes, padded to a capacity: no sync at all, so a CUDA graph can hold it.

Bfloat16 in rank bins needs Hopper or newer for that: on older GPUs PyTorch's `grouped_mm` waits.
"""

from torch_impl.experts import Biases, Experts, Shared
from torch_impl.routing import PerExpert, Router, Routing, route
from torch_impl.static.grouping import Capacity, plan_capacity
from torch_impl.static.layer import Stages, moe_layer

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
