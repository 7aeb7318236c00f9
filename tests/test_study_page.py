"""`study` from the command line: its folder, its page, and what a browser shows of the runs it was made from."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from browser import said_by
from problems import gamma

from parity.cases.case import Case
from parity.judge.records import header
from parity.study import dispatch, learning
from parity.study.dispatch import Dispatch
from parity.study.learning import Run, curves
from parity.study.page import page, plots
from parity.study.part import Study
from parity.study.routing import places, zipf_routing
from parity.study.simulate import Simulated, popularities
from parity.study.sweep import FACTORS, Figures, sweep

pytestmark = pytest.mark.usefixtures("warm")

SMALL = Case(tokens=16, width=8, hidden=8)


@pytest.fixture(scope="module")
def dispatches() -> list[Dispatch]:
    """Two skews at one factor with drops and one with padding, run by both."""
    return list(dispatch.run(skews=(0.0, 2.0), factors=("0.75", "1.5")))


@pytest.fixture(scope="module")
def study(dispatches) -> Study:
    figures = [f for skew in (0.0, 2.0) for f in sweep(zipf_routing(SMALL, skew, 3))]
    simulated = popularities(Case("tiny", ranks=8, tokens=64, experts=16, top_k=2), ["pydoc"], 3)
    runs = [Run(layer, factor, seed, draw, [5.0 + 1e-7 * draw] * 20, [0.0] * 20, 4.0)
            for layer, factor, seed, draw in learning.plan(2)]  # fmt: skip
    return Study(header([]), [*dispatches, *figures, *simulated, *runs, learning.tracking(runs)])


def test_both_runs_say_where_every_row_is(dispatches):
    """Every kept assignment once at every stage, in the order of the stage; dropped are those that the study drops."""
    case = dispatch.CASE
    for d in dispatches:
        routing = zipf_routing(case, d.skew, 1, seed=1)
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


def test_a_row_that_is_nobodys_is_refused(dispatches):
    routing = zipf_routing(dispatch.CASE, 0.0, 1, seed=1)
    arrays = dispatch.in_jax(dispatch.CASE, [routing])[0]
    by_rank = [{key: np.array(a[rank]) for key, a in arrays.items()} for rank in range(2)]
    by_rank[1]["received"][0, 0] += 1
    with pytest.raises(KeyError):
        dispatch.positions(routing, by_rank, dispatch.CASE.capacity)


def test_the_page_loads_nothing_and_holds_what_was_measured(study):
    html = page(study)
    assert "default-src 'none'" in html
    assert not re.search(
        r"""(?:src|href)=["'](?!data:|#)|url\(|@import|https?://""", html.replace("http://www.w3.org", "")
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    assert data["dispatches"] == json.loads(msgspec.json.encode(study.of(Dispatch)))
    assert data["figures"] == json.loads(msgspec.json.encode(study.of(Figures)))
    assert "prefers-reduced-motion" in html
    assert "prefers-color-scheme: dark" in html
    for s in study.of(Simulated):
        assert f"<td>{s.busiest.median:.2f}</td>" in html
    found = plots(study)
    assert len(found) == 5
    for svg, caption in found.values():
        assert base64.b64encode(svg.encode()).decode() in html
        assert html.count(caption.replace("'", "&#39;")) == 2  # as a caption, and for those who do not see


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
const said = [], errors = [];
addEventListener("error", e => errors.push(e.message));
play(false);
for (let s = 0; s < data.dispatches.length; s++) for (let f = 0; f < factors.length; f++) for (const priority of ["token", "choice", "score"])
  for (let stage = 0; stage < 4; stage++) {
    $("skew").value = s; $("factor").value = f; $("priority").value = priority; $("stage").value = stage;
    $("stage").dispatchEvent(new Event("input"));
    for (const way of ["dynamic", "static"]) {
      const at = [...$(way).querySelectorAll(".chip:not(.gone)")].map(c => [parseInt(c.style.top), parseFloat(c.style.left.slice(5)), c.innerText.replace(/\\s+/, " ")]);
      said.push({s, factor: factors[f], priority, stage, way, rows: at.sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(a => a[2]),
        gone: $(way).querySelectorAll(".chip.gone").length, padding: $(way).querySelectorAll(".slot").length, words: $(way + "-said").textContent,
        inside: [...$(way).querySelectorAll(".chip, .slot")].every(c => c.offsetTop + c.offsetHeight <= $(way).clientHeight + 4)});
    }
  }
const unnamed = [...document.querySelectorAll("input, select, button")].filter(c => !(c.labels?.length || c.textContent.trim())).length;
parent.postMessage({said, errors, unnamed, width: document.documentElement.scrollWidth, window: innerWidth,
  larger: $("larger").tBodies[0].rows.length, text: $("rows-text").textContent}, "*");
</script>"""  # noqa: E501


@pytest.mark.slow  # not for its time: not every machine has a browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(study, tmp_path: Path, width):
    """At every setting and stage, the chips stand in the run's order, dropped ones struck out, padding grey."""
    found, dispatches = said_by(page(study), PROBE, width, tmp_path), study.of(Dispatch)
    assert found["errors"] == []
    assert found["unnamed"] == 0
    assert found["width"] <= found["window"] <= width
    assert found["larger"] == 2
    assert len(found["said"]) == 2 * 2 * 3 * 4 * 2
    for seen in found["said"]:
        d = dispatches[seen["s"]]
        name = f"{seen['factor']} {seen['priority']}"
        positions = d.dynamic if seen["way"] == "dynamic" else d.static[name]
        dropped = 0 if seen["way"] == "dynamic" or seen["stage"] == 0 else len(d.dropped[name])
        if seen["stage"]:
            lanes = getattr(positions, ["grouped", "received", "expert_major"][seen["stage"] - 1])
        else:
            lanes = [[(p, t, k) for t in range(6) for k in range(2)] for p in range(2)]
        rows = [f"{'AB'[p]}{t} e{d.expert_id[p][t][k]}" for lane in lanes for p, t, k in filter(None, lane)]
        assert seen["rows"] == rows
        assert seen["gone"] == dropped
        assert seen["padding"] == sum(row is None for lane in lanes for row in lane)
        assert seen["inside"]
        if seen["stage"]:
            assert f"{seen['padding']} padding; {dropped} of 24 dropped" in seen["words"]
    assert "rank A: " in found["text"]


# ---- From the command line


def study_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "parity", "study", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def test_from_the_command_line(tmp_path):
    run = study_command("zipf", "--model", "mixtral-8x7b", "--steps", "3", "--no-dispatch", "--no-json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Capacity factor at which nothing drops" in run.stdout
    assert "Simulated" in run.stdout
    names = {path.name for path in (tmp_path / "study").iterdir()}
    assert names == {"index.html", "study.jsonl", "drops.svg", "positions.svg", "errors.svg", "scale.svg"}
    lines = [json.loads(line) for line in (tmp_path / "study/study.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "header"
    assert [line["kind"] for line in lines].count("figures") == len(FACTORS) * 6
    assert "nan" not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no preset is called nothing"),
        (["--model", "nothing"], "no model is called nothing"),
        (["--steps", "0"], "--steps is 0: it must be at least 1"),
        (["--learn", "1", "--learn-steps", "5"], "at least 0 seeds and 20 steps"),
        (["--recording", "nowhere.safetensors"], "cannot read nowhere.safetensors"),
    ],
)
def test_wrong_usage(tmp_path, arguments, words):
    run = study_command(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert words in " ".join(run.stderr.split())
    assert not (tmp_path / "study").exists()
