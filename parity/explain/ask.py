"""Give a backend problems, and take what it makes of them."""

import atexit
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parity.oracle.problem import Problem
from parity.run.backend import Backend, BackendError, Setting
from parity.run.supervisor import Failure, Kept
from parity.run.trace import Trace

Array = np.ndarray

KEPT = Kept()
atexit.register(KEPT.end)


class Answer(NamedTuple):
    """What a backend made of one problem."""

    trace: Trace | None  # None where it failed, or does not compute the case
    why: str = ""  # that is so

    @property
    def out(self) -> Array | None:
        """The output of all ranks' tokens, in order: [P * T, D]."""
        if self.trace is None:
            return None
        return np.concatenate(self.trace.arrays["e2e/combine/out"]).astype(np.float64)

    def gradient(self, name: str) -> Array | None:
        """The gradient `stage/dname`, those of all ranks one after the other."""
        found = self.trace.arrays.get(f"e2e/{name}") if self.trace else None
        return None if found is None else np.concatenate(found).astype(np.float64)

    @property
    def repeats(self) -> bool:
        """Whether a second run on the same inputs gave the same bits."""
        assert self.trace
        return not any(a.any() for n, per in self.trace.arrays.items() if n.startswith("repeat/") for a in per)


def ask(
    backend: Backend, problems: Mapping[str, Problem], setting: Setting, home: Path | None = None
) -> dict[str, Answer]:
    """Run the problems, from the folder `home` if it is another one; answers by name.

    The process that does waits for the next problems: importing a framework takes longer than most of them.

    Raises BackendError when the backend cannot run at all, or dies.
    """
    by_case = {problem.case.name: name for name, problem in problems.items()}
    found: dict[str, Answer] = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        folder = Path(temporary)
        for problem in problems.values():
            problem.save(folder / f"{problem.case.name}.problem")
        cases = [problem.case for problem in problems.values()]
        with closing(KEPT.run(folder, home or Path.cwd(), backend, cases, setting)) as running:
            for case, failure in running:
                if failure and not failure.case:
                    raise BackendError(backend.name, str(failure))
                found[by_case[case]] = _answer(folder / f"{case}.{backend.name}.safetensors", failure)
    return found


def _answer(path: Path, failure: Failure | None) -> Answer:
    if failure:
        return Answer(None, str(failure))
    trace = Trace.load(path)
    return Answer(None, trace.not_supported) if trace.not_supported else Answer(trace)


def lacking(answers: Mapping[str, Answer], names: Sequence[str]) -> str:
    """Why one of these was not answered, or an empty string."""
    return next((answers[name].why for name in names if answers[name].trace is None), "")
