"""`python -m parity check`."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from parity.cases.case import PATTERN_RECORDED, Case, changed, flag
from parity.cases.from_checkpoint import case_of_checkpoint
from parity.cases.presets import MODELS, PLAIN, PRESETS, USUAL
from parity.cases.random_cases import PLAIN_OPTIONS, SHARED, random_cases
from parity.cases.recording import case_of_recording, recording_name
from parity.cli.report import publish
from parity.cli.shared import MATCH, Json, case_of_file, check_writable, not_a_terminal, say, working
from parity.explain.identify import explain_failures
from parity.judge.budget import growing, together
from parity.judge.engine import DiedError, run_cases
from parity.judge.records import Report
from parity.run import faults, ours
from parity.run.backend import Backend, Setting
from parity.run.inside import Hook
from parity.run.supervisor import gpus, require


def _flag(f: Field) -> tuple[str, Any, Any]:
    """A case's field as a flag that may be left out."""
    literal = get_origin(f.type) is Literal
    choices = ("True", "False") if f.type is bool else get_args(f.type) if literal else ()
    metavar = "{" + ",".join(choices) + "}" if choices else getattr(f.type, "__name__", "STR").upper()
    about = tyro.conf.arg(help=f.metadata["help"], metavar=metavar, help_behavior_hint=_default(f),
                           aliases=["--trace"] * (f.name == "recording"))  # fmt: skip
    given: Any = Annotated[f.type | None, about]  # type: ignore[operator]
    if choices or f.type in (int, float, str):
        given = Annotated[given, _parsed(_reader(f.type), choices, metavar)]
    return f.name, given, field(default=None)


def _default(f: Field) -> str:
    """What help says of a field's default."""
    other = " Presets and models have their own. --recording without a preset: all of its tokens, split over the ranks."
    return f"(default: {f.default})" + other * (f.name == "tokens")


def _reader(kind: Any) -> Callable[[str], Any]:
    """The function that parses a correctly spelt value of this type."""
    if kind is bool:
        return lambda text: text == "True"
    return kind if kind in (int, float) else str


