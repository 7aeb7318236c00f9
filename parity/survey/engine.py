"""Run a survey: each layer in a process of its own, a few at a time, a line appended for each dtype as it comes."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from parity.run.backend import Backend
from parity.run.ours import find
from parity.run.supervisor import TURN, Process
from parity.survey.layers import FAMILIES, Known, stored
from parity.survey.one import versions
from parity.survey.records import LINES, Surveyed

MAPPING = 600.0  # seconds of CPU that mapping all blocks of transformers may take


def known(names: Sequence[str]) -> dict[str, Known]:
    """By name, what is known of layers before they run; of blocks of transformers their parameters, as they map."""
    found = {name: Known(name, stored=stored(name)) for name in names if not name.startswith(FAMILIES)}
    by_python: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(FAMILIES):
            by_python.setdefault(find(name).python, []).append(name)
    for python, layers in by_python.items():
        blocks = [name.removeprefix(FAMILIES).partition("@")[0] for name in layers]
        command = [python or sys.executable, "-m", "parity.published.families", *blocks]
        with Process(command, environment=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            lines = [msgspec.json.decode(line, type=Known) for line in process.lines(MAPPING) if line.startswith("{")]
        by_block = {one.name: one for one in lines}
        lost = Known("", process.error.strip().splitlines()[-1] if process.error else "whoever maps it ended")
        found |= {name: by_block.get(block, lost) for name, block in zip(layers, blocks, strict=True)}
    return found


def run(
    names: Sequence[str], dtypes: Sequence[str], folder: Path, jobs: int, limit: float, about: dict[str, Known]
) -> Iterator[Surveyed]:
    """Survey these layers, `limit` seconds each at most; yield each layer in each dtype once its line is written.

    Whatever happens, no process is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if not about[name].why]
    with ExitStack() as stack, (folder / LINES).open("ab") as file:

        def written(one: Surveyed) -> Surveyed:
            one.stored, one.states = about[one.layer].stored, about[one.layer].states
            file.write(msgspec.json.encode(one) + b"\n")
            file.flush()
            return one

        for name in names:
            if about[name].why:
                yield from (written(_without(name, dtype, about[name].why)) for dtype in dtypes)
        running: dict[Process, tuple[str, list[str]]] = {}  # and the dtypes that are still to come
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                command = [sys.executable, "-m", "parity.survey.one", name, str(folder), *dtypes]
                process = stack.enter_context(Process(command, environment=os.environ | {"OMP_NUM_THREADS": "1"}))
                running[process] = (name, list(dtypes))
            heard = wait([process.stdout for process in running], TURN)
            for process, (name, coming) in list(running.items()):
                for line in process.read() if process.stdout in heard else ():
                    one = msgspec.json.decode(line, type=Surveyed)
                    coming.remove(one.dtype)
                    yield written(one)
                process.patience.tick()
                if not process.ended and process.patience.seconds > limit:
                    process.end()
                    process.error = f"stopped after {limit:g} s"
                if process.ended:
                    del running[process]
                    why = process.error.strip()[-500:] or "it ended without a word"
                    yield from (written(_without(name, dtype, why)) for dtype in coming)


def _without(name: str, dtype: str, why: str) -> Surveyed:
    backend: Backend = find(name)
    return Surveyed(name, dtype, backend.framework, versions((backend.framework, *backend.needs)), why=why)
