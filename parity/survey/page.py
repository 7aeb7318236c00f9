"""The map as one page that needs nothing else: which published layers are one function, and the way between any two."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from parity.cases.case import DTYPES
from parity.explain.hypotheses import CANNOT_TELL, tolerance
from parity.judge.card import STAGE, Card, keys
from parity.report.card import MARKS
from parity.report.terminal import SURE, few
from parity.survey.moving import (
    EVERYWHERE,
    NEUTRAL,
    SHOWS,
    UNEXPLAINED,
    disobeyed,
    kept,
    measured,
    moving,
    ordered,
    said,
    told,
    warnings,
)
from parity.survey.records import Difference, Survey, Surveyed

SHADES = 5  # of what a column says beside what most say, the commonest first; all that are rarer share the last
FIRST = ("scores", "activation")  # said of every group, whether or not most say the same


class Cell(NamedTuple):
    """What a card says of a key."""

    key: str
    said: str  # an empty string: nothing
    state: str
    usual: bool  # what most say
    shade: int  # of those that say otherwise, which

    @property
    def mark(self) -> str:
        """How sure it is, where it is not plainly found."""
        return "" if self.state in ("", "found") else MARKS[self.state][0]


class Line(NamedTuple):
    """A layer in the table."""

    place: int  # in `Survey.layers`
    one: Surveyed
    card: Card
    function: int  # the number of its group, which is its own where no other is that function
    first: bool  # of its group
    cells: list[Cell]


class Group(NamedTuple):
    """Layers that are one function."""

    number: int
    members: list[Line]
    words: list[str]  # what sets it apart
    within: list[str]  # keys of which its members say different things
    beside: str = ""  # what sets it apart from an earlier one of which the same was found


class Side(NamedTuple):
    """All layers in one dtype."""

    dtype: str
    layers: int
    lines: list[Line]
    columns: list[str]  # keys, those that tell the most layers apart first
    agreed: list[tuple[str, str]]  # keys of which all say the same, and what
    groups: list[Group]
    absent: list[Surveyed]  # without a card

    @property
    def proved(self) -> int:
        """How many cards are proved."""
        return sum(line.card.proved for line in self.lines)


def page(survey: Survey, made: str = "") -> str:
    """The map as HTML, complete in itself; `made` is the day that it says, today's where there is none."""
    sides = [_side(survey, dtype) for dtype in DTYPES if any(one.dtype == dtype for one in survey.layers)]
    return _ENVIRONMENT.get_template("map.html.j2").render(
        survey=survey,
        sides=sides,
        example=_example(sides),
        data=embedded(data(survey, sides)),
        made=made or f"{datetime.now(UTC):%Y-%m-%d}",
        versions=_versions(survey.layers),
        frameworks=Counter(one.framework for one in {one.layer: one for one in survey.layers}.values()),
    )


def _example(sides: Sequence[Side]) -> list[Surveyed]:
    """Two layers to begin with, of two frameworks or functions; none where there are no two."""
    ones = [line for side in sides[:1] for line in side.lines]
    others = [line for line in ones if line.one.framework != ones[0].one.framework]
    others = others or [line for line in ones if line.function != ones[0].function] or ones[1:]
    return [ones[0].one, others[0].one] if others else []


# ---- The table


def _side(survey: Survey, dtype: str) -> Side:
    places = [place for place, one in enumerate(survey.layers) if one.dtype == dtype]
    carded = [place for place in places if survey.layers[place].card]
    grouped = [[place for place in group if place in carded] for group in survey.groups]
    grouped = [group for group in grouped if group]
    alone = set(carded) - {place for group in grouped for place in group}
    ordered = grouped + [[place] for place in sorted(alone)]
    ordered.sort(key=len, reverse=True)
    cards = {place: card for place in carded if (card := survey.layers[place].card)}
    every = keys(list(cards.values()))
    saids = {key: Counter(said(card, card.get(key)) for card in cards.values()) for key in every}
    columns = sorted((key for key in every if len(saids[key]) > 1), key=lambda key: -_tells(saids[key]))
    groups = []
    for number, group in enumerate(ordered, 1):
        members = [
            Line(place, survey.layers[place], cards[place], number, place == group[0],
                 [_cell(cards[place], key, saids[key]) for key in columns])
            for place in sorted(group, key=lambda place: survey.layers[place].layer)
        ]  # fmt: skip
        members = [line._replace(first=i == 0) for i, line in enumerate(members)]
        groups.append(Group(number, members, *_words(members, columns, saids)))
    first: dict[tuple[str, ...], Group] = {}
    for i, group in enumerate(groups):
        other = first.setdefault(tuple(group.words), group)
        if other is not group:
            groups[i] = group._replace(beside=_beside(survey, other, group))
    return Side(
        dtype,
        len(places),
        [line for group in groups for line in group.members],
        columns,
        [(key, next(iter(saids[key]))) for key in every if len(saids[key]) == 1],
        groups,
        [survey.layers[place] for place in places if place not in carded],
    )


def _tells(saids: Counter[str]) -> float:
    """How many bits a column tells of a layer."""
    total = sum(saids.values())
    return -sum(n / total * math.log2(n / total) for n in saids.values())


def _cell(card: Card, key: str, saids: Counter[str]) -> Cell:
    own = said(card, finding := card.get(key))
    rank = [words for words, _ in saids.most_common()].index(own)
    return Cell(key, own.removeprefix(CANNOT_TELL), finding.state if finding else "", rank == 0, min(rank, SHADES))


