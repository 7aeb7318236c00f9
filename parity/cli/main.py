"""`python -m parity`: parse the command line, run one command, exit with its code."""

import os
import sys
from typing import Any

import tyro
from rich.text import Text

from parity.cli import bench, capture, check, compare, doctor, faults, report, study
from parity.cli.shared import BACKEND, INTERRUPTED, PIPE, USAGE, say
from parity.run.backend import BackendError

# Each has a Command, its flags, and `run`, which takes one and returns an exit code.
COMMANDS = {
    "check": check, "compare": compare, "report": report, "capture": capture, "faults": faults, "bench": bench,
    "study": study, "doctor": doctor,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run it, and exit with its code."""
    try:
        command = parse(argv)
        code = next(module.run for module in COMMANDS.values() if isinstance(command, module.Command))(command)
    except ValueError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except BackendError as error:
        say(Text(str(error), "red"))
        sys.exit(BACKEND)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE)
    except OSError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except KeyboardInterrupt:
        say(Text("stopped; nothing is left running", "red"))
        sys.exit(INTERRUPTED)
    sys.exit(code)


def parse(argv: list[str] | None) -> Any:
    """The command with its arguments; help, and what is no argument, end here."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: module.Command for name, module in COMMANDS.items()},
        args=argv,
        prog="python -m parity",
        description="Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?",
    )
