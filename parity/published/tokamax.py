"""Tokamax's grouped product for the three products of each expert; routing and permute are plain JAX."""

import jax
import jax.numpy as jnp
from tokamax import ragged_dot  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

from parity import backend, only, record

# Parameters of the layer: its own name, our name, and its axes.
STORED = {"rhs of gate": "w_gate: E D F", "rhs of up": "w_up: E D F", "rhs of down": "w_down: E F D"}


@backend(framework="jax")
def layer(x_PTD, score_PTK, expert_id_PTK, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """Each expert on its own tokens, by tokamax.ragged_dot."""
    only(case, *{*case.router._fields} - {"score_on"})  # scores are an input

    def product(x_ND, w_EDF):
        options = {"precision": "highest", "preferred_element_type": x_ND.dtype}
        return ragged_dot(x_ND, w_EDF, counts_E, **options)  # pyright: ignore[reportCallIssue]  this file has its name

    P, T, K = expert_id_PTK.shape
    expert_N = expert_id_PTK.reshape(-1)
    by_expert_N = jnp.argsort(expert_N, stable=True)
    counts_E = jnp.bincount(expert_N, length=case.experts).astype(jnp.int32)
    x_ND = x_PTD.reshape(P * T, -1)[by_expert_N // K]
    accum_dtype = jnp.promote_types(x_ND.dtype, jnp.float32)
    gate_NF, up_NF = (product(x_ND, w).astype(accum_dtype) for w in (w_gate_EDF, w_up_EDF))
    y_ND = product((jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype), w_down_EFD)
    rows_N3 = jnp.stack(jnp.unravel_index(by_expert_N, (P, T, K)), axis=-1)
    record("apply_experts/y", y_ND, rows_N3)
    y_PTKD = jnp.zeros_like(y_ND).at[by_expert_N].set(y_ND).reshape(P, T, K, -1)
    out_PTD = jnp.einsum("ptkd,ptk->ptd", y_PTKD.astype(accum_dtype), score_PTK)
    return out_PTD.astype(x_PTD.dtype)
