"""Custom operators, opaque to a compiler, each with a shape that it knows and a gradient."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.nn.functional import grouped_mm

from torch_impl.matmul import fits_grouped_mm, group_ends, grouped_matmul

# The uneven all-to-all is an operator so that the splits need not become integers in the compiler's graph.


def exchange_rows(x: Tensor, send_P: Tensor, receive_P: Tensor, n_received: int, group_name: str) -> Tensor:
    """Send send_P[p] rows to each rank p, and receive receive_P[p] rows from it.

    Backward is the same exchange with the splits swapped.
    """
    return _ExchangeRows.apply(x, send_P, receive_P, n_received, group_name)  # type: ignore[no-any-return]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send_P, receive_P, n_received, group_name):
        ctx.save_for_backward(send_P, receive_P)
        ctx.n_sent, ctx.group_name = x.shape[0], group_name
        return torch.ops.moe_parity.exchange_rows.default(x, send_P, receive_P, n_received, group_name)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        send_P, receive_P = ctx.saved_tensors
        return _ExchangeRows.apply(dy, receive_P, send_P, ctx.n_sent, ctx.group_name), None, None, None, None


torch.library.define(
    "moe_parity::exchange_rows",
    "(Tensor x, Tensor send_P, Tensor receive_P, SymInt n_received, str group_name) -> Tensor",
)


@torch.library.impl("moe_parity::exchange_rows", "default")
def _exchange_rows(x: Tensor, send_P: Tensor, receive_P: Tensor, n_received: int, group_name: str) -> Tensor:
    y = x.new_empty(n_received, x.shape[1])
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    dist.all_to_all_single(y, x.contiguous(), receive_P.tolist(), send_P.tolist(), group=group)
    return y


@torch.library.register_fake("moe_parity::exchange_rows")
def _(x, _send_P, _receive_P, n_received, _group_name):
    return x.new_empty(n_received, x.shape[1])


# The grouped matmul is an operator because a compiler knows the shapes of `grouped_mm` for bfloat16 only (PyTorch 2.11
# and 2.13). With one matmul per expert it would need a symbol for each expert.


@torch.library.custom_op("moe_parity::grouped_matmul", mutates_args=())
def _grouped_matmul(x_RD: Tensor, w_eDF: Tensor, counts_e: Tensor) -> Tensor:
    return grouped_matmul(x_RD, w_eDF, counts_e)


@_grouped_matmul.register_fake
def _(x_RD, w_eDF, _counts_e):
    return x_RD.new_empty(x_RD.shape[0], w_eDF.shape[2])


@torch.library.custom_op("moe_parity::weight_gradient", mutates_args=())
def _weight_gradient(x_RD: Tensor, dy_RF: Tensor, counts_e: Tensor) -> Tensor:
    """For each expert, its rows of x, transposed, times its rows of dy."""
    if fits_grouped_mm(x_RD, dy_RF):
        return grouped_mm(x_RD.mT, dy_RF, offs=group_ends(counts_e))
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
