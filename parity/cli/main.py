"""`python -m parity`: check | compare | report | bench | study | capture | faults | doctor."""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import tyro
from rich.console import Console
from rich.text import Text

from parity.bench.plan import ACROSS_RANKS, PARTS, SHAPES, Figure, Plan, choose_shapes, run_bench
from parity.bench.report import plot_bench, print_bench
from parity.capture import measure as capture
from parity.cases.case import Case, flag
from parity.cases.presets import MODELS, PRESETS
from parity.cases.random_cases import random_cases
from parity.cases.recording import case_of_recording
from parity.judge import records
from parity.judge.blame import blame
from parity.judge.engine import judge, make_report, progress, run_cases
from parity.judge.records import Report
from parity.oracle.problem import draw
from parity.report.html import page
from parity.report.terminal import Found, describe, fault_table, print_report, summary
from parity.run import faults
from parity.run.backend import BACKENDS, SIDES, BackendError, MissingError, framework, gpus
from parity.run.doctor import doctor_table, examine
from parity.run.trace import Trace, load_folder

MATCH, MISMATCH, USAGE, BACKEND, INTERRUPTED, PIPE = 0, 1, 2, 3, 130, 141


def _flag(f: Field) -> tuple[str, Any, Any]:
    """A case's field as a flag that may be left out."""
    literal = get_origin(f.type) is Literal
    choices = ("True", "False") if f.type is bool else get_args(f.type) if literal else ()
    metavar = "{" + ",".join(choices) + "}" if choices else getattr(f.type, "__name__", "STR").upper()
    about = tyro.conf.arg(help=f.metadata["help"], metavar=metavar, help_behavior_hint=f"(default: {f.default})")
    return f.name, Annotated[f.type | None, about], field(default=None)  # type: ignore[operator]


Flags = make_dataclass("Flags", [_flag(f) for f in fields(Case)])


def not_a_terminal() -> bool:
    """Whether standard output is for a program to read."""
    return not sys.stdout.isatty()


PRESETS_HELP = f"""Presets to run; all of them when no preset and no field is given. `all` means all. There are:
{", ".join(PRESETS)}."""


@dataclass
class CheckCommand:
    """Do PyTorch and JAX compute the same MoE layer, forward and backward, and is it the right one?

    Draws each case once, runs PyTorch as P processes and JAX on P devices, and compares every stage, the output and
    every gradient with an oracle in float64 and with each other.

    Exit code: 0 match, 1 mismatch, 2 wrong usage, 3 a framework is missing or crashed, 5 nothing was compared.

    For example:
        python -m parity check                        every preset
        python -m parity check zipf p8                two presets
        python -m parity check zipf --dtype bfloat16  a preset, changed
        python -m parity check --ranks 2 --experts 6 --capacity-factor 5/4
        python -m parity check --recording recording.safetensors
        python -m parity check --random 100 --seed 1 --dtype bfloat16
    """

    presets: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(help=PRESETS_HELP)] = ()
    case: Annotated[Any, tyro.conf.arg(name="", constructor=Flags)] = field(default_factory=Flags)
    random: int = 0
    """Check this many cases drawn at random; --seed picks other ones, and any field given is the same for all. Five in
    a row have the same shapes, which JAX compiles once, and differ in routing."""
    backend: tyro.conf.UseAppendAction[tuple[Literal["both", "torch", "jax", "torch-static", "jax-dynamic"], ...]] = ()
    """What to run, once for each; default: both, torch and jax. One alone, with --save: the other can run on another
    machine. torch-static: static capacity in PyTorch. jax-dynamic: uneven exchange in JAX, which needs GPUs."""
    model: tuple[str, ...] = ()
    """Check the layer of real models at full width: deepseek-v3, mixtral-8x7b, qwen3-30b-a3b, gpt-oss-120b or
    olmoe-1b-7b."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: a GPU per rank, PyTorch over NCCL, where there are enough; otherwise all ranks share, over gloo."""
    jax_ranks: Literal["auto", "shard_map", "processes", "vmap"] = "auto"
    """A device per rank in one process, a process for each, or all ranks on one device; auto: as many as there are."""
    timeout: float = 60
    """Seconds without progress of any PyTorch rank after which the run ends, saying which rank hangs where."""
    save: Path | None = None
    """Keep the traces in this folder, for `python -m parity compare`."""
    json: bool = field(default_factory=not_a_terminal)
    """Lines of JSON instead of a table: the default where the output is not a terminal."""
    html: Path | None = None
    """Write the report as a page of its own too: nothing is loaded from anywhere."""
    fault: str | None = None
    """Plant this fault (see `python -m parity faults`)."""