def _parsed(read: Callable[[str], Any], choices: tuple[str, ...], metavar: str) -> Any:
    """The parser of a field's flag. By default, tyro would add None to the choices and reorder them."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=lambda texts: read(texts[0]), is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)], choices=choices or None,
    )  # fmt: skip


Flags = make_dataclass("Flags", [_flag(f) for f in fields(Case)])

PRESETS_HELP = f"""Presets to run. Without a preset or a field, all of these run: {", ".join(PLAIN)}.
So do {len(USUAL) - len(PLAIN)} cases pairs-01a and so on, which pair every two values of two fields that can go
together, except options of models. `all` adds {len(PRESETS) - len(USUAL)} cases options-01a and so on for those."""


BACKEND_HELP = f"""Backend to run (default: {" and ".join(b.name for b in ours.DEFAULT)}). Repeat the flag for several.
With one alone and --save, the other can run on another machine. Known: {
    ", ".join(f"{b.name} ({b.framework}, {b.layout})" for b in ours.BACKENDS.values())
}.
A layer of your own: mine.py or mine.py:name (see `python -m parity new`); mine.py@PYTHON runs it
in another environment, by its interpreter; package.module:name is a function or a record."""


MODEL_HELP = f"""Models whose MoE layer to check, at full width; on a CPU, give a smaller --width and --hidden:
{", ".join(MODELS)}."""


@dataclass
class Command:
    """Do PyTorch and JAX compute the same MoE layer, forward and backward, and is it the right one?

    Draws each case once, runs PyTorch as P processes and JAX on P devices, and compares every stage, the output and
    every gradient with an oracle in float64 and with each other.

    Exit code: 0 match, 1 mismatch, 2 wrong usage, 3 a framework is missing or crashed, 5 nothing was compared.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity check                        every preset
        python -m parity check zipf p8                two presets
        python -m parity check zipf --dtype bfloat16  a preset, changed
        python -m parity check --ranks 2 --experts 6 --capacity-factor 5/4
        python -m parity check --recording recording.safetensors
        python -m parity check --checkpoint Qwen3-30B-A3B --layer 3
        python -m parity check --backend mine.py      a layer of your own: python -m parity new mine.py
        python -m parity check --random 100 --seed 1 --dtype bfloat16
        python -m parity check --budget 60            random cases, larger and larger, for a minute
    """

    presets: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(help=PRESETS_HELP)] = ()
    case: Annotated[Any, tyro.conf.arg(name="", constructor=Flags)] = field(default_factory=Flags)
    from_file: Annotated[Path | None, tyro.conf.arg(name="case", metavar="FILE")] = None
    """Check the case in this file, which `python -m parity identify --write` wrote."""
    random: int = 0
    """Number of cases to draw at random, by --seed. Any field that is given is the same for all of them.
    For a layer of your own each has shapes of its own, and options of router, experts and capacity that are not given
    are the defaults.
    Every twenty in a row share their shapes, which JAX compiles once, and differ in routing."""
    budget: float = 0
    """Seconds, roughly, to spend on random cases: first of 16 tokens per rank, then of 64, 256 and so on.
    A size runs only as many cases as are likely to end in time. Prints a line for each size."""
    backend: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help=BACKEND_HELP)] = ()
    model: Annotated[tuple[str, ...], tyro.conf.arg(help=MODEL_HELP)] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to run on. cuda: one GPU per rank, PyTorch over NCCL, if there are enough GPUs; otherwise the ranks share
    them, over gloo."""
    jax_ranks: Literal["auto", "shard_map", "processes", "vmap"] = "auto"
    """Placement of JAX's ranks. shard_map: one device per rank, in one process. processes: one process per rank.
    vmap: all ranks on one device. auto: shard_map if there are enough devices, otherwise vmap."""
    timeout: float = 60
    """Seconds without progress, all ranks asleep, after which a case ends and says which rank hangs where.
    A case also ends after ten times as many seconds of CPU time without progress.
    Time that a rank spends waiting for a CPU does not count."""
    between: bool = False
    """Judge backends by each other, for example when both have something that the oracle lacks.
    The oracle's verdict is printed beside theirs."""
    coordinator: str = ""
    """HOST:PORT at which several JAX processes meet; `auto` takes it from the cluster (SLURM, Kubernetes).
    Start this command in each process: JAX's ranks are the devices of all processes, and the first one reports."""
    processes: int | None = None
    """Number of JAX processes that meet at --coordinator. Default: as the cluster says."""
    process: int | None = None
    """Index of this JAX process, from 0. Default: as the cluster says."""
    record: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """MODULE=STAGE/VALUE, as experts.down_proj=apply_experts/y: compare what this module of your PyTorch layer returns.
    MODULE is the module's name within the one that is called, or its class; * stands for anything.
    gate[1]=route/expert_id takes the second of several values; :grouped at the end gives the order of rows."""
    save: Path | None = None
    """Folder to keep the traces in, for `python -m parity compare`."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, the default when output is not a terminal; --no-json prints the table."""
    html: Path | None = None
    """File to write the report to as well, as an HTML page that loads nothing from elsewhere."""
    explain: bool = True
    """Find out why a layer of your own fails, if it gives no stages, as `python -m parity identify` would.
    Asks each such layer in the first case that it fails, unless that is of real size."""
    fault: str | None = None
    """Plant this fault (see `python -m parity faults`)."""


