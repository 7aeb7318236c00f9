"""A warm process is like one that starts from nothing, but for what is imported already; see `warm`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only where the system has pidfd")

PROBE = """
import json, os, sys, time
warm = "torch" in sys.modules and "jax" in sys.modules
import beside
environment = {name: os.environ.get(name) for name in ("ASKED", "HOME", "OMP_NUM_THREADS", "PYTHONPATH")}
print(json.dumps([sys.argv, sys.path, os.getcwd(), environment, beside.__file__, __name__, sys.stdin.read()]))
print(warm, os.getpid(), file=sys.stderr, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit({"7": 7, "words": "some words"}.get(sys.argv[1], 0))
"""
HEARD = "what it reads"


@pytest.fixture
def probe(tmp_path, monkeypatch) -> list[str]:
    """A program on the path, and a module in the folder that it runs in."""
    (here := tmp_path / "here").mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    (here / "beside.py").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ASKED", "for this")
    return ["-m", "probe"]


@pytest.mark.parametrize("asked", ["0", "7", "words"])
def test_it_is_the_same(warm_python, probe, asked):
    warm, cold = (
        subprocess.run([python, *probe, asked], input=HEARD, capture_output=True, text=True)
        for python in (warm_python, sys.executable)
    )
    assert json.loads(warm.stdout) == json.loads(cold.stdout)
    assert warm.returncode == cold.returncode == {"7": 7, "words": 1}.get(asked, 0)
    assert (warm.stderr.split()[0], cold.stderr.split()[0]) == ("True", "False")
    assert warm.stderr.split()[2:] == cold.stderr.split()[2:] == ["some", "words"] * (asked == "words")


@pytest.mark.parametrize("other", ["sitecustomize.py", "here/torch.py"])
def test_what_would_be_imported_instead_is(warm_python, probe, tmp_path, other):
    (tmp_path / other).touch()
    run = subprocess.run([warm_python, *probe, "0"], input="", capture_output=True, text=True)
    assert run.stderr.split()[0] == "False"


def test_what_it_read_from_the_environment_it_reads_anew(warm_python, probe):
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    run = subprocess.run([warm_python, *probe, "0"], input="", capture_output=True, text=True, env=environment)
    assert run.stderr.split()[0] == "False"


def test_what_is_ended_ends(warm_python, probe):
    with subprocess.Popen([warm_python, *probe, "wait"], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.close()
        warm, pid = process.stderr.readline().split()
        assert warm == "True"
        assert int(pid) != process.pid
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
