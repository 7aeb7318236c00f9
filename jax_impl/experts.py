"""Stage 6: every local expert's gated layer on its own rows; and the shared expert, on all tokens."""

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jax_impl.glu import glu
from jax_impl.matmul import grouped_linear, matmul


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate, or of up without a gate; or "gelu", "gelu_tanh", "quick_gelu", "relu2"
    clamp: float | None = None  # upper bound of the gate; up is clamped to +- this
    up_offset: float = 0.0  # added to up, after the clamp


class Biases(NamedTuple):
    """Biases of an expert's projections; None where a model has none."""

    gate_eF: Float[Array, "e F"] | None = None
    up_eF: Float[Array, "e F"] | None = None
    down_eD: Float[Array, "e D"] | None = None


class Shared(NamedTuple):
    """The expert that every token goes to; H is its hidden width."""

    w_gate_DH: Float[Array, "D H"] | None  # None where experts have no gate
    w_up_DH: Float[Array, "D H"]
    w_down_HD: Float[Array, "H D"]
    score_D: Float[Array, " D"] | None = None  # sigmoid(x @ score) scales the output; None: no scaling


def apply_experts(
    x_MD: Float[Array, "*M D"],
    counts_e: Integer[Array, " e"],
    w_gate_eDF: Float[Array, "e D F"] | None,
    w_up_eDF: Float[Array, "e D F"],
    w_down_eFD: Float[Array, "e F D"],
    experts: Experts = Experts(),
    biases: Biases = Biases(),
) -> Float[Array, "*M D"]:
    """y = (activation(x @ w_gate + b_gate) * (x @ w_up + b_up)) @ w_down + b_down, each row by its own expert.

    Without w_gate, activation(x @ w_up + b_up) @ w_down + b_down. The first counts_e[0] rows are expert 0's, and so
    on. Rows past the counts are padding: their values are not read, and they come out as zero. With [e, P*C, D] each
    expert has a bin of its own. The bin's padding must be zero, and comes out as what the expert computes from zero.
    Every matmul accumulates in float32 and rounds once to x's dtype, and so does every sum with a bias.
    """
    gate_MF = None if w_gate_eDF is None else grouped_linear(x_MD, w_gate_eDF, counts_e, biases.gate_eF)
    up_MF = grouped_linear(x_MD, w_up_eDF, counts_e, biases.up_eF)
    hidden_MF = glu(gate_MF, up_MF, experts)
    return grouped_linear(hidden_MF, w_down_eFD, counts_e, biases.down_eD)


def shared_expert(x_TD: Float[Array, "T D"], shared: Shared, experts: Experts) -> Float[Array, "T D"]:
    """The shared expert's output for every token, times sigmoid(x @ score) where there is a score.

    Every step rounds to x's dtype; the sigmoid is computed in float32, because XLA's float16 sigmoid is zero below -11.
    """
    gate_TH = None if shared.w_gate_DH is None else matmul(x_TD, shared.w_gate_DH)
    y_TD = matmul(glu(gate_TH, matmul(x_TD, shared.w_up_DH), experts), shared.w_down_HD)
    if shared.score_D is None:
        return y_TD
    score_T = jax.nn.sigmoid(matmul(x_TD, shared.score_D).astype(np.promote_types(x_TD.dtype, np.float32)))
    return score_T.astype(x_TD.dtype)[:, None] * y_TD
