"""The one table of what can be compared. What a run must hold, how it is judged, where a number lies: all from here.

A value is what a stage returns or a gradient of what it takes, under the name that the implementations give it: `slot`
of `group_by_expert` is `Grouped.slot_TK`. To compare one more, add its row here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from parity.cases.case import Case, Kind
from parity.cases.parameters import BY_NAME, PARAMETERS, Parameter
from parity.oracle.evaluation import Evaluation, Value
from parity.oracle.rows import PADDING, Layout, indices, positions_by_row, straight

Array = np.ndarray

# The nine stages, in order.
STAGES = (
    "route",
    "group_by_expert",
    "exchange_counts",
    "send_tokens",
    "to_expert_major",
    "apply_experts",
    "to_rank_major",
    "return_tokens",
    "combine",
)

# isolated: a stage fed the oracle's values. e2e: the whole layer. second: the whole layer in a second step beside the
# first. repeat: how many numbers of the whole layer differ when it runs on the same inputs again.
Mode = Literal["isolated", "e2e", "second", "repeat"]
TAKE_INPUTS = ("route", "group_by_expert", "apply_experts", "combine")  # of the layer: router, x, weights, dout
INDICES_ONLY = ("group_by_expert", "to_expert_major", "to_rank_major")  # or nothing, in the direct layout
SEEN: tuple[Layout, ...] = tuple(layout for layout in get_args(Layout) if layout != "opaque")
# Where rows are copied for each choice, sent, and permuted, one after the other; in the direct layout it is one move.
IN_STEPS: tuple[Layout, ...] = tuple(layout for layout in SEEN if layout != "direct")
STRAIGHT: tuple[Layout, ...] = ("direct",)
ON_THE_DEVICE: tuple[Layout, ...] = ("static", "ragged", "direct")  # which cannot refuse an id, and count it


# What a layer gives that shows nothing of its inside: the output and gradients.
OUTSIDE = ("e2e/combine/out", "e2e/route/dx", *(f"e2e/{one.gradient}" for one in PARAMETERS if one.learned))
ALWAYS = OUTSIDE[:6]  # of that, what every layer has: without biases, scales and shared experts


@dataclass(frozen=True)
class Quantity:
    """One row: what it is, its axes, how it is judged, and the oracle's value in each mode that has it."""

    name: str  # stage/value
    # Letters; A: assignments of all ranks, known by (source rank, token, k) wherever their row lies. After the rank
    # that holds it, P is the rank that rows come from and Q the rank that they go to.
    axes: str
    dtype: Kind
    judged: Literal["bits", "allowance", "choice"]
    isolated: Value | None = None
    e2e: Value | None = None
    backward: bool = False
    order: str = ""  # of rows: the table in `rows` that says where each lies
    zero_padding: tuple[Mode, ...] = ()  # modes in which the rows between are promised to be zero
    zero_where: Callable[[Case], bool] = lambda case: True  # noqa: ARG005  in these cases
    zero_unless: tuple[Layout, ...] = ()  # but not in these layouts
    past_the_end: Callable[[Case, int], int] | None = None  # for an index: what padding holds, given the number of rows
    layouts: tuple[Layout, ...] = field(default=SEEN)
    # Cases in which a value that the stage only moves (bitwise on its own) was computed in the whole layer.
    computed_e2e: Callable[[Case], bool] = lambda case: False  # noqa: ARG005
    summed: bool = False  # summed over ranks and the same on all, so that one array may stand for all ranks
    asks: Callable[[Case], Any] = lambda case: True  # noqa: ARG005  cases in which there is something to compare

    @property
    def stage(self) -> str:
        """The stage that makes it."""
        return self.name.split("/")[0]

    @property
    def value(self) -> str:
        """Its name within the stage."""
        return self.name.split("/")[1]

    def bitwise(self, mode: str, case: Case) -> bool:
        """Whether it must be equal bit for bit in this mode."""
        return self.judged != "allowance" and not (mode == "e2e" and self.computed_e2e(case))

    def padding(self, mode: str, case: Case, rows: int, layout: Layout) -> int | None:
        """What stands between the rows of an array of so many, or None where nothing is promised."""
        if self.past_the_end:
            return self.past_the_end(case, rows)
        return 0 if mode in self.zero_padding and self.zero_where(case) and layout not in self.zero_unless else None

    def names(self) -> list[str]:
        """mode/stage/value, for each mode that has it."""
        modes = [*["isolated"] * (self.isolated is not None), *["e2e", "repeat"] * (self.e2e is not None)]
        modes += ["second"] * (f"e2e/{self.name}" in OUTSIDE)
        return [f"{mode}/{self.name}" for mode in modes]


