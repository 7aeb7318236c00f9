"""What a layer is is read off its outputs: a fault that was planted in one is said by the right sentence.

The layers are this project's own, which give their output and gradients only: `opaque_in_torch.py`, `opaque_in_jax.py`.
"""

from dataclasses import replace
from typing import Any

import pytest
from explained import SETTING, Explained, card_of, differences, opaque, verdict

from parity.cases.presets import PRESETS
from parity.explain.identify import identify
from parity.judge import card as cards
from parity.judge.card import Card
from parity.run.backend import Setting
from parity.run.faults import FAULTS, Fault, plant

pytestmark = pytest.mark.usefixtures("warm")


def planted(
    name: str, key: str, phrase: str, *also: str, preset: str = "", layer: str = "layer", **changed: Any
) -> Explained:
    """One of those that `python -m parity faults` lists."""
    fault = FAULTS[name]
    return Explained(replace(fault, preset=preset or fault.preset), key, phrase, also, layer, changed)


def edit(
    name: str, backend: str, file: str, old: str, new: str, preset: str, key: str, phrase: str, *also: str,
    layer: str = "layer", **changed: Any,
) -> Explained:  # fmt: skip
    """One after a public kind of bug that is not among those."""
    path = f"{backend}_impl/{file}" if "/" not in file else file
    fault = Fault(f"{backend}-{name}", backend, "route", key, path, old, new, preset)
    return Explained(fault, key, phrase, also, layer, changed)


_RENORMALIZE = "    if router.renormalize:\n"
_CHOSEN_TORCH = "    score_TK = score_TE.gather(1, clamped_id_TK)\n"
_LAYER_TORCH = "    input_TD, weight_TK = weigh_input(x_TD, score_TK, router.score_on)\n"

