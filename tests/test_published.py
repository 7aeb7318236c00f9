"""Published layers, where their packages are installed (make test-published); and what is said where they are not."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from published_cards import LAYERS as CARDS
from published_cards import held
from published_table import LAYERS, SOFTMAX

from parity.cases.case import Case
from parity.cases.parameters import parameters_of
from parity.cases.presets import MODELS
from parity.cli.check import chosen_cases
from parity.cli.main import parse
from parity.explain.identify import identify
from parity.run import ours
from parity.run.backend import Setting

ROOT = Path(__file__).parent.parent


def check(*arguments: str, home: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "parity", "check", *arguments, "--no-json"]
    environment = {name: a for name, a in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment)


@pytest.mark.published
@pytest.mark.parametrize("layer", [
    "transformers:qwen3_moe", "transformers:olmoe", "transformers:jamba", "transformers:mixtral",
    "transformers:granitemoe", "transformers:deepseek_v3", "megatron", "tokamax", "maxtext:dense",
    "maxtext:dense_over_ranks", "maxtext:ring_over_ranks",
])  # fmt: skip
def test_a_layer_matches_over_four_ranks(layer):
    run = check("zipf", *LAYERS[layer], "--backend", layer)
    assert run.returncode == 0, run.stdout + run.stderr


# The block of each real model; a shared expert of another width than D, F and E, where the block can have one.
BLOCKS: dict[str, tuple[str, int]] = {
    "deepseek-v3": ("deepseek_v3", 72), "kimi-k2": ("deepseek_v3", 72), "glm-4.5": ("glm4_moe", 72),
    "qwen3-30b-a3b": ("qwen3_moe", 0), "qwen3-next": ("qwen3_next", 40), "mixtral-8x7b": ("mixtral", 0),
    "gpt-oss-120b": ("gpt_oss", 0), "olmoe-1b-7b": ("olmoe", 0), "llama4-scout": ("llama4", 24),
    "minimax-m2": ("minimax_m2", 0), "gemma4": ("gemma4", 0),
}  # fmt: skip
# Routers that are in float32 also where the tokens are float64: all but gpt-oss's.
IN_FLOAT32 = ("--router-dtype", "float32")


def assert_block_matches(name: str, case: Case, *flags: str) -> None:
    """The block and both our layers: what must be compared is the output, and a gradient of all that is learned."""
    run = check(*flags, "--backend", "torch", "--backend", "jax", "--backend", f"transformers:{name}")
    assert run.returncode == 0, run.stdout + run.stderr
    learned = 1 + sum(parameter.learned for parameter in parameters_of(case))
    assert f"transformers.{name}: compared: output, {learned} gradients" in run.stdout


@pytest.mark.published
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model", MODELS)
def test_the_block_of_a_model_matches(model, dtype):
    name, shared = BLOCKS[model]
    flags = ["--width", "48", "--hidden", "24", "--ranks", "1", "--dtype", dtype]
    flags += ["--shared-hidden", str(shared)] if shared else []
    flags += IN_FLOAT32 if dtype == "float64" and name != "gpt_oss" else []
    case = replace(MODELS[model], width=48, hidden=24, ranks=1, shared_hidden=shared)
    assert_block_matches(name, case, "--model", model, *flags)


# Blocks of no model that has a name here, with all that they have.
SHARED = ("--shared-hidden", "72")
OTHERS: dict[str, tuple[str, ...]] = {
    "qwen2_moe": ("--shared-hidden", "40", "--shared-score", "True"),
    "deepseek_v2": ("--groups", "4", "--top-groups", "2", "--group-score", "max", "--outside-groups", "zero",
                    "--scale", "16", *SHARED),
    "nemotron_h": ("--gated", "False", "--activation", "relu2", "--score-function", "sigmoid", "--renormalize", "True",
                   "--scale", "2.5", "--groups", "4", "--top-groups", "2", "--selection-bias", "True",
                   "--shared-hidden", "40"),
    "lfm2_moe": ("--score-function", "sigmoid", "--renormalize", "True", "--epsilon", "1e-6", "--scale", "2.5",
                 "--selection-bias", "True"),
    "granitemoe": ("--score-function", "softmax_of_chosen", "--activation", "gelu"),
}  # fmt: skip


@pytest.mark.published
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_block_matches_with_all_that_it_has(name, dtype):
    flags = ("--width", "48", "--experts", "16", "--top-k", "3", "--ranks", "1", "--dtype", dtype, *OTHERS[name])
    flags += IN_FLOAT32 if dtype == "float64" and name != "lfm2_moe" else ()
    found = parse(["check", *flags])
    assert_block_matches(name, chosen_cases(found)[0], *flags)


@pytest.mark.published
def test_megatron_over_two_ranks():
    run = check("zipf", "--ranks", "2", "--backend", "megatron")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.published
@pytest.mark.parametrize(("layer", "said"), [
    ("transformers:jamba", "renormalize False only (1)"), ("transformers:deepseek_v3", "score function sigmoid only"),
    ("transformers:nemotron_h", "its experts have no gate"), ("torchtitan", "its experts compute in bfloat16"),
])  # fmt: skip
def test_what_a_layer_does_not_compute_it_says(layer, said):
    run = check("zipf", *SOFTMAX, "--backend", layer)
    assert run.returncode == 5, run.stdout + run.stderr
    assert said in " ".join(run.stdout.split())


@pytest.mark.published
@pytest.mark.parametrize(("layer", "dtype"), [(layer, dtype) for layer, of in CARDS.items() for dtype in of.dtypes])
def test_a_card_says_what_the_source_of_its_layer_states(layer, dtype):
    outcome = held(layer, dtype)
    assert not {key: line for key, line in outcome.lines.items() if line[0] == "wrong"}
    assert outcome.card.proved, outcome.card.proof


@pytest.mark.published
def test_half_a_percent_shows_in_bfloat16(tmp_path):
    """Each row may be off by more, but not all of them to the same side."""
    text = (ROOT / "parity/published/megatron.py").read_text()
    last = "(x_TD[:, None],))[0][:, 0]"
    assert text.count(last) == 1
    for scale, code in ((1, 0), (1.005, 1)):
        (tmp_path / "scaled.py").write_text(text.replace(last, f"{last} * {scale}"))
        run = check("bfloat16", "--backend", "scaled.py", home=tmp_path)
        assert run.returncode == code, run.stdout + run.stderr
    assert "times what they should be" in run.stdout


def test_each_is_found_by_its_name_and_imports_nothing():
    assert ours.find("transformers:mixtral").name == "transformers.mixtral"
    assert ours.find("megatron").asked == "megatron"
    assert not {"transformers", "megatron", "maxtext", "torchtitan"} & sys.modules.keys()
    with pytest.raises(ValueError, match=r"transformers\.py has no function nosuch"):
        ours.find("transformers:nosuch")


def test_one_that_is_missing_is_said_in_words(tmp_path):
    for name in ours.PUBLISHED:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")
    command = [sys.executable, "-m", "parity", "check", "p1", "--backend", "torchtitan"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "torchtitan is not installed: pip install -e '.[torchtitan]'" in " ".join(run.stderr.split())


@pytest.mark.published
def test_blocks_of_transformers_are_mapped_or_refused_with_the_reason():
    families = pytest.importorskip("parity.published.families")
    said = {name: families.said(name) for name in families.blocks()}
    refused = {name: one["why"] for name, one in said.items() if "why" in one}
    assert len(said) - len(refused) >= 60
    assert all(refused.values())
    assert said["gpt_oss"]["stored"]["experts.gate_up_proj"] == "w_gate and w_up: E D (F 2)"
    assert said["openai_privacy_filter"]["stored"]["experts.gate_up_proj"] == "w_gate and w_up: E D (2 F)"
    assert said["deepseek_v3"]["stored"]["gate.e_score_correction_bias"] == "selection_bias: E"
    assert "nothing is known of its parameter" in refused["dbrx"]
    assert "has no nonsense" in families.said("mixtral,nonsense=1")["why"]


# By block, what its configuration says and it does not do.
DISOBEYED = {"mixtral": {}, "deepseek_v3": {}, "gpt_oss": {"activation": "silu"}, "nemotron_h": {}, "qwen2_moe": {}}


@pytest.mark.published
@pytest.mark.parametrize("block", DISOBEYED)
def test_the_card_of_a_block_says_what_its_configuration_states(block, tmp_path):
    from parity.survey import engine

    name = f"families:{block}"
    found = list(engine.run([name], ["float32", "bfloat16"], tmp_path, 1, 600, engine.known([name])))
    for one in found:
        assert one.card, one.why
        assert one.card.proved, one.card.proof
        assert one.disobeyed == DISOBEYED[block]
        assert "activation" in one.states


@pytest.mark.published
@pytest.mark.parametrize(("setting", "renormalised"), [("True", True), ("False", False)])
def test_a_setting_in_the_name_of_a_block_is_obeyed(setting, renormalised):
    backend = ours.find(f"families:qwen3_moe,norm_topk_prob={setting}")
    case = Case(ranks=1, width=48, hidden=20, experts=16, top_k=3)
    assert identify(backend, [case], Setting()).case.renormalize is renormalised
