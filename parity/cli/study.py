"""`python -m parity study`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from parity.cases.case import Case
from parity.cases.presets import MODELS, PRESETS
from parity.cases.recording import case_of_recording, load_recording, recording_name
from parity.cli.shared import MATCH, Json, Page, case_of_file, not_a_terminal, say
from parity.judge.engine import progress
from parity.run.ours import FRAMEWORKS
from parity.run.supervisor import require
from parity.study.engine import run_study
from parity.study.page import print_study, write
from parity.study.part import Asked
from parity.study.sweep import recorded_case


def several(name: str, *aliases: str) -> Any:
    """How help shows an argument that takes any number of values, by default none."""
    return tyro.conf.arg(metavar=f"[{name} ...]", help_behavior_hint="", aliases=aliases)


@dataclass
class Command:
    """What does a static capacity drop, pad and save, for your shapes and routing?

    A bin is the rows that each rank reserves for one rank, or for one expert, that it sends to. The study sweeps
    capacity factor, kind of bin, priority, skew and shapes. It simulates real models on up to 512 ranks, and runs one
    small dispatch in both frameworks for the page. It writes tables, plots and an HTML page, and needs no GPU.

    Exit code: 0 measured, 2 wrong usage, 3 a framework is missing.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity study                             about a minute on two cores
        python -m parity study --quick                     6 s: fewer shapes and steps, no small dispatch
        python -m parity study --recording recording.safetensors --ranks 8 --tokens 1024
        python -m parity study zipf p8                     the routing of these presets, not the plan's
        python -m parity study --recording recording.safetensors --model deepseek-v3    and simulate that model
        python -m parity study --model deepseek-v3 --steps 5000
        python -m parity study --case case.json            the capacity of a layer, as `identify --write` found it
        python -m parity study --learn 3                   and train with every kind of capacity, three seeds
    """

    presets: Annotated[tyro.conf.Positional[tuple[str, ...]], several("PRESET")] = ()
    """Sweep the routing of these presets, drawn with 8 seeds each."""
    case: Path | None = None
    """File with a case, which `identify --write FILE` wrote, whose capacity to try on every routing too."""
    recording: Annotated[tuple[str, ...], several("FILE", "--trace")] = ()
    """Recordings of your own routing, shown in place of the one that comes with the project (docs/recordings.md)."""
    ranks: int | None = None
    """Number of ranks. Default: 4 in the sweep; 8, 64 and one rank per expert in the simulation of models.
    For a recording, give the number that your training has."""
    tokens: int | None = None
    """Tokens on each rank. Default: 128 in the sweep, 4096 in the simulation of models.
    For a recording, the default leaves eight steps: give the number that your training step has on a rank."""
    quick: bool = False
    """Run fewer shapes and steps, and no small dispatch: 6 s on two cores."""
    model: Annotated[tuple[str, ...], several("MODEL")] = ()
    """Models to simulate. Default: all of them; none where presets or a recording are given.
    A recording's own layer is always simulated, as its steps are few."""
    steps: int | None = None
    """Steps of the simulation. Default: 200 for a recording; up to 1000 for models, and fewer for large groups."""
    learn: int = 0
    """Number of seeds from which to train the byte-level model with every kind of capacity: some minutes per seed."""
    learn_steps: int = 200
    """Steps of each training run."""
    dispatch: bool = True
    """Run the page's small dispatch, which needs both frameworks."""
    out: Path = Path("study")
    """Folder for index.html, plots and study.jsonl."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, those of study.jsonl, the default when output is not a terminal; --no-json prints the tables."""


def run(command: Command) -> int:
    """Run `study`; its exit code."""
    for kind, asked, known in (("preset", command.presets, PRESETS), ("model", command.model, MODELS)):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"no {kind} is called {', '.join(unknown)}. There are: {', '.join(known)}")
    for name in ("ranks", "tokens", "steps", "learn_steps"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if command.learn < 0 or (command.learn and command.learn_steps < 20):
        raise ValueError(f"--learn {command.learn} --learn-steps {command.learn_steps}: at least 0 seeds and 20 steps")
    if command.presets and command.recording != Command.recording:
        raise ValueError(
            f"{' '.join(command.presets)} with --recording {' '.join(command.recording)}: swept are presets or "
            "recordings, so leave out one"
        )
    names = [recording_name(recording) for recording in command.recording]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two recordings are called {', '.join(sorted(twice))}: they could not be told apart")
    if command.presets and (command.ranks or command.tokens):
        raise ValueError("presets have ranks and tokens of their own: leave out --ranks and --tokens, or the presets")
    capacity = case_of_file(command.case) if command.case else None
    if capacity and capacity.capacity_factor is None:
        raise ValueError(f"--case {command.case} has no capacity: nothing is dropped")
    dispatch = command.dispatch and not command.quick
    if dispatch or command.learn:
        without = ["--no-dispatch"] * dispatch + ["no --learn"] * bool(command.learn)
        require(FRAMEWORKS, f"or say {' and '.join(without)}: the rest needs no framework", trying=True)
    models = command.model or (() if command.presets or command.recording else tuple(MODELS))
    wanted = Asked(
        [PRESETS[name] for name in command.presets], command.recording, models, command.ranks, command.tokens,
        command.steps, command.quick, command.learn, command.learn_steps, dispatch, capacity,
    )  # fmt: skip
    check(wanted)
    command.out.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        found = run_study(wanted, bar)
    paths = write(found, command.out)
    if command.json:
        print("\n".join(found.lines()))
    else:
        print_study(Page(120), found)
    say(f"wrote {', '.join(map(str, paths))}")
    return MATCH


def check(asked: Asked) -> None:
    """Raise ValueError, before anything runs, when a recording does not fit the ranks and tokens, or has wrong ids."""
    for recording in asked.recordings:
        load_recording(case_of_recording(Case(ranks=1, tokens=0, recording=recording)))
        recorded_case(recording, asked.ranks, asked.tokens)
