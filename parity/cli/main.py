"""`python -m parity`: parse the command line, run one command, exit with its code."""

import inspect
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated, Any, Union, get_origin, get_type_hints

import tyro
from rich.text import Text

from parity.cases.case import Case
from parity.cli import (
    backends,
    bench,
    capture,
    check,
    compare,
    doctor,
    faults,
    identify,
    layer,
    new,
    report,
    study,
    survey,
)
from parity.cli.shared import BACKEND, BUG, INTERRUPTED, PIPE, USAGE, say
from parity.run import ending
from parity.run.backend import BackendError

# Each module has a Command, which holds its flags, and `run`, which takes a Command and returns an exit code.
COMMANDS = {
    "check": check, "identify": identify, "new": new, "backends": backends, "compare": compare, "report": report,
    "faults": faults, "doctor": doctor, "layer": layer, "bench": bench, "study": study, "survey": survey,
    "capture": capture,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run it, and exit with its code."""
    if argv is None:  # the process is this command's
        ending.end_when_told()
    try:
        command = parse(argv)
        code = next(module.run for module in COMMANDS.values() if isinstance(command, module.Command))(command)
    except ValueError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except BackendError as error:
        say(Text(str(error), "red"))
        sys.exit(BACKEND)
    except BrokenPipeError:  # the reader of the output, for example `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE)
    except OSError as error:
        say(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(USAGE)
    except MemoryError as error:
        said = f" not enough memory: {str(error) or 'the system gives no more'}. Use fewer --tokens or smaller sizes"
        say(Text.assemble(("error:", "bold red"), said))
        sys.exit(USAGE)
    except KeyboardInterrupt as told:
        code = getattr(told, "code", INTERRUPTED)
        if argv is None:
            with suppress(OSError):
                sys.stdout.flush()
            ending.end_now(code)  # Python would wait for any threads that are left
        say(Text(ending.SAID, "red"))
        sys.exit(code)
    except Exception:  # Python's own exit code for it is that of a mismatch
        traceback.print_exc()
        say(
            Text(
                "this is a bug of the harness and says nothing about any layer: please report what is printed above",
                "red",
            )
        )
        sys.exit(BUG)
    sys.exit(code)


def parse(argv: list[str] | None) -> Any:
    """Return the command with its arguments; --help and wrong arguments exit here.

    Docstrings are passed to tyro as they are: when tyro parses one itself, it drops sections that it recognises.
    """
    argv = sys.argv[1:] if argv is None else argv
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")  # tyro does not read NO_COLOR itself
    if argv and argv[0] in COMMANDS:
        kind = COMMANDS[argv[0]].Command
        _something_given(kind, argv[1:])
        return tyro.cli(kind, args=argv[1:], prog=f"python -m parity {argv[0]}", description=inspect.getdoc(kind))
    _starts_with_a_command(argv)
    listed = [
        Annotated[
            module.Command, tyro.conf.subcommand(name, description=str(inspect.getdoc(module.Command)).split("\n")[0])
        ]
        for name, module in COMMANDS.items()
    ]
    about = """Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?

    Exit codes of every command: 70 a bug of the harness, 130 stopped by Ctrl-C. Each --help lists the others."""
    either: Any = Union[tuple(listed)]  # noqa: UP007
    return tyro.cli(either, args=argv, prog="python -m parity", description=inspect.cleandoc(about))


def _starts_with_a_command(argv: list[str]) -> None:
    """Raise ValueError unless a command comes first: tyro would look for any other word in all commands at once."""
    if not argv or argv[0] in ("-h", "--help"):
        return
    if named := next((word for word in argv if word in COMMANDS), None):
        raise ValueError(f"{argv[0]} comes before the command: write `python -m parity {named}` first")
    meant = "".join(f" Did you mean {near}?" for near in get_close_matches(argv[0], COMMANDS, 1))
    raise ValueError(f"no command is called {argv[0]}.{meant} There are: {', '.join(COMMANDS)}")


# Flags that may be given no value. `layer` measures at its own capacity factor even without --factors.
MAY_BE_EMPTY = {"factors"}
TRUE_OR_FALSE = {f.name for f in fields(Case) if f.type is bool}


def _something_given(kind: type, argv: list[str]) -> None:
    """Raise ValueError when a flag of a case that is True or False, or one that takes several values, is given none.

    Tyro would not say which values there are, and would treat several values as absent.
    """
    several = {name for name, hint in get_type_hints(kind).items() if get_origin(hint) is tuple} - MAY_BE_EMPTY
    for word, after in pairwise([*argv, "--"]):
        name = {"--trace": "recording"}.get(word, word.removeprefix("--").replace("-", "_"))
        if not word.startswith("--") or not after.startswith("--"):
            continue
        if name in several:
            raise ValueError(f"{word} has no value: give one or more, or leave it out")
        if name in TRUE_OR_FALSE:
            raise ValueError(f"{word} has no value: write {word} True or {word} False")
