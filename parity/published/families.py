"""Every MoE block of Hugging Face's transformers, as its own configuration has it, behind one function.

`--backend families:mixtral` is the block of Mixtral with its defaults: of a case it takes the sizes and weights, and no
option. `families:qwen3_moe,norm_topk_prob=True` has another setting than the default. The parameters of a block are
identified by their names and shapes; a block with an unknown parameter is refused.
`python -m parity.published.families` says, a JSON line each, what every block keeps and states.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers  # pyright: ignore[reportMissingImports]
from einops import rearrange  # pyright: ignore[reportMissingImports]

from parity import Unsupported, backend
from parity.published._blocks import blocks

# Sizes that differ on all axes of a block, so that shapes identify the axes.
APART = SimpleNamespace(width=56, hidden=20, experts=16, top_k=3, shared_hidden=20)

# These sizes, by every name that configurations use. A list is for configurations that hold a list.
SIZES = {
    "width": ("hidden_size", "d_model"),
    "hidden": ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok", "num_experts_per_token", "top_k", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
        "n_activated_experts",
    ),
    "shared_hidden": (
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
        "share_expert_dim", "shared_expert_dim", "intermediate_size_mlp",
    ),
}  # fmt: skip
ONE = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")  # as wide as the others
NONE = ("zero_expert_num", "num_zero_experts", "first_k_dense_replace")
GROUPS = ("n_group", "num_expert_groups", "moe_n_group")

# Names of a configuration's settings, by the case field that they correspond to.
STATES = {
    "activation": ("hidden_act", "hidden_activation", "mlp_hidden_act"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "scale": ("routed_scaling_factor", "route_scale", "moe_router_scaling_factor", "router_scaling_factor"),
    "groups": GROUPS,
    "top_groups": ("topk_group", "num_limited_groups", "moe_topk_group"),
    "score_function": ("scoring_func", "score_func", "score_function", "moe_router_activation_func"),
    "clamp": ("swiglu_limit",),
}
WORDS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "sqrtsoftplus": "sqrt_softplus"}


class Place(NamedTuple):
    """Which of our parameters a block's parameter comes from, and its axes there; F stands for H as well."""

    ours: tuple[str, ...]
    axes: str

    def __str__(self) -> str:
        return f"{' and '.join(self.ours)}: {self.axes}"


OF_OURS = {
    "router": "D E", "router_bias": "E", "selection_bias": "E", "expert_scale": "E", "w_gate": "E D F",
    "w_up": "E D F", "w_down": "E F D", "b_gate": "E F", "b_up": "E F", "b_down": "E D", "shared_w_gate": "D F",
    "shared_w_up": "D F", "shared_w_down": "F D", "shared_score": "D",
}  # fmt: skip
BOTH = ("w_gate", "w_up")

# Our parameter by the end of a block's parameter name, first match. With `shared` before it: the shared expert's.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(e_score_correction_bias|expert_bias)$", ("selection_bias",)),
    (r"per_expert_scale$", ("expert_scale",)),
    (r"shared_expert_gate\.weight$", ("shared_score",)),
    (r"shared\w*\.(gate_up_proj|input_linear)(\.weight)?$", ("shared_w_gate", "shared_w_up")),
    (r"shared\w*\.gate_proj(\.weight)?$", ("shared_w_gate",)),
    (r"shared\w*\.up_proj(\.weight)?$", ("shared_w_up",)),
    (r"shared\w*\.(down_proj|output_linear)(\.weight)?$", ("shared_w_down",)),
    (r"(gate_up_proj|input_linear)(\.weight)?$", BOTH),
    (r"gate_up_proj(_|\.)bias$", ("b_gate", "b_up")),
    (r"experts\.gate_proj(\.weight)?$", ("w_gate",)),
    (r"experts\.up_proj(\.weight)?$", ("w_up",)),
    (r"(experts\.down_proj|output_linear)(\.weight)?$", ("w_down",)),
    (r"down_proj(_|\.)bias$", ("b_down",)),
    (r"(gate|router)(\.\w+)?\.weight$", ("router",)),
    (r"(gate|router)(\.\w+)?\.bias$", ("router_bias",)),
)


