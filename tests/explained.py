"""What `identify` says of a layer with a planted fault: right, cannot tell, or wrong."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parity.cases.case import Case
from parity.cases.presets import PRESETS
from parity.explain.identify import identify
from parity.explain.probes import probing_case
from parity.judge.card import Card, Finding
from parity.run import own
from parity.run.backend import Backend, Setting
from parity.run.faults import Fault, plant

HERE = Path(__file__).parent
SETTING = Setting(timeout=120, jax_ranks="vmap")  # which compiles in a third of the time

# What a case does not say: each is as good as the others.
SAME_RESULT = ("sum over the chosen", "gradients", "one expert a token")

Verdict = Literal["right", "cannot tell", "wrong"]


class Explained(NamedTuple):
    """A fault, where to ask, and what is the right sentence."""

    fault: Fault
    key: str  # of the finding
    phrase: str  # in its sentence
    also: tuple[str, ...] = ()  # keys of other findings that are rightly something else too
    layer: str = "layer"  # the function in the file
    changed: Mapping[str, Any] = {}  # of the preset

    @property
    def base(self) -> Case:
        """The case to ask in."""
        return replace(PRESETS[self.fault.preset], **self.changed)


def opaque(framework: str, layer: str = "layer") -> Backend:
    """This project's layer as one of somebody's own."""
    found = own.read(f"{HERE / f'opaque_in_{framework}.py'}:{layer}")
    assert found
    return found


def card_of(one: Explained) -> Card:
    """The card of the layer with the fault."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        home = plant(one.fault, Path(folder) / "planted")
        return identify(opaque(one.fault.backend, one.layer), [one.base], SETTING, home)


def differences(card: Card, takes: tuple[str, ...]) -> list[Finding]:
    """The findings that say that the layer is not what the case says: what is odd, and other values of fields.

    What the layer takes beyond what the case has is no difference.
    """
    asked = probing_case(card.asked, takes)

    def differs(finding: Finding) -> bool:
        return finding.state == "odd" or (finding.state == "found" and bool(finding.otherwise(asked)))

    return [finding for finding in card.findings if differs(finding)]


def alike(finding: Finding, one: Explained) -> bool:
    """Whether it says of another gradient what is right of the one that is looked at."""
    return finding.key.startswith("gradient ") and one.key.startswith("gradient ") and one.phrase in finding.what


def verdict(card: Card, one: Explained) -> tuple[Verdict, str]:
    """Whether the card explains the fault, and the sentence; "wrong" where any sentence is."""
    takes = opaque(one.fault.backend, one.layer).takes
    found = card.get(one.key)
    said = differences(card, takes)
    if wrong := [f for f in said if f.key not in (one.key, *one.also) and not alike(f, one)]:
        return "wrong", "; ".join(f"{f.key}: {f.what}" for f in wrong)
    if found is None or found.state in ("cannot tell", "unknown"):
        return "cannot tell", f"{one.key}: {found.what if found else 'nothing is said'}"
    right = one.phrase in found.what and (found in said or found.key in SAME_RESULT)
    return "right" if right else "wrong", f"{found.key}: {found.what}"
