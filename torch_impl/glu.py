"""The gated activation, in plain PyTorch or through kernels where they apply."""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import silu

from torch_impl import kernels

if TYPE_CHECKING:  # that module imports this one
    import torch_impl.experts


def glu(
    gate_MF: Float[Tensor, "*M F"] | None,
    up_MF: Float[Tensor, "*M F"],
    experts: "torch_impl.experts.Experts",
    n_rows: Integer[Tensor, ""] | None = None,
) -> Float[Tensor, "*M F"]:
    """activation(gate) * (up + up_offset), both clamped first; activation(up) without a gate. In float32, rounded once.

    silu        g * sigmoid(g): SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")
    gelu        g * Phi(g), of the normal distribution (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units")
    gelu_tanh   g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 * g**3))): GEGLU as Gemma computes it
    quick_gelu  g * sigmoid(1.702 * g): gpt-oss, with a clamp at 7 and up + 1
    relu2       relu(g)**2: Nemotron-H, without a gate

    Rows past the first `n_rows` come out unspecified; by default all rows count.
    """
    if gate_MF is not None and experts == ("silu", None, 0) and kernels.use_swiglu_kernels(gate_MF):
        return _SwiGLU.apply(gate_MF, up_MF, n_rows)  # type: ignore[no-any-return]
    activated, dtype = ACTIVATIONS[experts.activation], up_MF.dtype
    up = up_MF.to(torch.promote_types(dtype, torch.float32))
    if gate_MF is None:
        return activated(up).to(dtype)
    gate = gate_MF.to(up.dtype)
    if experts.clamp is not None:
        gate, up = gate.clamp(max=experts.clamp), up.clamp(-experts.clamp, experts.clamp)
    return (activated(gate) * (up + experts.up_offset)).to(dtype)


def gelu_tanh(gate: Float[Tensor, "*M F"]) -> Float[Tensor, "*M F"]:
    """gelu by its tanh approximation, with the tanh's argument computed from a gate clamped to +-10.

    Past +-10 the tanh is +-1 and its slope 0. Without the clamp the cube would overflow there and make the slope NaN.
    """
    near = gate.clamp(-10, 10)
    return gate * ((1 + torch.tanh(math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))) / 2)


ACTIVATIONS = {
    "silu": silu,
    "gelu": lambda gate: gate * torch.special.ndtr(gate),  # PyTorch's own is infinite from 1.7e38 on some CPUs
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda gate: gate * torch.sigmoid(1.702 * gate),
    "relu2": lambda gate: torch.relu(gate) ** 2,
}


class _SwiGLU(torch.autograd.Function):
    """SwiGLU through kernels, which record no graph. Nothing is kept in float32: backward computes silu again."""

    @staticmethod
    def forward(ctx, gate_MF, up_MF, n_rows):
        ctx.save_for_backward(gate_MF, up_MF, n_rows)
        return kernels.swiglu(gate_MF, up_MF, n_rows)

    @staticmethod
    def backward(ctx, dhidden_MF):  # type: ignore[override]
        gate_MF, up_MF, n_rows = ctx.saved_tensors
        if kernels.use_kernels(dhidden_MF):
            return *kernels.swiglu_backward(dhidden_MF, gate_MF, up_MF, n_rows), None
        gate, up, dhidden = gate_MF.float(), up_MF.float(), dhidden_MF.float()
        sigmoid = torch.sigmoid(gate)
        dgate_MF = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        return dgate_MF.to(gate_MF.dtype), (dhidden * gate * sigmoid).to(up_MF.dtype), None
