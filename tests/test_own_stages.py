"""What a layer of the user's own gives from its inside: compared, and blamed on the stage that is wrong first."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_own_layer import check

from parity.cases.presets import PRESETS
from parity.judge.compare import compare
from parity.oracle.problem import draw
from parity.run import inside, own
from parity.run.backend import Backend
from parity.run.trace import Trace

pytestmark = pytest.mark.usefixtures("warm")

LAYERS = {
    "torch": '''
import torch
from torch.nn.functional import gelu, silu
from parity import backend, record


@backend(framework="torch")
def layer(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    score_TE = (x_TD @ router_DE).softmax(-1)
    score_TK, id_TK = (a.flip(-1) for a in score_TE.topk(case.top_k))  # the best is last
    if case.renormalize:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + 1e-20)
    record("route/score", score_TK)
    record("route/expert_id", id_TK)
    out_TD, y_TKD = torch.zeros_like(x_TD), x_TD.new_zeros(*id_TK.shape, x_TD.shape[1])
    for e in range(case.experts):
        t, k = (id_TK == e).nonzero(as_tuple=True)
        x_nD = x_TD[t]
        y_nD = (silu(x_nD @ w_gate_EDF[e]) * (x_nD @ w_up_EDF[e])) @ w_down_EFD[e]
        record("group_by_expert/x", x_nD)
        record("apply_experts/y", y_nD, "grouped")
        y_TKD = y_TKD.index_put((t, k), y_nD)
        out_TD = out_TD.index_add(0, t, score_TK[t, k, None] * y_nD)
    return out_TD, {"return_tokens/y": y_TKD}
''',
    "jax": '''
import jax
import jax.numpy as jnp
from parity import backend, record


@backend(framework="jax")
def layer(x_PTD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    score_PTK, id_PTK = jax.lax.top_k(jax.nn.softmax(x_PTD @ router_DE), case.top_k)
    if case.renormalize:
        score_PTK = score_PTK / (score_PTK.sum(-1, keepdims=True) + 1e-20)
    record("route/score", score_PTK)
    record("route/expert_id", id_PTK)
    hidden = jax.nn.silu(jnp.einsum("ptd,edf->ptef", x_PTD, w_gate_EDF)) * jnp.einsum("ptd,edf->ptef", x_PTD, w_up_EDF)
    y_PTED = jnp.einsum("ptef,efd->pted", hidden, w_down_EFD)
    y_PTKD = jnp.take_along_axis(y_PTED, id_PTK[..., None], 2)
    rows_N3 = jnp.stack(jnp.indices(id_PTK.shape), -1).reshape(-1, 3)[::-1]
    record("apply_experts/y", y_PTKD.reshape(-1, y_PTKD.shape[-1])[::-1], rows_N3)
    return jnp.einsum("ptkd,ptk->ptd", y_PTKD, score_PTK), {"return_tokens/y": y_PTKD}
''',
}  # fmt: skip
GIVEN = {
    "torch": {"route", "group_by_expert", "apply_experts", "return_tokens"},
    "jax": {"route", "apply_experts", "return_tokens"},
}


def run(home: Path, framework: str, *arguments: str, change: tuple[str, str] = ("", "")) -> list[dict]:
    """The lines of a report on the layer in which a text is replaced by another."""
    text = LAYERS[framework]
    assert not change[0] or text.count(change[0]) == 1
    (home / "mine.py").write_text(text.replace(*change) if change[0] else text)
    done = check(home, *arguments, "--backend", "mine.py", "--json")
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("framework", LAYERS)
def test_what_a_layer_gives_is_compared(tmp_path, framework):
    lines = run(tmp_path, framework, "zipf", "k1")
    assert lines[-1]["verdict"] == "match", lines[-1]
    judged = {line["stage"] for line in lines if line["kind"] == "comparison" and line["rows"]
              and f"{line['mode']}/{line['stage']}/{line['value']}" in inside.CAN_GIVE.values()}  # fmt: skip
    assert judged == GIVEN[framework]


# What is planted in such a layer, and the stage, direction and value that are then blamed.
FAULTS = {
    "not renormalised": ("torch", ("if case.renormalize:", "if False:"), "route forward score"),
    "the least instead of the best": ("torch", ("topk(case.top_k)", "topk(case.top_k, largest=False)"),
                                      "route forward expert_id"),
    "router in bfloat16": ("torch", ("(x_TD @ router_DE)", "(x_TD.bfloat16() @ router_DE.bfloat16()).float()"),
                           "route forward score"),
    "rows of the token before": ("torch", ("x_nD = x_TD[t]", "x_nD = x_TD[t - 1]"), "group_by_expert forward x"),
    "gate and up exchanged": ("torch", ("silu(x_nD @ w_gate_EDF[e]) * (x_nD @ w_up_EDF[e])",
                                        "silu(x_nD @ w_up_EDF[e]) * (x_nD @ w_gate_EDF[e])"),
                              "apply_experts forward y"),
    "another activation": ("torch", ("silu(x_nD", "gelu(x_nD"), "apply_experts forward y"),
    "weights of the expert before": ("torch", ("w_down_EFD[e]", "w_down_EFD[e - 1]"), "apply_experts forward y"),
    "choices exchanged": ("torch", ("index_put((t, k)", "index_put((t, 1 - k)"), "return_tokens forward y"),
    "scale missing": ("torch", ("score_TK[t, k, None] * y_nD", "score_TK[t, 0, None] * y_nD"), "combine forward out"),
    "a gradient twice": ("torch", ("(silu(x_nD @ w_gate_EDF[e])",
                                   "(silu(x_nD @ (2 * w_gate_EDF[e] - w_gate_EDF[e].detach()))"),
                         "apply_experts backward dw_gate"),
    "softmax over another axis": ("jax", ("jax.nn.softmax(x_PTD @ router_DE)", "jax.nn.softmax(x_PTD @ router_DE, 1)"),
                                  "route forward"),
    "experts permuted": ("jax", ("ptef,efd->pted\", hidden, w_down_EFD", "ptef,efd->pted\", hidden, w_down_EFD[::-1]"),
                         "apply_experts forward y"),
    "choices exchanged in jax": ("jax", ("\"return_tokens/y\": y_PTKD", "\"return_tokens/y\": y_PTKD[:, :, ::-1]"),
                                 "return_tokens forward y"),
    "a choice dropped": ("jax", ("jnp.einsum(\"ptkd,ptk->ptd\", y_PTKD, score_PTK)",
                                 "jnp.einsum(\"ptkd,ptk->ptd\", y_PTKD[:, :, :1], score_PTK[:, :, :1])"),
                         "combine forward out"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_the_stage_that_is_wrong_is_blamed(tmp_path, what):
    framework, change, blamed = FAULTS[what]
    lines = run(tmp_path, framework, "p1", "--renormalize", "True", change=change)
    (found,) = [line for line in lines if line["kind"] == "blame"]
    said = f"{found['stage']} {found['direction']} {found['check']['value']}"
    assert said.startswith(blamed), found
    assert found["function"].startswith("mine.py:"), found


HOOKED = """
import torch
from torch import nn
from torch.nn.functional import silu
from parity import backend