def run(command: Command) -> int:
    """Run `check`; its exit code."""
    backends = chosen_backends(command.backend)
    cases = chosen_cases(command, of_ones_own=any(backend.layout == "opaque" for backend in backends))
    if not command.timeout > 0:
        raise ValueError(f"--timeout is {command.timeout:g}: it must be positive")
    check_writable(command.html)
    if command.save:
        command.save.mkdir(parents=True, exist_ok=True)
    if command.device == "cuda" and not gpus():
        raise ValueError("--device cuda: there is no NVIDIA GPU here; `python -m parity doctor` says what there is")
    fault = faults.find(command.fault) if command.fault else None
    names = [backend.name for backend in backends]
    if fault and fault.backend not in names:
        raise ValueError(
            f"--fault {fault.name} is a fault of {fault.backend}, which --backend {' '.join(names)} does not run"
        )
    group_size = torchrun_size() if any(backend.framework == "torch" for backend in backends) else None
    if group_size is not None:
        if fault and ours.BACKENDS[fault.backend].framework == "torch":
            raise ValueError(f"--fault {fault.name} cannot be planted under torchrun: start without torchrun")
        cases = of_group(cases, group_size, picked=bool(command.presets))
    jax_ranks = ranks_of_jax(command.jax_ranks, command.device, max(case.ranks for case in cases))
    for text in command.record:
        Hook.parse(text)
    if command.record and not any(backend.run.startswith("parity.run.own_in_torch") for backend in backends):
        raise ValueError("--record is for a layer of your own in PyTorch: name its file with --backend")
    if command.coordinator and (group_size is not None or not any(b.framework == "jax" for b in backends)):
        raise ValueError("--coordinator is for a backend in JAX, without torchrun: name one with --backend")
    if command.between and len(backends) < 2:
        raise ValueError(f"--between needs two backends, and {backends[0].name} is one: name another with --backend")
    setting = Setting(
        command.device, jax_ranks, command.timeout, record=command.record, coordinator=command.coordinator,
        processes=command.processes, process=command.process,
    )  # fmt: skip
    join = "jax" if command.coordinator else "torch" if group_size is not None else ""
    for backend in backends:
        for reason in filter(None, (backend.refusal(case, setting) for case in cases)):
            raise ValueError(f"--backend {backend.name}: {reason}")
    require_of(backends)

    def run_these(cases: list[Case]) -> Report | None:
        return run_cases(cases, backends, setting, fault=fault, save=command.save, join=join, between=command.between)

    try:
        report = in_time(command, run_these) if command.budget else run_these(cases)
    except DiedError as died:
        publish(died.report, command.json, command.html)
        raise
    if report is None:
        return MATCH
    if command.explain and not join:
        with working("") as tell:
            explain_failures(report, backends, setting, tell)
    return publish(report, command.json, command.html)


def in_time(command: Command, run_these: Callable[[list[Case]], Report | None]) -> Report:
    """Run random cases of more and more tokens, and print a line for each size.

    Raises ValueError when no case exists with the fields that were given.
    """

    def run_all(cases: list[Case]) -> Report:
        report = run_these(cases)
        assert report
        return report

    changes, reached = changes_of(command.case), []
    for one in growing(command.budget, changes.pop("seed", 0), changes, run_all):
        say(str(one))
        reached.append(one)
    return together(reached)


def chosen_backends(asked: Sequence[str]) -> list[Backend]:
    """The backends named, each once, in the order of this project's and then as asked.

    Raises ValueError on an unknown name, and on a name that two backends share.
    """
    asked = asked or ("both",)
    found = [b for name in asked for b in (ours.DEFAULT if name == "both" else [ours.find(name)])]
    order = {name: i for i, name in enumerate(ours.BACKENDS)}
    if double := [b.name for b in found for other in found if b.name == other.name and b != other]:
        raise ValueError(f"two backends are called {double[0]}: files and the report need different names")
    by_name = {backend.name: backend for backend in sorted(found, key=lambda b: order.get(b.name, len(order)))}
    return list(by_name.values())


def require_of(backends: Sequence[Backend]) -> None:
    """Raise MissingError naming all packages that these backends need and that are not installed here."""
    needed = [package for backend in backends if not backend.python for package in backend.needs]
    require(needed, "or name another --backend only")


