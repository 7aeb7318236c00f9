"""What the commands share: exit codes, output, and checks of files."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import tyro
from rich.console import Console
from rich.text import Text

from parity.cases.case import Case

MATCH, MISMATCH, USAGE, BACKEND, BUG, INTERRUPTED, PIPE = 0, 1, 2, 3, 70, 130, 141


# Whether to print JSON. What help would show as its default is that of the terminal in which help is asked for.
Json = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def not_a_terminal() -> bool:
    """Whether standard output is for a program to read."""
    return not sys.stdout.isatty()


class Page(Console):
    """Standard output, as wide as the terminal, or `width` columns when it is not a terminal."""

    def __init__(self, width: int) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width, highlight=False)

    def on_broken_pipe(self) -> None:
        """End as `print` does, where Rich ends with the exit code of a mismatch."""
        raise BrokenPipeError


def say(message: str | Text) -> None:
    """Print on standard error without breaking lines, so that a path or a command can be copied."""
    codes = None if os.environ.get("NO_COLOR") else "auto"  # without color, Rich would still print bold
    Console(stderr=True, color_system=codes).print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on standard error, if that is a terminal, while this block runs; call it to change its text."""
    with Console(stderr=True).status(what) as status:
        yield status.update


def case_of_file(path: Path) -> Case:
    """The case that `identify --write` wrote. Raises ValueError when the file cannot be read or holds none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Case)
    except OSError as error:
        raise ValueError(f"--case {path}: cannot read it ({error.strerror})") from error
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"--case {path} holds no case: {error}. `python -m parity identify --write` writes one"
        ) from error


def check_writable(*files: Path | None) -> None:
    """Raise ValueError, before anything runs, when a file is a folder or its folder does not exist."""
    for path in files:
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                f"cannot write {path}: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
            )