def _words(
    members: Sequence[Line], columns: Sequence[str], saids: dict[str, Counter[str]]
) -> tuple[list[str], list[str]]:
    """What sets a group apart, and of what its members say different things."""
    words, within = [], []
    for key in dict.fromkeys((*FIRST, *columns)):
        found = [(line.card, line.card.get(key)) for line in members]
        own = {said(card, finding) for card, finding in found if finding is None or told(finding)}
        own = own - {""} if key not in NEUTRAL else own
        if len(own) > 1:
            within.append(key)
        elif own and SHOWS.get(key, EVERYWHERE)[0] == "function":
            (its,) = own
            if key in FIRST or its != saids[key].most_common(1)[0][0]:
                words.append(f"{key}: {its}" if its else f"no {key}" if key in NEUTRAL else "")
    return [word for word in words if word], within


def _beside(survey: Survey, other: Group, group: Group) -> str:
    """What sets apart a group of which the same was found as of another."""
    a, b = other.members[0], group.members[0]
    here = measured(survey.apart.get(f"{min(a.place, b.place)} {max(a.place, b.place)}", []))
    differ = [one for one in here if not one.apart <= tolerance(a.one.dtype)]
    found = [f"{one.key}: {one.b}" for one in moving(a.one, b.one).remains if one.level != "roundings"]
    said = [f"{one.problem}: {one.words(a.one.dtype)}" for one in differ]
    return f"Beside group {other.number}: {'; '.join(found + said) or 'not measured'}."


def _versions(layers: Iterable[Surveyed]) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for one in layers:
        for name, version in one.versions.items():
            found.setdefault(name, set()).add(version)
    return [(name, ", ".join(sorted(found[name]))) for name in sorted(found)]


# ---- What the script reads


class Table:
    """Values, each once; the rest of the page names them by their numbers."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.numbers: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        """The number of a value."""
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            self.values.append(value)
        return self.numbers[value]


def data(survey: Survey, sides: Sequence[Side]) -> dict[str, Any]:
    """All that is shown of cells and of pairs; texts are numbers of `words`."""
    words, needs, lines, ways = Table(), Table(), Table(), Table()
    matrix: dict[str, list[list[int]]] = {}
    for side in sides:
        ones = [line.one for line in side.lines]
        matrix[side.dtype] = [[ways(_way(a, b, words, needs, lines)) for b in ones] for a in ones]
    return {
        "layers": [_layer(one, words) for one in survey.layers],
        "places": {side.dtype: [line.place for line in side.lines] for side in sides},
        "rounded": {side.dtype: tolerance(side.dtype) for side in sides},
        "ways": ways.values,
        "way": matrix,
        "needs": needs.values,
        "lines": lines.values,
        "apart": {
            pair: [_apart(one, words) for one in ordered(found)] for pair, found in survey.apart.items() if found
        },
        "sure": {state: [MARKS[state][0], SURE[state]] for state in MARKS},
        "stage": STAGE,
        "unexplained": UNEXPLAINED,
        "words": words.values,
    }


def _way(a: Surveyed, b: Surveyed, words: Table, needs: Table, lines: Table) -> tuple[Any, ...]:
    found = moving(a, b)
    return (
        words(found.verdict),
        tuple(needs((words(n.what), " ".join(n.of), words(n.code), n.idle + 2 * n.changes)) for n in found.needs),
        *(
            tuple(lines((words(r.key), words(r.a), words(r.b), words(r.shows))) for r in each)
            for each in (found.remains, found.unsure)
        ),
    )


def _layer(one: Surveyed, words: Table) -> dict[str, Any]:
    card = one.card
    findings = {
        words(f.key): [words(f.state), words(f.what), words(few(f.residual)), words(f.rival),
                       words(few(f.rival_residual)), words(f.experiment)]
        for f in (card.findings if card else ())
    }  # fmt: skip
    return {
        "name": one.layer,
        "dtype": one.dtype,
        "proved": bool(card and card.proved),
        "proof": words(card.proof if card else one.why),
        "command": card.command if card else "",
        "kept": [[its.name, " ".join(its.ours)] for its in kept(one)],
        "warnings": warnings(one),
        "ran": {problem: words(why) for problem, why in one.ran.items() if why},
        "cells": findings,
    }


def _apart(one: Difference, words: Table) -> list[Any]:
    scaled = packed(one.scaled.get(name) for name in one.apart) if one.scaled else ""
    return [words(one.problem), words(" ".join(one.apart)), packed(one.apart.values()), scaled]


DIGITS = "".join(chr(c) for c in range(33, 127) if chr(c) not in '"\\<&')  # 90 of them
LEAST = -30  # exponent of ten


def packed(values: Iterable[float | None]) -> str:
    """Numbers of two digits, in two characters each: there are too many to write out."""
    return "".join(map(_packed, values))


def _packed(value: float | None) -> str:
    if value is None:
        return " -"
    if not math.isfinite(value):
        return " x"
    if value < 10.0**LEAST:
        return "  "
    mantissa, exponent = f"{value:.1e}".split("e")
    high = int(exponent) - LEAST
    return " x" if high >= len(DIGITS) else DIGITS[high] + DIGITS[int(mantissa.replace(".", "")) - 10]


def embedded(value: Any) -> str:
    """As JSON that can stand in a script."""
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


_ENVIRONMENT = Environment(
    loader=PackageLoader("parity", "survey"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=StrictUndefined,
)  # fmt: skip
_ENVIRONMENT.globals.update(disobeyed=disobeyed, parameters=NEUTRAL, sure=SURE, marks=MARKS)
