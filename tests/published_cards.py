"""What each published layer's source and configuration state, and whether its card says so.

`python tests/published_cards.py [NAMES]`, in an environment that has them.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from parity.cases.case import Case
from parity.cases.parameters import parameters_of
from parity.cli.check import chosen_cases
from parity.cli.main import parse
from parity.explain.identify import identify
from parity.judge.card import Card, Finding
from parity.run import ours
from parity.run.backend import BackendError, Setting

# What a line of a card has to say: words, or how they begin, with dots; several ways to end, where the source leaves it
# to a library; or fields of a case. None: there is no such line.
Words = str | tuple[str, ...] | dict[str, Any] | None


class Stated(NamedTuple):
    """Of a layer: the case that says what it is, and what its source states beside."""

    flags: str
    says: Mapping[str, Words] = {}  # where it differs from USUAL
    narrow: Mapping[str, Words] = {}  # and in bfloat16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # that it computes


# What most of them state. `stated` adds what depends on the case.
USUAL: dict[str, Words] = {
    "repeatable": "yes",
    "beside the experts": "nothing",
    "the score multiplies": "what an expert returns",
    "gate and up": "gate and up are where they belong",
    "activation": "silu",
    "added to up": "nothing",
    "clamp": "none",
    "numbers of experts": "logit g leads to the weights of expert g",
    "choice": "those with the largest logits",
    "precision of logits": "float32",
    "precision of experts": "float32",
    "other tokens": "change nothing, bit for bit",
    "gradient at cotangent 0": "zero: no auxiliary loss",
    "dropped": "nothing, though all tokens want one expert",
}
# In 16 bits nothing is more precise than what is asked.
NARROW: dict[str, Words] = {"precision of experts": None, "precision of logits": "bfloat16"}

# A loop over experts, each of which adds its weighed rows to a buffer in the dtype of the tokens.
LOOP: dict[str, Words] = {"sum over the chosen": "in order of expert, in float32"}
LOOP_NARROW: dict[str, Words] = {"sum over the chosen": "in order of expert, in bfloat16"}
# Scores in float32 weigh what experts return, or are rounded to the dtype of the tokens before.
WIDE: dict[str, Words] = {"dtype of scores": "float32"}
CAST: dict[str, Words] = {"dtype of scores": "bfloat16: rounded before they weigh anything"}
IN_FLOAT32: dict[str, Words] = {"precision of logits": "float32"}

# Two forms of one function.
EITHER_SOFTMAX = "softmax over the chosen, or over all experts and renormalised, which is the same"
SOFTMAX: dict[str, Words] = {"scores": "softmax over all experts", "one expert a token": "its score, not renormalised"}
RENORMALISED: dict[str, Words] = {
    "scores": EITHER_SOFTMAX,
    "one expert a token": "its score, renormalised: 1",
}
SIGMOID: dict[str, Words] = {"scores": "sigmoid, renormalised", "one expert a token": "its score, renormalised: 1"}
BIASED: dict[str, Words] = {"selection bias": "added to the scores for the choice only"}
SHARED: dict[str, Words] = {"shared expert": "added"}
WEIGHED: dict[str, Words] = {"shared expert": "added, weighed by the sigmoid of its score"}
TOP2: dict[str, Words] = {"choice": "within the best 2 of 4 groups, by the sum of the two largest of sigmoid"}
GROUPS_BY_MAX: dict[str, Words] = {"choice": "within the best 2 of 4 groups, by the largest score"}
# PyTorch's scatter_add on a CPU adds up 16 bits in float32.
SCATTERED: tuple[str, ...] = ("in order of expert, in float32, of products in bfloat16",)
SCATTERED_BY_RANK: tuple[str, ...] = (
    "each in order of expert, in float32, of products in bfloat16, rounded to bfloat16",
)
BY_RANK = "ranks one after the other, in float32; each in order of expert, in"
MAXTEXT: dict[str, Words] = {
    "of equal scores": "the lower expert id is chosen",
    "scores": EITHER_SOFTMAX,
    "one expert a token": "its score, renormalised: 1",
}

SIZES = "--width 48 --hidden 24 --experts 16 --top-k 3 --ranks 1"
AS_TOKENS = f"{SIZES} --router-dtype activations"
OF_CHOSEN = "--score-function softmax_of_chosen"
TWO = f"{SIZES.replace('--ranks 1', '--ranks 2')} --router-dtype activations --cast-scores True {OF_CHOSEN}"
QWEN = f"{AS_TOKENS} --cast-scores True"
DEEPSEEK = f"{SIZES} --score-function sigmoid --renormalize True --scale 2.5 --selection-bias True"

_LOOP_WIDE, _LOOP_CAST = LOOP_NARROW | WIDE, LOOP_NARROW | CAST
_DEEPSEEK = LOOP | SIGMOID | BIASED | SHARED | {"added to the sum": "1e-20"}
# A product over all experts, or over the chosen; in which order and how it rounds is up to XLA.
_ANY_SUM: tuple[str, ...] = ("in float32", "products not rounded", "of products in bfloat16", "rounded to bfloat16")

LAYERS: dict[str, Stated] = {
    "transformers:mixtral": Stated(f"{AS_TOKENS} --renormalize True --epsilon 0", LOOP | RENORMALISED, _LOOP_WIDE),
    "transformers:minimax": Stated(f"{AS_TOKENS} --renormalize True --epsilon 0", LOOP | RENORMALISED, _LOOP_WIDE),
    "transformers:granitemoe": Stated(
        f"{QWEN} --score-function softmax_of_chosen --activation gelu",
        LOOP | RENORMALISED | {"scores": EITHER_SOFTMAX, "activation": "gelu"}, _LOOP_CAST,
    ),
    "transformers:jamba": Stated(QWEN, LOOP | SOFTMAX, _LOOP_CAST),
    "transformers:olmoe": Stated(QWEN, LOOP | SOFTMAX, _LOOP_CAST),
    "transformers:flex_olmo": Stated(f"{QWEN} --renormalize True --epsilon 0", LOOP | RENORMALISED, _LOOP_CAST),
    "transformers:qwen3_moe": Stated(f"{QWEN} --renormalize True --epsilon 0", LOOP | RENORMALISED, _LOOP_CAST),
    "transformers:qwen2_moe": Stated(
        f"{QWEN} --shared-hidden 40 --shared-score True", LOOP | SOFTMAX | WEIGHED, _LOOP_CAST
    ),
    "transformers:qwen3_next": Stated(
        f"{QWEN} --renormalize True --epsilon 0 --shared-hidden 40 --shared-score True",
        LOOP | RENORMALISED | WEIGHED, _LOOP_CAST,
    ),
    "transformers:deepseek_v3": Stated(
        f"{DEEPSEEK} --groups 4 --top-groups 2 --shared-hidden 72", _DEEPSEEK | TOP2, _LOOP_WIDE | IN_FLOAT32
    ),
    "transformers:glm4_moe": Stated(f"{DEEPSEEK} --shared-hidden 72", _DEEPSEEK, _LOOP_WIDE | IN_FLOAT32),
    "transformers:nemotron_h": Stated(  # its buffer has the dtype of the scores
        f"{DEEPSEEK} --groups 4 --top-groups 2 --shared-hidden 40 --gated False --activation relu2",
        _DEEPSEEK | TOP2 | {"activation": "relu2", "gate and up": None, "added to up": None},
        LOOP | WIDE | IN_FLOAT32,
    ),
    "transformers:deepseek_v2": Stated(
        f"{SIZES} --groups 4 --top-groups 2 --group-score max --outside-groups zero --scale 16 --shared-hidden 72",
        LOOP | SOFTMAX | SHARED | GROUPS_BY_MAX,
        _LOOP_WIDE | IN_FLOAT32,
    ),
    "transformers:minimax_m2": Stated(
        f"{AS_TOKENS} --score-function sigmoid --renormalize True --epsilon 0 --selection-bias True",
        LOOP | SIGMOID | BIASED | {"added to the sum": "nothing..."}, _LOOP_WIDE,
    ),
    "transformers:lfm2_moe": Stated(
        f"{DEEPSEEK} --epsilon 1e-6 --router-dtype activations --cast-scores True",
        LOOP | SIGMOID | BIASED | {"added to the sum": "1e-06"}, _LOOP_CAST,
    ),
    "transformers:gpt_oss": Stated(
        f"{QWEN} --score-function softmax_of_chosen --router-bias True --expert-bias True --activation quick_gelu "
        "--clamp 7 --up-offset 1",
        LOOP | RENORMALISED | {
            "scores": EITHER_SOFTMAX, "activation": "quick_gelu", "added to up": "1",
            "clamp": "gate at most 7, up within 7 of zero", "router bias": "added to the logits",
            "biases of gate and up": "added to gate and up",
            "bias of down": "added to what an expert returns, and weighed",
        }, _LOOP_CAST,
    ),
    "transformers:llama4": Stated(
        f"{QWEN.replace('--top-k 3', '--top-k 1')} --score-function sigmoid --score-on input --shared-hidden 24",
        SHARED | {
            "the score multiplies": "what an expert is given", "scores": "sigmoid", "added to up": None,
            "clamp": None, "precision of experts": None, "sum over the chosen": None,
        },
    ),
    "transformers:gemma4": Stated(
        f"{AS_TOKENS} --renormalize True --expert-scale True --activation gelu_tanh --epsilon 0",
        LOOP | RENORMALISED | {"activation": "gelu_tanh", "scale of experts": "multiplies the weights"}, _LOOP_WIDE,
    ),
    "megatron": Stated(  # scores weigh hidden units; each rank adds up its own experts', in the dtype of the tokens
        DEEPSEEK.replace("--ranks 1", "--ranks 2"),
        SIGMOID | BIASED | {
            "added to the sum": "1e-20",
            "sum over the chosen": f"{BY_RANK} float32",
            "one expert a token": "its score, not renormalised",  # of one it does not do so
        },
        IN_FLOAT32 | {
            "sum over the chosen": SCATTERED_BY_RANK,
            "dtype of scores": "float32, and rounded with the hidden units that they weigh",
        },
    ),
    "torchtitan": Stated(
        f"{DEEPSEEK} --router-dtype activations --cast-scores True",
        LOOP | SIGMOID | BIASED | {"added to the sum": "1e-20"}, CAST | {"sum over the chosen": SCATTERED},
        dtypes=("bfloat16",),
    ),
    "tokamax": Stated(  # experts alone
        SIZES.replace("--ranks 1", "--ranks 2"),
        {"scores": "given to the layer", "choice": "given to the layer", "scale": None, "experts of a token": None,
         "of equal scores": None, "precision of logits": None},
        {"precision of logits": None},
    ),
    "maxtext:dense": Stated(f"{QWEN} {OF_CHOSEN}", MAXTEXT, CAST),
    "maxtext:dense_over_ranks": Stated(TWO, MAXTEXT, CAST),
    "maxtext:ragged": Stated(f"{QWEN} {OF_CHOSEN}", MAXTEXT, CAST),
    "maxtext:ring_over_ranks": Stated(TWO, MAXTEXT, CAST),
}  # fmt: skip


def stated(name: str, dtype: str) -> tuple[Case, dict[str, Words]]:
    """The case that says what a layer is, and what the lines of its card have to say."""
    of = LAYERS[name]
    case = chosen_cases(parse(["check", *shlex.split(of.flags), "--dtype", dtype]))[0]
    says: dict[str, Words] = USUAL | {"scale": f"{case.scale:g}", "experts of a token": f"{case.top_k}"}
    says |= {"of equal scores": torch_ties(case), "sum over the chosen": _ANY_SUM}
    says |= of.says
    says |= {**NARROW, **of.narrow} if dtype == "bfloat16" else {}
    learned = 1 + sum(parameter.learned for parameter in parameters_of(case))
    says["gradients"] = f"the derivative of the output, all {learned}"
    return case, {key: words for key, words in says.items() if words is not None}


def torch_ties(case: Case) -> str:
    """Which of equal scores torch.topk chooses, in words: where scores are equal, so are groups."""
    import torch

    groups = torch.topk(torch.zeros(case.groups), case.top_groups, sorted=False)[1]
    open_E = torch.zeros(case.groups, case.experts // case.groups)
    if case.groups > 1:
        closed = 0.0 if case.outside_groups == "zero" else -torch.inf
        open_E = torch.full_like(open_E, closed)
        open_E[groups] = 1
    ids = sorted(torch.topk(open_E.reshape(-1), case.top_k)[1].tolist())
    if ids == list(range(case.top_k)):
        return "the lower expert id is chosen"
    if ids == list(range(case.experts - case.top_k, case.experts)):
        return "the higher expert id is chosen"
    return f"neither the lower nor the higher ids are chosen, but {ids} of {case.experts} equal experts"


def verdict(finding: Finding | None, words: Words) -> str:
    """What a line of a card is: right, wrong, cannot tell, unknown."""
    if finding is None or words is None:
        return "wrong"
    if finding.state == "unknown":
        return "unknown"
    if finding.what.startswith("cannot tell: ") and "; or " not in finding.what:
        return "cannot tell"  # and why
    possible = finding.what.removeprefix("cannot tell: ").removesuffix(": they are the same function").split("; or ")
    if isinstance(words, dict):
        fits = all(finding.fields.get(name) == value for name, value in words.items())
    elif isinstance(words, tuple):
        fits = any(said.endswith(words) for said in possible)
    elif words.endswith("..."):
        fits = any(said.startswith(words[:-3]) for said in possible)
    else:
        fits = words in possible
    return "wrong" if not fits else "cannot tell" if finding.state == "cannot tell" else "right"


class Outcome(NamedTuple):
    """A card held against what is stated."""

    card: Card
    lines: dict[str, tuple[str, str, Words]]  # by key: verdict, what the card says, what is stated

    def count(self, what: str) -> int:
        """How many lines are so."""
        return sum(found == what for found, *_ in self.lines.values())


def held(name: str, dtype: str) -> Outcome:
    """The card of a layer, held line by line against what is stated; and that its case is the stated one."""
    case, says = stated(name, dtype)
    card = identify(ours.find(name), [case], Setting())
    found = {finding.key: finding for finding in card.findings}
    lines: dict[str, tuple[str, str, Words]] = {}
    for key in dict.fromkeys([*found, *says]):
        finding, words = found.get(key), says.get(key)
        lines[key] = verdict(finding, words), finding.what if finding else "", words
    differ = [
        f"{f.name} {getattr(card.case, f.name)}"
        for f in fields(Case)
        if f.name not in ("name", *case.idle, "epsilon") and getattr(card.case, f.name) != getattr(case, f.name)
    ]
    lines["the case"] = "wrong" if differ else "right", ", ".join(differ) or "as stated", "as stated"
    return Outcome(card, lines)


@dataclass
class Arguments:
    """Hold the cards of published layers against what their sources state."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAMES]")] = ()
    """Layers, or ends of their names; all if none is named."""
    dtype: tuple[str, ...] = ("float32", "bfloat16")
    """Of tokens and experts."""
    show: bool = False
    """Every line of every card, not only those that are not right."""


