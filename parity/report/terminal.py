"""A report as tables and lines for the terminal."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from parity.judge.blame import Blame, blame, is_backward
from parity.judge.card import Card
from parity.judge.compare import Check, Where, largest_error
from parity.judge.power import Power
from parity.judge.records import CaseRecord, Report
from parity.oracle.quantities import STAGES
from parity.run.backend import Backend
from parity.run.faults import Fault
from parity.run.ours import DEFAULT

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
ERROR = "error/\nallowed"  # the largest error over its own allowance
SHOWN = 3  # pairs of values without a case that are printed; the JSON report lists all
MOST = 60  # cases in the table. Of more, only failing ones are listed; cases pairs-* only if there are no others
VERDICT_STYLE = {"match": "bold green", "mismatch": "bold red", "nothing compared": "bold red"}


def table(report: Report) -> Table:
    """One line per case: its shape, the nine stages on their own, the whole layer, and its largest error."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("case", "P", "T", "E", "K", "dtype", "C", "dropped", "stages 1-9", "layer", ERROR, "s"):
        right = column in ("P", "T", "E", "K", "C", "dropped", ERROR, "s")
        result.add_column(column, justify="right" if right else "left", no_wrap=True)
    listed = [name for name in report.cases if not name.startswith("pairs-")] or [*report.cases]
    for name, record in report.cases.items():
        if (len(listed) > MOST or name not in listed) and not _failed(report, name):
            continue
        case, found = record.case, report.checks[name]
        strip = Text.assemble(*(_mark(*of_stage(found, backends(report, record), stage)) for stage in STAGES))
        end_to_end = _mark([c for c in found if c.mode != "isolated"], declared=bool(record.seconds))
        dropped = sum(map(sum, record.picture.dropped)) if drops(report, record) else "-"
        largest = largest_error(found)
        shown = "-" if math.isnan(largest) else f"{largest:.2f}" if largest < 1000 else ">999"
        result.add_row(
            name, str(case.ranks), str(case.tokens), str(case.experts), str(case.top_k), case.dtype,
            capacity(report, record), str(dropped), strip, Text.assemble(end_to_end), shown,
            f"{sum(record.seconds.values()):.1f}",
        )  # fmt: skip
    return result


def of_stage(checks: Iterable[Check], ran: Iterable[Backend], stage: str) -> tuple[list[Check], bool]:
    """The comparisons that judge a stage, and whether there must be some.

    A gradient within the whole layer depends on several stages. It counts here if it is the first that differs.
    """
    checks, ran = [*checks], [*ran]
    modes = {backend.name: mode for backend in ran if (mode := backend.judged(stage))}
    whole = {b.name: b for b in ran if modes.get(b.name) == "e2e"}
    alone = {name: [c for c in checks if c.left == name and c.right == "oracle"] for name in whole}
    firsts = [found.check for name, b in whole.items() if (found := blame(alone[name], {name: b}))]
    found = [
        c for c in checks
        if c.stage == stage
        and c.mode == modes.get(c.left)
        and (c.mode == "isolated" or not is_backward(c) or any(c is first for first in firsts))
    ]  # fmt: skip
    return found, bool(modes)


def drops(report: Report, record: CaseRecord) -> bool:
    """Whether some backend of the case has a capacity, so that rows could be dropped."""
    return any(backend.layout == "static" for backend in backends(report, record))


def capacity(report: Report, record: CaseRecord) -> str:
    """The rows of a bin; "-" where no backend has bins and nothing is to be dropped."""
    has = drops(report, record) or record.case.capacity_factor is not None
    return str(record.case.capacity) if has else "-"


def backends(report: Report, record: CaseRecord) -> list[Backend]:
    """The backends that ran a case."""
    return [report.backends[name] for name in record.seconds]


