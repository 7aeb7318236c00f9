"""Expert-parallel MoE in PyTorch: dynamic shapes, one device-to-host sync per dispatch."""

from torch_impl.experts import Experts
from torch_impl.layer import Stages, moe_layer
from torch_impl.routing import Router, Routing, route

__all__ = ["Experts", "Router", "Routing", "Stages", "moe_layer", "route"]
