"""`study` from the command line: its folder, its page, and what a browser shows of the runs it was made from."""

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from browser import said_by
from problems import gamma
from rich.console import Console
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.cli import study as cli
from parity.judge.records import header
from parity.run import supervisor
from parity.run.backend import MissingError
from parity.study import dispatch, learning
from parity.study.dispatch import Dispatch
from parity.study.engine import PARTS
from parity.study.learning import Run, curves
from parity.study.page import answers, page, plots, print_study
from parity.study.part import Asked, Study
from parity.study.routing import PER, PRIORITIES, places, zipf_routing
from parity.study.simulate import Simulated, cases, popularities
from parity.study.simulate import jobs as simulations
from parity.study.sweep import (
    FACTORS,
    NO_SCORES,
    Figures,
    Spread,
    drop_table,
    inputs_note,
    jobs,
    rounded_up,
    spread,
    sweep,
)

pytestmark = pytest.mark.usefixtures("warm")

SMALL = Case(tokens=16, width=8, hidden=8)


@pytest.fixture(scope="module")
def dispatches() -> list[Dispatch]:
    """Two skews at one factor with drops and one with padding, run by both."""
    return list(dispatch.run(dispatch.drawn((0.0, 2.0)), ("0.75", "1.5")))


@pytest.fixture(scope="module")
def study(dispatches) -> Study:
    figures = [f for skew in (0.0, 2.0) for f in sweep(zipf_routing(SMALL, skew, 3))]
    figures += [
        msgspec.structs.replace(f, routing="no scores", out_error=None, dx_error=None, dw_error=None)
        for f in sweep(zipf_routing(SMALL, 1.0, 3), priorities=("token", "choice"))
    ]
    simulated = popularities(Case("tiny", ranks=8, tokens=64, experts=16, top_k=2), ["pydoc"], 3)
    runs = [Run(layer, factor, seed, draw, [5.0 + 1e-7 * draw] * 20, [0.0] * 20, 4.0)
            for layer, factor, seed, draw in learning.plan(2)]  # fmt: skip
    return Study(header([]), [*dispatches, *figures, *simulated, *runs, learning.tracking(runs)])


