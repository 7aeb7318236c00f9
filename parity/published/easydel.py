"""EasyDeL's block of Qwen3-MoE, in an environment of its own: easydel 0.3 has JAX 0.9, and imports torch and pillow."""

import easydel  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
from flax import nnx  # pyright: ignore[reportMissingImports]

from parity import Unsupported, backend, only

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}  # of a model that is never built

# Parameters of the layer: its own name, our name, and its axes.
STORED = {
    "gate.kernel": "router: D E", "experts.gate_proj.kernel": "w_gate: E D F", "experts.up_proj.kernel": "w_up: E D F",
    "experts.down_proj.kernel": "w_down: E F D",
}  # fmt: skip


@backend(framework="jax")
def layer(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """The block of Qwen3-MoE, on one device."""
    from easydel.modules.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseBlock  # pyright: ignore

    if jax.device_count() > 1:
        raise Unsupported("its mesh takes all devices, and on a CPU it cannot exchange: add --ranks 1")
    only(case, "cast_scores", renormalize=(False, True), epsilon=(0.0, 1e-20), router_dtype="activations")
    config = easydel.Qwen3MoeConfig(  # pyright: ignore[reportAttributeAccessIssue]  this file has its name
        hidden_size=case.width, moe_intermediate_size=case.hidden, num_experts=case.experts,
        num_experts_per_tok=case.top_k, norm_topk_prob=case.renormalize, **HEADS,
    )  # fmt: skip
    dtype = jnp.dtype(case.dtype)
    with config.mesh:
        block = Qwen3MoeSparseBlock(config, dtype, dtype, jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0))
        block.gate.kernel.value = router_DE.astype(dtype)
        of = block.experts
        of.gate_proj.kernel.value, of.up_proj.kernel.value, of.down_proj.kernel.value = w_gate_EDF, w_up_EDF, w_down_EFD
        return block(x_PTD)[0]
