"""Megatron-Core's MoELayer with expert parallelism: its all-gather dispatcher, over the ranks' process group."""

from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # pyright: ignore[reportMissingImports]
from megatron.core.transformer.transformer_config import TransformerConfig  # pyright: ignore[reportMissingImports]
from torch._C._distributed_c10d import HashStore
from torch.nn.functional import gelu, silu

from parity import Unsupported, backend, only

# Parameters of the layer: its own name (N is an expert), our name, and its axes.
STORED = {
    "router.weight": "router: E D", "router.expert_bias": "selection_bias: E",
    "experts.local_experts.N.linear_fc1.weight": "w_gate and w_up: (2 F) D",
    "experts.local_experts.N.linear_fc2.weight": "w_down: D F",
}  # fmt: skip


def gelu_tanh(x):
    """Gelu by its tanh approximation, with the signature that Megatron-Core calls."""
    return gelu(x, approximate="tanh")


@cache
def join(ranks):
    """Create Megatron-Core's own process groups, once in each process."""
    if not dist.is_initialized():  # Megatron-Core needs a process group even for one rank
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not torch.cuda.is_available():  # its router asks for the current GPU even on a CPU
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)


@backend(framework="torch", supports=lambda case: case.way != "compiled" or "it cannot be built within torch.compile")
def layer(
    x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, case,
    group, selection_bias_E=None,  # noqa: ARG001  it makes its own groups
):  # fmt: skip
    """The layer, with its router in float32 and no auxiliary loss; a sigmoid is renormalised where K > 1."""
    sigmoid = case.score_function == "sigmoid"
    if selection_bias_E is not None and not sigmoid:
        raise Unsupported("a selection bias with a sigmoid only")
    only(case, "scale", score_function=("softmax", "sigmoid"), renormalize=case.top_k > 1 if sigmoid else (False, True),
         epsilon=1e-20 if sigmoid else (0.0, 1e-20), activation=("silu", "gelu_tanh"),
         router_dtype="float32" if case.dtype == "float64" else ("wide", "float32"))  # fmt: skip
    join(case.ranks)
    config = TransformerConfig(
        num_layers=1, num_attention_heads=1, hidden_size=case.width, ffn_hidden_size=case.hidden,
        moe_ffn_hidden_size=case.hidden, num_moe_experts=case.experts, moe_router_topk=case.top_k,
        moe_router_pre_softmax=case.score_function == "softmax" and not case.renormalize,
        moe_router_score_function=case.score_function, moe_router_topk_scaling_factor=case.scale,
        moe_router_enable_expert_bias=selection_bias_E is not None,
        moe_router_dtype="fp64" if case.dtype == "float64" else "fp32", moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather", expert_model_parallel_size=case.ranks,
        gated_linear_unit=True, activation_func={"silu": silu, "gelu_tanh": gelu_tanh}[case.activation],
        bias_activation_fusion=False, add_bias_linear=False, use_cpu_initialization=True, params_dtype=x_TD.dtype,
    )  # fmt: skip
    moe = get_moe_module_spec(use_te=False, num_experts=case.experts, moe_grouped_gemm=False)(config)
    weights = {"router.weight": router_DE.T}
    weights |= {} if selection_bias_E is None else {"router.expert_bias": selection_bias_E}
    for i, (gate_DF, up_DF, down_FD) in enumerate(zip(w_gate_eDF, w_up_eDF, w_down_eFD, strict=True)):
        weights[f"experts.local_experts.{i}.linear_fc1.weight"] = torch.cat([gate_DF, up_DF], 1).T
        weights[f"experts.local_experts.{i}.linear_fc2.weight"] = down_FD.T
    return torch.func.functional_call(moe, weights, (x_TD[:, None],))[0][:, 0]