def test_both_runs_say_where_every_row_is(dispatches):
    """Every kept assignment once at every stage, in the order of the stage; dropped are those that the study drops."""
    case = dispatch.CASE
    for d, routing in zip(dispatches, dispatch.drawn((0.0, 2.0)), strict=True):
        assert d.routing == routing.name
        assert d.expert_id == routing.expert_id[0].tolist()
        everything = {(p, t, k) for p, t, k in np.ndindex(case.ranks, case.tokens, case.top_k)}
        ways = [(d.dynamic, set())] + [(d.static[name], set(map(tuple, lost))) for name, lost in d.dropped.items()]
        for positions, lost in ways:
            for stage in ("grouped", "received", "expert_major"):
                rows = [row for rank in getattr(positions, stage) for row in rank if row is not None]
                assert len(rows) == len(set(rows))
                assert set(rows) == everything - lost
            for rank, rows in enumerate(positions.expert_major):
                keys = [(d.expert_id[p][t][k], p, t, k) for p, t, k in (row for row in rows if row is not None)]
                assert keys == sorted(keys)
                assert all(g // 2 == rank for g, *_ in keys)
        for name, lost in d.dropped.items():
            factor, priority = name.split()
            C = int(np.ceil(float(factor) * case.tokens * case.top_k / case.ranks))
            expected = np.argwhere(places(routing, "rank", priority)[0] >= C)
            assert sorted(map(tuple, lost)) == sorted(map(tuple, expected.tolist()))
    assert any(lost for d in dispatches for lost in d.dropped.values())
    assert (
        len({str(d.dropped["0.75 token"]) for d in dispatches} | {str(d.dropped["0.75 score"]) for d in dispatches}) > 2
    )


@pytest.mark.parametrize("name", ["received", "rank_major", "returned", "out"])
def test_a_row_that_is_nobodys_is_refused(name):
    (routing,) = dispatch.drawn((0.0,))
    arrays = dispatch.in_jax("1", "token", [routing])[0]
    by_rank = [{key: np.array(a[rank]) for key, a in arrays.items()} for rank in range(2)]
    capacity = replace(routing.case, capacity_factor="1").capacity
    dispatch.positions(routing, by_rank, capacity)
    by_rank[1][name].reshape(-1, dispatch.CASE.width)[0] += 1
    with pytest.raises(KeyError if name == "received" else ValueError):
        dispatch.positions(routing, by_rank, capacity)


def script(html: str, name: str):
    return json.loads(re.search(f'id="{name}">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]


def loads_nothing(html: str) -> bool:
    outside = re.search(r"""(?:src|href)=["'](?!data:|#)|url\(|@import|https?://""", html)
    return "default-src 'none'" in html and not outside


def test_the_page_loads_nothing_and_holds_what_was_measured(study):
    html = page(study)
    assert loads_nothing(html)
    assert script(html, "dispatch-data") == json.loads(msgspec.json.encode(study.of(Dispatch)))
    groups = script(html, "costs-data")["groups"]
    assert [f for group in groups for f in group["figures"]] == json.loads(msgspec.json.encode(study.of(Figures)))
    assert "bytes wasted" not in html  # the share of padding once more
    assert "prefers-reduced-motion" in html
    assert "prefers-color-scheme: dark" in html
    for s in study.of(Simulated):
        assert f">{s.busiest.median:.2f}</td>" in html
    found = plots(study)
    assert len(found) == 10
    assert "always at a capacity factor of 1" in found["positions.svg"].caption
    for svg, caption in found.values():
        assert base64.b64encode(svg.encode()).decode() in html
        assert html.count(caption.replace("'", "&#39;")) == 2  # as a caption, and for those who do not see
        assert "prefers-color-scheme:dark" in svg
        assert not re.search("#(010203|fefdfe|807f81)", svg)


def test_ticks_are_plain_numbers(study):
    """Powers are drawn as letters of their own: a 10 and a small exponent."""
    for name in ("scale-even.svg", "scale-fitted.svg"):
        words = re.findall(r"<!-- (.*?) -->", plots(study)[name].svg)
        assert "8" in words
        assert not [word for word in words if "math" in word or "^" in word]


# ---- The answer


def measured(steps: int, needed: float, dropped: dict[str, float], **more) -> list[Figures]:
    """All figures of one routing, as a sweep would give them."""
    one = next(iter(sweep(zipf_routing(SMALL, 0.0, 1), ("1",), ("rank",), ("token",))))
    return [
        msgspec.structs.replace(
            one, routing="mine", steps=steps, factor=factor, per=per, priority=priority,
            dropped=dropped.get(factor, 0.0), needed=Spread(needed / 2, needed, needed + 0.5), **more,
        )
        for per in PER for priority in PRIORITIES for factor in FACTORS
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "needed", "words"),
    [
        (100, 1.302, "a capacity factor of 1.31 with a bin per rank drops nothing in 99% of steps; 1.25 drops 0.4%."),
        (8, 1.6, "2.10 with a bin per rank drops nothing in any of its 8 steps; 1.25 drops 0.4%."),
        (1, 1.6, "2.10 with a bin per rank drops nothing in its one step (one step: no percentile); 1.25 drops 0.4%."),
        (100, 1.0, "a capacity factor of 1.00 with a bin per rank drops nothing in 99% of steps; 1.25 drops nothing. "),
        (
            100,
            1.2,
            "1.20 with a bin per rank drops nothing in 99% of steps; 1.25 drops 0.4% and 1 drops 10.0%. With a ",
        ),
        (100, 1.7, "With a bin per expert it takes 1.70; 1.5 drops 0.2% and 1.25 drops 0.4%."),
    ],
)
def test_the_answer_stands_on_top(steps, needed, words):
    dropped = {"0.5": 0.5, "0.75": 0.2, "1": 0.1, "1.25": 0.004} if needed > 1 else {}
    dropped |= {"1.5": 0.002} if needed == 1.7 else {}
    found = Study(header([]), measured(steps, needed, dropped))
    (sentence,) = answers(found)
    assert words in sentence
    most = "Both factors are the most that any of 8 steps needs, which is no safety margin."
    assert (most in sentence) == (steps == 8)
    assert ("Both factors are of one step, which is no safety margin." in sentence) == (steps == 1)
    assert "--tokens" not in sentence
    assert "--ranks" not in sentence
    assert sentence in page(found)
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO())
        print_study(console, found)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert " ".join(said.split()).startswith(sentence)
        assert ("one step: no percentile" in said.split("The capacity")[1]) == (steps == 1)


def test_the_answer_says_which_ranks_and_tokens_were_assumed():
    for ranks, tokens, words in (
        (True, False, "--ranks 4: give what your training step has, as more ranks need"),
        (False, True, "--tokens 16: give what your training step has, as fewer tokens on a rank need"),
        (True, True, "--ranks 4 and --tokens 16: give what your training step has, as more ranks and fewer tokens on a "
                     "rank need"),
    ):  # fmt: skip
        found = Study(header([]), measured(100, 1.3, {}, ranks_by_default=ranks, tokens_by_default=tokens))
        (sentence,) = answers(found)
        assert sentence.endswith(f" This assumes {words} a larger factor.")
    assert "assumes <code>--ranks</code> 4 and <code>--tokens</code> 16" in page(found)  # each in one piece


def test_the_answer_names_the_capacity_that_was_asked_for():
    one = measured(100, 1.3, {})
    own = msgspec.structs.replace(one[0], per="expert", factor="1.25", dropped=0.065, own=True)
    found = Study(header([]), [*one, own])
    assert " Your capacity, a factor of 1.25 with a bin per expert, drops 6.5%." in answers(found)[0]
    assert (table := drop_table(found))
    assert {"drops at 1.25", "pads at 1.25", "enough in", "yours, 1.25 per expert: drops / pads"} <= {*table.columns}


def test_errors_stand_beside_what_was_drawn_for_them():
    found = Study(header([]), measured(8, 1.6, {}, brought=True, drawn="expert weights"))
    said = "Errors are of the first step: mine has expert weights drawn at random."
    assert (table := drop_table(found))
    assert said in table.title
    assert script(page(found), "costs-data")["groups"][0]["note"] == said
    assert [said in caption for _, caption in plots(found).values()] == [False, False, False, True, True]
    own = measured(8, 1.6, {}, brought=True, drawn="")
    assert inputs_note([own]) == "Errors are of the first step: mine has its own tokens and weights."
    drawn = measured(8, 1.6, {}, drawn="tokens and weights")
    assert inputs_note([own, drawn]).endswith("own tokens and weights; zipf has tokens and weights drawn at random.")


def test_what_is_enough_is_enough_in_that_share_of_steps():
    values = np.arange(1.0, 151.0)
    assert (values <= spread(values).p99).mean() >= 0.99
    assert spread(np.array([3.0])) == Spread(3.0, 3.0, 3.0)


def test_nothing_is_cut_in_a_terminal(study):
    """At every width all figures of all tables, whole, and every name, perhaps on several lines."""
    for width in (80, 120, 200):
        console = Console(width=width, file=io.StringIO())
        print_study(console, study)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, said.splitlines())) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in said
        for part in PARTS:
            if found := part.table(study):
                cells = Counter(cell for row in found.rows for cell in row[found.left :] if cell)
                assert all(said.count(cell) >= n for cell, n in cells.items())
                assert all(word in said for column in found.columns for word in column.split())


