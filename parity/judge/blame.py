"""Which backend is wrong, at which stage first, and which source to look at."""

from collections.abc import Mapping

import msgspec

from parity.judge.compare import Check
from parity.oracle.quantities import QUANTITIES, STAGES
from parity.run.backend import Backend


class Blame(msgspec.Struct, omit_defaults=True, tag_field="kind", tag="blame"):
    """One case's verdict: backend(s) and stage that differ first, and the check that shows it."""

    case: str
    """The case's name."""
    backends: list[str]
    """The backends that are wrong."""
    stage: str
    """The first stage that differs."""
    direction: str
    """forward or backward."""
    function: str
    """Where that stage is written: file and function."""
    check: Check
    """The comparison that shows it."""
    arrays: int
    """How many arrays differ in all."""


def is_backward(check: Check) -> bool:
    """Whether the array is a gradient."""
    return QUANTITIES[f"{check.stage}/{check.value}"].backward


def blame(checks: list[Check], backends: Mapping[str, Backend]) -> Blame | None:
    """The first divergence of one case, or None when all match.

    A stage fed the oracle's input is judged alone, so the first such stage to fail, in order, is where the
    fault is. Only when all of them match is the whole layer judged: its values in forward order, then its
    gradients from the output back, then the same for a second step beside the first, then differences between two runs.
    """
    bad = [check for check in checks if not check.ok]
    if not bad:
        return None

    def order(check: Check) -> tuple[int, int, bool, float]:
        stage = STAGES.index(check.stage)
        phase = {"isolated": 0, "e2e": 1, "second": 3, "repeat": 5}[check.mode]
        backward = is_backward(check)
        if check.mode != "isolated" and backward:
            return phase + 1, -stage, check.right != "oracle", -check.worst
        return phase, stage, check.right != "oracle" or backward, -check.worst

    first = min(bad, key=order)
    same_place = [c for c in bad if (c.mode, c.stage) == (first.mode, first.stage) and c.right not in backends]
    wrong = sorted({c.left for c in same_place}) or [first.left, first.right]
    written = " and ".join(_place(backends[name], first) for name in wrong)
    direction = "backward" if is_backward(first) else "forward"
    return Blame(first.case, wrong, first.stage, direction, written, first, len(bad))


def _place(backend: Backend, check: Check) -> str:
    """The source to look at: the stage's own, or, when the stage alone is right, the layer's, which feeds the stage."""
    return backend.written("layer" if backend.alone(check.stage) and check.mode != "isolated" else check.stage)
