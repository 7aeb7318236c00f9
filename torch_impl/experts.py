"""Stage 6: every local expert's gated layer on its own rows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from torch_impl import kernels
from torch_impl.checks import is_captured


class Experts(NamedTuple):
    """How an expert computes."""

    activation: str = "silu"  # of the gate; or "gelu_tanh"


def apply_experts(
    x_RD: Float[Tensor, "R D"],
    counts_e: Integer[Tensor, " e"],
    w_gate_eDF: Float[Tensor, "e D F"],
    w_up_eDF: Float[Tensor, "e D F"],
    w_down_eFD: Float[Tensor, "e F D"],
    experts: Experts = Experts(),
) -> Float[Tensor, "R D"]:
    """y = (activation(x @ w_gate) * (x @ w_up)) @ w_down, each row by its own expert.

    The first counts_e[0] rows are expert 0's, and so on, to the last row; of rows that the counts leave out nothing is
    known. Every matmul accumulates in float32 and rounds once to x's dtype.
    """
    gate_RF = grouped_matmul(x_RD, w_gate_eDF, counts_e)
    up_RF = grouped_matmul(x_RD, w_up_eDF, counts_e)
    return grouped_matmul(glu(gate_RF, up_RF, experts.activation), w_down_eFD, counts_e)


def glu(gate_RF: Float[Tensor, "*R F"], up_RF: Float[Tensor, "*R F"], activation: str) -> Float[Tensor, "*R F"]:
    """activation(gate) * up in float32, rounded once.

    silu       g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu_tanh  g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it
    """
    if activation == "silu" and kernels.use_swiglu_kernels(gate_RF):
        return _SwiGLU.apply(gate_RF, up_RF)  # type: ignore[no-any-return]
    wide = torch.promote_types(gate_RF.dtype, torch.float32)
    gate = gate_RF.to(wide)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (active * up_RF.to(wide)).to(gate_RF.dtype)


class _SwiGLU(torch.autograd.Function):
    """Through kernels, which leave no graph. Nothing is kept in float32: backward computes silu again."""

    @staticmethod
    def forward(ctx, gate_RF, up_RF):
        ctx.save_for_backward(gate_RF, up_RF)
        return kernels.swiglu(gate_RF, up_RF)

    @staticmethod
    def backward(ctx, dhidden_RF):  # type: ignore[override]
        gate_RF, up_RF = ctx.saved_tensors
        if kernels.use_kernels(dhidden_RF):
            return kernels.swiglu_backward(dhidden_RF, gate_RF, up_RF)
        gate, up, dhidden = gate_RF.float(), up_RF.float(), dhidden_RF.float()
        sigmoid = torch.sigmoid(gate)
        dgate_RF = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        return dgate_RF.to(gate_RF.dtype), (dhidden * gate * sigmoid).to(up_RF.dtype)


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
        return _grouped_matmul(x_RD, w_eDF, counts_e)
    if fits:
        return F.grouped_mm(x_RD.contiguous(), w_eDF, offs=group_ends(counts_e))
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


# For a compiler only. It knows the shapes of `grouped_mm` for bfloat16 and no other dtype (PyTorch 2.11 and 2.13), and
# of one matmul per expert it would see a symbol each. So there the product is an operator that it does not look into.


@torch.library.custom_op("moe_parity::grouped_matmul", mutates_args=())
def _grouped_matmul(x_RD: Tensor, w_eDF: Tensor, counts_e: Tensor) -> Tensor:
    return grouped_matmul(x_RD, w_eDF, counts_e)


@_grouped_matmul.register_fake
def _(x_RD, w_eDF, _counts_e):
    return x_RD.new_empty(x_RD.shape[0], w_eDF.shape[2])


@torch.library.custom_op("moe_parity::weight_gradient", mutates_args=())
def _weight_gradient(x_RD: Tensor, dy_RF: Tensor, counts_e: Tensor) -> Tensor:
    """Rows of expert j of x, transposed, times those of dy."""
    if fits_grouped_mm(x_RD, dy_RF):
        return F.grouped_mm(x_RD.mT, dy_RF, offs=group_ends(counts_e))
    rows = zip(*(a.split(counts_e.tolist()) for a in (x_RD, dy_RF)), strict=True)
    return torch.stack([x.mT @ dy for x, dy in rows])


@_weight_gradient.register_fake
def _(x_RD, dy_RF, counts_e):
    return x_RD.new_empty(counts_e.shape[0], x_RD.shape[1], dy_RF.shape[1])


def _save_inputs(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_RF):
    x_RD, w_eDF, counts_e = ctx.saved_tensors
    dx_RD = _grouped_matmul(dy_RF, w_eDF.mT, counts_e) if ctx.needs_input_grad[0] else None
    return dx_RD, _weight_gradient(x_RD, dy_RF, counts_e) if ctx.needs_input_grad[1] else None, None


_grouped_matmul.register_autograd(_backward, setup_context=_save_inputs)
