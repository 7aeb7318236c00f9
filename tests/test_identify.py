"""What a layer is: how explanations are decided between, what commands print and write, what `check` says of why."""

import json
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_cli import in_process

from parity.cases.case import Case
from parity.explain import probes
from parity.explain.hypotheses import Hypothesis, decide, residual
from parity.explain.identify import identify
from parity.judge import records
from parity.judge.card import Card, Finding, differences
from parity.report.html import page
from parity.report.terminal import explanation
from parity.run import ours
from parity.run.backend import Setting

LAYER = """
import math
from pathlib import Path
from fractions import Fraction

import torch
from torch.nn.functional import gelu, silu

from parity import backend


def run(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, act=silu, scale=1.0, renormalize=False, rows=None):
    accum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    score_TK, id_TK = (x_TD.to(accum_dtype) @ router_DE).softmax(-1).topk(case.top_k)
    if renormalize:
        score_TK = score_TK / score_TK.sum(-1, keepdim=True)
    out_TD = torch.zeros_like(x_TD, dtype=accum_dtype)
    for e in range(case.experts):
        k, t = (id_TK == e).T.nonzero(as_tuple=True)
        t, k = t[:rows], k[:rows]  # first choices first
        hidden_nF = act((x_TD[t] @ w_gate_EDF[e]).to(accum_dtype)) * (x_TD[t] @ w_up_EDF[e]).to(accum_dtype)
        y_nD = hidden_nF.to(x_TD.dtype) @ w_down_EFD[e]
        out_TD = out_TD.index_add(0, t, scale * score_TK[t, k, None] * y_nD)
    return out_TD.to(x_TD.dtype)


@backend(framework="torch")
def plain(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return run(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)


@backend(framework="torch")
def other(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return run(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, gelu, 2.5, True)


@backend(framework="torch", drops=True)
def dropping(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    rows = math.ceil(Fraction(case.capacity_factor) * len(x_TD) * case.top_k / case.experts)
    return run(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, rows=rows)
"""


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "layers.py"
    path.write_text(LAYER)
    return path


def card_of(named: str, case: Case) -> Card:
    return identify(ours.find(named), [case], Setting())


def explanations(*residuals: float) -> list[Hypothesis]:
    return [Hypothesis(f"as {i}", off, {"scale": i}) for i, off in enumerate(residuals)]


@pytest.mark.parametrize(
    ("residuals", "state", "what"),
    [
        ((1e-7, 1e-2), "found", "as 0"),
        ((1e-2, 1e-7), "found", "as 1"),
        ((1e-2, 1e-1), "unknown", "none of 2 explanations fits; nearest: as 0"),
        ((1e-7, 1e-6), "cannot tell", "cannot tell: as 0; or as 1"),
        ((1e-7, 2.9e-5), "cannot tell", "cannot tell: as 0; or as 1"),  # within three times the tolerance
        ((1e-7, 3.1e-5), "found", "as 0"),
        ((math.nan, 1e-7), "found", "as 1"),
    ],
)
def test_an_explanation_is_found_where_it_fits_and_no_other_comes_near(residuals, state, what):
    finding = decide("scale", explanations(*residuals), 1e-5, "none")
    assert (finding.state, finding.what) == (state, what)
    assert bool(finding.fields) == (state != "unknown")


def test_of_those_that_cannot_be_told_apart_the_asked_one_stands_for_all():
    assert decide("scale", explanations(0, 0), 1e-5, "none", {"scale": 1}).fields == {"scale": 1}


def test_an_error_of_a_small_number_counts_as_much_as_one_of_a_large_one():
    expected = np.array([1.0, 0.01])
    assert residual(expected * [1, 1.1], expected) == pytest.approx(0.1)
    assert residual(np.array([1.0, math.nan]), expected) == math.inf


def test_probes_read_scores_without_rounding():
    """Each token's scores show in the output bit for bit, in 16 bits too: no logit, gate or up is rounded."""
    for dtype in ("float32", "bfloat16", "float16"):
        found = probes.make(probes.probing_case(Case(dtype=dtype), ()))
        x = found.problems["readout-0"].x
        assert np.array_equal(x.astype(np.float64).reshape(-1, 32)[found.tokens.at["routing"]],
                              found.tokens.rows[0])  # fmt: skip


