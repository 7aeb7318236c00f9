"""When a process counts as hanging: the rule, which is fair on a busy machine, and where its numbers come from.

Processes that work together hang when none of them has made a step (begun a stage, finished a case) and either

- for `timeout` seconds all of them were asleep, and none of their threads ran or waited for a CPU; or
- one of them has run for 10 x `timeout` seconds of CPU time: an endless loop, or as good as one.

Time in which a thread waits for a CPU counts for neither, and nor does time in which whoever watches had no turn. So a
busy machine makes a hang be found later on the wall, and never makes one. Before the first step, ranks have 60 s more:
they find each other, and a GPU. What a process starts counts as its own.

Linux says in /proc how long each thread ran, how long it waited for a CPU, and whether it does either right now. Where
there is no /proc (macOS) every second counts as asleep, and the message says that.
"""

import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress

START_UP = 60.0  # seconds more before the first step
TURN = 0.5  # seconds after which whoever watches looks again
RUNNING = 10.0  # times as long a process may run as all of them may sleep
BLIND = not os.path.exists("/proc/self/stat")


def under(*roots: int) -> list[int]:
    """These processes, and all that began under them: their children, theirs, and who else is in a session of one."""
    return _under(list(roots), _parents())


def _parents() -> dict[int, tuple[int, int]]:
    """Of every process its parent, and who leads its session."""
    found = {}
    for name in [] if BLIND else filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            fields = _stat(f"/proc/{name}/stat")
            found[int(name)] = (int(fields[1]), int(fields[3]))
    return found


def _under(found: list[int], parents: dict[int, tuple[int, int]]) -> list[int]:
    for leader in found:  # which grows
        found += [pid for pid, above in parents.items() if leader in above and pid not in found]
    return found


class Patience:
    """How much of their time limit some processes have used up since the last step, by the rule above."""

    def __init__(self, pids: Iterable[int], asleep: float, running: float | None = None) -> None:
        self.pids = list(pids)
        self.limits = (asleep, RUNNING * asleep if running is None else running)
        self.used = self._used()
        self.then = time.monotonic()
        self.start_up = START_UP
        self.asleep, self.ran = 0.0, dict.fromkeys(self.pids, 0.0)

    def step(self) -> None:
        """A process has made a step."""
        self.asleep, self.ran, self.start_up = 0.0, dict.fromkeys(self.pids, 0.0), 0.0

    def tick(self) -> None:
        """Count the time since the last tick, but at most one turn: in the rest, this process had no turn itself."""
        now = time.monotonic()
        passed, self.then = min(TURN, now - self.then), now
        before, self.used = self.used, self._used()
        busy = 0.0
        for pid, used in self.used.items():
            ran, waited, awake = used.since(before[pid])
            self.ran[pid] += min(passed, ran)  # a second is a second, on however many CPUs
            busy += passed if awake else ran + waited
        self.asleep += max(0.0, passed - busy)

    def _used(self) -> dict[int, "_Used"]:
        parents = _parents()
        return {pid: _Used(_under([pid], parents)) for pid in self.pids}

    @property
    def seconds(self) -> float:
        """The seconds used so far: those that all were asleep, plus those that the longest-running one ran."""
        return self.asleep + max(self.ran.values(), default=0.0)

    def over(self) -> str:
        """Why the processes hang, or an empty string."""
        asleep, running = self.limits
        if self.asleep > asleep + self.start_up:
            blind = " of wall-clock time (there is no /proc to read CPU time from)" if BLIND else ""
            return f"no rank made progress for {asleep:g} s{blind}"
        if max(self.ran.values(), default=0.0) > running + self.start_up and running < math.inf:
            return f"no rank made progress in {running:g} s of CPU time"
        return ""


class _Used:
    """CPU time so far of a process and all under it: how long threads ran, and how long they waited for a CPU."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.threads: dict[int, tuple[float, float]] = {}
        self.in_all = 0.0  # by a coarser clock, with threads and children that are gone
        self.awake = False
        for pid in () if BLIND else pids:
            with suppress(OSError):  # it has ended
                self._add(pid)

    def _add(self, pid: int) -> None:
        self.in_all += sum(map(int, _stat(f"/proc/{pid}/stat")[11:15])) / os.sysconf("SC_CLK_TCK")
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                self.awake |= _stat(f"/proc/{pid}/task/{thread}/stat")[0] == "R"
                with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                    ran, waited, _ = file.read().split()
                self.threads[int(thread)] = (int(ran) / 1e9, int(waited) / 1e9)

    def since(self, before: "_Used") -> tuple[float, float, bool]:
        """Seconds run, seconds waited, and whether a thread runs or waits now."""
        pairs = [(new, before.threads.get(thread, (0.0, 0.0))) for thread, new in self.threads.items()]
        ran, waited = (sum(max(0.0, new[i] - old[i]) for new, old in pairs) for i in range(2))
        return max(ran, self.in_all - before.in_all), waited, self.awake


def _stat(path: str) -> list[str]:
    """The fields after the name, which may hold anything."""
    with open(path) as file:
        return file.read().rsplit(")", 1)[1].split()
