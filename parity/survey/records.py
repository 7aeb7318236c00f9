"""What a survey writes: a line for each layer and dtype, and of any two of them how far they differ."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from parity.judge.card import Card

LINES = "survey.jsonl"  # in the folder of a survey


class Surveyed(msgspec.Struct, tag_field="kind", tag="surveyed"):
    """One published layer in one dtype: its card, or why there is none."""

    layer: str  # as `--backend` has it: families:mixtral
    dtype: str
    framework: str
    versions: dict[str, str]  # of packages
    card: Card | None = None
    why: str = ""  # there is no card
    stored: dict[str, str] = {}  # what it keeps: by the name of its parameter, ours and its axes: "gate_up: E (2 F) D"
    states: dict[str, Any] = {}  # by field of a case, what its configuration says
    ran: dict[str, str] = {}  # the common problems: "" where it ran, or why not
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Of its files."""
        return re.sub(r"[^\w.+-]+", "-", f"{self.layer}.{self.dtype}")

    @property
    def disobeyed(self) -> dict[str, Any]:
        """By field, what its configuration says and its card does not."""
        if self.card is None:
            return {}
        case = self.card.case
        if case.score_function == "softmax_of_chosen":  # the same function
            case = replace(case, score_function="softmax", renormalize=True)
        return {f: value for f, value in self.states.items() if f not in case.idle and getattr(case, f) != value}


class Difference(msgspec.Struct):
    """How far two layers are apart on one common problem: by quantity, the largest difference over the largest number.

    `scaled`: with the output of one multiplied so that both have the same scale, which a conversion can do.
    """

    problem: str
    apart: dict[str, float]  # out, dx, drouter, dw_gate, dw_up, dw_down, ...
    scaled: dict[str, float] = {}


class Survey(msgspec.Struct):
    """All that was surveyed into a folder."""

    layers: list[Surveyed]
    groups: list[list[int]]  # of those that are one function, by their places in `layers`; the largest first
    apart: dict[str, list[Difference]]  # by "i j", places in `layers` of the same dtype, i < j


def load(folder: Path) -> list[Surveyed]:
    """What was surveyed into this folder, the last line of each layer and dtype, by name.

    Raises ValueError on a line that is none of that.
    """
    path = folder / LINES
    found: dict[str, Surveyed] = {}
    for n, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            one = msgspec.json.decode(line, type=Surveyed)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}, line {n}, is none of a survey: {error}. Take it out") from error
        found[one.name] = one
    return [found[name] for name in sorted(found)]
