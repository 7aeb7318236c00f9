"""Presets by pairs: few cases that contain every possible pair of values of two fields.

A fault often needs two things at once (one choice a token and renormalisation, one expert a rank and a capacity per
expert). Fields that decide a program's shapes vary in few rows, because JAX compiles each row. Fields that decide only
its numbers vary over several cases of a row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from parity.cases.case import Case

Values = Mapping[str, Sequence[Any]]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

ROWS = Path(__file__).parent / "pairs.jsonl"  # what `python -m parity.oracle.pairs` writes, in a minute

# Values that are tried with each other. E is ranks times `experts_per_rank`, which is no field but says more than E.
SHAPES: Values = {
    "ranks": (1, 2, 4),
    "experts_per_rank": (1, 2, 3),
    "top_k": (1, 2, 3),
    "tokens": (1, 6, 16),
    "width": (8, 32),
    "hidden": (5, 24),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "score_function": ("softmax", "sigmoid"),
    "renormalize": (False, True),
    "scale": (1.0, 2.5),
    "activation": ("silu", "gelu_tanh"),
    "capacity_factor": (None, "1/2", "5/4"),
    "capacity_per": ("rank", "expert"),
    "priority": ("token", "choice", "score"),
    "align": (1, 8),
    "uneven": (False, True),
    "way": ("usual", "eager", "compiled", "recomputed", "in_flight", "two_groups"),
}
# Options in which models differ. They decide the program too, and make three times as many pairs.
OPTIONS: Values = {
    "score_function": ("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"),
    "epsilon": (1e-20, 1e-3),
    "groups": (1, 2, 4),
    "top_groups": (1, 2),
    "group_score": ("top2", "max"),
    "outside_groups": ("minus_inf", "zero"),
    "score_on": ("output", "input"),
    "router_dtype": ("wide", "float32", "activations"),
    "cast_scores": (False, True),
    "router_bias": (False, True),
    "selection_bias": (False, True),
    "expert_scale": (False, True),
    "activation": ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"),
    "clamp": (None, 2.0),
    "up_offset": (0.0, 1.0),
    "gated": (True, False),
    "expert_bias": (False, True),
    "shared_hidden": (0, 7),
    "shared_score": (False, True),
}
NUMBERS: Values = {
    "pattern": ("random", "balanced", "zipf", "one_expert", "empty_expert", "idle_rank", "stay_home", "ties"),
    "logit_scale": (1.0, 50.0),
    "logit_offset": (0.0, 20.0, -46.0),
    "outlier": (1.0, 10.0),
}
CORE: Values = SHAPES | NUMBERS
FIELDS: Values = SHAPES | OPTIONS | NUMBERS


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a row of values. Raises ValueError where there can be none."""
    fields = {name: value for name, value in row.items() if name != "experts_per_rank"}
    return Case(**fields, experts=row["ranks"] * row["experts_per_rank"])


