"""Who is wrong, where first, and what to look at."""

import msgspec

from parity.judge.compare import Check
from parity.run.backend import BACKENDS
from parity.run.trace import STAGES

# Where each stage is written, the same in both packages.
FILES = {
    "route": "routing.py",
    "group_by_expert": "grouping.py",
    "exchange_counts": "exchange.py",
    "send_tokens": "exchange.py",
    "to_expert_major": "layout.py",
    "apply_experts": "experts.py",
    "to_rank_major": "layout.py",
    "return_tokens": "exchange.py",
    "combine": "grouping.py",
}


class Blame(msgspec.Struct, omit_defaults=True):
    """One case's verdict: side(s) and stage that differ first, and the check that shows it."""

    case: str
    sides: list[str]
    stage: str
    direction: str  # forward or backward
    function: str
    check: Check
    arrays: int  # how many arrays differ in all


def is_backward(check: Check) -> bool:
    """Whether the array is a gradient."""
    return check.value.startswith("d") and not check.value.startswith("dropped")


def blame(checks: list[Check]) -> Blame | None:
    """The first divergence of one case, or None when all match.

    A stage fed the oracle's input is judged alone, so the first such stage to fail, in order, is where the
    fault is. Only when all of them match does the whole layer speak: its values in forward order, then its
    gradients from the output back, then what two runs of it did not have in common.
    """
    bad = [check for check in checks if not check.ok]
    if not bad:
        return None

    def order(check: Check) -> tuple[int, int, bool, float]:
        stage = STAGES.index(check.stage)
        phase = {"isolated": 0, "e2e": 1, "repeat": 3}[check.mode]
        backward = is_backward(check)
        if check.mode == "e2e" and backward:
            return 2, -stage, check.right != "oracle", -check.worst
        return phase, stage, check.right != "oracle" or backward, -check.worst

    first = min(bad, key=order)
    same_place = [c for c in bad if (c.mode, c.stage) == (first.mode, first.stage) and c.right not in BACKENDS]
    sides = sorted({c.left for c in same_place}) or [first.left, first.right]
    return Blame(
        first.case, sides, first.stage, "backward" if is_backward(first) else "forward",
        " and ".join(f"{folder(side, first.stage)}/{FILES[first.stage]}: {first.stage}" for side in sides), first,
        len(bad),
    )  # fmt: skip


def folder(side: str, stage: str) -> str:
    """Where a side keeps a stage: what a corner does as its framework's other one does is written there."""
    framework, _, corner = side.partition("-")
    shared = not corner or stage == "route" or (side, stage) == ("jax-dynamic", "apply_experts")
    return f"{framework}_impl" if shared else f"{framework}_impl/{corner}"
