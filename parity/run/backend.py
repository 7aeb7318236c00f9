"""A backend is an implementation under check: one record, from which all else about it is derived."""

import re
import shlex
from collections.abc import Iterable
from importlib import import_module
from typing import Any, get_args

import msgspec

from parity.cases.case import Case
from parity.oracle.quantities import ALWAYS, OUTSIDE, STAGES, quantity_of
from parity.oracle.rows import Layout


class Setting(msgspec.Struct, frozen=True):
    """How a backend is run: the device, how JAX maps ranks, the timeout, and which part of the cases."""

    device: str = "cpu"
    jax_ranks: str = "shard_map"
    timeout: float = 60.0  # seconds
    share: int = 0
    shares: int = 1
    coordinator: str = ""  # HOST:PORT of the JAX processes that this one joins; auto: as the cluster says
    processes: int | None = None  # how many processes there are, and which this one is; None: as the cluster says
    process: int | None = None
    record: tuple[str, ...] = ()  # which modules' return values to record, as in `check --record`


class Backend(msgspec.Struct, frozen=True):
    """An implementation under check. Plain data, so that a process, a trace and a report carry it whole.

    Functions are named, as `package.module:name`, and imported where they are called.
    """

    name: str
    """Its name in tables and files."""
    framework: str
    """torch, jax, or another."""
    layout: Layout
    """How it lays out rows: dynamic, static, ragged, or opaque where only output and gradients are seen."""
    provides: tuple[str, ...]
    """Quantities, as mode/stage/value, that a run of it must hold; nothing else is compared."""
    files: dict[str, str] = {}
    """File and function of each stage, by stage; "" stands for all others."""
    needs: tuple[str, ...] = ()
    """Packages that it imports."""
    run: str = ""
    """Function (Backend, folder, Setting), as package.module:name, that runs the problems in the folder, saves traces
    and says which is done."""
    stages: str = ""
    """The module of its stages, for `run`."""
    refuses: str = ""
    """Function (Case, Setting) that says why it cannot run a case, or an empty string."""
    python: str = ""
    """The interpreter that runs it, where that is another one."""
    asked: str = ""
    """What `--backend` calls it, where that is not its name."""
    takes: tuple[str, ...] = ()
    """Arguments that a layer in a file is given; empty for one that is given everything."""

    def __post_init__(self) -> None:
        """Raises ValueError on a name that cannot be, and on a quantity, a layout or a stage that there is not."""
        if not re.fullmatch(r"[\w.+-]+", self.name) or self.name in ("oracle", "both"):
            raise ValueError(
                f"a backend cannot be called {self.name!r}: its name is part of file names, so use letters, digits "
                "and .+-_ only; oracle and both are taken"
            )
        if self.layout not in get_args(Layout):
            raise ValueError(
                f"backend {self.name} has layout {self.layout!r}: it must be one of {', '.join(get_args(Layout))}"
            )
        if not self.provides:
            raise ValueError(f"backend {self.name} provides nothing to compare: list what a run holds in `provides`")
        for name in self.provides:
            try:
                quantity = quantity_of(name)
            except ValueError as error:
                raise ValueError(f"backend {self.name}: {error}") from error
            # Rows of a layer whose layout is not known come with their numbers.
            if (self.layout if self.layout != "opaque" else "dynamic") not in quantity.layouts:
                raise ValueError(
                    f"backend {self.name} provides {name}, which layout {self.layout} does not have: only "
                    f"{', '.join(quantity.layouts)} have it"
                )
        if unknown := self.files.keys() - {*STAGES, "layer", ""}:
            raise ValueError(
                f"backend {self.name}: `files` has {', '.join(sorted(unknown))}, which is not a stage: there are "
                f"{', '.join(STAGES)}, layer, and an empty name for the rest"
            )

    def written(self, stage: str) -> str:
        """Where a stage is written: file and function, or the file of all that are not named; of "layer", its file."""
        if stage in self.files:
            return self.files[stage] if stage == "layer" else f"{self.files[stage]}: {stage}"
        return self.files.get("", self.name)

    def refusal(self, case: Case, setting: Setting) -> str:
        """Why this backend cannot run a case, or an empty string."""
        return resolve(self.refuses)(case, setting) if self.refuses else ""

    def providing(self, names: Iterable[str]) -> "Backend":
        """The same backend, also providing these quantities. What a layer records inside is known once it has run."""
        return msgspec.structs.replace(self, provides=tuple(dict.fromkeys((*self.provides, *names))))

    @property
    def flag(self) -> str:
        """What asks for it on a command line, as a shell takes it."""
        return f"--backend {shlex.quote(self.asked or self.name)}"

    def alone(self, stage: str) -> bool:
        """Whether a stage can be judged on its own, fed the oracle's input."""
        return any(name.startswith(f"isolated/{stage}/") for name in self.provides)

    def judged(self, stage: str) -> str:
        """The mode in which a stage is judged: on its own, or by what a layer gives from its inside; empty for none."""
        if self.alone(stage):
            return "isolated"
        inside = (name for name in {*self.provides} - {*OUTSIDE} if name.startswith(f"e2e/{stage}/"))
        return "e2e" if self.layout == "opaque" and any(not quantity_of(name).backward for name in inside) else ""

    def shows(self, stage: str) -> bool:
        """Whether a stage can be judged, alone or by what it returns within the layer."""
        declared = [name for name in self.provides if quantity_of(name).stage == stage]
        return self.alone(stage) or any(not quantity_of(name).backward for name in declared)

    @property
    def unseen(self) -> str:
        """What of it is not compared, in words: "2 gradients, stages 2-8"; empty where that is nothing."""
        return _words({*ALWAYS} - {*self.provides}, [stage for stage in STAGES if not self.shows(stage)])

    def seen(self) -> str:
        """What of it is compared and what not, in words: "compared: output, 5 gradients; not seen: stages 1-8"."""
        said = ["combine"] * (OUTSIDE[0] in self.provides)  # the output is what it makes
        stages = [stage for stage in STAGES if self.shows(stage) and stage not in said]
        compared = _words({*OUTSIDE} & {*self.provides}, stages)
        return f"compared: {compared}" + f"; not seen: {self.unseen}" * (self.unseen != "")


def _words(outside: set[str], stages: list[str]) -> str:
    """Of the layer's output and gradients, and of stages: "output, 5 gradients, stages 1-8"."""
    gradients = sum(quantity_of(name).backward for name in outside)
    parts = ["output"] * (OUTSIDE[0] in outside)
    parts += [f"{gradients} gradient{'s' * (gradients != 1)}"] * (gradients > 0)
    parts += [f"stage{'s' * (len(stages) != 1)} {spans({STAGES.index(stage) + 1 for stage in stages})}"] * bool(stages)
    return ", ".join(parts)


def spans(numbers: set[int]) -> str:
    """{1, 3, 4, 5} as "1, 3-5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def resolve(name: str) -> Any:
    """What `package.module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


class BackendError(Exception):
    """A backend's package is missing, or its run ended in error: whose, and in which stage, where that is known."""

    def __init__(self, backend: str, message: str) -> None:
        super().__init__(message)
        self.backend = backend
        place = re.search(r" in (\w+) of case ", message)
        self.stage = place[1] if place else ""


class MissingError(BackendError):
    """A package that the backend needs is not installed."""
