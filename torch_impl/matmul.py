"""Matmuls of rows grouped by expert, each row with its own expert's weights and bias."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import grouped_mm

from torch_impl.checks import is_captured


def grouped_matmul(
    x_RD: Float[Tensor, "R D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "R F"]:
    """Rows of expert j times w[j].

    `torch.nn.functional.grouped_mm` takes no float64, and only whole 16-byte units. Other inputs go through one matmul
    per expert, which has to read the counts: one more sync per matmul. PyTorch itself does the same on a GPU, except in
    bfloat16 on Hopper and Blackwell. `grouped_mm` refuses a gradient with zero strides, such as that of `.sum()`.
    """
    fits = fits_grouped_mm(x_RD, w_eDF)
    if is_captured() and not (fits and x_RD.dtype == torch.bfloat16):
        return torch.ops.moe_parity.grouped_matmul(x_RD, w_eDF, counts_e)  # operators.py
    if fits:
        return grouped_mm(x_RD.contiguous(), w_eDF, offs=group_ends(counts_e))
    rows = x_RD.split(counts_e.tolist())
    return torch.cat([x @ w for x, w in zip(rows, w_eDF.unbind(), strict=True)])


def grouped_linear(
    x_RD: Float[Tensor, "R D"],
    w_eDF: Float[Tensor, "e D F"],
    counts_e: Integer[Tensor, " e"],
    b_eF: Float[Tensor, "e F"] | None,
) -> Float[Tensor, "R F"]:
    """Rows of expert j times w[j], plus b[j] where there are biases."""
    y_RF = grouped_matmul(x_RD, w_eDF, counts_e)
    return y_RF if b_eF is None else add_bias(y_RF, b_eF, counts_e)


def add_bias(
    y_RF: Float[Tensor, "R F"], b_eF: Float[Tensor, "e F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "R F"]:
    """Each row plus its expert's bias.

    The bias of each row is a product with ones and zeros, whose gradient sums an expert's rows: no scatter-add.
    """
    return y_RF + rows_of_experts(counts_e, y_RF.shape[0]).to(b_eF.dtype) @ b_eF


def rows_of_experts(counts_e: Integer[Tensor, " e"], n_rows: int) -> Bool[Tensor, "R e"]:
    """Which rows are each expert's."""
    row_R1 = torch.arange(n_rows, device=counts_e.device)[:, None]
    end_e = counts_e.cumsum(dim=0)
    return (row_R1 >= end_e - counts_e) & (row_R1 < end_e)


def fits_grouped_mm(x: Tensor, w: Tensor) -> bool:
    """Whether `grouped_mm` takes contiguous x and w: not float64, and rows, w's columns and w in 16-byte units."""
    row_stride, column_stride = w.stride()[-2:]
    units = (x.shape[-1], w.shape[-1], max(row_stride, column_stride))
    return (
        x.dtype != torch.float64
        and min(row_stride, column_stride) == 1
        and all(n * x.element_size() % 16 == 0 for n in units)
        and (is_captured() or w.data_ptr() % 16 == 0)
    )


def group_ends(counts_e: Integer[Tensor, " e"]) -> Integer[Tensor, " e"]:
    """Where each expert's rows end: the offsets that `grouped_mm` takes."""
    return counts_e.cumsum(dim=0).to(torch.int32)
