"""Stage 6: every local expert's gated layer on its own rows."""

from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.glu import glu
from torch_impl.matmul import grouped_matmul


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate; or "gelu_tanh"


def apply_experts(
    x_RD: Float[Tensor, "R D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"],
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
) -> Float[Tensor, "R D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on, to the last row; of rows that the counts leave out nothing is
    known. Every matmul accumulates in float32 and rounds once to x's dtype.
    """
    gate_RF = grouped_matmul(x_RD, w_gate_eDF, counts_e)
    up_RF = grouped_matmul(x_RD, w_up_eDF, counts_e)
    return grouped_matmul(glu(gate_RF, up_RF, experts.activation), w_down_eFD, counts_e)