@dataclass
class FaultsCommand:
    """List the planted faults, or run them: is each caught, and blamed on the right side and stage?

    Exit code with --run: 0 when all were caught and blamed, 1 otherwise.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; all when none is named."""
    run: bool = False
    """Plant each and check."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where; those that need a GPU are neither run nor counted on a CPU."""


@dataclass
class DoctorCommand:
    """Versions, devices, TF32 and matmul precision, determinism, memory; and what of it makes a comparison unfair.

    Exit code: 0 when nothing is wrong, 1 otherwise.
    """

    json: bool = False
    """Print one JSON object per setting."""


@dataclass
class CompareCommand:
    """Compare traces that `check --save` wrote, on one machine or several.

    Exit code: 0 match, 1 mismatch, 2 wrong usage, 5 nothing was compared.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of traces: one a side, or one with both."""
    json: bool = field(default_factory=not_a_terminal)
    """Lines of JSON instead of a table: the default where the output is not a terminal."""
    html: Path | None = None
    """Write the report as a page of its own too."""


@dataclass
class ReportCommand:
    """Show a report that `check --json` wrote, or a line for each of several. One without its footer, whose run did
    not end, is refused.

    Exit code: that of the run, of several the highest, or 2 when a file is no whole report.
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Lines of JSON, which may be compressed (.xz)."""
    html: Path | None = None
    """Write the report as a page of its own too."""
    schema: bool = False
    """Print the JSON Schema of one line."""


@dataclass
class BenchCommand:
    """How close to what the memory allows are the row movements, on both sides?

    Each figure stands beside its floor: the bytes that have to move over the copy bandwidth measured in the same run.
    Straightforward versions in both frameworks are measured along, unless left out. So are other people's, where they
    are installed: transformer_engine on a GPU, megatron-core, tokamax.

    Exit code: 0 measured, 2 wrong usage, 3 a framework is missing or crashed, or a figure could not be measured.

    Examples:
        python -m parity bench                              three models' shapes on a GPU, a small one on a CPU
        python -m parity bench mixtral-8x7b --side torch    one shape, one side
        python -m parity bench small --parts whole --no-baselines
        python -m parity bench --ranks 2                    the exchange too, over two GPUs
    """

    shapes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which: deepseek-v3, mixtral-8x7b, qwen3-30b-a3b, small."""
    side: Literal["both", "torch", "jax"] = "both"
    """Measure one framework only."""
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


@dataclass
class CaptureCommand:
    """What does a compiler see of the dispatch as the number of ranks grows? One symbol, or a sum of P of them?

    Captures stages 3, 4, 5, 7 and 8, forward and backward, without running them, for each way to size the permute:
        none            ask the device
        list_sum        sum a list of splits
        received_shape  rows of what arrived
        cpu_tensor_sum  sum the splits as a CPU tensor; the exchange still takes lists
        torch_impl      this project's: that, and no list at all
        shard_map, vmap   JAX, whose sizes are static

    Exit code: 0 when torch_impl, if asked for, has one symbol at every P; 1 otherwise.

    For example:
        python -m parity capture
        python -m parity capture --ranks 4 64 1024 --ways list_sum torch_impl --no-inductor --json
    """

    ranks: tuple[int, ...] = (4, 16, 64)
    """Numbers of ranks P. They are only captured for: no other rank is started."""
    ways: tuple[capture.Way, ...] = capture.WAYS
    """Which ways."""
    inductor: bool = True
    """Compile with Inductor too, which takes most of the time."""
    timeout: float = 600
    """Seconds after which one measurement is given up, and what there is of it reported."""
    json: bool = field(default_factory=not_a_terminal)
    """Lines of JSON instead of a table: the default where the output is not a terminal."""
    plot: Path | None = None
    """Draw length of the permute's size and compile time against P into this file (.png, .svg, .pdf)."""


