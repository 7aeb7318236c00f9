"""The page of a report: what it says is what the report says, nothing is loaded, nothing gets out of its quotes."""

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from browser import said_by
from rich.console import Console
from test_compare import SIDES, expectations, perfect

from parity.cases.case import Case
from parity.cases.presets import PRESETS
from parity.judge.compare import Check
from parity.judge.engine import judge, make_report
from parity.judge.records import Report, header
from parity.oracle.problem import Problem, draw
from parity.oracle.quantities import STAGES
from parity.report.html import DRAWN, num, page, ratio_text
from parity.report.terminal import SHORT, describe, place, print_report
from parity.run.ours import BACKENDS
from parity.run.trace import Trace

NINE_DIGITS = 0.5e-8  # what is shown of a number is off by half a unit of its last digit, at most
NASTY = """</title><script>alert("x")</script>&amp;'"""
DASH = "\N{EN DASH}"  # where there is no value; between the sides of a comparison with each other
DROPS = Case(name="drops", ranks=2, tokens=4, width=8, hidden=5, experts=4, top_k=3, capacity_factor="3/4", seed=149)
BINS = replace(DROPS, name=NASTY, capacity_per="expert", capacity_factor="2", top_k=2, dtype="bfloat16")


class Node:
    """An element of a page."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: "Node | None"):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Node | str] = []

    def all(self, tag: str = "", **attributes: str) -> "list[Node]":
        """The elements below with this tag and these attributes, of which class may be one of several."""
        return [node for node in self.below() if tag in ("", node.tag) and node.has(attributes)]

    def one(self, tag: str = "", **attributes: str) -> "Node":
        (node,) = self.all(tag, **attributes)
        return node

    def has(self, attributes: dict[str, str]) -> bool:
        mine = {"class_" if k == "class" else k: v for k, v in self.attributes.items()}
        return all(v in (mine.get(k, "").split() if k == "class_" else [mine.get(k)]) for k, v in attributes.items())

    def below(self) -> "Iterator[Node]":
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.below()

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).split()) if self.tag in ("td", "th", "p", "li", "h1") else "".join(parts)

    @property
    def lines(self) -> list[list[str]]:
        """The body of a table."""
        (body,) = self.all("tbody")
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in body.all("tr")]


class Tree(HTMLParser):
    """A page as elements; every end tag has to be that of the element it ends."""

    VOID = ("meta", "input", "br", "link")
    ENDS = {"td": ("td", "th"), "th": ("td", "th"), "tr": ("td", "th", "tr")}  # what a start tag ends, if it is open

    def __init__(self, text: str):
        super().__init__()
        self.root = self.at = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        while self.at.tag in self.ENDS.get(tag, ()):
            self.up()
        assert len(dict(attrs)) == len(attrs)
        node = Node(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(node)
        if tag not in self.VOID:
            self.at = node

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.up()

    def handle_endtag(self, tag):
        while self.at.tag in ("td", "th", "tr") and self.at.tag != tag:
            self.up()
        assert self.at.tag == tag, f"</{tag}> ends <{self.at.tag}>"
        self.up()

    def up(self):
        assert self.at.parent
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def judged(problem: Problem, traces: list[Trace]):
    for trace in traces:
        trace.environment, trace.seconds = {"devices": f"2 x {trace.backend.name}"}, 0.5
    return judge(problem, traces)


def report_of(*cases: Case, spoil=lambda traces: None, backends=tuple(SIDES), planted: str = "") -> Report:
    """Of traces that hold what the oracle says, once the first case's are spoiled."""
    results = {}
    for case in cases:
        problem = draw(case)
        wanted = expectations(problem)
        traces = {backend: perfect(problem, backend, wanted) for backend in backends}
        if case is cases[0]:
            spoil(traces)
        results[case.name] = judged(problem, list(traces.values()))
    return make_report(header([BACKENDS[name] for name in backends], planted), list(results), results, {"in all": 1.0})


