"""`python -m parity identify`."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tyro

from parity.cases.case import Case
from parity.cases.files import writing
from parity.cli.check import BACKEND_HELP, MODEL_HELP, Flags, chosen_backends, named_cases, ranks_of_jax, require_of
from parity.cli.shared import MATCH, MISMATCH, Json, Page, check_writable, not_a_terminal, say, working
from parity.explain.identify import identify, small_cases
from parity.judge import records
from parity.judge.card import Card
from parity.report.card import print_cards
from parity.run.backend import Backend, Setting


@dataclass
class Command:
    """What is this layer? Finds out from its outputs alone, on inputs chosen for that.

    Finds the score function, renormalisation, scale, groups, activation, layout of gate and up, clamps, biases, shared
    expert, ties, precision, order of sums, dropped rows and gradients, and says how sure each finding is and which
    experiment shows it. All findings of a layer are its card. Ends with a case that states them, in which output and
    gradients are checked: if they match, the card is proved. For two backends, prints two cards side by side,
    differences first.

    Exit code: 0 every card is proved, 1 one is not, 2 wrong usage, 3 a framework is missing, or the layer does not run.
    Every command: 70 a bug of the harness, 130 stopped by Ctrl-C.

    Examples:
        python -m parity identify --backend mine.py
        python -m parity identify --backend mine.py --backend transformers:qwen3_moe
        python -m parity identify --model deepseek-v3 --width 48 --hidden 24 --backend mine.py
        python -m parity identify --backend mine.py --write case.json    for `check --case case.json --backend mine.py`
    """

    preset: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PRESET]")] = ()
    """Preset whose sizes and options the layer is asked with.
    Default, without any field: the first small case that the layer computes, plain or with a model's options."""
    case: Annotated[Any, tyro.conf.arg(name="", constructor=Flags)] = field(default_factory=Flags)
    backend: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help=BACKEND_HELP)] = ()
    model: Annotated[tuple[str, ...], tyro.conf.arg(help=MODEL_HELP)] = ()
    write: Path | None = None
    """File to write the case that was found to, for `python -m parity check --case FILE`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to run on."""
    jax_ranks: Literal["auto", "shard_map", "processes", "vmap"] = "auto"
    """Placement of JAX's ranks, as in `python -m parity check --help`."""
    timeout: float = 60
    """Seconds without progress after which a run is stopped, as in `python -m parity check --help`."""
    json: Json = field(default_factory=not_a_terminal)
    """JSON lines, one per card, the default when output is not a terminal; --no-json prints the table."""


def run(command: Command) -> int:
    """Run `identify`; its exit code."""
    backends = chosen_backends(command.backend)
    check_writable(command.write)
    if command.write and len(backends) > 1:
        raise ValueError("--write writes the case of one layer: name one --backend")
    asked = asked_case(command)
    require_of(backends)
    bases = [asked] if asked else small_cases()
    ranks = ranks_of_jax(command.jax_ranks, command.device, max(case.ranks for case in bases))
    setting = Setting(command.device, ranks, command.timeout)
    cards = []
    with working("") as say_that:
        for backend in backends:
            cards.append(identify(backend, bases, setting, tell=say_that))
    if command.write:
        with writing(command.write):
            command.write.write_bytes(msgspec.json.format(msgspec.json.encode(cards[0].case)))
        cards[0] = msgspec.structs.replace(cards[0], command=proving(command.write, backends[0]))
    publish_cards(cards, command.json)
    if command.write:
        say(f"wrote {command.write}")
    return MATCH if all(card.proved for card in cards) else MISMATCH


def publish_cards(cards: list[Card], as_json: bool) -> None:
    """Print cards, as lines of JSON or for people."""
    if as_json:
        print("\n".join(map(records.encode, cards)))
    else:
        print_cards(Page(150), cards)


def proving(path: Path, backend: Backend) -> str:
    """The command that proves a card which was written."""
    return f"python -m parity check --case {shlex.quote(str(path))} {backend.flag}"


def asked_case(command: Command) -> Case | None:
    """The case that was named; None where none was. Raises ValueError where it is several."""
    given = command.preset or command.model or any(value is not None for value in vars(command.case).values())
    if not given:
        return None
    cases = named_cases(command.preset, command.case, command.model)
    if len(cases) > 1:
        raise ValueError(f"a layer is asked in one case, and {len(cases)} are named: name one preset or model")
    return cases[0]
