"""The gated activation. XLA makes one launch of it."""

import numpy as np
from jax import Array
from jax.nn import gelu, silu
from jaxtyping import Float


def glu(gate_MF: Float[Array, "*M F"], up_MF: Float[Array, "*M F"], activation: str) -> Float[Array, "*M F"]:
    """activation(gate) * up in float32, rounded once.

    silu       g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu_tanh  g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it
    """
    wide = np.promote_types(gate_MF.dtype, np.float32)
    gate, up = gate_MF.astype(wide), up_MF.astype(wide)
    active = silu(gate) if activation == "silu" else gelu(gate, approximate=True)
    return (active * up).astype(gate_MF.dtype)
