"""`python -m parity new`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from parity.cases.files import writing
from parity.cli.shared import MATCH, say
from parity.run import own

TEMPLATES = Path(own.__file__).parent


@dataclass
class Command:
    """Is my own layer right? Writes a file in which to describe it.

    The file has one function, which computes the layer as it is and says which other inputs it can be given. Turn it
    into your layer, or call your layer from it; `python -m parity check zipf --backend mine.py` judges it.

    Exit code: 0, or 2 when the file exists.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity new mine.py --framework jax
    """

    file: tyro.conf.Positional[Path]
    """Python file to write."""
    framework: Literal["torch", "jax"] = "torch"
    """Framework of the layer."""


def run(command: Command) -> int:
    """Run `new`; its exit code."""
    file = command.file
    if file.suffix != ".py":
        raise ValueError(f"{file} must be a Python file: call it {file}.py")
    if file.exists():
        raise ValueError(f"{file} exists and is not overwritten: name another file")
    text = (TEMPLATES / f"template_in_{command.framework}.py").read_text()
    with writing(file):
        file.write_text(text.replace("FILE", shlex.quote(str(file))))
    say(f"wrote {file}; now: python -m parity check zipf --backend {shlex.quote(str(file))}")
    return MATCH
