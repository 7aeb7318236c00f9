"""A MoE layer in JAX, to be changed into yours: `python -m parity check zipf --backend FILE` judges it.

What the arguments are called says what the layer is given; leave out what it does not need. It is called once, with
the tokens of all ranks and a device for each, and can make a mesh of its own.
    x          tokens, [P, T, D], of all ranks
    router     [D, E] in float32, or in float64 where the tokens are
    w_gate, w_up, w_down    of all experts, [E, D, F], [E, D, F], [E, F, D]
    score, expert_id        [P, T, K], for a layer that is given its routing
    keep       [P, T, K], false where an assignment is dropped
    router_bias, selection_bias, expert_scale, b_gate, b_up, b_down, shared_w_gate, shared_w_up, shared_w_down,
    shared_score            what some models have beside them (docs/models.md)
    case       sizes and options: `case.top_k`, `case.score_function`, ... (`python -m parity check --help`)
    axis_name  beside it, the layer is called on each rank within `shard_map`, and all that is above is that rank's
"""

from functools import partial

import jax
import jax.numpy as jnp

from parity import backend, only

einsum = partial(jnp.einsum, precision="highest")  # without it, GPUs and TPUs round float32 to fewer bits


@backend(framework="jax")
def layer(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """The layer: [P, T, D] of the tokens."""
    only(case, "scale", score_function=("softmax", "sigmoid"), renormalize=(False, True))
    accum_dtype = jnp.promote_types(x_PTD.dtype, jnp.float32)
    logits_PTE = einsum("ptd,de->pte", x_PTD.astype(accum_dtype), router_DE)
    score_PTE = jax.nn.softmax(logits_PTE) if case.score_function == "softmax" else jax.nn.sigmoid(logits_PTE)
    score_PTK, id_PTK = jax.lax.top_k(score_PTE, case.top_k)
    if case.renormalize:
        score_PTK = score_PTK / (score_PTK.sum(-1, keepdims=True) + 1e-20)
    weight_PTE = (case.scale * score_PTK[..., None] * jax.nn.one_hot(id_PTK, case.experts, dtype=accum_dtype)).sum(-2)
    gate_EPTF = einsum("ptd,edf->eptf", x_PTD, w_gate_EDF).astype(accum_dtype)
    up_EPTF = einsum("ptd,edf->eptf", x_PTD, w_up_EDF).astype(accum_dtype)
    y_EPTD = einsum("eptf,efd->eptd", (jax.nn.silu(gate_EPTF) * up_EPTF).astype(x_PTD.dtype), w_down_EFD)
    return einsum("pte,eptd->ptd", weight_PTE, y_EPTD.astype(accum_dtype)).astype(x_PTD.dtype)
