"""The byte-level model of `pydoc` in JAX: the same sums, with `jax_impl.moe_layer`, and the same Adam."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_impl import Router, moe_layer, plan_capacity
from parity.study import pydoc
from parity.study.pydoc import BALANCE, BLOCKS, D, E, H, K


def forward(p: dict[str, Array], byte_BS: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
    """Logits of the next byte; for each block its MoE layer's tokens, counts per expert, and how many were dropped."""
    B, S = byte_BS.shape
    capacity = plan_capacity(None, B * S, K, E, 1)
    h_BSD = p["embed_VD"][byte_BS] + p["position_SD"][:S]
    moe = []
    for i in range(BLOCKS):
        x_BSD = rms_norm(h_BSD)
        q, k, v = ((x_BSD @ p[f"{i}.{name}_DD"]).reshape(B, S, H, D // H) for name in ("query", "key", "value"))
        mixed_BSD = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, S, D)
        h_BSD = h_BSD + mixed_BSD @ p[f"{i}.mix_DD"]
        x_TD = rms_norm(h_BSD).reshape(-1, D)
        weights = (p[f"{i}.{name}"] for name in ("router_DE", "w_gate_EDF", "w_up_EDF", "w_down_EFD"))
        stages = moe_layer(x_TD, *weights, router=Router(K, renormalize=True), capacity=capacity)
        h_BSD = h_BSD + stages.out_TD.reshape(B, S, D)
        moe.append((x_TD, stages.routing.counts_E, stages.dropped))
    return rms_norm(h_BSD) @ p["unembed_DV"], moe


def rms_norm(h: Array) -> Array:
    """Over the last axis, without a weight."""
    return h * jax.lax.rsqrt((h * h).mean(axis=-1, keepdims=True) + 1e-6)


def losses(p: dict[str, Array], byte_BS: Array, next_BS: Array) -> tuple[Array, tuple[Array, Array]]:
    """The training objective, the mean cross entropy in nats per byte, and the assignments dropped."""
    logits_BSV, moe = forward(p, byte_BS)
    log_BSV = jax.nn.log_softmax(logits_BSV)
    loss = -jnp.take_along_axis(log_BSV, next_BS[..., None], axis=-1).mean()
    balance = 0.0
    for i, (x_TD, counts_E, _) in enumerate(moe):
        prob_E = jax.nn.softmax(x_TD @ p[f"{i}.router_DE"]).mean(axis=0)
        balance = balance + E * (counts_E / counts_E.sum() * prob_E).sum()
    return loss + BALANCE * balance, (loss, jnp.stack([dropped for *_, dropped in moe]).sum())


@jax.jit
def training_step(p, m, v, step, rate, batch):
    """Adam with `pydoc.optimizer`'s constants, as PyTorch corrects its bias."""
    (_, (loss, dropped)), gradient = jax.value_and_grad(losses, has_aux=True)(p, batch[:, :-1], batch[:, 1:])
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, gradient)
    first, second = 1 - 0.9**step, jnp.sqrt(1 - 0.95**step)
    p = jax.tree.map(lambda p, m, v: p - rate / first * m / (jnp.sqrt(v) / second + 1e-8), p, m, v)
    return p, m, v, loss, dropped


def train(seed: int, steps: int, windows: int) -> tuple[list[float], list[float]]:
    """The loss before each step, and the rate of assignments dropped in it, which is zero."""
    jax.config.update("jax_platforms", "cpu")
    text_n, _ = pydoc.text()
    p = {name: jnp.asarray(w) for name, w in pydoc.init(seed).items()}
    m, v = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
    loss, dropped = [], []
    for step, batch in enumerate(pydoc.batches(seed, steps, text_n, windows)):
        rate = pydoc.learning_rate(step, steps)
        # Powers of step in float64 would be PyTorch's; in float32 they are off by its last bit.
        p, m, v, before, lost = training_step(p, m, v, np.float32(step + 1), np.float32(rate), batch.astype(np.int32))
        loss.append(float(before))
        dropped.append(float(lost) / (BLOCKS * windows * pydoc.S * K))
    return loss, dropped
