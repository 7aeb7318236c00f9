"""The stages of a case in PyTorch, each on its own and all of them as the layer: what one rank computes."""

import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # as the first gradient does: here it is once, before ranks are forked
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torch_impl
from parity.cases.case import Case, not_default
from parity.cases.parameters import BY_NAME, Parameter, parameters_of
from parity.oracle import reference
from parity.oracle.problem import Problem
from parity.oracle.quantities import QUANTITIES
from parity.oracle.rows import Layout, indices, lay_out, row_tables, straight
from parity.oracle.windows import STRIDE, Windows
from parity.run import torch_ranks
from parity.run.backend import Backend, Setting, resolve
from parity.run.naming import MAIN, named, named_stages, together
from parity.run.torch_ranks import At
from parity.run.trace import Trace, differing_bits
from torch_impl import direct, exchange, experts, grouping, layer, layout, routing, static
from torch_impl.direct import exchange as direct_exchange
from torch_impl.direct import experts as direct_experts
from torch_impl.direct import grouping as direct_grouping
from torch_impl.direct import layout as direct_layout
from torch_impl.static import exchange as static_exchange
from torch_impl.static import experts as static_experts
from torch_impl.static import grouping as static_grouping
from torch_impl.static import layout as static_layout

Arrays = dict[str, np.ndarray]
Tensors = Mapping[str, Tensor]
Group = dist.ProcessGroup | None


def run_all(backend: Backend, folder: Path, setting: Setting) -> None:
    """Run every problem in `folder`, as many processes as each has ranks, and save the traces there."""
    torch_ranks.run_all(backend, folder, setting, work(backend, setting))


def work(backend: Backend, setting: Setting) -> torch_ranks.Work:  # noqa: ARG001  the same for all
    """The function that each rank runs."""
    return run


