"""How this process ends on a signal: soon, with nothing left running and no folder left behind.

A signal raises an exception in the main thread, which leaves its blocks. But it may be in a long computation, or wait
for threads that are: a thread watches, and ends what did not end by itself.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parity.run.patience import under
from parity.run.supervisor import end_all

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SOON = 1.0  # seconds until the thread takes over
SAID = "stopped; nothing is left running"

_folders: set[str] = set()


class Told(KeyboardInterrupt):
    """To end, by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number  # as a shell has it


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, however this process is told to end."""
    with tempfile.TemporaryDirectory(prefix="parity-", ignore_cleanup_errors=True) as name:
        _folders.add(name)
        try:
            yield Path(name)
        finally:
            _folders.discard(name)


def end_when_told() -> None:
    """From now on, of the main thread's process: raise `Told` there, and end soon in any case."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where it is ignored
            signal.signal(number, _raise)
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), daemon=True).start()


def _raise(number: int, _: object) -> None:
    raise Told(number)


def _watch(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in SIGNALS:
        pass
    time.sleep(SOON)
    end_now(128 + number)


def end_now(code: int) -> None:
    """End without leaving any block: others may be in them, and wait."""
    end_all(*(pid for pid in under(os.getpid()) if pid != os.getpid()))
    for name in [*_folders]:
        shutil.rmtree(name, ignore_errors=True)
    os.write(2, f"{SAID}\n".encode())
    os._exit(code)
