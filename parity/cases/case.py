"""What is compared: one frozen Case."""

import math
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

# Numbers in one kind of weight above which a case is of real size: 2**26 float32 are 256 MiB.
REAL_SIZE = 2**26

DTYPES = ("float32", "bfloat16", "float16", "float64")

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Way = Literal["usual", "eager", "compiled", "recomputed", "in_flight", "two_groups"]
Kind = Literal["case", "logits", "score", "weight", "int"]
Pattern = Literal["random", "balanced", "zipf", "one_expert", "empty_expert", "idle_rank", "stay_home", "ties"]


class Router(NamedTuple):
    """The fields of a case that say how scores come out of logits, under the layers' names."""

    top_k: int
    score_function: str = "softmax"
    renormalize: bool = False
    epsilon: float = 1e-20
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    outside_groups: str = "minus_inf"
    score_on: str = "output"
    router_dtype: str = "wide"
    cast_scores: bool = False


class Experts(NamedTuple):
    """The fields of a case that say how an expert computes, under the layers' names."""

    activation: str = "silu"
    clamp: float | None = None
    up_offset: float = 0.0


class CapacityOptions(NamedTuple):
    """The fields of a case that say how a capacity drops assignments, under the layers' names."""

    per: str = "rank"
    priority: str = "token"
    align: int = 1


