"""The gated activation. XLA makes one launch of it."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import silu
from jaxtyping import Float


def glu(gate_MF: Float[Array, "*M F"], up_MF: Float[Array, "*M F"], activation: str) -> Float[Array, "*M F"]:
    """activation(gate) * up in float32, rounded once.

    silu       g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu_tanh  g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it; past +-10 the tanh is
               +-1 and its slope 0, where the cube would overflow and make the slope NaN
    """
    wide = np.promote_types(gate_MF.dtype, np.float32)
    gate, up = gate_MF.astype(wide), up_MF.astype(wide)
    active = silu(gate) if activation == "silu" else gate * gelu_share(gate.clip(-10, 10))
    return (active * up).astype(gate_MF.dtype)


def gelu_share(gate: Float[Array, "*M F"]) -> Float[Array, "*M F"]:
    """The share of a gate that gelu_tanh lets through."""
    return (1 + jnp.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
