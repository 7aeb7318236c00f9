"""The survey: each layer in a process of its own, what fails says why, and how far two layers are apart."""

import json
import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.cases.case import Case
from parity.judge.card import Card
from parity.survey import engine, one
from parity.survey.differences import distance, whole
from parity.survey.layers import stored
from parity.survey.records import LINES, Surveyed, load

LAYERS = """
import os, time
import torch
from parity import backend

def moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, scale):
    score_TK, id_TK = (x_TD.float() @ router_DE.float()).softmax(-1).sort(dim=-1, descending=True, stable=True)
    out_TD = torch.zeros_like(x_TD)
    for k in range(case.top_k):
        gate, up = (torch.einsum("td,tdf->tf", x_TD, w[id_TK[:, k]]) for w in (w_gate_EDF, w_up_EDF))
        hidden = torch.nn.functional.silu(gate) * up
        out_TD = out_TD + scale * score_TK[:, k, None] * torch.einsum("tf,tfd->td", hidden, w_down_EFD[id_TK[:, k]])
    return out_TD.to(x_TD.dtype)

@backend(framework="torch")
def plain(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, 1)

@backend(framework="torch")
def doubled(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, 2)

@backend(framework="torch")
def again(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    return moe(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, 1)

@backend(framework="torch")
def dies(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    os._exit(7)

@backend(framework="torch")
def sleeps(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    time.sleep(600)
"""
NAMES = ("plain", "doubled", "again", "dies", "sleeps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A survey of five layers, of which one dies and one never ends."""
    into = tmp_path_factory.mktemp("survey")
    (into / "layers.py").write_text(LAYERS)
    names = [f"{into / 'layers.py'}:{name}" for name in NAMES]
    list(engine.run(names, ["float32"], into / "out", jobs=2, limit=25.0, about=engine.known(names)))
    return into / "out"


def of(folder: Path, name: str) -> Surveyed:
    return next(found for found in load(folder) if found.layer.endswith(f":{name}"))


def test_each_layer_has_a_line_and_those_that_fail_say_why(folder):
    assert len((folder / LINES).read_text().splitlines()) == len(NAMES)
    for name in ("plain", "doubled", "again"):
        card = of(folder, name).card
        assert card
        assert card.proved
    assert of(folder, "dies").why
    assert of(folder, "sleeps").why == "stopped after 25 s"


def test_two_layers_that_are_one_function_are_a_group_and_a_scale_is_told_apart(folder):
    survey = whole(folder)
    names = [[survey.layers[i].layer.rpartition(":")[2] for i in group] for group in survey.groups]
    assert names == [["again", "plain"], ["doubled"]]
    place = {layer.layer.rpartition(":")[2]: i for i, layer in enumerate(survey.layers)}
    apart = {d.problem: d for d in survey.apart[f"{place['doubled']} {place['plain']}"]}
    assert sorted(apart) == [
        "large gates and ups",
        "one expert a token",
        "plain",
    ]  # what else they are given they do not take
    for quantity in ("out", "dx", "drouter", "dw_gate", "dw_up", "dw_down"):
        assert apart["plain"].apart[quantity] == pytest.approx(0.5, abs=1e-6), quantity
        assert apart["plain"].scaled[quantity] < 1e-6, quantity


def test_all_layers_are_given_the_same_numbers(folder):
    """Whatever the options and ranks that they were found to have."""
    card = of(folder, "plain").card
    assert card
    plain = one.problem(card.case, "plain", {})
    other = replace(card.case, ranks=2, score_function="sigmoid", renormalize=True, scale=3.0, dtype="float32")
    there = one.problem(other, "plain", {})
    np.testing.assert_array_equal(plain.x.reshape(-1), there.x.reshape(-1))
    np.testing.assert_array_equal(plain.dout.reshape(-1), there.dout.reshape(-1))
    for name, a in plain.parameters.there().items():
        np.testing.assert_array_equal(a, getattr(there.parameters, name), err_msg=name)
    narrow = one.problem(replace(card.case, dtype="bfloat16", router_dtype="float32"), "plain", {})
    wide = one.problem(replace(card.case, dtype="bfloat16", router_dtype="activations"), "plain", {})
    np.testing.assert_array_equal(narrow.parameters.router, wide.parameters.router.astype(np.float32))


def test_the_last_line_of_a_layer_counts(tmp_path):
    lines = [Surveyed("a", "float32", "torch", {}, why="first"), Surveyed("a", "float32", "torch", {}, why="last")]
    (tmp_path / LINES).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    assert [found.why for found in load(tmp_path)] == ["last"]


@pytest.mark.parametrize("line", [b"[1]", b"{", b'{"layer": 3}'])
def test_a_line_that_is_none_of_a_survey(tmp_path, line):
    (tmp_path / LINES).write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=f"{tmp_path / LINES}, line 1, is none of a survey: "):
        load(tmp_path)