def spoiled(traces: dict[str, Trace]) -> None:
    """Moved rows, sums, a dtype, a number that is none: what fails in every way a comparison can."""
    jax, torch = (dict(traces[name].arrays) for name in ("jax", "torch"))
    traces["jax"].arrays, traces["torch"].arrays = jax, torch
    jax["isolated/group_by_expert/x"][1][0] += 1
    jax["e2e/combine/out"][0][2, 3] += 1e-3
    jax["isolated/return_tokens/y"][0] = jax["isolated/return_tokens/y"][0][:-1]
    jax["repeat/combine/out"][0] += 7
    torch["isolated/combine/out"][1][...] = np.nan
    torch["e2e/send_tokens/x"] = [a + 1 for a in torch["e2e/send_tokens/x"]]  # 24 rows, of which 20 are listed
    torch["isolated/route/expert_id"][0][1] = torch["isolated/route/expert_id"][0][1, ::-1]


@pytest.fixture(scope="module")
def mismatch() -> Report:
    return report_of(DROPS, BINS, spoil=spoiled, planted="jax-one-too-many-kept")


@pytest.fixture(scope="module")
def match() -> Report:
    return report_of(DROPS, BINS)


def tree(report: Report) -> Node:
    return Tree(page(report)).root


def section(root: Node, report: Report, name: str) -> Node:
    return root.one("details", id=f"case-{list(report.cases).index(name)}")


def every_case(report: Report) -> list[tuple[str, Node, list[Check]]]:
    root = tree(report)
    return [(name, section(root, report, name), report.checks[name]) for name in report.cases]


def test_a_mismatch_says_so(mismatch):
    root = tree(mismatch)
    assert root.one("h1").text == "✗ Mismatch"
    failing, all_of_them = mismatch.footer.failing, mismatch.footer.comparisons
    assert root.one("p", class_="lead").text == f"1 of 2 cases fails: {failing} of {all_of_them} comparisons differ."
    assert (
        "jax-one-too-many-kept. A bin keeps one assignment more than it holds." in root.one("p", class_="planted").text
    )
    rows = root.one("table", id="cases-table").lines
    assert [row[:2] for row in rows] == [["drops", "✗ fail"], [NASTY, "✓ match"]]
    assert [row[2] for row in rows] == ["✗✗✓✓✓✓✓✗✗", "✓✓✓✓✓✓✓✓✓"]
    assert rows[0][-1] == "torch is wrong at stage 1 route, forward, fed the oracle's input"
    assert [node.attributes.get("open", "closed") for node in root.all("details", class_="case")] == ["", "closed"]


def test_a_match_says_so(match):
    root = tree(match)
    assert root.one("h1").text == "✓ Match"
    assert "Every one of" in root.one("p", class_="lead").text
    assert [row[1] for row in root.one("table", id="cases-table").lines] == ["✓ match"] * 2
    assert "✗" not in "".join(node.text for node in root.all("main"))
    assert not root.all(class_="blame")
    assert not root.all("table", class_="rows")
    assert not root.all(class_="fail")
    assert len(root.all("details", class_="case")) == 2


def test_a_second_step_has_its_place():
    def second_only(traces: dict[str, Trace]) -> None:
        traces["jax"].arrays["second/combine/out"][1][2, 3] += 1

    case = replace(DROPS, way="in_flight")
    root = tree(report := report_of(case, spoil=second_only))
    problem, blame = draw(case).second, root.one(class_="blame")
    assert problem
    assert "jax is wrong at stage 9 combine, forward, in a second step beside the first" in blame.text
    against_the_oracle, against_torch = root.one("table", class_="rows").lines
    assert against_the_oracle[1:5] == ["out", "jax", "oracle", "in a second step"]
    assert against_the_oracle[6:8] == ["1", "2"]
    assert float(against_the_oracle[13]) == pytest.approx(problem.exact.out[1, 2, 3], rel=NINE_DIGITS, abs=0)
    assert against_torch[2:4] == ["torch", "jax"]
    tiles = [li for li in root.one("ol", class_="strip").children if isinstance(li, Node)]
    assert [tile.has({"class_": "fail"}) for tile in tiles] == [False] * 9 + [True]
    assert "second step" in root.one("figure", class_="magnitude").text
    assert report.footer.failing == 2


