"""A layer of the user's own: what it is given, what is compared, and what is said of one that is wrong."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from parity.oracle.quantities import ALWAYS
from parity.run import own

pytestmark = pytest.mark.usefixtures("warm")
TEMPLATES = {framework: Path(own.__file__).with_name(f"template_in_{framework}.py") for framework in ("torch", "jax")}


def check(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "parity", "check", *arguments]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)


def written(home: Path, framework: str, *changes: tuple[str, str], name: str = "mine.py") -> str:
    """The template with each text replaced by another."""
    text = TEMPLATES[framework].read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (home / name).write_text(text)
    return name


def test_the_templates_match(tmp_path):
    for framework in TEMPLATES:
        written(tmp_path, framework, name=f"my_{framework}.py")
    mine = ("--backend", "my_torch.py", "--backend", "my_jax.py")
    run = check(tmp_path, "zipf", "drop-rank-token", "bfloat16", *mine, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    cases = {line["case"]["name"]: line for line in lines if line["kind"] == "case"}
    assert cases["zipf"]["not_supported"] == {}
    assert list(cases["drop-rank-token"]["not_supported"]) == ["my_torch", "my_jax"]
    seen = {(line["left"], line["right"], f"{line['mode']}/{line['stage']}/{line['value']}")
            for line in lines if line["kind"] == "comparison" and line["case"] == "zipf"}  # fmt: skip
    for left, right in (("my_torch", "oracle"), ("my_jax", "oracle"), ("my_torch", "my_jax")):
        assert {value for value in ALWAYS if (left, right, value) in seen} == {*ALWAYS}


def test_weights_whose_gradients_share_memory(tmp_path):
    """As those of two weights do that a layer joins: each is summed over ranks once."""
    joined = "    w_gate_EDF, w_up_EDF = torch.cat([w_gate_EDF, w_up_EDF], 2).split(case.hidden, 2)\n    score_TE ="
    run = check(tmp_path, "zipf", "--backend", written(tmp_path, "torch", ("    score_TE =", joined)), "--json")
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_number_of_experts_that_is_not_taken_from_the_case(tmp_path):
    """It is found in a case that asks for another, with the case in which the layer matches."""
    always = written(tmp_path, "torch", ("topk(case.top_k)", "topk(2)"))
    run = check(tmp_path, "bfloat16", "--backend", always, "--no-json")
    assert run.returncode == 1, run.stdout + run.stderr
    why = run.stdout[run.stdout.index("  why:") :].splitlines()
    assert why[0].endswith("experts of a token: 2, whatever case.top_k is; the case says --top-k 3")
    assert why[1] == "  matches:  python -m parity check bfloat16 --top-k 2 --backend mine.py"
    again = check(tmp_path, *shlex.split(why[1])[5:], "--no-json")
    assert again.returncode == 0, again.stdout + again.stderr


def test_what_matches_is_said_in_the_words_of_the_preset(tmp_path):
    """With its routing, where the layer matches there, too."""
    always = written(tmp_path, "torch", ("    if case.renormalize:", "    if True:"))
    run = check(tmp_path, "zipf", "--ranks", "2", "--backend", always, "--no-json")
    assert "  repeat:   python -m parity check zipf --ranks 2 --backend mine.py\n" in run.stdout
    assert "  matches:  python -m parity check zipf --ranks 2 --renormalize True --backend mine.py\n" in run.stdout


def test_two_layers_of_which_one_is_wrong_and_refuses_what_it_computes(tmp_path):
    right = written(tmp_path, "torch", name="right.py")
    gelu = ("silu((x_TD", "torch.nn.functional.gelu((x_TD")
    run = check(tmp_path, "zipf", "--backend", right, "--backend", written(tmp_path, "torch", gelu), "--no-json")
    assert "  between:  right and mine differ in 6 of 12 comparisons\n" in run.stdout
    assert "activation: gelu; the case says --activation silu\n" in run.stdout
    assert "not tried, as the layer declares that it computes --activation silu only\n" in run.stdout


def test_two_layers_that_are_wrong_each_have_their_own_report(tmp_path):
    """One raises in bfloat16 and breaks ties otherwise; the other has another activation, which is asked about once."""
    raises = ("    out_TD = torch", "    assert case.dtype != 'bfloat16'\n    out_TD = torch")
    gelu = ("silu((x_TD", "torch.nn.functional.gelu((x_TD")
    layers = (
        "--backend",
        written(tmp_path, "torch", raises),
        "--backend",
        written(tmp_path, "torch", gelu, name="b.py"),
    )
    run = check(tmp_path, "zipf", "ties", "bfloat16", *layers, "--no-json")
    assert run.returncode == 1, run.stdout + run.stderr
    blocks = {block.split("\n")[0]: block for block in run.stdout.split("\n\n")[1:-1]}
    assert [*blocks] == [
        "zipf: b is wrong in its output, in the whole layer; its stages are not seen",
        "ties: mine is wrong in its output, in the whole layer; its stages are not seen",
        "ties: b is wrong in its output, in the whole layer; its stages are not seen",
        "bfloat16: mine raised an error",
        "bfloat16: b is wrong in its output, in the whole layer; its stages are not seen",
    ]
    of_zipf, of_mine, of_b, raised, in_bfloat16 = blocks.values()
    assert "activation: gelu" in of_zipf
    assert "out against oracle: 4 of 64 rows" in of_mine
    assert "of equal scores" in of_mine
    assert "out against oracle: 64 of 64 rows" in of_b
    assert "  why:      see zipf\n" in of_b + "\n"
    assert "AssertionError" in raised
    assert "why:" not in raised
    assert "  look at:  b.py:22: layer\n" in in_bfloat16


def test_no_tokens(tmp_path):
    run = check(tmp_path, "t0", "--backend", written(tmp_path, "torch"), "--groups", "1", "--top-groups", "1")
    assert run.returncode == 0, run.stderr


def test_random_cases_for_a_layer_with_fixed_options(tmp_path):
    """They vary what such a layer computes: shapes, dtypes and routing."""
    lower_id = "(a[:, : case.top_k] for a in score_TE.sort(dim=-1, descending=True, stable=True))"
    mine = written(tmp_path, "torch", ("score_TE.topk(case.top_k)", lower_id))
    run = check(tmp_path, "--random", "20", "--seed", "7", "--backend", mine)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    cases = [line for line in lines if line["kind"] == "case"]
    supported = [line for line in cases if not line["not_supported"]]
    assert len(supported) == len(cases) == 20
    assert len({line["case"].get("dtype") for line in supported}) == 4
    assert len({line["case"].get("experts") for line in supported}) > 3
    assert run.stderr.endswith("match\n")


def test_the_module_in_the_documentation_matches(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "own-layer.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "functional_call" in code]
    (tmp_path / "mine.py").write_text(example)
    record = ("--record", "gate=route/score", "--record", "gate[1]=route/expert_id")
    for dtype in ("float32", "bfloat16", "float64"):
        flags = ("--renormalize", "True", "--dtype", dtype, "--backend", "mine.py", "--no-json")
        run = check(tmp_path, "zipf", *flags, *record)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "mine: compared: output, 5 gradients, stage 1; not seen: stages 2-8\n" in run.stdout


def test_the_layer_that_drops_in_the_documentation_matches(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "own-layer.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "drops=True" in code]
    drops = ("drop-rank-token", "drop-expert-token")
    for less, code in (("", 0), (" - 1", 1)):
        (tmp_path / "mine.py").write_text(example.replace("case.capacity)", f"case.capacity{less})"))
        run = check(tmp_path, *drops, "--backend", "mine.py", "--no-json")
        assert run.returncode == code, run.stdout + run.stderr
        assert "not supported" not in run.stdout


# What is planted in the template, and what is then said of it.
WRONG = {
    "shape": ("torch", ("return out_TD.to(x_TD.dtype)", "return out_TD.to(x_TD.dtype).T"), 1,
              r"mine.py:22: layer returned shape [32, 16]: the output must be [16, 32]"),
    "dtype": ("torch", ("return out_TD.to(x_TD.dtype)", "return out_TD.double()"), 1,
              "mine.py:22: layer returned torch.float64: the output must be of the tokens' dtype, torch.float32"),
    "detached": ("torch", ("return out_TD", "return out_TD.detach()"), 1, "depends on nothing that has a gradient"),
    "router": ("torch", ("score_TE.topk(case.top_k)", "score_TE.detach().topk(case.top_k)"), 1,
               "drouter: the output does not depend on router"),
    "raises": ("torch", ("    out_TD = torch", "    assert False, 'no more'\n    out_TD = torch"), 1,
               "raised AssertionError: no more (mine.py:31)"),
    "no output": ("torch", ("    out_TD = torch", "    assert False\n    out_TD = torch"), 1,
                  "zipf: mine raised an error out against oracle: rank"),
    "scale": ("torch", ("return out_TD", "return 1.01 * out_TD"), 1, "mine is wrong in its output"),
    "scale in jax": ("jax", ("return einsum(", "return 1.01 * einsum("), 1, "mine is wrong in its output"),
    "shape in jax": ("jax", (".astype(x_PTD.dtype)\n", ".astype(x_PTD.dtype)[0]\n"), 1,
                     "layer returned shape [16, 32]"),
    "name": ("torch", ("x_TD, router_DE", "tokens_TD, router_DE"), 2, "takes tokens_TD, which is not known"),
    "weights": ("torch", ("w_up_EDF, w_down_EFD, case", "w_down_EFD, case"), 2,
                "takes w_gate and w_down only: take w_gate (where experts have a gate), w_up and w_down, or none"),
    "framework": ("torch", ('framework="torch"', 'framework="numpy"'), 2, 'write @backend(framework="torch")'),
    "mark": ("torch", ('@backend(framework="torch")\n', ""), 2, "no function marked @backend"),
    "syntax": ("torch", ("import torch\n", "import torch torch\n"), 2, "invalid syntax"),
    "import": ("torch", ("import torch\n", "import torch\nimport no_such_package\n"), 3, "no_such_package"),
    "supports nothing": ("torch", ('framework="torch"', 'framework="torch", supports=lambda case: "not today"'), 5,
                         "mine: 1 of 1 cases not supported: not today (1)"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(tmp_path, what):
    framework, change, code, said = WRONG[what]
    run = check(tmp_path, "zipf", "--backend", written(tmp_path, framework, change), "--no-json")
    assert run.returncode == code, run.stdout + run.stderr
    assert said in " ".join((run.stdout + run.stderr).split()), run.stdout + run.stderr


RANKS = {
    "torch": '''
import torch
import torch.distributed as dist
from torch.nn.functional import silu
from parity import backend


@backend(framework="torch")
def layer(x_TD, score_TK, expert_id_TK, w_gate_eDF, w_up_eDF, w_down_eFD, keep_TK, case, group):
    """Every rank computes its experts on everybody's tokens, and all are added up."""
    from torch.distributed.nn.functional import all_gather, all_reduce
    x, score = (torch.cat(all_gather(a.contiguous(), group)) for a in (x_TD, score_TK * keep_TK))
    ids = [torch.empty_like(expert_id_TK) for _ in range(case.ranks)]
    dist.all_gather(ids, expert_id_TK, group)
    ids, rank, e = torch.cat(ids), dist.get_rank(group), len(w_gate_eDF)
    out = torch.zeros_like(x)
    for i in range(e):
        weight = (score * (ids == rank * e + i)).sum(-1, keepdim=True)
        out = out + weight * ((silu(x @ w_gate_eDF[i]) * (x @ w_up_eDF[i])) @ w_down_eFD[i])
    return all_reduce(out, group=group)[rank * len(x_TD) : (rank + 1) * len(x_TD)]
