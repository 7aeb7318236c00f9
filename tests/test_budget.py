"""Random cases of more and more tokens, for as long as there is time."""

import pytest

from parity.cases.case import Case
from parity.judge import budget
from parity.judge.budget import growing, together
from parity.judge.compare import Check
from parity.judge.engine import make_report
from parity.judge.picture import Picture
from parity.judge.records import CaseRecord, Report, header


class Clock:
    """Time passes in runs only."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def run(monkeypatch):
    """Of a case that takes a second for 16 tokens, and of more tokens as much longer."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)

    def pretend(cases: list[Case]) -> Report:
        clock.now += sum(case.tokens / 16 for case in cases)
        judged = {
            case.name: (
                CaseRecord(case, "", {}, {}, Picture([], [], [])),
                [Check(case.name, "e2e", "combine", "out", "torch", "oracle", case.tokens < 64, False, 1)],
            )
            for case in cases
        }
        return make_report(header([]), list(judged), judged, {"in all": 1.0})

    return pretend


def test_sizes_grow_until_the_time_is_used_up(run):
    reached = list(growing(100, 0, {}, run))
    # 5 s, 20 cases of 4 s, and not one of 16 s in the 15 s that are left
    assert [(one.tokens, one.report.footer.cases, one.seconds) for one in reached] == [(16, 5, 5.0), (64, 20, 80.0)]
    assert [str(one) for one in reached] == [
        "16 tokens a rank: 5 cases, match, 5 s",
        "64 tokens a rank: 20 cases, mismatch, 80 s",
    ]
    whole = together(reached)
    assert (whole.footer.cases, whole.footer.failing, whole.footer.verdict) == (25, 20, "mismatch")
    assert whole.footer.seconds == {"in all": 2.0}
    assert {record.case.tokens for record in whole.cases.values()} == {16, 64}


def test_the_first_size_is_run_in_any_case_and_what_is_given_is_the_same_for_all(run):
    (only,) = growing(0.1, 7, {"dtype": "bfloat16"}, run)
    assert only.tokens == 16
    assert {record.case.dtype for record in only.report.cases.values()} == {"bfloat16"}
    assert all(name.startswith("random-7-") for name in only.report.cases)