class Gate(nn.Module):
    def forward(self, x, router, case):
        return (x @ router).softmax(-1).topk(case.top_k)


class Expert(nn.Module):
    def forward(self, x, gate, up, down):
        return (silu(x @ gate) * (x @ up)) @ down


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate, self.experts = Gate(), nn.ModuleList([Expert() for _ in range(n)])

    def forward(self, x, router, w_gate, w_up, w_down, case):
        score, ids = self.gate(x, router, case)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, t, score[t, k, None] * expert(x[t], w_gate[e], w_up[e], w_down[e]))
        return out


@backend(framework="torch")
def layer(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return Block(case.experts)(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case)
"""


@pytest.mark.parametrize("names", [("gate", "gate[1]", "experts.*"), ("Gate", "Gate[1]", "Expert")])
def test_hooks_on_modules(tmp_path, names):
    values = ("route/score", "route/expert_id", "apply_experts/y:grouped")
    flags = [flag for pair in zip(names, values, strict=True) for flag in ("--record", "=".join(pair))]
    (tmp_path / "mine.py").write_text(HOOKED)
    done = check(tmp_path, "zipf", "--renormalize", "False", *flags, "--backend", "mine.py", "--no-json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine: compared: output, 5 gradients, stages 1, 6; not seen: stages 2-5, 7-8" in done.stdout
    (tmp_path / "mine.py").write_text(HOOKED.replace("return (silu", "return (1.001 * silu"))
    done = check(tmp_path, "zipf", "--renormalize", "False", *flags, "--backend", "mine.py", "--no-json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mine is wrong at stage 6 experts" in done.stdout
    assert f"--record {flags[1]}" in done.stdout


def test_a_gradient_that_is_wrong_marks_its_stage(tmp_path):
    """The values of the stage match; half of a gradient arrives, and that is said."""
    begins = "w_down_EFD, case):\n"
    halved = HOOKED.replace(begins, begins + "    w_up_EDF = (w_up_EDF + w_up_EDF.detach()) / 2\n")
    assert halved != HOOKED
    (tmp_path / "mine.py").write_text(halved)
    flags = ("--record", "experts.*=apply_experts/y:grouped", "--backend", "mine.py", "--no-json")
    done = check(tmp_path, "zipf", "--renormalize", "False", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\u00b7\u00b7\u00b7\u00b7\u00b7\u2717\u00b7\u00b7\u00b7" in done.stdout
    assert "mine is wrong at stage 6 experts, backward, in the whole layer\n" in done.stdout
    assert "gradient dw_up: 0.5 times it\n" in done.stdout
    (tmp_path / "other.py").write_text(HOOKED.replace("return Block(", "return 1.5 * Block("))
    done = check(tmp_path, "zipf", "--renormalize", "False", "--backend", "other.py", *flags)
    assert "\u00b7\u00b7\u00b7\u00b7\u00b7\u2717\u00b7\u00b7\u00b7" in done.stdout  # beside one that is wrong elsewhere
    assert done.stdout.count("gradient dw_up: 0.5 times it\n") == 1


@pytest.mark.parametrize(("text", "code", "said"), [
    ("gate=route", 2, "write MODULE=STAGE/VALUE"), ("gate=route/weights", 2, "no array is called route/weights"),
    ("router=route/score", 1, "calls no module router, which --record names: it calls Block"),
    ("gate=route/score:token", 2, "route/score has no rows"),
    ("experts.*=apply_experts/y:sorted", 2, "no order is called sorted: there are token"),
])  # fmt: skip
def test_hooks_that_name_nothing(tmp_path, text, code, said):
    (tmp_path / "mine.py").write_text(HOOKED)
    done = check(tmp_path, "p1", "--renormalize", "False", "--record", text, "--backend", "mine.py", "--no-json")
    assert done.returncode == code, done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())


def test_record_does_nothing_outside_of_a_check():
    from parity import record, recording

    record("apply_experts/y", 1)
    with recording() as inner:
        record("apply_experts/y", 2)
    assert [one.array for one in inner] == [2]


WHERE = Backend("mine", "torch", "opaque", ("e2e/combine/out",), {"": "mine.py:1: layer"})


def rows_given(rows: list[list[int]] | str | None, n: int) -> dict[str, list[np.ndarray]]:
    """What comes of `n` rows that a layer with one rank gives, with what it says of them."""
    problem = draw(PRESETS["p1"])
    given = {"apply_experts/y": [np.zeros((n, problem.case.width))]}
    if isinstance(rows, list):
        given["rows/apply_experts/y"] = [np.array(rows)]
    return inside.placed(problem, WHERE, given, {"apply_experts/y": rows} if isinstance(rows, str) else {})


def test_rows_by_identity():
    K = PRESETS["p1"].top_k
    assert rows_given([[0, 3, 1], [-1, 0, 0], [0, 0, 0]], 3)["rows/apply_experts/y"][0].tolist() == [3 * K + 1, -1, 0]


def test_rows_that_cannot_be():
    with pytest.raises(own.OwnLayerError, match=r"has the row identity \[1, 0, 0\]"):
        rows_given([[1, 0, 0]], 1)


def test_rows_past_those_that_there_are_are_padding():
    case = PRESETS["p1"]
    numbers = rows_given("grouped", case.assignments + 5)["rows/apply_experts/y"][0]
    assert (numbers[-5:] == -1).all()
    assert (numbers[:-5] >= 0).all()


INNER = ("jax.jit({})(score_PTK)", "jax.vmap({})(score_PTK)", "jax.lax.scan(lambda c, s: (c, {}(s)), 0, score_PTK)")


@pytest.mark.parametrize("within", INNER)
def test_record_inside_a_function_that_jax_traces_on_its_own(tmp_path, within):
    inner = within.format('(lambda s: record("route/score", s))') + "\n"
    lines = run(tmp_path, "jax", "p1", change=('record("route/score", score_PTK)\n', inner))
    (found,) = [line for line in lines if line["kind"] == "blame"]
    assert "records route/score inside a function that it jits" in found["check"]["note"], found


@pytest.mark.parametrize(
    ("slice_of", "said"), [("[1:]", "1 rows are missing"), ("[[0, *range(len(y_PTKD))]]", "twice")]
)
def test_rows_that_are_missing_or_there_twice(tmp_path, slice_of, said):
    old = "y_PTKD.reshape(-1, y_PTKD.shape[-1])[::-1], rows_N3)"
    if slice_of == "[1:]":
        new = "y_PTKD.reshape(-1, y_PTKD.shape[-1])[::-1][1:], rows_N3[1:])"
    else:
        new = "jnp.concatenate([y_PTKD[0, 0, :1], y_PTKD.reshape(-1, y_PTKD.shape[-1])[::-1]]), " \
              "jnp.concatenate([jnp.zeros((1, 3), int), rows_N3]))"  # fmt: skip
    lines = run(tmp_path, "jax", "p1", change=(old, new))
    (found,) = [line for line in lines if line["kind"] == "blame"]
    assert said in found["check"]["note"], found


def test_rows_of_another_program_that_no_one_numbers():
    problem = draw(PRESETS["p1"])
    name = "e2e/apply_experts/y"
    arrays = {name: [np.zeros((problem.case.assignments, problem.case.width), np.float32)]}
    trace = Trace(problem.case, msgspec.structs.replace(WHERE, provides=(name,)), {}, arrays=arrays)
    (found,) = compare(problem, [trace])
    assert found.note == "nothing says which rows these are"