# ---- The dispatch alone on a page


def test_more_skew_drops_more():
    """The first routing is even, and with each further one the fullest bin is fuller and more is dropped."""
    dropped, fullest = [], []
    for routing in dispatch.drawn():
        C = routing.case.tokens * routing.case.top_k // routing.case.ranks
        place = places(routing, "rank", "token")
        dropped.append(int((place >= C).sum()))
        fullest.append(int(place.max()) + 1)
    even = dispatch.drawn()[0]
    rows = [np.bincount(ids.reshape(-1), minlength=even.case.experts).tolist() for ids in even.expert_id[0]]
    assert rows == [[3, 3, 3, 3]] * 2
    assert dropped[0] == 0
    assert dropped == sorted(set(dropped))
    assert fullest == sorted(set(fullest))


@pytest.mark.parametrize(("way", "package"), [("dynamic", "torch_impl"), ("static", "jax_impl")])
def test_arrays_are_named_as_in_the_code(way, package):
    names = re.search(rf'NAMES = .*{way}: \[(".*?")\]', dispatch.page([]))
    assert names
    code = [
        (Path(__file__).parents[1] / package / f"{name}.py").read_text()
        for name in ("layer", "routing", "grouping", "layout")
    ]
    for name in re.findall(r"\w+", names[1]):
        assert re.search(rf"^    {name}: \w+\[", "\n".join(code), re.MULTILINE)


def test_the_committed_page_is_what_the_command_writes(dispatches):
    """Its data are those of the runs, as far as those are repeated here, and the page is that of its data."""
    committed = (Path(__file__).parents[1] / "docs" / "dispatch.html").read_text()
    found = msgspec.convert(script(committed, "dispatch-data"), list[Dispatch])
    assert dispatch.page(found) == committed
    assert [d.routing for d in found] == [routing.name for routing in dispatch.drawn()]
    assert {tuple(name.split()) for name in found[0].static} == {
        (factor, priority) for factor in dispatch.FACTORS for priority in PRIORITIES
    }
    for d in dispatches:
        same = next(one for one in found if one.routing == d.routing)
        assert (same.expert_id, same.score, same.dynamic) == (d.expert_id, d.score, d.dynamic)
        for name in d.static:
            assert (same.static[name], same.dropped[name]) == (d.static[name], d.dropped[name])
    assert loads_nothing(committed)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "T"), [(16, 2, 40, 6), (5, 4, 40, 4), (64, 8, 3, 1), (4, 1, 1, 0)]
)
def test_a_recording_is_dispatched_as_far_as_can_be_looked_at(tmp_path, experts, top_k, tokens, T):
    path = recorded_file(tmp_path / "mine.safetensors", experts, top_k, tokens)
    found = dispatch.recorded(str(path))
    assert [routing.expert_id.shape for routing in found] == [(1, 2, T, top_k)] * bool(T)
    for routing in found:
        assert routing.name == "mine"
        assert routing.case.experts % 2 == 0
        arrays = dispatch.in_jax("1", "token", [routing])[0]
        by_rank = [{key: np.array(a[rank]) for key, a in arrays.items()} for rank in range(2)]
        rows = dispatch.positions(routing, by_rank, replace(routing.case, capacity_factor="1").capacity)
        assert sum(row is not None for rank in rows.grouped for row in rank) + arrays["dropped"].sum() == 2 * T * top_k


def test_curves_leave_out_rounding(study):
    runs = study.of(Run)
    assert sum(map(len, curves(runs).values())) == len(runs) - learning.DRAWS


def test_tracking_says_where_it_ends():
    runs = [
        Run("torch", "none", 0, 0, [1.0] * 30, [0.0] * 30, None),
        Run("jax", "none", 0, 0, [1.0] * 30, [0.0] * 30, None),
    ]
    runs += [Run("torch", "none", 0, draw, [1.0] * 5 + [1.0 + 1e-5] * 25, [0.0] * 30, None) for draw in (1, 2)]
    assert learning.tracking(runs).steps == 30
    runs[1].loss[12] = 1.0 + 3.9e-5
    assert learning.tracking(runs).steps == 30
    runs[1].loss[12] = 1.0 + 4.1e-5
    found = learning.tracking(runs)
    assert found.steps == 12
    assert found.worst > 1
    runs[1].loss[3] = 1.0 + 3e-5  # before rounding shows: the largest so far counts, not one to come
    assert learning.tracking(runs).steps == 3


