"""A backend is an implementation under check: one record, from which everything else about it derives."""

import re
from importlib import import_module
from typing import Any

import msgspec

from parity.cases.case import Case
from parity.oracle.quantities import STAGES, quantity_of
from parity.oracle.rows import Layout


class Setting(msgspec.Struct, frozen=True):
    """How a backend is run: where, how JAX has its ranks, how long nothing may happen, and which part of the cases."""

    device: str = "cpu"
    jax_ranks: str = "shard_map"
    timeout: float = 60.0  # seconds
    share: int = 0
    shares: int = 1


class Backend(msgspec.Struct, frozen=True):
    """An implementation under check. Plain data, so that a process, a trace and a report carry it whole.

    Functions are named, as `package.module:name`, and imported where they are called.
    """

    name: str
    framework: str
    layout: Layout
    provides: tuple[str, ...]  # quantities, mode/stage/value: each must be in a run, and nothing else is looked at
    files: dict[str, str] = {}  # where each stage is written, by stage; "" for all that are not named
    needs: tuple[str, ...] = ()  # packages to import
    run: str = (
        ""  # function (Backend, folder, Setting): runs the problems in the folder, saves traces, says which is done
    )
    stages: str = ""  # for `run`: the stages of this backend
    refuses: str = ""  # function (Case, Setting): why it cannot run a case, or ""

    def __post_init__(self) -> None:
        """Raises ValueError on a quantity or a stage that there is not."""
        for name in self.provides:
            quantity_of(name)
        if unknown := self.files.keys() - {*STAGES, ""}:
            raise ValueError(f"backend {self.name} says where {', '.join(unknown)} is written: stages are {STAGES}")

    def written(self, stage: str) -> str:
        """Where a stage is written."""
        return f"{self.files.get(stage) or self.files.get('', self.name)}: {stage}"

    def refusal(self, case: Case, setting: Setting) -> str:
        """Why this backend cannot run a case, or an empty string."""
        return resolve(self.refuses)(case, setting) if self.refuses else ""

    def seen(self) -> str:
        """What of it is compared, in words: "compared: output, 5 gradients; not seen: stages 2-8"."""
        seen = [(name.split("/")[0], quantity_of(name)) for name in self.provides]
        whole = [quantity for mode, quantity in seen if mode == "e2e"]
        gradients = sum(quantity.backward for quantity in whole)
        inside = {STAGES.index(q.stage) + 1 for mode, q in seen if mode == "isolated" or not q.backward}
        parts = ["output"] * any(q.name == "combine/out" for q in whole)
        parts += [f"{gradients} gradient{'s' * (gradients != 1)}"] * (gradients > 0)
        unseen = spans(set(range(1, len(STAGES) + 1)) - inside)
        return "compared: " + ", ".join(parts) + (f"; not seen: stages {unseen}" if unseen else "")


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