@cache
def configured(name: str) -> tuple[Any, Any]:
    """The class of a block, and its configuration with its own defaults in place of sizes.

    Raises Unsupported if no configuration makes the block.
    """
    name, *settings = name.split(",")
    if name not in blocks():
        raise Unsupported(f"transformers has no block {name}")
    path, kind = blocks()[name]
    module = import_module(path)
    block = getattr(module, kind)
    failed = ""
    for config in _configurations(module, block):
        try:
            made = config()
            made._experts_implementation = "eager"
            for setting in settings:
                field, _, value = setting.partition("=")
                if not hasattr(made, field):
                    raise Unsupported(f"{config.__name__} has no {field}")
                setattr(made, field, _value(value))
            build(block, made, APART)
        except Exception as error:
            failed = failed or f"{config.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            return block, made
    raise Unsupported(f"no configuration makes it ({failed or 'there is none'})")


def _value(text: str) -> Any:
    """A setting: a Python literal, or a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _configurations(module: Any, block: Any) -> Iterable[Any]:
    """The configurations in a block's module: first the one its constructor names, then text ones, shortest first."""
    of = inspect.signature(block.__init__).parameters.get("config")
    named = re.findall(r"\w+Config\b", str(of.annotation)) if of else []
    others = [name for name in vars(module) if name.endswith("Config") and name.lower() != "pretrainedconfig"]
    others.sort(key=lambda name: ("Text" not in name, "Vision" in name, "Audio" in name, len(name)))
    for one in dict.fromkeys([*named, *others]):
        if hasattr(module, one):
            yield getattr(module, one)


