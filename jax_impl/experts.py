"""Stage 6: every local expert's gated layer on its own rows."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from jax_impl.glu import glu
from jax_impl.matmul import grouped_matmul


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate; or "gelu_tanh"


def apply_experts(
    x_MD: Float[Array, "*M D"],
    counts_e: Integer[Array, " e"],
    w_gate_eDF: Float[Array, "e D F"],
    w_up_eDF: Float[Array, "e D F"],
    w_down_eFD: Float[Array, "e F D"],
    experts: Experts = Experts(),
) -> Float[Array, "*M D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on; rows past them are padding, whose values are not read, and
    which come out as zero. For [e, P*C, D], each expert has a bin of its own, in which zero rows stay zero. Every
    matmul accumulates in float32 and rounds once to x's dtype.
    """
    gate_MF = grouped_matmul(x_MD, w_gate_eDF, counts_e)
    up_MF = grouped_matmul(x_MD, w_up_eDF, counts_e)
    return grouped_matmul(glu(gate_MF, up_MF, experts.activation), w_down_eFD, counts_e)
