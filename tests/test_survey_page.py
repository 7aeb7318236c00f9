"""The map: all that was surveyed is on it, what is said of two is what `moving` says, and nothing is loaded."""

import json
import math
import re
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import said_by
from surveyed import OURS, surveyed
from test_html import DASH, NASTY, Node, Tree

from parity.judge.card import Finding
from parity.survey.moving import NEUTRAL, measured, moving, names, ordered, said, text
from parity.survey.page import DIGITS, packed, page
from parity.survey.records import Difference, Survey, Surveyed

STORED = {
    "gate.weight": "router: E D",
    "experts.gate_up_proj": "w_gate and w_up: E (2 F) D",
    "experts.down_proj": "w_down: E D F",
}
DEEPSEEK: dict[str, Any] = {
    "score_function": "sigmoid",
    "renormalize": True,
    "scale": 2.5,
    "selection_bias": True,
    "shared_hidden": 8,
}


class Page(Tree):
    """The map as elements."""

    VOID = (*Tree.VOID, "wbr")


@pytest.fixture(scope="module")
def survey() -> Survey:
    """Groups of three, two and one; one that is not proved, one that is another than it says; two without a card."""
    layers = []
    for dtype in ("float32", "bfloat16"):
        layers += [
            surveyed("transformers:mixtral", STORED, renormalize=True, dtype=dtype),
            surveyed("transformers:granitemoe", STORED, renormalize=True, dtype=dtype),
            surveyed("tokamax", OURS, {"of equal scores": "the higher id is chosen"}, renormalize=True, dtype=dtype),
            surveyed("transformers:deepseek_v3", STORED | {"bias": "selection_bias: E"}, **DEEPSEEK, dtype=dtype),
            surveyed("torchtitan", OURS, **DEEPSEEK, dtype=dtype),
            surveyed("transformers:gpt_oss", {"w13": "w_gate and w_up: E D (F 2)"}, activation="quick_gelu", clamp=7.0,
                     up_offset=1.0, dtype=dtype, said={"sum over the chosen": Finding("sum over the chosen",
                     "cannot tell: behind a clamp", "cannot tell")}),
        ]  # fmt: skip
        layers.append(Surveyed("transformers:dbrx", dtype, "torch", {}, why="nothing is known of router.layer.weight"))
    layers.append(Surveyed("easydel", "bfloat16", "jax", {"jax": "0.9.2"}, why="easydel is not installed"))
    for one in layers:
        if one.layer == "tokamax":
            one.framework, one.versions = "jax", {"jax": "0.11.1", "tokamax": "0.0.17"}
        if one.layer == "torchtitan":
            one.card.proved, one.card.proof = False, "the output does not match: 3.7 times its allowance"
            one.card.findings.append(Finding("gradient dx", "none of 6 explanations fits", "unknown", 0.25))
        if one.layer == "transformers:granitemoe":
            one.states = {"renormalize": False, "activation": "silu"}
            one.ran = {"plain": "it has no router of its own"}
    half = len([one for one in layers if one.dtype == "float32"])
    groups = [[i + at for i in of] for at in (0, half) for of in ((0, 1, 2), (3, 4), (5,))]
    apart = {
        f"{i + at} {j + at}": [
            Difference("plain", {"out": 1e-9 * (i + 1), "dx": 0.0, "dw_up": 0.25 * i}, {"out": 1e-9, "dw_up": 0.01}),
            Difference("zipf", {"out": math.inf, "dx": 0.5}),
        ]
        for at in (0, half) for i in range(6) for j in range(i + 1, 6) if (i, j) != (1, 2)
    }  # fmt: skip
    return Survey(layers, groups, apart)


@pytest.fixture(scope="module")
def root(survey) -> Node:
    return Page(page(survey, "2026-01-02")).root


def embedded(root: Node) -> dict[str, Any]:
    return json.loads(root.one("script", id="data").text)


