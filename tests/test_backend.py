"""A backend is one record: by it a layer of a reader's own, in NumPy, goes beside PyTorch and JAX, and is judged."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import numpy_backend
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.presets import PRESETS
from parity.cli.check import chosen_backends
from parity.cli.main import main
from parity.judge.engine import judge, make_report
from parity.judge.records import Report, header
from parity.oracle.problem import Problem, draw
from parity.oracle.quantities import ALWAYS, names
from parity.report.html import page
from parity.report.terminal import print_report
from parity.run.backend import Backend, Setting, spans
from parity.run.ours import BACKENDS, find
from parity.run.trace import Trace, load_folder

pytestmark = pytest.mark.usefixtures("warm")

TESTS = Path(__file__).parent
CASES = ["zipf", "drop-rank-score"]  # of the second 68 assignments are dropped
IN_PART = "numpy: compared: output, 5 gradients; not seen: stages 1-8"


@pytest.fixture
def parity(capfd):
    """The command line in this process: its exit code, and what it says on either side."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments), "--no-json"])
        assert isinstance(end.value.code, int)
        return end.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[str, str, dict[tuple[str, str], Trace]]:
    """What `check` says of PyTorch, JAX and NumPy, its page, and their traces by case and backend."""
    folder = tmp_path_factory.mktemp("three")
    backends = ("--backend", "torch", "--backend", "jax", "--backend", "numpy_backend:BACKEND")
    files = ("--no-json", "--save", folder / "traces", "--html", folder / "page.html")
    command = [sys.executable, "-m", "parity", "check", *CASES, *backends, *files]
    path = os.pathsep.join(
        filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))
    )  # as a reader's own folder would be
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert run.returncode == 0, run.stdout + run.stderr
    traces = {(trace.case.name, trace.backend.name): trace for trace in load_folder(folder / "traces")}
    return run.stdout, (folder / "page.html").read_text(), traces


def report_of(case: str, *traces: Trace) -> Report:
    judged = {case: judge(draw(PRESETS[case]), list(traces))}
    return make_report(header([trace.backend for trace in traces]), [case], judged, {})