def test_two_frameworks_track_each_other_for_a_while():
    """Twelve steps; `study --learn` takes 200 and more."""
    torch_loss = learning.train_torch("torch", "none", 0, 0, 12, 1)
    jax_loss = learning.train_jax(0, 12, 1)
    # A loss is rounded once, and the weights it comes from in each step before: 32 roundings, where 3 were seen.
    np.testing.assert_allclose(jax_loss.loss, torch_loss.loss, rtol=gamma(32, "float32"))
    dropping = learning.train_torch("token", "1", 0, 0, 3, 1)
    assert min(dropping.dropped) > 0
    assert max(torch_loss.dropped + jax_loss.dropped) == 0


# ---- In a browser

PROBE = """<script>
{
const said = [], errors = [], $ = name => document.getElementById("dispatch-" + name);
addEventListener("error", e => errors.push(e.message));
const set = (control, value) => { $(control).value = value; $(control).dispatchEvent(new Event("input")); };
let under = 0, covered = 0;  // labels of arrows that rows cross beneath, and above
set("step", 2); set("step", 3);
for (let time = 0; time <= 900; time += 30) {
  for (const moving of document.getAnimations()) { moving.pause(); moving.currentTime = time; }
  for (const label of document.querySelectorAll("#dispatch .wire span")) {
    const is = label.getBoundingClientRect(), x = is.left + is.width / 2, y = is.top + is.height / 2, found = document.elementsFromPoint(x, y);
    if (found.some(c => c.closest(".chip"))) found[0].closest(".chip") ? covered++ : under++;
  }
}
matchMedia = () => ({matches: true});  // no chip is on its way while it is looked at
const n = +$("routing").max + 1, factors = +$("factor").max + 1;
for (let s = 0; s < n; s++) for (let f = 0; f < factors; f++) for (const priority of ["token", "choice", "score"])
  for (let step = 0; step < 9; step++) {
    $("routing").value = s; $("factor").value = f; $("priority").value = priority; set("step", step);
    for (const way of ["dynamic", "static"]) {
      const lanes = [...$(way).querySelectorAll(".rank")].map(rank => [...rank.querySelectorAll(".chip, .slot")].map(c => c.dataset.row ?? null));
      said.push({s, factor: $("factor-said").textContent, priority, step, way, lanes, words: $(way + "-said").textContent,
        gone: [...$(way).querySelectorAll(".chip.gone")].map(c => c.dataset.row), counts: [...$(way).querySelectorAll(".wire tr")].map(line => [...line.children].map((cell, i) => i ? cell.textContent : "")), bins: [...$(way).querySelectorAll(".bin > span")].map(b => b.textContent),
        wire: [...$(way).querySelectorAll(".wire > div")].map(w => w.textContent.trim()), sums: [...$(way).querySelectorAll(".sum")].map(c => c.textContent),
        one: [...$(way).querySelectorAll(".sum")].every(c => c.offsetHeight < 2 * c.children[1].offsetHeight), arrays: [...$(way).querySelectorAll(".rank code")].map(c => c.textContent),
        strips: [...$(way).querySelectorAll(".side")].map(side => [...side.querySelectorAll(".lost .chip")].map(c => c.dataset.row)),
        title: $("step-said").textContent, at: $("at").textContent, stage: $("stage").textContent,
        wide: document.documentElement.scrollWidth > innerWidth, inside: [...$(way).querySelectorAll(".chip, .slot")].every(c => c.scrollWidth <= c.offsetWidth && c.getBoundingClientRect().right <= innerWidth)});
    }
  }
const keys = [];
set("step", 0);
const root = document.getElementById("dispatch"), press = (key, target = root) => { target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true})); keys.push(+$("step").value); };
for (const key of ["ArrowRight", " ", "PageDown", "ArrowLeft", "PageUp", "ArrowLeft", "ArrowLeft", "x"]) press(key);
press("ArrowRight", $("factor"));
press(" ", $("next"));
const after = [];
for (const control of ["factor", "routing", "step", "back", "priority"]) {
  set("step", 4);
  $(control).dispatchEvent(new PointerEvent("pointerdown", {bubbles: true})); $(control).focus();
  dispatchEvent(new PointerEvent("pointerup")); if (control === "back") $("back").click();
  const focus = document.activeElement, steps = [+$("step").value];
  for (const key of ["PageDown", " ", "ArrowRight", "PageUp", "ArrowLeft"]) { press(key, document.activeElement); steps.push(keys.pop()); }
  after.push([control, focus === root, ...steps]);
}
press("Tab"); keys.pop(); $("factor").focus();
press("ArrowRight", $("factor")); after.push(["Tab", document.activeElement === $("factor"), keys.pop()]);
$("ask").click(); after.push(["help", $("help").open]); press("h"); after.push(["help", $("help").open]); press("h"); keys.length -= 2;
press("PageDown"); after.push(["help", $("help").open, keys.pop()]);
const settings = [];
for (const hash of ["step=4&factor=1.5&routing=zipf+2&priority=score", "step=10&factor=7&routing=zzz&priority=zzz", "step=zzz"]) {
  location.hash = hash; dispatchEvent(new Event("hashchange")); settings.push(["step", "factor", "routing", "priority"].map(name => $(name).value)); }
set("step", 0);
let asked = 0;
root.requestFullscreen = () => { asked++; return Promise.resolve(); };
press("f"); $("full").click();
$("next").click(); keys.push(+$("step").value); $("back").click(); keys.push(+$("step").value);
const controls = [...document.querySelectorAll("input, select, button")], unnamed = controls.filter(c => !(c.labels?.length || c.textContent.trim())).length;
const routing = document.getElementById("cost-routing"), costs = [];
for (let i = 0; routing && i <= routing.max; i++) { routing.value = i; routing.dispatchEvent(new Event("input"));
  const menu = document.getElementById("cost-priority"), open = [...menu.options].filter(o => !o.disabled && !o.hidden).map(o => o.value);
  costs.push([document.getElementById("cost-said").textContent, document.getElementById("costs-table").tBodies[0].rows.length, open, menu.value]);
  menu.value = "score"; menu.dispatchEvent(new Event("input")); }
const font = parseFloat(getComputedStyle(document.querySelector("#dispatch .chip")).fontSize);
const cut = [...document.querySelectorAll("td, th, p, h1, h2, h3, label, button, figure, img")].filter(c => c.getBoundingClientRect().right > innerWidth + 1).length;
parent.postMessage({under, covered, after, settings, said, errors, unnamed, keys, asked, costs, font, cut, width: document.documentElement.scrollWidth, window: innerWidth, text: $("text").textContent}, "*");
}
</script>"""  # noqa: E501