TABLE = [
    # Faults that are listed.
    planted("torch-tie-to-higher-id", "of equal scores", "the higher expert id"),
    planted("torch-router-gradient-wrong", "gradient drouter", "sum is taken for a constant"),
    planted("torch-gradient-of-last-k-lost", "gradient dx", "last choice"),
    planted("torch-silu-on-the-wrong-half", "gate and up", "exchanged"),
    planted("torch-expert-gradient-times-ranks", "gradient dw_down", "once for each rank"),
    planted("torch-stale-weight-gradient", "repeatable", "no: two runs", "biases of gate and up"),
    planted("torch-other-tokens-matter", "other tokens", "change the output"),
    planted("torch-score-applied-twice", "scores", "square of: softmax", "one expert a token"),
    planted("torch-score-not-applied", "scores", "the same for all", "one expert a token", "scale"),
    planted("torch-score-unsorted", "gradient dx", "scores of other"),
    planted("torch-overwrite-instead-of-add", "experts of a token", "the last choice", preset="like-qwen3-next"),
    planted("torch-sum-over-k-in-bfloat16", "sum over the chosen", "in bfloat16"),
    planted("torch-k-in-wrong-order", "sum over the chosen", "from the last of k", preset="p4"),
    planted("torch-accumulator-not-zeroed", "repeatable", "no: two runs", "finite"),
    planted("torch-wrong-slots-returned", "scores", "in the order of the worst first", preset="p4", top_k=3),
    planted("torch-right-on-first-rank-only", "other tokens", "change the output"),
    planted("torch-selection-bias-in-weights", "selection bias", "in the weights too"),
    planted("torch-selection-bias-ignored", "selection bias", "ignored"),
    planted("torch-selection-bias-before-score", "selection bias", "added to the logits for the choice only"),
    planted("torch-groups-by-best-one", "choice", "by the largest score"),
    planted("torch-groups-ignored", "choice", "those with the largest logits"),
    planted("torch-outside-at-minus-infinity", "choice", "by the largest score", capacity_factor=None),
    planted("torch-scale-forgotten", "scale", "1"),
    planted("torch-epsilon-where-there-is-none", "added to the sum", "1e-20"),
    planted("torch-softmax-before-choice", "scores", "softmax over all experts", "one expert a token",
         "selection bias"),
    planted("torch-router-bias-forgotten", "router bias", "ignored"),
    planted("torch-router-in-bfloat16", "precision of logits", "bfloat16"),
    planted("torch-expert-scale-forgotten", "scale of experts", "ignored"),
    planted("torch-score-on-the-output", "the score multiplies", "what an expert returns"),
    planted("torch-up-offset-forgotten", "added to up", "nothing"),
    planted("torch-clamp-on-the-wrong-one", "clamp", "gate within 7 of zero, up at most 7"),
    planted("torch-clamp-forgotten", "clamp", "none"),
    planted("torch-bias-of-the-next-expert", "bias of down", "next expert"),
    planted("torch-relu-not-squared", "activation", "relu"),
    planted("torch-shared-score-forgotten", "shared expert", "its score ignored"),
    planted("torch-shared-expert-twice", "shared expert", "3 times"),
    planted("jax-renormalise-over-all", "scores", "over the sum of all experts"),
    planted("jax-gate-and-up-swapped", "gate and up", "exchanged"),
    planted("jax-tf32", "precision of experts", "TF32"),
    planted("jax-score-gradient-missing", "gradient drouter", "zero", "gradient dx"),
    planted("jax-selection-bias-ignored", "selection bias", "ignored"),
    planted("jax-softmax-before-choice", "scores", "softmax over all experts", "one expert a token", "selection bias"),
    planted("jax-router-in-bfloat16", "precision of logits", "bfloat16", dtype="float32"),
    planted("jax-clamp-on-the-wrong-one", "clamp", "gate within 7 of zero, up at most 7"),
    planted("jax-shared-expert-forgotten", "shared expert", "ignored"),
    planted("jax-bias-on-padding-only", "other tokens", "change the output"),
    planted("jax-one-too-many-kept", "dropped", "+ 1", "other tokens", "experts of a token",
         layer="dropping", preset="zipf"),
    planted("jax-drop-by-lowest-score", "dropped", "smallest scores first", "other tokens", layer="dropping",
         preset="zipf", priority="score"),
    planted("jax-drop-ignores-choice", "dropped", "first tokens first", "other tokens", layer="dropping",
         preset="zipf", priority="choice"),
    planted("jax-drop-ties-backwards", "dropped", "of these the last tokens", "other tokens", layer="dropping",
         preset="zipf", priority="choice"),
    planted("jax-renormalise-after-drops", "weight of the dropped", "goes to the others", "other tokens", "dropped",
         layer="dropping", preset="zipf"),
    # Others, after public kinds of bugs.
    edit("renormalise-missing", "torch", "routing.py", _RENORMALIZE, "    if False:\n", "like-qwen3-next",
         "scores", "softmax over all experts", "one expert a token"),
    edit("renormalise-where-none", "torch", "routing.py", _RENORMALIZE, "    if True:\n", "bfloat16",
         "scores", "renormalised, which is the same", "one expert a token"),
    edit("scale-twice", "torch", "routing.py", "score_TK * router.scale", "score_TK * router.scale**2",
         "like-deepseek-v3", "scale", "6.25"),
    edit("sigmoid-for-softmax", "jax", "routing.py", '"softmax": partial(jax.nn.softmax, axis=-1)',
         '"softmax": jax.nn.sigmoid', "zipf", "scores", "sigmoid"),
    edit("softmax-for-sigmoid", "torch", "routing.py", '"sigmoid": torch.sigmoid',
         '"sigmoid": partial(torch.softmax, dim=-1)', "sigmoid", "scores", "softmax", ranks=1),
    edit("score-on-the-input", "torch", "routing.py", 'if score_on == "output":', "if False:", "k1",
         "the score multiplies", "what an expert is given"),
    edit("scores-rounded", "torch", "routing.py", "score_TK.to(x_TD.dtype) if router.cast_scores else score_TK",
         "score_TK.to(x_TD.dtype)", "bfloat16", "dtype of scores", "rounded before they weigh"),
    edit("gelu-for-silu", "torch", "glu.py", '"silu": silu,', '"silu": gelu,', "bfloat16", "activation", "gelu"),
    edit("tanh-for-erf", "jax", "glu.py", "partial(jax.nn.gelu, approximate=False)",
         "partial(jax.nn.gelu, approximate=True)", "zipf", "activation", "gelu_tanh", activation="gelu"),
    edit("quick-gelu-for-silu", "torch", "glu.py", '"silu": silu,', '"silu": lambda g: g * torch.sigmoid(1.702 * g),',
         "zipf", "activation", "quick_gelu", ranks=1),
    edit("clamp-of-up-missing", "torch", "glu.py",
         "gate.clamp(max=experts.clamp), up.clamp(-experts.clamp, experts.clamp)",
         "gate.clamp(max=experts.clamp), up", "like-deepseek-v4", "clamp", "gate at most 10, up free"),
    edit("clamp-of-gate-missing", "jax", "glu.py", "clamped(gate, -jnp.inf, experts.clamp), clamped(", "gate, clamped(",
         "like-gpt-oss", "clamp", "gate free"),
    edit("clamp-on-both-sides", "torch", "glu.py", "gate.clamp(max=experts.clamp)",
         "gate.clamp(-experts.clamp, experts.clamp)", "like-gpt-oss", "clamp", "gate within 7 of zero, up within 7"),
    edit("clamp-of-up-from-above-only", "torch", "glu.py", "up.clamp(-experts.clamp, experts.clamp)",
         "up.clamp(max=experts.clamp)", "like-gpt-oss", "clamp", "gate at most 7, up at most 7"),
    edit("selection-bias-in-logits", "torch", "routing.py",
         "router.router_dtype, per_expert.bias_E))\n    if expert_id_TK is None:\n"
         "        expert_id_TK = choose(score_TE, router, per_expert.selection_bias_E)\n",
         "router.router_dtype, per_expert.selection_bias_E))\n    if expert_id_TK is None:\n"
         "        expert_id_TK = choose(score_TE, router, None)\n", "like-nemotron-h", "selection bias",
         "added to the logits",
         "router bias"),
    edit("one-group-too-few", "torch", "routing.py", "top_k_indices(best_TGn.sum(dim=-1), router.top_groups)",
         "top_k_indices(best_TGn.sum(dim=-1), router.top_groups - 1)", "like-deepseek-v3", "choice", "the best 1 of 4 groups",
         top_k=2),
    edit("sum-of-group", "torch", "routing.py", '[..., : 2 if router.group_score == "top2" else 1]', "[..., :]",
         "like-deepseek-v3", "choice", "the sum of all", experts=16),
    edit("bias-of-down-not-weighed", "torch", "layer.py",
         "    out_TD = combine(returned_ND, weight_TK, grouped.slot_TK, grouped.assignment_N)\n",
         "    out_TD = combine(returned_ND, weight_TK, grouped.slot_TK, grouped.assignment_N)\n"
         "    if biases.down_eD is not None:\n"
         "        out_TD = out_TD + ((1 - weight_TK)[..., None] * biases.down_eD[expert_id_TK]).sum(1)\n",
         "like-gpt-oss", "bias of down", "added and not weighed", ranks=1),
    edit("bias-of-down-missing", "torch", "experts.py", "biases.down_eD)",
         "None if biases.down_eD is None else 0 * biases.down_eD)",
         "like-gpt-oss", "bias of down", "ignored", ranks=1),
    edit("bias-of-gate-missing", "torch", "experts.py", "counts_e, biases.gate_eF)", "counts_e, None)",
         "like-gpt-oss", "biases of gate and up", "of the gate ignored"),
    edit("shared-scaled", "torch", "layer.py", "else out_TD + shared_TD", "else out_TD + router.scale * shared_TD",
         "like-deepseek-v3", "shared expert", "times the scale"),
    edit("shared-in-average", "torch", "layer.py", "else out_TD + shared_TD", "else (out_TD + shared_TD) / 2",
         "like-qwen3-next", "shared expert", "times the scale", "scale", "one expert a token"),
    edit("shared-score-without-sigmoid", "torch", "experts.py", "torch.float32)).sigmoid()", "torch.float32))",
         "like-qwen3-next", "shared expert", "without a sigmoid"),
    edit("last-choice-lost", "torch", "layer.py", _LAYER_TORCH,
         _LAYER_TORCH + "    there_K = counts_E.new_tensor(range(router.top_k)) < max(1, router.top_k - 1)\n"
         "    weight_TK = weight_TK * there_K\n",
         "like-qwen3-next", "experts of a token", "the last choice is lost"),
    edit("one-expert-too-few", "jax", "routing.py", "    score_TK = score_TK * router.scale\n",
         "    score_TK = score_TK * router.scale * (jnp.arange(score_TK.shape[1]) < max(1, score_TK.shape[1] - 1))\n",
         "p4", "experts of a token", "the last choice is lost"),
    edit("experts-permuted", "torch", "layer.py", "    score_TK, expert_id_TK, counts_E = routing\n",
         "    score_TK, id_TK, counts_E = routing\n    expert_id_TK = (id_TK + 1) % len(counts_E)\n"
         "    counts_E = counts_E.roll(1)\n",
         "zipf", "numbers of experts", "1, 2, 3"),
    edit("router-detached", "torch", "routing.py", "logits_TE = x_TD.to(matmul_dtype) @ router_DE.to(matmul_dtype)",
         "logits_TE = x_TD.to(matmul_dtype) @ router_DE.to(matmul_dtype) * 1\n    logits_TE = logits_TE.detach() + 0 * logits_TE",
         "sigmoid", "gradient drouter", "zero", "gradient dx"),
    edit("router-gradient-times-ranks", "torch", "routing.py", "    score_TK = score_TK * router.scale\n",
         "    score_TK = score_TK * router.scale\n    score_TK = score_TK * 4 - score_TK.detach() * 3\n",
         "zipf", "gradient drouter", "4 times too large, once for each rank"),
    edit("router-gradient-is-a-mean", "jax", "routing.py", "matmul(x_TD.astype(matmul_dtype), router_DE.astype(matmul_dtype))",
         "matmul(x_TD.astype(matmul_dtype), router_DE.astype(matmul_dtype) / 4 + 0.75 * jax.lax.stop_gradient(router_DE))",
         "zipf", "gradient drouter", "1/4 of it"),
    edit("dx-without-the-router", "jax", "routing.py", "matmul(x_TD.astype(matmul_dtype), ",
         "matmul(jax.lax.stop_gradient(x_TD).astype(matmul_dtype), ", "zipf", "gradient dx",
         "without what comes through the scores"),
    edit("dx-of-the-router-only", "torch", "layer.py", "group_by_expert(input_TD, expert_id_TK, counts_E)",
         "group_by_expert(input_TD.detach(), expert_id_TK, counts_E)", "zipf", "gradient dx",
         "without what comes through the chosen experts", ranks=1),
    edit("expert-gradients-times-ranks", "jax", "layer.py", "    input_TD, weight_TK = weigh_input(",
         "    import jax\n    w_gate_eDF, w_up_eDF, w_down_eFD = (\n"
         "        4 * w - jax.lax.stop_gradient(3 * w) for w in (w_gate_eDF, w_up_eDF, w_down_eFD)\n    )\n"
         "    input_TD, weight_TK = weigh_input(", "zipf", "gradient dw_gate", "4 times too large"),
    edit("renormalising-sum-detached", "jax", "routing.py", "    if router.renormalize:\n",
         "    if router.renormalize and router.epsilon == 0:\n"
         "        score_TK = score_TK / jax.lax.stop_gradient(score_TK.sum(axis=-1, keepdims=True))\n"
         "    elif router.renormalize:\n", "like-qwen3-next", "gradient drouter", "sum is taken for a constant"),
    edit("scale-of-experts-before-renormalising", "torch", "routing.py", _RENORMALIZE,
         "    if per_expert.scale_E is not None:\n"
         "        score_TK = score_TK * take_by_expert(per_expert.scale_E.to(score_TK.dtype), clamped_id_TK)\n"
         "        per_expert = per_expert._replace(scale_E=None)\n" + _RENORMALIZE, "like-gemma4",
         "scale of experts", "before they are renormalised"),
    edit("router-bias-for-the-choice-only", "torch", "routing.py", _CHOSEN_TORCH,
         "    score_TE = SCORE_FUNCTIONS[router.score_function](logits(x_TD, router_DE, router.router_dtype, None))\n"
         "    score_TE = score_TE + 0 * (0 if per_expert.bias_E is None else per_expert.bias_E)\n" + _CHOSEN_TORCH,
         "like-gpt-oss", "router bias", "for the choice only"),
    edit("smallest-logits", "jax", "routing.py", "score_Tn.argsort(axis=-1, descending=True, stable=True)",
         "score_Tn.argsort(axis=-1, stable=True)", "zipf", "choice", "smallest", "numbers of experts",
         "one expert a token"),
    edit("residual-path", "torch", "layer.py", "else out_TD + shared_TD", "else out_TD + shared_TD + x_TD",
         "like-nemotron-h", "beside the experts", "the tokens themselves"),
    edit("epsilon-of-1e-6", "torch", "routing.py", "keepdim=True) + epsilon)", "keepdim=True) + 1e-6)", "sigmoid",
         "added to the sum", "1e-06"),
    edit("one-expert-renormalised", "torch", "routing.py", _RENORMALIZE,
         "    if router.renormalize or router.top_k == 1:\n", "zipf", "one expert a token", "renormalised: 1"),
    edit("experts-in-bfloat16", "torch", "glu.py",
         "    return (activated(gate) * (up + experts.up_offset)).to(dtype)\n",
         "    return (activated(gate) * (up + experts.up_offset)).to(torch.bfloat16).to(dtype)\n", "zipf",
         "precision of experts", "bfloat16"),
    edit("capacity-with-floor", "jax", "grouping.py", "rows = math.ceil(", "rows = math.floor(", "zipf",
         "dropped", "floor(", "other tokens", layer="dropping"),
    edit("capacity-of-four-at-least", "jax", "grouping.py", "max(rows, 1)", "max(rows, 4)", "zipf",
         "dropped", "4 at least", "other tokens", layer="dropping"),
]  # fmt: skip

