"""Does dropping matter for learning? The byte-level model of `pydoc`, trained with each layer from the same start.

Runs share initial weights and batches in the same order; only the MoE layers differ. On one rank, each bin is an
expert's.
The losses of PyTorch without drops and of JAX with the capacity at which nothing drops have to track each other. They
may differ by FACTOR times what rounding does to PyTorch's own run: DRAWS more runs perturb each weight by up to the
unit roundoff of float32 before every step, and the largest difference so far counts.
"""

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from parity.oracle.tolerances import FACTOR, unit_roundoff
from parity.study.part import Asked, Part, Plot, Rows, Study, axes, section, svg
from parity.study.routing import PRIORITIES

Array = np.ndarray

DRAWS = 4
FACTORS = ("1", "1.25", "2")
WINDOWS = 4  # windows of 128 bytes in a batch


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

    from parity.study import pydoc
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

    steps: int  # number of steps, from the first, in which they track each other
    worst: float  # largest ratio of difference to allowance
    difference: float  # largest difference, in nats per byte
    allowed: float  # the allowance at that step


def tracking(runs: list[Run]) -> Tracking:
    """Tracking of seed 0, the seed with draws of rounding errors."""
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


# ---- Tables and plots


def curves(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs grouped by everything except the seed, without draws of rounding errors."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.factor != "none", r.factor, r.layer, r.seed)):
        name = {"torch": "PyTorch, dropless", "jax": "JAX, dropless by capacity"}.get(run.layer)
        if not run.draw:
            groups.setdefault(name or f"capacity {run.factor}, {run.layer}", []).append(run)
    return groups


COLUMNS = ("layers", "held out", "range", "dropped", "last 20 steps", "range", "seeds")


def learning_table(study: Study) -> Rows | None:
    """Final losses with their spread over seeds."""
    if not (runs := study.of(Run)):
        return None
    return Rows(f"Learning, {_said(study)}", COLUMNS, _rows(runs))


def learning_section(study: Study) -> str:
    """The section of the page with the final losses."""
    if not (runs := study.of(Run)):
        return ""
    return section("learning", "Does dropping matter for learning?", _said(study), COLUMNS, _rows(runs))


def _said(study: Study) -> str:
    (t,) = study.of(Tracking)
    return (
        f"{len(study.of(Run)[0].loss)} steps, bits per byte: mean and range over seeds. JAX tracks PyTorch for "
        f"{t.steps} steps, at most {t.worst:.2f} of the allowance ({t.difference:.1g} of {t.allowed:.1g} nats)"
    )


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    rows, bits = [], 1 / np.log(2)
    for name, of in curves(runs).items():
        last = [bits * float(np.mean(run.loss[-20:])) for run in of]
        held = [bits * run.held_out for run in of if run.held_out is not None]
        dropped = 100 * float(np.mean([np.mean(run.dropped) for run in of]))
        rows.append([name, f"{np.mean(held):.3f}" if held else "", _range(held), f"{dropped:.1f}%",
                     f"{np.mean(last):.3f}", _range(last), str(len(of))])  # fmt: skip
    return rows


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f}-{max(values):.3f}" if values else ""


def plots(study: Study) -> dict[str, Plot]:
    """Losses, a picture for each capacity factor."""
    if not (found := study.of(Run)):
        return {}
    groups = curves(found)
    factors = list(dict.fromkeys(name.split(",")[0] for name in groups if name.startswith("capacity")))
    return {f"learning-{i}.svg": _losses(groups, factor) for i, factor in enumerate(factors or ["dropless"])}


def _losses(groups: dict[str, list[Run]], factor: str) -> Plot:
    figure, ax = axes()
    for name, runs in groups.items():
        if name.startswith("capacity") and not name.startswith(f"{factor},"):
            continue
        loss = np.array([run.loss for run in runs]) / np.log(2)
        n = loss.shape[1] // 10
        smooth = loss[:, : 10 * n].reshape(len(runs), n, 10).mean(axis=2)
        x = 10 * np.arange(n) + 5
        label = f"priority {name.split(', ')[-1]}" if name.startswith("capacity") else name
        (line,) = ax.plot(x, smooth.mean(axis=0), lw=1, label=label)
        ax.fill_between(x, smooth.min(axis=0), smooth.max(axis=0), alpha=0.15, color=line.get_color(), lw=0)
    ax.set(title=factor, xlabel="step", ylabel="loss, bits per byte")
    return Plot(
        svg(figure),
        f"Training loss, {factor}: means of 10 steps and of seeds, and in the band the range over seeds.",
    )


def jobs(asked: Asked) -> list[Callable[[], list[Run]]]:
    """One job per training run, if any is asked for."""
    return [partial(train, *run, asked.learn_steps, WINDOWS) for run in (plan(asked.learn) if asked.learn else ())]


def summary(study: Study) -> list[Tracking]:
    """Whether the two frameworks' losses track each other."""
    runs = study.of(Run)
    return [tracking(runs)] if runs else []


PART = Part("learn", jobs, 100, summary=summary, table=learning_table, section=learning_section, plots=plots)
