"""Stage 6: every local expert's gated layer on its own rows; and the shared expert, on all tokens."""

from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.experts import Biases, Experts, Shared, shared_expert
from torch_impl.glu import glu
from torch_impl.static.matmul import grouped_linear, zero_padding

__all__ = ["Biases", "Experts", "Shared", "apply_experts", "shared_expert"]


def apply_experts(
    x_MD: Float[Tensor, "*M D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"] | None,
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
    biases: Biases = Biases(),
) -> Float[Tensor, "*M D"]:
    """y = (activation(x @ w_gate + b_gate) * (x @ w_up + b_up)) @ w_down + b_down, each row by its own expert.

    Without w_gate, activation(x @ w_up + b_up) @ w_down + b_down. The first counts_e[0] rows are expert 0's, and so
    on. Rows past the counts are padding: their values are not read, and they come out as zero. With [e, P*C, D] each
    expert has a bin of its own. The bin's padding must be zero, and comes out as what the expert computes from zero.
    Every matmul accumulates in float32 and rounds once to x's dtype, and so does every sum with a bias.
    """
    x_MD = zero_padding(x_MD, counts_e)
    gate_MF = None if w_gate_eDF is None else grouped_linear(x_MD, w_gate_eDF, counts_e, biases.gate_eF)
    up_MF = grouped_linear(x_MD, w_up_eDF, counts_e, biases.up_eF)
    hidden_MF = glu(gate_MF, up_MF, experts)
    return zero_padding(grouped_linear(hidden_MF, w_down_eFD, counts_e, biases.down_eD), counts_e)