def main(asked: Arguments) -> int:
    """Print the table; exit code 1 where a line is wrong, or a case is not proved."""
    console = Console(width=150)
    table = Table("layer", "dtype", "right", "wrong", "cannot tell", "unknown", "proved", "s")
    total: Counter[str] = Counter()
    for dtype in asked.dtype:
        for name, of in LAYERS.items():
            if dtype not in of.dtypes or (asked.names and not name.endswith(asked.names)):
                continue
            try:
                outcome = held(name, dtype)
            except BackendError as error:
                total["wrong"] += 1
                table.add_row(name, dtype, "", "", "", "", f"not run: {error}", "")
                continue
            counts = {what: outcome.count(what) for what in ("right", "wrong", "cannot tell", "unknown")}
            total.update(counts, layers=1, proved=outcome.card.proved)
            proved = "yes" if outcome.card.proved else f"no: {outcome.card.proof}"
            table.add_row(name, dtype, *map(str, counts.values()), proved, f"{outcome.card.seconds:.0f}")
            console.print(f"{name} {dtype} {counts}", soft_wrap=True, markup=False)
            for key, (what, said, words) in outcome.lines.items():
                if asked.show or what != "right":
                    console.print(f"  {what}: {key}: {said} [stated: {words}]", soft_wrap=True, markup=False)
    table.add_section()
    names = ("right", "wrong", "cannot tell", "unknown")
    table.add_row("all", "", *(str(total[what]) for what in names), f"{total['proved']} of {total['layers']}", "")
    console.print(table)
    return int(total["wrong"] > 0 or total["proved"] < total["layers"])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