def unseen(report: Report) -> list[str]:
    """For each backend that ran and does not show everything: what is compared, and what is not."""
    ran = {name for record in report.cases.values() for name in record.seconds}
    compared = {check.left for checks in report.checks.values() for check in checks if check.rows}
    return [
        f"{name}: {backend.seen() if name in compared else 'nothing was compared'}"
        for name, backend in report.backends.items()
        if name in ran and backend.unseen
    ]


def not_supported(report: Report) -> list[str]:
    """For each backend, how many cases it does not support, and why."""
    said = []
    for name in report.backends:
        why = Counter(record.not_supported[name] for record in report.cases.values() if name in record.not_supported)
        reasons = "; ".join(f"{reason} ({n})" for reason, n in why.most_common())
        said += [f"{name}: {why.total()} of {len(report.cases)} cases not supported: {reasons}"] if why else []
    return said


def beside(report: Report) -> list[str]:
    """With --between, the oracle's verdict on each backend."""
    said = []
    for name in report.backends:
        found = [record.beside[name] for record in report.cases.values() if name in record.beside]
        wrong = [verdict for verdict in found if verdict]
        first = f"; the first, {wrong[0].case}: {headline(wrong[0], report.backends)}" if wrong else ""
        if found:
            said.append(f"{name} against the oracle: {len(found) - len(wrong)} of {len(found)} cases match{first}")
    return said


def notes(report: Report) -> list[str]:
    """All remarks of a report besides its verdict."""
    said = [*unseen(report), *not_supported(report), *unreached(report), *inputs(report), *beside(report)]
    return [*said, *filter(None, [agree(report)])]


def unreached(report: Report) -> list[str]:
    """For cases with a clamp, the sides of it that no number reaches."""
    return [
        f"{name}: the clamp is not checked where this case has no numbers: {', '.join(record.unreached)}"
        for name, record in report.cases.items()
        if record.unreached
    ]


def inputs(report: Report) -> list[str]:
    """Remarks on cases with unusual inputs."""
    return [f"{name}: {said}" for name, record in report.cases.items() for said in record.noted]


def agree(report: Report) -> str:
    """A sentence, if backends that fail against the oracle agree with each other; otherwise an empty string."""
    failing = [name for name in report.checks if _failed(report, name)]
    pairs = [c for name in failing for c in report.checks[name] if c.right in report.backends]
    ours = all(backend.layout == "opaque" for backend in report.backends.values())
    if not ours or not pairs or not all(check.ok for check in pairs):
        return ""
    return f"{' and '.join(report.backends)} agree with each other, row by row: use --between to judge them by that"


def _failed(report: Report, name: str) -> bool:
    return any(not c.ok for c in report.checks[name])


def _mark(found: list[Check], declared: bool = True) -> tuple[str, str]:
    if not found:
        return ("?", "red") if declared else ("\N{MIDDLE DOT}", "dim")
    return ("\N{CHECK MARK}", "green") if all(c.ok for c in found) else ("\N{BALLOT X}", "bold red")


def failures(report: Report) -> Group:
    """For each case that failed: who is wrong, at which stage first, the worst row, and the command that repeats it."""
    lines: list[Text] = []
    for name, record in report.cases.items():
        verdicts = report.verdicts(name)
        for verdict in verdicts:
            check = verdict.check
            lines.append(Text(f"\n{name}: {headline(verdict, report.backends)}", "bold red"))
            lines.append(Text(f"  {describe(check)}"))
            lines += [Text(f"  failing rows: {shared}") for shared in check.common]
            lines.append(Text(f"  look at:  {verdict.function}"))
            differ = f"{number(verdict.arrays, 'comparison')} differ{'s' * (verdict.arrays == 1)}"
            lines += [Text(f"  in all:   {differ}")] if not check.raised else []
            lines.append(Text(f"  repeat:   {repeat(report, record, verdict)}", "cyan"))
            lines += [Text(f"  {line}") for line in why(report, name, verdict) if not check.raised]
        lines += [Text(f"  between:  {line}") for line in between(report, name)] if verdicts else []
    return Group(*lines)