@pytest.mark.parametrize(
    ("backends", "dropped"),
    [(("torch",), "-"), (("jax",), "69"), (("torch-static",), "69"), (("torch", "jax"), "69")],
    ids=" ".join,
)
def test_terminal_and_page_say_alike_what_is_dropped(backends, dropped):
    report = report_of(PRESETS["drop-rank-score"], backends=backends)
    print_report(console := Console(width=100, file=StringIO()), report)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown[2].split()[:8] == ["drop-rank-score", "4", "16", "8", "2", "float32", "4", dropped]
    (row,) = tree(report).one("table", id="cases-table").lines
    assert row[-7:] == ["4", "16", "8", "2", "float32", "4", dropped.replace("-", DASH)]


def test_what_failed_and_how_to_repeat_it(mismatch):
    blame = section(tree(mismatch), mismatch, "drops").one(class_="blame")
    first = next(c for c in mismatch.checks["drops"] if not c.ok and c.value == "expert_id" and c.right == "oracle")
    assert blame.one("p", class_="describe").text == " ".join(describe(first).split())
    repeat = f"{mismatch.cases['drops'].command} --backend torch --fault jax-one-too-many-kept"
    assert [code.text for code in blame.all("code")] == ["torch_impl/routing.py: route", repeat]


def test_every_failing_row_is_there_by_identity(mismatch):
    node = section(tree(mismatch), mismatch, "drops")
    lines = node.one("table", class_="rows").lines
    wanted = []
    for check in mismatch.checks["drops"]:
        whole = check.where is None or check.mode == "repeat"
        if check.ok or whole:
            continue
        rows = check.worst_rows or [msgspec.structs.replace(check, worst_rows=[])]
        for row in rows:
            w = row.where
            assert w is not None
            identity = (w.rank, w.source_rank, w.token, w.k, w.expert, w.slot)
            wanted.append(
                [SHORT[check.stage], check.value, check.left, check.right]
                + [DASH if v is None else str(v) for v in identity]
                + [", ".join(map(str, w.index)) or DASH, num(row.error), "none" if check.bitwise else num(row.allowed)]
                + [row.got, row.expected]
            )
    shown = [[*line[:4], *line[5:12], *line[14:], float(line[12]), float(line[13])] for line in lines]
    assert len(wanted) > 10
    assert sorted(row[:13] for row in shown) == sorted(row[:13] for row in wanted)
    for row in shown:
        assert any(
            row[:13] == w[:13] and np.allclose(row[13:], w[13:], rtol=NINE_DIGITS, atol=0, equal_nan=True)
            for w in wanted
        )
    assert {row[0] for row in shown} == {"1 route", "2 group", "4 send", "9 combine"}
    notes = [" ".join(p.text.split()) for p in node.all("p", class_="note")]
    in_all = sum(c.failing for c in mismatch.checks["drops"] if c.where is not None and c.mode != "repeat")
    assert in_all > len(lines)
    assert any(f"{len(lines)} of the {in_all} that fail" in note for note in notes)
    whole = [p.text for p in node.all("p", class_="whole")]
    assert any("8 return, alone, jax:" in text and "shapes are" in text for text in whole)
    assert any("run twice, jax:" in text and "7 numbers differ between two runs" in text for text in whole)


def test_numbers_that_differ_look_different():
    """Even by the last bit of a float64."""

    def one_bit_more(traces: dict[str, Trace]) -> None:
        for a in traces["jax"].arrays["isolated/send_tokens/x"]:
            a[...] = np.nextafter(a, 9, where=a != 0, out=a.copy())

    lines = tree(report_of(replace(DROPS, dtype="float64"), spoil=one_bit_more)).one("table", class_="rows").lines
    assert {line[0] for line in lines} == {"4 send"}
    assert all(line[12] != line[13] for line in lines)
    assert all(float(line[12]) == np.nextafter(float(line[13]), 9) for line in lines if line[3] == "oracle")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, DASH), (math.nan, DASH), (math.inf, "\N{INFINITY}"), (0.0, "0.00"), (0.999, "1.00"), (1.0, "1.00"),
        (1.0001, ">1"), (1.0049, ">1"), (1.006, "1.01"), (10.4, "10"), (123456.0, "1e5"), (3e45, "3e45"),
    ],
)  # fmt: skip
def test_a_ratio_over_one_never_reads_as_one(ratio, text):
    assert ratio_text(ratio) == text


