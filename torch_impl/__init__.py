"""Expert-parallel MoE in PyTorch: dynamic shapes, one device-to-host sync per dispatch."""

from torch_impl.layer import Stages, moe_layer
from torch_impl.routing import Routing, route

__all__ = ["Routing", "Stages", "moe_layer", "route"]