def number(n: int, what: str) -> str:
    """So many of something: "1 case", "2 cases"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def why(report: Report, name: str, verdict: Blame) -> list[str]:
    """What the probes say of the layers that are wrong in a case, or in which case they were asked."""
    cards = [card for card in report.cards.get(name, ()) if card.backend in verdict.backends]
    lines = [line for card in cards for line in explanation(card, named=len(cards) > 1)]
    asked = {card.backend: case for case, cards in report.cards.items() for card in cards}
    others = [f"see {asked[one]}" for one in verdict.backends if one in asked and asked[one] != name]
    return lines or [f"why:      {one}" for one in others]


def few(value: float | None) -> str:
    """A residual in one digit."""
    return "" if value is None else f"{value:.0e}" if value else "0"


# How sure a finding is, in words.
SURE = {
    "found": "found: nothing else explains it", "odd": "found, and no case can say it",
    "cannot tell": "several explanations hold", "unknown": "no explanation holds",
}  # fmt: skip


def explanation(card: Card, named: bool) -> list[str]:
    """Sentences that say how a layer differs from its case, what would match, and what was excluded."""
    whose = f"{card.backend}, " * named
    said = [f"{whose}stage {SHORT[stage]}: {sentence}" if stage else f"{whose}{sentence}"
            for stage, sentence in card.reasons()]  # fmt: skip
    lines = [f"{'why:' if i == 0 else '':9} {sentence}" for i, sentence in enumerate(said)]
    if card.untried:
        return [*lines, f"matches:  not tried, as the layer declares that {card.untried}"]
    return [*lines, f"matches:  {card.matching}"] if card.matching else lines


def between(report: Report, name: str) -> list[str]:
    """How layers of one's own compare with the other backends in a case: "mine and theirs differ in 6 of 9"."""
    pairs: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks[name]:
        if check.right in report.backends:
            pairs.setdefault((check.left, check.right), []).append(check)
    said = []
    for (left, right), found in pairs.items():
        if "opaque" in (report.backends[left].layout, report.backends[right].layout):
            bad = sum(not check.ok for check in found)
            differ = f"differ in {bad} of {number(len(found), 'comparison')}" if bad else "agree with each other"
            said.append(f"{left} and {right} {differ}")
    return said


def headline(verdict: Blame, backends: Mapping[str, Backend]) -> str:
    """Which backend is wrong, at which stage first, and how that was seen; in which array where no stage is seen."""
    names = " and ".join(verdict.backends)
    who = f"{names} is wrong" if len(verdict.backends) == 1 else f"{names} differ from the oracle"
    if verdict.check.right in verdict.backends:  # each backend matches the oracle within its allowance
        who = f"{names} differ from each other"
    seen = {"isolated": "fed the oracle's input", "second": "in a second step beside the first"}
    how = seen.get(verdict.check.mode, "in the whole layer")
    if any(backends[name].shows(stage) for name in verdict.backends for stage in STAGES[:-1]):
        if verdict.check.mode != "isolated" and all(backends[name].alone(verdict.stage) for name in verdict.backends):
            how += "; fed the oracle's input, the stage matches"
        return f"{who} at stage {SHORT[verdict.stage]}, {verdict.direction}, {how}"
    what = f"gradient {verdict.check.value}" if is_backward(verdict.check) else "output"
    if verdict.check.raised:
        return f"{names} raised an error"
    if what == "output" and not verdict.check.rows:
        return f"{names} gave no output that can be compared"
    return f"{who} in its {what}, {how}; its stages are not seen"


