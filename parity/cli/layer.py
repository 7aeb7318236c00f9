"""`python -m parity layer`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from parity.bench.plan import Figure
from parity.cases.case import Case
from parity.cases.files import writing
from parity.cases.presets import MODELS
from parity.cli.shared import MATCH, Page, check_writable, say
from parity.judge.engine import progress
from parity.run.supervisor import gpus
from parity.study.layers import Plan, layer_table, layers


@dataclass
class Command:
    """What does a whole layer cost on each backend, and what does it drop?

    Times one step forward and backward. Backends with a static capacity run at the factor at which this routing drops
    nothing, so that all do the same work, and at those that --factors names.

    Exit code: 0 measured, as far as this machine can, 2 wrong usage.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity layer                     one GPU; a small layer where there is none
        python -m parity layer --ranks 2 --flags   two GPUs, and JAX under XLA's flags for its exchanges
    """

    model: str | None = None
    """Model whose shape to run (see `check --help`). Default: qwen3-30b-a3b, or a small layer without a GPU."""
    ranks: int = 1
    """Number of ranks, one GPU each."""
    tokens: int | None = None
    """Tokens on each rank. Default: 8192, or 64 without a GPU."""
    skew: float = 0.5
    """Zipf exponent of the routing; 0 is even."""
    factors: tuple[str, ...] = ("1", "1.25")
    """Capacity factors besides the one at which nothing drops."""
    flags: bool = False
    """Run the JAX backends under each of XLA's flags for their exchanges too."""
    seconds: float = 1.0
    """Seconds to spend on timing each figure."""
    save: Path | None = None
    """File to write the figures to as well, one JSON object per line."""


def run(command: Command) -> int:
    """Run `layer`; its exit code."""
    check_writable(command.save)
    if command.model and command.model not in MODELS:
        raise ValueError(f"no model is called {command.model}. There are: {', '.join(MODELS)}")
    if not 0 < command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds}: it must be positive and finite")
    small = Case("small", width=64, hidden=64, experts=8, top_k=2)
    shape = MODELS[command.model] if command.model else MODELS["qwen3-30b-a3b"] if gpus() else small
    tokens = (8192 if gpus() else 64) if command.tokens is None else command.tokens
    case = replace(shape, ranks=command.ranks, tokens=tokens, pattern="random")
    found: list[tuple[Figure, float]] = []
    with progress() as bar:
        task = bar.add_task("layer", total=None)
        for figure, dropped in layers(
            Plan(case, command.skew, command.seconds), command.factors, command.flags, not gpus()
        ):
            bar.update(task, advance=1, description=figure.variant)
            found.append((figure, dropped))
            if command.save:
                with writing(command.save, keep=True), command.save.open("w" if len(found) == 1 else "a") as file:
                    line = {"dropped": dropped} | msgspec.to_builtins(figure)
                    file.write(msgspec.json.encode(line).decode() + "\n")
    Page(170).print(layer_table(case, found))
    if command.save:
        say(f"wrote {command.save}")
    return MATCH