def sides(survey: Survey, root: Node) -> list[tuple[str, list[int], Node]]:
    """Of each dtype: layers with a card, and the table."""
    tables = {table.attributes["data-dtype"]: table for table in root.all("table") if "data-dtype" in table.attributes}
    assert list(tables) == ["float32", "bfloat16"]
    return [
        (dtype, [i for i, one in enumerate(survey.layers) if one.dtype == dtype and one.card], table)
        for dtype, table in tables.items()
    ]


def test_the_answer_is_at_the_top(root):
    assert [h1.text for h1 in root.all("h1")] == ["6 published layers, 3 functions"] * 2
    assert [p.text for p in root.all("p", class_="lead")] == [
        f"In {dtype}, 6 of {n} layers could be asked what they are: they are 3 functions, and 5 of these cards are "
        "proved by a match of output and gradients." for dtype, n in (("float32", 7), ("bfloat16", 8))
    ]  # fmt: skip
    assert "Made on 2026-01-02" in root.one("main").text
    assert "tokamax 0.0.17, torch 2.13.0" in root.one("main").text


def test_every_layer_and_every_difference_is_in_the_table(survey, root):
    for dtype, places, table in sides(survey, root):
        rows = table.one("tbody").all("tr")
        assert sorted(int(tr.attributes["data-place"]) for tr in rows) == places
        columns = [th.text for th in table.one("thead").all("th")][2:]
        cards = {place: card for place in places if (card := survey.layers[place].card)}
        saids = {
            key: {said(card, card.get(key)) for card in cards.values()}
            for key in {finding.key for card in cards.values() for finding in card.findings}
        }
        assert set(columns) == {key for key, of in saids.items() if len(of) > 1}
        (agreed,) = [p.text for p in root.all("p", class_="agreed")][:1]
        for key in set(saids) - set(columns):
            assert f"{key}: {next(iter(saids[key]))}" in agreed
        for tr in rows:
            place = int(tr.attributes["data-place"])
            assert tr.one("th").text.startswith(survey.layers[place].layer)
            for key, td in zip(columns, tr.all("td")[1:], strict=True):
                finding = cards[place].get(key)
                nothing = "none" if key in NEUTRAL else DASH
                shown = (said(cards[place], finding) or nothing).removeprefix("cannot tell: ")
                assert td.text.removeprefix("? ").removeprefix("✗ ") == shown
                assert td.text.startswith("? ") == (finding is not None and finding.state == "cannot tell")
                assert td.text.startswith("✗ ") == (finding is not None and finding.state == "unknown")
                alike = Counter(said(card, card.get(key)) for card in cards.values())
                assert alike[said(cards[place], finding)] == max(alike.values()) or not td.has({"class_": "usual"})
        assert dtype in table.one("caption").text


def test_columns_that_tell_more_layers_apart_come_first(survey, root):
    _, places, table = sides(survey, root)[0]
    cards = [card for place in places if (card := survey.layers[place].card)]
    columns = [th.text for th in table.one("thead").all("th")][2:]
    assert columns[0] == "scores"  # the only one of which three things are said, twice each at most
    alone = {key for key in columns if max(Counter(said(c, c.get(key)) for c in cards).values()) == len(cards) - 1}
    assert set(columns[-len(alone) :]) == alone


def test_groups_say_what_sets_them_apart(survey, root):
    first = (
        root.one("ol", class_="groups")
        if len(root.all("ol", class_="groups")) == 1
        else root.all("ol", class_="groups")[0]
    )
    groups = [node for node in first.children if isinstance(node, Node) and node.tag == "li"]
    assert [[li.text for li in group.one("ul").all("li")] for group in groups] == [
        ["tokamax", "transformers:granitemoe", "transformers:mixtral"],
        ["torchtitan not proved", "transformers:deepseek_v3"],
        ["transformers:gpt_oss"],
    ]
    words = [group.all("p")[0].text for group in groups]
    assert words[0] == "1 · scores: softmax over all experts, renormalised; activation: silu"
    assert words[1].startswith("2 · scores: sigmoid, renormalised; activation: silu;")
    assert {"scale: 2.5", "shared expert: added"} <= set(words[1].split("; "))
    assert "activation: quick_gelu" in words[2]
    assert groups[0].all("p")[-1].text == "Among them differ: of equal scores."