HELD = (None, "grouped", "grouped", "received", "expert_major", "expert_major", "received", "grouped", None)
STAGES = ("route", "group_by_expert", "exchange_counts", "send_tokens", "to_expert_major", "apply_experts",
          "to_rank_major", "return_tokens", "combine")  # fmt: skip


def arrays_of(way: str, step: int, C: int, R: int) -> str:
    """The arrays of a rank after a step, with their shapes."""
    dynamic = ("expert_id_TK [6, 2], score_TK [6, 2]", "x_ND [12, D]", "x_ND [12, D], counts_Pe [2, 2]",
               f"received_RD [{R}, D]", f"x_RD [{R}, D]", f"y_RD [{R}, D]", f"rank_major_RD [{R}, D]",
               "returned_ND [12, D]", "out_TD [6, D]")  # fmt: skip
    static = (dynamic[0], f"x_BCD [2, {C}, D]", f"x_BCD [2, {C}, D], counts_Pe [2, 2]", f"received_BCD [2, {C}, D]",
              f"x_SD [{2 * C}, D]", f"y_SD [{2 * C}, D]", f"rank_major_BCD [2, {C}, D]", f"returned_BCD [2, {C}, D]",
              dynamic[8])  # fmt: skip
    return (dynamic if way == "dynamic" else static)[step]


def sum_of(d: Dispatch, p: int, t: int, lost: set) -> str:
    """A token's output as a sum of its experts' results: those kept, then those dropped."""
    rows = [(p, t, k) for k in range(2)]
    term = {row: f"{d.score[p][t][row[2]]:.2f}·e{d.expert_id[p][t][row[2]]}({'AB'[p]}{t})".lstrip("0") for row in rows}
    kept = "+".join(term[row] for row in rows if row not in lost)
    return f"{'AB'[p]}{t} =" + (kept + "".join(term[row] for row in rows if row in lost) if kept else "0: both dropped")