def test_the_strip_agrees_with_the_comparisons(mismatch):
    for _, node, checks in every_case(mismatch):
        tiles = [li for li in node.one("ol", class_="strip").children if isinstance(li, Node)]
        assert len(tiles) == len(STAGES) + 1
        for i, tile in enumerate(tiles):
            mine = [
                c for c in checks if (c.mode == "isolated" and c.stage == STAGES[i] if i < 9 else c.mode != "isolated")
            ]
            assert ("pass" in tile.attributes["class"]) == all(c.ok for c in mine)
            for line in tile.all("li"):
                side = line.one("span", class_="side").text
                of = [c for c in mine if (side if DASH not in side else "torch") == c.left]
                of = [c for c in of if (c.right in SIDES) == (DASH in side)]
                value = line.one("span", class_="value").text
                assert ("✓" in value) == all(c.ok for c in of)
                sums = [c.worst for c in of if not c.bitwise]
                if all(c.ok for c in of):
                    assert value.split()[-1].removeprefix("pass") == (ratio_text(max(sums)) if sums else "exact")
                elif any(c.where is None and not c.ok for c in of):
                    assert "not comparable" in value
                elif sums and max(sums) > 1:
                    assert value.split()[-1] == ratio_text(max(sums))


def test_the_table_of_comparisons_agrees(mismatch):
    for _, node, checks in every_case(mismatch):
        lines = node.one("table", class_="comparisons").lines
        assert len(lines) == len(checks) > 100
        for line, c in zip(lines, checks, strict=True):
            assert line[:8] == [
                "✓ pass" if c.ok else "✗ fail", SHORT[c.stage], c.value,
                {"isolated": "alone", "e2e": "in the layer", "repeat": "run twice"}[c.mode],
                c.left, c.right, str(c.rows), str(c.failing),
            ]  # fmt: skip
            assert line[8:11] == (
                ["exact" if c.ok else "not equal", DASH, "none"] if c.bitwise
                else [ratio_text(c.worst), num(c.error), num(c.allowed)]
            )  # fmt: skip
            if not c.ok:
                assert line[11] == (c.note if c.where is None else place(c.where))


def test_the_heat_map_agrees(mismatch):
    for name, node, _ in every_case(mismatch):
        worst = mismatch.cases[name].picture.worst
        maps = [figure for figure in node.all("figure") if "error over allowance by" in figure.one("figcaption").text]
        assert len(maps) == len(worst) == 2
        for figure, (side, rows) in zip(maps, worst.items(), strict=True):
            assert figure.one("figcaption").text.startswith(side)
            cells = [g for g in figure.all("g") if g.all("title")]
            assert len(cells) == sum(map(len, rows))
            for g in cells:
                found = re.fullmatch(r"source rank (\d+), expert (\d+): (.*)", g.one("title").text)
                assert found
                ratio = rows[int(found[1])][int(found[2])]
                assert found[3] == ("no rows" if ratio is None else ratio_text(ratio))
                kind = "none" if ratio is None else "over" if ratio > 1 else f"h{min(int(ratio * 5), 4)}"
                assert g.attributes["class"] == kind
    assert any(g for g in tree(mismatch).all("g", class_="over") if g.all("title"))


def power(label: str) -> float:
    exponent = label.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    return float(exponent[2:]) if label.startswith("10") else float(exponent[1:])


