"""Cases with a name: the presets, real models, and the command that repeats a case."""

import shlex
from dataclasses import fields, replace
from typing import Any

from parity.cases.case import Case, flag
from parity.cases.from_checkpoint import case_of_checkpoint
from parity.cases.pairs import pair_cases
from parity.cases.recording import recording_name


def _presets() -> dict[str, Case]:
    base = Case()
    heavy = replace(base, pattern="zipf", capacity_factor="0.5")
    one = replace(base, pattern="one_expert", top_k=1)  # every rank sends its T tokens to expert 0
    pydoc = replace(base, recording="pydoc", tokens=64, width=64, hidden=64, experts=16, renormalize=True)
    cases = {
        "balanced": replace(base, pattern="balanced"),
        "zipf": replace(base, pattern="zipf"),
        "one-expert": replace(base, pattern="one_expert"),
        "empty-expert": replace(base, pattern="empty_expert"),
        "idle-rank": replace(base, pattern="idle_rank"),
        "stay-home": replace(base, pattern="stay_home"),
        "ties": replace(base, pattern="ties"),
        "k1": replace(base, top_k=1),
        "k-all": replace(base, top_k=8, tokens=8),
        "t0": replace(base, tokens=0, ranks=1, groups=2, top_groups=1),
        "t1": replace(base, tokens=1),
        "p1": replace(base, ranks=1),
        "p4": replace(base, tokens=24, experts=16, top_k=4),
        "p8": replace(base, ranks=8, experts=16, tokens=8, pattern="zipf"),
        "sigmoid": replace(base, score_function="sigmoid", renormalize=True, scale=2.5, pattern="zipf"),
        "expert-bins": replace(base, capacity_per="expert", pattern="zipf", align=8),
        "at-bound": replace(one, capacity_factor="4"),
        "under-bound": replace(one, capacity_factor="15/4"),
        "capacity-exact": replace(base, tokens=25, capacity_factor="1.2", pattern="zipf"),  # float32 says 16
        **{
            f"drop-{per}-{priority}": replace(heavy, capacity_per=per, priority=priority)
            for per in ("rank", "expert")
            for priority in ("token", "choice", "score")
        },
        "bfloat16": replace(base, dtype="bfloat16", pattern="zipf", top_k=3),
        "bfloat16-drop": replace(heavy, dtype="bfloat16", priority="score", capacity_factor="3/4"),
        "float16": replace(base, dtype="float16", pattern="zipf"),
        "pydoc": replace(pydoc, capacity_factor="1.25"),
        "pydoc-bfloat16": replace(pydoc, dtype="bfloat16"),
        "large-logits": replace(base, logit_offset=200),
        "no-epsilon": replace(base, score_function="sigmoid", renormalize=True, epsilon=0.0, logit_offset=-46),
        "tiny-scores": replace(base, score_function="sigmoid", renormalize=True, scale=2.5, logit_offset=-46),
        **{way: replace(base, way=way) for way in ("eager", "compiled", "recomputed")},
        # Small versions of real models, with every option of the model.
        "like-deepseek-v3": replace(
            base,
            ranks=2,
            top_k=3,
            score_function="sigmoid",
            renormalize=True,
            scale=2.5,
            selection_bias=True,
            groups=4,
            top_groups=2,
            shared_hidden=10,
        ),
        "groups-at-zero": replace(
            base,
            ranks=2,
            score_function="softmax_of_chosen",
            groups=4,
            group_score="max",
            outside_groups="zero",
            shared_hidden=10,
            capacity_factor="5/4",
        ),
        "like-gpt-oss": replace(
            base,
            ranks=2,
            score_function="softmax_of_chosen",
            router_bias=True,
            expert_bias=True,
            activation="quick_gelu",
            clamp=7.0,
            up_offset=1.0,
            capacity_per="expert",
        ),
        "like-llama4": replace(
            base,
            ranks=2,
            top_k=1,
            dtype="bfloat16",
            score_function="sigmoid",
            score_on="input",
            router_dtype="activations",
            cast_scores=True,
            shared_hidden=10,
        ),
        "like-qwen3-next": replace(base, ranks=2, renormalize=True, epsilon=0.0, shared_hidden=10, shared_score=True),
        "like-gemma4": replace(base, ranks=2, renormalize=True, epsilon=0.0, expert_scale=True, activation="gelu_tanh"),
        "like-nemotron-h": replace(
            base,
            ranks=2,
            score_function="sigmoid",
            renormalize=True,
            selection_bias=True,
            gated=False,
            activation="relu2",
            shared_hidden=10,
        ),
        "like-deepseek-v4": replace(
            base,
            ranks=2,
            score_function="sqrt_softplus",
            renormalize=True,
            scale=1.5,
            selection_bias=True,
            clamp=10.0,
            shared_hidden=10,
        ),
        "uneven": replace(base, uneven=True, pattern="zipf"),
        "uneven-drop": replace(heavy, uneven=True, priority="score"),
        "uneven-compiled": replace(base, ranks=2, uneven=True, way="compiled"),
        # In the second step the router chooses. All ranks share the scale, whose gradient depends on their choices.
        "in-flight": replace(base, way="in_flight", expert_scale=True),
        "two-groups": replace(base, ranks=2, way="two_groups"),
        # Sorting this many numbers is not stable unless a stable sort is asked for.
        "wide": replace(base, ranks=16, experts=128, top_k=8, tokens=3, capacity_factor="1.25", pattern="ties"),
        # More rows for an expert than 8 bits can count.
        "many-rows": replace(base, ranks=2, tokens=600, width=8, hidden=6, experts=4, pattern="zipf"),
    }
    cases["small-softplus"] = replace(cases["like-deepseek-v4"], logit_offset=-39.5)  # from -40 down it is an exp
    return {name: replace(case, name=name) for name, case in cases.items()}


