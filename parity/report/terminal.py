"""A table for people."""

import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from parity.compare import Check, Where
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


def table(checks: dict[str, list[Check]], traces: dict[str, list[Trace]], seconds: dict[str, float]) -> Table:
    """One line per case: its shape, the nine stages fed the oracle's input, the whole layer, and the closest call."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("case", "P", "T", "E", "K", "dtype", "C", "dropped", "stages 1-9", "layer", "closest", "s"):
        right = column in ("P", "T", "E", "K", "C", "dropped", "closest", "s")
        result.add_column(column, justify="right" if right else "left", no_wrap=True)
    for name, found in checks.items():
        case = traces[name][0].case
        strip = Text.assemble(*(_mark(c for c in found if c.mode == "isolated" and c.stage == s) for s in STAGES))
        end_to_end = _mark(c for c in found if c.mode == "e2e")
        closest = max((c.worst for c in found if not c.bitwise), default=math.nan)
        result.add_row(
            name, str(case.ranks), str(case.tokens), str(case.experts), str(case.top_k), case.dtype, str(case.capacity),
            _dropped(traces[name]), strip, Text.assemble(end_to_end), f"{closest:.2f}", f"{seconds[name]:.1f}",
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


def failures(checks: Sequence[Check], traces: dict[str, list[Trace]]) -> Group:
    """For each case that failed: the first stage to diverge, the worst row, and the command that repeats it."""
    lines = []
    for name in dict.fromkeys(c.case for c in checks if not c.ok):
        bad = [c for c in checks if c.case == name and not c.ok]
        first = min(bad, key=lambda c: (c.mode != "isolated", STAGES.index(c.stage), c.right != "oracle"))
        lines.append(Text(f"\n{name}: {SHORT[first.stage]} is the first to differ ({len(bad)} arrays do)", "bold red"))
        lines += [Text(f"  {describe(c)}") for c in [first, *[c for c in bad if c is not first]][:6]]
        lines.append(Text(f"  repeat: {traces[name][0].case.command()}", "cyan"))
    return Group(*lines)


def describe(check: Check) -> str:
    """One failing array in one line."""
    what = f"{check.mode} {check.stage}.{check.value}, {check.left} against {check.right}"
    if check.where is None:
        return f"{what}: {check.note}"
    numbers = f"{check.got!r} for {check.expected!r}"
    allowed = "must be equal bit for bit" if check.bitwise else f"off by {check.error:.3g}, allowed {check.allowed:.3g}"
    return f"{what}: {check.failing} of {check.rows} rows; worst at {place(check.where)}: {numbers}, {allowed}"


def place(where: Where) -> str:
    """A row's identity in words."""
    names = ("rank", "source_rank", "token", "k", "expert", "slot")
    parts = [f"{n.replace('_', ' ')} {v}" for n in names if (v := getattr(where, n)) is not None]
    return ", ".join([*parts, *([f"index {where.index}"] if where.index else [])])


def print_report(
    console: Console,
    checks: dict[str, list[Check]],
    traces: dict[str, list[Trace]],
    seconds: dict[str, float],
    parts: dict[str, float],
) -> None:
    """The table, the failures, one line of summary and where the time went."""
    everything = [c for found in checks.values() for c in found]
    console.print(table(checks, traces, seconds))
    bad = [c for c in everything if not c.ok]
    if bad:
        console.print(failures(everything, traces))
    rows, bitwise = sum(c.rows for c in everything), sum(c.rows for c in everything if c.bitwise)
    console.print(
        f"\n{len(checks)} cases, {len(everything)} comparisons, {rows:,} rows: {bitwise:,} bit for bit, "
        f"{rows - bitwise:,} within their own allowance"
    )
    console.print("time: " + ", ".join(f"{part} {s:.1f} s" for part, s in parts.items()))
    failed = sorted({c.case for c in bad})
    verdict = f"MISMATCH in {len(failed)} of {len(checks)} cases: {', '.join(failed)}" if bad else "match"
    console.print(Text(verdict, "bold red" if bad else "bold green"))
