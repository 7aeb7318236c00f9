"""Blocks of Hugging Face's transformers: one function runs them all, as their parameters have the usual names.

The blocks know no ranks: each gets all experts and runs on one rank's tokens. Options that a case lacks are switched
off: selection biases, biases and shared experts are zero, scales of experts are one.
"""

import math
from importlib import import_module

import torch
import transformers.modeling_utils  # noqa: F401  # pyright: ignore[reportMissingImports]  once, before ranks are forked
from torch import nn

from parity import Unsupported, backend, only

ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu2": "relu2",
}  # fmt: skip


def run(path, case, x_TD, w, layout="E (2 F) D", /, **config):
    """The output of a block, which `mixtral:Mixtral:SparseMoeBlock` names, with our weights in place of its own.

    `layout` is how the block keeps gate and up: E (2 F) D and E D (2 F) concatenated, E D (F 2) interleaved.
    """
    package, model, suffix = path.split(":")
    its = import_module(f"transformers.models.{package}.modeling_{package}")
    made = getattr(its, f"{model}Config")(**configuration(case), **config)
    made._experts_implementation = "eager"
    with torch.device("meta"):  # its own weights are never allocated
        block = (getattr(its, model + suffix) if suffix else Gemma4)(made).eval()
    ours = {}
    for name, its_own in block.state_dict().items():
        a = stored(name, w, layout)
        if a is None:
            a = torch.full(its_own.shape, float(name.endswith("scale")), dtype=x_TD.dtype)
        elif name.startswith(("gate.", "router.")):  # in the wider of its own dtype and that of the tokens
            a = a.to(torch.promote_types(a.dtype, x_TD.dtype))
        ours[name] = a
    out = torch.func.functional_call(block, ours, (x_TD[None],))
    return (out[0] if isinstance(out, tuple) else out).reshape(x_TD.shape)


def configuration(case):
    """The settings of a case, by every name that a configuration uses for them."""
    experts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), case.experts)
    hidden = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), case.hidden)
    chosen = dict.fromkeys(("num_experts_per_tok", "top_k_experts"), case.top_k)
    activation = dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), ACTIVATIONS[case.activation])
    router = {"n_group": case.groups, "topk_group": case.top_groups, "routed_scaling_factor": case.scale}
    return {"hidden_size": case.width, "norm_topk_prob": case.renormalize, **experts, **hidden, **chosen, **activation,
            **router}  # fmt: skip


def weights(router, w_gate, w_up, w_down, **more):
    """Our weights, by name."""
    return {"router": router, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, **more}


def stored(name, w, layout):
    """Our weight that a block keeps under this name; None if the case has none."""

    def turned(a):
        return a if a is None or layout.startswith("E D") else a.mT

    def paired(gate, up):
        if gate is None:
            return None
        return torch.stack([gate, up], -1).flatten(-2) if "(F 2)" in layout else torch.cat([gate, up], -1)

    match name.removesuffix(".weight").replace("shared_experts", "shared_expert").split("."):
        case ["gate" | "router"] | ["router", "proj"]:
            return w["router"].T
        case ["router", "bias"]:
            return w.get("router_bias")
        case [*_, "e_score_correction_bias" | "expert_bias"]:
            return w.get("selection_bias")
        case ["router", "per_expert_scale"]:
            return w.get("expert_scale")
        case ["experts", "gate_up_proj"]:
            return turned(paired(w.get("w_gate"), w.get("w_up")))
        case ["experts", "gate_up_proj_bias"]:
            return paired(w.get("b_gate"), w.get("b_up"))
        case ["experts", "up_proj"]:
            return turned(w.get("w_up"))
        case ["experts", "down_proj"]:
            return turned(w.get("w_down"))
        case ["experts", "down_proj_bias"]:
            return w.get("b_down")
        case ["shared_expert", part]:
            its = w.get(f"shared_w_{part.removesuffix('_proj')}")
            return None if its is None else its.T
        case ["shared_expert_gate"]:
            its = w.get("shared_score")
            return None if its is None else its[None]


class Gemma4(nn.Module):
    """A layer of Gemma 4 from behind the norms on: router and experts on the same tokens.

    In the model each has a norm of its own. The router's has no weights; the learned scale behind it is one here, and
    so is the root of the width that it is multiplied by: both are the same as other router weights.
    """

    def __init__(self, config):
        super().__init__()
        its = import_module("transformers.models.gemma4.modeling_gemma4")
        self.router, self.experts = its.Gemma4TextRouter(config), its.Gemma4TextExperts(config)
        self.router.norm, self.router.scalar_root_size = nn.Identity(), 1.0

    def forward(self, x_1TD):
        """The output, [T, D]."""
        _, score_TK, expert_id_TK = self.router(x_1TD[0])
        return self.experts(x_1TD[0], expert_id_TK, score_TK)


