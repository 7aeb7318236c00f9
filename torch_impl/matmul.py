"""Matmuls of rows grouped by expert, each with its own expert's weights."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import grouped_mm

from torch_impl.checks import is_captured


def grouped_matmul(
    x_RD: Float[Tensor, "R D"], w_eDF: Float[Tensor, "e D F"], counts_e: Integer[Tensor, " e"]
) -> Float[Tensor, "R F"]:
    """Rows of expert j times w[j].

    `torch.nn.functional.grouped_mm` takes no float64, and only whole 16-byte units: what it does not take goes through
    one matmul per expert, which has to read the counts. PyTorch itself does the same on a GPU, except for bfloat16 on
    Hopper and Blackwell: one more sync per matmul. A gradient with zero strides, that of `.sum()`, it refuses.
    """
    fits = fits_grouped_mm(x_RD, w_eDF)
    if is_captured() and not (fits and x_RD.dtype == torch.bfloat16):
        return torch.ops.moe_parity.grouped_matmul(x_RD, w_eDF, counts_e)  # operators.py
    if fits:
        return grouped_mm(x_RD.contiguous(), w_eDF, offs=group_ends(counts_e))
    rows = x_RD.split(counts_e.tolist())
    return torch.cat([x @ w for x, w in zip(rows, w_eDF.unbind(), strict=True)])


def fits_grouped_mm(x: Tensor, w: Tensor) -> bool:
    """Whether `grouped_mm` takes them, x made contiguous: not float64, and rows, w's columns and w in 16-byte units."""
    row_stride, column_stride = w.stride()[-2:]
    units = (x.shape[-1], w.shape[-1], max(row_stride, column_stride))
    return (
        x.dtype != torch.float64
        and min(row_stride, column_stride) == 1
        and all(n * x.element_size() % 16 == 0 for n in units)
        and (is_captured() or w.data_ptr() % 16 == 0)
    )


def group_ends(counts_e: Integer[Tensor, " e"]) -> Integer[Tensor, " e"]:
    """Where each expert's rows end, as `grouped_mm` wants to know."""
    return counts_e.cumsum(dim=0).to(torch.int32)
