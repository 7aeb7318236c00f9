"""The same layer in PyTorch with every row written straight to its place on the GPU of its expert.

On GPUs the host never waits for the device. Elsewhere an all-to-all takes the place of the writes, and does wait.

Nothing drops. The exception is an id that is out of range, or repeated within a token. Refusing it would mean waiting
for its value, so it is sent nowhere, and counted.
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
