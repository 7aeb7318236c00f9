"""What a stage returns, as arrays named like quantities: `Grouped.slot_TK` of `group_by_expert` is its `slot`."""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from parity.oracle.quantities import QUANTITIES

# The name of a stage's array if it returns one; of several arrays, the one that the next stage takes.
MAIN = {
    "route": "score",
    "group_by_expert": "x",
    "exchange_counts": "counts",
    "send_tokens": "x",
    "to_expert_major": "x",
    "apply_experts": "y",
    "to_rank_major": "y",
    "return_tokens": "y",
    "combine": "out",
}

# The stage that made each field of `Stages`, and the name of those that are no stage's own result.
MADE_BY = {
    "routing": "route",
    "grouped": "group_by_expert",
    "counts_Pe": "exchange_counts/counts",
    "counts_PE": "exchange_counts/counts_of_all",
    "splits": "exchange_counts",
    "received": "send_tokens",
    "placed": "send_tokens/rows",
    "expert_major": "to_expert_major",
    "y": "apply_experts",
    "rank_major": "to_rank_major",
    "returned": "return_tokens",
    "shared": "apply_experts/shared",
    "out": "combine",
    "dropped_E": "group_by_expert/dropped",
    "dropped": "group_by_expert/dropped_in_all",
}


# What the layers take together: the argument, its type, and the names of its fields here, in order.
TOGETHER = {
    "per_expert": ("PerExpert", ("router_bias", "selection_bias", "expert_scale")),
    "biases": ("Biases", ("b_gate", "b_up", "b_down")),
    "shared": ("Shared", ("shared_w_gate", "shared_w_up", "shared_w_down", "shared_score")),
}


def together(package: ModuleType, values: Mapping[str, Any], *wanted: str) -> dict[str, Any]:
    """The arguments that have a value. The others are left to the layer's defaults."""
    kinds = {argument: TOGETHER[argument] for argument in wanted or TOGETHER}
    return {
        argument: getattr(package, kind)(*(values.get(name) for name in names))
        for argument, (kind, names) in kinds.items()
        if any(values.get(name) is not None for name in names)
    }


def stem(field: str) -> str:
    """A name without its shape suffix: x_ND -> x, counts_Pe -> counts, expert_id_TK -> expert_id."""
    return re.sub(r"_(?=\w*[A-Z])[A-Za-z]+$", "", field)


def named(stage: str, result: Any) -> dict[str, Any]:
    """The arrays of a stage's result by name, rows as [rows, D] whatever their bins."""
    if not isinstance(result, tuple):
        return {MAIN[stage]: _rows(f"{stage}/{MAIN[stage]}", result)}
    found: dict[str, Any] = {}
    for field, part in zip(getattr(result, "_fields", [MAIN[stage]] * len(result)), result, strict=True):
        if isinstance(part, tuple):
            found |= named(stage, part)
        else:
            found[stem(field)] = _rows(f"{stage}/{stem(field)}", part)
    return found


def named_stages(stages: Any) -> dict[str, Any]:
    """The arrays of a whole layer's `Stages`, as stage/value."""
    found: dict[str, Any] = {}
    for field, part in stages._asdict().items():
        if part is None:
            continue
        made = MADE_BY.get(field) or MADE_BY[stem(field)]
        stage, _, value = made.partition("/")
        found |= {made: part} if value else {f"{stage}/{key}": a for key, a in named(stage, part).items()}
    return found


def _rows(name: str, a: Any) -> Any:
    axes = QUANTITIES[name].axes if name in QUANTITIES else ""
    return a.reshape(-1, *a.shape[a.ndim - axes.count("D") :]) if axes.startswith("A") else a
