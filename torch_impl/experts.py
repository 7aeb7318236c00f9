"""Stage 6: every local expert's SwiGLU on its own rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor


def apply_experts(
    x_RD: Float[Tensor, "R D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"],
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
) -> Float[Tensor, "R D"]:
    """y = (silu(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on. Every matmul accumulates in float32 and rounds once to x's
    dtype; silu and the product are float32, rounded once. SwiGLU: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    gate_RF = grouped_matmul(x_RD, w_gate_eDF, counts_e)
    up_RF = grouped_matmul(x_RD, w_up_eDF, counts_e)
    hidden_RF = (F.silu(gate_RF.to(wide)) * up_RF.to(wide)).to(x_RD.dtype)
    return grouped_matmul(hidden_RF, w_down_eFD, counts_e)


def grouped_matmul(
    x_RD: Float[Tensor, "R D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "R F"]:
    """Rows of expert j times w[j].

    `torch.nn.functional.grouped_mm` takes no float64, and only rows of whole 16-byte units. What it does not take goes
    through one matmul per expert, which has to read the counts: on a GPU, one more sync.
    """
    row_bytes = {width * x_RD.element_size() for width in w_eDF.shape[1:]}
    if x_RD.dtype != torch.float64 and all(n % 16 == 0 for n in row_bytes):
        return F.grouped_mm(x_RD, w_eDF, offs=counts_e.cumsum(dim=0).to(torch.int32))
    rows = x_RD.split(counts_e.tolist())
    return torch.cat([x @ w for x, w in zip(rows, w_eDF.unbind(), strict=True)])
