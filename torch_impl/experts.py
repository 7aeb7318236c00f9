"""Stage 6: every local expert's gated layer on its own rows; and the shared expert, on all tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.glu import glu
from torch_impl.matmul import grouped_linear


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate, or of up without a gate; or "gelu", "gelu_tanh", "quick_gelu", "relu2"
    clamp: float | None = None  # upper bound of the gate; up is clamped to +- this
    up_offset: float = 0.0  # added to up, after the clamp


class Biases(NamedTuple):
    """Biases of an expert's projections; None where a model has none."""

    gate_eF: Float[Tensor, "e F"] | None = None
    up_eF: Float[Tensor, "e F"] | None = None
    down_eD: Float[Tensor, "e D"] | None = None


class Shared(NamedTuple):
    """The expert that every token goes to; H is its hidden width."""

    w_gate_DH: Float[Tensor, "D H"] | None  # None where experts have no gate
    w_up_DH: Float[Tensor, "D H"]
    w_down_HD: Float[Tensor, "H D"]
    score_D: Float[Tensor, " D"] | None = None  # sigmoid(x @ score) scales the output; None: no scaling


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
    on. The counts add up to R: rows past their sum would be unspecified. Every matmul accumulates in float32 and rounds
    once to x's dtype, and so does every sum with a bias.
    """
    gate_RF = None if w_gate_eDF is None else grouped_linear(x_RD, w_gate_eDF, counts_e, biases.gate_eF)
    up_RF = grouped_linear(x_RD, w_up_eDF, counts_e, biases.up_eF)
    hidden_RF = glu(gate_RF, up_RF, experts)
    return grouped_linear(hidden_RF, w_down_eFD, counts_e, biases.down_eD)


def shared_expert(x_TD: Float[Tensor, "T D"], shared: Shared, experts: Experts) -> Float[Tensor, "T D"]:
    """The shared expert's output for every token, times sigmoid(x @ score) where there is a score.

    Every step rounds to x's dtype; the sigmoid is computed in float32.
    """
    gate_TH = None if shared.w_gate_DH is None else x_TD @ shared.w_gate_DH
    y_TD = glu(gate_TH, x_TD @ shared.w_up_DH, experts) @ shared.w_down_HD
    if shared.score_D is None:
        return y_TD
    score_T = (x_TD @ shared.score_D).to(torch.promote_types(x_TD.dtype, torch.float32)).sigmoid()
    return score_T.to(x_TD.dtype)[:, None] * y_TD
