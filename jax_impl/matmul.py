"""Matmuls of rows grouped by expert, each row with its expert's weights: plain, or through kernels on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer

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


def grouped_linear(
    x_MD: Float[Array, "*M D"],
    w_eDF: Float[Array, "e D F"],
    counts_e: Integer[Array, " e"],
    b_eF: Float[Array, "e F"] | None,
) -> Float[Array, "*M F"]:
    """Rows of expert j times w[j], plus b[j] where there are biases."""
    y_MF = grouped_matmul(x_MD, w_eDF, counts_e)
    return y_MF if b_eF is None else add_bias(y_MF, b_eF, counts_e)


def add_bias(
    y_MF: Float[Array, "*M F"], b_eF: Float[Array, "e F"], counts_e: Integer[Array, " e"]
) -> Float[Array, "*M F"]:
    """Each row plus its expert's bias. Padding is left as it is, but in expert bins all rows get the bias.

    The bias of each row is a product with ones and zeros, whose gradient sums an expert's rows: no scatter-add.
    """
    if y_MF.ndim == 3:
        return y_MF + jnp.einsum("es,ef->esf", jnp.ones(y_MF.shape[:2], b_eF.dtype), b_eF, precision="highest")
    of_expert_Me = rows_of_experts(counts_e, y_MF.shape[0])
    bias_MF = matmul(of_expert_Me.astype(b_eF.dtype), b_eF)
    return jnp.where(of_expert_Me.any(axis=1)[:, None], y_MF + bias_MF, y_MF)


def rows_of_experts(counts_e: Integer[Array, " e"], n_rows: int) -> Bool[Array, "R e"]:
    """Which rows are each expert's."""
    row_R1 = jnp.arange(n_rows)[:, None]
    end_e = counts_e.cumsum(axis=0)
    return (row_R1 >= end_e - counts_e) & (row_R1 < end_e)


def matmul(a: Float[Array, "*M n"], b: Float[Array, "n ..."]) -> Float[Array, "..."]:
    """a @ b, accumulated in float32 and rounded once; XLA on a GPU would accumulate small 16-bit matmuls in 16 bits."""
    accum_dtype = np.promote_types(a.dtype, np.float32)
    return jnp.matmul(a, b, precision="highest", preferred_element_type=accum_dtype).astype(a.dtype)
