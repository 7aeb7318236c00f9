"""Does dropping matter for learning? The byte-level model of `pydoc`, trained with each layer from the same start.

Same initial weights, same batches in the same order; only the MoE layers differ. On one rank, so bins are experts'.
The losses of PyTorch without drops and of JAX with the capacity at which nothing drops have to track each other: by no
more than FACTOR times what rounding does to PyTorch's own run, whose weights are each off by up to the unit roundoff of
float32 before every step, DRAWS times over. Of that the largest difference so far counts.
"""

import msgspec
import numpy as np

from parity.oracle.tolerances import FACTOR, unit_roundoff
from parity.study import pydoc
from parity.study.sweep import PRIORITIES

Array = np.ndarray

DRAWS = 4
FACTORS = ("1", "1.25", "2")
WINDOWS = 4  # of 128 bytes in a batch


class Run(msgspec.Struct, tag_field="kind", tag="training"):
    """One training run: the loss in nats per byte before each step, and the rate of assignments dropped in it."""

    layer: str  # torch, jax, or the priority of a static capacity
    factor: str  # of the capacity; none where nothing drops
    seed: int
    draw: int  # of rounding errors; 0 for none
    loss: list[float]
    dropped: list[float]
    held_out: float | None  # after the last step, on text not trained on, without drops, in nats per byte


def train_torch(layer: str, factor: str, seed: int, draw: int, steps: int, windows: int) -> Run:
    """PyTorch: dynamic, or with a static capacity."""
    import torch

    from torch_impl import moe_layer, static

    torch.set_num_threads(1)
    T = windows * pydoc.S

    def with_capacity(x_TD, *weights, **how):
        capacity = static.plan_capacity(factor, x_TD.shape[0], pydoc.K, pydoc.E, 1, "expert", layer)
        return static.moe_layer(x_TD, *weights, capacity=capacity, **how)

    text_n, held_out_n = pydoc.text()
    p = {name: torch.from_numpy(w).requires_grad_() for name, w in pydoc.init(seed).items()}
    adam, noise = pydoc.optimizer(p), torch.Generator().manual_seed(draw)
    loss, dropped = [], []
    for step, batch in enumerate(pydoc.batches(seed, steps, text_n, windows)):
        if draw:
            with torch.no_grad():
                for w in p.values():
                    w.mul_(1 + unit_roundoff("float32") * (2 * torch.rand(w.shape, generator=noise) - 1).double())
        rate = pydoc.learning_rate(step, steps)
        before, moe = pydoc.training_step(p, adam, batch, rate, moe_layer if layer == "torch" else with_capacity)
        loss.append(float(before))
        lost = [0 if layer == "torch" else int(stages.dropped) for stages in moe]
        dropped.append(sum(lost) / (len(moe) * T * pydoc.K))
    held_out = pydoc.bits_per_byte(p, held_out_n) * np.log(2)
    return Run(layer, factor, seed, draw, loss, dropped, float(held_out))


def train_jax(seed: int, steps: int, windows: int) -> Run:
    """JAX, with the capacity at which nothing drops."""
    from parity.study.learning_in_jax import train

    loss, dropped = train(seed, steps, windows)
    return Run("jax", "none", seed, 0, loss, dropped, None)


def plan(seeds: int) -> list[tuple[str, str, int, int]]:
    """(layer, factor, seed, draw) of every run."""
    runs = [("jax", "none", 0, 0), *(("torch", "none", 0, draw) for draw in range(1, DRAWS + 1))]
    runs += [("torch", "none", seed, 0) for seed in range(seeds)]
    return runs + [(p, f, seed, 0) for f in FACTORS for p in PRIORITIES for seed in range(seeds)]


def train(layer: str, factor: str, seed: int, draw: int, steps: int, windows: int) -> list[Run]:
    """One run of the plan."""
    if layer == "jax":
        return [train_jax(seed, steps, windows)]
    return [train_torch(layer, factor, seed, draw, steps, windows)]


class Tracking(msgspec.Struct, tag_field="kind", tag="tracking"):
    """How far JAX's losses are from PyTorch's, in the allowance: up to 1 they track each other."""

    steps: int  # that they track each other from the first
    worst: float  # of all steps: difference over allowance
    difference: float  # the largest, in nats per byte
    allowed: float  # there


def tracking(runs: list[Run]) -> Tracking:
    """Of seed 0, which has the draws."""
    at_zero = [run for run in runs if run.seed == 0]
    (torch,) = (np.array(r.loss) for r in at_zero if r.layer == "torch" and not r.draw)
    (jax,) = (np.array(r.loss) for r in at_zero if r.layer == "jax")
    rounded = [np.abs(np.array(r.loss) - torch) for r in at_zero if r.draw]
    allowed = FACTOR * np.maximum.accumulate(np.max(rounded, axis=0)) + unit_roundoff("float32") * torch
    ratio = np.abs(jax - torch) / allowed
    wrong = np.flatnonzero(ratio > 1)
    at = int(ratio.argmax())
    return Tracking(
        int(wrong[0]) if wrong.size else len(ratio), float(ratio[at]), float(abs(jax - torch)[at]), float(allowed[at])
    )