def test_a_setting_that_the_layer_does_not_obey_is_told():
    case = Case(renormalize=False, scale=2.0)
    card = Card("a", case, [], case, "", proved=True, command="", seconds=0.0)
    states = {"renormalize": True, "scale": 2.0, "activation": "gelu", "groups": 1, "top_groups": 3}
    assert Surveyed("a", "float32", "torch", {}, card, states=states).disobeyed == {
        "renormalize": True,
        "activation": "gelu",
    }
    same = replace(case, score_function="softmax_of_chosen")
    card = Card("a", case, [], same, "", proved=True, command="", seconds=0.0)
    assert not Surveyed("a", "float32", "torch", {}, card, states={"renormalize": True}).disobeyed


def test_distance_is_of_the_largest_number():
    assert distance(np.array([1.0, 4.0]), np.array([1.0, 3.0])) == 0.25
    assert distance(np.zeros(3), np.zeros(3)) == 0
    assert distance(np.array([1e-9]), np.array([-1e-9]), usual=1.0) == 2e-9


def test_what_an_adapter_says_of_its_weights_is_read_without_its_package():
    assert stored("maxtext:dense") == {
        "gate.kernel": "router: D E", "wi_0": "w_gate: E D F", "wi_1": "w_up: E D F", "wo": "w_down: E F D",
    }  # fmt: skip
    assert stored("maxtext:deepseek3")["gate.bias"] == "selection_bias: E"
    assert stored("maxtext:gpt_oss")["gate.bias"] == "router_bias: E"


def test_the_command_goes_on_where_it_stopped(folder, tmp_path):
    """What is in the folder is not run again; the page is written from what there is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / LINES).write_bytes((folder / LINES).read_bytes())
    (out / "arrays").mkdir()
    for path in (folder / "arrays").iterdir():
        save_file(load_file(path), out / "arrays" / path.name)
    name = of(folder, "dies").layer
    command = [sys.executable, "-m", "parity", "survey", name, "--out", str(out), "--dtype", "float32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert [json.loads(line)["layer"] for line in done.stdout.splitlines()] == [name]
    assert len((out / LINES).read_text().splitlines()) == len(NAMES) + 1
    page = (out / "index.html").read_text()
    assert all(f":{other}" in page for other in NAMES)


def test_the_recorded_map_says_what_the_docs_say():
    """Every layer of the recorded run is on the page beside it, and each that is called proved is."""
    docs = Path(__file__).parent.parent / "docs"
    lines = lzma.decompress((docs / "map.jsonl.xz").read_bytes()).splitlines()
    recorded = [msgspec.json.decode(line, type=Surveyed) for line in lines]
    said, page = (docs / "published.md").read_text(), (docs / "map.html").read_text()
    cards = [found for found in recorded if found.card]
    proved = [found for found in cards if found.card and found.card.proved]
    assert f"{len({found.layer for found in recorded})} layers" in said
    assert f"{len(cards)} cards in float32 and bfloat16, {len(proved)} proved" in said
    assert len({found.layer for found in cards}) >= 60
    assert len({found.layer for found in cards if found.framework == "jax"}) >= 5
    for found in recorded:
        assert found.layer in page
        if found not in proved and found.dtype == "float32":
            assert found.layer.removeprefix("families:").split(".")[0] in said
