"""Checkpoints: what is read is what transformers computes with; what is missing, quantised or unknown is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity import checkpoints
from parity.cases.case import Case
from parity.cases.parameters import PARAMETERS, Parameters
from parity.cases.presets import command
from parity.checkpoints import FAMILIES, read
from parity.cli.check import Command, Flags, chosen_cases
from parity.oracle import reference
from parity.oracle.evaluation import unreached
from parity.oracle.problem import draw
from parity.oracle.reference import Exact

CHECKPOINTS = Path(__file__).parent / "checkpoints"
COMMITTED = sorted(path.name for path in CHECKPOINTS.iterdir())


def computed(folder, known):
    """What the oracle makes of a checkpoint's first layer: the output and gradients, by the names of block.npz."""
    arrays, fields, _, _ = read(folder)
    x_PTD, dout_PTD = (known[name][None].astype(np.float64) for name in ("x", "dout"))
    case = Case(ranks=1, tokens=x_PTD.shape[1], **fields)
    w = Parameters(**{name: a.astype(np.float64) for name, a in arrays.items()})
    id_PTK = reference.select(case, reference.route(case, x_PTD, w, Exact())[1], w)
    keep_PTK = np.ones(id_PTK.shape, bool)
    layer = reference.layer(case, x_PTD, w, dout_PTD, id_PTK, keep_PTK, Exact())
    return {"out": layer.out[0], "dx": layer.dx[0]} | {f"d{name}": a for name, a in layer.gradients.items()}


def assert_computes_what_transformers_does(folder):
    with np.load(folder / "block.npz") as known:
        found = computed(folder, known)
        assert found.keys() == {*known} - {"x", "dout"}
        for name, a in found.items():
            np.testing.assert_allclose(a, known[name], 1e-4, 1e-5, err_msg=name)


@pytest.mark.parametrize("family", COMMITTED)
def test_a_layer_computes_what_transformers_does(family):
    assert_computes_what_transformers_does(CHECKPOINTS / family)


@pytest.mark.parametrize(("family", "tensor", "wrong"), [
    ("gpt_oss", "experts.gate_up_proj", ("w_gate w_up", "E D (2 F)")),
    ("gpt_oss", "experts.gate_up_proj", ("w_up w_gate", "E D (F 2)")),
    ("qwen3_next", "experts.*.up_proj.weight", ("w_gate", "F D")),
])  # fmt: skip
def test_a_reader_that_takes_gate_and_up_otherwise_is_found_out(family, tensor, wrong, monkeypatch):
    names = FAMILIES[family].names | {tensor: wrong}
    if "*" in tensor:
        names["experts.*.gate_proj.weight"] = ("w_up", "F D")
    monkeypatch.setitem(checkpoints.FAMILIES, family, FAMILIES[family]._replace(names=names))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_computes_what_transformers_does(CHECKPOINTS / family)


@pytest.mark.published
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("kimi")])
def test_every_family_as_transformers_writes_it(family, tmp_path):
    import make_checkpoints

    arrays = make_checkpoints.write(family, tmp_path)
    checkpoint = read(tmp_path)
    assert checkpoint.family == family
    assert checkpoint.arrays.keys() == arrays.keys()
    for name, a in arrays.items():
        folded = family == "gemma4" and name == "router"
        np.testing.assert_allclose(checkpoint.arrays[name].astype(a.dtype), a, 1e-6 if folded else 0, 0, err_msg=name)
    assert_computes_what_transformers_does(tmp_path)


