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

    assert not parity.check(layer, "p1")
    with pytest.raises(AssertionError, match="layer is wrong at stage 9 combine") as found:
        parity.assert_match(layer, in_torch, "p1")
    assert "test_api.py:" in str(found.value)
    assert "rank 0, source rank 0, token " in str(found.value)


def test_two_of_one_name_are_told_apart():
    report = parity.check(in_torch, in_torch, "p1")
    assert list(report.backends) == ["in_torch.1", "in_torch.2"]


def test_nothing_compared_is_no_match():
    @parity.backend(framework="torch", supports=lambda case: "not today")
    def layer(x_TD):
        return x_TD

    with pytest.raises(AssertionError, match="not today"):
        parity.assert_match(layer, "p1")


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