def test_groups_of_which_the_same_was_found_say_what_was_measured():
    ones = [surveyed(name) for name in "abc"]
    apart = {"0 1": [Difference("zipf", {"dx": 0.5, "out": 0.25}), Difference("plain", {"out": 0.0})]}
    notes = [p.text for p in Page(page(Survey(ones, [], apart))).root.all("p", class_="note")]
    assert "Beside group 1: zipf: 50% apart, most in dx." in notes
    assert "Beside group 1: not measured." in notes


def test_what_is_not_proved_is_said_to_be_so(survey, root):
    for *_, table in sides(survey, root):
        flagged = [tr.one("th").text for tr in table.one("tbody").all("tr") if tr.all(class_="bad")]
        assert flagged == ["torchtitan✗ not proved"]
    unproved = root.all("tr", class_="unproved")
    assert [[cell.text for cell in tr.children if isinstance(cell, Node)] for tr in unproved] == [
        ["torchtitan", "the output does not match: 3.7 times its allowance",
         "gradient dx: none of 6 explanations fits (off by 0.25)"]
    ] * 2  # fmt: skip
    absent = [table.lines for table in root.all("table", class_="absent")]
    dbrx = ["transformers:dbrx", "nothing is known of router.layer.weight"]
    assert absent == [[dbrx], [dbrx, ["easydel", "easydel is not installed"]]]


def test_settings_that_are_not_obeyed_are_flagged(root):
    words = "its configuration says renormalize False, the layer does True"
    flags = root.all("span", class_="warn")
    assert [flag.attributes["title"] for flag in flags] == [words] * 2
    assert all(flag.text.endswith("renormalize") for flag in flags)
    assert sum(table.lines == [["transformers:granitemoe", words]] for table in root.all("table", class_="plain")) == 2


# ---- What the script reads


def unpacked(text: str) -> list[float | None]:
    codes = [text[i : i + 2] for i in range(0, len(text), 2)]
    special: dict[str, float | None] = {" -": None, " x": math.inf, "  ": 0.0}
    return [
        special[code] if code in special else (DIGITS.index(code[1]) + 10) * 10.0 ** (DIGITS.index(code[0]) - 31)
        for code in codes
    ]


def test_numbers_are_packed_to_two_digits():
    values = [0.0, 1.0, 0.099, 9.96, 1e-30, 4.7e-7, 0.125, 123456.0, 2.5e38, 1e-31]
    expected = [0.0, 1.0, 0.099, 10.0, 1e-30, 4.7e-7, 0.12, 120000.0, 2.5e38, 0.0]
    assert unpacked(packed(values)) == pytest.approx(expected, rel=1e-12, abs=0)
    assert unpacked(packed([None, math.nan, math.inf, 1e70])) == [None, math.inf, math.inf, math.inf]


