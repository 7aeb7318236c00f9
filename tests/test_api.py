"""From a notebook or a test: `parity.check` and `parity.assert_match`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.nn.functional import silu

import parity
from parity.cases.case import Case

pytestmark = pytest.mark.usefixtures("warm")
TOO_LARGE = 1.01


@parity.backend(framework="torch")
def in_torch(x_TD, score_TK, expert_id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    out_TD = torch.zeros_like(x_TD)
    for e in range(case.experts):
        t, k = (expert_id_TK == e).nonzero(as_tuple=True)
        y_nD = (silu(x_TD[t] @ w_gate_EDF[e]) * (x_TD[t] @ w_up_EDF[e])) @ w_down_EFD[e]
        parity.record("apply_experts/y", y_nD, "grouped")
        out_TD = out_TD.index_add(0, t, score_TK[t, k, None] * y_nD)
    return out_TD


@parity.backend(framework="jax")
def in_jax(x_PTD, score_PTK, expert_id_PTK, w_gate_EDF, w_up_EDF, w_down_EFD):
    hidden = jax.nn.silu(jnp.einsum("ptd,edf->ptef", x_PTD, w_gate_EDF)) * jnp.einsum("ptd,edf->ptef", x_PTD, w_up_EDF)
    y_PTED = jnp.einsum("ptef,efd->pted", hidden, w_down_EFD)
    return jnp.einsum("ptkd,ptk->ptd", jnp.take_along_axis(y_PTED, expert_id_PTK[..., None], 2), score_PTK)


def test_layers_that_match():
    parity.assert_match(in_torch, in_jax, "zipf", Case("mine", ranks=2))


def test_a_report_shows_itself():
    report = parity.check(in_torch, "zipf", ranks=1)
    assert report
    assert report.footer.verdict == "match"
    assert list(report.cases) == ["zipf-changed"]
    assert "stages 6; not seen" in str(report).replace("stage 6", "stages 6")
    assert str(report).endswith("match\n")


def test_a_layer_that_is_no_module_of_its_own():
    """As in a notebook: a function inside a function, with what it refers to."""
    factor = TOO_LARGE

    @parity.backend(framework="torch")
    def layer(x_TD, score_TK, expert_id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case):
        return factor * in_torch(x_TD, score_TK, expert_id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case)

    report = str(parity.check(layer, "p1"))
    assert "  why: " in report  # and it can be repeated where a file has it
    assert "--backend FILE.py:layer\n" in report
    with pytest.raises(AssertionError, match="layer is wrong at stage 9 combine") as found:
        parity.assert_match(layer, in_torch, "p1")
    assert "test_api.py:" in str(found.value)
    assert "on rank 0, token " in str(found.value)


def test_two_of_one_name_are_told_apart():
    report = parity.check(in_torch, in_torch, "p1")
    assert list(report.backends) == ["in_torch.1", "in_torch.2"]


def test_nothing_compared_is_no_match():
    @parity.backend(framework="torch", supports=lambda case: "not today")
    def layer(x_TD):
        return x_TD

    with pytest.raises(AssertionError, match="not today"):
        parity.assert_match(layer, "p1")


# ---- Options that a layer has not

SIGMOID = Case(score_function="sigmoid", scale=2.5)


@pytest.mark.parametrize(
    ("case", "free", "has", "refused"),
    [
        (Case(), [], {}, ""),
        (Case(top_k=5), [], {}, ""),  # which has no default
        (SIGMOID, [], {}, "--score-function softmax only"),
        (SIGMOID, [], {"score_function": "sigmoid"}, "--scale 1.0 only"),
        (SIGMOID, ["scale"], {"score_function": ("softmax", "sigmoid")}, ""),
        (SIGMOID, ["scale", "score_function"], {}, ""),
        (
            Case(),
            [],
            {"score_function": ("sigmoid", "sqrt_softplus")},
            "--score-function sigmoid or sqrt_softplus only",
        ),
        (Case(), [], {"renormalize": True}, "--renormalize True only"),
        (Case(clamp=7.0), [], {"up_offset": (0.0, 1.0)}, "--clamp None only"),
        (Case(activation="gelu"), [], {"activation": ("silu", "gelu")}, ""),
        (Case(groups=2, top_groups=2), ["groups"], {}, "--top-groups 1 only"),
    ],
)
def test_only(case, free, has, refused):
    if not refused:
        return parity.only(case, *free, **has)
    with pytest.raises(parity.Unsupported) as found:
        parity.only(case, *free, **has)
    assert str(found.value) == f"it computes {refused}"


@pytest.mark.parametrize(("free", "has"), [(["sale"], {}), ([], {"sale": 2.5}), (["capacity_per"], {})])
def test_only_knows_its_words(free, has):
    (name,) = [*free, *has]
    with pytest.raises(ValueError, match=f"{name}: no such option; there are top_k, score_function, renorm"):
        parity.only(Case(), *free, **has)


@parity.backend(framework="torch")
def may_be_biased(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    parity.only(case, score_function="sigmoid")
    score_TE = (x_TD @ router_DE).sigmoid()
    key_TE = score_TE if selection_bias_E is None else score_TE + selection_bias_E
    id_TK = key_TE.topk(case.top_k).indices
    return in_torch(x_TD, score_TE.gather(1, id_TK), id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case)


@parity.backend(framework="torch")
def is_biased(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E):
    return may_be_biased(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E)


BIASED = Case("biased", ranks=2, score_function="sigmoid", selection_bias=True, seed=3)  # in which it chooses otherwise
PLAIN = Case("plain", ranks=2, score_function="sigmoid")


def test_a_selection_bias_that_has_a_default():
    """It is given where there is one, and chooses; else it is None."""
    report = parity.check(may_be_biased, BIASED, PLAIN)
    assert report, str(report)
    assert "not supported" not in str(report)
    assert not parity.check(without_its_bias, BIASED)


@parity.backend(framework="torch")
def without_its_bias(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    return may_be_biased(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)


def test_one_that_has_none():
    report = parity.check(is_biased, BIASED, PLAIN)
    assert report, str(report)
    said = "1 of 2 cases not supported: the case has no `selection_bias`, and that argument has no default (1)"
    assert said in str(report)


@parity.backend(framework="torch")
def without_b_gate(x_TD, score_TK, expert_id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case, b_up_EF=None, b_down_ED=None):
    return in_torch(x_TD, score_TK, expert_id_TK, w_gate_EDF, w_up_EDF, w_down_EFD, case)


@pytest.mark.parametrize(
    ("layer", "said"), [(without_b_gate, "it takes no `b_gate`"), (in_torch, "it takes no `b_gate`, `b_up`, `b_down`")]
)
def test_a_bias_that_a_layer_does_not_take(layer, said):
    report = parity.check(layer, Case("with biases", ranks=1, expert_bias=True))
    assert not report
    assert f"1 of 1 cases not supported: {said} (1)" in str(report)


@pytest.mark.parametrize(("what", "error", "said"), [
    ((in_torch,), ValueError, "on which case"), ((print, "p1"), ValueError, "not marked as a layer"),
    ((in_torch, "no-such", "p1"), ValueError, "no backend is called no-such"), ((in_torch, 3), TypeError, "a layer is"),
    ((in_torch, "zippf"), ValueError, "no backend is called zippf"), (("zipf",), ValueError, "which layer"),
])  # fmt: skip
def test_what_cannot_be(what, error, said):
    with pytest.raises(error, match=said):
        parity.check(*what)


def test_importing_parity_imports_no_framework():
    code = "import parity, sys; print([m for m in ('torch', 'jax', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"