PLAIN = _presets()
PRESETS = PLAIN | pair_cases()  # these cover every possible pair of values of two fields
USUAL = [name for name in PRESETS if not name.startswith("options")]  # these cover the pairs of the core fields

# Layers of real models. Sizes and options are those of the model's config.json on the Hugging Face hub, where the model
# has the name given. What a configuration does not say (epsilon, precision of the router, what is clamped, what scores
# multiply) is as the family's modeling file in transformers 5.24 computes it.


def _model(name: str, width: int, hidden: int, experts: int, top_k: int, **options: Any) -> tuple[str, Case]:
    shape = {"width": width, "hidden": hidden, "experts": experts, "top_k": top_k}
    return name, Case(name, ranks=8, tokens=8, dtype="bfloat16", pattern="zipf", **shape, **options)


def _deepseek_like(name: str, width: int, hidden: int, experts: int, scale: float, **options: Any) -> tuple[str, Case]:
    """Top 8 by sigmoid plus bias, in float32, renormalised with 1e-20; one shared expert of the same hidden width."""
    router = {"score_function": "sigmoid", "renormalize": True, "scale": scale, "selection_bias": True}
    return _model(name, width, hidden, experts, 8, shared_hidden=hidden, **router, **options)


# Logits are in the dtype of the tokens, the softmax is in float32, and no epsilon is added to the sum.
_SOFTMAX: dict[str, Any] = {"epsilon": 0.0, "router_dtype": "activations"}

MODELS = dict(
    [
        _deepseek_like("deepseek-v3", 7168, 2048, 256, 2.5, groups=8, top_groups=4),  # deepseek-ai/DeepSeek-V3
        _deepseek_like("kimi-k2", 7168, 2048, 384, 2.827),  # moonshotai/Kimi-K2-Instruct
        _deepseek_like("glm-4.5", 5120, 1536, 160, 2.5),  # zai-org/GLM-4.5
        # Qwen/Qwen3-30B-A3B
        _model("qwen3-30b-a3b", 2048, 768, 128, 8, renormalize=True, cast_scores=True, **_SOFTMAX),
        _model(  # Qwen/Qwen3-Next-80B-A3B-Instruct
            "qwen3-next", 2048, 512, 512, 10,
            renormalize=True, cast_scores=True, shared_hidden=512, shared_score=True, **_SOFTMAX,
        ),
        _model("mixtral-8x7b", 4096, 14336, 8, 2, renormalize=True, **_SOFTMAX),  # mistralai/Mixtral-8x7B-v0.1
        _model(  # openai/gpt-oss-120b
            "gpt-oss-120b", 2880, 2880, 128, 4,
            score_function="softmax_of_chosen", router_dtype="activations", cast_scores=True, router_bias=True,
            expert_bias=True, activation="quick_gelu", clamp=7.0, up_offset=1.0,
        ),
        _model("olmoe-1b-7b", 2048, 1024, 64, 8, cast_scores=True, **_SOFTMAX),  # allenai/OLMoE-1B-7B-0924
        _model(  # meta-llama/Llama-4-Scout-17B-16E
            "llama4-scout", 5120, 8192, 16, 1,
            score_function="sigmoid", router_dtype="activations", cast_scores=True, score_on="input",
            shared_hidden=8192,
        ),
        _model(  # MiniMaxAI/MiniMax-M2
            "minimax-m2", 3072, 1536, 256, 8,
            score_function="sigmoid", renormalize=True, epsilon=0.0, router_dtype="activations", selection_bias=True,
        ),
        _model(  # google/gemma-4-26B-A4B; the RMS norm before its router is not part of the layer
            "gemma4", 2816, 704, 128, 8,
            renormalize=True, expert_scale=True, activation="gelu_tanh", **_SOFTMAX,
        ),
    ]
)  # fmt: skip


def command(case: Case) -> str:
    """The command that repeats a case."""
    if case == MODELS.get(case.name):
        return f"python -m parity check --model {case.name}"
    if case == PRESETS.get(case.name):
        return f"python -m parity check {case.name}"
    stem = case.name.removesuffix("-changed")
    known = {"": PRESETS, "--model ": MODELS} if stem != case.name else {}
    for before, cases in known.items():
        changed = _differing(case, replace(cases[stem], name=case.name)) if stem in cases else {"": None}
        if None not in changed.values():  # most flags cannot say None
            return _written(f" {before}{stem}", changed)
    if not case.checkpoint:
        return _written("", _differing(case, Case(name=recording_name(case.recording)) if case.recording else Case()))
    given = {"checkpoint": case.checkpoint, "layer": case.layer}
    return _written("", given | _differing(case, case_of_checkpoint(given)))


def _differing(case: Case, base: Case) -> dict[str, Any]:
    """The fields in which a case differs from another."""
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    return {name: value for name, value in values.items() if value != getattr(base, name)}


def _written(what: str, changed: dict[str, Any]) -> str:
    flags = (f"--{flag(name)} {shlex.quote(str(value))}" for name, value in changed.items())
    return " ".join([f"python -m parity check{what}", *flags])