def test_the_script_is_given_what_is_said_of_every_pair(survey, root):
    data = embedded(root)
    W = data["words"]
    for dtype, places, _ in sides(survey, root):
        order = data["places"][dtype]
        assert sorted(order) == places
        for p, q in permutations(places, 2):
            a, b = survey.layers[p], survey.layers[q]
            verdict, needs, remains, unsure = data["ways"][data["way"][dtype][order.index(p)][order.index(q)]]
            found = moving(a, b)
            assert W[verdict] == found.verdict
            assert [
                (W[what], of.split(), W[code], idle) for what, of, code, idle in map(data["needs"].__getitem__, needs)
            ] == [(need.what, list(need.of), need.code, need.idle + 2 * need.changes) for need in found.needs]
            for lines, expected in ((remains, found.remains), (unsure, found.unsure)):
                assert [[W[w] for w in data["lines"][i]] for i in lines] == [
                    [r.key, r.a, r.b, r.shows] for r in expected
                ]
            assert (f"{p} {q}" in data["apart"]) == (f"{p} {q}" in survey.apart)
    for pair, differences in survey.apart.items():
        for one, (problem, quantities, apart, scaled) in zip(ordered(differences), data["apart"][pair], strict=True):
            assert W[problem] == one.problem
            assert W[quantities].split() == list(one.apart)
            assert unpacked(apart) == pytest.approx(list(one.apart.values()), rel=0.05)
            of = unpacked(scaled) or [None] * len(one.apart)
            assert [value is None for value in of] == [name not in one.scaled for name in one.apart]
            for name, value in zip(one.apart, of, strict=True):
                assert value is None or value == pytest.approx(one.scaled[name], rel=0.05)


def test_the_script_is_given_every_finding(survey, root):
    data = embedded(root)
    W = data["words"]
    for one, its in zip(survey.layers, data["layers"], strict=True):
        assert (its["name"], its["dtype"], its["proved"]) == (one.layer, one.dtype, bool(one.card and one.card.proved))
        cells = {W[int(key)]: [W[w] for w in cell] for key, cell in its["cells"].items()}
        assert set(cells) == {finding.key for finding in (one.card.findings if one.card else ())}
        for finding in one.card.findings if one.card else ():
            state, what, off, rival, rival_off, experiment = cells[finding.key]
            assert (state, what, rival, experiment) == (finding.state, finding.what, finding.rival, finding.experiment)
            assert bool(off) == (finding.residual is not None)
            assert bool(rival_off) == (finding.rival_residual is not None)


# ---- As a page