# Whose sentence is "cannot tell", or none of those that are tried.
OPEN = (
    "jax-capacity-of-four-at-least",  # of two formulas, which differ where more than four rows are kept
    "jax-one-too-many-kept",  # the one too many lies where another expert's row does
    "torch-gelu-for-silu",  # in bfloat16, where its approximation by tanh is as near
)

BY_NAME = {one.fault.name: one for one in TABLE}

# Of the router, the experts and the gradients, of both frameworks.
QUICK = ["torch-selection-bias-before-score", "torch-clamp-on-the-wrong-one", "torch-gradient-of-last-k-lost",
         "jax-gate-and-up-swapped"]  # fmt: skip

# What may differ between a layer and itself in another dtype, framework, or on another number of ranks.
PRECISION = {"precision of logits", "precision of experts", "dtype of scores", "sum over the chosen"}


def assert_explained(name: str) -> None:
    one = BY_NAME[name]
    found, said = verdict(card_of(one), one)
    assert found == "right" or (found == "cannot tell" and name in OPEN), said


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_explained(name):
    assert_explained(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - set(QUICK)))
def test_the_others_too(name):
    assert_explained(name)


def test_there_are_enough_of_them():
    assert len(TABLE) == len(BY_NAME) >= 40
    assert set(OPEN) <= BY_NAME.keys()
    assert len(BY_NAME) - len(OPEN) >= 36
    assert {one.fault.backend for one in TABLE} == {"torch", "jax"}
    assert {one.base.ranks for one in TABLE} >= {1, 2, 4}
    assert {one.base.dtype for one in TABLE} >= {"float32", "bfloat16"}


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in FAULTS])
def test_every_edit_fits_the_code(tmp_path, name):
    """Its text is in its file exactly once, and what it becomes can be compiled."""
    fault = BY_NAME[name].fault
    path = plant(fault, tmp_path / "planted") / fault.file
    compile(path.read_text(), fault.file, "exec")


