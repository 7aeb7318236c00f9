"""`python -m parity bench`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import tyro

from parity.bench.plan import ACROSS_RANKS, PARTS, SHAPES, Figure, Plan, choose_shapes, run_bench
from parity.bench.report import plot_bench, print_bench
from parity.cases.files import writing
from parity.cli.shared import BACKEND, MATCH, Page, check_writable, say
from parity.judge.engine import progress
from parity.run.ours import FRAMEWORKS
from parity.run.supervisor import gpus, require


@dataclass
class Command:
    """How close to what the memory allows are the row movements, in both frameworks?

    Each figure stands beside its floor: the bytes that have to move over the copy bandwidth measured in the same run.
    Straightforward versions in both frameworks are measured too, and so are transformer_engine (on a GPU),
    megatron-core and tokamax where they are installed, and over several GPUs megatron-core's all-to-all dispatcher;
    --no-baselines leaves all of these out.

    Exit code: 0 measured, 2 wrong usage, 3 a framework is missing or crashed, or a figure could not be measured.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity bench                                   three models' shapes on a GPU, a small one on a CPU
        python -m parity bench mixtral-8x7b --framework torch   one shape, one framework
        python -m parity bench small --parts whole --no-baselines
        python -m parity bench --ranks 2                         the exchange too, over two GPUs
    """

    shapes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Shapes to measure: deepseek-v3, mixtral-8x7b, qwen3-30b-a3b, small.
    Default: the three models on a GPU, small on a CPU."""
    framework: tuple[str, ...] = FRAMEWORKS
    """Frameworks to measure."""
    parts: tuple[str, ...] = (*PARTS, "exchange")
    """Parts to measure: single stages, all stages (whole), the experts; with several --ranks, exchange and whole."""
    baselines: bool = True
    """Measure straightforward versions too, and other projects' that are installed."""
    compiled: bool = True
    """Measure PyTorch's straightforward version under torch.compile too."""
    ranks: int = 1
    """Number of ranks. With several, measure the exchange and the whole layer's movements, one GPU per rank
    (in JAX in bins, ragged and written straight); on a CPU, with processes (PyTorch) and virtual devices
    (JAX, in bins only)."""
    plot: Path | None = None
    """File to draw each figure's share of its floor in (.png, .svg or .pdf)."""
    seconds: float = 0.3
    """Seconds to spend on timing each figure."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the rows."""
    seed: int = 0
    """Seed of the routing and the rows."""
    json: bool = False
    """Print one JSON object per figure, as it is measured, instead of tables."""
    save: Path | None = None
    """File to write the figures to as well, one JSON object per line."""


def run(command: Command) -> int:
    """Run `bench`; its exit code.

    Raises ValueError on an unknown shape or part, on a number out of range, and when there would be nothing to show.
    """
    check_writable(command.plot, command.save)
    for name, known in (
        (command.shapes, SHAPES), (command.parts, (*PARTS, "exchange")), (command.framework, FRAMEWORKS),
    ):  # fmt: skip
        if unknown := [word for word in name if word not in known]:
            raise ValueError(f"unknown: {', '.join(unknown)}. There are: {', '.join(known)}")
    if not 0 < command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds}: it must be positive and finite")
    if command.ranks < 1 or command.seed < 0:
        raise ValueError(f"--ranks is {command.ranks} and --seed {command.seed}: they must be at least 1 and 0")
    measured = ACROSS_RANKS if command.ranks > 1 else PARTS
    if not {*command.parts} & {*measured}:
        these = ", ".join(measured)
        raise ValueError(f"--parts {' '.join(command.parts)}: with --ranks {command.ranks} only {these} are measured")
    if command.plot and command.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {command.plot}: its name must end in .png, .svg or .pdf")
    if command.plot and command.ranks > 1 and not gpus():
        raise ValueError("--plot with --ranks above 1 needs GPUs: it draws shares of the floor that their link sets")
    plan = Plan(
        shapes=tuple(SHAPES[name] for name in command.shapes),
        frameworks=command.framework,
        parts=command.parts, baselines=command.baselines, compiled=command.compiled,
        seconds=command.seconds, dtype=command.dtype, seed=command.seed, ranks=command.ranks,
    )  # fmt: skip
    for shape in choose_shapes(plan, gpus() > 0):
        replace(shape, ranks=command.ranks)  # raises ValueError, with the reason, if the shape does not fit
    require(command.framework, "or name the other --framework only", trying=True)
    figures: list[Figure] = []
    try:
        with progress() as bar:
            task = bar.add_task("bench", total=None)
            for figure in run_bench(plan):
                bar.update(task, advance=1, description=f"{figure.framework} {figure.shape} {figure.part}")
                figures.append(figure)
                line = msgspec.json.encode(figure).decode()
                if command.save:
                    with writing(command.save, keep=True), command.save.open("w" if len(figures) == 1 else "a") as file:
                        file.write(line + "\n")
                if command.json:
                    print(line, flush=True)
    finally:  # also prints what was measured before a failure
        if not command.json and figures:
            print_bench(Page(160), figures)
    if command.plot:
        plot_bench(figures, command.plot)
        say(f"wrote {command.plot}")
    return BACKEND if any(figure.error for figure in figures) else MATCH