def test_shapes_and_dtypes_are_those_stored():
    arrays, fields, layer, family = read(CHECKPOINTS / "deepseek_v3")
    assert (layer, family) == (1, "deepseek_v3")
    assert {name: a.shape for name, a in arrays.items()} == {
        "router": (10, 6), "selection_bias": (6,), "w_gate": (6, 10, 4), "w_up": (6, 10, 4), "w_down": (6, 4, 10),
        "shared_w_gate": (10, 12), "shared_w_up": (10, 12), "shared_w_down": (12, 10),
    }  # fmt: skip
    assert {name for name, a in arrays.items() if a.dtype == ml_dtypes.bfloat16} == arrays.keys() - {"selection_bias"}
    assert arrays["selection_bias"].dtype == np.float32
    assert fields == {
        "experts": 6, "width": 10, "hidden": 4, "top_k": 3, "score_function": "sigmoid", "renormalize": True,
        "epsilon": 1e-20, "scale": 2.5, "groups": 3, "top_groups": 2, "group_score": "top2",
        "outside_groups": "minus_inf", "score_on": "output", "router_dtype": "wide", "cast_scores": False,
        "router_bias": False, "selection_bias": True, "expert_scale": False, "expert_bias": False,
        "activation": "silu", "clamp": None, "up_offset": 0.0, "gated": True, "shared_hidden": 12,
        "shared_score": False,
    }  # fmt: skip
    assert all(a.flags.c_contiguous for a in arrays.values())


# Small layers, written here: a router and experts of which each number says where it stands.

SIZES = {"num_experts": 2, "hidden_size": 3, "moe_intermediate_size": 4, "num_experts_per_tok": 1}
BLOCK = "model.layers.0.mlp"


def numbered(*shape, dtype: Any = np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def qwen3(dtype=np.float32):
    tensors = {f"{BLOCK}.gate.weight": numbered(2, 3, dtype=dtype)}
    for g in range(2):
        for name, shape in {"gate_proj": (4, 3), "up_proj": (4, 3), "down_proj": (3, 4)}.items():
            tensors[f"{BLOCK}.experts.{g}.{name}.weight"] = numbered(*shape, dtype=dtype) + dtype(20 * g)
    return tensors


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | SIZES | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_each_expert_on_its_own(dtype, tmp_path):
    arrays = read(write(tmp_path, qwen3(dtype))).arrays
    assert {a.dtype for a in arrays.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(arrays["router"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(arrays["w_gate"][1], [[20, 23, 26, 29], [21, 24, 27, 30], [22, 25, 28, 31]])
    np.testing.assert_array_equal(arrays["w_down"][1, 0], [20, 24, 28])


def test_experts_together(tmp_path):
    apart = qwen3()
    fused = {
        f"{BLOCK}.gate.weight": apart[f"{BLOCK}.gate.weight"],
        f"{BLOCK}.experts.gate_up_proj": np.stack(
            [
                np.concatenate([apart[f"{BLOCK}.experts.{g}.{part}_proj.weight"] for part in ("gate", "up")])
                for g in range(2)
            ]
        ),
        f"{BLOCK}.experts.down_proj": np.stack([apart[f"{BLOCK}.experts.{g}.down_proj.weight"] for g in range(2)]),
    }
    one, other = read(write(tmp_path / "apart", apart)), read(write(tmp_path / "fused", fused))
    assert one.fields == other.fields
    for name, a in one.arrays.items():
        np.testing.assert_array_equal(a, other.arrays[name])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_text_part_of_a_wrapper(prefix, tmp_path):
    tensors = {name.replace("model.", prefix, 1): a for name, a in qwen3().items()}
    tensors["vision_tower.layers.0.mlp.fc1.weight"] = numbered(2, 2)
    write(tmp_path, tensors)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_wrapper", "text_config": text}))
    assert read(tmp_path).family == "qwen3_moe"


def copied(family, tmp_path):
    return Path(shutil.copytree(CHECKPOINTS / family, tmp_path / family))


def edited(folder, **config):
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: value for name, value in said.items() if value != "gone"}))
    return folder


def test_only_shards_of_the_layer_are_opened(tmp_path):
    folder = copied("deepseek_v3", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for tensor, shard in index.items() if "layers.1.mlp" in tensor}
    others = set(index.values()) - needed
    assert len(needed) > 1
    assert others
    for shard in others:
        (folder / shard).unlink()
    assert read(folder).layer == 1
    gone = max(needed)
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=f"the index names {gone}, which is not there: download it too"):
        read(folder)


