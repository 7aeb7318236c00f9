"""Processes are watched and ended, whatever they do: here small ones, without a framework. `patience` has the rule."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from parity.cases.case import Case
from parity.run import patience
from parity.run.backend import Backend, BackendError, Setting
from parity.run.patience import Patience, under
from parity.run.ranks import _raised_at
from parity.run.supervisor import READING, WRITING, Failure, Process, run

ROOT = Path(__file__).parent.parent
NAMES = ("a", "b", "c")

# Three ranks, which go from case to case together. What rank 1 does in case b, or `everywhere`, is put in.
FAKE = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from parity.run import patience
from parity.run.ranks import run_cases

patience.START_UP = 1.0

def run(backend, folder, setting):
    run_cases(backend, folder, sorted(folder.glob("*.problem")), 3, setting.timeout, rank)

def rank(rank, notes, own, paths):
    {start}
    for path in paths:
        notes.at(path.stem, "the first step")
        send_tokens(rank, path.stem)
        notes.at(path.stem, "waiting")
        (own / f"{{path.stem}}-{{rank}}").touch()
        while len(list(own.glob(f"{{path.stem}}-*"))) < 3:
            time.sleep(0.02)
        if rank == 0:
            notes.done(path.stem)

def send_tokens(rank, case):
    if rank == 1 and ({everywhere} or case == "b"):
        {line}
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Any]:
    """Write the module above, and run its cases: what was answered for each."""

    def answers(line: str = "pass", *, start: str = "pass", everywhere: bool = False, timeout: float = 1.0) -> list:
        home = write_fake(tmp_path, line, start, everywhere)
        seconds: dict[str, float] = {}
        cases = [Case(name) for name in NAMES]
        found = list(run(home, {"fake": home}, [BACKEND], cases, Setting(timeout=timeout), seconds))
        assert seconds["fake"] > 0
        assert [backend for backend, _, _ in found] == ["fake"] * len(found)
        return sorted(
            ((case, failure) for _, case, failure in found), key=lambda answer: answer[0]
        )  # a case may be run again after a failure

    return answers


BACKEND = Backend("fake", "fake", "opaque", ("e2e/combine/out",), run="fake:run")


def write_fake(folder: Path, line: str, start: str = "pass", everywhere: bool = False) -> Path:
    """A folder to run from, with its problems in it."""
    (folder / "fake.py").write_text(FAKE.format(line=line, start=start, everywhere=everywhere))
    for package in ("parity", "torch_impl", "jax_impl"):
        (folder / package).symlink_to(ROOT / package)
    for name in NAMES:
        (folder / f"{name}.problem").touch()
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of what a test started; other tests' processes may be there."""
    before = under(os.getpid())
    yield
    assert alive([pid for pid in under(os.getpid()) if pid not in before]) == []