@pytest.mark.slow  # not for its time: not every machine has a browser
@pytest.mark.parametrize(("width", "alone"), [(390, False), (1110, False), (1270, False), (390, True), (1920, True)])
def test_in_a_browser(study, tmp_path: Path, width, alone):
    """At every setting and step, there and back, the chips stand in the run's order, dropped ones struck out."""
    dispatches = study.of(Dispatch)
    html, height = dispatch.page(dispatches) if alone else page(study), 1080 if width == 1920 else 900
    found = said_by(html, PROBE, width, tmp_path, height)
    assert found["errors"] == []
    assert found["unnamed"] == found["cut"] == 0
    assert found["width"] <= found["window"] <= width
    assert found["font"] >= (24 if width == 1920 else 14)
    assert found["keys"] == [1, 2, 3, 2, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert found["after"] == [
        *([name, True, 4, 5, 6, 7, 6, 5] for name in ("factor", "routing", "step")),
        ["back", True, 3, 4, 5, 6, 5, 4],
        ["priority", False, 4, 5, 6, 7, 6, 5],  # its menu would close
        ["Tab", True, 5], ["help", True], ["help", False], ["help", False, 6],
    ]  # fmt: skip
    if alone:
        assert found["settings"] == [["3", "1", "1", "score"], *[["0", "0", "1", "token"]] * 2]
    assert found["covered"] == 0
    assert found["under"] or width != 1920
    assert found["asked"] == 2
    assert len(found["said"]) == 2 * 2 * 3 * 9 * 2
    for seen in found["said"]:
        d, step, way = dispatches[seen["s"]], seen["step"], seen["way"]
        key, name = HELD[step], f"{seen['factor']} {seen['priority']}"
        positions = d.dynamic if way == "dynamic" else d.static[name]
        lost = [] if way == "dynamic" else d.dropped[name]
        lanes = [[(p, t, k) for t in range(6) for k in range(2)] for p in range(2)]
        lanes = getattr(positions, key) if key else lanes
        C, R = len(d.static[name].received[0]) // 2, [len(rows) for rows in d.dynamic.received]
        assert seen["title"].startswith(f"{step + 1}. ")
        assert seen["at"] == f"{step + 1} of 9"
        assert seen["stage"] == f"stage {step + 1}, {STAGES[step]}"
        assert seen["arrays"] == [arrays_of(way, step, C, rows) for rows in R]
        assert seen["inside"]
        assert not seen["wide"]
        if step == 8:
            gone = set(map(tuple, lost))
            assert seen["sums"] == [sum_of(d, p, t, gone) for p in range(2) for t in range(6)]
            assert seen["one"]
            partly = [row for row in gone if (*row[:2], 1 - row[2]) not in gone]
            assert sorted(seen["gone"]) == sorted(".".join(map(str, row)) for row in partly)
            assert ("not renormalised" in seen["words"]) == (way == "dynamic")
            continue
        assert seen["lanes"] == [[row and ".".join(map(str, row)) for row in lane] for lane in lanes]
        assert sorted(seen["gone"]) == sorted(".".join(map(str, row)) for row in lost if step)
        in_order = sorted(lost, key=lambda row: (d.expert_id[row[0]][row[1]][row[2]], row))
        assert seen["strips"] == [[".".join(map(str, row)) for row in in_order if step and row[0] == p] for p in (0, 1)]
        padding = [sum(row is None for row in lane) for lane in lanes]
        if way == "static":
            words = f"B·C = 2·{C} = {2 * C} rows on A ({padding[0]} padding) and on B ({padding[1]} padding); "
            words += f"{len(lost)} of 24 dropped."
        else:
            words = "N = 12 rows" if step in (1, 7) else f"R = {R[0]} rows on A, {R[1]} on B"
        assert seen["words"].startswith(words if step else "24 assignments")
        if key == "received" or key == "grouped":
            assert len(seen["bins"]) == 4
            assert all(("bin" in bin) == (way == "static") for bin in seen["bins"])
            words = {1: "for", 2: "for", 3: "from", 6: "back to", 7: "back from"}[step]
            room = "" if way == "dynamic" else f", room {C}"
            assert [bin.removeprefix("bin ") for bin in seen["bins"]] == [f"{words} {q}{room}" for q in "ABAB"]
        # [source][receiver]
        sent = [[sum(row is not None and row[0] == p for row in rows) for rows in positions.received] for p in range(2)]
        if step in (3, 7):
            a_to_b, b_to_a = (sent[0][1], sent[1][0]) if step == 3 else (sent[1][0], sent[0][1])
            assert seen["wire"][0].startswith(f"A to B: {a_to_b} row")
            assert seen["wire"][1].startswith(f"B to A: {b_to_a} row")
        elif step == 2:
            last = R if way == "dynamic" else [2 * C - sent[0][q] - sent[1][q] for q in range(2)]
            assert seen["counts"] == [["", "A", "B"], *(["", *map(str, row)] for row in (*sent, last))]
            waits = "the host waits here" if way == "dynamic" else "only says which rows are padding; nothing waits"
            assert seen["wire"] == [waits]
        else:
            assert seen["wire"] == []
    assert "rank A, " in found["text"]
    if not alone:
        assert [rows for _, rows, *_ in found["costs"]] == [2] * 3
        words = (
            r"With a bin per rank, a factor of [\d.]+ drops nothing in any of its 3 steps; 1.25 drops [\d.]+%. With a "
        )
        assert all(re.match(f"{words}bin per expert it takes ", said) for said, *_ in found["costs"])
        every = list(PRIORITIES)
        assert [menu for _, _, *menu in found["costs"]] == [[every, "token"], [every, "score"], [every[:2], "token"]]


EVERY_SETTING = """<script>
{
const $ = name => document.getElementById("dispatch-" + name), high = [], sizes = [];
matchMedia = () => ({matches: true});
for (let s = 0; s <= $("routing").max; s++) for (let f = 0; f <= $("factor").max; f++) for (const priority of ["token", "choice", "score"])
  for (let step = 0; step < 9; step++) {
    $("routing").value = s; $("factor").value = f; $("priority").value = priority; $("step").value = step; $("step").dispatchEvent(new Event("input"));
    high.push(document.documentElement.scrollHeight); sizes.push(parseFloat(getComputedStyle(document.querySelector("#dispatch .rows, #dispatch .sums")).fontSize));
  }
parent.postMessage({high, sizes, legend: document.querySelectorAll(".legend > *").length}, "*");
}
</script>"""  # noqa: E501


@pytest.mark.slow  # not for its time: not every machine has a browser
def test_no_step_is_higher_than_a_projector(tmp_path):
    """The committed page in every setting, with letters as large as there is room for."""
    committed = (Path(__file__).parents[1] / "docs" / "dispatch.html").read_text()
    found = said_by(committed, EVERY_SETTING, 1920, tmp_path, height=1080)
    assert len(found["high"]) == 5 * 5 * 3 * 9
    assert set(found["high"]) == {1080}
    assert min(found["sizes"]) >= 24
    assert max(found["sizes"]) >= 30
    assert found["legend"] == 4


# ---- From the command line


def study_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "parity", "study", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def test_from_the_command_line(tmp_path):
    run = study_command("zipf", "--model", "mixtral-8x7b", "--steps", "3", "--no-dispatch", "--no-json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("For zipf (4 ranks of 16 tokens, 2 of 8 experts each), a capacity factor of ")
    assert "Simulated" in run.stdout
    names = {path.name for path in (tmp_path / "study").iterdir()}
    pictures = ("drops-rank", "drops-expert", "positions", "error-of-output", "error-of-gradient", "scale-even",
                "scale-fitted")  # fmt: skip
    assert names == {"index.html", "study.jsonl", *(f"{name}.svg" for name in pictures)}
    lines = [json.loads(line) for line in (tmp_path / "study/study.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "header"
    assert [line["kind"] for line in lines].count("figures") == len(FACTORS) * 6
    assert "nan" not in run.stdout


def recorded_file(path: Path, experts: int, top_k: int, tokens: int) -> Path:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    save_file({"expert_id": ids}, path, metadata={"n_experts": str(experts)})
    return path


def test_ones_own_recording_is_in_place_of_drawn_routing(tmp_path):
    """On the page, in the table, in every plot; without either framework, as nothing here needs one."""
    recorded_file(tmp_path / "mine.safetensors", 6, 2, 64)
    for name in ("torch", "jax"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('it is not to be needed')")
    run = study_command(
        "--recording", "mine.safetensors", "--ranks", "2", "--tokens", "32", "--quick", "--model", "deepseek-v3",
        "--no-json", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("For mine (2 ranks of 32 tokens, 2 of 6 experts each), a capacity factor of ")
    assert "(one step: no percentile)" in run.stdout
    lines = [json.loads(line) for line in (tmp_path / "study/study.jsonl").read_text().splitlines()]
    assert {line["routing"] for line in lines if line["kind"] == "figures"} == {"mine"}
    assert [line["ranks"] for line in lines if line["kind"] == "simulated" and line["model"] == "mine"] == [2]
    groups = script((tmp_path / "study/index.html").read_text(), "costs-data")["groups"]
    assert [group["name"] for group in groups] == ["mine: 2 x 32, 2 of 6"]
    for name in ("drops-rank", "drops-expert", "positions", "scale-fitted"):
        assert "mine" in (tmp_path / f"study/{name}.svg").read_text()
    assert not (tmp_path / "study/scale-even.svg").exists()


def test_a_recording_that_holds_expert_ids_only(tmp_path):
    """No model that was not asked for, and no figure that would come from a width or scores that nobody recorded."""
    recorded_file(tmp_path / "mine.safetensors", 6, 2, 64)
    run = study_command("--recording", "mine.safetensors", "--no-dispatch", "--no-json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert "For mine (2 ranks of 16 tokens" in said
    assert "This assumes --ranks 2 and --tokens 16: give what your training step has" in said
    for word in ("zipf", " ms", " MB", "width", "output off", "drawn"):
        assert word not in said
    lines = [json.loads(line) for line in (tmp_path / "study/study.jsonl").read_text().splitlines()]
    simulated = [line for line in lines if line["kind"] == "simulated"]
    assert [line["model"] for line in simulated] == ["mine"]
    for name in ("width", "hidden", "nvlink_bytes", "network_bytes", "dynamic_seconds"):
        assert simulated[0][name] is None
    figures = [line for line in lines if line["kind"] == "figures"]
    for name in ("width", "useful_bytes", "wasted_bytes", "dynamic_bytes", "memory", "dynamic_memory", "out_error"):
        assert {line[name] for line in figures} == {None}
    assert {line["priority"] for line in figures} == {"token", "choice"}
    assert script((tmp_path / "study/index.html").read_text(), "costs-data")["groups"][0]["note"] == NO_SCORES
    assert not list((tmp_path / "study").glob("error-of-*"))


def hot_file(path: Path) -> Path:
    """2 of 16 experts a token; one of the two is one of 0 to 3, which are all on the first of four ranks."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, 4, 1000), rng.integers(4, 16, 1000)], axis=1).astype(np.int32)
    save_file({"expert_id": ids}, path, metadata={"n_experts": "16"})
    return path


def test_the_answer_says_what_a_recording_rests_on(tmp_path):
    """Which tokens were used, where its experts are, and what more steps would need, with the figures behind it."""
    hot_file(tmp_path / "hot.safetensors")
    run = study_command(
        "--recording", "hot.safetensors", "--ranks", "4", "--tokens", "60", "--quick", "--no-json", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    lines = [json.loads(line) for line in (tmp_path / "study/study.jsonl").read_text().splitlines()]
    (facts,) = [line for line in lines if line["kind"] == "recorded"]
    (more,) = [line for line in lines if line["kind"] == "simulated"]
    experts = facts["busiest_experts"]
    assert sorted(experts) == [0, 1, 2, 3]
    assert (more["model"], more["ranks"], more["tokens"], more["steps"]) == ("hot", 4, 60, 200)
    sentences = (
        "Of its 1,000 tokens the first 960 fill 4 whole steps; the last 40 are left out.",
        f"Rank 0 gets 2.00 times the mean, by experts {', '.join(map(str, experts))}. With experts placed evenly over "
        f"the ranks, a rank bin would need {rounded_up(facts['needed_placed']['worst'])}.",
        f"Over 200 steps simulated with the loads of hot, 99% drop nothing at {rounded_up(more['needed_rank']['p99'])} "
        f"with a bin per rank and {rounded_up(more['needed_expert']['p99'])} with a bin per expert.",
    )
    html = (tmp_path / "study/index.html").read_text()
    for sentence in sentences:
        assert sentence in said
        assert sentence in html
    assert "This assumes" not in said


def test_a_placement_that_makes_no_difference_is_not_mentioned(tmp_path):
    path = hot_file(tmp_path / "hot.safetensors")
    for ranks, words in ((2, True), (1, False)):
        asked = Asked(recordings=(str(path),), ranks=ranks, tokens=1000 // ranks)
        (sentence,) = answers(Study(header([]), [record for job in jobs(asked) for record in job()]))
        assert ("placed evenly" in sentence) == words
        assert "left out" not in sentence


def test_a_recording_is_simulated_on_the_ranks_and_tokens_that_were_swept(tmp_path):
    """Those asked for, and those assumed."""
    path = hot_file(tmp_path / "hot.safetensors")
    for ranks, tokens in ((4, 60), (None, None), (16, None), (None, 50)):
        asked = Asked(recordings=(str(path),), models=(), ranks=ranks, tokens=tokens, steps=2)
        swept, simulated = ([record for job in of(asked) for record in job()] for of in (jobs, simulations))
        assert (swept[0].ranks, swept[0].tokens) in {(s.ranks, s.tokens) for s in simulated}
        assert {s.tokens for s in simulated} == {swept[0].tokens}


def test_a_priority_by_scores_that_are_not_known_is_not_claimed(tmp_path):
    asked = Asked(
        recordings=(str(hot_file(tmp_path / "hot.safetensors")),), ranks=4, tokens=60,
        capacity=Case(capacity_factor="1.25", capacity_per="expert", priority="score"),
    )  # fmt: skip
    (own,) = [f for job in jobs(asked) for f in job() if isinstance(f, Figures) and f.own]
    assert (own.factor, own.per, own.priority) == ("1.25", "expert", "token")


def test_help_names_what_may_be_given_and_one_time(tmp_path):
    run = study_command("--help", cwd=tmp_path)
    assert "[PRESET ...]" in run.stdout
    assert "(default: )" not in run.stdout
    assert "STR" not in run.stdout
    assert re.findall(r"\d+ s\b", run.stdout) == ["6 s", "6 s"]  # --quick, twice


def test_models_are_simulated_where_they_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "run_study", lambda wanted, _: asked.append(wanted) or Study(header([])))
    command = cli.Command(out=tmp_path / "study", json=True, quick=True)
    recorded = replace(command, recording=("pydoc",))
    for given in (command, replace(command, presets=("zipf",)), recorded, replace(recorded, model=("glm-4.5",))):
        assert cli.run(given) == 0
    assert [wanted.models for wanted in asked] == [tuple(MODELS), (), (), ("glm-4.5",)]


def test_a_framework_that_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(supervisor, "find_spec", lambda name: None if name == "jax" else object())
    monkeypatch.setattr(cli, "run_study", lambda wanted, _: asked.append(wanted) or Study(header([])))
    for needs in ({"learn": 1, "dispatch": False}, {"learn": 1, "quick": True}, {}):
        with pytest.raises(MissingError, match="jax"):
            cli.run(cli.Command(out=tmp_path / "none", **needs))
    assert not asked
    assert not (tmp_path / "none").exists()
    assert cli.run(cli.Command(out=tmp_path / "study", json=True, quick=True)) == 0
    assert not asked[0].dispatch


def test_ranks_and_tokens_are_those_of_every_part():
    asked = Asked(ranks=6, tokens=24, quick=True, models=("deepseek-v3", "qwen3-next"), dispatch=False)
    made = [job.args[1]() for job in jobs(asked)]  # type: ignore[attr-defined]
    assert [r.case.ranks for r in made] == [6] * len(made)
    assert {(r.case.tokens, r.case.experts) for r in made} == {(24, 18)}
    assert cases(24, 7) == []
    assert {(case.ranks, case.tokens) for case in cases(24, 16)} == {(16, 24)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "--ranks is 0: it must be at least 1"),
        (["--recording", "pydoc", "--ranks", "3"], "the 16 experts of --recording pydoc cannot be shared evenly"),
        (["--recording", "pydoc", "--tokens", "200"], "pydoc has 512 tokens, and a step of 4 ranks with 200 tokens"),
        (["--recording", "pydoc", "pydoc"], "two recordings are called pydoc"),
        (["zipf", "--ranks", "2"], "presets have ranks and tokens of their own"),
        (["nothing"], "no preset is called nothing"),
        (["--model", "nothing"], "no model is called nothing"),
        (["--steps", "0"], "--steps is 0: it must be at least 1"),
        (["--learn", "1", "--learn-steps", "5"], "at least 0 seeds and 20 steps"),
        (["--recording", "nowhere.safetensors"], "cannot read nowhere.safetensors"),
        (["--case", "nowhere.json"], "--case nowhere.json: cannot read it (No such file or directory)"),
    ],
)
def test_wrong_usage(tmp_path, arguments, words):
    run = study_command(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert words in " ".join(run.stderr.split())
    assert not (tmp_path / "study").exists()
