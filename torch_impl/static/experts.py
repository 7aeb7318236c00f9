"""Stage 6: every local expert's gated layer on its own rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl.experts import Experts, fits_grouped_mm, glu, group_ends


def apply_experts(
    x_SD: Float[Tensor, "*S D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"],
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
) -> Float[Tensor, "*S D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on; rows past them are padding, whose values are not read, and
    which come out as zero. For [e, P*C, D], each expert has a bin of its own, in which zero rows stay zero. Every
    matmul accumulates in float32 and rounds once to x's dtype.
    """
    x_SD = _zero_padding(x_SD, counts_e)
    gate_SF = grouped_matmul(x_SD, w_gate_eDF, counts_e)
    up_SF = grouped_matmul(x_SD, w_up_eDF, counts_e)
    return _zero_padding(grouped_matmul(glu(gate_SF, up_SF, experts.activation), w_down_eFD, counts_e), counts_e)


def grouped_matmul(
    x_SD: Float[Tensor, "*S D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "*S F"]:
    """Rows of expert j times w[j]; what stands in rows past the groups is unspecified.

    `torch.nn.functional.grouped_mm` reads the counts on the device for bfloat16 only (on Hopper and Blackwell; on older
    GPUs it waits). The other dtypes are multiplied with every expert's weights, of which one result is kept: e times
    the work, but nothing waits.
    """
    if x_SD.ndim == 3:
        return torch.bmm(x_SD, w_eDF)
    end_e = group_ends(counts_e)
    if x_SD.dtype == torch.bfloat16 and fits_grouped_mm(x_SD, w_eDF):
        return F.grouped_mm(x_SD.contiguous(), w_eDF, offs=end_e)
    expert_S1 = (torch.arange(x_SD.shape[0], device=x_SD.device)[:, None] >= end_e).sum(dim=1, keepdim=True)
    y_SF = x_SD.new_zeros(x_SD.shape[0], w_eDF.shape[2])
    for j, w_DF in enumerate(w_eDF.unbind()):
        y_SF = torch.where(expert_S1 == j, x_SD @ w_DF, y_SF)
    return y_SF


def _zero_padding(x_SD: Tensor, counts_e: Tensor) -> Tensor:
    """Zero the padding, and in backward its gradient, where `grouped_mm` leaves garbage. Expert bins need neither."""
    if x_SD.ndim == 3:
        return x_SD
    real_S = torch.arange(x_SD.shape[0], device=x_SD.device) < counts_e.sum()
    return torch.where(real_S[:, None], x_SD, 0)
