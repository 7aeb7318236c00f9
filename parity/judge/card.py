"""What was found of a layer: a card, a finding a line."""

from typing import Any, Literal

import msgspec

from parity.cases.case import Case, flag

# found: one explanation holds, and no other comes near. odd: likewise, and no case can say it. cannot tell: several
# explanations hold. unknown: none does; those that were tried are excluded.
State = Literal["found", "odd", "cannot tell", "unknown"]

# The stage that a finding is of.
STAGE = {
    "scores": "route", "scale": "route", "choice": "route", "experts of a token": "route", "added to the sum": "route",
    "one expert a token": "route", "of equal scores": "route", "precision of logits": "route", "router bias": "route",
    "selection bias": "route", "scale of experts": "route", "numbers of experts": "route", "dtype of scores": "route",
    "dropped": "group_by_expert", "weight of the dropped": "group_by_expert", "other tokens": "group_by_expert",
    "gate and up": "apply_experts", "activation": "apply_experts", "added to up": "apply_experts",
    "clamp": "apply_experts", "precision of experts": "apply_experts", "biases of gate and up": "apply_experts",
    "bias of down": "apply_experts", "shared expert": "apply_experts", "beside the experts": "combine",
    "the score multiplies": "combine", "sum over the chosen": "combine", "gradient drouter": "route",
    "gradient dw_gate": "apply_experts", "gradient dw_up": "apply_experts", "gradient dw_down": "apply_experts",
}  # fmt: skip


class Finding(msgspec.Struct, omit_defaults=True):
    """One property of a layer."""

    key: str
    what: str  # in words
    state: State = "found"
    residual: float | None = None  # of the best explanation: its largest error, as a part of what is explained
    rival: str = ""  # the next best
    rival_residual: float | None = None
    experiment: str = ""  # that shows it
    fields: dict[str, Any] = {}  # of a case that says so
    numbers: dict[str, Any] = {}  # what was measured, where that is more than the words

    @property
    def stage(self) -> str:
        """The stage that it is of; an empty string where it is of the layer as a whole."""
        return STAGE.get(self.key, "")


class Card(msgspec.Struct, tag_field="kind", tag="card"):
    """A layer, as its outputs show it."""

    backend: str
    asked: Case  # the case that it was asked in
    findings: list[Finding]
    case: Case  # the case that says what was found
    proof: str  # what `check` says of the layer in that case
    proved: bool  # whether output and gradients match there
    command: str  # that proves it again
    seconds: float

    def get(self, key: str) -> Finding | None:
        """The finding of that key."""
        return next((finding for finding in self.findings if finding.key == key), None)

    def reasons(self) -> list[tuple[str, str]]:
        """Why the layer is not what the asked case says, as (stage, sentence).

        What the case says otherwise; and, unless that is shown to be all, what no case can say.
        """
        differs, odd = [], []
        for finding in self.findings:
            said = (finding.stage, f"{finding.key}: {finding.what}")
            other = [n for n, v in finding.fields.items() if getattr(self.asked, n) != v and n not in self.asked.idle]
            if other and finding.state in ("found", "cannot tell"):
                says = " ".join(f"--{flag(name)} {getattr(self.asked, name)}" for name in other)
                differs.append((said[0], f"{said[1]}; the case says {says}"))
            if finding.state in ("odd", "unknown"):
                odd.append(said)
        return differs if differs and self.proved else differs + odd

    @property
    def differs(self) -> bool:
        """Whether the found case says something else than the asked one, in what the probes look at."""
        fields = {name for finding in self.findings for name in finding.fields}
        return any(getattr(self.case, name) != getattr(self.asked, name) for name in fields)

    def excluded(self) -> list[str]:
        """Keys of what was found to be as the asked case says."""
        return [
            finding.key
            for finding in self.findings
            if finding.state == "found" and all(getattr(self.asked, n) == v for n, v in finding.fields.items())
        ]


def keys(cards: list[Card]) -> list[str]:
    """Keys of the findings of several layers: those in which they differ first."""
    every = list(dict.fromkeys(finding.key for card in cards for finding in card.findings))
    return sorted(every, key=lambda key: key not in differences(cards))


def differences(cards: list[Card]) -> list[str]:
    """Keys of the findings in which layers differ."""
    every = list(dict.fromkeys(finding.key for card in cards for finding in card.findings))
    return [key for key in every if len({_said(card.get(key)) for card in cards}) > 1]


def _said(finding: Finding | None) -> str:
    return "" if finding is None else finding.what
