"""`python -m parity capture`."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from parity.capture import measure as capture
from parity.cli.shared import MATCH, MISMATCH, Json, Page, check_writable, not_a_terminal, say
from parity.judge.engine import progress


@dataclass
class Command:
    """What does a compiler see of the dispatch as the number of ranks grows? One symbol, or a sum of P of them?

    Captures stages 3, 4, 5, 7 and 8, forward and backward, without running them, for each way to size the permute:
        none            ask the device
        list_sum        sum a list of splits
        received_shape  take the number of rows of the array that arrived
        cpu_tensor_sum  sum the splits as a CPU tensor; the exchange still takes lists
        torch_impl      this project's: as cpu_tensor_sum, and the exchange takes no list either
        shard_map, vmap   JAX, whose sizes are static

    Exit code: 0 when torch_impl, if asked for, has one symbol at every P; 1 otherwise.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity capture
        python -m parity capture --ranks 4 64 1024 --ways list_sum torch_impl --no-inductor --json
    """

    ranks: tuple[int, ...] = (4, 16, 64)
    """Numbers of ranks P to capture for. No other rank is started."""
    ways: tuple[capture.Way, ...] = capture.WAYS
    """Ways to size the permute, as listed above."""
    inductor: bool = True
    """Compile with Inductor too. This takes most of the time."""
    timeout: float = 600
    """Seconds after which a measurement is stopped; what it has found by then is reported."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, the default when output is not a terminal; --no-json prints the table."""
    plot: Path | None = None
    """File to draw the number of terms of the permute's size and the compile time against P in (.png, .svg, .pdf)."""


def run(command: Command) -> int:
    """Run `capture`; its exit code.

    Raises ValueError on a number of ranks below 2.
    """
    check_writable(command.plot)
    if not command.ranks or min(command.ranks) < 2:
        raise ValueError(f"--ranks {' '.join(map(str, command.ranks))}: give numbers of 2 or more, as 4 64")
    wanted: list[tuple[int, capture.Way]] = [(P, way) for P in command.ranks for way in command.ways]
    found: list[capture.Measured] = []
    with progress() as bar:
        task = bar.add_task("capture", total=len(wanted))
        for P, way in wanted:
            bar.update(task, description=f"P = {P}, {way}")
            found.append(capture.measured(P, way, command.inductor, command.timeout))
            bar.advance(task)
            if command.json:
                print(msgspec.json.encode(found[-1]).decode(), flush=True)
    if not command.json:
        console = Page(160)
        versions = sorted({f"{m.framework} {m.version}" for m in found if m.version})
        console.print(capture.table(found), capture.LEGEND, "\n" + ", ".join(versions))
    if command.plot:
        capture.plot(found, command.plot)
        say(f"wrote {command.plot}")
    own = [m for m in found if m.way == "torch_impl"]
    return MATCH if all(m.permute_terms == m.permute_terms_backward == 1 for m in own) else MISMATCH
