"""`python -m parity report`."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import tyro

from parity.cases.files import writing
from parity.cli.shared import MATCH, Page, check_writable, say
from parity.judge import records
from parity.judge.records import Report
from parity.report.html import page
from parity.report.terminal import last_line, print_report, summary


@dataclass
class Command:
    """What did a run find?

    Shows again what `check --json` wrote; of several reports, one line each. A report without a footer is refused, as
    its run did not end.

    Exit code: that of the run, or the highest of several; 2 when a file is not a whole report.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity report report.jsonl --html page.html
        python -m parity report docs/results/one-gpu-p1-bfloat16.jsonl.xz docs/results/one-gpu-p8-bfloat16.jsonl.xz
        python -m parity report --schema
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Reports as JSON lines, which may be compressed (.xz)."""
    html: Path | None = None
    """File to write the report to as well, as an HTML page."""
    schema: bool = False
    """Print the JSON Schema of one line."""


def run(command: Command) -> int:
    """Run `report`; its exit code."""
    check_writable(command.html)
    if command.schema:
        print(msgspec.json.format(msgspec.json.encode(records.schema())).decode())
        return MATCH
    if not command.files:
        raise ValueError("which report? Name a file that `python -m parity check --json` wrote, or ask for --schema")
    if len(command.files) == 1:
        return publish(records.read(command.files[0]), False, command.html)
    if command.html:
        raise ValueError("--html makes a page of one report: name one file")
    reports = {path.name.split(".")[0]: records.read(path) for path in command.files}
    Page(160).print(summary(reports))
    return max(report.footer.exit_code for report in reports.values())


def publish(report: Report, as_json: bool, html: Path | None) -> int:
    """Print a report, as JSON lines or as a table, and return its exit code."""
    if as_json:
        print("\n".join(records.lines(report)))
        say(last_line(report))
    else:
        print_report(Page(100), report)
    if html:
        with writing(html):
            html.write_text(page(report))
        say(f"wrote {html}")
    return report.footer.exit_code
