"""`python -m parity doctor`."""

from dataclasses import dataclass

import msgspec

from parity.cli.shared import MATCH, MISMATCH, Page
from parity.run.doctor import doctor_table, examine


@dataclass
class Command:
    """What of this machine would make a comparison unfair?

    Examines versions, devices, TF32 and matmul precision, determinism and memory.

    Exit code: 0 when nothing is wrong, 1 otherwise.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity doctor
        python -m parity doctor --json
    """

    json: bool = False
    """Print one JSON object per setting instead of a table."""


def run(command: Command) -> int:
    """Run `doctor`; its exit code."""
    found = examine()
    problems = sum(bool(f.problem) for f in found)
    if command.json:
        print("\n".join(msgspec.json.encode(f).decode() for f in found))
    else:
        console = Page(120)
        console.print(doctor_table(found))
        console.print(f"\n{problems} of {len(found)} settings would make a comparison unfair")
    return MISMATCH if problems else MATCH