def run(problem: Problem, backend: Backend, rank: int, device: torch.device, at: At) -> Trace | None:
    """This process's part of a problem; rank 0 gets everybody's and returns the trace.

    The layer runs on these inputs, on others, and on these again, with fresh memory full of NaN: what it keeps from a
    step, or reads before writing, shows as a difference between the first run and the last. Where the case has a
    second step, it runs in flight with the first, in both orders, or in a second group beside it.
    """
    case, stages_of = problem.case, resolve(backend.stages)
    rank_in_group, group = torch_ranks.my_group(case.processes // case.ranks, rank)
    own = problem if rank % (case.processes // case.ranks) == 0 else problem.second
    assert own is not None
    if case.way == "compiled" and stages_of.layout == "direct":
        why = "a compiler does not see rows that are written to another rank's memory: a CUDA graph can hold them"
        return None if rank else Trace(case, backend, environment(device) | {"not supported": why})
    with poisoned_memory():
        mine = _isolated(own, stages_of, rank_in_group, device, at, group)

    learned = learned_of(own, experts_of(case, rank_in_group), device)
    buffers = [stages_of.buffers_of(case, group, device) for _ in range(1 + (case.way == "in_flight"))]

    def step(of: Problem, beside: int = 0) -> Step:
        return Step(of, stages_of, rank_in_group, device, group, HostWaits(device), learned, buffers[beside])

    with poisoned_memory() if case.way == "compiled" else nullcontext():  # a change of this mode would compile anew
        at("the first step")
        (first := step(own)).forward()
        found = first.backward()
        at("steps on other inputs")
        for other in own.steps_between():
            (between := step(other)).forward()
            between.backward()
    at("the first step, repeated")
    with poisoned_memory():
        (again := step(own)).forward()
        mine |= again.backward()
    differ = added(dict.fromkeys(found, 0), found, mine)
    if case.way == "in_flight":
        at("two steps in flight")
        runs = [in_flight(step(problem), step(problem.second, 1), last) for last in (1, 0)]  # type: ignore[arg-type]
        for ours, _ in runs:
            differ = added(differ, ours, mine)
        differ = added(differ, *(theirs for _, theirs in runs))
        mine |= {name.replace("e2e", "second", 1): a for name, a in runs[0][1].items()}
    mine |= {name.replace("e2e", "repeat", 1): np.array(n) for name, n in differ.items()}
    at("gathering")
    mine = {name: mine[name] for name in backend.provides if name in mine}
    mine = with_padding(case, rank_in_group, backend.layout, mine) if case.uneven else mine
    everybody = torch_ranks.gathered(mine, case.processes, rank)
    if rank:
        return None
    trace = Trace(case, backend, environment(device) | first.waits.found())
    groups = case.processes // case.ranks
    trace.arrays = {name: [arrays[name] for arrays in everybody[::groups]] for name in mine}
    second = {name: name.replace("e2e", "second", 1) for name in mine if groups > 1 and name.startswith("e2e")}
    of_second = {other: name for name, other in second.items() if other in backend.provides}
    trace.arrays |= {other: [a[name] for a in everybody[1::groups]] for other, name in of_second.items()}
    return trace


def tokens_of(case: Case, rank: int, a: np.ndarray) -> np.ndarray:
    """A rank's part of an array [P, T, ...], without tokens that are padding."""
    return a[rank, : case.tokens_of(rank)]


def with_padding(case: Case, rank: int, layout: Layout, arrays: Arrays) -> Arrays:
    """Arrays of the rank's own tokens, extended by tokens that are padding, as the case has them."""
    T, missing = case.tokens_of(rank), case.tokens - case.tokens_of(rank)
    grouped_rows = case.bins * case.capacity if layout == "static" else T * case.top_k
    fill = {"route/expert_id": -1, "group_by_expert/slot": grouped_rows}

    def padded(name: str, a: np.ndarray) -> np.ndarray:
        mode, _, rest = name.partition("/")
        if mode == "repeat":
            return a
        if rest == "group_by_expert/assignment":  # past the end is where the rows of all tokens end
            return np.where(a == T * case.top_k, case.assignments, a)
        if rest == "group_by_expert/dropped_in_all":
            return a + missing * case.top_k
        if not QUANTITIES[rest].axes.startswith("P T"):
            return a
        return np.concatenate([a, np.full((missing, *a.shape[1:]), fill.get(rest, 0), a.dtype)])

    return {name: padded(name, a) for name, a in arrays.items()}


def in_flight(first: "Step", second: "Step", last: int) -> tuple[Arrays, Arrays]:
    """Two steps, both forwards before both backwards; `last` is the one whose backward comes last."""
    first.forward()
    second.forward(choose=second.problem.own_choice)
    arrays = {i: (first, second)[i].backward() for i in (1 - last, last)}
    return arrays[0], arrays[1]


def added(counts: dict[str, int], a: Arrays, b: Arrays) -> dict[str, int]:
    """How many numbers differ in any bit, added up by name."""
    return {name: n + int(differing_bits(a[name], b[name])) for name, n in counts.items()}


@dataclass
class HostWaits:
    """How often one forward and backward pass made the host wait for the GPU, as PyTorch's own debug mode has it."""

    device: torch.device
    count: int = 0

    def found(self) -> dict[str, str]:
        """The count for the report. On a CPU the host never waits."""
        return {"host waits": f"{self.count} a step"} if self.device.type == "cuda" else {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the waits in this block."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.count += sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, as PyTorch's deterministic mode fills them.

    Not by `use_deterministic_algorithms`, which imports Inductor: two seconds in every rank.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    yield  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    torch.set_deterministic_debug_mode(before)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and devices, for the report."""
    about = {"torch": str(torch.__version__), "python": platform.python_version(), "platform": platform.platform()}
    if dist.is_initialized():
        about["collectives"] = dist.get_backend_config()
    if device.type == "cuda":
        about["devices"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return about


class Dynamic:
    """`torch_impl`'s stages of a case, called as those of `Static`."""

    layout: Layout = "dynamic"
    padding = np.nan  # what stage 6 is fed in place of missing rows

    def __init__(
        self, case: Case, group: Group, device: torch.device, send_P: Sequence[int], receive_P: Sequence[int],  # noqa: ARG002
    ) -> None:  # fmt: skip
        self.group, self.alone = group, case.ranks == 1
        self.how = options_of(case)["experts"]
        self.splits = exchange.Splits(torch.tensor(send_P), torch.tensor(receive_P), sum(send_P), sum(receive_P))

    def group_by_expert(self, x: Tensor, ids: Tensor, score: Tensor, counts: Tensor) -> Any:  # noqa: ARG002
        return grouping.group_by_expert(x, ids, counts)

    def exchange_counts(self, counts: Tensor) -> Any:
        return exchange.exchange_counts(counts, self.group)

    def send_tokens(self, x: Tensor) -> Any:
        return exchange.send_tokens(x, self.splits, self.group)

    def to_expert_major(self, x: Tensor, counts_Pe: Tensor) -> Any:
        output_size = None if self.alone else self.splits.n_received  # the default is the number of rows of x
        return layout.to_expert_major(x, counts_Pe, output_size)

    def apply_experts(self, x: Tensor, counts_e: Tensor, learned: Tensors) -> Any:
        return experts.apply_experts(x, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def to_rank_major(self, y: Tensor, source: Tensor, target: Tensor) -> Any:
        return layout.to_rank_major(y, source, target)

    def return_tokens(self, y: Tensor) -> Any:
        return exchange.return_tokens(y, self.splits, self.group)

    def combine(self, y: Tensor, score: Tensor, keep: Tensor, slot: Tensor, assignment: Tensor) -> Any:
        return grouping.combine(y, score * keep, slot, assignment)

    def planned(self) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def layer(
        case: Case, x: Tensor, learned: Tensors, chosen: routing.Routing | None, keep: Tensor, capacity: object,  # noqa: ARG004
        group: Group, buffers: None,  # noqa: ARG004
    ) -> layer.Stages:  # fmt: skip
        """The whole layer; what a capacity would drop has its score masked."""
        masked = chosen and with_scores(chosen, chosen.score_TK * keep)
        how = options_of(case) | together(torch_impl, learned)
        most, weights = (case.tokens if case.uneven else None), weights_in(learned)
        return layer.moe_layer(x, learned["router"], *weights, **how, routing=masked, max_tokens=most, group=group)

    @staticmethod
    def buffers_of(*_: object) -> None:
        """What the layer takes besides: nothing."""


class Static:
    """`torch_impl.static`'s stages of a case, with bins of the oracle's capacity; rows come and go as [rows, D]."""

    layout: Layout = "static"

    def __init__(self, case: Case, group: Group, *_: object) -> None:
        self.group = group
        self.case, self.capacity = case, plan(case)._replace(rows=case.capacity)
        self.how = options_of(case)["experts"]
        self.bins = (case.bins, case.capacity)
        per_rank = case.bins == case.ranks
        self.major = (case.bins * case.capacity,) if per_rank else (case.experts // case.ranks, -1)
        self.padding = np.nan if per_rank else 0  # experts multiply whole bins, in which stage 5 guarantees zeros

    def in_bins(self, rows: Tensor) -> Tensor:
        return rows.reshape(*self.bins, *rows.shape[1:])

    def group_by_expert(self, x: Tensor, ids: Tensor, score: Tensor, counts: Tensor) -> Any:
        return static_grouping.group_by_expert(x, ids, score, counts, self.capacity)

    def exchange_counts(self, counts: Tensor) -> Any:
        return static_exchange.exchange_counts(counts, self.group)

    def send_tokens(self, x: Tensor) -> Any:
        return static_exchange.send_tokens(self.in_bins(x), self.group)

    def to_expert_major(self, x: Tensor, counts_Pe: Tensor) -> Any:
        return static_layout.to_expert_major(self.in_bins(x), counts_Pe)

    def apply_experts(self, x: Tensor, counts_e: Tensor, learned: Tensors) -> Any:
        x = x.reshape(*self.major, x.shape[1])
        return static_experts.apply_experts(x, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def to_rank_major(self, y: Tensor, source: Tensor, target: Tensor) -> Any:
        major = y.reshape(*self.major, y.shape[1])
        return static_layout.to_rank_major(major, source.reshape(major.shape[:-1]), self.in_bins(target))

    def return_tokens(self, y: Tensor) -> Any:
        return static_exchange.return_tokens(self.in_bins(y), self.group)

    def combine(self, y: Tensor, score: Tensor, keep: Tensor, slot: Tensor, assignment: Tensor) -> Any:  # noqa: ARG002
        return static_grouping.combine(self.in_bins(y), score, slot, self.in_bins(assignment))

    def planned(self) -> dict[str, Tensor]:
        return {"capacity": torch.tensor(plan(self.case).rows)}

    @staticmethod
    def layer(
        case: Case, x: Tensor, learned: Tensors, chosen: routing.Routing | None, keep: Tensor,  # noqa: ARG004
        capacity: static.Capacity, group: Group, buffers: None,  # noqa: ARG004
    ) -> static.Stages:  # fmt: skip
        """The whole layer; its own capacity drops."""
        how, weights = options_of(case) | together(torch_impl, learned), weights_in(learned)
        return static.moe_layer(x, learned["router"], *weights, **how, capacity=capacity, routing=chosen, group=group)

    @staticmethod
    def buffers_of(*_: object) -> None:
        """What the layer takes besides: nothing."""


class Direct:
    """`torch_impl.direct`'s stages of a case. Rows move once each way, so its stages take other arguments."""

    layout: Layout = "direct"
    padding = np.nan

    def __init__(self, case: Case, group: Group, device: torch.device, *_: object) -> None:
        self.buffers = self.buffers_of(case, group, device)
        self.how = options_of(case)["experts"]

    @staticmethod
    def buffers_of(case: Case, group: Group, device: torch.device) -> direct.Buffers:
        """A set of buffers, full of NaN: rows that nobody writes must not be read."""
        sizes = (case.tokens, case.top_k, case.experts, case.width)
        return full_of_nan(direct.make_buffers(*sizes, getattr(torch, case.dtype), device, group))

    def group_by_expert(self, x: Tensor, ids: Tensor, score: Tensor, counts: Tensor) -> Any:  # noqa: ARG002
        return direct_grouping.group_by_expert(ids, counts)

    def exchange_counts(self, counts: Tensor) -> Any:
        return direct_exchange.exchange_counts(counts, self.buffers)

    def to_expert_major(self, slot: Tensor, counts_PE: Tensor) -> Any:
        return direct_layout.to_expert_major(slot, counts_PE, self.buffers)

    def send_tokens(self, x: Tensor, slot: Tensor, place: Tensor, origin: Tensor) -> Any:
        return direct_exchange.send_tokens(x, slot, place, origin, self.buffers)

    def apply_experts(self, x: Tensor, counts_e: Tensor, learned: Tensors) -> Any:
        return direct_experts.apply_experts(x, counts_e, *weights_in(learned), experts=self.how, **biases_in(learned))

    def return_tokens(self, y: Tensor, place: Tensor, origin: Tensor) -> Any:
        return direct_exchange.return_tokens(y, place, origin, self.buffers)

    def combine(self, y: Tensor, returned: Tensor, score: Tensor, keep: Tensor, slot: Tensor, place: Tensor) -> Any:
        return direct_grouping.combine(y, returned, score * keep, slot, place, self.buffers)

    def planned(self) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def layer(
        case: Case, x: Tensor, learned: Tensors, chosen: routing.Routing | None, keep: Tensor, capacity: object,  # noqa: ARG004
        group: Group, buffers: direct.Buffers,  # noqa: ARG004
    ) -> direct.Stages:  # fmt: skip
        """The whole layer; what a capacity would drop has its score masked."""
        masked = chosen and with_scores(chosen, chosen.score_TK * keep)
        how, weights = options_of(case) | together(torch_impl, learned), weights_in(learned)
        return direct.moe_layer(x, learned["router"], *weights, **how, routing=masked, buffers=buffers)


def full_of_nan(buffers: direct.Buffers) -> direct.Buffers:
    """The same buffers with NaN in all their rows, on all ranks."""
    tokens = [] if buffers.arrivals is None else [buffers.arrivals.x_AD]
    for part in (buffers.placed_RD, buffers.returned_ND, buffers.dy_RD, buffers.dx_ND, *tokens):
        part.own_OD.fill_(torch.nan)
    if buffers.returned_ND.handle is not None:  # no rank writes here before that is done
        torch.cuda.synchronize()
        dist.barrier(buffers.returned_ND.group)
    return buffers


Stages = type[Dynamic] | type[Static] | type[Direct]


def options_of(case: Case) -> dict[str, Any]:
    """How the layer routes and computes, for `moe_layer`."""
    of_router, of_experts = not_default(case.router), not_default(case.expert)
    return {"router": routing.Router(**of_router), "experts": experts.Experts(**of_experts)}


def weights_in(learned: Tensors) -> tuple[Any, Any, Any]:
    """The experts' weights; None for a gate that there is not."""
    return learned.get("w_gate"), learned["w_up"], learned["w_down"]


def biases_in(learned: Tensors) -> dict[str, Any]:
    """The experts' biases, as the argument of `apply_experts`; nothing where there are none."""
    return together(torch_impl, learned, "biases")


def with_scores(chosen: routing.Routing, score_TK: Tensor) -> routing.Routing:
    """The routing with other scores. Not `_replace`, of whose result PyTorch 2.11's compiler cannot read the fields."""
    return routing.Routing(score_TK, chosen.expert_id_TK, chosen.counts_E)


def plan(case: Case) -> static.Capacity:
    """The capacity that the implementation itself computes."""
    return static.plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks, **not_default(case.capacity_options),
    )  # fmt: skip


def _isolated(problem: Problem, stages_of: Stages, rank: int, device: torch.device, at: At, group: Group) -> Arrays:
    """Every stage fed the oracle's input, forward and backward."""
    case, out = problem.case, {}
    table = row_tables(case, problem.expert_id, problem.keep, stages_of.layout)
    sent_PE = reference.sent(case, problem.expert_id, problem.keep, stages_of.layout)
    received_Pe = reference.received(case, sent_PE)[rank]

    def put(a: np.ndarray) -> Tensor:
        return to_torch(a).to(device)

    def rows(values: np.ndarray, where: str, fill: float = np.nan) -> Tensor:
        return put(lay_out(values.reshape(-1, case.width), table[where], fill)[rank])

    def keep_values(stage: str, values: dict[str, Tensor]) -> None:
        out.update({f"isolated/{stage}/{k}": to_numpy(a) for k, a in values.items() if isinstance(a, Tensor)})

    def alone(
        stage: str, f: Callable[..., Any], inputs: dict[str, Tensor], cotangent: Tensor, returns: str = ""
    ) -> dict[str, Tensor]:
        """What the stage returns, and the gradient of each input from the cotangent of what the next stage takes.

        `returns` is its name, where it is not what the next stage takes in all layouts.
        """
        at(stage)
        leaves = {name: a.requires_grad_() for name, a in inputs.items()}
        before = copies_of(case, given := [*leaves.values(), cotangent])
        values = {returns: f(*leaves.values())} if returns else named(stage, f(*leaves.values()))
        # A copy now, in the caller's stream: autograd waits at its end for streams that f may have forgotten.
        copies = {name: a.detach().clone() for name, a in values.items() if isinstance(a, Tensor)}
        result, wanted = values[returns or MAIN[stage]], tuple(leaves.values())
        kept = copies_of(case, torch.autograd.grad(result, wanted, cotangent, retain_graph=True))
        again = differing(case, torch.autograd.grad(result, wanted, cotangent), kept)
        found = copies | {f"d{name}": g for name, g in zip(leaves, kept, strict=True)}
        if returns != "shared":  # of which the stage's own are enough
            found |= {"again": again, "changed": differing(case, given, before)}
        keep_values(stage, found)
        return found

    def put_tokens(a: np.ndarray) -> Tensor:
        return put(tokens_of(case, rank, a))

    ids, keep, score = put_tokens(problem.expert_id), put_tokens(problem.keep), put_tokens(problem.score)
    x_rows = np.repeat(problem.given.reshape(-1, case.width), case.top_k, axis=0)
    learned = learned_of(problem, experts_of(case, rank), device)
    how = options_of(case)

    def of_stage(wanted: Callable[[Parameter], bool]) -> dict[str, Tensor]:
        return {one.name: learned[one.name] for one in parameters_of(case) if one.learned and wanted(one)}

    def summed(found: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        return {f"d{name}": torch_ranks.all_sum(found[f"d{name}"], group) for name in names}

    def route(x: Tensor, of_router: Tensors, ids: Tensor | None) -> routing.Routing:
        values = {**learned, **of_router}
        more = together(torch_impl, values, "per_expert")
        return routing.route(x, values["router"], how["router"], expert_id_TK=ids, **more)

    of_router = of_stage(lambda one: one.stage == "route")
    replayed = alone(
        "route", lambda x, *w: route(x, dict(zip(of_router, w, strict=True)), put_tokens(problem.other_experts)),
        {"x": put_tokens(problem.x)} | of_router, put_tokens(problem.dscore),
    )  # fmt: skip
    own = route(put_tokens(problem.x), {}, None)
    keep_values("route", {"expert_id": own.expert_id_TK} | summed(replayed, of_router))
    counts = routing.count_per_expert(ids, case.experts)

    splits = (sent_PE[rank].reshape(case.ranks, -1).sum(axis=1).tolist(), received_Pe.sum(axis=1).tolist())
    stages: Any = stages_of(case, group, device, *splits)
    counts_Pe = put(received_Pe)

    def grouped(x: Tensor) -> Any:
        return stages.group_by_expert(x, ids, score, counts)

    is_direct = stages_of.layout == "direct"
    if is_direct:
        before = copies_of(case, [ids])
        keep_values("group_by_expert", named("group_by_expert", grouped(put_tokens(problem.given))))
        keep_values("group_by_expert", {"changed": differing(case, [ids], before)})
    else:
        alone("group_by_expert", grouped, {"x": put_tokens(problem.given)}, rows(problem.dx_rows, "grouped"))
    keep_values("group_by_expert", stages.planned())

    at("exchange_counts")
    told = stages.exchange_counts(put(sent_PE[rank]))
    keep_values("exchange_counts", {"counts_of_all": told} if is_direct else named("exchange_counts", told))

    of_oracle = indices(case, table, rank)
    if is_direct:
        by_row = straight(case, table)
        of_oracle["place"] = by_row["place"][table["grouped"][rank]]
        of_oracle["origin"] = by_row["origin"][table["expert_major"][rank]]
    of_oracle["slot"] = of_oracle["slot"][: ids.shape[0]]
    of_oracle["assignment"] = of_oracle["assignment"].clip(max=ids.numel())
    index = {name: put(a) for name, a in of_oracle.items()}

    if is_direct:
        places = (index["place"], index["origin"])
        at("to_expert_major")
        found = stages.to_expert_major(index["slot"], put(sent_PE))
        keep_values("to_expert_major", named("to_expert_major", found))
        alone(
            "send_tokens", sent := lambda x: stages.send_tokens(x, index["slot"], *places),
            {"tokens": put_tokens(problem.given)}, rows(problem.dx_rows, "expert_major"), returns="rows",
        )  # fmt: skip
    else:
        alone("send_tokens", stages.send_tokens, {"x": rows(x_rows, "grouped")}, rows(problem.dx_rows, "received"))
        alone(
            "to_expert_major", lambda x: stages.to_expert_major(x, counts_Pe), {"x": rows(x_rows, "received")},
            rows(problem.dx_rows, "expert_major"),
        )  # fmt: skip

    of_experts = of_stage(lambda one: one.per_rank)
    found = alone(
        "apply_experts",
        lambda x, *w: stages.apply_experts(x, counts_Pe.sum(0), dict(zip(of_experts, w, strict=True))),
        {"x": rows(x_rows, "expert_major", stages.padding)} | of_experts,
        rows(problem.dy, "expert_major", stages.padding),
    )  # fmt: skip
    keep_values("apply_experts", {f"d{name}": found[f"d{name}"] for name in of_experts})
    of_shared = of_stage(lambda one: one.shared)
    if of_shared:

        def shared_expert(x: Tensor, *w: Tensor) -> Tensor:
            shared = together(torch_impl, dict(zip(of_shared, w, strict=True)), "shared")
            return experts.shared_expert(x, **shared, experts=how["experts"])

        inputs = {"shared_x": put_tokens(problem.x)} | of_shared
        found = alone("apply_experts", shared_expert, inputs, put_tokens(problem.dout), returns="shared")
        keep_values("apply_experts", summed(found, of_shared))
    del learned, found

    if is_direct:  # the gradient of what returns is `combine`'s
        at("return_tokens")
        before = copies_of(case, given := [rows(problem.y, "expert_major")])
        keep_values("return_tokens", {"y": stages.return_tokens(*given, *places)})
        keep_values("return_tokens", {"changed": differing(case, given, before)})
    else:
        alone(
            "to_rank_major", lambda y: stages.to_rank_major(y, index["source"], index["target"]),
            {"y": rows(problem.y, "expert_major")}, rows(problem.dy, "received"),
        )  # fmt: skip
        alone("return_tokens", stages.return_tokens, {"y": rows(problem.y, "received")}, rows(problem.dy, "grouped"))

    def combine(y: Tensor, score: Tensor) -> Any:
        return stages.combine(y, score, keep, index["slot"], index["assignment"])

    def combine_returned(y: Tensor, score: Tensor, returned: Tensor) -> Any:
        return stages.combine(y, returned, score, keep, index["slot"], index["place"])

    returned = rows(problem.y, "grouped")
    if is_direct:
        inputs = {"rows": rows(problem.y, "expert_major"), "score": score}
        alone("combine", lambda y, score: combine_returned(y, score, returned), inputs, put_tokens(problem.dout))
    else:
        alone("combine", combine, {"y": returned, "score": score}, put_tokens(problem.dout))

    if case.top_k >= 3:
        probe = rows(np.where(problem.keep[..., None], problem.order_probe()[0], 0), "grouped")
        ones = keep.to(score.dtype)
        found = combine_returned(returned, ones, probe) if is_direct else combine(probe, ones)
        keep_values("combine", {"order": found})
        x = put_tokens(problem.x).requires_grad_()
        if is_direct:
            probe = rows(np.where(problem.keep[..., None], problem.order_probe()[0], 0), "expert_major")
            keep_values("send_tokens", {"dtokens_order": torch.autograd.grad(sent(x), x, probe)[0]})
        else:
            (dx,) = torch.autograd.grad(named("group_by_expert", grouped(x))["x"], x, probe)
            keep_values("group_by_expert", {"dx_order": dx})
    return out


class Step:
    """The whole layer on one rank's tokens: forward, and then backward, with whatever happens between them."""

    def __init__(
        self, problem: Problem, stages_of: Stages, rank: int, device: torch.device, group: Group, waits: "HostWaits",
        learned: dict[str, Tensor], buffers: Any,
    ) -> None:  # fmt: skip
        case = problem.case

        def put(a: np.ndarray) -> Tensor:
            return to_torch(a).to(device)

        self.problem, self.stages_of, self.group, self.waits = problem, stages_of, group, waits
        self.capacity, self.buffers = plan(case), buffers

        def put_tokens(a: np.ndarray) -> Tensor:
            return put(tokens_of(case, rank, a))

        self.x, self.learned = put_tokens(problem.x).requires_grad_(), learned
        self.leaves = {one.name: self.learned[one.name].requires_grad_() for one in parameters_of(case) if one.learned}
        self.ids, self.keep = put_tokens(problem.expert_id), put_tokens(problem.keep)
        self.score = put_tokens(problem.score) if case.priority == "score" else None
        self.dout, self.aux = put_tokens(problem.dout), put_tokens(problem.aux)
        # Autograd does not see scores inside a compiled graph. A term added to the scores has the same gradient.
        self.probe = torch.zeros_like(self.aux).requires_grad_() if case.way == "compiled" else None
        self.given = {"group_by_expert": [self.x, self.ids], "combine": [self.dout]}
        for one in parameters_of(case):
            self.given.setdefault(one.stage, []).append(self.learned[one.name])
        self.before = {stage: copies_of(case, tensors) for stage, tensors in self.given.items()}

    def forward(self, choose: bool = False) -> None:
        """The layer, with the oracle's expert ids, or those that the router chooses."""
        case = self.problem.case
        layer = self._chosen if choose else self._replayed
        if case.way == "compiled":  # Inductor fuses across stages; it is tested with captures instead
            layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
        if case.way == "recomputed":
            layer = partial(checkpoint, layer, use_reentrant=False)
        with self.waits.counted():
            self.stages, self.scores = layer(self.x, *self.learned.values())

    def _replayed(self, x: Tensor, *learned: Tensor) -> tuple[Any, Tensor]:
        case, values = self.problem.case, dict(zip(self.learned, learned, strict=True))
        more = together(torch_impl, values, "per_expert")
        chosen = routing.route(x, values["router"], options_of(case)["router"], expert_id_TK=self.ids, **more)
        scores = chosen.score_TK
        if self.probe is not None:
            scores = scores + self.probe
            chosen = with_scores(chosen, scores)
        if self.score is not None:  # drops depend on the last bit of scores: take the oracle's
            chosen = with_scores(chosen, scores + (self.score - scores).detach())
        how = (self.capacity, self.group, self.buffers)
        return self.stages_of.layer(case, x, values, chosen, self.keep, *how), scores

    def _chosen(self, x: Tensor, *learned: Tensor) -> tuple[Any, Tensor]:
        values = dict(zip(self.learned, learned, strict=True))
        how = (self.capacity, self.group, self.buffers)
        stages = self.stages_of.layer(self.problem.case, x, values, None, self.keep, *how)
        return stages, stages.routing.score_TK

    def backward(self) -> Arrays:
        """Every value and every gradient, as e2e/stage/value."""
        leaves = (self.x, self.scores if self.probe is None else self.probe, *self.leaves.values())
        with self.waits.counted():
            dx, dscore, *found = torch.autograd.grad((self.stages.out_TD, self.scores), leaves, (self.dout, self.aux))
        values = seen(self.stages) | {
            "route/score": self.scores,
            "combine/dscore": dscore,
            **gradients(self.problem.case, dict(zip(self.leaves, found, strict=True)), self.group),
            "route/dx": dx,
            **{
                f"{stage}/changed": differing(self.problem.case, given, self.before[stage])
                for stage, given in self.given.items()
            },
        }
        return {f"e2e/{name}": to_numpy(value) for name, value in values.items() if isinstance(value, Tensor)}


def seen(stages: Any) -> dict[str, Any]:
    """Every array of the layer by name; of those in buffers a copy, without what stands past their rows."""
    found = named_stages(stages)
    if isinstance(stages, direct.Stages):
        there_R1 = (stages.expert_major.origin_R >= 0)[:, None]
        for name in ("send_tokens/rows", "apply_experts/y"):
            found[name] = torch.where(there_R1, found[name].detach(), 0)
        found["return_tokens/y"] = found["return_tokens/y"].detach().clone()
    return found


def copies_of(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of arrays as they are now; of experts' weights and their gradients, only the rows that are compared."""
    return [compared_part(case, a).detach().clone() for a in tensors]


def differing(case: Case, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> Tensor:
    """How many numbers differ in any bit from the copies."""

    def bits(a: Tensor) -> Tensor:
        return a.detach().contiguous().view(getattr(torch, f"int{8 * a.element_size()}"))

    pairs = zip((compared_part(case, a) for a in tensors), copies, strict=True)
    return torch.tensor(sum(int((bits(a) != bits(b)).sum()) for a, b in pairs))


def weights_of(w: np.ndarray | Windows, mine: slice, device: torch.device) -> torch.Tensor:
    """The weights of a rank's experts."""
    if isinstance(w, np.ndarray):
        return to_torch(w[mine]).to(device)
    bank, (_, rows, columns) = to_torch(w.bank).to(device), w.shape
    size, strides = (mine.stop - mine.start, rows, columns), (STRIDE, columns, 1)
    return bank.as_strided(size, strides, (w.first + mine.start) * STRIDE).clone()


def experts_of(case: Case, rank: int) -> slice:
    """A rank's own experts."""
    e = case.experts // case.ranks
    return slice(rank * e, (rank + 1) * e)


def learned_of(problem: Problem, mine: slice, device: torch.device) -> dict[str, Tensor]:
    """The learned arrays by name. Per-expert arrays are those of the experts in `mine`."""
    values = problem.parameters.there()
    return {
        one.name: weights_of(values[one.name], mine if one.per_rank else slice(None), device)
        for one in parameters_of(problem.case)
    }


def gradients(case: Case, found: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Gradients as stage/value: compared rows for a rank's own experts, sums over ranks for the rest."""
    own = compared(case, {name: a for name, a in found.items() if BY_NAME[name].per_rank})
    summed = {f"d{name}": torch_ranks.all_sum(a, group) for name, a in found.items() if not BY_NAME[name].per_rank}
    return {f"{BY_NAME[name[1:]].stage}/{name}": a for name, a in (own | summed).items()}


def compared(case: Case, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The compared rows of the gradients of a rank's own experts."""
    return {f"d{name}": compared_part(case, a) for name, a in found.items()}


def compared_part(case: Case, a: Tensor) -> Tensor:
    """The compared rows of experts' weights or their gradients, which have three axes; all rows of other arrays."""
    return a[:, case.compared_rows(a.shape[1])] if a.ndim == 3 else a


def to_torch(a: np.ndarray) -> torch.Tensor:
    """A tensor with the array's bits."""
    is_bfloat16 = a.dtype == ml_dtypes.bfloat16
    source = torch.from_numpy(np.array(a.view(np.int16) if is_bfloat16 else a))
    # copy_, because an empty NumPy array brings strides of zero, which grouped_mm refuses
    tensor = torch.empty(source.shape, dtype=source.dtype).copy_(source)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def to_numpy(a: object) -> np.ndarray:
    """An array with the tensor's bits."""
    assert isinstance(a, torch.Tensor)
    a = a.detach().cpu().contiguous()
    return a.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if a.dtype == torch.bfloat16 else a.numpy()
