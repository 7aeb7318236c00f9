"""Blocks of Hugging Face's transformers: one function runs them all, as their parameters have the usual names.

They know no ranks: each is given all experts and runs on a rank's tokens. What a case does not have is switched off:
selection biases and shared experts are zero, and all experts are one group.
"""

from importlib import import_module

import torch
import transformers.modeling_utils  # noqa: F401  # pyright: ignore[reportMissingImports]  once, before ranks are forked

from parity import Unsupported, backend

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def run(path, x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, *, router_dtype=None, **config):
    """The output of a block, which `mixtral:Mixtral:SparseMoeBlock` names, with our weights in place of its own."""
    package, model, suffix = path.split(":")
    its = import_module(f"transformers.models.{package}.modeling_{package}")
    sizes = {"hidden_size": case.width, "intermediate_size": case.hidden, "num_experts_per_tok": case.top_k}
    made = getattr(its, f"{model}Config")(**sizes, hidden_act=ACTIVATIONS[case.activation], **config)
    made._experts_implementation = "eager"
    with torch.device("meta"):  # its own weights are never made
        block = getattr(its, model + suffix)(made).eval()
    weights = {name: torch.zeros(a.shape, dtype=x_TD.dtype) for name, a in block.state_dict().items()}
    gate = "gate.weight" if "gate.weight" in weights else "router.weight"
    weights[gate] = router_DE.T.to(router_dtype or x_TD.dtype)
    weights["experts.gate_up_proj"] = torch.cat([w_gate_EDF, w_up_EDF], 2).mT
    weights["experts.down_proj"] = w_down_EFD.mT
    out = torch.func.functional_call(block, weights, (x_TD[None],))
    return (out[0] if isinstance(out, tuple) else out)[0]


def only(case, *, score_function, renormalize=None, scaled=False):
    """Raises Unsupported in a case that has other scores than these; None: either."""
    if case.score_function != score_function:
        raise Unsupported(f"{score_function} only")
    if renormalize is not None and case.renormalize != renormalize:
        raise Unsupported("always renormalises" if renormalize else "never renormalises")
    if case.scale != 1 and not scaled:
        raise Unsupported("no scale")


def run_deepseek_v3(path, x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """The output of a block that is configured as DeepSeek-V3's is."""
    only(case, score_function="sigmoid", scaled=True)
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    config = {"moe_intermediate_size": case.hidden, "n_routed_experts": case.experts, "n_group": 1, "topk_group": 1}
    config |= {"norm_topk_prob": case.renormalize, "routed_scaling_factor": case.scale}
    return run(path, *ours, router_dtype=torch.float32, **config)


@backend(framework="torch")
def mixtral(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Mixtral."""
    only(case, score_function="softmax", renormalize=True)
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run("mixtral:Mixtral:SparseMoeBlock", *ours, num_local_experts=case.experts)


@backend(framework="torch")
def minimax(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """MiniMax-Text-01."""
    only(case, score_function="softmax", renormalize=True)
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run("minimax:MiniMax:SparseMoeBlock", *ours, num_local_experts=case.experts)


@backend(framework="torch")
def granitemoe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Granite 3: softmax over the chosen, which is the same as to renormalise."""
    only(case, score_function="softmax", renormalize=True)
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run("granitemoe:GraniteMoe:MoE", *ours, num_local_experts=case.experts)


@backend(framework="torch")
def jamba(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Jamba."""
    only(case, score_function="softmax", renormalize=False)
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run("jamba:Jamba:SparseMoeBlock", *ours, num_experts=case.experts)


@backend(framework="torch")
def olmoe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """OLMoE."""
    only(case, score_function="softmax")
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    config = {"num_experts": case.experts, "norm_topk_prob": case.renormalize}
    return run("olmoe:Olmoe:SparseMoeBlock", *ours, **config)


@backend(framework="torch")
def flex_olmo(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """FlexOlmo."""
    only(case, score_function="softmax")
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    config = {"num_experts": case.experts, "norm_topk_prob": case.renormalize}
    return run("flex_olmo:FlexOlmo:SparseMoeBlock", *ours, **config)


@backend(framework="torch")
def qwen3_moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Qwen3-MoE."""
    only(case, score_function="softmax")
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    config = {"moe_intermediate_size": case.hidden, "num_experts": case.experts, "norm_topk_prob": case.renormalize}
    return run("qwen3_moe:Qwen3Moe:SparseMoeBlock", *ours, **config)


@backend(framework="torch")
def deepseek_v3(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """DeepSeek-V3, with its router in float32."""
    return run_deepseek_v3("deepseek_v3:DeepseekV3:MoE", x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)


@backend(framework="torch")
def glm4_moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """GLM-4.5, with its router in float32."""
    return run_deepseek_v3("glm4_moe:Glm4Moe:MoE", x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)


@backend(framework="torch")
def lfm2_moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """LFM2-MoE."""
    only(case, score_function="sigmoid", scaled=True)
    if case.activation != "silu":
        raise Unsupported("silu only")
    ours = (x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    config = {"moe_intermediate_size": case.hidden, "num_experts": case.experts}
    config |= {"norm_topk_prob": case.renormalize, "routed_scaling_factor": case.scale}
    return run("lfm2_moe:Lfm2Moe:SparseMoeBlock", *ours, **config)