def the_same(preset: str, framework: str, setting: Setting = SETTING, **changed: Any) -> Card:
    return identify(opaque(framework), [replace(PRESETS[preset], **changed)], setting)


def assert_alike(card: Card, other: Card) -> None:
    assert not set(cards.differences([card, other])) - PRECISION
    assert card.proved, card.proof
    assert other.proved, other.proof


def test_another_dtype_makes_no_other_layer():
    """Nor is anything said of a layer that is what the case says."""
    card = the_same("like-deepseek-v3", "torch")
    assert not differences(card, opaque("torch").takes)
    assert_alike(card, the_same("like-deepseek-v3", "torch", dtype="bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zipf", "like-deepseek-v3", "like-gpt-oss"])
def test_a_layer_is_itself_in_every_dtype_framework_and_number_of_ranks(preset):
    card = the_same(preset, "torch", ranks=1)
    assert not differences(card, opaque("torch").takes)
    for framework, changed in (
        ("torch", {"ranks": 4}),
        ("torch", {"ranks": 4, "dtype": "bfloat16"}),
        ("jax", {"ranks": 1}),
        ("jax", {"ranks": 1, "dtype": "bfloat16"}),
        ("jax", {"ranks": 4}),
    ):
        assert_alike(card, the_same(preset, framework, Setting(timeout=300), **changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "preset"), sorted({(one.fault.backend, one.fault.preset) for one in TABLE if one.layer == "layer"})
)
def test_nothing_is_said_of_a_layer_without_a_fault(backend, preset):
    card = the_same(preset, backend, capacity_factor=None)
    assert not differences(card, opaque(backend).takes)
    assert card.proved, card.proof
