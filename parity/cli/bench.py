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
    Straightforward versions in both frameworks are measured along, unless left out. So are other people's, where they
    are installed: transformer_engine on a GPU, megatron-core, tokamax.

    Exit code: 0 measured, 2 wrong usage, 3 a framework is missing or crashed, or a figure could not be measured.
    Of every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity bench                                   three models' shapes on a GPU, a small one on a CPU
        python -m parity bench mixtral-8x7b --framework torch   one shape, one framework
        python -m parity bench small --parts whole --no-baselines
        python -m parity bench --ranks 2                         the exchange too, over two GPUs
    """

    shapes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which: deepseek-v3, mixtral-8x7b, qwen3-30b-a3b, small."""
    framework: tuple[str, ...] = FRAMEWORKS
    """Which frameworks to measure."""
    parts: tuple[str, ...] = (*PARTS, "exchange")
    """Stages, the whole of them, the experts; over several --ranks, the exchange and the whole."""
    baselines: bool = True
    """Measure the straightforward versions too, and other people's that are installed."""
    compiled: bool = True
    """And PyTorch's under torch.compile."""
    ranks: int = 1
    """More: measure the exchange, and the whole with it, a GPU per rank; on a CPU, processes and virtual devices."""
    plot: Path | None = None
    """Draw each figure's share of its floor into this file (.png, .svg or .pdf)."""
    seconds: float = 0.3
    """Time to spend on each figure."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the rows."""
    seed: int = 0
    """Of routing and rows."""
    json: bool = False
    """Print one JSON object per figure, as each is measured."""
    save: Path | None = None
    """Write the figures to this file too, a JSON object a line."""


def run(command: Command) -> int:
    """Run `bench`; its exit code.

    Raises ValueError on an unknown shape or part, on numbers that cannot be, and where there would be nothing to show.
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
        raise ValueError(f"--ranks is {command.ranks} and --seed {command.seed}: at least 1 and 0")
    measured = ACROSS_RANKS if command.ranks > 1 else PARTS
    if not {*command.parts} & {*measured}:
        these = ", ".join(measured)
        raise ValueError(f"--parts {' '.join(command.parts)}: with --ranks {command.ranks} there are {these}")
    if command.plot and command.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {command.plot}: its name must end in .png, .svg or .pdf")
    if command.plot and command.ranks > 1 and not gpus():
        raise ValueError("--plot draws shares of a floor, which processes on a CPU, having no link, do not have")
    plan = Plan(
        shapes=tuple(SHAPES[name] for name in command.shapes),
        frameworks=command.framework,
        parts=command.parts, baselines=command.baselines, compiled=command.compiled,
        seconds=command.seconds, dtype=command.dtype, seed=command.seed, ranks=command.ranks,
    )  # fmt: skip
    for shape in choose_shapes(plan, gpus() > 0):
        replace(shape, ranks=command.ranks)  # fits, or says why not
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
    finally:  # what was measured before something failed
        if not command.json and figures:
            print_bench(Page(160), figures)
    if command.plot:
        plot_bench(figures, command.plot)
        say(f"wrote {command.plot}")
    return BACKEND if any(figure.error for figure in figures) else MATCH