@contextmanager
def busy(n: int) -> Iterator[None]:
    """A machine with `n` other things to do."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def wait_until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        found += [pid] * (state != "Z")
    return found


def test_all_is_well(fake):
    assert fake() == [("a", None), ("b", None), ("c", None)]


FAILURES = {
    "raises": ("raise RuntimeError('no more')",
               r"failed in send_tokens of case b \(fake.py:\d+\): RuntimeError: no more"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL in the first step of case b"),
    "exits": ("os._exit(5)", "ended with exit code 5 in the first step of case b"),
    "sleeps": ("time.sleep(600)", r"hangs in send_tokens of case b \(fake.py:\d+\): no rank made progress for 0.5 s; "
               "the other ranks are in waiting of case b"),
    "locked": ("lock = threading.Lock(); lock.acquire(); lock.acquire()",
               r"hangs in send_tokens of case b \(fake.py:\d+\): no rank made progress for 0.5 s"),
    "loops": ("while True: pass", r"hangs in send_tokens of case b \(fake.py:\d+\): no rank made progress in 5 s of"),
    "child": ("subprocess.run(['sleep', '600'])", "hangs in send_tokens of case b"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "hangs in the first step of case b"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "load"),
    [(what, 0) for what in FAILURES]
    + [pytest.param(what, 4, marks=pytest.mark.slow, id=f"{what}-busy") for what in ("sleeps", "locked", "loops")],
)
def test_a_failure_ends_its_case_only_and_is_named(fake, what, load):
    line, said = FAILURES[what]
    with busy(load):
        (_, a), (_, failure), (_, c) = found = fake(line, timeout=0.5)
    assert [case for case, _ in found] == ["a", "b", "c"]
    assert a is c is None
    assert re.match(f"fake: rank 1 of 3 {said}", str(failure)), failure
    assert (failure.case, failure.rank, failure.ranks, failure.raised) == ("b", 1, 3, what == "raises")


def test_a_busy_machine_is_no_hang(fake):
    """Each case computes for longer than the patience there is, with a third of a CPU for it."""
    work = "end = time.thread_time() + 1.5\n        while time.thread_time() < end: pass"
    with busy(4):
        assert fake(work, everywhere=True, timeout=0.5) == [("a", None), ("b", None), ("c", None)]


def test_the_earliest_exception_is_the_cause(fake):
    """Rank 0 raises as rank 1 is gone."""
    line = "(Path(sys.argv[1]) / 'gone').touch(); raise ValueError('first')"
    start = (
        "Path.glob_, own_ = Path.glob, own.parent\n"
        "    if rank == 0:\n"
        "        def glob(self, pattern):\n"
        "            if (own_ / 'gone').exists(): time.sleep(0.05); raise OSError('connection closed by peer')\n"
        "            return Path.glob_(self, pattern)\n"
        "        Path.glob = glob\n"
        "    if (own_ / 'gone').exists(): (own_ / 'gone').unlink()"
    )
    said = str(fake(line, start=start)[1][1])
    assert re.search(r"rank 1 of 3 failed in send_tokens of case b \(fake.py:\d+\): ValueError: first$", said)


def test_after_two_hangs_no_more_is_tried(fake):
    first, second, third = (failure for _, failure in fake("time.sleep(600)", everywhere=True, timeout=0.5))
    assert [failure.how for failure in (first, second, third)] == ["hangs", "hangs", "was not run"]
    assert str(third) == "fake: was not run in case c: 2 cases before it died or hung"


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("raise OSError('no network')", r"fake: rank \d of 3 failed in start-up \(fake.py:\d+\): OSError: no network"),
        (
            "time.sleep(600 * (rank == 2))",
            r"fake: rank 2 of 3 hangs in start-up \(fake.py:\d+\): no rank made progress",
        ),
    ],
)
def test_ranks_that_do_not_even_start_are_the_end(fake, start, said):
    with pytest.raises(BackendError, match=said):
        fake(start=start)


def test_what_was_written_before_is_another_groups(fake, tmp_path):
    """As two groups of a run, or two runs, would meet it."""
    for folder in ("fake-1", "fake-2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "error-0.json").write_text("{}")
        (tmp_path / folder / "done").write_text("a\nb\n")
    assert fake() == [("a", None), ("b", None), ("c", None)]


def test_what_libraries_print_is_no_answer(fake):
    assert fake("""print('["c", null]', flush=True); os.write(1, b'no newline')""")[1:] == [("b", None), ("c", None)]


def test_a_worker_that_is_killed(fake):
    with pytest.raises(BackendError, match="fake: was ended by SIGKILL"):
        fake("os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)")


RUN = """
import os, sys
from pathlib import Path
from parity.cases.case import Case
from parity.run.backend import Backend, Setting
from parity.run.supervisor import run
backend = Backend("fake", "fake", "opaque", ("e2e/combine/out",), run="fake:run")
here = Path.cwd()
for answer in run(here, {"fake": here}, [backend], [Case(name) for name in "abc"], Setting(), {}):
    print(answer[1], flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_when_whoever_started_it_ends(tmp_path, sent):
    """Ranks in an endless sleep, one with a child of its own."""
    home = write_fake(tmp_path, "subprocess.run(['sleep', '600'])")
    with subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as by:
        assert by.stdout is not None
        assert by.stdout.readline() == b"a\n"
        wait_until(lambda: len(under(by.pid)) == 1 + 1 + 3 + 1)
        started = under(by.pid)
        by.send_signal(sent)
    wait_until(lambda: not alive(started))


def test_a_child_is_ended_with_the_rank_that_left_it(fake, tmp_path):
    line = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', os.getcwd()])"
    assert fake(line)[1] == ("b", None)
    mark = b"\x00" + os.fsencode(tmp_path) + b"\x00"
    wait_until(lambda: not any(_bytes(path).endswith(mark) for path in Path("/proc").glob("[0-9]*/cmdline")))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("module", ["worker", "by end_with_parent alone"])
@pytest.mark.parametrize("given", ["</dev/null", "<&-", "< <(true)"])
def test_started_by_hand_it_ends_nothing_of_its_callers(tmp_path, given, module):
    """The shell's job: without job control, as of a script, in the shell's own group."""
    home = write_fake(tmp_path, "pass")
    work = "import time; from parity.run.supervisor import end_with_parent; end_with_parent(); time.sleep(0.3)"
    command = f"-c '{work}'" if module != "worker" else "-m parity.run.worker . '{}' '{}'"  # which are no records
    script = f"{sys.executable} {command} {given} 2>/dev/null; echo survived"
    shell = subprocess.run(
        ["bash", "-c", script], cwd=home, stdout=subprocess.PIPE, text=True, timeout=60, start_new_session=True
    )
    assert shell.stdout.endswith("survived\n")


def test_a_pool_ends_with_its_parent_and_on_an_error(tmp_path):
    (tmp_path / "work.py").write_text(
        "import sys, time\nfrom parity.run.supervisor import pool\n"
        "if __name__ == '__main__':\n"
        "    with pool(2) as executor:\n"
        "        jobs = [executor.submit(time.sleep, 600) for _ in range(2)]\n"
        "        print('started', flush=True)\n"
        "        if sys.argv[1:]: time.sleep(1); raise ValueError\n"
        "        jobs[0].result()\n"
    )
    for arguments in ([], ["fail"]):
        command = [sys.executable, "work.py", *arguments]
        with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=-3) as process:
            wait_until(lambda pid=process.pid: len(under(pid)) >= 3)
            started = under(process.pid)
            if not arguments:
                process.kill()
        wait_until(lambda pids=started: not alive(pids))


