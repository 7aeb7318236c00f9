"""Cases whose layer (sizes, options and arrays) comes from a checkpoint. Tokens are drawn, or recorded."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from parity.cases.case import DTYPES, Case, flag
from parity.checkpoints import Checkpoint, read


@lru_cache(maxsize=1)  # a checkpoint is read once for a case and again for its inputs
def _read(folder: str, layer: int | None) -> Checkpoint:
    return read(folder, layer)


def case_of_checkpoint(changes: dict[str, Any]) -> Case:
    """The case of a checkpoint's layer, with the fields in `changes`, which names it, as given.

    Raises ValueError as `parity.checkpoints.read` does, and on a change of what the checkpoint fixes.
    """
    found = _read(changes["checkpoint"], changes.get("layer"))
    _agree(found, changes)
    stored = found.arrays["w_up"].dtype.name
    name = re.sub(r"[^\w.+-]", "-", Path(changes["checkpoint"]).resolve().name)
    most = next(ranks for ranks in (4, 2, 1) if found.fields["experts"] % ranks == 0)
    own: dict[str, Any] = {"name": f"{name}-layer-{found.layer}", "ranks": most}
    own |= {"dtype": stored if stored in DTYPES else "float32"}
    return Case(**{**own, **found.fields, **changes, "layer": found.layer})


def learned(case: Case) -> dict[str, np.ndarray]:
    """The learned arrays of the case's layer in its checkpoint, by name; empty without a checkpoint.

    Raises ValueError when the checkpoint does not agree with the case.
    """
    if case.checkpoint is None:
        return {}
    found = _read(case.checkpoint, case.layer)
    _agree(found, vars(case))
    return found.arrays


def _agree(found: Checkpoint, said: dict[str, Any]) -> None:
    """Raises ValueError where fields of a case differ from the checkpoint's."""
    for name, value in said.items():
        if found.fields.get(name, value) != value:
            had = found.fields[name]
            raise ValueError(f"--{flag(name)} is {value}, but layer {found.layer} of the checkpoint has {had}")