def build(block: Any, config: Any, sizes: Any) -> torch.nn.Module:
    """A block of these sizes, without weights (on the meta device)."""
    for size, names in SIZES.items():
        for name in names:
            put(config, name, getattr(sizes, size) or 1)
    for names, value in ((ONE, 1), (NONE, 0)):
        for name in names:
            put(config, name, value)
    for name in GROUPS:  # no groups that the experts do not divide into
        groups = getattr(config, name, None)
        if groups and (sizes.experts % groups or sizes.experts // groups < 2):
            put(config, name, 1)
            put(config, "topk_group", 1)
    more = {}
    for one in list(inspect.signature(block.__init__).parameters.values())[1:]:
        if one.name != "config" and one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD:
            by_name = {other: size for size, names in SIZES.items() for other in names}
            more[one.name] = getattr(sizes, by_name[one.name]) if one.name in by_name else 1
    with torch.device("meta"):
        return block(config, **more).eval()


def put(config: Any, name: str, value: Any) -> None:
    """Set the attributes that a configuration has, as a list where it holds a list."""
    if not hasattr(config, name):
        return
    setattr(config, name, [value] * 2 if isinstance(getattr(config, name), list) else value)


@cache
def places(name: str) -> dict[str, Place]:
    """The `Place` of each parameter of a block, by name.

    Raises Unsupported if a parameter is unknown, or gate and up cannot be told apart.
    """
    block = build(*configured(name), APART)
    found = {own: _place(own, tuple(a.shape)) for own, a in block.state_dict().items()}
    if not {"router", "w_up", "w_down"} <= {ours for place in found.values() for ours in place.ours}:
        raise Unsupported(f"it lacks a router, up or down: its parameters are {', '.join(found)}")
    if not any(place.ours == BOTH for place in found.values()):
        return found
    left = {way: _left(name, found | _arranged(found, *way)) for way in product((False, True), repeat=2)}
    best = min(left, key=lambda way: left[way])
    if not left[best] < 1e-6 * max(left.values()):
        raise Unsupported(
            f"its gate and up cannot be told apart: off by {', '.join(f'{a:.1g}' for a in left.values())}"
        )
    return found | _arranged(found, *best)


def _place(own: str, of: tuple[int, ...]) -> Place:
    letters = {APART.width: "D", APART.experts: "E", APART.hidden: "F", 2 * APART.hidden: "(2 F)", 1: "1"}
    ours = next((ours for pattern, ours in NAMES if re.search(pattern, own)), ())
    axes = [letters.get(n, "?") for n in of]
    wanted = {
        "(2 F)" if letter == "F" and len(ours) == 2 else letter for one in ours for letter in OF_OURS[one].split()
    }
    if not ours or set(axes) - {"1"} != wanted:
        raise Unsupported(f"nothing is known of its parameter {own}, {list(of)}")
    return Place(ours, " ".join(axes))


def _arranged(found: Mapping[str, Place], backwards: bool, by_turns: bool) -> dict[str, Place]:
    """Places of experts' gate and up and their biases, in other orders: up first, or interleaved."""
    return {
        own: Place(ours[::-1] if backwards else ours, axes.replace("(2 F)", "(F 2)") if by_turns else axes)
        for own, (ours, axes) in found.items()
        if len(ours) == 2 and not ours[0].startswith("shared")
    }


def _left(name: str, found: Mapping[str, Place]) -> float:
    """The output of a block whose gates are all far below zero: zero, if gates are where `found` says."""
    D, E, F = APART.width, APART.experts, APART.hidden
    w_gate, w_up = torch.zeros(2, E, D, F)
    w_gate[:, 0], w_up[:, 0] = -40.0, torch.linspace(1, 2, F)
    w = {"router": torch.zeros(D, E), "w_gate": w_gate, "w_up": w_up, "w_down": torch.ones(E, F, D)}
    x_TD = torch.zeros(2, D)
    x_TD[:, 0] = 1
    return float(called(name, found, APART, x_TD, w).abs().max())


def called(name: str, found: Mapping[str, Place], sizes: Any, x_TD: torch.Tensor, w: Mapping[str, Any]) -> torch.Tensor:
    """The output of a block with our weights in place of its own. Its other parameters are zero, and scales are one."""
    module = build(*configured(name), sizes)
    its_own = {own: stored(found[own], w, tuple(a.shape), x_TD) for own, a in module.state_dict().items()}
    out = torch.func.functional_call(module, its_own, (x_TD[None],))
    return (out[0] if isinstance(out, tuple) else out).reshape(x_TD.shape)


def stored(place: Place, w: Mapping[str, Any], of: tuple[int, ...], x_TD: torch.Tensor) -> torch.Tensor:
    """Our parameter in a block's layout, in the wider of its own dtype and that of the tokens."""
    ours = [a for one in place.ours if (a := w.get(one)) is not None]
    if len(ours) < len(place.ours):
        return torch.full(of, float(place.ours == ("expert_scale",)), dtype=x_TD.dtype)
    many = "2 " if len(ours) == 2 else ""
    a = rearrange(
        torch.stack(ours) if many else ours[0], f"{many}{OF_OURS[place.ours[0]]} -> {place.axes}".replace("2", "two")
    )
    return a.reshape(of).to(torch.promote_types(a.dtype, x_TD.dtype))


def states(name: str) -> dict[str, Any]:
    """What a block's configuration says, by field of a case."""
    _, config = configured(name)
    found = {}
    for field, names in STATES.items():
        value = next((getattr(config, one) for one in names if getattr(config, one, None) is not None), None)
        if value is not None:
            found[field] = WORDS.get(value, value) if isinstance(value, str) else value
    return found


def __getattr__(name: str) -> Callable[..., Any]:
    """The layer that `families:NAME` is: it takes whatever a case can have, and refuses what its block has not."""
    if name.startswith("_"):
        raise AttributeError(name)

    try:  # look this up once, before ranks are forked
        found, refused = places(name), ""
    except Unsupported as why:
        found, refused = {}, str(why)

    @backend(framework="torch")
    def block(x: torch.Tensor, case: Any, **given: torch.Tensor | None) -> torch.Tensor:
        if refused:
            raise Unsupported(refused)
        there, has = {one for one, a in given.items() if a is not None}, {one for p in found.values() for one in p.ours}
        if there - has:
            raise Unsupported(f"it has no {', '.join(sorted(there - has))}")
        if "w_gate" in has - there:
            raise Unsupported("its experts have a gate")
        return called(name, found, case, x, given)

    kind = inspect.Parameter.KEYWORD_ONLY
    takes = [inspect.Parameter(one, kind, default=None) for one in OF_OURS]
    block.__signature__ = inspect.Signature([*(inspect.Parameter(one, kind) for one in ("x", "case")), *takes])  # type: ignore[attr-defined]
    return block


def said(name: str) -> dict[str, Any]:
    """What a block keeps and its configuration states, or the reason why it is refused."""
    try:
        return {"stored": {own: str(place) for own, place in places(name).items()}, "states": states(name)}
    except Unsupported as why:
        return {"why": str(why)}
    except Exception as error:
        return {"why": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # pyright: ignore[reportAttributeAccessIssue]
    for one in sys.argv[1:] or blocks():
        print(json.dumps({"name": one} | said(one)), flush=True)
