"""What a runner returns: every array of a run, by name, and where it came from."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.oracle.rows import Strategy

Array = np.ndarray

# The nine stages, in order.
STAGES = (
    "route",
    "group_by_expert",
    "exchange_counts",
    "send_tokens",
    "to_expert_major",
    "apply_experts",
    "to_rank_major",
    "return_tokens",
    "combine",
)


@dataclass
class Trace:
    """One runner's arrays of one case: name -> one array per rank (one in all, for what is summed over ranks).

    A name is `mode/stage/value`: mode `e2e` or `isolated`, value as in `compare.QUANTITIES`.
    """

    case: Case
    backend: str
    strategy: Strategy
    environment: dict[str, str]
    seconds: float = 0.0
    arrays: dict[str, list[Array]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `<folder>/<case>.<backend>.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{k}/{i}": np.array(a, order="C") for k, per_rank in self.arrays.items() for i, a in enumerate(per_rank)
        }
        about = {
            "case": msgspec.json.encode(self.case).decode(),
            "backend": self.backend,
            "strategy": self.strategy,
            "environment": msgspec.json.encode(self.environment).decode(),
            "seconds": str(self.seconds),
        }
        save_file(tensors, folder / f"{self.case.name}.{self.backend}.safetensors", metadata=about)

    @staticmethod
    def load(path: Path) -> "Trace":
        """Read what `save` wrote. Raises ValueError on anything else."""
        try:
            return Trace._load(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole trace: {error}") from error

    @staticmethod
    def _load(path: Path) -> "Trace":
        with safe_open(path, framework="numpy") as f:
            about = f.metadata() or {}
            if "backend" not in about:
                raise ValueError(f"{path} is not a trace written by `python -m parity check --save`")
            trace = Trace(
                msgspec.json.decode(about["case"], type=Case),
                about["backend"],
                msgspec.convert(about["strategy"], Strategy),
                msgspec.json.decode(about["environment"], type=dict[str, str]),
                float(about["seconds"]),
            )
            for key in sorted(f.keys(), key=lambda key: (key.rsplit("/", 1)[0], int(key.rsplit("/", 1)[1]))):
                trace.arrays.setdefault(key.rsplit("/", 1)[0], []).append(f.get_tensor(key))
        return trace


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
        raise ValueError(
            f"{folder} holds no traces: write some with `python -m parity check --backend torch --save {folder}`"
        )
    return [Trace.load(path) for path in paths]