# Epsilon of layers that add none to the sum of scores: 1e-20 changes no sum of softmax scores.
NOTHING = (0.0, 1e-20)


def as_tokens(case):
    """`router_dtype` of a router with logits in the dtype of the tokens, and scores computed from them in float32."""
    return "float32" if case.dtype == "float64" else "activations"


def all_as_tokens(case):
    """`router_dtype` of a router with logits and scores in the dtype of the tokens."""
    return ("wide", "activations") if case.dtype == "float64" else "activations"


def in_float32(case):
    """`router_dtype` of a router in float32, whatever the dtype of the tokens."""
    return "float32" if case.dtype == "float64" else ("wide", "float32")


def only_softmax(case, **has):
    """Raise Unsupported unless the case scores by a softmax in float32."""
    only(case, "activation", epsilon=NOTHING, router_dtype=as_tokens(case), **has)


def only_deepseek(case):
    """Raise Unsupported unless the case scores as DeepSeek-V3 does."""
    only(case, "activation", "scale", "groups", "top_groups",
         score_function="sigmoid", renormalize=(False, True), router_dtype=in_float32(case))  # fmt: skip


def shared_experts(case):
    """Settings of the shared expert for a configuration that counts shared experts of the size of the others.

    Raises Unsupported if the count is not a whole number.
    """
    if case.shared_hidden % case.hidden:
        raise Unsupported("its shared expert is a multiple of the others in width")
    return {"n_shared_experts": case.shared_hidden // case.hidden or 1}


def weighed_shared_expert(case):
    """Settings of a shared expert with a score. Raises Unsupported if the case has a shared expert without one."""
    if case.shared_hidden and not case.shared_score:
        raise Unsupported("its shared expert has a score")
    return {"shared_expert_intermediate_size": case.shared_hidden or 1}


def run_qwen(path, case, x_TD, w):
    """The output of a block of Qwen's with a shared expert, which has a score."""
    only_softmax(case, renormalize=(False, True), cast_scores=True)
    return run(path, case, x_TD, w, **weighed_shared_expert(case))


def run_deepseek(path, case, x_TD, w):
    """The output of a block that routes as DeepSeek-V3 does, and has shared experts of the size of the others."""
    only_deepseek(case)
    return run(path, case, x_TD, w, **shared_experts(case))


@backend(framework="torch")
def mixtral(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Mixtral."""
    only_softmax(case, renormalize=True)
    return run("mixtral:Mixtral:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def minimax(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """MiniMax-Text-01."""
    only_softmax(case, renormalize=True)
    return run("minimax:MiniMax:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def granitemoe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Granite 3: softmax over the chosen, which is the same as to renormalise."""
    of_chosen = case.score_function == "softmax_of_chosen"
    only_softmax(case, score_function=("softmax_of_chosen", "softmax"), renormalize=not of_chosen, cast_scores=True)
    return run("granitemoe:GraniteMoe:MoE", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def jamba(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Jamba."""
    only_softmax(case, renormalize=False, cast_scores=True)
    return run("jamba:Jamba:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def olmoe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """OLMoE."""
    only_softmax(case, renormalize=(False, True), cast_scores=True)
    return run("olmoe:Olmoe:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def flex_olmo(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """FlexOlmo."""
    only_softmax(case, renormalize=(False, True), cast_scores=True)
    return run("flex_olmo:FlexOlmo:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def qwen3_moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Qwen3-MoE."""
    only_softmax(case, renormalize=(False, True), cast_scores=True)
    return run("qwen3_moe:Qwen3Moe:SparseMoeBlock", case, x_TD, weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD))


@backend(framework="torch")
def qwen2_moe(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None, shared_score_D=None,
):  # fmt: skip
    """Qwen2-MoE, whose shared expert has a score."""
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD, shared_score_D)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, **shared)
    return run_qwen("qwen2_moe:Qwen2Moe:SparseMoeBlock", case, x_TD, w)


@backend(framework="torch")
def qwen3_next(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None, shared_score_D=None,
):  # fmt: skip
    """Qwen3-Next, whose shared expert has a score."""
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD, shared_score_D)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, **shared)
    return run_qwen("qwen3_next:Qwen3Next:SparseMoeBlock", case, x_TD, w)


def of_shared(gate, up, down, score=None):
    """What belongs to a shared expert, by name."""
    return {"shared_w_gate": gate, "shared_w_up": up, "shared_w_down": down, "shared_score": score}


