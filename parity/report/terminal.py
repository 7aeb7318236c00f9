"""A table for people."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from parity.blame import blame
from parity.compare import Check, Where
from parity.faults import Fault
from parity.trace import STAGES, Trace

SHORT = {
    "route": "1 route",
    "group_by_expert": "2 group",
    "exchange_counts": "3 counts",
    "send_tokens": "4 send",
    "to_expert_major": "5 to expert",
    "apply_experts": "6 experts",
    "to_rank_major": "7 to rank",
    "return_tokens": "8 return",
    "combine": "9 combine",
}


def table(checks: dict[str, list[Check]], traces: dict[str, list[Trace]]) -> Table:
    """One line per case: its shape, the nine stages on their own, the whole layer, and the closest call."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("case", "P", "T", "E", "K", "dtype", "C", "dropped", "stages 1-9", "layer", "closest", "s"):
        right = column in ("P", "T", "E", "K", "C", "dropped", "closest", "s")
        result.add_column(column, justify="right" if right else "left", no_wrap=True)
    for name, found in checks.items():
        case = traces[name][0].case
        strip = Text.assemble(*(_mark(c for c in found if c.mode == "isolated" and c.stage == s) for s in STAGES))
        end_to_end = _mark(c for c in found if c.mode == "e2e")
        seconds = sum(trace.seconds for trace in traces[name])
        closest = max((c.worst for c in found if not c.bitwise), default=math.nan)
        shown = f"{closest:.2f}" if closest < 1000 else ">999"
        result.add_row(
            name, str(case.ranks), str(case.tokens), str(case.experts), str(case.top_k), case.dtype, str(case.capacity),
            _dropped(traces[name]), strip, Text.assemble(end_to_end), shown, f"{seconds:.1f}",
        )  # fmt: skip
    return result


def _dropped(traces: list[Trace]) -> str:
    """Assignments that the static side dropped, over all ranks."""
    counts = [t.arrays["e2e/group_by_expert/dropped_in_all"] for t in traces if t.strategy == "static"]
    return str(sum(int(c) for c in counts[0])) if counts else "-"


def _mark(found) -> tuple[str, str]:
    found = list(found)
    if not found:
        return ("?", "red")
    return ("\N{CHECK MARK}", "green") if all(c.ok for c in found) else ("\N{BALLOT X}", "bold red")


def failures(checks: dict[str, list[Check]], traces: dict[str, list[Trace]], planted: str) -> Group:
    """For each case that failed: who is wrong, at which stage first, the worst row, and the command that repeats it."""
    lines: list[Text] = []
    for name, found in checks.items():
        verdict = blame(found)
        if verdict is None:
            continue
        check = verdict.check
        both = len(verdict.sides) > 1
        who = "both sides differ from the oracle" if both else f"{verdict.sides[0]} is wrong"
        how = "fed the oracle's input" if check.mode == "isolated" else "in the whole layer"
        lines.append(Text(f"\n{name}: {who} at stage {SHORT[verdict.stage]}, {verdict.direction}, {how}", "bold red"))
        lines.append(Text(f"  {describe(check)}"))
        lines += [Text(f"  failing rows: {shared}") for shared in check.common]
        lines.append(Text(f"  look at:  {verdict.function}"))
        lines.append(Text(f"  in all:   {verdict.arrays} comparisons differ"))
        side = f" --backend {verdict.sides[0]}" if not both and len(traces[name]) > 1 else ""
        fault = f" --fault {planted}" if planted else ""
        lines.append(Text(f"  repeat:   {traces[name][0].case.command()}{side}{fault}", "cyan"))
    return Group(*lines)


def describe(check: Check) -> str:
    """One failing array: what, worst row by identity, the values, and the tolerance that would have been needed."""
    what = f"{check.value} against {check.right}"
    if check.where is None:
        return f"{what}: {check.note}"
    if check.mode == "repeat":
        return f"{what}: {check.got:.0f} numbers differ between two runs on the same input"
    where = f"{check.failing} of {check.rows} rows; worst: {place(check.where)}"
    numbers = f"{check.got!r} instead of {check.expected!r}"
    if check.bitwise:
        return f"{what}: {where}\n  {numbers}; must be equal bit for bit"
    times = f"{check.error / check.allowed:.3g} times that" if check.allowed else "none at all"
    return f"{what}: {where}\n  {numbers}; off by {check.error:.3g}, allowed {check.allowed:.3g}: would need {times}"


def place(where: Where) -> str:
    """A row's identity in words."""
    names = ("rank", "source_rank", "token", "k", "expert", "slot")
    parts = [f"{n.replace('_', ' ')} {v}" for n in names if (v := getattr(where, n)) is not None]
    return ", ".join([*parts, *([f"index {where.index}"] if where.index else [])])


def print_report(
    console: Console,
    checks: dict[str, list[Check]],
    traces: dict[str, list[Trace]],
    parts: dict[str, float],
    planted: str = "",
) -> None:
    """The table, the failures, one line of summary and where the time went."""
    everything = [c for found in checks.values() for c in found]
    console.print(table(checks, traces))
    bad = [c for c in everything if not c.ok]
    if bad:
        console.print(failures(checks, traces, planted))
    rows, bitwise = sum(c.rows for c in everything), sum(c.rows for c in everything if c.bitwise)
    console.print(
        f"\n{len(checks)} cases, {len(everything)} comparisons, {rows:,} rows: {bitwise:,} bit for bit, "
        f"{rows - bitwise:,} within their own allowance"
    )
    console.print("time: " + ", ".join(f"{part} {s:.1f} s" for part, s in parts.items()))
    failed = sorted({c.case for c in bad})
    verdict = f"MISMATCH in {len(failed)} of {len(checks)} cases: {', '.join(failed)}" if bad else "match"
    console.print(Text(verdict, "bold red" if bad else "bold green"))


class Found(NamedTuple):
    """What came of planting a fault."""

    caught: bool
    side: str
    stage: str
    how: str


def fault_table(faults: Sequence[tuple[Fault, Found | None]]) -> Table:
    """The planted faults, and where they were run: caught, and blamed on the right side and stage?"""
    ran = any(found for _, found in faults)
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("fault", "stage", "preset", *(("caught", "blamed") if ran else ("what it does",))):
        result.add_column(column, no_wrap=column != "what it does")
    for fault, found in faults:
        if found is None:
            result.add_row(fault.name, SHORT[fault.stage], fault.preset, fault.sentence)
            continue
        right = (found.side, found.stage) == (fault.side, fault.stage)
        blamed = Text("right", "green") if right else Text(f"WRONG: {found.side} {found.stage}", "bold red")
        result.add_row(
            fault.name, SHORT[fault.stage], fault.preset,
            Text("yes", "green") if found.caught else Text("NO", "bold red"), blamed,
        )  # fmt: skip
    return result
