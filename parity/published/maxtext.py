"""MaxText's RoutedMoE, on one device or on all ranks' devices, on a mesh that it makes itself."""

from pathlib import Path

import jax
import jax.numpy as jnp
import maxtext  # pyright: ignore[reportMissingImports]
from flax import nnx  # pyright: ignore[reportMissingImports]
from flax.linen.partitioning import axis_rules  # pyright: ignore[reportMissingImports]
from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]
from maxtext.layers.initializers import nd_dense_init  # pyright: ignore[reportMissingImports]
from maxtext.layers.moe import RoutedMoE  # pyright: ignore[reportMissingImports]
from maxtext.utils import maxtext_utils  # pyright: ignore[reportMissingImports]

from parity import Unsupported, backend, only

# Parameters of the layer: its own name, our name, and its axes.
STORED = {
    "gate.kernel": "router: D E", "gate.bias": "router_bias or selection_bias: E", "wi_0": "w_gate: E D F",
    "wi_1": "w_up: E D F", "wo": "w_down: E F D", "wi_0_bias": "b_gate: E F", "wi_1_bias": "b_up: E F",
    "wo_bias": "b_down: E D",
}  # fmt: skip


def run(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, **options):
    """The output of a layer with this configuration and our weights, laid out as its own."""
    of_chosen = case.score_function == "softmax_of_chosen"  # equals softmax, renormalised
    only(case, score_function=("softmax_of_chosen", "softmax"), renormalize=not of_chosen, epsilon=(0.0, 1e-20),
         router_dtype="activations", cast_scores=True)  # fmt: skip
    return run_model("mixtral-8x7b", x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, {}, **options)


def run_model(model, x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, biases, **options):
    """The output of the layer of a model, of which a case says the sizes; biases that are not given are zero."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(
        ["", str(base)], run_name="", override_model_config=True, enable_checkpointing=False,
        skip_jax_distributed_system=True, model_name=model, base_emb_dim=case.width, base_mlp_dim=case.hidden,
        base_moe_mlp_dim=case.hidden, num_experts=case.experts, num_experts_per_tok=case.top_k, dtype=case.dtype,
        weight_dtype=case.dtype, matmul_precision="highest", per_device_batch_size=1, max_target_length=case.tokens,
        capacity_factor=-1.0, **({"megablox": False} | options),
    )  # fmt: skip
    devices = jax.devices()[: options.get("ici_expert_parallelism", 1)]
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config, devices), config.mesh_axes)
    moe = RoutedMoE(
        config, case.experts, case.top_k, mesh, nd_dense_init(1.0, "fan_in", "truncated_normal"), ("embed", "mlp"),
        nnx.Rngs(0), case.hidden, jnp.dtype(case.dtype), jnp.dtype(case.dtype),
    )  # fmt: skip
    moe.gate.kernel.value, moe.wi_0.value, moe.wi_1.value, moe.wo.value = router_DE, w_gate_EDF, w_up_EDF, w_down_EFD
    kept = {"gate.bias": moe.gate.bias, "wi_0_bias": moe.wi_0_bias, "wi_1_bias": moe.wi_1_bias, "wo_bias": moe.wo_bias}
    for name, its in kept.items():
        if its is not None:
            its.value = jnp.zeros_like(its.value) if biases.get(name) is None else biases[name]
    with mesh, axis_rules(config.logical_axis_rules):
        return moe(x_PTD)[0]


@backend(framework="jax")
def qwen3(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Qwen3-30B-A3B as it is configured; of a case it takes the sizes."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run_model("qwen3-30b-a3b", *ours, {}, sparse_matmul=False)


@backend(framework="jax")
def deepseek3(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    """DeepSeek-V3 as it is configured, without its shared expert; of a case it takes the sizes."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run_model("deepseek3-671b", *ours, {"gate.bias": selection_bias_E}, sparse_matmul=False)


@backend(framework="jax")
def gpt_oss(
    x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, router_bias_E=None, b_gate_EF=None, b_up_EF=None,
    b_down_ED=None,
):  # fmt: skip
    """gpt-oss-20b as it is configured; of a case it takes the sizes."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    biases = {"gate.bias": router_bias_E, "wi_0_bias": b_gate_EF, "wi_1_bias": b_up_EF, "wo_bias": b_down_ED}
    return run_model("gpt-oss-20b", *ours, biases, sparse_matmul=False)


@backend(framework="jax")
def llama4(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Llama 4 Scout as it is configured, without its shared expert; of a case it takes the sizes."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run_model("llama4-17b-16e", *ours, {}, sparse_matmul=False)


@backend(framework="jax")
def dense(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Every expert on every token, on one device."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run(*ours, sparse_matmul=False)


@backend(framework="jax")
def dense_over_ranks(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Every expert on every token, on a mesh of all devices along its axis for experts; XLA says what lies where."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run(*ours, sparse_matmul=False, ici_expert_parallelism=case.ranks, ici_fsdp_parallelism=1)


@backend(framework="jax")
def ragged(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Each expert on its own tokens, by a grouped product, on one device."""
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run(*ours, sparse_matmul=True)


@backend(framework="jax")
def ragged_over_ranks(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Each expert on its own tokens, exchanged by ragged_all_to_all over a mesh of all devices."""
    if case.ranks > 1 and jax.default_backend() == "cpu":
        raise Unsupported("XLA:CPU has no ragged_all_to_all, which it exchanges tokens by")
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    return run(*ours, sparse_matmul=True, ici_expert_parallelism=case.ranks, ici_fsdp_parallelism=1)


@backend(framework="jax")
def ring_over_ranks(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Expert parallelism by its ring of experts: each rank gathers all tokens, and adds up what its experts make."""
    if case.ranks == 1:
        raise Unsupported("its ring needs two ranks")
    ours = (x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
    options = {"ici_expert_parallelism": case.ranks, "ici_fsdp_parallelism": 1, "use_ring_of_experts": True}
    return run(*ours, sparse_matmul=True, megablox=True, **options)
