"""Which published layers are installed here, and what is known of each before it runs."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from parity.published._blocks import blocks
from parity.run import ours, own
from parity.run.backend import Backend

PUBLISHED = Path(__file__).parents[1] / "published"
FAMILIES = "families:"


class Known(msgspec.Struct):
    """What is known of a layer before it runs."""

    name: str
    why: str = ""  # it cannot be run
    stored: dict[str, str] = {}  # by the name of a parameter of its own, ours and its axes
    states: dict[str, Any] = {}  # by field of a case, what its configuration says


def installed() -> list[str]:
    """Names, as `--backend` has them, of all published layers whose package is here."""
    names = []
    for file in ours.PUBLISHED:
        for function in own.marked(PUBLISHED / f"{file}.py"):
            name = file if function == "layer" else f"{file}:{function}"
            if file != "transformers" or function not in blocks():  # as families has it with its own configuration
                names.append(name)
    here = [name for name in names if all(map(find_spec, packages(ours.find(name))))]
    return [*(FAMILIES + name for name in blocks()), *here]


def packages(backend: Backend) -> tuple[str, ...]:
    """What a layer is made of, the framework first."""
    return tuple(dict.fromkeys((backend.framework, *backend.needs)))


def stored(name: str) -> dict[str, str]:
    """What the file of an adapter says, as `STORED`, of how its layer keeps what that takes."""
    path, takes = PUBLISHED / f"{re.split('[:@]', name)[0]}.py", ours.find(name).takes
    found = {}
    for node in ast.parse(path.read_text()).body if path.exists() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "STORED":
            for own_name, place in ast.literal_eval(node.value).items():
                of, _, axes = place.partition(": ")
                for one in of.split(" or "):
                    if set(one.split(" and ")) <= {*takes}:
                        found[own_name] = f"{one}: {axes}"
    return found