def _layer(field: str) -> Value:
    return lambda o, _: getattr(o.layer, field)


def _slot(o: Evaluation, layout: Layout) -> Array:
    table = o.table(layout)
    return np.stack([indices(o.case, table, rank)["slot"] for rank in range(o.case.ranks)])


_x: Value = lambda o, _: o.rows_of(o.given("given"))  # noqa: E731
_given: Value = lambda o, _: o.rows_of(o.layer.input)  # noqa: E731
_y: Value = lambda o, _: o.given("y")  # noqa: E731
_dx: Value = lambda o, _: o.given("dx_rows")  # noqa: E731
_dy: Value = lambda o, _: o.given("dy")  # noqa: E731
_order: Value = lambda o, _: o.problem.order_probe()[1]  # noqa: E731
_sent: Value = lambda o, layout: o.sent(layout)  # noqa: E731
_counts: Value = lambda o, layout: o.received(layout)  # noqa: E731
_of_all: Value = lambda o, layout: np.tile(o.sent(layout), (o.case.ranks, 1, 1))  # noqa: E731
_dropped: Value = lambda o, layout: o.sent("dynamic") - o.sent(layout)  # noqa: E731
_BOTH: tuple[Mode, ...] = ("isolated", "e2e")
_ALONE: tuple[Mode, ...] = ("isolated",)
_WHOLE: tuple[Mode, ...] = ("e2e",)


def _none(o: Evaluation, _: Layout) -> Array:
    return np.zeros(o.case.ranks, np.int64)


def _between(o: Evaluation, layout: Layout) -> Array:
    """Rows that each rank sends to each, [P, Q]."""
    return o.sent(layout).reshape(o.case.ranks, o.case.ranks, -1).sum(axis=2)


def _before(counts: Array, axis: int) -> Array:
    return counts.cumsum(axis=axis) - counts


def _assignment(o: Evaluation, _: Layout) -> Array:
    return np.tile(np.arange(o.case.assignments), o.case.ranks)


BACKWARD = {"route": "route_backward", "apply_experts": "experts_backward"}  # of an `Evaluation`


def _gradient(parameter: Parameter) -> Quantity:
    """That of what a layer has learned, from a stage on its own and from the whole layer."""
    part = "shared_backward" if parameter.shared else BACKWARD[parameter.stage]

    def alone(o: Evaluation, _: Layout) -> Array:
        return getattr(o, part)[1][parameter.name]

    def whole(o: Evaluation, _: Layout) -> Array:
        return o.layer.gradients[parameter.name]

    return Quantity(
        parameter.gradient, parameter.axes, parameter.dtype, "allowance", alone, whole, backward=True,
        summed=not parameter.per_rank, asks=parameter.there,
    )  # fmt: skip


def _gradients(stage: str) -> list[Quantity]:
    return [_gradient(one) for one in PARAMETERS if one.stage == stage and one.learned]


def _scores_on_input(case: Case) -> bool:
    return case.score_on == "input"


def _zero_of_zero(case: Case) -> bool:
    """Whether experts make zero of padding: in an expert's own bin they make of it what they make of zero."""
    return case.bins == case.ranks or not case.expert_bias


_is_shared = BY_NAME["shared_w_up"].there