def test_error_against_magnitude_agrees(mismatch):
    """Points are read off the axes again."""
    for name, node, checks in every_case(mismatch):
        picture, figure = mismatch.cases[name].picture, node.one("figure", class_="magnitude")
        labels = [t for t in figure.one("g", class_="grid").all("text") if t.text != "0"]
        (y0, e0), *_, (y1, e1) = [(float(t.attributes["y"]) - 4, power(t.text)) for t in labels if t.text[:2] == "10"]
        (x0, m0), *_, (x1, m1) = [(float(t.attributes["x"]), power(t.text)) for t in labels if t.text[:2] != "10"]
        # A point and both labels that it is read off by are drawn to a tenth: half of one off, each.
        x_step, y_step = 0.15 * (m1 - m0) / (x1 - x0), 0.15 * (e1 - e0) / (y0 - y1)
        options = [option.text for option in figure.all("option")]
        groups = figure.one("g", id=f"{node.attributes['id']}-plots").all("g")
        names = {key.split(" ", 1)[1] for key in picture.magnitudes}
        assert len(options) == len(groups) == len(names) > 20
        assert sum("hidden" not in g.attributes for g in groups) == 1
        for option, g in zip(options, groups, strict=True):
            (array,) = [n for n in names if option.removeprefix("✗ ").startswith(title(n))]
            own = [c for c in checks if c.right == "oracle" and f"{c.mode}/{c.stage}/{c.value}" == array]
            assert option.startswith("✗") == any(not c.ok for c in own)
            assert f"({ratio_text(max(c.worst for c in own))}" in option
            drawn = g.all("path", class_="points")
            assert [path.has({"class_": "a"}) for path in drawn] == [True, False]
            for path, line, side in zip(drawn, g.all("path", class_="allowance"), ("torch", "jax"), strict=True):
                found = picture.magnitudes[f"{side} {array}"]
                assert (f"nothing to draw of {side}" in option) == (not found)
                points = re.findall(r"M([\d.]+) ([\d.]+)h", path.attributes["d"])
                steps = re.findall(r"M[\d.]+ ([\d.]+)H", line.attributes["d"])
                assert len(points) == len(steps) == len(found)
                for (x, y), step, m in zip(points, steps, found, strict=True):
                    exponent = m0 + (float(x) - (3 if side == "jax" else 0) - x0) / (x1 - x0) * (m1 - m0)
                    assert exponent == pytest.approx(m.exponent + 0.5, abs=x_step)
                    for drawn_at, value in ((y, m.error), (step, m.allowed)):
                        size = e0 + (float(drawn_at) - y0) / (y1 - y0) * (e1 - e0)
                        assert size == pytest.approx(math.log10(value), abs=y_step) if value else float(drawn_at) > y0
            above = sum(m.error > m.allowed for s in SIDES for m in picture.magnitudes[f"{s} {array}"])
            assert sum(p.attributes["d"].count("M") for p in g.all("path", class_="above")) == above


def title(array: str) -> str:
    mode, stage, value = array.split("/")
    return f"{SHORT[stage]}: {value}, {'alone' if mode == 'isolated' else 'in the layer'} ("


def test_kept_dropped_and_padded_rows_agree(mismatch):
    for name, node, _ in every_case(mismatch):
        case, picture = mismatch.cases[name].case, mismatch.cases[name].picture
        kept, dropped = np.array(picture.kept), np.array(picture.dropped)
        assert dropped.any() == (case is DROPS)
        assert any(picture.padding)
        by_bin = case.ranks * case.capacity - kept.sum(0) if case.capacity_per == "expert" else 0 * kept.sum(0)
        wanted = {
            "source rank": {"kept": kept.sum(1), "dropped": dropped.sum(1), "padding": np.array(picture.padding)},
            "expert": {"kept": kept.sum(0), "dropped": dropped.sum(0), "padding": by_bin},
        }
        drawn = {}
        for rect in node.all("rect"):
            for about in rect.all("title"):
                axis, index, n, kind = re.fullmatch(r"(.+) (\d+): (\d+) (\w+)", about.text).groups()  # type: ignore[union-attr]
                drawn[axis, kind, int(index)] = int(n)
                tallest = max(sum(v[i] for v in wanted[axis].values()) for i in range(len(wanted[axis]["kept"])))
                assert float(rect.attributes["height"]) == pytest.approx(
                    int(n) / tallest * 136, abs=0.05 + 1e-9
                )  # drawn to a tenth
                assert rect.attributes["class"] == kind
        assert drawn == {
            (axis, kind, i): int(n)
            for axis, kinds in wanted.items() for kind, counts in kinds.items() for i, n in enumerate(counts) if n
        }  # fmt: skip
        lines = next(d for d in node.all("details") if "in numbers" in d.one("summary").text).one("table").lines
        for axis, kinds in wanted.items():
            own = [line for line in lines if line[0].startswith(axis)]
            assert len(own) == len(kinds["kept"])
            assert [line[1] for line in own] == [str(n) for n in kinds["kept"]]
            assert [line[2] for line in own] == [str(n) for n in kinds["dropped"]]
            for line in own:
                at = int(line[0].removeprefix(axis))
                rows = [[w[at]] if axis == "source rank" else [[row[at]] for row in w] for w in picture.worst.values()]
                worst = [[v for row in of for v in row if v is not None] for of in rows]
                assert line[4:] == [ratio_text(max(of, default=None)) for of in worst]
            assert [line[3] for line in own] == [
                str(n) if axis == "source rank" or case is BINS else DASH for n in kinds["padding"]
            ]


