"""The card of a layer: what was found about it, one finding per line."""

from typing import Any, Literal

import msgspec

from parity.cases.case import Case, flag

# found: one explanation holds, and no other comes near. odd: as found, but no case can express it. cannot tell:
# several explanations hold. unknown: no explanation that was tried holds.
State = Literal["found", "odd", "cannot tell", "unknown"]

NOT_RUN = "not run: "  # how a proof begins that the layer refused

# The stage that each finding is about.
STAGE = {
    "scores": "route", "scale": "route", "choice": "route", "experts of a token": "route", "added to the sum": "route",
    "one expert a token": "route", "of equal scores": "route", "precision of logits": "route", "router bias": "route",
    "selection bias": "route", "scale of experts": "route", "numbers of experts": "route", "dtype of scores": "route",
    "dropped": "group_by_expert", "weight of the dropped": "group_by_expert", "other tokens": "group_by_expert",
    "gate and up": "apply_experts", "activation": "apply_experts", "added to up": "apply_experts",
    "clamp": "apply_experts", "precision of experts": "apply_experts", "biases of gate and up": "apply_experts",
    "bias of down": "apply_experts", "shared expert": "apply_experts", "clamp of the shared expert": "apply_experts",
    "beside the experts": "combine",
    "the score multiplies": "combine", "sum over the chosen": "combine", "gradient drouter": "route",
    "gradient dw_gate": "apply_experts", "gradient dw_up": "apply_experts", "gradient dw_down": "apply_experts",
}  # fmt: skip


class Finding(msgspec.Struct, omit_defaults=True):
    """One property of a layer."""

    key: str
    """The property, such as `scores` or `clamp`."""
    what: str
    """What it is, in words."""
    state: State = "found"
    """How sure that is: found, odd (found, and no case can express it), cannot tell, unknown."""
    residual: float | None = None
    """The largest relative error of the best explanation."""
    rival: str = ""
    """The next best explanation."""
    rival_residual: float | None = None
    """The largest relative error of the next best explanation."""
    experiment: str = ""
    """The experiment that shows it."""
    fields: dict[str, Any] = {}
    """Fields of a case that express the finding."""
    numbers: dict[str, Any] = {}
    """Measured numbers that `what` does not give."""

    @property
    def stage(self) -> str:
        """The stage that the finding is about; an empty string if it is about the whole layer."""
        return STAGE.get(self.key, "")

    def otherwise(self, case: Case) -> list[str]:
        """Fields in which the finding differs from `case`. An extra input that a layer can take is no difference."""
        return [name for name, value in self.fields.items() if _other(case, name, value)]


class Card(msgspec.Struct, tag_field="kind", tag="card"):
    """A layer, as its outputs describe it."""

    backend: str
    """The layer's name."""
    asked: Case
    """The case whose sizes and options it was asked with."""
    findings: list[Finding]
    """Its properties, one entry each."""
    case: Case
    """The case that expresses what was found."""
    proof: str
    """What `check` says of the layer in that case."""
    proved: bool
    """Whether output and gradients match there."""
    command: str
    """The command that repeats the proof."""
    seconds: float
    """Seconds that it took."""

    def get(self, key: str) -> Finding | None:
        """The finding of that key."""
        return next((finding for finding in self.findings if finding.key == key), None)

    def reasons(self) -> list[tuple[str, str]]:
        """Why the layer is not what the asked case says, as (stage, sentence).

        These are findings that contradict the case and, unless the proof shows those to be all, findings that no case
        can express. If there are none of either, the reason lists what was excluded.
        """
        differs, odd = [], []
        for finding in self.findings:
            said = (finding.stage, f"{finding.key}: {finding.what}")
            other = finding.otherwise(self.asked)
            if other and finding.state in ("found", "cannot tell"):
                says = " ".join(f"--{flag(name)} {getattr(self.asked, name)}" for name in other)
                differs.append((said[0], f"{said[1]}; the case says {says}"))
            if finding.state in ("odd", "unknown") or _no_case_of_several(finding):
                odd.append(said)
        excluded = (f.key for f in self.findings if f.state == "found" and not f.otherwise(self.asked))
        nothing = ("", f"the probes do not show why: these are as the case says: {', '.join(excluded)}")
        return differs if differs and self.proved else differs + odd or [nothing]

    @property
    def matching(self) -> str:
        """The command of another case, in which the layer matches; an empty string if there is none."""
        fields = {name for finding in self.findings for name in finding.fields} | TAKEN
        other = any(_other(self.asked, name, getattr(self.case, name)) for name in fields)
        return self.command if self.proved and other else ""

    @property
    def untried(self) -> str:
        """Why the layer could not be tried in the case that was found; an empty string if it was."""
        return self.proof.removeprefix(NOT_RUN) if self.proof.startswith(NOT_RUN) else ""


def _no_case_of_several(finding: Finding) -> bool:
    """Whether several explanations of what is dropped hold, and no case can express any."""
    return finding.key == "dropped" and finding.state == "cannot tell" and not finding.fields


# Fields for optional inputs of a layer. In a case without such an input, being able to take it makes no difference.
TAKEN = {"router_bias", "selection_bias", "expert_scale", "expert_bias", "shared_hidden", "shared_score"}


def _other(case: Case, name: str, value: Any) -> bool:
    """Whether a field's value differs from the case's, and the difference matters in that case."""
    own = getattr(case, name)
    return value != own and name not in case.idle and not (name in TAKEN and not own)


def keys(cards: list[Card]) -> list[str]:
    """Keys of the findings of several layers: those in which they differ first."""
    differ = differences(cards)
    return differ + [key for key in _every(cards) if key not in differ]


def differences(cards: list[Card]) -> list[str]:
    """Keys of the findings in which layers differ."""
    return [key for key in _every(cards) if len({_said(card.get(key)) for card in cards}) > 1]


def _every(cards: list[Card]) -> list[str]:
    return list(dict.fromkeys(finding.key for card in cards for finding in card.findings))


def _said(finding: Finding | None) -> str:
    return "" if finding is None else finding.what
