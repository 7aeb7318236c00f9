"""The gated activation. XLA compiles it into one launch."""

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

if TYPE_CHECKING:  # that module imports this one
    import jax_impl.experts


def glu(
    gate_MF: Float[Array, "*M F"] | None, up_MF: Float[Array, "*M F"], experts: "jax_impl.experts.Experts"
) -> Float[Array, "*M F"]:
    """activation(gate) * (up + up_offset), both clamped first; activation(up) without a gate. In float32, rounded once.

    silu        g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu        g * Phi(g), of the normal distribution (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units")
    gelu_tanh   g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it
    quick_gelu  g * sigmoid(1.702 * g): gpt-oss, with a clamp at 7 and up + 1
    relu2       relu(g)**2: Nemotron-H, without a gate
    """
    activated, dtype = ACTIVATIONS[experts.activation], up_MF.dtype
    up = up_MF.astype(np.promote_types(dtype, np.float32))
    if gate_MF is None:
        return activated(up).astype(dtype)
    gate = gate_MF.astype(up.dtype)
    if experts.clamp is not None:
        gate, up = clamped(gate, -jnp.inf, experts.clamp), clamped(up, -experts.clamp, experts.clamp)
    return (activated(gate) * (up + experts.up_offset)).astype(dtype)


def clamped(a: Float[Array, "*M F"], low: float, high: float) -> Float[Array, "*M F"]:
    """`a` clamped to [low, high]. At both bounds the slope is 1, as in PyTorch."""
    return jnp.where(a < low, low, jnp.where(a > high, high, a))


def gelu_tanh(gate: Float[Array, "*M F"]) -> Float[Array, "*M F"]:
    """gelu by its tanh approximation, with the tanh's argument computed from a gate clamped to +-10.

    Past +-10 the tanh is +-1 and its slope 0. Without the clamp the cube would overflow there and make the slope NaN.
    """
    near = gate.clip(-10, 10)
    return gate * ((1 + jnp.tanh(math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))) / 2)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda gate: gate * jax.nn.sigmoid(1.702 * gate),
    "relu2": lambda gate: jax.nn.relu(gate) ** 2,
}