def not_default(options: Router | Experts | CapacityOptions) -> dict[str, Any]:
    """The options to pass to a layer. The others are left to its defaults, so that these are checked too."""
    default = options._field_defaults
    return {name: value for name, value in options._asdict().items() if name not in default or value != default[name]}


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Case:
    """One comparison. Two equal cases draw equal inputs on every machine."""

    name: str = _field(
        "custom",
        "What the report calls it.",
    )
    ranks: int = _field(
        4,
        "P, ranks in the expert-parallel group.",
    )
    tokens: int = _field(
        16,
        "T, tokens on one rank.",
    )
    width: int = _field(
        32,
        "D, model width.",
    )
    hidden: int = _field(
        24,
        "F, expert hidden width; not D, so that a transposed weight has another shape.",
    )
    experts: int = _field(
        8,
        "E, experts in all; a multiple of P.",
    )
    top_k: int = _field(
        2,
        "K, experts per token.",
    )
    dtype: Dtype = _field(
        "float32",
        "Dtype of tokens and expert weights. For router and scores, see --router-dtype.",
    )
    score_function: Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"] = _field(
        "softmax",
        "Turns router logits into scores. sqrt_softplus: the square root of log(1 + exp) (DeepSeek-V4). "
        "softmax_of_chosen: experts are chosen by logits, and the softmax is over the K chosen (gpt-oss).",
    )
    renormalize: bool = _field(
        False,
        "Divide the K chosen scores by their sum.",
    )
    epsilon: float = _field(
        1e-20,
        "Added to the sum that --renormalize divides by (DeepSeek-V3: 1e-20, LFM2: 1e-6, Mixtral: 0).",
    )
    scale: float = _field(
        1.0,
        "Multiplies the scores (DeepSeek-V3's routed scaling factor).",
    )
    groups: int = _field(
        1,
        "Groups of experts; a token chooses within the best groups (DeepSeek-V3: 8).",
    )
    top_groups: int = _field(
        1,
        "How many groups a token chooses within (DeepSeek-V3: 4).",
    )
    group_score: Literal["top2", "max"] = _field(
        "top2",
        "How groups are ranked: by the sum of a group's two largest scores (DeepSeek-V3), or by its largest score "
        "(DeepSeek-V2).",
    )
    outside_groups: Literal["minus_inf", "zero"] = _field(
        "minus_inf",
        "The scores that experts outside the best groups get for the choice. With zero, such an expert wins over one "
        "whose score plus bias is below zero.",
    )
    score_on: Literal["output", "input"] = _field(
        "output",
        "What the score of an expert multiplies. output: what the expert returns. input: what it is given (Llama 4, "
        "with --top-k 1).",
    )
    router_dtype: Literal["wide", "float32", "activations"] = _field(
        "wide",
        "Dtype of router weights and logits. wide: float32, or float64 for float64 tokens. float32: always. "
        "activations: the dtype of the tokens; scores are computed from these logits in float32, or float64.",
    )
    cast_scores: bool = _field(
        False,
        "Round the scores to the dtype of the tokens before they weigh anything.",
    )
    router_bias: bool = _field(
        False,
        "There is a bias on the logits (gpt-oss).",
    )
    selection_bias: bool = _field(
        False,
        "There is a bias on the scores that only the choice of experts sees (DeepSeek-V3).",
    )
    expert_scale: bool = _field(
        False,
        "There is a learned scale for each expert, which multiplies its scores (Gemma 4).",
    )
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"] = _field(
        "silu",
        "Activation of the experts' gate, or of up without a gate. gelu_tanh: gelu by its tanh approximation (Gemma). "
        "quick_gelu: g * sigmoid(1.702 * g) (gpt-oss). relu2: relu squared (Nemotron-H).",
    )
    clamp: float | None = _field(
        None,
        "Upper bound of the gate; up is clamped to plus or minus this (gpt-oss: 7).",
    )
    up_offset: float = _field(
        0.0,
        "Added to up after the clamp (gpt-oss: 1).",
    )
    gated: bool = _field(
        True,
        "Experts have a gate. False: activation(x @ w_up) @ w_down (Nemotron-H).",
    )
    expert_bias: bool = _field(
        False,
        "Each projection of an expert has a bias (gpt-oss).",
    )
    shared_hidden: int = _field(
        0,
        "Hidden width of the shared expert, which every token goes to; 0: no shared expert.",
    )
    shared_score: bool = _field(
        False,
        "The shared expert's output is multiplied by the sigmoid of a score of its own (Qwen2-MoE, Qwen3-Next).",
    )
    pattern: Pattern = _field(
        "random",
        "Where tokens go. balanced: each expert equally. zipf: exponent 1.2. one_expert: expert 0 first, for all. "
        "empty_expert: one expert gets none. idle_rank: one rank gets none. stay_home: rank 0 keeps to itself. "
        "ties: integer logits, many of them equal.",
    )
    logit_scale: float = _field(
        1.0,
        "Multiplies the drawn logits: at 50, float32 softmax underflows for many experts.",
    )
    logit_offset: float = _field(
        0.0,
        "Added to all logits of a token, by a feature of x that is 1 and a row of the router: at -46, float32 sigmoid "
        "comes near the 1e-20 that guards renormalisation.",
    )
    outlier: float = _field(
        1.0,
        "Multiplies one feature of x, as in hidden states of real models, and divides the router's row for it.",
    )
    capacity_factor: str | None = _field(
        None,
        "Rows of a bin over the mean load: a decimal or a fraction. A bin is the rows that the static layout reserves "
        "for one rank or for one expert. None: the bound at which nothing drops.",
    )
    capacity_per: Literal["rank", "expert"] = _field(
        "rank",
        "Whether a bin holds the rows of one rank or of one expert.",
    )
    priority: Literal["token", "choice", "score"] = _field(
        "token",
        "Which assignments are kept when a bin is full.",
    )
    align: int = _field(
        1,
        "Round the capacity up to a multiple of this.",
    )
    uneven: bool = _field(
        False,
        "Each rank has fewer tokens than the one before, and the last has none; a single rank has half. PyTorch leaves "
        "out the missing tokens. In JAX, whose shapes are static, they are padding with expert ids of -1.",
    )
    way: Way = _field(
        "usual",
        "How the layer is run. usual: PyTorch eagerly and JAX under jit. eager: JAX too runs one operation at a "
        "time. compiled: PyTorch by torch.compile, whose backend is aot_eager. recomputed: forward again in "
        "backward. in_flight: two steps, both forwards before both backwards. two_groups: two groups of --ranks side "
        "by side, each with tokens of its own.",
    )
    seed: int = _field(
        0,
        "Seed of every drawn number.",
    )
    recording: str | None = _field(
        None,
        "A recording (safetensors) to take expert ids from, and hidden states and weights where it has them. It fixes "
        "E, K, D, F and the score function as far as it has them, and T, if left out, is all of its tokens.",
    )
    checkpoint: str | None = _field(
        None,
        "A folder with config.json and the safetensors of a Hugging Face checkpoint, to take what the layer has "
        "learned from. It fixes sizes and options, and the dtype unless told otherwise.",
    )
    layer: int | None = _field(
        None,
        "Which layer of the checkpoint; left out, its first with experts.",
    )

    def __post_init__(self) -> None:
        """Raises ValueError on a case that cannot exist, naming the flag to change."""
        for f in fields(self):
            if get_origin(f.type) is Literal and getattr(self, f.name) not in get_args(f.type):
                raise ValueError(
                    f"--{flag(f.name)} is {getattr(self, f.name)!r}: it must be one of {', '.join(get_args(f.type))}"
                )
        for name in ("ranks", "width", "hidden", "experts", "top_k", "align", "groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{flag(name)} is {getattr(self, name)}: it must be at least 1")
        for name in ("tokens", "seed", "shared_hidden", "epsilon"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{flag(name)} is {getattr(self, name)}: it cannot be negative")
        if self.layer is not None and self.checkpoint is None:
            raise ValueError(f"--layer {self.layer} needs a checkpoint: name it with --checkpoint")
        if self.recording is not None and self.pattern != "random":
            raise ValueError(PATTERN_RECORDED.format(self.pattern, self.recording))
        self._check_router()
        self._check_experts()
        if self.uneven and self.way == "eager":
            raise ValueError(
                "--uneven with --way eager: outside jit, JAX refuses the expert id of padding (-1): use another --way"
            )
        if self.experts % self.ranks:
            raise ValueError(f"--experts {self.experts} do not divide over --ranks {self.ranks}: use a multiple")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k is {self.top_k} with --experts {self.experts}: a token cannot choose more")
        for name in ("scale", "epsilon", "up_offset", "logit_scale", "logit_offset", "outlier"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"--{flag(name)} is {getattr(self, name)}: it must be finite")
        if self.outlier == 0:
            raise ValueError("--outlier is 0: the router's row for its feature is divided by it, so it cannot be 0")
        if self.logit_offset and self.width < 2:
            raise ValueError(f"--logit-offset takes a feature of its own: --width {self.width} must be at least 2")
        need = {
            "empty_expert": self.top_k + 1,
            "idle_rank": self.top_k + self.experts // self.ranks if self.ranks > 1 else math.inf,
            "stay_home": self.ranks * self.top_k,
        }.get(self.pattern, 0)
        if self.experts < need:
            raise ValueError(
                f"--pattern {self.pattern} with --experts {self.experts} on --ranks {self.ranks} leaves fewer than "
                f"--top-k {self.top_k} experts to choose from: use more experts, or another pattern"
            )
        try:
            positive = self.capacity_factor is None or Fraction(self.capacity_factor) > 0
        except (ValueError, ZeroDivisionError, OverflowError):
            positive = False
        if not positive:
            raise ValueError(
                f"--capacity-factor is {self.capacity_factor!r}: it must be finite and positive, a decimal (1.25) or "
                "a fraction (5/4); leave it out for the bound at which nothing drops"
            )

    def _check_router(self) -> None:
        size = self.experts // self.groups
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"--groups {self.groups} must divide --experts {self.experts}, and "
                f"--top-groups {self.top_groups} cannot be more than --groups"
            )
        if self.groups > 1 and (self.top_k > self.top_groups * size or (self.group_score == "top2" and size < 2)):
            raise ValueError(
                f"--top-k {self.top_k} with --top-groups {self.top_groups} of {size} experts each: use more or larger "
                "groups; --group-score top2 needs at least two experts in each"
            )
        if self.score_on == "input" and self.top_k != 1:
            raise ValueError(f"--score-on input with --top-k {self.top_k}: a token has one input, so use --top-k 1")
        if self.score_on == "input" and self.expert_bias:
            raise ValueError(
                "--score-on input with --expert-bias: a dropped token, whose input is zero, would still get the biases"
            )

    def _check_experts(self) -> None:
        if self.clamp is not None and not 0 < self.clamp < math.inf:
            raise ValueError(f"--clamp is {self.clamp}: it must be positive; leave it out for none")
        if not self.gated and (self.clamp is not None or self.up_offset):
            raise ValueError("--clamp and --up-offset need experts with a gate: leave them out with --gated False")
        if self.shared_score and not self.shared_hidden:
            raise ValueError("--shared-score needs a shared expert: give its hidden width with --shared-hidden")
        if self.shared_hidden and self.uneven:
            raise ValueError(
                "--shared-hidden with --uneven: in JAX, tokens that are padding would go through the shared expert too"
            )

    @property
    def router(self) -> Router:
        """How scores are computed."""
        return Router(*(getattr(self, name) for name in Router._fields))

    @property
    def expert(self) -> Experts:
        """How an expert computes."""
        return Experts(*(getattr(self, name) for name in Experts._fields))

    @property
    def idle(self) -> set[str]:
        """Options of router and experts that have no effect in this case."""
        epsilon = set() if self.renormalize else {"epsilon"}
        groups = {"top_groups", "group_score", "outside_groups"} if self.groups == 1 else set()
        narrow = {"float32": {"router_dtype", "cast_scores"}, "float64": {"cast_scores"}}.get(self.dtype, set())
        return epsilon | groups | narrow

    @property
    def capacity_options(self) -> CapacityOptions:
        """How the case's capacity drops assignments."""
        return CapacityOptions(self.capacity_per, self.priority, self.align)

    @property
    def processes(self) -> int:
        """The number of ranks in all groups together."""
        return self.ranks * (2 if self.way == "two_groups" else 1)

    @property
    def two_steps(self) -> bool:
        """Whether a second step runs beside the first."""
        return self.way in ("in_flight", "two_groups")

    def tokens_of(self, rank: int) -> int:
        """The number of tokens on a rank that are not padding; they come first."""
        if not self.uneven:
            return self.tokens
        return self.tokens * (self.ranks - 1 - rank) // (self.ranks - 1) if self.ranks > 1 else self.tokens // 2

    @property
    def assignments(self) -> int:
        """N, assignments on one rank, those of padding included."""
        return self.tokens * self.top_k

    @property
    def bins(self) -> int:
        """Bins on one rank's send side: P or E."""
        return self.ranks if self.capacity_per == "rank" else self.experts

    @property
    def capacity(self) -> int:
        """C, rows per bin: ceil(factor * T*K / bins), at least 1, rounded up to `align`; exact."""
        if self.capacity_factor is None:
            most = min(self.top_k, self.experts // self.ranks) if self.capacity_per == "rank" else 1
            rows = self.tokens * most
        else:
            rows = math.ceil(Fraction(self.capacity_factor) * self.assignments / self.bins)
        return -(-max(rows, 1) // self.align) * self.align

    @property
    def most_received(self) -> int:
        """The most rows that a rank can receive, P*T*min(K, e), as a token's experts differ."""
        return self.ranks * self.tokens * min(self.top_k, self.experts // self.ranks)

    @property
    def real_size(self) -> bool:
        """Whether expert weights are too large to draw, store and compare number by number."""
        return self.experts * self.width * self.hidden > REAL_SIZE

    def compared_rows(self, n: int) -> list[int] | slice:
        """Which of the n rows of each expert weight's gradient are compared.

        All are, except at real size: there the first, the last and six between.
        """
        if not self.real_size or n <= 8:
            return slice(None)
        return [0, *sorted((np.random.default_rng(n).permutation(n - 2)[:6] + 1).tolist()), n - 1]

    @property
    def accum_dtype(self) -> str:
        """The dtype of accumulation, and of the router unless it says otherwise."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def score_dtype(self) -> str:
        """The dtype that scores are computed in."""
        return "float32" if self.router_dtype == "float32" else self.accum_dtype

    def dtype_of(self, kind: Kind) -> str:
        """The dtype of an array: of tokens and experts, logits and router, scores before and after they are cast."""
        cast = self.dtype if self.cast_scores else self.score_dtype
        logits = self.dtype if self.router_dtype == "activations" else self.score_dtype
        return {"case": self.dtype, "logits": logits, "score": self.score_dtype, "weight": cast, "int": "int"}[kind]


PATTERN_RECORDED = "--pattern {} with --recording {}: the recording says which experts are chosen, so leave out one"


def changed(case: Case, changes: dict[str, Any]) -> Case:
    """The case with other values in some fields, under a name that says so."""
    return replace(case, **{"name": f"{case.name}-changed"} | changes) if changes else case


def flag(field: str) -> str:
    """The name of a field on the command line."""
    return field.replace("_", "-")
