"""`python -m parity backends`."""

from dataclasses import dataclass, field
from importlib import metadata

import msgspec
from rich.table import Table
from rich.text import Text

from parity.cli.shared import MATCH, Json, Page, not_a_terminal
from parity.run import ours
from parity.run.backend import Backend


class Listed(msgspec.Struct):
    """One line of the list of backends."""

    name: str
    framework: str
    version: str  # the version of its package, or the command that installs it
    about: str
    compared: str


@dataclass
class Command:
    """Which layers can `check --backend` run?

    Lists this project's own backends and those of other projects, with package, framework, what is compared, and a
    description. `check` says, case by case, what a layer does not compute. A published layer is imported only when it
    is named, and needs an environment that has its package: --backend megatron@PATH/TO/python runs it in another one.

    Exit code: 0.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity backends
        python -m parity backends --json
    """

    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, the default when output is not a terminal; --no-json prints the table."""


def run(command: Command) -> int:
    """Run `backends`; its exit code."""
    found = [listed(name, about, backend) for name, (about, backend) in ours.everything().items()]
    if command.json:
        print("\n".join(msgspec.json.encode(one).decode() for one in found))
        return MATCH
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("--backend", "framework", "version", "what it is", "compared"):
        table.add_column(column, overflow="fold", no_wrap=column == "--backend")
    for one in found:
        table.add_row(*(Text(getattr(one, name)) for name in one.__struct_fields__))
    Page(160).print(table)
    return MATCH


def listed(name: str, about: str, backend: Backend) -> Listed:
    """The line that lists a backend."""
    package = backend.needs[-1]
    names = metadata.packages_distributions().get(package, ())
    version = f"{names[0]} {metadata.version(names[0])}" if names else f"pip install 'moe-parity[{package}]'"
    seen = backend.seen().removeprefix("compared: ")
    return Listed(name, backend.framework, version, about, seen)