def test_groups_of_deepseek_v2_count_for_one_method_only(tmp_path):
    config = {"model_type": "deepseek_v2", "n_group": 2, "topk_group": 1, "n_shared_experts": None}
    for method, groups in {"greedy": 1, "group_limited_greedy": 2}.items():
        fields = read(write(tmp_path, qwen3(), topk_method=method, **config)).fields
        assert fields["groups"] == groups


def test_what_config_leaves_out_is_what_the_family_does(tmp_path):
    assert read(edited(copied("qwen3_next", tmp_path), norm_topk_prob="gone")).fields["renormalize"]
    assert not read(write(tmp_path / "qwen3_moe", qwen3())).fields["renormalize"]
    assert read(edited(copied("gpt_oss", tmp_path), swiglu_limit="gone")).fields["clamp"] == 7


def test_a_bias_that_config_says_is_not_there(tmp_path):
    names = {"mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = qwen3()
    for old, new in names.items():
        tensors = {name.replace(f".{old}.", f".{new}."): a for name, a in tensors.items()}
    checkpoint = read(write(tmp_path, tensors, model_type="lfm2_moe", use_expert_bias=False))
    assert not checkpoint.fields["selection_bias"]
    assert "selection_bias" not in checkpoint.arrays
    folder = write(tmp_path, tensors, model_type="lfm2_moe")
    refused(folder, "no expert_bias, which holds selection_bias: exactly one is needed, and the layer has ")


# Refusals.


def refused(folder, said, layer=None):
    with pytest.raises(ValueError) as error:  # noqa: PT011  what is said is asserted below
        read(folder, layer)
    assert said in str(error.value), str(error.value)
    assert str(error.value).startswith(f"checkpoint {folder}: ")


def test_what_is_no_checkpoint(tmp_path):
    refused(tmp_path, "there is no config.json: give a folder as save_pretrained writes it, or as it is downloaded")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (tmp_path / "pytorch_model.bin").touch()
    refused(
        tmp_path,
        "there is neither model.safetensors nor model.safetensors.index.json, but config.json, pytorch_model.bin: "
        "convert it to safetensors",
    )
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    refused(tmp_path, "header")


def test_an_unknown_family(tmp_path):
    folder = edited(copied("deepseek_v3", tmp_path), model_type="deepseek_v4")
    refused(folder, "model_type 'deepseek_v4' is not known here: the nearest is deepseek_v3, known are mixtral, ")
    refused(folder, "Its layer 1 has input_layernorm.weight, mlp.experts.*.down_proj.weight, mlp.experts.*.gate_proj")
    refused(folder, "Its layer 0 has input_layernorm.weight, ", layer=0)


def test_a_layer_without_experts(tmp_path):
    folder = CHECKPOINTS / "deepseek_v3"
    refused(folder, ", and no experts by the tensor names of deepseek_v3: ", layer=0)
    refused(folder, "ask for layer 1", layer=0)
    refused(folder, "layer 5 has nothing, and no experts by the tensor names of deepseek_v3: ask for layer 1", layer=5)
    dense = write(tmp_path, {f"{BLOCK}.up_proj.weight": numbered(2, 3)})
    refused(dense, "layer 0 has up_proj.weight, and no experts by the tensor names of qwen3_moe: no other layer has")


def test_a_tensor_that_is_not_known(tmp_path):
    tensors = qwen3() | {f"{BLOCK}.gate.bias": numbered(2)}
    refused(write(tmp_path, tensors), "layer 0 of a qwen3_moe: gate.bias is not known here, so the layer may")
    shared = qwen3() | {f"{BLOCK}.shared_experts.up_proj.weight": numbered(2, 3)}
    config = {"model_type": "glm4_moe", "n_shared_experts": 0}
    refused(write(tmp_path, shared, **config), "shared_experts.up_proj.weight is not known here")


def test_a_tensor_that_is_missing(tmp_path):
    tensors = qwen3()
    for name in ("gate.weight", "experts.1.up_proj.weight"):
        gone = write(tmp_path, {tensor: a for tensor, a in tensors.items() if tensor != f"{BLOCK}.{name}"})
        refused(gone, {
            "gate.weight": "no gate.weight, which holds router: exactly one is needed, and the layer has experts.*.",
            "experts.1.up_proj.weight": "there is no experts.*.up_proj.weight for [1], but config.json has 2 experts",
        }[name])  # fmt: skip
    none = write(tmp_path, {tensor: a for tensor, a in tensors.items() if "up_proj" not in tensor})
    refused(none, "no experts.gate_up_proj or experts.*.up_proj.weight, which holds w_up: exactly one is needed, and ")


def test_more_experts_than_config_says(tmp_path):
    refused(
        write(tmp_path, qwen3(), num_experts=1),
        "there is experts.*.down_proj.weight for [1] too, but config.json has 1 experts: correct one of the two",
    )


def test_one_array_twice(tmp_path):
    both = qwen3() | {f"{BLOCK}.experts.gate_up_proj": numbered(2, 8, 3)}
    refused(write(tmp_path, both), "experts.gate_up_proj and experts.*.gate_proj.weight both hold w_gate")
    twice = qwen3() | {"layers.0.mlp.gate.weight": numbered(2, 3)}
    refused(write(tmp_path, twice), "layers.0.mlp.gate.weight and model.layers.0.mlp.gate.weight are the same array")


def test_another_shape(tmp_path):
    folder = edited(copied("gpt_oss", tmp_path), intermediate_size=5)
    refused(
        folder,
        "model.layers.0.mlp.experts.down_proj has shape [6, 4, 10], expected [E F D] = [6, 5, 10] by config.json: "
        "they are of different models",
    )


def test_experts_of_several_dtypes(tmp_path):
    tensors = qwen3() | {f"{BLOCK}.experts.1.up_proj.weight": numbered(4, 3, dtype=np.float16)}
    refused(
        write(tmp_path, tensors), "experts.1.up_proj.weight is float16, others are float32: convert them to one dtype"
    )


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "weight_packed"])
def test_quantised_by_a_tensor_beside(suffix, tmp_path):
    tensors = qwen3() | {f"{BLOCK}.experts.0.up_proj.{suffix}": numbered(1, 1)}
    folder = write(tmp_path, tensors, quantization_config={"quant_method": "fp8"})
    refused(
        folder, f"experts.*.up_proj.{suffix} is quantised, and only F32, BF16, F16, F64 are read here: convert it to"
    )
    refused(folder, "(config.json says it is quantised: fp8)")


