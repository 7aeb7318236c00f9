"""Matmuls of rows grouped by expert, each with its own expert's weights, where nothing may wait for the counts."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import grouped_mm

from torch_impl.matmul import fits_grouped_mm, group_ends


def grouped_matmul(
    x_MD: Float[Tensor, "*M D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "*M F"]:
    """Rows of expert j times w[j]; what stands in rows past the groups is unspecified.

    `torch.nn.functional.grouped_mm` reads the counts on the device for bfloat16 only (on Hopper and Blackwell; on older
    GPUs it waits). The other dtypes are multiplied with every expert's weights, of which one result is kept: e times
    the work, but nothing waits.
    """
    if x_MD.ndim == 3:
        return torch.bmm(x_MD, w_eDF)
    end_e = group_ends(counts_e)
    if x_MD.dtype == torch.bfloat16 and fits_grouped_mm(x_MD, w_eDF):
        return grouped_mm(x_MD.contiguous(), w_eDF, offs=end_e)
    expert_M1 = (torch.arange(x_MD.shape[0], device=x_MD.device)[:, None] >= end_e).sum(dim=1, keepdim=True)
    y_MF = x_MD.new_zeros(x_MD.shape[0], w_eDF.shape[2])
    for j, w_DF in enumerate(w_eDF.unbind()):
        y_MF = torch.where(expert_M1 == j, x_MD @ w_DF, y_MF)
    return y_MF


def zero_padding(x_MD: Float[Tensor, "*M D"], counts_e: Integer[Tensor, " e"]) -> Float[Tensor, "*M D"]:
    """Zero the padding, and in backward its gradient, where `grouped_mm` leaves garbage. Expert bins need neither."""
    if x_MD.ndim == 3:
        return x_MD
    real_M = torch.arange(x_MD.shape[0], device=x_MD.device) < counts_e.sum()
    return torch.where(real_M[:, None], x_MD, 0)
