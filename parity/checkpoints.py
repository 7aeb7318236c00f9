"""Mixture-of-Experts layers out of Hugging Face checkpoints: one layer's arrays, by the same names for every family."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy, and safetensors with it, knows bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

Array = np.ndarray
Config = dict[str, Any]

# The arrays that there may be, and their axes: E experts, D width, F hidden, H hidden of the shared expert.
# router_scale is folded into the router and never handed out.
CANONICAL = {
    "router": "D E", "router_bias": "E", "router_scale": "D", "selection_bias": "E", "expert_scale": "E",
    "w_gate": "E D F", "w_up": "E D F", "w_down": "E F D", "b_gate": "E F", "b_up": "E F", "b_down": "E D",
    "shared_w_gate": "D H", "shared_w_up": "D H", "shared_w_down": "H D", "shared_score": "D",
}  # fmt: skip

# What neither a family nor its config.json says otherwise.
DEFAULTS = {
    "score_function": "softmax", "renormalize": False, "epsilon": 0.0, "scale": 1.0, "groups": 1, "top_groups": 1,
    "group_score": "top2", "outside_groups": "minus_inf", "score_on": "output", "router_dtype": "activations",
    "cast_scores": False, "activation": "silu", "clamp": None, "up_offset": 0.0, "gated": True, "shared_hidden": 0,
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATIONS |= {"quick_gelu": "quick_gelu", "relu2": "relu2"}

# A tensor's name after what all names of the layer begin with, * for an expert's number; the arrays that it holds, and
# the axes that it is stored with. E (2 F) D is gate above up, E D (F 2) is gate and up by turns, 1 is of length one.
Names = dict[str, tuple[str, str]]
GATE: Names = {"gate.weight": ("router", "E D")}
BIAS: Names = {"gate.e_score_correction_bias": ("selection_bias", "E")}
FUSED: Names = {"experts.gate_up_proj": ("w_gate w_up", "E (2 F) D"), "experts.down_proj": ("w_down", "E D F")}
PROJ: Names = {
    **FUSED,
    "experts.*.gate_proj.weight": ("w_gate", "F D"),
    "experts.*.up_proj.weight": ("w_up", "F D"),
    "experts.*.down_proj.weight": ("w_down", "D F"),
}
W132: Names = {
    **FUSED,
    "experts.*.w1.weight": ("w_gate", "F D"),
    "experts.*.w3.weight": ("w_up", "F D"),
    "experts.*.w2.weight": ("w_down", "D F"),
}
SHARED_EXPERT: Names = {
    "shared_expert.gate_proj.weight": ("shared_w_gate", "H D"),
    "shared_expert.up_proj.weight": ("shared_w_up", "H D"),
    "shared_expert.down_proj.weight": ("shared_w_down", "D H"),
}
SHARED_EXPERTS = {name.replace("expert", "experts"): stored for name, stored in SHARED_EXPERT.items()}
QWEN = GATE | PROJ | SHARED_EXPERT | {"shared_expert_gate.weight": ("shared_score", "1 D")}
DEEPSEEK = GATE | BIAS | PROJ | SHARED_EXPERTS
UNGATED = {name: stored for name, stored in DEEPSEEK.items() if "gate_" not in name}
UNGATED |= {"experts.up_proj": ("w_up", "E F D")}


class Family(NamedTuple):
    """One kind of checkpoint.

    begins: how names go on after layers.N. (a pattern); names: the tensors; keys: which key of config.json has a field
    ("a or b": the first that is there; "a * b": the product), or a function of config.json; fields: what they are where
    config.json does not say; only: the values of a key, beside none, that all of this holds for.
    """

    begins: str
    names: Names
    keys: Mapping[str, str | Callable[[Config], Any]]
    fields: dict[str, Any] = {}
    only: dict[str, tuple[Any, ...]] = {}


def _v2(key: str) -> Callable[[Config], Any]:
    """A number of groups of DeepSeek-V2, which only one of its methods looks at."""
    return lambda config: config.get(key) if config.get("topk_method") == "group_limited_greedy" else None


SIZES = {
    "experts": "num_experts or num_local_experts or n_routed_experts", "width": "hidden_size",
    "hidden": "moe_intermediate_size", "top_k": "num_experts_per_tok", "activation": "hidden_act",
}  # fmt: skip
ONE_SIZE = SIZES | {"hidden": "intermediate_size"}
NORM = {"renormalize": "norm_topk_prob"}
SHARED_SIZE = {"shared_hidden": "shared_expert_intermediate_size"}
GROUPS = {"scale": "routed_scaling_factor", "groups": "n_group", "top_groups": "topk_group"}
SHARED_SIZES = {"shared_hidden": "n_shared_experts * moe_intermediate_size"}
V3 = {"score_function": "sigmoid", "renormalize": True, "epsilon": 1e-20, "router_dtype": "wide"}
CAST = {"cast_scores": True}
CHOSEN = CAST | {"score_function": "softmax_of_chosen"}

FAMILIES = {
    "mixtral": Family(r"(block_sparse_moe|mlp)\.", GATE | W132, ONE_SIZE, {"renormalize": True}),
    "qwen2_moe": Family(r"mlp\.", QWEN, SIZES | NORM | SHARED_SIZE, CAST),
    "qwen3_moe": Family(r"mlp\.", GATE | PROJ, SIZES | NORM, CAST),
    "qwen3_next": Family(r"mlp\.", QWEN, SIZES | NORM | SHARED_SIZE, CAST | {"renormalize": True}),
    "olmoe": Family(r"mlp\.", GATE | PROJ, ONE_SIZE | NORM, CAST),
    "deepseek_v3": Family(
        r"mlp\.", DEEPSEEK, SIZES | NORM | GROUPS | SHARED_SIZES, V3,
        {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
    "deepseek_v2": Family(
        r"mlp\.", GATE | PROJ | SHARED_EXPERTS,
        SIZES | GROUPS | SHARED_SIZES | {"groups": _v2("n_group"), "top_groups": _v2("topk_group")},
        {"router_dtype": "wide", "group_score": "max", "outside_groups": "zero"},
        {
            "scoring_func": ("softmax",), "norm_topk_prob": (False,),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
    ),
    "glm4_moe": Family(r"mlp\.", DEEPSEEK, SIZES | NORM | GROUPS | SHARED_SIZES, V3),
    "minimax_m2": Family(
        r"(block_sparse_moe|mlp)\.", GATE | W132 | {"e_score_correction_bias": ("selection_bias", "E")}, ONE_SIZE,
        {"score_function": "sigmoid", "renormalize": True},
        {"scoring_func": ("sigmoid",), "use_routing_bias": (True,), "shared_intermediate_size": (0,)},
    ),
    "gpt_oss": Family(
        r"mlp\.",
        {
            "router.weight": ("router", "E D"), "router.bias": ("router_bias", "E"),
            "experts.gate_up_proj": ("w_gate w_up", "E D (F 2)"), "experts.down_proj": ("w_down", "E F D"),
            "experts.gate_up_proj_bias": ("b_gate b_up", "E (F 2)"), "experts.down_proj_bias": ("b_down", "E D"),
        },
        ONE_SIZE | {"activation": lambda _: "quick_gelu", "clamp": "swiglu_limit"},
        CHOSEN | {"clamp": 7.0, "up_offset": 1.0},
        {"swiglu_alpha": (1.702,)},
    ),
    "llama4": Family(
        r"feed_forward\.",
        {
            "router.weight": ("router", "E D"),
            "experts.gate_up_proj": ("w_gate w_up", "E D (2 F)"), "experts.down_proj": ("w_down", "E F D"),
            **SHARED_EXPERT,
        },
        ONE_SIZE | {"shared_hidden": "intermediate_size"}, CAST | {"score_function": "sigmoid", "score_on": "input"},
    ),
    "gemma4": Family(
        r"(?=router\.|experts\.)",
        {
            "router.proj.weight": ("router", "E D"), "router.scale": ("router_scale", "D"),
            "router.per_expert_scale": ("expert_scale", "E"),
            **FUSED,
        },
        SIZES | {"top_k": "top_k_experts", "activation": "hidden_activation"},
        {"renormalize": True, "activation": "gelu_pytorch_tanh"},
    ),
    "nemotron_h": Family(
        r"mixer\.", UNGATED,
        SIZES | NORM | GROUPS
        | {"activation": "mlp_hidden_act", "shared_hidden": "moe_shared_expert_intermediate_size"},
        V3 | {"activation": "relu2", "gated": False},
        {"moe_latent_size": (), "mlp_bias": (False,)},
    ),
    "lfm2_moe": Family(
        r"feed_forward\.", GATE | W132 | {"expert_bias": ("selection_bias", "E")},
        SIZES | NORM | {"scale": "routed_scaling_factor", "selection_bias": "use_expert_bias"},
        CAST | {"score_function": "sigmoid", "renormalize": True, "epsilon": 1e-6, "selection_bias": True},
    ),
    "granitemoe": Family(
        r"block_sparse_moe\.",
        {
            "router.weight": ("router", "E D"), "router.layer.weight": ("router", "E D"),
            "input_linear.weight": ("w_gate w_up", "E (2 F) D"), "output_linear.weight": ("w_down", "E D F"),
            **FUSED,
        },
        ONE_SIZE, CHOSEN,
    ),
}  # fmt: skip
FAMILIES |= dict.fromkeys(("kimi_k2", "kimi_k25"), FAMILIES["deepseek_v3"])

LAYER = re.compile(r"(?:(?:model|backbone|language_model)\.)*(?:layers|blocks)\.(\d+)\.(.+)")
EXPERT = re.compile(r"\bexperts\.(\d+)\.")
QUANTISED = re.compile(r"(_blocks|scales?|scale_inv|_packed|_shape|qweight|qzeros|g_idx|absmax)$")
STORED = ("F32", "BF16", "F16", "F64")


class Checkpoint(NamedTuple):
    """A layer: its arrays, what config.json and the family say of how it computes, which layer, of which family."""

    arrays: dict[str, Array]
    fields: dict[str, Any]
    layer: int
    family: str


def read(folder: str | Path, layer: int | None = None) -> Checkpoint:
    """One MoE layer of a checkpoint in safetensors, the first by default; nothing but its tensors is read.

    Arrays are those of CANONICAL that the layer has, in the dtype that they are stored in. But a router of Gemma 4 is
    the product, in float32 at least, of its weights, its learned scale and D**-0.5: before it stands a plain RMS norm
    without weights, while the experts see the same tokens through another norm. Both are left out of the layer.

    Raises ValueError when something is missing, quantised, of another shape, or not known here: nothing is guessed.
    """
    try:
        return _read(Path(folder), layer)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint {folder}: {error}") from error


def _read(folder: Path, layer: int | None) -> Checkpoint:
    outer = _json(folder / "config.json")
    config = outer.get("text_config", outer)
    name = str(config.get("model_type", outer.get("model_type"))).removesuffix("_text")
    family, shards = FAMILIES.get(name, Family("", {}, {})), _shards(folder)
    layers: dict[int, dict[str, str]] = {}
    for tensor in sorted(shards):
        if (at := LAYER.fullmatch(tensor)) and (begins := re.match(family.begins, at[2])):
            layers.setdefault(int(at[1]), {})[tensor] = at[2][begins.end() :]
    shorts = {_star(short) for its in layers.values() for short in its.values()}
    known = family.names if name in FAMILIES else {short for short in shorts if "expert" in short}
    have_experts = [n for n, its in sorted(layers.items()) if any(_star(short) in known for short in its.values())]
    n = layer if layer is not None else next(iter(have_experts), 0)
    there = _listed(layers.get(n, {}).values())
    if name not in FAMILIES:
        nearest = get_close_matches(name, FAMILIES, 1, 0)[0]
        raise ValueError(
            f"model_type {name!r} is not known here: the nearest is {nearest}, known are {', '.join(FAMILIES)}. Its "
            f"layer {n} has {there}: add a row to FAMILIES in {__name__}"
        )
    if n not in have_experts:
        others = f"ask for layer {' or '.join(map(str, have_experts))}" if have_experts else "no other layer has any"
        raise ValueError(f"layer {n} has {there}, and no experts by the tensor names of {name}: {others}")
    quantised = config.get("quantization_config") or outer.get("quantization_config") or {}
    try:
        fields = _fields(config, family)
        arrays = _arrays(_held(layers[n], family, fields), shards, family, fields)
    except ValueError as error:
        said = f" (config.json says it is quantised: {quantised.get('quant_method')})" if quantised else ""
        raise ValueError(f"layer {n} of a {name}: {error}{said}") from error
    if (scale := arrays.pop("router_scale", None)) is not None:
        wide = np.promote_types(arrays["router"].dtype, np.float32)
        arrays["router"] = arrays["router"].astype(wide) * scale.astype(wide)[:, None] * wide.type(scale.size**-0.5)
    fields |= {array: array in arrays for array in ("router_bias", "selection_bias", "expert_scale", "shared_score")}
    return Checkpoint(arrays, fields | {"expert_bias": "b_down" in arrays}, n, name)


def _json(path: Path) -> Config:
    if not path.is_file():
        raise ValueError(f"there is no {path.name}: give a folder as save_pretrained writes it, or as it is downloaded")
    return json.loads(path.read_text())


def _shards(folder: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    if (one := folder / "model.safetensors").is_file():
        with safe_open(one, framework="numpy") as f:
            return dict.fromkeys(f.keys(), one)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        there = _listed(sorted(path.name for path in folder.iterdir()))
        raise ValueError(f"there is neither {one.name} nor {index.name}, but {there}: convert it to safetensors")
    return {tensor: folder / shard for tensor, shard in _json(index)["weight_map"].items()}


def _fields(config: Config, family: Family) -> dict[str, Any]:
    for key, values in family.only.items():
        if config.get(key) is not None and config[key] not in values:
            known = " or ".join(map(repr, values)) or "none"
            raise ValueError(f"config.json has {key} {config[key]!r}, and only {known} is known here")
    fields = DEFAULTS | family.fields
    for field, key in family.keys.items():
        value = key(config) if callable(key) else _said(config, key)
        if value is None and field not in fields:
            raise ValueError(f"config.json lacks {key}, which says {field}: add it")
        fields[field] = fields[field] if value is None else value
    if fields["activation"] not in ACTIVATIONS:
        raise ValueError(f"config.json has the activation {fields['activation']!r}: known are {', '.join(ACTIVATIONS)}")
    return fields | {"activation": ACTIVATIONS[fields["activation"]], "scale": float(fields["scale"])}


def _said(config: Config, key: str) -> Any:
    """What config.json has under a key, or under "a or b", or under "a * b"; None where it has nothing."""
    factors = [[config[k] for k in part.split(" or ") if config.get(k) is not None] for part in key.split(" * ")]
    return reduce(lambda a, b: a * b, [said[0] for said in factors]) if all(factors) else None


def _held(layer: dict[str, str], family: Family, fields: dict[str, Any]) -> dict[str, dict[int, str]]:
    """The tensors that a layer has under each of its family's names, by expert: all that are needed, and no others."""
    absent = {array for array in CANONICAL if array.startswith("shared_") and not fields["shared_hidden"]}
    absent |= {"selection_bias"} if fields.get("selection_bias") is False else set()
    names = {name: stored for name, stored in family.names.items() if absent.isdisjoint(stored[0].split())}
    held: dict[str, dict[int, str]] = {}
    for tensor, short in layer.items():
        of = held.setdefault(_star(short), {})
        expert = int(at[1]) if (at := EXPERT.search(short)) else 0
        if expert in of:
            raise ValueError(f"{of[expert]} and {tensor} are the same array: leave one out")
        of[expert] = tensor
    if unknown := [short for short in layer.values() if _star(short) not in names]:
        if quantised := [short for short in unknown if QUANTISED.search(short)]:
            raise ValueError(_quantised(_listed(quantised)))
        raise ValueError(
            f"{_listed(unknown)} is not known here, so the layer may be another one: known are "
            f"{', '.join(names)}, and the nearest is {get_close_matches(_star(unknown[0]), names, 1, 0)[0]}"
        )
    for array in {array: 0 for arrays, _ in names.values() for array in arrays.split()}:
        of = [name for name, (arrays, _) in names.items() if array in arrays.split()]
        if len(there := [name for name in of if name in held]) != 1:
            what = f"{' and '.join(there)} both hold {array}" if there else f"no {' or '.join(of)}, which holds {array}"
            raise ValueError(f"{what}: exactly one is needed, and the layer has {_listed(layer.values())}")
    for name, of in held.items():
        every = range(fields["experts"]) if "*" in name else range(1)
        if of.keys() != set(every):
            without, beyond = sorted(set(every) - of.keys()), sorted(of.keys() - set(every))
            wrong = f"there is no {name} for {without}" if without else f"there is {name} for {beyond} too"
            raise ValueError(f"{wrong}, but config.json has {fields['experts']} experts: correct one of the two")
    return held


