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

    bfloat16 is open to the compiler, which knows `torch.nn.functional.grouped_mm` and would refuse another dtype there.
    """
    if x_RD.dtype == torch.bfloat16 and _fits_grouped_mm(x_RD, w_eDF):
        return F.grouped_mm(x_RD, w_eDF, offs=group_ends(counts_e))
    return _rows_times_weights(x_RD, w_eDF, counts_e)


def group_ends(counts_e: Integer[Tensor, " e"]) -> Integer[Tensor, " e"]:
    """Where each expert's rows end, as `grouped_mm` wants to know."""
    return counts_e.cumsum(dim=0).to(torch.int32)


def _fits_grouped_mm(a: Tensor, b: Tensor) -> bool:
    """Whether `grouped_mm` takes these: not float64, and only rows of whole 16-byte units, either way round.

    What it does not take goes through one matmul per expert, which has to read the counts: on a GPU, one more sync.
    """
    widths = {a.shape[-1], *b.shape[-2:]} if b.ndim == 3 else {a.shape[-1], b.shape[-1]}
    return a.dtype != torch.float64 and all(n * a.element_size() % 16 == 0 for n in widths)


@torch.library.custom_op("moe_parity::rows_times_weights", mutates_args=())
def _rows_times_weights(x_RD: Tensor, w_eDF: Tensor, counts_e: Tensor) -> Tensor:
    """`grouped_matmul`, closed to the compiler."""
    if _fits_grouped_mm(x_RD, w_eDF):
        return F.grouped_mm(x_RD, w_eDF, offs=group_ends(counts_e))
    rows = x_RD.split(counts_e.tolist())
    return torch.cat([x @ w for x, w in zip(rows, w_eDF.unbind(), strict=True)])


@torch.library.custom_op("moe_parity::weight_gradient", mutates_args=())
def _weight_gradient(x_RD: Tensor, dy_RF: Tensor, counts_e: Tensor) -> Tensor:
    """Rows of expert j of x, transposed, times those of dy."""
    if _fits_grouped_mm(x_RD, dy_RF):
        return F.grouped_mm(x_RD.mT, dy_RF, offs=group_ends(counts_e))
    rows = zip(*(a.split(counts_e.tolist()) for a in (x_RD, dy_RF)), strict=True)
    return torch.stack([x.mT @ dy for x, dy in rows])


@_rows_times_weights.register_fake
def _(x_RD, w_eDF, _counts_e):
    return x_RD.new_empty(x_RD.shape[0], w_eDF.shape[2])


@_weight_gradient.register_fake
def _(x_RD, dy_RF, counts_e):
    return x_RD.new_empty(counts_e.shape[0], x_RD.shape[1], dy_RF.shape[1])


def _save_inputs(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_RF):
    x_RD, w_eDF, counts_e = ctx.saved_tensors
    dy_RF = dy_RF.contiguous()  # an expanded gradient has strides of zero, which grouped_mm refuses
    dx_RD = _rows_times_weights(dy_RF, w_eDF.mT, counts_e) if ctx.needs_input_grad[0] else None
    return dx_RD, _weight_gradient(x_RD, dy_RF, counts_e) if ctx.needs_input_grad[1] else None, None


_rows_times_weights.register_autograd(_backward, setup_context=_save_inputs)