_TABLE = [
    Quantity("route/expert_id", "P T K", "int", "choice", lambda o, _: o.problem.expert_id),
    Quantity("route/score", "P T K", "weight", "allowance", lambda o, _: o.score_of_others, _layer("score")),
    Quantity("route/counts", "P E", "int", "bits", lambda o, _: o.counts_of_others, lambda o, _: o.sent("dynamic")),
    Quantity("route/dx", "P T D", "case", "allowance", lambda o, _: o.route_backward[0], _layer("dx"), backward=True),
    *_gradients("route"),
    Quantity(
        "group_by_expert/x", "A D", "case", "bits", _x, _given,
        order="grouped", zero_padding=_BOTH, computed_e2e=_scores_on_input, layouts=IN_STEPS,
    ),
    Quantity("group_by_expert/slot", "P T K", "int", "bits", _slot, _slot),
    Quantity(
        "group_by_expert/assignment", "A", "int", "bits",
        _assignment, _assignment,
        order="grouped", past_the_end=lambda case, _: case.assignments, layouts=IN_STEPS,
    ),
    Quantity("group_by_expert/kept", "P E", "int", "bits", _sent, _sent, layouts=ON_THE_DEVICE),
    *(  # of a token, which rows share: in the direct layout, where they are sent
        field
        for name, layouts in (("group_by_expert/dx", IN_STEPS), ("send_tokens/dtokens", STRAIGHT))
        for field in (
            Quantity(
                name, "P T D", "case", "allowance", lambda o, _: o.dx_of_group, backward=True, layouts=layouts
            ),
            Quantity(
                f"{name}_order", "P T D", "case", "bits", _order, backward=True, layouts=layouts,
                asks=lambda case: case.top_k >= 3,
            ),
        )
    ),
    Quantity(
        "group_by_expert/capacity", "P", "int", "bits", lambda o, _: np.full(o.case.ranks, o.case.capacity),
        layouts=("static",),
    ),
    Quantity("group_by_expert/dropped", "P E", "int", "bits", e2e=_dropped, layouts=("static",)),
    Quantity(
        "group_by_expert/dropped_in_all", "P", "int", "bits",
        e2e=lambda o, layout: o.case.assignments - o.sent(layout).sum(axis=1),  # padding included
        layouts=ON_THE_DEVICE,
    ),
    Quantity("exchange_counts/counts", "P P e", "int", "bits", _counts, _counts, layouts=IN_STEPS),
    Quantity("exchange_counts/counts_of_all", "P P E", "int", "bits", _of_all, _of_all, layouts=STRAIGHT),
    *(
        Quantity(f"exchange_counts/{name}", axes, "int", "bits", value, value, layouts=("dynamic", "ragged"))
        for name, axes, value in (
            ("send", "P Q", _between),
            ("receive", "P P", lambda o, layout: o.received(layout).sum(axis=2)),
        )
    ),
    # Where the rows of a rank begin in what another receives, and began in what that one sent.
    *(
        Quantity(f"exchange_counts/{name}", axes, "int", "bits", value, value, layouts=("ragged",))
        for name, axes, value in (
            ("received_at", "P Q", lambda o, layout: _before(_between(o, layout), 0)),
            ("returned_at", "P P", lambda o, layout: _before(_between(o, layout), 1).T),
        )
    ),
    Quantity(
        "send_tokens/x", "A D", "case", "bits", _x, _given,
        order="received", zero_padding=_WHOLE, computed_e2e=_scores_on_input, layouts=IN_STEPS,
    ),
    Quantity("send_tokens/dx", "A D", "case", "bits", _dx, order="grouped", backward=True, layouts=IN_STEPS),
    Quantity(
        "send_tokens/rows", "A D", "case", "bits", _x, _given,
        order="expert_major", computed_e2e=_scores_on_input, layouts=STRAIGHT,
    ),
    Quantity(
        "to_expert_major/x", "A D", "case", "bits", _x, _given,
        order="expert_major", zero_padding=_BOTH, computed_e2e=_scores_on_input, layouts=IN_STEPS,
    ),
    *(
        Quantity(
            f"to_expert_major/{name}", "A", "int", "bits", value, value,
            order=order, past_the_end=lambda _, rows: rows, layouts=IN_STEPS,
        )
        for name, order, value in (
            ("source", "expert_major", lambda o, layout: positions_by_row(o.case, o.table(layout)["received"])),
            ("target", "received", lambda o, layout: positions_by_row(o.case, o.table(layout)["expert_major"])),
        )
    ),
    Quantity(
        "to_expert_major/dx", "A D", "case", "bits", _dx,
        order="received", backward=True, zero_padding=_ALONE, layouts=IN_STEPS,
    ),
    *(
        Quantity(
            f"to_expert_major/{name}", "A", "int", "bits", value, value,
            order=order, past_the_end=lambda *_: PADDING, layouts=STRAIGHT,
        )
        for name, order, value in (
            ("place", "grouped", lambda o, layout: straight(o.case, o.table(layout))["place"][:-1]),
            ("origin", "expert_major", lambda o, layout: straight(o.case, o.table(layout))["origin"][:-1]),
        )
    ),
    Quantity(
        "apply_experts/y", "A D", "case", "allowance", _layer("y"), _layer("y"),
        order="expert_major", zero_padding=_BOTH, zero_where=_zero_of_zero, zero_unless=STRAIGHT,
    ),
    Quantity(
        "apply_experts/dx", "A D", "case", "allowance", lambda o, _: o.experts_backward[0],
        order="expert_major", backward=True,
    ),
    *_gradients("apply_experts"),
    Quantity(
        "apply_experts/shared", "P T D", "case", "allowance", lambda o, _: o.shared, _layer("shared"), asks=_is_shared,
    ),
    Quantity(
        "apply_experts/dshared_x", "P T D", "case", "allowance", lambda o, _: o.shared_backward[0],
        backward=True, asks=_is_shared,
    ),
    Quantity(
        "to_rank_major/y", "A D", "case", "bits", _y, _layer("y"),
        order="received", zero_padding=_BOTH, computed_e2e=lambda _: True, layouts=IN_STEPS,
    ),
    Quantity(
        "to_rank_major/dy", "A D", "case", "bits", _dy,
        order="expert_major", backward=True, zero_padding=_ALONE, layouts=IN_STEPS,
    ),
    Quantity(
        "return_tokens/y", "A D", "case", "bits", _y, _layer("y"),
        order="grouped", zero_padding=_WHOLE, computed_e2e=lambda _: True,
    ),
    Quantity("return_tokens/dy", "A D", "case", "bits", _dy, order="received", backward=True, layouts=IN_STEPS),
    Quantity("combine/out", "P T D", "case", "allowance", lambda o, _: o.out_of_combine, _layer("out")),
    Quantity(
        "combine/dy", "A D", "case", "allowance", lambda o, _: o.combine_backward[0],
        order="grouped", backward=True, zero_padding=_ALONE, layouts=IN_STEPS,
    ),
    Quantity(  # in the direct layout it is sent to where the experts are, as tokens are
        "combine/drows", "A D", "case", "allowance", lambda o, _: o.combine_backward[0],
        order="expert_major", backward=True, layouts=STRAIGHT,
    ),
    Quantity(
        "combine/dscore", "P T K", "weight", "allowance", lambda o, _: o.combine_backward[1], _layer("dscore"),
        backward=True, asks=lambda case: case.score_on == "output",  # else nothing is weighed here
    ),
    # How many numbers of what a stage, or the layer, was given are others after its backward: PyTorch can write there.
    *(
        Quantity(f"{stage}/changed", "P", "int", "bits", _none, _none if stage in TAKE_INPUTS else None, backward=True,
                 layouts=IN_STEPS if stage in INDICES_ONLY[1:] else SEEN)
        for stage in STAGES if stage != "exchange_counts"
    ),
    # How many numbers of the gradients differ when the backward runs a second time, through the same graph.
    *(
        Quantity(f"{stage}/again", "P", "int", "bits", _none, backward=True,
                 layouts=IN_STEPS if stage in (*INDICES_ONLY, "return_tokens") else SEEN)
        for stage in STAGES if stage != "exchange_counts"
    ),
    Quantity("combine/order", "P T D", "case", "bits", _order, asks=lambda case: case.top_k >= 3),
]  # fmt: skip

QUANTITIES = {quantity.name: quantity for quantity in _TABLE}


def names(layout: Layout) -> tuple[str, ...]:
    """mode/stage/value of all that a backend of this layout has which returns every intermediate."""
    return tuple(name for quantity in _TABLE if layout in quantity.layouts for name in quantity.names())


@cache  # asked for each stage of each backend of each case
def quantity_of(name: str) -> Quantity:
    """The row of a name mode/stage/value. Raises ValueError where there is none."""
    rest = name.partition("/")[2]
    if rest not in QUANTITIES or name not in QUANTITIES[rest].names():
        raise ValueError(
            f"{name} is not a quantity: there are {', '.join(QUANTITIES)}, each after isolated/, e2e/, second/ "
            "or repeat/"
        )
    return QUANTITIES[rest]
