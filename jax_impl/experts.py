"""Stage 6: every local expert's gated layer on its own rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jax_impl import kernels


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate; or "gelu_tanh"


def apply_experts(
    x_SD: Float[Array, "*S D"],
    counts_e: Integer[Array, " e"],
    w_gate_eDF: Float[Array, "e D F"],
    w_up_eDF: Float[Array, "e D F"],
    w_down_eFD: Float[Array, "e F D"],
    experts: Experts = Experts(),
) -> Float[Array, "*S D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on; rows past them are padding, whose values are not read, and
    which come out as zero. For [e, P*C, D], each expert has a bin of its own, in which zero rows stay zero. Every
    matmul accumulates in float32 and rounds once to x's dtype.
    """
    gate_SF = grouped_matmul(x_SD, w_gate_eDF, counts_e)
    up_SF = grouped_matmul(x_SD, w_up_eDF, counts_e)
    return grouped_matmul(glu(gate_SF, up_SF, experts.activation), w_down_eFD, counts_e)


def glu(gate_SF: Float[Array, "*S F"], up_SF: Float[Array, "*S F"], activation: str) -> Float[Array, "*S F"]:
    """activation(gate) * up in float32, rounded once. XLA makes one launch of it.

    silu       g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu_tanh  g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it
    """
    wide = np.promote_types(gate_SF.dtype, np.float32)
    gate = gate_SF.astype(wide)
    active = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return (active * up_SF.astype(wide)).astype(gate_SF.dtype)


def grouped_matmul(
    x_SD: Float[Array, "*S D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "*S F"]:
    """Rows of expert j times w[j]; rows past the groups come out as zero.

    True float32 for float32: JAX on a GPU would use TF32. `ragged_dot` leaves rows past its groups unspecified, and has
    no rule for `vmap` with shared weights: flatten the batch into the tokens.
    """
    if x_SD.ndim == 3:
        return jnp.einsum("esd,edf->esf", x_SD, w_eDF, precision="highest")
    if kernels.use_matmul_kernels(x_SD):
        return kernels.grouped_matmul(x_SD, w_eDF, counts_e)
    y_SF = jax.lax.ragged_dot(x_SD, w_eDF, counts_e, precision="highest")
    return jnp.where((jnp.arange(x_SD.shape[0]) < counts_e.sum())[:, None], y_SF, 0)
