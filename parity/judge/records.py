"""A report as JSON Lines: a header, for each case what it looked like and every comparison, and a footer.

A report without a footer comes from a run that did not end, and is refused.
"""

import lzma
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import msgspec

from parity.cases.case import Case
from parity.cases.pairs import covered
from parity.cases.presets import PRESETS
from parity.judge.blame import Blame, blame
from parity.judge.card import Card, Finding
from parity.judge.compare import Check, Row, Where
from parity.judge.picture import Magnitude, Picture
from parity.run.backend import Backend
from parity.run.ours import BACKENDS

SCHEMA = 2


class Header(msgspec.Struct, tag_field="kind", tag="header"):
    """What was run, and where."""

    schema: int
    """Version of this format, 2."""
    command: str
    """The command that wrote the report."""
    began: str
    """When the run began, in UTC, ISO 8601."""
    machine: dict[str, str]
    """Versions of packages and of Python, and the platform."""
    planted: str = ""
    """The planted fault's name; empty without one."""
    backends: list[Backend] = []
    """What was compared, one entry per backend."""


class CaseRecord(msgspec.Struct, tag_field="kind", tag="case"):
    """One case: what it is, the command that repeats it, who ran it, and what it looked like."""

    case: Case
    """Sizes, options and seed, from which all inputs are drawn."""
    command: str
    """The command that repeats this case alone."""
    seconds: dict[str, float]
    """Seconds that each backend took, by backend."""
    environment: dict[str, dict[str, str]]
    """What each backend says of its devices, versions and settings, by backend."""
    picture: Picture
    """Counts and errors in a form small enough to draw."""
    not_supported: dict[str, str] = {}
    """Why a backend does not compute the case, by backend."""
    unreached: list[str] = []
    """Sides of a clamp that no expert's gate or up reaches."""
    noted: list[str] = []
    """Remarks on the case's inputs."""
    beside: dict[str, Blame | None] = {}
    """The first divergence of each backend from the oracle, by backend, under `--between`; null where it matches."""


class Footer(msgspec.Struct, tag_field="kind", tag="footer"):
    """The verdict, and how much it rests on."""

    verdict: Literal["match", "mismatch", "nothing compared"]
    """Whether everything compared was within its allowance."""
    exit_code: int
    """The exit code of the run: 0, 1 or 5."""
    cases: int
    """Number of cases."""
    comparisons: int
    """Number of arrays compared."""
    rows: int
    """Number of rows compared."""
    bitwise: int
    """Number of those rows that had to be equal bit for bit."""
    failing: int
    """Number of comparisons that fail."""
    seconds: dict[str, float]
    """Seconds by part of the run; parts overlap, `in all` is wall time."""
    pairs: int = 0
    """Number of pairs of values of two fields that occur in some case."""
    pairs_missing: list[str] = []
    """Pairs of values that occur in no case, if there are many cases."""


MANY = 10  # with this many cases or more, the report counts the pairs of values that they have

_KINDS = {
    kind.__name__: kind
    for kind in (Header, CaseRecord, Check, Where, Row, Picture, Magnitude, Blame, Card, Finding, Backend, Footer)
}
Record = Header | CaseRecord | Check | Blame | Card | Footer


class Report(msgspec.Struct):
    """A whole run."""

    header: Header
    cases: dict[str, CaseRecord]
    checks: dict[str, list[Check]]
    footer: Footer
    cards: dict[str, list[Card]] = {}  # by case: cards of layers that fail in it and give no stages

    @property
    def backends(self) -> dict[str, Backend]:
        """The backends that ran, by name."""
        return {backend.name: backend for backend in self.header.backends}

    def blamed(self, case: str) -> Blame | None:
        """The first divergence of a case, or None when all of it matches."""
        return blame(self.checks[case], self.backends)

    def verdicts(self, case: str) -> list[Blame]:
        """The first divergence of a case; of layers of one's own, that of each, as each is wrong in its own way."""
        first = self.blamed(case)
        if first is None or first.check.right in first.backends:
            return [] if first is None else [first]
        if all(backend.layout != "opaque" for backend in self.backends.values()):
            return [first]
        alone = {name: [c for c in self.checks[case] if c.left == name and c.right not in self.backends]
                 for name in self.backends}  # fmt: skip
        return [found for name, checks in alone.items() if (found := blame(checks, {name: self.backends[name]}))]


def header(backends: Iterable[Backend], planted: str = "") -> Header:
    """The header of a run that begins now."""
    packages = ("moe-parity", "torch", "jax", "jaxlib", "numpy")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    machine = {name: installed[name] for name in packages if name in installed}
    machine |= {"python": platform.python_version(), "platform": platform.platform()}
    command = shlex.join(["python", "-m", "parity", *sys.argv[1:]])
    return Header(SCHEMA, command, datetime.now(UTC).isoformat(timespec="seconds"), machine, planted, list(backends))


