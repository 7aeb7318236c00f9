"""Layers as a survey has them, with cards in the words of `identify`, and nothing run."""

from dataclasses import replace
from typing import Any

from parity.cases.case import Case
from parity.cases.parameters import PARAMETERS
from parity.explain.reading import SCORE_WORDS
from parity.judge.card import Card, Finding
from parity.survey.records import Surveyed

OURS = {parameter.name: f"{parameter.name}: {parameter.axes}" for parameter in PARAMETERS}


def findings(case: Case) -> list[Finding]:
    """What a card says of a layer that is what this case says."""
    renormalised = ", renormalised" * case.renormalize
    taken = {
        "router bias": (case.router_bias, "added to the logits"),
        "selection bias": (case.selection_bias, "added to the scores for the choice only"),
        "scale of experts": (case.expert_scale, "multiplies the weights"),
        "biases of gate and up": (case.expert_bias, "added to gate and up"),
        "bias of down": (case.expert_bias, "added to what an expert returns, and weighed"),
        "shared expert": (
            case.shared_hidden,
            "added" + ", weighed by the sigmoid of its score" * case.shared_score,
        ),
    }
    return [
        Finding("activation", case.activation, residual=3e-8, rival="relu", rival_residual=2.0, experiment="units",
                fields={"activation": case.activation}),
        Finding("added to up", f"{case.up_offset:g}" if case.up_offset else "nothing"),
        Finding("clamp", "none" if case.clamp is None else f"gate at most {case.clamp:g}, up within {case.clamp:g}"),
        Finding("experts of a token", f"{case.top_k}"),
        Finding("choice", "those with the largest logits"),
        Finding("scores", SCORE_WORDS[case.score_function] + renormalised, fields={"renormalize": case.renormalize}),
        Finding("scale", f"{case.scale:g}"),
        Finding("of equal scores", "the lower expert id is chosen"),
        Finding("sum over the chosen", "in order of k, in float32"),
        *(Finding(key, what) for key, (there, what) in taken.items() if there),
        Finding("gradients", "the derivative of the output, all 5"),
    ]  # fmt: skip


def surveyed(
    layer: str, stored: dict[str, str] | None = None, said: dict[str, Any] | None = None, **fields: Any
) -> Surveyed:
    """A layer that is what a case with these fields says; `said`: findings in other words, or none."""
    case = replace(Case(ranks=1, top_k=3), **{name: value for name, value in fields.items() if hasattr(Case, name)})
    found = {finding.key: finding for finding in findings(case)}
    for key, what in (said or {}).items():
        if what is None:
            found.pop(key, None)
        else:
            found[key] = what if isinstance(what, Finding) else Finding(key, what)
    card = Card(layer, case, list(found.values()), case, "output and 5 gradients match", True, f"check {layer}", 1.0)
    return Surveyed(layer, case.dtype, "torch", {"torch": "2.13.0"}, card, stored=stored or {})