def chosen_cases(command: Command, of_ones_own: bool = False) -> list[Case]:
    """The cases of a command line; random ones for a layer of one's own have no options but those that are given.

    Raises ValueError on an unknown preset or a case that cannot exist.
    """
    changes = changes_of(command.case)
    if command.from_file:
        if command.presets or command.model or command.random:
            raise ValueError(
                f"--case {command.from_file} is a case of its own: leave out presets, --model and --random"
            )
        return [changed(case_of_file(command.from_file), changes)]
    if command.random < 0:
        raise ValueError(f"--random is {command.random}: it cannot be negative")
    if command.budget:
        if command.random or "tokens" in changes or command.coordinator or torchrun_size() is not None:
            what = "--random, --tokens, --coordinator and torchrun"
            raise ValueError(f"--budget chooses how many cases and tokens: leave out {what}")
        if not command.budget > 0:
            raise ValueError(f"--budget is {command.budget:g}: it must be positive")
    if command.random or command.budget:
        if command.presets or "name" in changes or "recording" in changes:
            raise ValueError("--random and --budget draw cases: leave out presets, --name and --recording")
        plain, shared = (PLAIN_OPTIONS, 1) if of_ones_own else ({}, SHARED)
        return random_cases(command.random or SHARED, changes.pop("seed", 0), plain | changes, shared=shared)
    return named_cases(command.presets, command.case, command.model)


def changes_of(flags: Any) -> dict[str, Any]:
    """The fields that were given. Raises ValueError on a --name that cannot be part of a file name."""
    changes = {name: value for name, value in vars(flags).items() if value is not None}
    if changes.get("capacity_factor") == "none":
        changes["capacity_factor"] = None
    if not re.fullmatch(r"[\w.+-]+", changes.get("name", "custom")):
        raise ValueError(f"--name is {changes['name']!r}: it names files, so use letters, digits and .+-_ only")
    return changes


def named_cases(presets: Sequence[str], flags: Any, models: Sequence[str]) -> list[Case]:
    """The presets or models named, with every field that was given changed; or all presets; or one case of its own.

    Raises ValueError on an unknown preset or a case that cannot exist.
    """
    changes = changes_of(flags)
    if models:
        if presets:
            raise ValueError(f"--model names cases of its own: leave out {', '.join(presets)}")
        unknown = [name for name in models if name not in MODELS]
        if unknown:
            raise ValueError(f"no model is called {', '.join(unknown)}. There are: {', '.join(MODELS)}")
        return [changed(MODELS[name], changes) for name in models]
    unknown = [name for name in presets if name not in PRESETS and name != "all"]
    if unknown:
        raise ValueError(f"no preset is called {', '.join(unknown)}. There are: {', '.join(PRESETS)}")
    named = [name for name in presets if name != "all"]
    recorded = [changes.get("recording"), *(PRESETS[name].recording for name in presets if name in PRESETS)]
    if "pattern" in changes and any(recorded):
        raise ValueError(PATTERN_RECORDED.format(changes["pattern"], next(filter(None, recorded))))
    names = list(PRESETS) if "all" in presets else named if named or changes else USUAL
    if "checkpoint" in changes:
        if names:
            raise ValueError(f"--checkpoint is a case of its own: leave out {', '.join(names)}")
        return [case_of_checkpoint(changes)]
    if not names and "recording" in changes:
        return [_recorded(changes)]
    if not names:
        return [Case(**changes)]
    return [changed(PRESETS[name], changes) for name in names]


def _recorded(changes: dict[str, Any]) -> Case:
    """The case of a recording. Raises ValueError on a flag that says something else than the file does."""
    alone = case_of_recording(Case(ranks=1, tokens=0, recording=changes["recording"]))
    ranks = changes.get("ranks", Case().ranks)
    try:
        fixed = {"name": recording_name(changes["recording"]), "ranks": ranks, "tokens": alone.tokens // max(ranks, 1)}
        case = replace(alone, **(fixed | changes))
    except ValueError as error:
        raise ValueError(f"--recording {alone.recording}: {error}") from error
    if (first := case.ranks * case.tokens) < alone.tokens:
        say(f"{case.name}: the first {first:,} of {alone.tokens:,} recorded tokens are checked, as --tokens asks")
    held = case_of_recording(case)
    for name in changes:
        if getattr(held, name) != getattr(case, name):
            raise ValueError(f"--{flag(name)} is {changes[name]}, but the recording has {getattr(held, name)}")
    return case


def ranks_of_jax(asked: str, device: str, most: int) -> str:
    """How JAX has its ranks: as asked, or a device each where there are enough."""
    if asked != "auto":
        return asked
    return "shard_map" if device == "cpu" or gpus() >= most else "vmap"


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
