"""Matmuls of rows grouped by expert, each with its own expert's weights: plain, or through kernels where they serve."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jax_impl import kernels


def grouped_matmul(
    x_MD: Float[Array, "*M D"], w_eDF: Float[Array, "e D F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "*M F"]:
    """Rows of expert j times w[j]; rows past the groups come out as zero.

    True float32 for float32: JAX on a GPU would use TF32. `ragged_dot` leaves rows past its groups unspecified, and has
    no rule for `vmap` with shared weights: flatten the batch into the tokens.
    """
    if x_MD.ndim == 3:
        return jnp.einsum("esd,edf->esf", x_MD, w_eDF, precision="highest")
    if kernels.use_matmul_kernels(x_MD):
        return kernels.grouped_matmul(x_MD, w_eDF, counts_e)
    y_MF = jax.lax.ragged_dot(x_MD, w_eDF, counts_e, precision="highest")
    return jnp.where((jnp.arange(x_MD.shape[0]) < counts_e.sum())[:, None], y_MF, 0)
