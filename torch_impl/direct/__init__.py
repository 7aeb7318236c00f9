"""The same MoE layer in PyTorch, with every row written straight to its place on the GPU of its expert.

On GPUs the host never waits for the device. Elsewhere an all-to-all takes the place of the writes, and does wait.

No assignment is dropped, unless its expert id is out of range, or repeated within a token. On a CPU the layer refuses
such an id. On a GPU that would mean waiting for its value, so it is sent nowhere, and counted in `Stages.dropped`.
"""

from torch_impl.direct.exchange import Buffers, make_buffers
from torch_impl.direct.layer import Stages, moe_layer
from torch_impl.experts import Biases, Experts, Shared
from torch_impl.routing import PerExpert, Router, Routing, route

__all__ = [
    "Biases",
    "Buffers",
    "Experts",
    "PerExpert",
    "Router",
    "Routing",
    "Shared",
    "Stages",
    "make_buffers",
    "moe_layer",
    "route",
]
