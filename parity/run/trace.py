"""What a run returns: all of its arrays, by name, and where they came from."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.files import writing
from parity.oracle.quantities import QUANTITIES, quantity_of
from parity.run.backend import Backend
from parity.run.inside import ROWS
from parity.run.ours import BACKENDS

Array = np.ndarray


@dataclass
class Trace:
    """One run's arrays of one case: name -> one array per rank (one in all, for what is summed over ranks).

    A name is mode/stage/value: mode isolated, e2e or repeat, and the rest a name of `oracle.quantities.QUANTITIES`; or
    rows/stage/value, the number of each row (`oracle.rows`), where that is not what the layout says.
    """

    case: Case
    backend: Backend
    environment: dict[str, str]
    seconds: float = 0.0
    arrays: Mapping[str, list[Array]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `<folder>/<case>.<backend>.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{k}/{i}": np.asarray(a, order="C") for k, per_rank in self.arrays.items() for i, a in enumerate(per_rank)
        }
        about = {
            "case": msgspec.json.encode(self.case).decode(),
            "backend": msgspec.json.encode(self.backend).decode(),
            "environment": msgspec.json.encode(self.environment).decode(),
            "seconds": str(self.seconds),
        }
        with writing(folder / f"{self.case.name}.{self.backend.name}.safetensors") as path:
            save_file(tensors, path, metadata=about)

    @property
    def not_supported(self) -> str:
        """Why there are no arrays, where a layer does not compute the case; or an empty string."""
        return self.environment.get("not supported", "")

    @staticmethod
    def load(path: Path) -> "Trace":
        """Read what `save` wrote, or another program: its metadata need `case` and `backend`, which may be a name.

        Of a backend known by name only, what the file holds is what it provides, and `layout` says how rows lie.

        Raises ValueError on anything else.
        """
        try:
            return Trace._load(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole trace: {error}") from error

    @staticmethod
    def _load(path: Path) -> "Trace":
        with safe_open(path, framework="numpy") as f:
            about = f.metadata() or {}
            if lacking := [name for name in ("case", "backend") if name not in about]:
                raise ValueError(
                    f"{path} is not a trace: its metadata lack {' and '.join(lacking)}, which "
                    "`python -m parity check --save` writes"
                )
            keys = {key: key.rpartition("/") for key in f.keys()}  # noqa: SIM118
            if odd := [key for key, (_, _, rank) in keys.items() if not rank.isdecimal()]:
                raise ValueError(f"{path} is not a trace: tensors must be called mode/stage/value/rank, not {odd[0]!r}")
            names: dict[str, list[str]] = {}
            for key in sorted(keys, key=lambda key: (keys[key][0], int(keys[key][2]))):
                names.setdefault(keys[key][0], []).append(key)
        for name in names:
            if (fault := _no_array(name)) is not None:
                raise ValueError(f"{path} is not a trace: {fault}")
        arrays = InFile(path, names)
        try:
            return Trace(
                msgspec.json.decode(about["case"], type=Case),
                _backend(about, arrays),
                msgspec.json.decode(about.get("environment", "{}"), type=dict[str, str]),
                float(about.get("seconds", 0)),
                arrays,
            )
        except ValueError as error:  # msgspec's are, too
            raise ValueError(f"{path} is not a trace: {error}") from error


class InFile(Mapping[str, list[Array]]):
    """Arrays that are read from their file each time that they are asked for."""

    def __init__(self, path: Path, keys: dict[str, list[str]]) -> None:
        self.path, self.keys_of = path, keys
        self.file = safe_open(path, framework="numpy").__enter__()  # stays open when the file is gone

    def __getitem__(self, name: str) -> list[Array]:
        try:
            return [self.file.get_tensor(key) for key in self.keys_of[name]]
        except (AttributeError, TypeError, SafetensorError) as error:  # a dtype that NumPy lacks
            raise ValueError(f"{self.path} is not a trace: cannot read {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def _rows_of(name: str) -> str:
    """The name of what says which rows an array of this name holds."""
    return ROWS + name.partition("/")[2]


def _no_array(name: str) -> str | None:
    """Why a trace cannot hold an array of this name; None where it can."""
    if name.startswith(ROWS):
        return None if name.removeprefix(ROWS) in QUANTITIES else f"{name} gives the rows of an array that is not known"
    try:
        quantity_of(name)
    except ValueError as error:
        return str(error)


def _backend(about: dict[str, str], arrays: Mapping[str, list[Array]]) -> Backend:
    if about["backend"].startswith("{"):
        return msgspec.json.decode(about["backend"], type=Backend)
    if about["backend"] in BACKENDS:
        return BACKENDS[about["backend"]]
    layout: Any = about.get("layout", "opaque")  # which `Backend` looks at
    provides = tuple(name for name in arrays if not name.startswith(ROWS))
    rows = [name for name in provides if quantity_of(name).axes.startswith("A") and _rows_of(name) not in arrays]
    if layout == "opaque" and rows:
        raise ValueError(
            f"no backend is called {about['backend']} here, and nothing says which rows {rows[0]} has: put the layout "
            f"(dynamic, static or ragged) into the metadata, or the row numbers into a tensor {_rows_of(rows[0])}"
        )
    return Backend(about["backend"], about.get("framework", ""), layout, provides)


def differing_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many elements of two arrays differ in any bit; all of them when the shapes differ."""
    if a.shape != b.shape:
        return np.array(max(a.size, b.size), np.int64)
    width = f"u{a.itemsize}"
    return np.array((a.view(width) != b.view(width)).sum() if a.ndim else int(a != b), np.int64)


def load_folder(folder: Path) -> list[Trace]:
    """Every trace in a folder. Raises ValueError when there is none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        again = f"python -m parity check --backend torch --save {shlex.quote(str(folder))}"
        raise ValueError(f"{folder} holds no traces: write some with `{again}`")
    return [Trace.load(path) for path in paths]