def repeat(report: Report, record: CaseRecord, verdict: Blame) -> str:
    """The command that repeats just this failure: its case, the backend that is wrong, the fault if one was planted."""
    wrong = [report.backends[name] for name in verdict.backends]
    by_default = {backend.name for backend in DEFAULT} == {*verdict.backends}
    only = "" if by_default else "".join(f" {backend.flag}" for backend in wrong)
    fault = f" --fault {report.header.planted}" if report.header.planted else ""
    return f"{record.command}{only}{fault}"


def describe(check: Check) -> str:
    """One failing array: what, worst row by identity, the values, and the tolerance that would have been needed."""
    what = f"{check.value} against {check.right}"
    if check.where is None:
        return f"{what}: {check.note}"
    if check.mode == "repeat":
        return f"{what}: {check.got:.0f} numbers differ between two runs on the same input"
    if check.scale:
        whose = " of " * (place(check.where) != "") + place(check.where)
        return (
            f"{what}: all numbers{whose} together are {check.got:.7g} times what they should be\n"
            f"  by least squares, in which rounding averages out; allowed 1 give or take {check.allowed:.2g}"
        )
    where = f"{check.failing} of {check.rows} rows; worst: {place(check.where)}"
    numbers = f"{check.got!r} instead of {check.expected!r}"
    if check.bitwise:
        return f"{what}: {where}\n  {numbers}; must be equal bit for bit"
    need = f"would need {check.error / check.allowed:.3g} times that" if check.allowed else "no error is allowed"
    need = need if math.isfinite(check.error) else "no allowance would do"
    return f"{what}: {where}\n  {numbers}; off by {check.error:.3g}, allowed {check.allowed:.3g}: {need}"


def place(where: Where) -> str:
    """A row's identity in words: the rank that computes it, its token and the rank that this comes from, and more."""
    of_token, source = where.token is not None, where.source_rank
    parts = [] if where.rank is None else ["on " * of_token + f"rank {where.rank}"]
    if of_token or source not in (None, where.rank):
        parts.append(f"token {where.token} " * of_token + f"from rank {source}")
    parts += [f"{n} {v}" for n in ("k", "expert", "slot") if (v := getattr(where, n)) is not None]
    return ", ".join([*parts, *([f"index {where.index}"] if where.index else [])])


def print_report(console: Console, report: Report) -> None:
    """The table, the failures, one line of summary and where the time went."""
    foot = report.footer
    shown = table(report)
    if shown.row_count:
        console.print(shown)
    if 0 < shown.row_count < len(report.cases):
        console.print(f"and {len(report.cases) - shown.row_count} more, which match")
    if foot.failing:
        console.print(failures(report), soft_wrap=True)  # a command that is broken in two cannot be copied
    console.print(
        f"\n{number(foot.cases, 'case')}, {number(foot.comparisons, 'comparison')}, {number(foot.rows, 'row')}: "
        f"{foot.bitwise:,} judged bit for bit, {foot.rows - foot.bitwise:,} by their own allowance",
        soft_wrap=True,
    )
    for line in notes(report):
        console.print(line, soft_wrap=True)
    if foot.pairs and foot.comparisons:
        some = "; ".join(foot.pairs_missing[:SHOWN])
        others = f"; not {some}{', and others' * (len(foot.pairs_missing) > SHOWN)}" if some else ""
        of = foot.pairs + len(foot.pairs_missing)
        console.print(
            f"the cases have {foot.pairs:,} of the {of:,} pairs of values that two fields can have together{others}",
            soft_wrap=True,
        )
    console.print("time: " + ", ".join(f"{part} {s:.1f} s" for part, s in foot.seconds.items()))
    console.print(last_line(report), soft_wrap=True)


def last_line(report: Report) -> Text:
    """The verdict, and the cases that fail."""
    foot, failed = report.footer, [name for name in report.checks if _failed(report, name)]
    names = f" in {len(failed)} of {number(foot.cases, 'case')}: {', '.join(failed)}" if failed else ""
    return Text(foot.verdict.upper() + names if failed else foot.verdict, VERDICT_STYLE[foot.verdict])