@dataclass
class StudyCommand:
    """What does a static capacity drop, pad and save, for your shapes and routing? Needs no GPU.

    Sweeps capacity factor, kind of bin, priority, skew and shapes; simulates real models on up to 512 ranks; runs one
    small dispatch in both frameworks for the page. Ends in tables, plots and a page.

    Exit code: 0 measured, 2 wrong usage.

    Examples:
        python -m parity study                             about a minute on two cores
        python -m parity study --recording recording.safetensors
        python -m parity study zipf p8                     the routing of these presets, not the plan's
        python -m parity study --model deepseek-v3 --steps 5000
        python -m parity study --learn 3                   and train with every kind of capacity, three seeds
    """

    presets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Sweep the routing of these presets, drawn with 8 seeds each."""
    recording: tuple[str, ...] = ("pydoc",)
    """Recordings to sweep, and to fit the simulation to (see the README for their form)."""
    model: tuple[str, ...] = tuple(MODELS)
    """Models to simulate."""
    tokens: int = 4096
    """On each rank, in the simulation."""
    steps: int | None = None
    """Of the simulation; without, up to 1000, and fewer for large groups."""
    learn: int = 0
    """Train the byte-level model with every kind of capacity from this many seeds: some minutes each."""
    learn_steps: int = 200
    """Steps of each training run."""
    dispatch: bool = True
    """Run the page's small dispatch: needs both frameworks."""
    out: Path = Path("study")
    """Folder for index.html, plots and study.jsonl."""
    json: bool = field(default_factory=not_a_terminal)
    """Print study.jsonl instead of tables: the default where the output is not a terminal."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run it, and exit with its code."""
    try:
        command = parse(argv)
        run: dict[type, Callable[[Any], int]] = {
            CheckCommand: check,
            CompareCommand: compare_folders,
            ReportCommand: show_report,
            CaptureCommand: capture_command,
            FaultsCommand: list_faults,
            BenchCommand: bench,
            StudyCommand: study,
            DoctorCommand: see_doctor,
        }
        code = run[type(command)](command)
    except ValueError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except BackendError as error:
        say(Text(str(error), "red"))
        sys.exit(BACKEND)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE)
    except OSError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except KeyboardInterrupt:
        say(Text("stopped; nothing is left running", "red"))
        sys.exit(INTERRUPTED)
    sys.exit(code)


def parse(argv: list[str] | None) -> Any:
    """The subcommand with its arguments; help, and what is no argument, end here."""
    return tyro.extras.subcommand_cli_from_dict(
        {
            "check": CheckCommand,
            "compare": CompareCommand,
            "report": ReportCommand,
            "capture": CaptureCommand,
            "faults": FaultsCommand,
            "bench": BenchCommand,
            "study": StudyCommand,
            "doctor": DoctorCommand,
        },
        args=argv,
        prog="python -m parity",
        description="Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?",
    )


class Page(Console):
    """Standard output: as wide as the terminal, or as this where it is none."""

    def __init__(self, width: int) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width, highlight=False)

    def on_broken_pipe(self) -> None:
        """End as `print` does, where Rich ends with the exit code of a mismatch."""
        raise BrokenPipeError


def say(message: str | Text) -> None:
    """On standard error, as it is: a line is never broken, so that a path or a command in it can be copied."""
    Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)


def check_writable(*files: Path | None) -> None:
    """Before anything runs. Raises ValueError where a file's folder is none, or the file is a folder."""
    for path in files:
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                f"cannot write {path}: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
            )


def chosen_cases(command: CheckCommand) -> list[Case]:
    """The presets named, with every field that was given changed; or all of them; or one case of its own.

    Raises ValueError on an unknown preset or a case that cannot exist.
    """
    changes = {name: value for name, value in vars(command.case).items() if value is not None}
    if changes.get("capacity_factor") == "none":
        changes["capacity_factor"] = None
    if not re.fullmatch(r"[\w.+-]+", changes.get("name", "custom")):
        raise ValueError(f"--name is {changes['name']!r}: it names files, so use letters, digits and .+-_ only")
    if command.random < 0:
        raise ValueError(f"--random is {command.random}: it cannot be negative")
    if command.random:
        if command.presets or "name" in changes or "recording" in changes:
            raise ValueError("--random draws its cases: leave out presets, --name and --recording")
        return random_cases(command.random, changes.pop("seed", 0), changes)
    if command.model:
        unknown = [name for name in command.model if name not in MODELS]
        if unknown:
            raise ValueError(f"no model is called {', '.join(unknown)}. There are: {', '.join(MODELS)}")
        return [_changed(MODELS[name], changes) for name in command.model]
    unknown = [name for name in command.presets if name not in PRESETS and name != "all"]
    if unknown:
        raise ValueError(f"no preset is called {', '.join(unknown)}. There are: {', '.join(PRESETS)}")
    names = list(PRESETS) if "all" in command.presets or not (command.presets or changes) else command.presets
    if not names and "recording" in changes:
        return [_recorded(changes)]
    if not names:
        return [Case(**changes)]
    return [_changed(PRESETS[name], changes) for name in names]