def footer(
    head: Header, records: dict[str, CaseRecord], checks: dict[str, list[Check]], cases: int, seconds: dict[str, float]
) -> Footer:
    """The verdict over all comparisons; a case in which nothing was compared is no match.

    A case that a backend does not support is skipped, but each backend must support some case.
    """
    everything = [c for found in checks.values() for c in found]
    compared = len(checks) == cases and all(
        sum(c.rows for c in found) or not records[name].seconds for name, found in checks.items()
    )
    compared &= all(any(backend.name in record.seconds for record in records.values()) for backend in head.backends)
    failing = sum(not c.ok for c in everything)
    verdict, code = ("mismatch", 1) if failing else ("match", 0) if compared and checks else ("nothing compared", 5)
    rows, bitwise = sum(c.rows for c in everything), sum(c.rows for c in everything if c.bitwise)
    pairs, missing = (
        covered((record.case for record in records.values()), PRESETS.values()) if len(records) >= MANY else (0, [])
    )
    return Footer(verdict, code, len(checks), len(everything), rows, bitwise, failing, seconds, pairs, missing)


def encode(record: Record) -> str:
    """Encode a record as one line. JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan"."""
    return msgspec.json.encode(_with_strings(msgspec.to_builtins(record))).decode()


def _with_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_strings(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def lines(report: Report) -> list[str]:
    """The lines of the whole report, one record each."""
    return [
        encode(report.header),
        *(
            line
            for name, record in report.cases.items()
            for line in (
                encode(record),
                *map(encode, report.checks[name]),
                *map(encode, filter(None, [report.blamed(name)])),
                *map(encode, report.cards.get(name, ())),
            )
        ),
        encode(report.footer),
    ]


def read(path: Path) -> Report:
    """A report from its file, which may be compressed (.xz).

    Raises ValueError when the file is no report, has another schema, or is incomplete.
    """
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            records = [msgspec.convert(upgraded(msgspec.json.decode(line)), Record, strict=False) for line in file]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise ValueError(
            f"{path} is not a report: {error}. Write one with `python -m parity check --json >FILE`"
        ) from error
    first, last = (records[0], records[-1]) if records else (None, None)
    if not isinstance(first, Header) or first.schema != SCHEMA:
        raise ValueError(
            f"{path} does not begin with a header of schema {SCHEMA}: it is not a report, or one of another version"
        )
    if not isinstance(last, Footer):
        raise ValueError(f"{path} has no footer: its run did not finish. Run it again")
    report = Report(first, {}, {}, last, {})
    for record in records[1:-1]:
        if isinstance(record, CaseRecord):
            report.cases[record.case.name], report.checks[record.case.name] = record, []
        if isinstance(record, Check):
            report.checks.setdefault(record.case, []).append(record)
        if isinstance(record, Card):
            report.cards.setdefault(record.asked.name, []).append(record)
    found = sum(map(len, report.checks.values()))
    if found != last.comparisons or report.cases.keys() != report.checks.keys():
        raise ValueError(f"{path} has {found} comparisons, but its footer counts {last.comparisons}: it is not whole")
    known = {"oracle", *report.backends}
    if strange := {check.left for found in report.checks.values() for check in found} - known:
        raise ValueError(
            f"{path} compares {', '.join(sorted(strange))}, which its header does not name: it is not a report"
        )
    return report


def upgraded(line: Any) -> Any:
    """Convert a line of schema 1, which knew only our own backends and called a recording a trace, to this schema."""
    if not isinstance(line, dict):
        return line  # not a record: decoding it raises the error
    if line.get("kind") == "header" and line.get("schema") == 1:
        line |= {"schema": SCHEMA, "backends": msgspec.to_builtins(list(BACKENDS.values()))}
    if line.get("kind") == "case" and isinstance(line.get("case"), dict) and "trace" in line["case"]:
        line["case"]["recording"] = line["case"].pop("trace")
    return line


def schema() -> dict[str, Any]:
    """The JSON Schema of one line, with what each field means."""
    result = msgspec.json.schema(Record)
    for kind, definition in result["$defs"].items():
        meant = _meant(kind)
        for name, about in definition.get("properties", {}).items():
            about["description"] = meant[name]
            if about.get("type") == "number":
                about["type"] = ["number", "string"]
    return {"title": "One line of a parity report", "$comment": 'numbers may be "inf", "-inf" or "nan"'} | result


def _meant(kind: str) -> dict[str, str]:
    """What each field of a record means, by name: the string below it, or a case's help."""
    if kind == "Case":
        return {field.name: field.metadata["help"] for field in fields(Case)}
    texts = docstring_parser.parse_from_object(_KINDS[kind]).params
    return {"kind": "What the line is."} | {text.arg_name: " ".join((text.description or "").split()) for text in texts}