def test_nothing_is_loaded(survey):
    html = page(survey)
    root = Page(html).root
    for node in root.below():
        assert node.tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use", "video", "audio")
        for name, value in node.attributes.items():
            assert name not in ("src", "srcset", "data", "action", "xlink:href", "poster", "background")
            assert name != "href" or value.startswith("#")
    assert not re.findall(r"https?:|@import|url\((?!#)|\bfetch\b|XMLHttpRequest|WebSocket|import\(", html)
    policy = next(m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_ids_are_one_of_a_kind_and_what_is_for_scripts_only_is_hidden(root):
    ids = [node.attributes["id"] for node in root.below() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    hidden = [node for node in root.below() if "hidden" in node.attributes]
    assert {node.attributes.get("class", node.tag) for node in hidden} == {"choose", "bar", "detail", "label"}
    assert not [table for node in hidden for table in node.all("table")]
    assert root.one("noscript").text
    assert [radio.attributes["value"] for radio in root.all("input", type="radio")] == ["float32", "bfloat16"]
    for table in root.all("table"):
        assert table.one("caption").text
        assert len({len(line) for line in table.lines}) == 1
    example = root.one("p", id="example").one("a").attributes["href"]
    assert example == "#" + urlencode({"from": "tokamax", "to": "transformers:granitemoe", "in": "float32"})


def test_nothing_gets_out_of_its_quotes():
    a = surveyed(NASTY, {NASTY: "router: D E"}, said={"scores": NASTY, NASTY: NASTY})
    b = surveyed("other", {NASTY: "router: E D"})
    a.versions, a.states, a.ran = {NASTY: NASTY}, {"scale": NASTY}, {NASTY: NASTY}
    assert a.card
    a.card.proved, a.card.proof = False, NASTY
    absent = Surveyed(f"{NASTY}2", "float32", "torch", {}, why=NASTY)
    html = page(Survey([a, b, absent], [], {"0 1": [Difference(NASTY, {NASTY.replace(" ", ""): 1.0})]}))
    root = Page(html).root
    assert "<script>alert" not in html
    assert not [node for node in root.below() for name in node.attributes if name.startswith("on")]
    assert sum(node.tag == "script" for node in root.below()) == 2
    assert {NASTY, "other"} == {one["name"] for one in embedded(root)["layers"]} - {f"{NASTY}2"}
    assert NASTY in embedded(root)["words"]
    (row,) = root.all("tr", **{"data-place": "0"})
    assert NASTY in [td.text for td in row.all("td")]


def test_a_survey_of_nothing_is_a_page():
    only = Survey([Surveyed("a", "float32", "torch", {}, why="it is not installed")], [], {})
    root = Page(page(only)).root
    assert root.one("h1").text == "0 published layers, 0 functions"
    assert root.one("table", class_="absent").lines == [["a", "it is not installed"]]


# ---- In a browser

PROBE = """<script>
{
const errors = [], spoken = {};
addEventListener("error", e => errors.push(e.message));
const rows = () => all(".map tbody tr").filter(tr => tr.offsetParent && !tr.hidden);
for (const radio of all("[name=dtype]")) {
  radio.click();
  const layers = data.places[dtype()].map(place => data.layers[place].name);
  for (const a of layers) for (const b of layers) if (a !== b) {
    choose(a, b);
    spoken[dtype() + " " + a + " " + b] = markdown(pair()) + $("answer").textContent;
  }
}
choose("", "");
const seen = rows().length;
rows()[0].cells[0].click(); rows()[1].cells[0].click();
const picked = [chosen.a, chosen.b], hash = location.hash;
$("search").value = "sigmoid, jax"; $("search").dispatchEvent(new Event("input"));
const none = rows().length;
$("search").value = "sigmoid"; $("search").dispatchEvent(new Event("input"));
const some = rows().map(tr => tr.cells[0].textContent), said = $("shown").textContent;
$("search").value = ""; $("search").dispatchEvent(new Event("input"));
rows()[1].cells[2].focus();
const shown = detail.hidden ? "" : detail.textContent;
const named = c => c.labels?.length || c.textContent.trim() || c.ariaLabel;
const unnamed = all("input, select, button").filter(c => !named(c)).length;
setTimeout(() => parent.postMessage({texts: spoken, errors, seen, picked, hash, none, some, said, shown, unnamed,
  width: document.documentElement.scrollWidth, window: innerWidth}, "*"), 50);
}
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(survey, tmp_path: Path, width):
    """What is said of each pair is what Python says; choosing, searching and looking closer do what they say."""
    found = said_by(page(survey), PROBE, width, tmp_path)
    assert found["errors"] == []
    assert found["unnamed"] == 0
    assert found["width"] <= found["window"] <= width
    for dtype, half in (("float32", 0), ("bfloat16", 7)):
        for i, j in permutations(range(6), 2):
            a, b = survey.layers[half + i], survey.layers[half + j]
            differences = survey.apart.get(f"{half + min(i, j)} {half + max(i, j)}", [])
            shown = found["texts"][f"{dtype} {a.layer} {b.layer}"]
            assert shown.startswith(text(a, b, differences))
            for need in moving(a, b).needs:
                assert names(need, a, b) in shown
            assert all(one.words(dtype) in shown for one in measured(differences))
            assert ("torchtitan is not proved: the output does not match" in shown) == (
                "torchtitan" in (a.layer, b.layer)
            )
    assert found["seen"] == 6
    assert found["picked"] == ["tokamax", "transformers:granitemoe"]
    assert found["hash"] == "#" + urlencode({"from": found["picked"][0], "to": found["picked"][1], "in": "bfloat16"})
    assert found["none"] == 0
    assert [name.split("✗")[0] for name in found["some"]] == ["torchtitan", "transformers:deepseek_v3"]
    assert found["said"] == "2 of 6 layers"
    assert "softmax over all experts, renormalised" in found["shown"]
    assert "found: nothing else explains it" in found["shown"]