def said(report: Report) -> str:
    print_report(console := Console(width=100, file=StringIO()), report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def numpy_trace(case: str, folder: Path, old: str = "", new: str = "") -> Trace:
    """What the NumPy layer makes of a case, once `old` is `new` in it."""
    source = Path(numpy_backend.__file__).read_text()
    assert not old or source.count(old) == 1
    exec(compile(source.replace(old, new), "numpy_backend.py", "exec"), vars(module := ModuleType("numpy_backend")))
    draw(PRESETS[case]).save(folder / f"{case}.problem")
    module.run(module.BACKEND, folder, Setting())
    (trace,) = load_folder(folder)
    return trace


# ---- A backend of one's own


def test_a_layer_in_numpy_beside_pytorch_and_jax(three):
    text, html, traces = three
    lines = text.splitlines()
    zipf, drops = (next(line for line in lines if line.startswith(name)).split() for name in CASES)
    assert zipf[7:10] == ["0", "✓" * 9, "✓"]
    assert drops[7:10] == ["69", "✓" * 9, "✓"]
    assert lines[-1] == "match"
    assert IN_PART in lines
    assert not [line for line in lines if line.startswith(("torch:", "jax:"))]  # of these everything is seen
    assert f'<dd class="seen">{IN_PART}</dd>' in html
    assert f"<li>{IN_PART}." in html
    assert "torch: compared" not in html
    assert "no row to compare" not in html
    assert {backend for _, backend in traces} == {"torch", "jax", "numpy"}
    assert traces["zipf", "numpy"].arrays.keys() == {*ALWAYS}
    assert len(Path(numpy_backend.__file__).read_text().splitlines()) <= 40


def test_each_of_its_arrays_is_held_against_the_oracle_and_both_others(three):
    _, _, traces = three
    for case in CASES:
        report = report_of(case, *(traces[case, backend] for backend in ("torch", "jax", "numpy")))
        pairs = [(f"{c.mode}/{c.stage}/{c.value}", c.left, c.right) for c in report.checks[case] if not c.scale]
        mine = sorted(pair for pair in pairs if "numpy" in pair)
        of_each = [("numpy", "oracle"), ("torch", "numpy"), ("jax", "numpy")]
        assert mine == sorted((name, *pair) for name in ALWAYS for pair in of_each)
        assert report.footer.verdict == "match"


def test_alone_it_is_judged_by_what_it_shows(three):
    _, _, traces = three
    report = report_of("drop-rank-score", traces["drop-rank-score", "numpy"])
    text = said(report)
    assert report.footer.verdict == "match"
    assert next(line for line in text.splitlines() if line.startswith("drop-rank-score")).split()[7:10] == [
        "-", "\N{MIDDLE DOT}" * 9, "✓"
    ]  # fmt: skip
    assert IN_PART in text
    html = page(report)
    assert f"{IN_PART}." in html
    assert "Only numpy ran: it was held against the oracle, not against another backend." in html
    assert "not compared</span>" not in html
    assert html.count('<span class="value">not seen</span>') == 9


FAULTS = [
    ("zipf", "x.T @ db,", "(x.T @ db).mT,", "apply_experts", "dw_up", "backward"),
    ("zipf", '"ne,end->nd", weight,', '"ne,end->nd", kept,', "combine", "out", "forward"),
    ("zipf", "x.T @ dlogits,", "x.T @ dscore,", "route", "drouter", "backward"),
    ("zipf", "da @ gate.mT + db @ up.mT", "da @ gate.mT + da @ up.mT", "route", "dx", "backward"),
    ("drop-rank-score", "p.keep, p.aux", "p.keep | True, p.aux", "combine", "out", "forward"),
]


@pytest.mark.parametrize(("case", "old", "new", "stage", "value", "direction"), FAULTS, ids=[f[4] for f in FAULTS])
def test_a_fault_in_it_is_blamed_on_it(three, tmp_path, case, old, new, stage, value, direction):
    _, _, traces = three
    report = report_of(case, traces[case, "torch"], traces[case, "jax"], numpy_trace(case, tmp_path, old, new))
    verdict = report.blamed(case)
    assert verdict
    assert (verdict.backends, verdict.stage, verdict.check.value) == (["numpy"], stage, value)
    assert (verdict.direction, verdict.function) == (direction, "tests/numpy_backend.py")
    assert all("numpy" in (check.left, check.right) for check in report.checks[case] if not check.ok)
    assert len([check for check in report.checks[case] if check.ok and "numpy" not in (check.left, check.right)]) > 150
    text = said(report)
    assert f"{case}: numpy is wrong in its {'output' if value == 'out' else f'gradient {value}'}, in the whole" in text
    assert "  look at:  tests/numpy_backend.py\n" in text


def test_what_repeats_a_failure_names_it_as_it_was_asked_for(three, tmp_path):
    trace = numpy_trace("zipf", tmp_path, FAULTS[0][1], FAULTS[0][2])
    trace.backend = msgspec.structs.replace(find("numpy_backend:BACKEND"))
    assert "repeat:   python -m parity check zipf --backend numpy_backend:BACKEND\n" in said(report_of("zipf", trace))


def test_two_of_three_are_wrong(three, tmp_path):
    _, _, traces = three
    wrong = numpy_trace("zipf", tmp_path, FAULTS[1][1], FAULTS[1][2])
    jax = Trace(wrong.case, BACKENDS["jax"], {}, arrays=dict(traces["zipf", "jax"].arrays) | {
        "e2e/combine/out": wrong.arrays["e2e/combine/out"]
    })  # fmt: skip
    text = said(report_of("zipf", traces["zipf", "torch"], jax, wrong))
    jax_is = (
        "zipf: jax is wrong at stage 9 combine, forward, in the whole layer; fed the oracle's input, the stage matches"
    )
    assert jax_is + "\n" in text
    assert "zipf: numpy is wrong in its output, in the whole layer; its stages are not seen\n" in text
    for file, name in (("jax_impl/layer.py", "jax"), ("tests/numpy_backend.py", "numpy")):
        assert f"look at:  {file}\n" in text
        assert f"repeat:   python -m parity check zipf --backend {name}\n" in text


# ---- What it declares, and what it does not


@pytest.mark.parametrize("name", ALWAYS)
def test_a_declared_array_that_is_missing_is_a_failure(three, name):
    trace = three[2]["zipf", "numpy"]
    trace = Trace(trace.case, trace.backend, {}, arrays={n: a for n, a in trace.arrays.items() if n != name})
    report = report_of("zipf", trace)
    (check,) = [check for check in report.checks["zipf"] if not check.ok]
    assert (f"{check.mode}/{check.stage}/{check.value}", check.note) == (name, "missing from the trace")
    assert report.footer.verdict == "mismatch"


def test_an_array_that_is_not_declared_is_not_looked_at(three):
    trace = three[2]["zipf", "numpy"]
    less = msgspec.structs.replace(trace.backend, provides=ALWAYS[:2])
    junk = {"e2e/route/drouter": [np.full((1,), np.nan)], "e2e/combine/dscore": [np.zeros(3)]}
    for arrays in (dict(trace.arrays) | junk, {name: trace.arrays[name] for name in ALWAYS[:2]}):
        report = report_of("zipf", Trace(trace.case, less, {}, arrays=arrays))
        assert report.footer.verdict == "match"
        assert [f"{c.mode}/{c.stage}/{c.value}" for c in report.checks["zipf"] if not c.scale] == [*ALWAYS[:2]]
        assert "numpy: compared: output, 1 gradient; not seen: 4 gradients, stages 1-8\n" in said(report)


@pytest.mark.parametrize(
    ("provides", "seen"),
    [
        (ALWAYS, "compared: output, 5 gradients; not seen: stages 1-8"),
        (ALWAYS[:1], "compared: output; not seen: 5 gradients, stages 1-8"),
        (ALWAYS[1:2], "compared: 1 gradient; not seen: output, 4 gradients, stages 1-9"),
        (("isolated/send_tokens/x",), "compared: stage 4; not seen: output, 5 gradients, stages 1-3, 5-9"),
        ((*ALWAYS, "e2e/route/score"), "compared: output, 5 gradients, stage 1; not seen: stages 2-8"),
        (names("static"), "compared: output, 14 gradients, stages 1-8"),  # all that any layer has
    ],
)
def test_what_is_seen_in_words(provides, seen):
    assert Backend("mine", "none", "static", provides).seen() == seen


def test_spans():
    assert spans({1, 3, 4, 5, 9}) == "1, 3-5, 9"
    assert spans({2}) == "2"


# ---- Records that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provides": ("e2e/combine/outt",)}, "backend mine: e2e/combine/outt is not a quantity: there are route/"),
        ({"provides": ("e2e/group_by_expert/dx",)}, "e2e/group_by_expert/dx is not a quantity"),  # a stage alone has it
        ({"provides": ("combine/out",)}, "combine/out is not a quantity"),
        ({"provides": ()}, "backend mine provides nothing to compare"),
        ({"provides": ("e2e/group_by_expert/dropped",)}, "dropped, which layout opaque does not have: only static"),
        ({"layout": "dynamic", "provides": ("e2e/group_by_expert/dropped",)}, "dynamic does not have: only static"),
        ({"layout": "dense"}, "layout 'dense': it must be one of dynamic, static, ragged, direct, opaque"),
        ({"files": {"combined": "x.py"}}, "backend mine: `files` has combined, which is not a stage: there are"),
        ({"name": "a/b"}, "a backend cannot be called 'a/b': its name is part of file names"),
        ({"name": "oracle"}, "a backend cannot be called 'oracle'"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be(changes, message):
    fields = {"name": "mine", "framework": "none", "layout": "opaque", "provides": ALWAYS} | changes
    with pytest.raises(ValueError, match=message):
        Backend(**fields)


NOT_A_RECORD = "a string"
NO_RUN = Backend("mine", "none", "opaque", ALWAYS)
A_DOUBLE = Backend("jax", "none", "opaque", ALWAYS, run="numpy_backend:run")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nosuch", "no backend is called nosuch. There are: torch, jax, torch-static, jax-dynamic, torch-direct, "
                   "jax-direct; or name a file of your own, such as mine.py, or package.module:name"),
        ("torch_impl", "no backend is called torch_impl. There are: torch, "),
        ("nosuch:BACKEND", "--backend nosuch:BACKEND: No module named 'nosuch'"),
        ("numpy_backend:NOSUCH", "--backend numpy_backend:NOSUCH: module 'numpy_backend' has no attribute 'NOSUCH'"),
        ("numpy_backend:run", "numpy_backend:run is a function, not a Backend. There are: torch, jax, "),
        ("test_backend:NOT_A_RECORD", "test_backend:NOT_A_RECORD is a str, not a Backend"),
        ("test_backend:NO_RUN", "--backend test_backend:NO_RUN has no function to run it: set `run` in its record"),
        ("test_backend:A_DOUBLE", "--backend test_backend:A_DOUBLE is called jax, as one of this project is"),
    ],
)  # fmt: skip
def test_a_backend_that_there_is_not(asked, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        find(asked)


ANOTHER = msgspec.structs.replace(numpy_backend.BACKEND, files={})


def test_each_once_and_two_of_one_name_are_refused():
    asked = ("numpy_backend:BACKEND", "jax", "torch", "numpy_backend:BACKEND", "both")
    assert [backend.name for backend in chosen_backends(asked)] == ["torch", "jax", "numpy"]
    with pytest.raises(ValueError, match="two backends are called numpy"):
        chosen_backends(("numpy_backend:BACKEND", "test_backend:ANOTHER"))


@pytest.mark.parametrize("asked", ["nosuch", "parity.cases.case:Case"])
def test_wrong_usage_on_the_command_line(parity, asked):
    code, out, err = parity("check", "zipf", "--backend", asked)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert asked in err
    assert "Traceback" not in err


# ---- Traces that somebody else's program wrote


@pytest.fixture
def theirs(tmp_path, three):
    """Writes the output alone, as another program would, and saves PyTorch's trace; the folders."""

    def write(change: float = 0, **about: str) -> list[Path]:
        traces = three[2]
        out = traces["zipf", "numpy"].arrays["e2e/combine/out"]
        tensors = {f"e2e/combine/out/{rank}": a + np.float32(change * (rank == 2)) for rank, a in enumerate(out)}
        (tmp_path / "mine").mkdir()
        metadata = {"case": '{"name": "zipf", "pattern": "zipf"}', "backend": "mine"} | about
        save_file(tensors, tmp_path / "mine" / "zipf.safetensors", metadata=metadata)
        traces["zipf", "torch"].save(tmp_path / "torch")
        return [tmp_path / "torch", tmp_path / "mine"]

    return write


def test_a_trace_of_the_output_alone_is_compared(parity, theirs):
    folders = theirs()
    assert {trace.case for folder in folders for trace in load_folder(folder)} == {PRESETS["zipf"]}
    code, out, _ = parity("compare", *folders)
    assert code == 0, out
    assert "mine: compared: output; not seen: 5 gradients, stages 1-8\n" in out
    assert out.endswith("match\n")


def test_and_found_wrong(parity, theirs):
    code, out, _ = parity("compare", *theirs(change=1e-3))
    assert code == 1, out
    assert "zipf: mine is wrong in its output, in the whole layer; its stages are not seen\n" in out
    assert "out against oracle: 16 of 64 rows; worst: on rank 2, token " in out
    assert "look at:  mine\n" in out


def test_a_trace_by_its_record(parity, theirs):
    record = msgspec.json.encode(Backend("theirs", "none", "opaque", ALWAYS[:2], {"": "layer.cpp"})).decode()
    code, out, _ = parity("compare", *theirs(backend=record))
    assert code == 1, out  # it says that a gradient is there, and it is not
    assert "dx against oracle: missing from the trace" in out
    assert "look at:  layer.cpp\n" in out


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"layout": "dense"}, "is not a trace: backend mine has layout 'dense': it must be one of dynamic, "),
        ({"case": '{"name": "zipf", "pattern": "zip"}'}, "is not a trace: Invalid enum value 'zip'"),
        ({"backend": "../mine"}, "a backend cannot be called '../mine'"),
        ({"backend": '{"name": "mine"}'}, "is not a trace: Object missing required field"),
    ],
)
def test_a_trace_that_says_what_cannot_be(theirs, about, message):
    with pytest.raises(ValueError, match=message):
        [load_folder(folder) for folder in theirs(**about)]