def test_check_says_why_and_what_would_match(layers, tmp_path, capsys):
    """In words, on the page, and in JSON, which is read back as it was."""
    command = ["check", "zipf", "--backend", f"{layers}:other", "--html", str(tmp_path / "page.html"), "--json"]
    code, lines, _ = in_process(capsys, *command)
    assert code == 1
    (path := tmp_path / "report.jsonl").write_text(lines)
    report = records.read(path)
    assert "\n".join(records.lines(report)) == lines.rstrip("\n")
    assert report.cards["zipf"][0].proved
    code, out, _ = in_process(capsys, "report", str(path))
    assert code == 1
    said = out[out.index("why:") : out.index("matches:")]
    assert "stage 6 experts: activation: gelu; the case says --activation silu" in said
    assert "stage 1 route: scale: 2.5; the case says --scale 1.0" in said
    assert "which is the same; the case says --renormalize False" in said
    assert len(said.splitlines()) == 4  # and no reason more
    of_two = explanation(report.cards["zipf"][0], named=True)
    assert any("other, stage 6 experts: activation: gelu" in line for line in of_two)
    again = next(line for line in out.splitlines() if "matches:" in line).split("-m parity ")[1].split()
    assert in_process(capsys, *again)[0] == 0
    html = (tmp_path / "page.html").read_text()
    assert "activation: gelu; the case says --activation silu" in html
    assert "found: nothing else explains it" in html
    assert html == page(report)


def test_a_layer_that_matches_is_not_asked(layers, capsys):
    code, out, _ = in_process(capsys, "check", "zipf", "--backend", f"{layers}:plain", "--no-json")
    assert code == 0
    assert "why" not in out


def test_what_was_found_is_written_and_checked(layers, tmp_path, capsys):
    found = tmp_path / "found.json"
    command = ["identify", "zipf", "--backend", f"{layers}:other", "--write", str(found), "--json"]
    code, out, _ = in_process(capsys, *command)
    assert code == 0
    card = json.loads(out)
    assert card["kind"] == "card"
    assert card["proved"]
    assert json.loads(found.read_text()) == card["case"]
    assert in_process(capsys, "check", "--case", str(found), "--backend", f"{layers}:other")[0] == 0


def test_two_layers_side_by_side_show_what_differs_first(layers, capsys):
    code, out, _ = in_process(
        capsys, "identify", "zipf", "--backend", f"{layers}:plain", "--backend", f"{layers}:other", "--no-json"
    )
    assert code == 0
    differing = out[: out.index("\nthe same")]
    for key in ("activation", "scores", "scale", "one expert a token"):
        assert key in differing
    assert "gate and up" not in differing
    assert "\nthey differ in: activation, scores, " in out


def test_what_a_layer_drops_is_found_with_its_formula(layers):
    card = card_of(f"{layers}:dropping", Case(name="drops", capacity_factor="5/4", capacity_per="expert", ranks=2))
    dropped = card.get("dropped")
    assert dropped
    assert dropped.fields == {"capacity_factor": "5/4", "capacity_per": "expert", "priority": "choice"}
    assert card.proved, card.proof


def test_more_experts_than_coordinates(layers):
    card = card_of(f"{layers}:plain", Case(name="many", experts=48, width=16, top_k=4, ranks=2))
    found = {finding.key: finding.what for finding in card.findings}
    assert found["scores"] == "softmax over all experts"
    assert found["choice"] == "those with the largest logits"
    assert card.proved, card.proof
    assert not [finding for finding in card.findings if finding.state == "unknown"]


def test_a_layer_does_not_differ_from_itself_on_other_ranks(layers):
    cards = [card_of(f"{layers}:plain", Case(name=f"on-{ranks}", ranks=ranks)) for ranks in (1, 4)]
    assert differences(cards) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("identify", "zipf", "ties"), "one preset"),
        (("identify", "--width", "5"), "needs at least 6"),
        (("identify", "--model", "mixtral-8x7b"), "smaller --hidden"),
        (("check", "zipf", "--case", "no.json"), "case of its own"),
        (("check", "--case", "no.json"), "no.json"),
    ],
)
def test_what_cannot_be_asked_is_said(layers, capsys, arguments, said):
    code, _, err = in_process(capsys, *arguments, "--backend", f"{layers}:plain")
    assert code == 2
    assert said in err


def test_our_own_layer_in_jax_chooses_on_every_rank_for_itself(capsys):
    """On several ranks the gradient of what all share is the sum over ranks, of which each chose other experts."""
    own = Path(__file__).parent / "opaque_in_jax.py"
    code, out, _ = in_process(capsys, "check", "like-gemma4", "--ranks", "4", "--backend", f"{own}:layer", "--no-json")
    assert code == 0, out


def test_what_a_layer_can_take_and_the_case_has_not_is_no_reason():
    """A selection bias that a layer knows what to do with does not make it another layer where there is none."""
    found = Finding("selection bias", "added to the scores for the choice only", fields={"selection_bias": True})
    scale = Finding("scale", "2", fields={"scale": 2.0})
    asked = Case()
    card = Card("mine", asked, [found, scale], replace(asked, selection_bias=True, scale=2.0), "", True, "again", 0.0)
    assert card.reasons() == [("route", "scale: 2; the case says --scale 1.0")]
    assert card.matching == "again"
    alone = msgspec.structs.replace(card, findings=[found], case=replace(asked, selection_bias=True))
    assert alone.reasons() == [("", "the probes do not show why: these are as the case says: selection bias")]
    assert alone.matching == ""
    biased = msgspec.structs.replace(card, asked=replace(asked, selection_bias=True), case=asked, findings=[])
    assert biased.matching == "again"