''',
    "jax": '''
import jax
import jax.numpy as jnp
from parity import backend


@backend(framework="jax")
def layer(x_TD, score_TK, expert_id_TK, w_gate_eDF, w_up_eDF, w_down_eFD, keep_TK, axis_name):
    """Every rank computes its experts on everybody's tokens, and all are added up."""
    gather = lambda a: jax.lax.all_gather(a, axis_name, tiled=True)
    x, score, ids = gather(x_TD), gather(score_TK * keep_TK), gather(expert_id_TK)
    e = len(w_gate_eDF)
    mine = jax.lax.axis_index(axis_name) * e + jnp.arange(e)
    weight = jnp.einsum("tke,tk->te", ids[..., None] == mine, score)
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, w_gate_eDF)) * jnp.einsum("td,edf->etf", x, w_up_eDF)
    out = jnp.einsum("te,etf,efd->td", weight, hidden, w_down_eFD)
    return jax.lax.psum_scatter(out, axis_name, tiled=True)
''',
}


@pytest.mark.parametrize("framework", RANKS)
def test_a_layer_over_ranks_with_routing_that_is_handed_in(tmp_path, framework):
    (tmp_path / "mine.py").write_text(RANKS[framework])
    run = check(tmp_path, "zipf", "drop-rank-score", "--backend", "mine.py", "--no-json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "not supported" not in run.stdout


@pytest.mark.parametrize(("names", "per_rank", "all_experts"), [
    ("x w_gate w_up w_down", True, True), ("x_TD w_gate_eDF w_up_eDF w_down_eFD", True, False),
    ("x w_gate w_up w_down group", True, False), ("x w_gate_EDF w_up_EDF w_down_EFD group", True, True),
])  # fmt: skip
def test_which_weights_a_layer_is_given(names, per_rank, all_experts):
    found = own.signature("torch", names.split(), "mine.py:1: layer")
    assert (found.per_rank, found.all_experts) == (per_rank, all_experts)


def test_new_leaves_what_is_there(tmp_path):
    command = [sys.executable, "-m", "parity", "new", "mine.py", "--framework", "jax"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0
    assert "--backend mine.py" in (tmp_path / "mine.py").read_text()
    assert second.returncode == 2
    assert "mine.py exists" in second.stderr


def test_another_interpreter_runs_it(tmp_path):
    """Here one that knows nothing but where its packages are; the trace says which it was."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = check(tmp_path, "p1", "--backend", f"{written(tmp_path, 'torch')}@{python}", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    (backend,) = json.loads(run.stdout.splitlines()[0])["backends"]
    assert backend["python"] == str(python)


def test_an_interpreter_that_lacks_a_package_is_told_which(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'msgspec'\" >&2\nexit 1\n")
    python.chmod(0o755)
    run = check(tmp_path, "p1", "--backend", f"{written(tmp_path, 'torch')}@{python}")
    assert run.returncode == 3
    assert f"msgspec is not installed there: {python} -m pip install numpy" in " ".join(run.stderr.split())
    run = check(tmp_path, "p1", "--backend", "mine.py@/no/python")
    assert run.returncode == 2
    assert "there is no interpreter /no/python" in run.stderr


def test_a_module_of_a_package_imports_from_it(tmp_path):
    (package := tmp_path / "stack").mkdir()
    (package / "__init__.py").touch()
    (package / "more.py").write_text("from torch.nn.functional import silu\n")
    written(package, "torch", ("from torch.nn.functional import silu", "from .more import silu"), name="moe.py")
    run = check(tmp_path, "p1", "--backend", "stack.moe:layer", "--no-json")
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_jax_traces_may_say_that_it_does_not_support_it(tmp_path):
    run = check(tmp_path, "p1", "--activation", "gelu_tanh", "--backend", written(tmp_path, "jax"), "--no-json")
    assert run.returncode == 5, run.stdout + run.stderr
    assert "mine: 1 of 1 cases not supported: it computes --activation silu only (1)" in run.stdout


def test_one_choice_too_large_shows_in_bfloat16(tmp_path):
    """Its rows are within their allowances; what all second choices add is not."""
    change = ("score_TK[t, k, None] * y_nD", "score_TK[t, k, None] * (1 + 0.01 * (k == 1))[:, None] * y_nD")
    run = check(tmp_path, "bfloat16", "--backend", written(tmp_path, "torch", change), "--json")
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    (found,) = [line for line in lines if line["kind"] == "comparison" and line["value"] == "out" and not line["ok"]]
    assert found["scale"]
    assert found["where"] == {"k": 1}
    assert 1.005 < found["got"] < 1.015


def test_two_layers_that_have_what_the_oracle_has_not(tmp_path):
    """They are wrong by the oracle and agree with each other; `--between` judges them by that, and one that differs."""
    root = {
        "torch": ("score_TE = logits_TE.softmax(-1)", "score_TE = logits_TE.softmax(-1).sqrt()"),
        "jax": ("score_PTE = jax.nn.softmax(logits_PTE)", "score_PTE = jnp.sqrt(jax.nn.softmax(logits_PTE))"),
    }
    mine = [part for framework, change in root.items()
            for part in ("--backend", written(tmp_path, framework, change, name=f"my_{framework}.py"))]  # fmt: skip
    run = check(tmp_path, "p1", *mine, "--no-json")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "agree with each other, row by row: use --between to judge them by that" in run.stdout
    run = check(tmp_path, "p1", *mine, "--no-json", "--between")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "my_jax against the oracle: 0 of 1 cases match; the first, p1: my_jax is wrong in its " in run.stdout
    run = check(tmp_path, "p1", *mine[:2], "--backend", "jax", "--no-json", "--between")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "differ from each other" in run.stdout
    run = check(tmp_path, "p1", *mine[:2], "--between")
    assert (run.returncode, "--between needs two backends" in run.stderr) == (2, True), run.stderr
