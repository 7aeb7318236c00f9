"""What the commands share: exit codes, and how they talk."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from parity.cases.case import Case

MATCH, MISMATCH, USAGE, BACKEND, BUG, INTERRUPTED, PIPE = 0, 1, 2, 3, 70, 130, 141


def not_a_terminal() -> bool:
    """Whether standard output is for a program to read."""
    return not sys.stdout.isatty()


class Page(Console):
    """Standard output: as wide as the terminal, or as this where it is none."""

    def __init__(self, width: int) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width, highlight=False)

    def on_broken_pipe(self) -> None:
        """End as `print` does, where Rich ends with the exit code of a mismatch."""
        raise BrokenPipeError


def say(message: str | Text) -> None:
    """On standard error, as it is: a line is never broken, so that a path or a command in it can be copied."""
    codes = None if os.environ.get("NO_COLOR") else "auto"  # bold is none to Rich
    Console(stderr=True, color_system=codes).print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A sign of life on standard error while this block runs, where that is a terminal; call it to say what is done."""
    with Console(stderr=True).status(what) as status:
        yield status.update


def case_of_file(path: Path) -> Case:
    """The case that `identify --write` wrote. Raises ValueError when the file holds none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Case)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"--case {path} holds no case: {error}. `python -m parity identify --write` writes one"
        ) from error


def check_writable(*files: Path | None) -> None:
    """Before anything runs. Raises ValueError where a file's folder is none, or the file is a folder."""
    for path in files:
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                f"cannot write {path}: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
            )