def _arrays(
    held: dict[str, dict[int, str]], shards: dict[str, Path], family: Family, fields: dict[str, Any]
) -> dict[str, Array]:
    """The canonical arrays that a layer's tensors hold."""
    sizes = {"E": fields["experts"], "D": fields["width"], "F": fields["hidden"], "H": fields["shared_hidden"]}
    paths = {shards[tensor] for of in held.values() for tensor in of.values()}
    if gone := sorted(path.name for path in paths if not path.is_file()):
        raise ValueError(f"the index names {', '.join(gone)}, which is not there: download it too")
    arrays: dict[str, Array] = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="numpy")) for path in paths}
        for name, of in held.items():
            into, axes = family.names[name]
            for expert, tensor in of.items():
                a = _tensor(files[shards[tensor]], tensor, axes, sizes)
                for i, array in enumerate(into.split()):
                    if array not in arrays:
                        arrays[array] = np.empty([sizes[axis] for axis in CANONICAL[array].split()], a.dtype)
                    if arrays[array].dtype != a.dtype:
                        raise ValueError(
                            f"{tensor} is {a.dtype}, others are {arrays[array].dtype}: convert them to one dtype"
                        )
                    arrays[array][expert if "*" in name else ...] = _part(a, axes, i, CANONICAL[array])
    return arrays