def test_quantised_by_its_names(tmp_path):
    folder = copied("gpt_oss", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj"]
    for part in ("blocks", "scales"):
        tensors[f"model.layers.0.mlp.experts.down_proj_{part}"] = numbered(2, 2, dtype=np.uint8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "experts.down_proj_blocks, experts.down_proj_scales is quantised")


def test_quantised_by_its_dtype(tmp_path):
    tensors = qwen3() | {f"{BLOCK}.experts.1.up_proj.weight": numbered(4, 3, dtype=np.int8)}
    refused(write(tmp_path, tensors), f"{BLOCK}.experts.1.up_proj.weight of I8 is quantised")


@pytest.mark.parametrize(("config", "said"), [
    ({"num_experts_per_tok": "gone"}, "config.json lacks num_experts_per_tok, which says top_k: add it"),
    ({"n_routed_experts": "gone"}, "config.json lacks num_experts or num_local_experts or n_routed_experts, which "),
    ({"hidden_act": "tanh"}, "config.json has the activation 'tanh': known are silu, "),
    ({"scoring_func": "softmax"}, "config.json has scoring_func 'softmax', and only 'sigmoid' is known here"),
])  # fmt: skip
def test_what_config_says(config, said, tmp_path):
    refused(edited(copied("deepseek_v3", tmp_path), **config), said)


def test_an_index_that_names_what_is_not_in_a_shard(tmp_path):
    folder = copied("deepseek_v3", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    tensor = "model.layers.1.mlp.gate.weight"
    index["weight_map"][tensor] = max(set(index["weight_map"].values()) - {index["weight_map"][tensor]})
    path.write_text(json.dumps(index))
    refused(folder, tensor)


# ---- Cases of a checkpoint


def test_arrays_have_the_names_and_axes_of_what_a_layer_learns():
    """But for the scale that is folded into Gemma 4's router."""
    own = {name: axes for name, axes in checkpoints.CANONICAL.items() if name != "router_scale"}
    assert own == {one.name: one.axes for one in PARAMETERS}


def chosen(family, presets=(), **flags):
    return chosen_cases(Command(presets, case=Flags(checkpoint=str(CHECKPOINTS / family), **flags)))


@pytest.mark.parametrize("family", COMMITTED)
def test_a_case_has_the_sizes_options_and_weights(family):
    (case,) = chosen(family, tokens=5)
    arrays, fields, layer, _ = read(CHECKPOINTS / family)
    assert {name: getattr(case, name) for name in fields} == fields
    assert (case.layer, case.tokens, case.ranks, case.name) == (layer, 5, 2, f"{family}-layer-{layer}")
    assert case.dtype == arrays["w_up"].dtype.name
    there = draw(case).parameters.there()
    assert there.keys() == arrays.keys()
    for name, a in arrays.items():
        np.testing.assert_array_equal(there[name].astype(np.float64), a.astype(np.float64))
    folder = CHECKPOINTS / family
    assert command(case) == f"python -m parity check --checkpoint {folder} --layer {layer} --tokens 5"


def test_drawn_tokens_reach_every_side_of_a_clamp():
    assert unreached(draw(*chosen("gpt_oss"))) == []


@pytest.mark.parametrize(("flags", "said"), [
    ({"width": 12}, "--width is 12, but layer 1 of the checkpoint has 10"),
    ({"layer": 0}, "layer 0 has .*, and no experts"),
    ({"ranks": 4}, "--experts 6 do not divide over --ranks 4"),
    ({"presets": ("zipf",)}, "--checkpoint is a case of its own: leave out zipf"),
])  # fmt: skip
def test_what_is_none_of_the_checkpoint(flags, said):
    with pytest.raises(ValueError, match=said):
        chosen("deepseek_v3", **flags)


def test_a_layer_of_no_checkpoint():
    with pytest.raises(ValueError, match="needs a checkpoint: name it with --checkpoint"):
        Case(layer=3)


def test_recorded_tokens_go_through_a_checkpoint(tmp_path):
    """Hidden states are enough: the checkpoint's router chooses."""
    x, file = np.random.default_rng(0).standard_normal((8, 10)).astype(np.float32), tmp_path / "x.safetensors"
    save_file({"x": x}, file)
    (case,) = chosen("qwen3_next", recording=str(file), tokens=4)
    problem = draw(case)
    np.testing.assert_array_equal(problem.x.reshape(8, 10), x)
    assert problem.expert_id.shape == (2, 4, 3)
    save_file({"x": x, "router": np.zeros((10, 6), np.float32)}, file)
    with pytest.raises(ValueError, match="it has router, and so has the checkpoint"):
        draw(case)
    save_file({"x": x[:, :9].copy()}, file)
    with pytest.raises(ValueError, match="its D is 9, but the checkpoint's is 10"):
        draw(case)