def _recorded(changes: dict[str, Any]) -> Case:
    """The case of a recording. Raises ValueError on a flag that says something else than the file does."""
    alone = case_of_recording(Case(ranks=1, tokens=0, recording=changes["recording"]))
    ranks = changes.get("ranks", Case().ranks)
    try:
        case = replace(alone, **({"ranks": ranks, "tokens": alone.tokens // max(ranks, 1)} | changes))
    except ValueError as error:
        raise ValueError(f"--recording {alone.recording}: {error}") from error
    held = case_of_recording(case)
    for name in changes:
        if getattr(held, name) != getattr(case, name):
            raise ValueError(f"--{flag(name)} is {changes[name]}, but the recording has {getattr(held, name)}")
    return case


def _changed(case: Case, changes: dict[str, Any]) -> Case:
    return replace(case, **{"name": f"{case.name}-changed"} | changes) if changes else case


def check(command: CheckCommand) -> int:
    """Run `check`; its exit code."""
    cases = chosen_cases(command)
    if not command.timeout > 0:
        raise ValueError(f"--timeout is {command.timeout:g}: it must be positive")
    check_writable(command.html)
    if command.save:
        command.save.mkdir(parents=True, exist_ok=True)
    if command.device == "cuda" and not gpus():
        raise ValueError("--device cuda: there is no NVIDIA GPU here; `python -m parity doctor` says what there is")
    asked = {*command.backend, *(SIDES if "both" in command.backend or not command.backend else ())}
    backends = tuple(backend for backend in BACKENDS if backend in asked)
    if "jax-dynamic" in backends and command.device == "cpu":
        raise ValueError("--backend jax-dynamic: ragged_all_to_all is not implemented on XLA:CPU; use --device cuda")
    fault = faults.find(command.fault) if command.fault else None
    if fault and fault.side not in backends:
        raise ValueError(f"{fault.name} is a fault of {fault.side}, which --backend {' '.join(backends)} does not run")
    group_size = torchrun_size() if any(framework(backend) == "torch" for backend in backends) else None
    if group_size is not None:
        if fault and framework(fault.side) == "torch":
            raise ValueError(f"{fault.name} cannot be planted under torchrun: start without it")
        cases = of_group(cases, group_size, picked=bool(command.presets))
    jax_ranks = ranks_of_jax(command.jax_ranks, command.device, most := max(case.ranks for case in cases))
    if "jax-dynamic" in backends and jax_ranks == "vmap" and most > 1:
        raise ValueError(
            f"--backend jax-dynamic: ragged_all_to_all has no vmap rule, so --ranks {most} need {most} GPUs, and "
            f"there are {gpus()}: use --ranks {max(gpus(), 1)}"
        )
    report = run_cases(
        cases, backends, device=command.device, timeout=command.timeout, fault=fault, save=command.save,
        jax_ranks=jax_ranks,
        in_torchrun=group_size is not None,
    )  # fmt: skip
    return MATCH if report is None else publish(report, command.json, command.html)


def ranks_of_jax(asked: str, device: str, most: int) -> str:
    """How JAX has its ranks: as asked, or a device each where there are enough."""
    if asked != "auto":
        return asked
    return "shard_map" if device == "cpu" or gpus() >= most else "vmap"


def list_faults(command: FaultsCommand) -> int:
    """Run `faults`; its exit code."""
    chosen = [faults.find(name) for name in command.names or faults.FAULTS]
    console = Page(120)
    if not command.run:
        console.print(fault_table([(fault, None) for fault in chosen]))
        return MATCH
    ready = [fault for fault in chosen if command.device == "cuda" or not fault.gpu_only]
    with progress() as bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        trials = pool.map(partial(try_fault, device=command.device), ready)
        tried = list(zip(ready, bar.track(trials, total=len(ready), description="faults"), strict=True))
    console.print(fault_table(tried))
    for fault in chosen:
        if fault not in ready:
            console.print(f"{fault.name}: not run, and not counted: {fault.gpu_only}")
    caught = sum(result.caught for _, result in tried)
    blamed = sum((result.side, result.stage) == (fault.side, fault.stage) for fault, result in tried)
    console.print(f"caught {caught} of {len(tried)}, blamed {blamed} of {len(tried)}")
    return MATCH if caught == blamed == len(tried) else MISMATCH


def try_fault(fault: faults.Fault, device: str = "cpu") -> Found:
    """Plant a fault, run its preset on its side only, and say who was blamed.

    A run that ends in an error counts as caught only where the fault is one that ends it.
    """
    try:
        cases, ranks = [PRESETS[fault.preset]], ranks_of_jax("auto", device, PRESETS[fault.preset].ranks)
        report = run_cases(
            cases,
            (fault.side,),
            device=device,
            jax_ranks=ranks,
            fault=fault,
            timeout=10 if device == "cpu" else 60,
            show_progress=False,
        )
    except MissingError:
        raise
    except BackendError as error:
        return Found(fault.name in faults.END_THE_RUN, error.backend, error.stage, "the run ended: " + str(error))
    assert report is not None
    verdict = blame(report.checks[fault.preset])
    if verdict is None:
        return Found(False, "", "", "")
    return Found(True, " and ".join(verdict.sides), verdict.stage, describe(verdict.check))


def study(command: StudyCommand) -> int:
    """Run `study`; its exit code."""
    from parity.study.engine import Asked, run_study
    from parity.study.page import print_study, write  # matplotlib takes a second

    for kind, asked, known in (("preset", command.presets, PRESETS), ("model", command.model, MODELS)):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"no {kind} is called {', '.join(unknown)}. There are: {', '.join(known)}")
    for name in ("tokens", "steps", "learn_steps"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if command.learn < 0 or (command.learn and command.learn_steps < 20):
        raise ValueError(f"--learn {command.learn} --learn-steps {command.learn_steps}: at least 0 seeds and 20 steps")
    for recording in command.recording:
        case_of_recording(Case(ranks=1, tokens=0, recording=recording))
    command.out.mkdir(parents=True, exist_ok=True)
    wanted = Asked(
        [PRESETS[name] for name in command.presets], command.recording, command.model, command.tokens, command.steps,
        command.learn, command.learn_steps, command.dispatch,
    )  # fmt: skip
    with progress() as bar:
        found = run_study(wanted, bar)
    paths = write(found, command.out)
    if command.json:
        print("\n".join(found.lines()))
    else:
        print_study(Page(170), found)
    say(f"wrote {', '.join(map(str, paths))}")
    return MATCH


def bench(command: BenchCommand) -> int:
    """Run `bench`; its exit code.

    Raises ValueError on an unknown shape or part, on numbers that cannot be, and where there would be nothing to show.
    """
    check_writable(command.plot, command.save)
    for name, known in ((command.shapes, SHAPES), (command.parts, (*PARTS, "exchange"))):
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
        sides=SIDES if command.side == "both" else (command.side,),
        parts=command.parts, baselines=command.baselines, compiled=command.compiled,
        seconds=command.seconds, dtype=command.dtype, seed=command.seed, ranks=command.ranks,
    )  # fmt: skip
    for shape in choose_shapes(plan, gpus() > 0):
        replace(shape, ranks=command.ranks)  # fits, or says why not
    figures: list[Figure] = []
    try:
        with progress() as bar:
            task = bar.add_task("bench", total=None)
            for figure in run_bench(plan):
                bar.update(task, advance=1, description=f"{figure.side} {figure.shape} {figure.part}")
                figures.append(figure)
                line = msgspec.json.encode(figure).decode()
                if command.save:
                    with command.save.open("w" if len(figures) == 1 else "a") as file:
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


def torchrun_size() -> int | None:
    """How many processes torchrun started, if it started this one."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def of_group(cases: list[Case], size: int, picked: bool) -> list[Case]:
    """The cases that a group of this size can run: all that were picked, or those of all presets that fit.

    Raises ValueError when one that was picked does not fit, or none fits.
    """
    fitting = [case for case in cases if case.ranks == size]
    if not fitting or (picked and len(fitting) < len(cases)):
        other = next(case for case in cases if case.ranks != size)
        raise ValueError(
            f"torchrun started {size} processes, but {other.name} has --ranks {other.ranks}: "
            f"add --ranks {size}, or start {other.ranks}"
        )
    return fitting


def compare_folders(command: CompareCommand) -> int:
    """Run `compare`; its exit code."""
    check_writable(command.html)
    if not command.folders:
        raise ValueError("which traces? Name the folders that `python -m parity check --save` wrote")
    traces: dict[str, list[Trace]] = {}
    for folder in command.folders:
        for trace in load_folder(folder):
            traces.setdefault(trace.case.name, []).append(trace)
    for name, found in traces.items():
        if len({trace.case for trace in found}) > 1:
            differ = [
                f"--{flag(f.name)} {' and '.join(str(getattr(t.case, f.name)) for t in found)}"
                for f in fields(Case)
                if len({getattr(t.case, f.name) for t in found}) > 1
            ]
            raise ValueError(f"{name} is not the same case in every folder: {', '.join(differ)}")
        sides = [trace.backend for trace in found]
        if len(set(sides)) < len(sides):
            raise ValueError(f"{name} has traces of {sides}: give one of each side")
        if len(sides) < 2:
            raise ValueError(f"{name} has traces of {sides} only: give a folder of the other side too")
    head, start = records.header(), time.perf_counter()
    with progress() as bar:
        judged = {
            name: judge(draw(found[0].case), found) for name, found in bar.track(traces.items(), description="compare")
        }
    report = make_report(head, list(traces), judged, {"compare": time.perf_counter() - start})
    return publish(report, command.json, command.html)


def show_report(command: ReportCommand) -> int:
    """Run `report`; its exit code."""
    check_writable(command.html)
    if command.schema:
        print(msgspec.json.format(msgspec.json.encode(records.schema())).decode())
        return MATCH
    if not command.files:
        raise ValueError("which report? Name a file that `python -m parity check --json` wrote, or ask for --schema")
    if len(command.files) == 1:
        return publish(records.read(command.files[0]), False, command.html)
    if command.html:
        raise ValueError("--html makes a page of one report: name one file")
    reports = {path.name.split(".")[0]: records.read(path) for path in command.files}
    Page(160).print(summary(reports))
    return max(report.footer.exit_code for report in reports.values())


def capture_command(command: CaptureCommand) -> int:
    """Run `capture`; its exit code.

    Raises ValueError on a number of ranks that cannot be one.
    """
    check_writable(command.plot)
    if not command.ranks or min(command.ranks) < 2:
        raise ValueError(f"--ranks {' '.join(map(str, command.ranks))}: give numbers of 2 or more, as 4 64")
    wanted: list[tuple[int, capture.Way]] = [(P, way) for P in command.ranks for way in command.ways]
    found: list[capture.Measured] = []
    with progress() as bar:
        task = bar.add_task("capture", total=len(wanted))
        for P, way in wanted:
            bar.update(task, description=f"P = {P}, {way}")
            found.append(capture.measured(P, way, command.inductor, command.timeout))
            bar.advance(task)
            if command.json:
                print(msgspec.json.encode(found[-1]).decode(), flush=True)
    if not command.json:
        console = Page(160)
        versions = sorted({f"{m.framework} {m.version}" for m in found if m.version})
        console.print(capture.table(found), capture.LEGEND, "\n" + ", ".join(versions))
    if command.plot:
        capture.plot(found, command.plot)
        say(f"wrote {command.plot}")
    own = [m for m in found if m.way == "torch_impl"]
    return MATCH if all(m.permute_terms == m.permute_terms_backward == 1 for m in own) else MISMATCH


def see_doctor(command: DoctorCommand) -> int:
    """Run `doctor`; its exit code."""
    found = examine()
    problems = sum(bool(f.problem) for f in found)
    if command.json:
        print("\n".join(msgspec.json.encode(f).decode() for f in found))
    else:
        console = Page(120)
        console.print(doctor_table(found))
        console.print(f"\n{problems} of {len(found)} settings would make a comparison unfair")
    return MISMATCH if problems else MATCH


def publish(report: Report, as_json: bool, html: Path | None) -> int:
    """Print what was found, as lines of JSON or for people; its exit code."""
    if as_json:
        print("\n".join(records.lines(report)))
    else:
        print_report(Page(100), report)
    if html:
        html.write_text(page(report))
        say(f"wrote {html}")
    return report.footer.exit_code
