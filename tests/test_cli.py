"""The command line: exit codes, outputs for people and for programs, two machines, torchrun."""

import errno
import inspect
import json
import lzma
import os
import pty
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import PYTHON
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.cases import presets
from parity.cases.case import Case, changed
from parity.cases.presets import MODELS, PRESETS
from parity.cli import check, identify, main, study
from parity.cli.main import COMMANDS, parse
from parity.cli.new import TEMPLATES
from parity.cli.shared import BUG, PIPE
from parity.judge import records
from parity.oracle.problem import draw
from parity.run import supervisor
from parity.run.trace import Trace

pytestmark = pytest.mark.usefixtures("warm")

SMALL = ["--ranks", "2", "--tokens", "3", "--experts", "4", "--width", "8", "--hidden", "8"]


def parity(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m parity ...` in a process of its own."""
    command = [sys.executable, "-m", "parity", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def in_process(capsys, *arguments: str) -> tuple[int, str, str]:
    """The same in this process, where nothing is to be run."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    code, out = end.value.code, capsys.readouterr()
    assert isinstance(code, int)
    return code, out.out, out.err


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Both backends of one case, run apart."""
    folder = tmp_path_factory.mktemp("saved")
    for backend in ("torch", "jax"):
        run = parity("check", *SMALL, "--backend", backend, "--save", str(folder / backend), "--json")
        assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def report(saved) -> str:
    run = parity("compare", str(saved / "torch"), str(saved / "jax"))
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def full(monkeypatch):
    """A disk on which nothing fits but the first bytes of a file."""
    of_file = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:10])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode="r", *args, **more):
        file = of_file(path, mode, *args, **more)
        return Full(file) if {*mode} & {*"wax"} else file

    monkeypatch.setattr(Path, "open", opened)

    def write(path, data):
        with path.open("w" if isinstance(data, str) else "wb") as file:
            file.write(data)

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk(saved, report, tmp_path, capsys, full):
    """The file is named, and no part of it is left."""
    page, there = tmp_path / "page.html", tmp_path / "report.jsonl"
    with open(there, "w") as file:
        file.write(report)
    for words, path in (
        (["report", str(there), "--html", str(page)], page),
        (["compare", str(saved / "torch"), str(saved / "jax"), "--html", str(page)], page),
        (["new", str(tmp_path / "mine.py")], tmp_path / "mine.py"),
    ):
        code, _, err = in_process(capsys, *words)
        assert code == 2
        assert f"error: cannot write {path}: No space left on device. Make room, or name another place" in err
        assert [*tmp_path.iterdir()] == [there]
    with pytest.raises(ValueError, match=r"cannot write .*\.problem: No space left"):
        draw(PRESETS["p1"]).save(tmp_path / "p1.problem")
    assert [*tmp_path.iterdir()] == [there]


def test_a_full_disk_under_saved_traces(saved, tmp_path, monkeypatch):
    trace = Trace.load(saved / "torch" / "custom.torch.safetensors")
    path = tmp_path / "custom.torch.safetensors"

    def full(_, path, metadata):
        path.write_bytes(b"part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("parity.run.trace.save_file", full)
    with pytest.raises(ValueError, match=f"cannot write {path}: .*No space left on device"):
        trace.save(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_two_machines(saved, capsys):
    code, out, _ = in_process(capsys, "compare", str(saved / "torch"), str(saved / "jax"), "--no-json")
    assert code == 0
    assert out.endswith("match\n")
    assert "1 case," in out


def test_a_wrong_number_in_a_saved_trace_is_a_mismatch(saved, tmp_path, capsys):
    path = saved / "torch" / "custom.torch.safetensors"
    with safe_open(path, framework="numpy") as f:
        tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
    tensors["isolated/combine/out/1"][2, 5] *= 1.001
    save_file(tensors, tmp_path / path.name, metadata=about)
    code, out, _ = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"), "--no-json")
    assert code == 1
    assert "torch is wrong at stage 9 combine, forward" in out
    assert "worst: on rank 1, token 2 from rank 1, index [5]" in out
    assert "torch_impl/grouping.py: combine" in out
    assert "MISMATCH in 1 of 1 case: custom" in out


def test_one_backend_alone_cannot_be_compared(saved, capsys):
    code, _, err = in_process(capsys, "compare", str(saved / "torch"))
    assert code == 2
    assert "give a folder of another backend too" in err


def test_an_empty_folder_is_named_as_it_is_on_one_line(tmp_path, capsys):
    (folder := tmp_path / ("[red] and long" * 10)).mkdir()
    code, _, err = in_process(capsys, "compare", str(folder))
    assert code == 2
    assert err.splitlines() == [
        f"error: {folder} holds no traces: write some with `python -m parity check --backend torch --save '{folder}'`"
    ]


def test_lines_of_json_fit_the_schema(report, capsys):
    code, schema, _ = in_process(capsys, "report", "--schema")
    assert code == 0
    kinds = json.loads(schema)["$defs"]
    described = [about.get("description") for kind in kinds.values() for about in kind["properties"].values()]
    assert len(described) > 120
    assert all(described)
    lines = [json.loads(line) for line in report.splitlines()]
    assert [line["kind"] for line in (lines[0], lines[1], lines[-1])] == ["header", "case", "footer"]
    assert {line["kind"] for line in lines[2:-1]} == {"comparison"}
    for line, name in ((lines[0], "Header"), (lines[1], "CaseRecord"), (lines[2], "Check"), (lines[-1], "Footer")):
        assert line.keys() <= kinds[name]["properties"].keys()
        assert set(kinds[name]["required"]) <= line.keys()
    assert lines[-1] | {"seconds": None} == {
        "kind": "footer", "verdict": "match", "exit_code": 0, "cases": 1, "comparisons": len(lines) - 3,
        "pairs": 0, "pairs_missing": [],
        "rows": sum(line["rows"] for line in lines[2:-1]),
        "bitwise": sum(line["rows"] for line in lines[2:-1] if line["bitwise"]), "failing": 0, "seconds": None,
    }  # fmt: skip


def test_a_report_is_read_back(report, tmp_path, capsys):
    path = tmp_path / "report.jsonl"
    path.write_text(report)
    code, out, _ = in_process(capsys, "report", str(path), "--html", str(tmp_path / "page.html"))
    assert code == 0
    assert out.endswith("match\n")
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert records.lines(records.read(path)) == report.splitlines()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (slice(None, -1), "has no footer: its run did not finish"),
        (slice(1, None), "does not begin with a header"),
        (slice(None, 5), "has no footer"),
        (slice(0, 0), "does not begin with a header"),
    ],
)
def test_a_report_that_is_not_whole_is_refused(report, tmp_path, capsys, cut, message):
    path = tmp_path / "report.jsonl"
    path.write_text("\n".join(report.splitlines()[cut]))
    code, _, err = in_process(capsys, "report", str(path))
    assert code == 2
    assert message in " ".join(err.split())


def test_a_report_with_a_line_lost_in_the_middle_is_refused(report, tmp_path, capsys):
    lines = report.splitlines()
    path = tmp_path / "report.jsonl"
    path.write_text("\n".join([*lines[:9], *lines[10:]]))
    code, _, err = in_process(capsys, "report", str(path))
    assert code == 2
    assert "it is not whole" in " ".join(err.split())


def test_numbers_that_json_lacks_survive(report, tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text(report)
    check = records.read(path).checks["custom"][0]
    check.worst, check.got, check.error = float("inf"), float("nan"), float("-inf")
    back = msgspec.convert(json.loads(records.encode(check)), records.Record, strict=False)
    assert repr(back) == repr(check)


def test_nothing_compared_is_no_match(report, tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text(report)
    whole = records.read(path)
    for comparison in whole.checks["custom"]:
        comparison.rows = 0
    assert records.footer(whole.header, whole.cases, whole.checks, 1, {}).exit_code == 5
    assert records.footer(whole.header, {}, {}, 0, {}).exit_code == 5
    checks = records.read(path).checks
    assert records.footer(whole.header, whole.cases, checks, 2, {}).exit_code == 5  # a case was never judged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "no preset is called nosuch. There are: balanced, zipf"),
        (["--experts", "6", "--ranks", "4"], "--experts 6 do not divide over --ranks 4"),
        (["--top-k", "9"], "--top-k is 9 with --experts 8: a token cannot choose more"),
        (["--capacity-factor", "-1"], "--capacity-factor is '-1': it must be finite and positive"),
        (["zipf", "--fault", "nosuch"], "no fault is called nosuch. `python -m parity faults` lists all"),
        (["zipf", "--fault", "torch-row-lots"], "Did you mean torch-row-lost"),
        (["zipf", "--fault", "jax-tf32", "--backend", "torch"], "a fault of jax, which --backend torch does not run"),
        (["--recording", "/nosuch.safetensors"], "cannot read /nosuch.safetensors as safetensors"),
        (["zipf", "--random", "3"], "--random and --budget draw cases: leave out presets"),
        (["zipf", "--budget", "3"], "--random and --budget draw cases: leave out presets"),
        (["--random", "3", "--budget", "3"], "leave out --random, --tokens"),
        (["--tokens", "3", "--budget", "3"], "leave out --random, --tokens"),
        (["--budget", "-3"], "--budget is -3: it must be positive"),
        (["--random", "-1"], "--random is -1: it cannot be negative"),
        (["--seed", "-1"], "--seed is -1: it cannot be negative"),
        (["--name", "a/b"], "--name is 'a/b': it names files"),
        (["p1", "--timeout", "0"], "--timeout is 0: it must be positive"),
        (["p1", "--html", "/nosuch/page.html"], "cannot write /nosuch/page.html: there is no folder /nosuch"),
        (["p1", "--html", "/"], "cannot write /: it is a folder"),
        (["p1", "--save", "/dev/null/traces"], "Not a directory: '/dev/null/traces'"),
        (["--recording", "pydoc", "--experts", "8"], "--experts is 8, but the recording has 16"),
        (["--recording", "pydoc", "--ranks", "3"], "--recording pydoc: --experts 16 do not divide over --ranks 3"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    code, _, err = in_process(capsys, "check", *arguments)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check", "--pattern", "random", "--trace", "pydoc"],
            "--pattern random with --recording pydoc: the recording says which experts are chosen",
        ),
        (
            ["check", "pydoc", "--pattern", "zipf"],
            "--pattern zipf with --recording pydoc: the recording says which experts",
        ),
        (["identify", "--recording", "pydoc", "--pattern", "zipf"], "--pattern zipf with --recording pydoc"),
        (["check", "zipf", "--recording", "pydoc"], "--pattern zipf with --recording pydoc"),
        (["study", "zipf", "--trace", "a.safetensors"], "zipf with --recording a.safetensors: swept are presets or"),
        (["study", "--trace"], "--trace has no value: give one or more, or leave it out"),
        (["study", "--recording", "--no-dispatch"], "--recording has no value"),
        (["check", "--model"], "--model has no value"),
        (["check", "zipf", "--renormalize", "--ranks", "2"], "write --renormalize True or --renormalize False"),
        (["check", "zipf", "--model", "olmoe-1b-7b"], "--model names cases of its own: leave out zipf"),
        (["bench", "--framework", "--seconds", "1"], "--framework has no value"),
        (["survey", "--dtype"], "--dtype has no value"),
        (["capture", "--ways"], "--ways has no value"),
    ],
)
def test_what_does_not_go_together_or_is_given_nothing(capsys, arguments, message):
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = in_process(capsys, "check", "p1", "--device", "cuda")
    assert code == 2
    assert "--device cuda: there is no NVIDIA GPU here" in err


def test_a_trace_that_is_cut_off(saved, tmp_path, capsys):
    whole = (saved / "torch" / "custom.torch.safetensors").read_bytes()
    (tmp_path / "custom.torch.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"))
    assert code == 2
    assert "custom.torch.safetensors is not a whole trace" in err


def edited(source: Path, folder: Path, tensors: dict[str, np.ndarray], about: dict[str, str | None]) -> Path:
    """A trace with other tensors besides its own, and other metadata; None takes one out."""
    with safe_open(source, framework="numpy") as f:
        whole = {name: f.get_tensor(name) for name in f.keys()} | tensors  # noqa: SIM118
        said = {name: value for name, value in (f.metadata() | about).items() if value is not None}
    save_file(whole, folder / source.name, metadata=said)
    return folder / source.name


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({}, {"case": None}, "is not a trace: its metadata lack case, which"),
        ({}, {"case": None, "backend": None}, "is not a trace: its metadata lack case and backend, which"),
        ({}, {"backend": "mine"}, "no backend is called mine here, and nothing says which rows e2e/"),
        (
            {"foo/bar/baz/0": np.zeros(3)},
            {},
            "is not a trace: foo/bar/baz is not a quantity: there are route/expert_id",
        ),
        ({"odd/combine/out/0": np.zeros(3)}, {}, "is not a trace: odd/combine/out is not a quantity"),
        ({"nosuch": np.zeros(3)}, {}, "tensors must be called mode/stage/value/rank, not 'nosuch'"),
        (
            {"rows/no/such/0": np.zeros(3)},
            {},
            "is not a trace: rows/no/such gives the rows of an array that is not known",
        ),
    ],
)
def test_a_trace_with_something_odd_in_it(saved, tmp_path, capsys, tensors, about, message):
    path = edited(saved / "torch" / "custom.torch.safetensors", tmp_path, tensors, about)
    code, _, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"))
    assert code == 2, err
    assert f"error: {path} is not a trace: " in err
    assert message in err


def test_a_trace_in_a_dtype_that_numpy_lacks(saved, tmp_path, capsys):
    path, whole = tmp_path / "custom.torch.safetensors", (saved / "torch" / "custom.torch.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + size])
    one = about["isolated/combine/out/1"]
    one |= {"dtype": "F8_E8M0", "shape": [one["data_offsets"][1] - one["data_offsets"][0]]}
    head = json.dumps(about).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + size :])
    code, _, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"))
    assert code == 2
    assert f"error: {path} is not a trace: cannot read isolated/combine/out: " in err


@pytest.mark.parametrize("rows", [np.zeros(8, np.float32), np.full(8, 10**9), np.zeros((8, 2), np.int64)], ids=str)
def test_numbers_of_rows_that_cannot_be(saved, tmp_path, capsys, rows):
    """Of a layer that gives them with what is inside it: it is that which is wrong."""
    about: dict[str, str | None] = {"backend": "mine"}
    path, name = edited(saved / "torch" / "custom.torch.safetensors", tmp_path, {}, about), "apply_experts/y"
    with safe_open(path, framework="numpy") as f:
        held = {f"e2e/{name}/{i}": f.get_tensor(f"e2e/{name}/{i}") for i in range(2)}
        save_file(held | {f"rows/{name}/{i}": rows for i in range(2)}, path, metadata=f.metadata())
    code, out, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"), "--no-json")
    assert code == 1, err
    assert "mine is wrong at stage 6 experts" in out


def test_a_folder_called_as_a_trace(saved, tmp_path, capsys):
    (folder := tmp_path / "a.safetensors").mkdir()
    code, _, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"))
    assert code == 2
    assert f"error: {folder} is not a whole trace: " in err


@pytest.mark.parametrize(
    "text", [b"[1]", b"3", b'"x"', b'{"kind":"case"}', b'{"kind":"case","case":3}', b"\xff\xfe", b"{}"], ids=str
)
def test_what_is_no_report(tmp_path, capsys, text):
    (path := tmp_path / "report.jsonl").write_bytes(text + b"\n")
    code, _, err = in_process(capsys, "report", str(path))
    assert code == 2
    assert f"error: {path} is not a report: " in err


@pytest.mark.parametrize("part", [0, 0.5])
def test_a_compressed_report_that_is_cut_off(report, tmp_path, capsys, part):
    whole = lzma.compress(report.encode())
    (path := tmp_path / "report.jsonl.xz").write_bytes(whole[: int(len(whole) * part)])
    code, _, err = in_process(capsys, "report", str(path))
    assert code == 2
    assert f"error: {path} is not a report: Compressed file ended before the end" in err


def test_a_report_of_a_backend_that_its_header_does_not_know(report, tmp_path, capsys):
    (path := tmp_path / "report.jsonl").write_text(report.replace('"left":"torch"', '"left":"nosuch"'))
    code, _, err = in_process(capsys, "report", str(path))
    assert code == 2
    assert f"error: {path} compares nosuch, which its header does not name" in err


def test_a_bug_of_the_harness_is_no_mismatch(tmp_path, capsys, monkeypatch):
    """Whatever it is: Python's own exit code for it is that of a mismatch."""
    monkeypatch.setattr(records, "read", lambda _: {}["nosuch"])
    code, _, err = in_process(capsys, "report", "report.jsonl")
    assert code == BUG
    assert "KeyError: 'nosuch'" in err
    assert "this is a bug of the harness and says nothing about any layer" in err


def test_a_harness_that_cannot_be_imported(tmp_path):
    """For lack of a package that it needs."""
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\")\n")
    (tmp_path / "parity").symlink_to(Path(check.__file__).parents[2] / "parity")
    run = subprocess.run([PYTHON, "-m", "parity", "check"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == BUG
    assert "No module named 'tyro'" in run.stderr
    assert "the harness cannot be imported" in run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_exit_code(name, capsys):
    code, out, _ = in_process(capsys, name, "--help")
    assert code == 0
    assert f"{BUG} a bug of the harness" in " ".join(out.split())


def test_traces_of_different_cases(saved, tmp_path, capsys):
    """The same name, another seed."""
    trace = Trace.load(saved / "torch" / "custom.torch.safetensors")
    replace(trace, case=replace(trace.case, seed=7)).save(tmp_path)
    code, _, err = in_process(capsys, "compare", str(tmp_path), str(saved / "jax"))
    assert code == 2
    assert "custom is not the same case in every folder: --seed 7 and 0" in err


@pytest.mark.parametrize("words", [("report", "report.jsonl"), ("check", "--help")])
def test_who_has_read_enough(report, tmp_path, words):
    """Of a pipe that is closed too early."""
    (tmp_path / "report.jsonl").write_text(report)
    command = [sys.executable, "-c", "from parity.cli import main; main()", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.communicate()[1] == ""
    assert process.returncode == PIPE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["chek", "--tokens", "3"],
            "error: no command is called chek. Did you mean check? There are: check, identify,",
        ),
        (["--html", "x", "report"], "--html comes before the command: write `python -m parity report` first"),
        (["zipf"], "error: no command is called zipf. There are: check, identify"),
        (["check", "--tokns", "3"], "For full helptext, run python -m parity check --help"),
        (["study", "--nosuch"], "For full helptext, run python -m parity study --help"),
        (["check", "--dtype", "x"], "Expected one of ('float32', 'bfloat16', 'float16', 'float64')."),
        (["identify", "--dtype", "None"], "Expected one of ('float32', 'bfloat16', 'float16', 'float64')."),
        (["check", "--renormalize", "yes"], "Expected one of ('True', 'False')."),
        (["check", "--tokens", "x"], "Error parsing --tokens: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_usage_errors(arguments, message, capsys, monkeypatch):
    """Of the command that was meant, and without colour where none is wanted."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = in_process(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", "").split())
    assert "\x1b" not in err


def test_usage_errors_are_the_same_each_time():
    """However strings are hashed."""
    command = [PYTHON, "-m", "parity", "check", "--dtype", "x"]
    runs = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=60)
        for seed in ("1", "2")
    ]
    assert runs[0].stderr == runs[1].stderr


def test_a_flag_that_does_not_exist(capsys):
    assert in_process(capsys, "check", "--nosuch")[0] == 2


def test_a_framework_that_is_not_there(tmp_path):
    """A package named torch that cannot be imported, found before the real one."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    for package in ("parity", "torch_impl", "jax_impl"):
        (tmp_path / package).symlink_to(Path(check.__file__).parents[2] / package)
    run = parity("check", *SMALL, cwd=tmp_path)
    assert run.returncode == 3
    assert "torch is not installed: pip install -e '.[torch]'" in " ".join(run.stderr.split())


@pytest.mark.parametrize(
    "words",
    [["check", *SMALL], ["identify", "p1"], ["study", "--out", "study"], ["bench", "small"], ["faults", "--run"]],
    ids=lambda words: words[0],
)
def test_both_frameworks_are_missing(words, capsys, monkeypatch, tmp_path):
    """Both are named, and nothing is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "find_spec", lambda _: None)
    code, out, err = in_process(capsys, *words)
    assert (code, out) == (3, "")
    for name in ("torch", "jax"):
        assert f"{name} is not installed: pip install -e '.[{name}]'" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words", [["study"], ["bench", "small"]], ids=lambda words: words[0])
def test_a_framework_that_is_broken_is_found_before_anything_runs(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jax.py").write_text("raise ImportError('libsomething.so: cannot open')\n")
    code, out, err = in_process(capsys, *words)
    assert (code, out) == (3, "")
    assert "jax cannot be imported (ImportError: libsomething.so: cannot open): pip install -e '.[jax]'" in err
    assert "torch is not" not in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["jax.py"]


def test_a_study_without_what_needs_frameworks(tmp_path, monkeypatch):
    """None is missed."""
    monkeypatch.setattr(supervisor, "find_spec", lambda _: None)
    monkeypatch.setattr(study, "run_study", lambda *_: None)
    monkeypatch.setattr(study, "write", lambda *_: [])
    monkeypatch.setattr(study, "print_study", lambda *_: None)
    assert study.run(study.Command(dispatch=False, json=False, out=tmp_path)) == 0


def test_a_changed_preset_says_how_to_repeat_it():
    command = check.Command(presets=("zipf",), case=check.Flags(dtype="bfloat16"))
    (case,) = check.chosen_cases(command)
    assert presets.command(case) == "python -m parity check zipf --dtype bfloat16"
    assert presets.command(PRESETS["zipf"]) == "python -m parity check zipf"


def test_random_cases_repeat_and_differ():
    def drawn(seed: int) -> list[Case]:
        return check.chosen_cases(check.Command(random=200, case=check.Flags(seed=seed, dtype="bfloat16")))

    cases = drawn(3)
    assert cases == drawn(3)
    assert cases != drawn(4)
    assert len({case.name for case in cases}) == 200
    assert {case.dtype for case in cases} == {"bfloat16"}
    for name in ("ranks", "tokens", "top_k", "pattern", "capacity_per", "priority", "capacity_factor"):
        assert len({getattr(case, name) for case in cases}) > 1, name
    assert {0, 1} <= {case.tokens for case in cases}


def test_the_command_of_any_case_gives_that_case():
    """Parsed as a shell would."""
    cases = [*PRESETS.values(), *check.chosen_cases(check.Command(random=50, case=check.Flags(seed=5)))]
    cases += [changed(PRESETS[name], {"top_k": 1, "dtype": "bfloat16"}) for name in ("zipf", "drop-expert-token")]
    cases += [changed(MODELS["mixtral-8x7b"], {"width": 32}), changed(PRESETS["like-gpt-oss"], {"clamp": None})]
    cases += [changed(PRESETS["drop-rank-score"], {"capacity_factor": None})]
    for case in cases:
        assert check.chosen_cases(parse(shlex.split(presets.command(case))[3:])) == [case]
    assert {case.renormalize for case in cases} == {True, False}


def test_a_path_with_a_space_in_a_command_is_quoted(tmp_path, capsys, monkeypatch):
    """Of a recording, a layer's file, a checkpoint and a folder: the command is copied into a shell."""
    ids = np.arange(8, dtype=np.int32).reshape(8, 1) % 4
    (folder := tmp_path / "it's a place").mkdir()
    save_file({"expert_id": ids}, recording := folder / "a recording.safetensors")
    recorded = ["check", "--recording", str(recording), "--ranks", "2"]
    (case,) = check.chosen_cases(parse(recorded))
    assert check.chosen_cases(parse(shlex.split(presets.command(case))[3:])) == [case]
    checkpoint = shutil.copytree(Path(__file__).parent / "checkpoints" / "gpt_oss", folder / "a checkpoint")
    (case,) = check.chosen_cases(parse(["check", "--checkpoint", str(checkpoint), "--ranks", "2", "--tokens", "4"]))
    assert check.chosen_cases(parse(shlex.split(presets.command(case))[3:])) == [case]
    monkeypatch.setattr(sys, "argv", ["parity", *recorded])
    assert shlex.split(records.header([]).command) == ["python", "-m", "parity", *recorded]

    mine = folder / "my layer.py"
    code, _, err = in_process(capsys, "new", str(mine))
    assert code == 0
    assert shlex.split(err.strip().partition("now: ")[2])[-2:] == ["--backend", str(mine)]
    assert f"--backend {shlex.quote(str(mine))}" in mine.read_text()
    (backend,) = check.chosen_backends([str(mine)])
    assert shlex.split(backend.flag) == ["--backend", str(mine)]
    assert shlex.split(identify.proving(folder / "a case.json", backend))[-4:] == [
        "--case", str(folder / "a case.json"), "--backend", str(mine),
    ]  # fmt: skip
    (empty := folder / "an empty one").mkdir()
    _, _, err = in_process(capsys, "compare", str(empty))
    assert shlex.split(err.partition("`")[2].strip("`\n"))[-1] == str(empty)


def examples(text: str) -> list[str]:
    """Lines of a docstring or a page that are commands of ours."""
    return [line for line in text.splitlines() if re.match(r"\s*python -m parity [a-z]", line)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_question_and_its_examples(name, capsys, monkeypatch):
    """As they are, unbroken on a narrow terminal too; and they are commands."""
    monkeypatch.setenv("COLUMNS", "40")
    doc = inspect.getdoc(COMMANDS[name].Command)
    assert doc
    assert "?" in doc.splitlines()[0]
    code, out, _ = in_process(capsys, name, "--help")
    assert code == 0
    assert examples(doc)
    assert [line.rstrip() for line in examples(out)] == examples(doc)
    assert doc.splitlines()[0] in out
    for example in examples(doc):
        command = re.split(r"\s{2,}", example.strip())[0]  # what it does is said after it
        assert isinstance(parse(shlex.split(command)[3:]), COMMANDS[name].Command)


def test_all_help_has_every_question(capsys):
    code, out, _ = in_process(capsys, "--help")
    assert code == 0
    said = " ".join(out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", "").split())
    for module in COMMANDS.values():
        assert str(module.Command.__doc__).splitlines()[0] in said


def test_a_recording_by_its_old_name():
    assert parse(["check", "--trace", "pydoc"]).case.recording == "pydoc"
    assert parse(["study", "--trace", "a", "b"]).recording == ("a", "b")


def test_help_teaches(capsys):
    code, out, _ = in_process(capsys, "check", "--help")
    assert code == 0
    for word in ("Exit code", "python -m parity check zipf", "--capacity-factor", "P, ranks in the expert-parallel"):
        assert word in out


def test_no_color(report, tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text(report)
    for variable, coloured in (({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)):
        run = subprocess.run(
            [sys.executable, "-m", "parity", "report", str(path)], capture_output=True, text=True,
            env=os.environ | variable, timeout=60,
        )  # fmt: skip
        assert ("\x1b[32m" in run.stdout) == coloured


@pytest.mark.parametrize(("variable", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)])
def test_no_color_in_help(variable, coloured):
    """On a terminal."""
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "parity", "doctor", "--help"]
    with subprocess.Popen(command, stdout=theirs, env=environment | variable) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # which its other end's closing is
            while part := terminal.read(1024):
                shown += part
    assert process.returncode == 0
    assert b"--json" in shown
    assert (b"\x1b[" in shown) == coloured


def test_backends(capsys):
    """This project's, and those of others, whether they are installed or not."""
    code, out, _ = in_process(capsys, "backends", "--json")
    assert code == 0
    found = {line["name"]: line for line in map(json.loads, out.splitlines())}
    assert found.keys() >= {"torch", "jax", "torch-static", "jax-dynamic", "torch-direct", "jax-direct", "megatron",
                            "torchtitan", "maxtext:dense", "transformers:mixtral"}  # fmt: skip
    assert found["maxtext:dense"] == {
        "name": "maxtext:dense", "framework": "jax", "version": "pip install 'moe-parity[maxtext]'",
        "about": "Every expert on every token, on one device.",
        "compared": "output, 5 gradients; not seen: stages 1-8",
    }  # fmt: skip
    assert re.match(r"torch \d", found["torch"]["version"])
    assert all(len(line["about"]) > 5 for line in found.values())
    _, out, _ = in_process(capsys, "backends", "--no-json")
    assert "[maxtext]" in out


def test_doctor(capsys):
    code, out, _ = in_process(capsys, "doctor")
    assert code == 0, out
    for word in ("float32 matmul", "torch", "jax", "x64", "would make a comparison unfair"):
        assert word in out


def test_torchrun(tmp_path):
    """PyTorch uses the group it was given, for a layer of the user's own too."""
    mine = tmp_path / "mine.py"
    mine.write_text((TEMPLATES / "template_in_torch.py").read_text())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "-m", "parity", "check", *SMALL, "--backend", "both", "--backend", mine, "--json"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines[-1]["verdict"] == "match"
    assert {line["left"] for line in lines[2:-1]} == {"torch", "jax", "mine"}


def test_processes_of_jax_that_a_cluster_started(tmp_path):
    """Each runs the command; the first reports, and all end well."""
    mine = tmp_path / "mine.py"
    mine.write_text((TEMPLATES / "template_in_jax.py").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "parity", "check", "k1", "--backend", mine, "--json", "--coordinator", address]
    started = [
        subprocess.Popen([*command, "--ranks", "2", "--processes", "2", "--process", str(i)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=180) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    lines = [json.loads(line) for line in said[0][0].splitlines()]
    assert lines[-1]["verdict"] == "match"
    assert said[1][0] == ""


def test_torchrun_with_another_number_of_ranks(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = in_process(capsys, "check", "zipf")
    assert code == 2
    assert "torchrun started 3 processes, but zipf has --ranks 4: add --ranks 3, or start 4" in " ".join(err.split())
