"""Run as many random cases, of more and more tokens, as fit in a given time."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from parity.cases.case import Case
from parity.cases.random_cases import SHARED, random_cases
from parity.judge.engine import make_report
from parity.judge.records import Report

TOKENS, CASES = 16, 5  # tokens per rank and number of cases at the first size
TIMES = 4  # factor by which tokens grow from size to size


class Reached(NamedTuple):
    """One size, and the report of the cases run at it."""

    tokens: int  # on each rank
    report: Report
    seconds: float

    def __str__(self) -> str:
        foot = self.report.footer
        return f"{self.tokens:,} tokens a rank: {foot.cases} cases, {foot.verdict}, {self.seconds:.0f} s"


def growing(seconds: float, seed: int, fixed: dict[str, Any], run: Callable[[list[Case]], Report]) -> Iterator[Reached]:
    """Run random cases, four times as many tokens each time, for as long as another one is likely to end in time.

    A case of four times as many tokens is taken to need four times as long, which is too much where compiling takes
    most of it. The first size always runs.

    Raises ValueError when no case exists with what is fixed.
    """
    begin, tokens, n, first = time.perf_counter(), TOKENS, CASES, 0
    while n:
        start = time.perf_counter()
        report = run(random_cases(n, seed, fixed | {"tokens": tokens}, first))
        now = time.perf_counter()
        yield Reached(tokens, report, now - start)
        left, of_one = seconds - (now - begin), TIMES * (now - start) / n
        tokens, n, first = TIMES * tokens, min(SHARED, max(int(left / of_one), 0)), first + SHARED


def together(reached: list[Reached]) -> Report:
    """Merge the reports of all sizes into one."""
    reports = [one.report for one in reached]
    judged = {name: (record, r.checks[name]) for r in reports for name, record in r.cases.items()}
    seconds: dict[str, float] = {}
    for report in reports:
        for part, spent in report.footer.seconds.items():
            seconds[part] = seconds.get(part, 0) + spent
    return make_report(reports[0].header, list(judged), judged, seconds)
