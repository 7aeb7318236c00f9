"""One layer, in a process of its own: `python -m parity.survey.one LAYER FOLDER DTYPE...` writes a line for each dtype.

Its card, and what it makes of problems that all layers are given, so that any two can be compared.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, Parameters, parameters_of
from parity.explain.ask import Answer, ask
from parity.explain.identify import card_of, small_cases
from parity.judge.card import Card
from parity.oracle.problem import Problem, draw, posed
from parity.oracle.quantities import OUTSIDE
from parity.oracle.tolerances import numpy_dtype
from parity.run import ours
from parity.run.backend import BackendError, Setting
from parity.run.supervisor import Kept, end_with_parent
from parity.survey.layers import FAMILIES, packages
from parity.survey.records import Surveyed

# No axis is as long as another, and groups of two to eight experts fit.
SIZES: dict[str, Any] = {"ranks": 1, "tokens": 32, "width": 48, "hidden": 20, "experts": 16, "top_k": 3}

LARGE = "large gates and ups"  # which a clamp keeps back
TIMES = 32.0

# What all layers are given: by name, what a case has beside the weights that each has.
COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    LARGE: {},
    "one expert a token": {"top_k": 1},
    "router bias": {"router_bias": True},
    "selection bias": {"selection_bias": True},
    "scale of experts": {"expert_scale": True},
    "biases of experts": {"expert_bias": True},
    "shared expert": {"shared_hidden": SIZES["hidden"]},
    "shared expert with a score": {"shared_hidden": SIZES["hidden"], "shared_score": True},
}
MORE = {name for changes in COMMON.values() for name in changes} - {"top_k"}


def surveyed(layer: str, dtypes: Sequence[str], folder: Path) -> Iterator[Surveyed]:
    """The card of a layer in each dtype, and in `folder` what it makes of the common problems."""
    left = list(dtypes)
    while left:
        with Kept(ours.find(layer), Setting(), Path.cwd()) as kept:
            while left:
                one = _surveyed(kept, layer, left.pop(0), folder)
                yield one
                if one.why:
                    break  # whoever ran it may have ended


def _surveyed(kept: Kept, layer: str, dtype: str, folder: Path) -> Surveyed:
    begin, backend = time.perf_counter(), kept.backend
    one = Surveyed(layer, dtype, backend.framework, versions(packages(backend)))
    bases = families_cases(dtype) if layer.startswith(FAMILIES) else [replace(c, dtype=dtype) for c in small_cases()]
    try:
        one.card = card_of(kept, bases)
        where = one.card.get("the score multiplies")
        if not one.card.proved and where and where.state == "odd":
            one.card = card_of(kept, [replace(one.card.asked, top_k=1)])  # as only then a case can say it
        one.ran, arrays = common(kept, one.card)
        (folder / "arrays").mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / "arrays" / f"{one.name}.safetensors")
    except (BackendError, ValueError) as error:
        one.why = str(error)
    one.seconds = time.perf_counter() - begin
    return one


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Of these packages, by the names that they are installed under."""
    own = {"megatron": "megatron-core"}
    found = {name: own.get(name, name) for name in names}
    return {name: metadata.version(of) for name, of in found.items() if find_spec(name)}


def families_cases(dtype: str) -> list[Case]:
    """What a block of transformers is asked in, which takes only sizes of a case."""
    narrow = dtype in ("bfloat16", "float16")
    plain = Case(**SIZES, name="survey", dtype=dtype)  # type: ignore[arg-type]
    both = [plain, replace(plain, name="survey-ungated", gated=False, activation="relu2")]
    # Some blocks have their router's weights in the dtype of the tokens, and some in float32.
    as_tokens = [replace(case, name=f"{case.name}-as-tokens", router_dtype="activations") for case in both]
    return [*as_tokens, *both] if narrow else both


def common(kept: Kept, card: Card) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Of each common problem whether it ran, or why not; and all outputs and gradients, as problem/quantity."""
    problems: dict[str, Problem] = {}
    why: dict[str, str] = {}
    for name, changes in COMMON.items():
        try:
            problems[name] = problem(card.case, name, changes)
        except ValueError as error:
            why[name] = str(error)
    answers = ask(kept, problems)
    why |= {name: answer.why for name, answer in answers.items()}
    arrays = {
        f"{name}/{quantity}": a
        for name, answer in answers.items()
        if answer.trace
        for quantity, a in quantities(answer, card.case.ranks).items()
    }
    return why, arrays


def problem(found: Case, name: str, changes: dict[str, Any]) -> Problem:
    """A common problem, in the options that were found: of the same numbers for every layer.

    Raises ValueError where there is no such case.
    """
    has = {"top_k": found.top_k if found.score_on == "input" else SIZES["top_k"], "expert_bias": False}
    sizes = SIZES | {"ranks": found.ranks, "tokens": SIZES["tokens"] // found.ranks}
    none = {field: type(getattr(found, field))(0) for field in MORE}
    case = replace(found, name=f"common-{list(COMMON).index(name)}", **(sizes | has | none | changes))
    everything = {field: value for of in COMMON.values() for field, value in of.items() if field != "top_k"}
    drawn = draw(Case(name="common", seed=7, dtype="float64", **(SIZES | everything)))
    kinds = {one.name: numpy_dtype(case.dtype_of(one.dtype)) for one in parameters_of(case)}
    narrow = numpy_dtype(case.dtype)  # also a router in float32 is given numbers that the tokens' dtype holds
    w = Parameters(**{one: getattr(drawn.parameters, one).astype(narrow).astype(kind) for one, kind in kinds.items()})
    if name == LARGE:
        w = w._replace(**{one: TIMES * getattr(w, one) for one in ("w_gate", "w_up") if one in kinds})
    x, dout = (a.reshape(case.ranks, case.tokens, -1).astype(numpy_dtype(case.dtype)) for a in (drawn.x, drawn.dout))
    whole = posed(case, x, w, dout, evaluated=False)
    return replace(whole, keep=np.ones_like(whole.keep))


def quantities(answer: Answer, ranks: int) -> dict[str, np.ndarray]:
    """Output and gradients of all tokens and experts, in float32: out, dx, drouter, dw_gate and so on."""
    assert answer.trace
    found = {}
    for name in OUTSIDE:
        value = name.rpartition("/")[2]
        each = answer.trace.arrays.get(name)
        if each is None:
            continue
        learned = BY_NAME.get(value.removeprefix("d"))
        whole = each[:1] if learned and not learned.per_rank and len(each) == ranks else each
        found[value] = np.ascontiguousarray(np.concatenate(whole), dtype=np.float32)
    return found


if __name__ == "__main__":
    end_with_parent()
    layer, into, *dtypes = sys.argv[1:]
    for one in surveyed(layer, dtypes, Path(into)):
        sys.stdout.buffer.write(msgspec.json.encode(one) + b"\n")
        sys.stdout.flush()
