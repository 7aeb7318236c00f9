"""The recorded runs are whole, match, and are what their table says."""

from pathlib import Path

from rich.console import Console

from parity.judge import records
from parity.report.terminal import summary

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
