"""Writes tiny checkpoints with transformers, one of each family, and what their first MoE layer computes.

`python tests/make_checkpoints.py`, where transformers is installed, writes those in tests/checkpoints anew. A folder
has what save_pretrained writes, and block.npz: tokens x [T, D], the block's output out, a cotangent dout, and the
gradients dx, drouter, dw_gate and so on, in float32.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"
COMMITTED = {"deepseek_v3": torch.bfloat16, "gpt_oss": torch.bfloat16, "qwen3_next": torch.float32}
TOKENS = 7

# No two sizes are the same where a family lets them differ: E 6, D 10, F 4, H 7 or 12, K 3.
SMALL: dict[str, Any] = {
    "vocab_size": 4, "hidden_size": 10, "num_hidden_layers": 2, "num_experts_per_tok": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ONE_SIZE = SMALL | {"num_local_experts": 6, "intermediate_size": 4}
TWO_SIZES = SMALL | {"num_experts": 6, "moe_intermediate_size": 4, "intermediate_size": 9}
SHARED = TWO_SIZES | {"shared_expert_intermediate_size": 7}
GROUPS = {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2}
DEEPSEEK = SMALL | GROUPS | LATENT | {"n_shared_experts": 3, "moe_intermediate_size": 4, "intermediate_size": 9}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
LINEAR = {
    "linear_key_head_dim": 2, "linear_value_head_dim": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
}  # fmt: skip
MAMBA = {
    "ssm_state_size": 2, "mamba_num_heads": 2, "mamba_head_dim": 2, "n_groups": 1, "conv_kernel": 2, "chunk_size": 4,
}  # fmt: skip
NEMOTRON = {"moe_intermediate_size": 4, "intermediate_size": 9, "moe_shared_expert_intermediate_size": 7}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": ONE_SIZE,
    "qwen2_moe": SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": TWO_SIZES | {"norm_topk_prob": True},
    "qwen3_next": SHARED | LINEAR | {"num_hidden_layers": 1},
    "olmoe": SMALL | {"num_experts": 6, "intermediate_size": 4},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "glm4_moe": DEEPSEEK | {"norm_topk_prob": False},
    "minimax_m2": ONE_SIZE,
    "gpt_oss": ONE_SIZE | {"swiglu_limit": 0.5, "num_hidden_layers": 1, "max_position_embeddings": 131072},
    "llama4": ONE_SIZE | {"num_experts_per_tok": 1, "intermediate_size_mlp": 9, "moe_layers": [1]},
    "gemma4": TWO_SIZES
    | {"top_k_experts": 3, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 4},
    "nemotron_h": SMALL | GROUPS | MAMBA | NEMOTRON,
    "lfm2_moe": TWO_SIZES | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "granitemoe": ONE_SIZE,
}


class Gemma4(nn.Module):
    """A layer of Gemma 4 from behind its norms on: router and experts on the same tokens."""

    def __init__(self, layer):
        super().__init__()
        self.router, self.experts = layer.router, layer.experts
        self.router.norm = nn.Identity()

    def forward(self, x):
        _, weights, chosen = self.router(x[0])
        return self.experts(x[0], chosen, weights)[None]


def write(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, np.ndarray]:
    """The arrays that a reader should find in it; biases that only choose are stored in float32 whatever the dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model_type = {"llama4": "llama4_text", "gemma4": "gemma4_text"}.get(family, family)
    config = AutoConfig.for_model(model_type, **FAMILIES[family])
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    block = next(filter(None, map(moe, model.model.layers)))
    with torch.no_grad():
        for name, a in [*block.named_parameters(), *block.named_buffers()]:
            a.normal_(mean="scale" in name, std=0.3)
        for a in block.parameters():
            a.copy_(a.to(dtype))
    x, dout = torch.randn(2, TOKENS, config.hidden_size)
    x.requires_grad_()
    out = block(x[None])
    out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    out.backward(dout)
    arrays = canonical(family, dict(block.named_parameters()) | dict(block.named_buffers()))
    grads = canonical(family, {name: a.grad for name, a in block.named_parameters()})
    if family == "gemma4":
        folded = (block.router.scale * config.hidden_size**-0.5)[:, None]
        arrays["router"], grads["router"] = arrays["router"] * folded, grads["router"] / folded
    known = {"x": x, "out": out, "dout": dout, "dx": x.grad} | {f"d{name}": a for name, a in grads.items()}
    arrays, known = numpy(arrays), numpy(known)
    biases = {name: a.clone() for name, a in block.named_buffers()}
    model.to(dtype)
    for name, a in biases.items():
        block.get_buffer(name).data = a
    model.save_pretrained(folder, max_shard_size="2KB" if family == "deepseek_v3" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "block.npz", allow_pickle=False, **known)
    return arrays


def numpy(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: a.detach().numpy().copy() for name, a in named.items()}


def moe(layer: Any) -> Any:
    """The MoE block of a layer, if it has one."""
    if hasattr(layer, "router"):
        return Gemma4(layer)
    blocks = (getattr(layer, name, None) for name in ("mlp", "feed_forward", "mixer", "block_sparse_moe"))
    return next((block for block in blocks if hasattr(block, "experts")), None)


def canonical(family: str, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a block, or their gradients, as a reader calls them."""
    arrays: dict[str, torch.Tensor] = {}
    for name, a in named.items():
        match name.removesuffix(".weight").replace("shared_experts", "shared_expert").split("."):
            case ["gate" | "router"] | ["router", "proj"]:
                arrays["router"] = a.T
            case ["router", "bias"]:
                arrays["router_bias"] = a
            case ["router", "per_expert_scale"]:
                arrays["expert_scale"] = a
            case ["router", "scale"]:
                pass
            case [*_, "e_score_correction_bias" | "expert_bias"]:
                arrays["selection_bias"] = a
            case ["experts", "gate_up_proj"] if family == "gpt_oss":
                arrays["w_gate"], arrays["w_up"] = a[..., ::2], a[..., 1::2]
            case ["experts", "gate_up_proj_bias"]:
                arrays["b_gate"], arrays["b_up"] = a[..., ::2], a[..., 1::2]
            case ["experts", "gate_up_proj"]:
                arrays["w_gate"], arrays["w_up"] = (a if family == "llama4" else a.mT).chunk(2, dim=-1)
            case ["experts", "up_proj"]:
                arrays["w_up"] = a.mT
            case ["experts", "down_proj"]:
                arrays["w_down"] = a if family in ("gpt_oss", "llama4") else a.mT
            case ["experts", "down_proj_bias"]:
                arrays["b_down"] = a
            case ["shared_expert", part]:
                arrays[f"shared_w_{part.removesuffix('_proj')}"] = a.T
            case ["shared_expert_gate"]:
                arrays["shared_score"] = a[0]
            case _:
                raise AssertionError(f"{family} has {name}")
    return arrays


if __name__ == "__main__":
    for family, dtype in COMMITTED.items():
        shutil.rmtree(CHECKPOINTS / family, ignore_errors=True)
        write(family, CHECKPOINTS / family, dtype)