def test_nothing_gets_out_of_its_quotes(mismatch):
    report = deepcopy(mismatch)
    report.header.command, report.header.planted = f'check "{NASTY}', NASTY
    report.header.machine = {NASTY: NASTY}
    report.cases["drops"].environment = {"torch": {NASTY: NASTY}}
    root = tree(report)
    (script,) = root.all("script")
    assert "alert" not in script.text
    assert root.one("head").one("title").text == "mismatch · moe-parity report"
    assert not [name for node in root.below() for name in node.attributes if name.startswith("on")]
    assert f'check "{NASTY}' in [code.text for code in root.one("header").all("code")]
    assert NASTY in [h3.text.removeprefix("✓pass ") for h3 in root.all("h3")]


def test_nothing_is_loaded(mismatch):
    text = page(mismatch)
    root = Tree(text).root
    for node in root.below():
        assert node.tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use", "video", "audio")
        for name, value in node.attributes.items():
            assert name not in ("src", "srcset", "data", "action", "xlink:href", "poster", "background")
            assert name != "href" or value.startswith("#")
    assert not re.findall(r"https?:|@import|url\((?!#)|\bfetch\b|XMLHttpRequest|WebSocket|import\(", text)
    policy = next(m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none';")


def test_links_and_controls_lead_somewhere(mismatch):
    root = tree(mismatch)
    ids = [node.attributes["id"] for node in root.below() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {a.attributes["href"][1:] for a in root.all("a")} <= set(ids)
    assert {i.attributes["data-table"] for i in root.all("input")} <= set(ids)
    assert {s.attributes["data-plots"] for s in root.all("select")} <= set(ids)
    for table in root.all("table"):
        assert table.one("caption").text
        width = len(table.one("thead").all("th"))
        assert all(len(line) == width for line in table.lines)
    assert all(svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") for svg in root.all("svg"))


def test_environment_and_command(mismatch):
    root = tree(mismatch)
    (environment,) = [t for t in root.all("table") if t.one("caption").text == "Versions and devices"]
    for key, value in mismatch.header.machine.items():
        assert ["harness", key, value] in environment.lines
    assert ["jax", "devices", "2 x jax"] in environment.lines
    assert ["time", "in all", "1.0 s"] in environment.lines
    assert mismatch.header.command in [code.text for code in root.one("header").all("code")]
    for name, node, _ in every_case(mismatch):
        assert any(code.text.startswith(mismatch.cases[name].command) for code in node.all("code"))


def not_compared(root: Node) -> str:
    main = [node for node in root.one("main").children if isinstance(node, Node)]
    (at,) = [i for i, node in enumerate(main) if node.attributes.get("id") == "not-compared"]
    return " ".join(main[at + 1].text.split())


def test_what_was_not_compared_is_said(mismatch, match):
    said = not_compared(tree(mismatch))
    assert "1 arrays fail as a whole, and so were not compared row by row" in said
    assert "not with each other: " in said
    assert "3 counts: counts (alone)" in said  # where JAX drops, its counts are not PyTorch's
    said = not_compared(tree(match))
    assert "fail as a whole" not in said
    assert "2 group: capacity (alone)" in said
    one_side = report_of(DROPS, backends=("torch",))
    assert "Only torch ran" in not_compared(tree(one_side))
    assert "each against the oracle in float64" in tree(one_side).one("header").text
    assert "against each other" not in tree(one_side).one("header").text


def test_a_stage_with_no_comparison_is_no_pass(match):
    checks = {name: [c for c in found if c.stage != "combine"] for name, found in match.checks.items()}
    report = msgspec.structs.replace(match, checks=checks)
    root = tree(report)
    assert root.one("table", id="cases-table").lines[0][2] == "✓" * 8 + "?"
    assert "torch: stage 9 combine has no row to compare." in not_compared(root)
    assert "jax: stage 9 combine has no row to compare." in not_compared(root)


def test_nothing_compared_is_no_match(match):
    checks = {name: [msgspec.structs.replace(c, rows=0) for c in found] for name, found in match.checks.items()}
    foot = msgspec.structs.replace(match.footer, verdict="nothing compared")
    root = tree(msgspec.structs.replace(match, checks=checks, footer=foot))
    assert root.one("h1").text == "✗ Nothing compared"
    assert {row[1] for row in root.one("table", id="cases-table").lines} == {"? nothing compared"}
    empty = msgspec.structs.replace(match, cases={}, checks={}, footer=foot)
    assert "never judged" in not_compared(tree(empty))


@pytest.mark.slow
def test_a_thousand_cases(mismatch):
    """All in the table, those that fail drawn first, and the page no larger than a browser can hold."""
    names = [f"case-{i:04d}" for i in range(1000)]
    cases, checks = {}, {}
    for i, name in enumerate(names):
        like = "drops" if i % 200 == 199 else NASTY
        cases[name], checks[name] = mismatch.cases[like], mismatch.checks[like]
    report = msgspec.structs.replace(mismatch, cases=cases, checks=checks)
    text = page(report)
    assert len(text) < 8e6
    root = Tree(text).root
    rows = root.one("table", id="cases-table").lines
    assert [row[0] for row in rows] == names
    assert sum(row[1] == "✗ fail" for row in rows) == 5
    drawn = [node.attributes["id"] for node in root.all("details", class_="case")]
    assert len(drawn) == DRAWN
    assert drawn[:5] == [f"case-{i}" for i in range(199, 1000, 200)]
    assert {a.attributes["href"][1:] for a in root.one("table", id="cases-table").all("a")} == set(drawn)
    assert f"For the other {1000 - DRAWN}, the table says" in " ".join(root.one("main").text.split())
    assert mismatch.cases[NASTY].command in rows[998][-1]


# ---- In a browser

PROBE = """<script>
const say = [], at = document.querySelector("#case-0-rows");
const shown = () => at.querySelectorAll("tbody tr:not([hidden])").length;
addEventListener("error", event => say.push(event.message));
addEventListener("load", () => {
  const all = shown(), input = document.querySelector("[data-table=case-0-rows]");
  const select = document.querySelector("select");
  input.value = "9 combine, token 1"; input.dispatchEvent(new Event("input"));
  const some = shown(); input.value = ""; input.dispatchEvent(new Event("input"));
  at.querySelectorAll("thead button")[7].click();
  const tokens = [...at.tBodies[0].rows].map(tr => tr.cells[7].textContent);
  select.value = 3; select.dispatchEvent(new Event("change"));
  const groups = [...document.getElementById(select.dataset.plots).children];
  const plots = groups.map(g => !g.hasAttribute("hidden")).indexOf(true);
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  parent.postMessage({ errors: say, all, some, again: shown(), tokens, plots,
    width: document.documentElement.scrollWidth, window: innerWidth }, "*");
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(mismatch, tmp_path: Path, width):
    """Nothing is wider than the window, with everything unfolded; filter, sort and selection do what they say."""
    said = said_by(page(mismatch), PROBE, width, tmp_path)
    assert said["errors"] == []
    assert said["width"] <= said["window"] <= width
    lines = section(tree(mismatch), mismatch, "drops").one("table", class_="rows").lines
    assert said["all"] == said["again"] == len(lines)
    assert said["some"] == sum(line[0] == "9 combine" and line[7] == "1" for line in lines) > 0
    assert [t for t in said["tokens"] if t != DASH] == sorted((line[7] for line in lines if line[7] != DASH), key=int)
    assert said["plots"] == 3