def row_of(case: Case) -> dict[str, Any]:
    """The values of a case in the fields above."""
    values = {name: getattr(case, name) for name in FIELDS if name != "experts_per_rank"}
    return values | {"experts_per_rank": case.experts // case.ranks}


def pairs_in(rows: Iterable[Mapping[str, Any]], fields: Values = FIELDS) -> set[Pair]:
    """Every two values of two fields that some row has together."""
    return {
        ((a, row[a]), (b, row[b]))
        for row in rows
        for a, b in combinations(fields, 2)
        if row[a] in fields[a] and row[b] in fields[b]
    }


def covered(cases: Iterable[Case], among: Iterable[Case]) -> tuple[int, list[str]]:
    """How many of the pairs in the cases `among` these cases cover, and in words the pairs that they miss."""
    found, possible = pairs_in(map(row_of, cases)), pairs_in(map(row_of, among))
    missing = sorted(possible - found, key=str)
    return len(possible & found), [" with ".join(f"{name} {value}" for name, value in pair) for pair in missing]


@cache  # this takes a second, and a report asks twice
def _possible(every: tuple[tuple[str, tuple], ...]) -> frozenset[Pair]:
    fields = dict(every)
    pairs = {((a, x), (b, y)) for a, b in combinations(fields, 2) for x, y in product(fields[a], fields[b])}
    return frozenset(pair for pair in pairs if _completed(dict(pair), np.random.default_rng(0), fields) is not None)


def possible_pairs(fields: Values = FIELDS) -> frozenset[Pair]:
    """Every two values of two fields that some case has together; E, say, cannot be below K."""
    return _possible(tuple((name, tuple(values)) for name, values in fields.items()))


def _completed(fixed: Mapping[str, Any], rng: np.random.Generator, fields: Values = FIELDS) -> dict[str, Any] | None:
    """A row with these values and any others that make it a case; None where 300 draws find none."""
    for _ in range(300):
        drawn: dict[str, Any] = {name: choices[int(rng.integers(len(choices)))] for name, choices in fields.items()}
        with suppress(ValueError):
            case_of(drawn | dict(fixed))
            return drawn | dict(fixed)
    return None


def seconds(row: Mapping[str, Any]) -> float:
    """About what a program of this row takes to compile on one core, in both frameworks."""
    ranks = row["ranks"] * (2 if row["way"] == "two_groups" else 1)
    return 1.5 + 0.1 * ranks + {"eager": 6, "compiled": 3 + ranks, "in_flight": 1.5}.get(row["way"], 0)


def covering_rows(
    covered: Iterable[Case], fits: Callable[[Case], bool], fields: Values, seed: int = 0, tried: int = 400
) -> list[list[dict[str, Any]]]:
    """Rows with every possible pair that the covered cases lack, in groups that share all fields but `NUMBERS`.

    The search is greedy. It draws `tried` rows, each around a missing pair, and takes the row with the most missing
    pairs per second of compile time. `fits` says whether a case is acceptable.

    Raises ValueError where no acceptable row has a missing pair.
    """
    rng, missing = np.random.default_rng(seed), {*possible_pairs(fields)} - pairs_in(map(row_of, covered), fields)
    shapes = fields.keys() - NUMBERS.keys()
    groups: dict[tuple, list[dict[str, Any]]] = {}

    def shape(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in fields if name in shapes}

    def take(around: Iterable[Mapping[str, Any]], among: set[Pair]) -> bool:
        rows = [row for fixed in around if (row := _completed(fixed, rng, fields))]
        rows.sort(key=lambda row: len(pairs_in([row], fields) & among) / seconds(row), reverse=True)
        best = next((row for row in rows if fits(case_of(row))), None)
        if best is None:
            return False
        missing.difference_update(pairs_in([best], fields))
        groups.setdefault(tuple(shape(best).values()), []).append(best)
        return True

    def some(pairs: set[Pair]) -> list[dict[str, Any]]:
        ordered = sorted(pairs, key=str)
        return [dict(ordered[i]) for i in rng.integers(len(ordered), size=tried)]

    while left := {pair for pair in missing if {name for name, _ in pair} <= shapes}:
        if not take(some(left), left):
            raise ValueError(f"no case fits that has any of {left}")
    while missing:
        programs = [shape(rows[0]) for rows in groups.values()]
        fitting = [
            program | pair
            for pair in some(missing)
            for program in [programs[int(rng.integers(len(programs)))]]
            if all(program.get(name, value) == value for name, value in pair.items())
        ]
        if not (take(fitting, missing) or take(some(missing), missing)):
            raise ValueError(f"no case fits that has any of {missing}")
    return list(groups.values())


def write(covered: Sequence[Case], fits: Callable[[Case], bool], path: Path = ROWS) -> None:
    """Find the rows again and write them, a line of JSON each: for the core, and then for all."""
    lines: list[dict[str, Any]] = []
    for of, fields in (("pairs", CORE), ("options", FIELDS)):
        known = [*covered, *(case_of({name: a for name, a in line.items() if name in FIELDS}) for line in lines)]
        found = covering_rows(known, fits, fields)
        lines += [{"of": of, "group": i + 1} | row for i, rows in enumerate(found) for row in rows]
    path.write_text("".join(msgspec.json.encode(line).decode() + "\n" for line in lines))


def pair_cases() -> dict[str, Case]:
    """The presets by pairs; those that share a program come one after the other."""
    cases: dict[str, Case] = {}
    for line in ROWS.read_text().splitlines():
        row = msgspec.json.decode(line)
        group = f"{row.pop('of')}-{row.pop('group'):02d}"
        letter = "abcdefghijklmnopqrstuvwxyz"[sum(name.startswith(group) for name in cases)]
        name = f"{group}{letter}"
        cases[name] = replace(case_of(row), name=name, seed=len(cases))
    return cases