def test_a_command_that_fails_says_why():
    for program, error in (("exit(3)", "ended with exit code 3"), ("exit('no')", "no"), ("print(1)", "")):
        with Process([sys.executable, "-c", program]) as process:
            lines = list(process.lines())
        assert process.error == error
        assert lines == ["1"] * (error == "")


def test_a_command_may_have_a_limit_of_its_own_seconds():
    for program in ("while True: pass", "import time; time.sleep(600)", "while True: print(1)"):
        with Process([sys.executable, "-c", program]) as process:
            list(process.lines(limit=1))
        assert process.error == "stopped after 1 s"


def spent(program: str, seconds: float) -> Patience:
    with Process([sys.executable, "-c", program]) as process:
        assert process.stdout.readline() == b"\n"
        watched = Patience([process.popen.pid], asleep=1.0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            watched.tick()
    return watched


@pytest.mark.parametrize("load", [0, pytest.param(4, marks=pytest.mark.slow)], ids=["idle", "busy"])
def test_waiting_for_a_cpu_is_no_sleep(load):
    with busy(load):
        running = spent("print(flush=True)\nwhile True: pass", 3)
        asleep = spent("import time; print(flush=True); time.sleep(600)", 3)
    assert running.asleep < 0.3
    assert 0 < max(running.ran.values()) < 3.1
    assert asleep.asleep > 2
    assert max(asleep.ran.values()) < 0.1


def test_without_proc_the_clock_on_the_wall_counts(monkeypatch):
    monkeypatch.setattr(patience, "BLIND", True)
    watched = Patience([os.getpid()], asleep=0.1, running=math.inf)
    watched.step()
    time.sleep(0.2)
    watched.tick()
    assert (
        watched.over() == "no rank made progress for 0.1 s of wall-clock time (there is no /proc to read CPU time from)"
    )


def test_whoever_watches_and_has_no_turn_counts_one_at_most(monkeypatch):
    watched = Patience([os.getpid()], asleep=5)
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 1000)
    watched.tick()
    assert watched.asleep <= patience.TURN


def test_a_failure_in_words():
    failure = Failure("torch", "zipf", 2, "send_tokens", "RuntimeError: no more", 4, line="exchange.py:71")
    said = "torch: rank 2 of 4 failed in send_tokens of case zipf (exchange.py:71): RuntimeError: no more"
    assert str(failure) == said
    one = Failure(
        "jax", "zipf", 0, "compiling the first step", "no rank made progress for 9 s", how="hangs", line="a.py:1"
    )
    assert str(one) == "jax: hangs in compiling the first step of case zipf (a.py:1): no rank made progress for 9 s"


def test_where_no_layer_runs_none_is_to_blame():
    """A disk may be full: that is no mismatch."""
    for stage, raised in ((READING, False), (WRITING, False), ("send_tokens", True)):
        assert Failure("torch", "zipf", 2, stage, "ValueError: cannot write", 4).raised is raised


HARNESS, LIBRARY = ("/a/parity/run/torch_stages.py", 7, "run"), ("/v/site-packages/their/moe.py", 8, "forward")


@pytest.mark.parametrize(
    ("stack", "line"),
    [
        ([LIBRARY, ("/home/mine.py", 9, "layer"), HARNESS], "mine.py:9"),
        ([LIBRARY, HARNESS], "moe.py:8"),  # a published layer's
        ([HARNESS], "torch_stages.py:7"),  # which was called with what it does not take
        ([("<string>", 1, "f"), HARNESS], "torch_stages.py:7"),
        ([], ""),
    ],
)
def test_every_exception_has_a_line(stack, line):
    assert _raised_at(stack) == line
