"""Expert-parallel MoE in PyTorch: dynamic shapes, one device-to-host sync per dispatch."""

from torch_impl.experts import Biases, Experts, Shared
from torch_impl.layer import Stages, moe_layer
from torch_impl.routing import PerExpert, Router, Routing, route

__all__ = ["Biases", "Experts", "PerExpert", "Router", "Routing", "Shared", "Stages", "moe_layer", "route"]
