"""Matmuls of rows grouped by expert, each with its own expert's weights, where nothing may wait for the counts."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import grouped_mm

from torch_impl.matmul import fits_grouped_mm, group_ends, rows_of_experts


def grouped_matmul(
    x_MD: Float[Tensor, "*M D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "*M F"]:
    """Rows of expert j times w[j]; rows past the groups are unspecified.

    `torch.nn.functional.grouped_mm` reads the counts on the device for bfloat16 only (on Hopper and Blackwell; on older
    GPUs it waits). In other dtypes each row is multiplied with every expert's weights, and one of e results is
    kept: e times the work, but nothing waits.
    """
    if x_MD.ndim == 3:
        return torch.bmm(x_MD, w_eDF)
    if x_MD.dtype == torch.bfloat16 and fits_grouped_mm(x_MD, w_eDF):
        return grouped_mm(x_MD.contiguous(), w_eDF, offs=group_ends(counts_e))
    of_expert_Me = rows_of_experts(counts_e, x_MD.shape[0])
    y_MF = x_MD.new_zeros(x_MD.shape[0], w_eDF.shape[2])
    for j, w_DF in enumerate(w_eDF.unbind()):
        y_MF = torch.where(of_expert_Me[:, j, None], x_MD @ w_DF, y_MF)
    return y_MF


def grouped_linear(
    x_MD: Float[Tensor, "*M D"],
    w_eDF: Float[Tensor, "e D F"],
    counts_e: Integer[Tensor, " e"],
    b_eF: Float[Tensor, "e F"] | None,
) -> Float[Tensor, "*M F"]:
    """Rows of expert j times w[j], plus b[j] where there are biases."""
    y_MF = grouped_matmul(x_MD, w_eDF, counts_e)
    return y_MF if b_eF is None else add_bias(y_MF, b_eF, counts_e)


def add_bias(
    y_MF: Float[Tensor, "*M F"], b_eF: Float[Tensor, "e F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "*M F"]:
    """Each row plus its expert's bias. Padding becomes zero, but in expert bins all rows get the bias.

    The bias of each row is a product with ones and zeros, whose gradient sums an expert's rows: no scatter-add. The
    gradient of padding, where `grouped_mm` leaves garbage, is kept out of that sum: zero times infinity would be NaN.
    """
    if y_MF.ndim == 3:
        return y_MF + y_MF.new_ones(*y_MF.shape[:2], 1) @ b_eF[:, None]
    return zero_padding(y_MF + rows_of_experts(counts_e, y_MF.shape[0]).to(b_eF.dtype) @ b_eF, counts_e)


def zero_padding(x_MD: Float[Tensor, "*M D"], counts_e: Integer[Tensor, " e"]) -> Float[Tensor, "*M D"]:
    """Zero the padding, and in backward its gradient, where `grouped_mm` leaves garbage. Expert bins need neither."""
    if x_MD.ndim == 3:
        return x_MD
    real_M = torch.arange(x_MD.shape[0], device=x_MD.device) < counts_e.sum()
    return torch.where(real_M[:, None], x_MD, 0)