def _tensor(file: Any, tensor: str, axes: str, sizes: dict[str, int]) -> Array:
    """A tensor with an axis for each letter. Raises ValueError when it is quantised or its shape is another."""
    stored, sizes = file.get_slice(tensor), sizes | {"1": 1, "2": 2}
    if (dtype := stored.get_dtype()) not in STORED:
        raise ValueError(_quantised(f"{tensor} of {dtype}"))
    shape = [math.prod(sizes[axis] for axis in group.strip("()").split()) for group in re.findall(r"\(.*?\)|\w", axes)]
    if stored.get_shape() != shape:
        raise ValueError(
            f"{tensor} has shape {stored.get_shape()}, expected [{axes}] = {shape} by config.json: they are "
            "of different models"
        )
    return file.get_tensor(tensor).reshape([sizes[axis] for axis in re.findall(r"\w", axes)])


def _part(a: Array, axes: str, i: int, canonical: str) -> Array:
    """Of gate and up together, the i-th; its axes in canonical order."""
    letters = re.findall(r"\w", axes)
    a = a[tuple({"1": 0, "2": i}.get(axis, slice(None)) for axis in letters)]
    letters = [axis for axis in letters if axis.isalpha()]
    return a.transpose([letters.index(axis) for axis in canonical.split() if axis in letters])


def _star(short: str) -> str:
    return EXPERT.sub("experts.*.", short)


def _listed(shorts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(map(_star, shorts))) or "nothing"


def _quantised(what: str) -> str:
    return (
        f"{what} is quantised, and only {', '.join(STORED)} are read here: convert it to bfloat16 (load it with "
        "transformers, dequantised, in torch.bfloat16, and save_pretrained), or download one that is not quantised"
    )
