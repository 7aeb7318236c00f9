"""The recorded runs are whole, match, and are what their table says."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from parity.judge import records
from parity.judge.compare import Where
from parity.report.html import page
from parity.report.terminal import capacity, place, print_report, summary
from parity.run.ours import BACKENDS

FOLDER = Path(__file__).parent.parent / "docs" / "results"
REPORTS = {path.name.split(".")[0]: records.read(path) for path in sorted(FOLDER.glob("*.xz"))}


def test_every_run_matches():
    assert len(REPORTS) >= 16
    assert {report.footer.verdict for report in REPORTS.values()} == {"match"}


def test_the_table_is_of_these_files():
    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(summary(REPORTS))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert "\n".join(lines) in (FOLDER / "README.md").read_text()


# What the program said, when it knew its own backends only, of
# `check zipf --fault torch-off-by-one-group --backend torch --json`.
AS_IT_WAS = """\
                                                  error/
case P  T E K dtype   C dropped stages 1-9 layer allowed    s
zipf 4 16 8 2 float32 -       - ✓✓✓✓✓✗✓✓✓  ✗        >999 30.4

zipf: torch is wrong at stage 6 experts, forward, fed the oracle's input
  y against oracle: 4 of 128 rows; worst: on rank 0, token 15 from rank 3, k 1, expert 0, slot 45, index [8]
  -0.7919028997421265 instead of 0.5125860010515922; off by 1.3, allowed 1.99e-06: would need 6.54e+05 times that
  failing rows: all have source rank 3
  failing rows: all have local expert 0
  look at:  torch_impl/experts.py: apply_experts
  in all:   15 comparisons differ
  repeat:   python -m parity check zipf --backend torch --fault torch-off-by-one-group

1 case, 56 comparisons, 4,851 rows: 1,907 judged bit for bit, 2,944 by their own allowance
time: oracle 0.3 s, compare 1.6 s, torch 45.3 s, in all 46.0 s
MISMATCH in 1 of 1 case: zipf
"""


def test_a_report_of_schema_1_says_what_it_said():
    report = records.read(Path(__file__).parent / "schema-1.jsonl.xz")
    assert report.backends == BACKENDS
    print_report(console := Console(width=120, file=StringIO(), highlight=False), report)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in said.splitlines()] == AS_IT_WAS.splitlines()
    html = page(report)
    assert "torch is wrong at stage 6 experts, forward, fed the oracle&#39;s input" in html
    assert "<code>torch_impl/experts.py: apply_experts</code>" in html
    assert "Only torch ran: it was held against the oracle" in html


def test_a_capacity_is_shown_only_where_rows_are_dropped_by_it():
    report = records.read(Path(__file__).parent / "schema-1.jsonl.xz")
    record = report.cases["zipf"]
    assert capacity(report, record) == "-"
    case = replace(record.case, capacity_factor="1/2")
    assert capacity(report, msgspec.structs.replace(record, case=case)) == str(case.capacity)
    in_jax = msgspec.structs.replace(record, seconds={"jax": 1.0})
    assert capacity(report, in_jax) == str(record.case.capacity)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Where(0, 3, 15, 1, 0, 45, [8]), "on rank 0, token 15 from rank 3, k 1, expert 0, slot 45, index [8]"),
        (Where(2, 2, 5, index=[1]), "on rank 2, token 5 from rank 2, index [1]"),
        (Where(1, 3, expert=2), "rank 1, from rank 3, expert 2"),
        (Where(1, 1, expert=2), "rank 1, expert 2"),
        (Where(rank=1), "rank 1"),
        (Where(k=1), "k 1"),
        (Where(), ""),
    ],
)
def test_a_place_says_which_rank_computes_it_and_which_has_its_token(where, words):
    assert place(where) == words