def summary(reports: Mapping[str, Report]) -> Table:
    """One line per report: where it ran, how much was compared, and the largest error."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in (
        "report",
        "devices",
        "torch",
        "jax",
        "cases",
        "rows",
        "bit for bit",
        ERROR,
        "host waits",
        "s",
        "",
    ):
        right = column in ("cases", "rows", "bit for bit", ERROR, "s")
        result.add_column(
            column, justify="right" if right else "left", no_wrap=column in (ERROR, "s", ""), overflow="fold"
        )
    for name, report in reports.items():
        foot, about = report.footer, [record.environment for record in report.cases.values()]
        largest = largest_error(c for found in report.checks.values() for c in found)

        def stated(what: str, about: list = about, names: list = [*report.backends]) -> str:  # noqa: B006
            found = [one.get(backend, {}).get(what, "") for backend in names for one in about]
            return ", ".join(dict.fromkeys(filter(None, found))) or "-"

        result.add_row(
            name, stated("devices"), stated("torch"), stated("jax"), str(foot.cases), f"{foot.rows:,}",
            f"{foot.bitwise:,}", f"{largest:.3f}", stated("host waits"), f"{foot.seconds.get('in all', math.nan):.0f}",
            Text(foot.verdict, VERDICT_STYLE[foot.verdict]),
        )  # fmt: skip
    return result


class Found(NamedTuple):
    """The result of planting a fault."""

    caught: bool
    backend: str
    stage: str
    how: str


def fault_table(faults: Sequence[tuple[Fault, Found | None]]) -> Table:
    """The planted faults, and where they were run: caught, and blamed on the right backend and stage?"""
    ran = any(found for _, found in faults)
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("fault", "stage", "preset", *(("caught", "blamed") if ran else ("what it does", "source"))):
        wraps = column in ("what it does", "source")
        result.add_column(
            column, no_wrap=not wraps, overflow="fold", max_width=44 if column == "what it does" else None
        )
    for fault, found in faults:
        if found is None:
            result.add_row(fault.name, SHORT[fault.stage], fault.preset, fault.sentence, fault.source)
            continue
        right = (found.backend, found.stage) == (fault.backend, fault.stage)
        blamed = Text("right", "green") if right else Text(f"WRONG: {found.backend} {found.stage}", "bold red")
        result.add_row(
            fault.name, SHORT[fault.stage], fault.preset,
            Text("yes", "green") if found.caught else Text("NO", "bold red"), blamed,
        )  # fmt: skip
    return result


WIDE = 150  # console columns that a fault needs to fit on one line


def print_faults(console: Console, faults: Sequence[tuple[Fault, Found | None]]) -> None:
    """The table of faults; on a narrow console, where it would be cut, some lines for each."""
    if console.width >= WIDE:
        console.print(fault_table(faults))
        return
    for fault, found in faults:
        console.print(Text.assemble((fault.name, "bold"), overflow="fold"))
        said = [f"stage {SHORT[fault.stage]}, preset {fault.preset}", fault.sentence, fault.source]
        if found:
            right = (found.backend, found.stage) == (fault.backend, fault.stage)
            blamed = "right" if right else f"WRONG: {found.backend} {found.stage}"
            said = [*said[:1], f"caught: {'yes' if found.caught else 'NO'}; blamed: {blamed}"]
        for line in said:
            console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2)))


def power_table(of_case: Sequence[Sequence[Power]]) -> Table:
    """One row per array: the smallest relative error that is caught, for several cases with the same arrays."""
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("array", overflow="fold")
    for powers in of_case:
        for column in (f"{powers[0].dtype}: a row", "worst row", "all rows"):
            result.add_column(column, justify="right", overflow="fold")
    for line in zip(*of_case, strict=True):
        figures = [f"{value:.1e}" for one in line for value in (one.one_row, one.worst_row, one.all_rows)]
        result.add_row(line[0].name, *figures)
    return result