def test_a_trace_with_an_array_that_is_no_quantity(tmp_path):
    about = {"case": "{}", "backend": "mine"}
    save_file({"e2e/combine/output/0": np.zeros(1)}, tmp_path / "a.safetensors", metadata=about)
    with pytest.raises(ValueError, match="is not a trace: e2e/combine/output is not a quantity: there are"):
        load_folder(tmp_path)
    save_file({"output": np.zeros(1)}, tmp_path / "a.safetensors", metadata=about)
    with pytest.raises(ValueError, match="is not a trace: tensors must be called mode/stage/value/rank, not 'output'"):
        load_folder(tmp_path)


def test_a_problem_is_the_same_for_all(three):
    """The record, the case and the arrays come back as they were saved."""
    trace = three[2]["zipf", "numpy"]
    assert trace.backend == find("numpy_backend:BACKEND")
    assert trace.case == Case(name="zipf", pattern="zipf")
    assert isinstance(draw(trace.case), Problem)


@pytest.mark.parametrize(
    ("case", "setting", "why"),
    [
        (Case(ranks=1), Setting("cpu"), "not implemented on XLA:CPU; use --device cuda"),
        (Case(ranks=2), Setting("cuda", "vmap"), "no vmap rule, so --ranks 2 needs as many GPUs"),
        (Case(ranks=2, way="eager"), Setting("cuda"), "no vmap rule, and --way eager runs ranks under vmap"),
        (Case(ranks=1, way="eager"), Setting("cuda"), ""),
        (Case(ranks=2), Setting("cuda"), ""),
    ],
)
def test_why_the_uneven_exchange_cannot_run(case, setting, why):
    refusal = BACKENDS["jax-dynamic"].refusal(case, setting)
    assert why in refusal if why else not refusal
