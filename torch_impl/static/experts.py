"""Stage 6: every local expert's gated layer on its own rows."""

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.experts import Experts
from torch_impl.glu import glu
from torch_impl.static.matmul import grouped_matmul, zero_padding


def apply_experts(
    x_MD: Float[Tensor, "*M D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"],
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
) -> Float[Tensor, "*M D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on; rows past them are padding, whose values are not read, and
    which come out as zero. For [e, P*C, D], each expert has a bin of its own, in which zero rows stay zero. Every
    matmul accumulates in float32 and rounds once to x's dtype.
    """
    x_MD = zero_padding(x_MD, counts_e)
    gate_MF = grouped_matmul(x_MD, w_gate_eDF, counts_e)
    up_MF = grouped_matmul(x_MD, w_up_eDF, counts_e)
    return zero_padding(grouped_matmul(glu(gate_MF, up_MF, experts.activation), w_down_eFD, counts_e), counts_e)
