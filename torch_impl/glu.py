"""The gated activation, plain, or through kernels where they serve."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from torch_impl import kernels


def glu(gate_MF: Float[Tensor, "*M F"], up_MF: Float[Tensor, "*M F"], activation: str) -> Float[Tensor, "*M F"]:
    """activation(gate) * up in float32, rounded once.

    silu       g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu_tanh  g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it; past +-10 the tanh is
               +-1 and its slope 0, where the cube would overflow and make the slope NaN
    """
    if activation == "silu" and kernels.use_swiglu_kernels(gate_MF):
        return _SwiGLU.apply(gate_MF, up_MF)  # type: ignore[no-any-return]
    wide = torch.promote_types(gate_MF.dtype, torch.float32)
    gate, up = gate_MF.to(wide), up_MF.to(wide)
    active = silu(gate) if activation == "silu" else gate * gelu_share(gate.clip(-10, 10))
    return (active * up).to(gate_MF.dtype)


def gelu_share(gate: Float[Tensor, "*M F"]) -> Float[Tensor, "*M F"]:
    """The share of a gate that gelu_tanh lets through."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2


class _SwiGLU(torch.autograd.Function):
    """Through kernels, which leave no graph. Nothing is kept in float32: backward computes silu again."""

    @staticmethod
    def forward(ctx, gate_MF, up_MF):
        ctx.save_for_backward(gate_MF, up_MF)
        return kernels.swiglu(gate_MF, up_MF)

    @staticmethod
    def backward(ctx, dhidden_MF):  # type: ignore[override]
        gate_MF, up_MF = ctx.saved_tensors
        if kernels.use_kernels(dhidden_MF):
            return kernels.swiglu_backward(dhidden_MF, gate_MF, up_MF)
        gate, up, dhidden = gate_MF.float(), up_MF.float(), dhidden_MF.float()
        sigmoid = torch.sigmoid(gate)
        dgate_MF = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        return dgate_MF.to(gate_MF.dtype), (dhidden * gate * sigmoid).to(up_MF.dtype)