@backend(framework="torch")
def deepseek_v3(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None,
):  # fmt: skip
    """DeepSeek-V3, and Kimi K2, with the router in float32."""
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, selection_bias=selection_bias_E, **shared)
    return run_deepseek("deepseek_v3:DeepseekV3:MoE", case, x_TD, w)


@backend(framework="torch")
def glm4_moe(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None,
):  # fmt: skip
    """GLM-4.5, with its router in float32."""
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, selection_bias=selection_bias_E, **shared)
    return run_deepseek("glm4_moe:Glm4Moe:MoE", case, x_TD, w)


@backend(framework="torch")
def nemotron_h(
    x_TD, router_DE, w_up_EDF, w_down_EFD, case, selection_bias_E=None, shared_w_up_DH=None, shared_w_down_HD=None
):
    """Nemotron-H, whose experts have no gate, with its router in float32."""
    if case.gated:
        raise Unsupported("its experts have no gate")
    only_deepseek(case)
    shared = of_shared(None, shared_w_up_DH, shared_w_down_HD)
    w = weights(router_DE, None, w_up_EDF, w_down_EFD, selection_bias=selection_bias_E, **shared)
    size = {"moe_shared_expert_intermediate_size": case.shared_hidden or 1}
    return run("nemotron_h:NemotronH:MoE", case, x_TD, w, **size)


@backend(framework="torch")
def deepseek_v2(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None,
):  # fmt: skip
    """DeepSeek-V2, with its router in float32; it never renormalises."""
    groups = {"group_score": "max", "outside_groups": "zero"}
    only(case, "activation", "scale", "groups", "top_groups", router_dtype=in_float32(case), **groups)
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, **shared)
    config = {"topk_method": "group_limited_greedy" if case.groups > 1 else "greedy", "num_attention_heads": 1}
    return run("deepseek_v2:DeepseekV2:Moe", case, x_TD, w, **config, **shared_experts(case))


@backend(framework="torch")
def minimax_m2(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    """MiniMax-M2: its logits are in the dtype that its router's weights have."""
    dtypes = "float32" if case.dtype == "float64" else ("wide", "float32", "activations")
    only(case, "activation", score_function="sigmoid", renormalize=True, epsilon=0.0, router_dtype=dtypes)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, selection_bias=selection_bias_E)
    return run("minimax_m2:MiniMaxM2:SparseMoeBlock", case, x_TD, w)


@backend(framework="torch")
def lfm2_moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    """LFM2-MoE."""
    only(case, "scale", score_function="sigmoid", renormalize=(False, True), epsilon=1e-6, cast_scores=True,
         router_dtype=all_as_tokens(case))  # fmt: skip
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, selection_bias=selection_bias_E)
    return run("lfm2_moe:Lfm2Moe:SparseMoeBlock", case, x_TD, w)


@backend(framework="torch")
def gpt_oss(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, router_bias_E=None, b_gate_EF=None, b_up_EF=None,
    b_down_ED=None,
):  # fmt: skip
    """gpt-oss, whose gate and up stand by turns."""
    only(case, "clamp", score_function="softmax_of_chosen", cast_scores=True, router_dtype=all_as_tokens(case),
         activation="quick_gelu", up_offset=1.0)  # fmt: skip
    biases = {"router_bias": router_bias_E, "b_gate": b_gate_EF, "b_up": b_up_EF, "b_down": b_down_ED}
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, **biases)
    limit = math.inf if case.clamp is None else case.clamp
    return run("gpt_oss:GptOss:MLP", case, x_TD, w, "E D (F 2)", swiglu_limit=limit)


@backend(framework="torch")
def llama4(
    x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case,
    shared_w_gate_DH=None, shared_w_up_DH=None, shared_w_down_HD=None,
):  # fmt: skip
    """Llama 4, which weighs what it gives to an expert; its shared expert is as wide as the others."""
    only(case, "activation", score_function="sigmoid", score_on="input", cast_scores=True, router_dtype=as_tokens(case))
    if case.shared_hidden not in (0, case.hidden):
        raise Unsupported("its shared expert is as wide as the others")
    shared = of_shared(shared_w_gate_DH, shared_w_up_DH, shared_w_down_HD)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, **shared)
    return run("llama4:Llama4Text:Moe", case, x_TD, w, "E D (2 F)")


@backend(framework="torch")
def gemma4(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, expert_scale_E=None):
    """Gemma 4, from behind its norms on, of which router and experts have one each."""
    only_softmax(case, renormalize=True)
    w = weights(router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, expert_scale=expert_scale_E)
    return run("gemma4:Gemma4Text:", case, x_TD, w)
