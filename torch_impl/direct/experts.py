"""Stage 6: every local expert's gated layer on its own rows; and the shared expert, on all tokens."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.experts import Biases, Experts, Shared, shared_expert
from torch_impl.glu import glu
from torch_impl.matmul import fits_grouped_mm, grouped_matmul
from torch_impl.static.experts import apply_experts as apply_to_all_rows

__all__ = ["Biases", "Experts", "Shared", "apply_experts", "shared_expert"]


def apply_experts(
    x_RD: Float[Tensor, "R D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"] | None,
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
    biases: Biases = Biases(),
) -> Float[Tensor, "R D"]:
    """y = (activation(x @ w_gate + b_gate) * (x @ w_up + b_up)) @ w_down + b_down, each row by its own expert.

    Without w_gate, activation(x @ w_up + b_up) @ w_down + b_down. The first counts_e[0] rows are expert 0's, and so
    on. What the rows past the counts hold reaches no other row and no weight's gradient. They come out unspecified, and
    are sent nowhere. In bfloat16 without biases they stay as they are: `grouped_mm` does not read them, and all else is
    elementwise. Otherwise they are made zero first, which takes a copy of the whole buffer.
    """
    weights = [w for w in (w_gate_eDF, w_up_eDF, w_down_eFD) if w is not None]
    grouped = x_RD.dtype == torch.bfloat16 and all(fits_grouped_mm(x_RD, w) for w in weights)
    if not grouped or any(bias is not None for bias in biases):
        return apply_to_all_rows(x_RD, counts_e, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)
    gate_RF = None if w_gate_eDF is None else grouped_matmul(x_RD, w_gate_eDF, counts_e)
    hidden_RF = glu(gate_RF, grouped_matmul(x_RD, w_up_eDF, counts_e), experts, counts_e.sum())
    return grouped_matmul(hidden_RF, w_down_eFD, counts_e)
