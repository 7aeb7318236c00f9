"""Run a backend on problems and collect its answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parity.oracle.problem import Problem
from parity.run.ending import temporary_folder
from parity.run.supervisor import Failure, Kept
from parity.run.trace import Trace

Array = np.ndarray


class Answer(NamedTuple):
    """A backend's answer to one problem."""

    trace: Trace | None  # None if it failed or does not compute the case
    why: str = ""  # why the trace is None

    @property
    def out(self) -> Array | None:
        """The output of all ranks' tokens, in order: [P * T, D]."""
        if self.trace is None:
            return None
        return np.concatenate(self.trace.arrays["e2e/combine/out"]).astype(np.float64)

    def gradient(self, name: str) -> Array | None:
        """The gradient `stage/dname`, concatenated over ranks."""
        found = self.trace.arrays.get(f"e2e/{name}") if self.trace else None
        return None if found is None else np.concatenate(found).astype(np.float64)

    @property
    def repeats(self) -> bool:
        """Whether a second run on the same inputs gave the same bits."""
        assert self.trace
        return not any(a.any() for n, per in self.trace.arrays.items() if n.startswith("repeat/") for a in per)


def ask(kept: Kept, problems: Mapping[str, Problem]) -> dict[str, Answer]:
    """A backend's answers to the problems, by name.

    Raises BackendError when it cannot run at all, or dies.
    """
    by_case = {problem.case.name: name for name, problem in problems.items()}
    with temporary_folder() as folder:
        for problem in problems.values():
            problem.save(folder / f"{problem.case.name}.problem")
        return {
            by_case[case]: _answer(folder / f"{case}.{kept.backend.name}.safetensors", failure)
            for case, failure in kept.run(folder, [problem.case for problem in problems.values()])
        }


def _answer(path: Path, failure: Failure | None) -> Answer:
    if failure:
        return Answer(None, str(failure))
    trace = Trace.load(path)
    return Answer(None, trace.not_supported) if trace.not_supported else Answer(trace)
