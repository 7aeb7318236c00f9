"""What the capture tests have PyTorch ranks do: the layer compiled and eager, over many routings."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils.checkpoint import CheckpointError, checkpoint

from parity.capture.measure import Measured
from torch_impl import kernels, layer, layout, routing, static
from torch_impl.experts import Experts
from torch_impl.glu import glu

T, D, F, E, K = 8, 8, 8, 8, 2
ROUTER = routing.Router(K)


class Compared(NamedTuple):
    """One rank's findings over all routings."""

    rows: list[int]  # received
    moved_differ: int  # tensors that are not the same bits
    error: float  # of out and gradients: the largest, in units of the dtype's rounding times the largest value
    graphs: int
    graph_breaks: int


def routings(P: int, rank: int, n: int) -> list[Tensor]:
    """Expert ids of one rank. First a common routing, which is compiled for; then rank 0 receives everything and rank 1
    nothing, then rank 1 a single row; and random ones after that.
    """
    everything = [[0, 1]] * T
    but_one = [*everything[:-1], [0, E // P]]
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K].contiguous() for _ in range(n - 2)]
    return [drawn[0], torch.tensor(everything), torch.tensor(but_one if rank == 0 else everything), *drawn[1:]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(P: int, seed: int = 0) -> list[Tensor]:
    """The router and one rank's experts."""
    e = E // P
    return [normal(*shape, seed=seed + i) for i, shape in enumerate([(D, E), (e, D, F), (e, D, F), (e, F, D)])]


def run_both(
    rank: int, P: int, n: int, backend: str, dtype: torch.dtype, on: str, group: dist.ProcessGroup | None
) -> Compared:
    """The layer forward and backward, eager and compiled once, on `n` routings."""
    device = torch.device("cpu") if on == "cpu" else torch.device("cuda", rank % torch.cuda.device_count())
    if on == "cuda" and torch.cuda.device_count() >= P:
        torch.cuda.set_device(device)
        members = dist.get_process_group_ranks(group)
        group = dist.new_group(members, backend="nccl", use_local_synchronization=True)  # type: ignore[assignment]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    inputs = [a.to(device, dtype).requires_grad_() for a in (normal(T, D, seed=rank), *parameters(P))]

    def moe(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, ids_TK):
        chosen = routing.route(x_TD, router_DE, ROUTER, expert_id_TK=ids_TK)
        return layer.moe_layer(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, ROUTER, routing=chosen, group=group)

    compiled = torch.compile(moe, backend=backend, fullgraph=True)
    rows, moved_differ, error = [], 0, 0.0
    for i, ids_TK in enumerate(routings(P, rank, n)):
        dout_TD = normal(T, D, seed=1000 + i).to(device, dtype)
        results = []
        for run in (moe, compiled):
            stages = run(*inputs, ids_TK.to(device))  # type: ignore[call-arg]
            results.append((stages, torch.autograd.grad(stages.out_TD, inputs, dout_TD)))
        (eager, gradients), (stages, gradients_) = results
        rows.append(stages.splits.n_received)
        moved_differ += sum(not torch.equal(a, b) for a, b in zip(moved(eager), moved(stages), strict=True))
        for a, b in zip((eager.out_TD, *gradients), (stages.out_TD, *gradients_), strict=True):
            scale = torch.finfo(dtype).eps * float(a.detach().abs().max().clamp(min=1))
            error = max(error, float((a.detach() - b.detach()).abs().max()) / scale)
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return Compared(rows, moved_differ, error, graphs, breaks)


def moved(stages: layer.Stages) -> list[Tensor]:
    """What stages 2 to 5 moved, whose bits no arithmetic has touched."""
    return [
        stages.grouped.x_ND, stages.grouped.slot_TK, stages.counts_Pe, stages.splits.send_P, stages.splits.receive_P,
        stages.received_RD, *stages.expert_major,
    ]  # fmt: skip


class TwoLayers(NamedTuple):
    """What one rank finds of two layers in one graph, each with a routing of its own."""

    graphs: int
    graph_breaks: int
    terms: int  # symbols in the longest size of any tensor
    symbols: int  # in sizes of tensors
    same: bool  # whether output and gradients are those of the eager layers, bit for bit


def two_layers(rank: int, P: int, group: dist.ProcessGroup | None) -> TwoLayers:
    """Two layers, one on the other's output, forward and backward, eager and compiled once, on five routings."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        sizes.extend(free_unbacked_symbols(n) for a in values if isinstance(a, Tensor) for n in a.shape)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def moe(x_TD, first, second, ids_TK, other_TK):
        for weights, ids in ((first, ids_TK), (second, other_TK)):
            chosen = routing.route(x_TD, weights[0], ROUTER, expert_id_TK=ids)
            x_TD = x_TD + layer.moe_layer(x_TD, *weights, router=ROUTER, routing=chosen, group=group).out_TD
        return x_TD

    compiled = torch.compile(moe, backend=backend, fullgraph=True)
    x_TD, first, second = normal(T, D, seed=rank), parameters(P), parameters(P, seed=9)
    inputs = [a.requires_grad_() for a in (x_TD, *first, *second)]
    drawn, same = routings(P, rank, 5), True
    for ids_TK, other_TK in zip(drawn, drawn[1:] + drawn[:1], strict=True):
        results = []
        for run in (moe, compiled):
            out_TD = run(x_TD, first, second, ids_TK, other_TK)  # type: ignore[call-arg]
            results.append((out_TD, *torch.autograd.grad(out_TD.sum(), inputs)))
        same &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return TwoLayers(graphs, breaks, max(map(len, sizes)), len(set().union(*sizes)), same)


def uneven(T_here: int, backend: str, group: dist.ProcessGroup | None) -> bool:
    """Whether the compiled layer equals the eager one where ranks have different numbers of tokens."""
    torch._dynamo.reset()

    def moe(x_TD, *weights):
        return layer.moe_layer(x_TD, *weights, router=ROUTER, max_tokens=T, group=group).out_TD

    inputs = [normal(T_here, D), *parameters(dist.get_world_size(group))]
    return torch.equal(torch.compile(moe, backend=backend, fullgraph=True)(*inputs), moe(*inputs))


class Captured(NamedTuple):
    of: Measured
    bounded: bool  # whether it is known that no size is larger than a rank can receive
    rows: list[int]  # received
    same: bool  # whether all results are those of the eager step, bit for bit


def captured_by(how: str, rank: int, P: int, group: dist.ProcessGroup | None) -> Captured:
    """Capture the layer's step once, by another way than `torch.compile`, and run that on other routings."""
    from parity.capture.in_torch import describe, tensors  # not for pytest: Inductor warns of itself when imported

    inputs = [normal(T, D, seed=rank).requires_grad_(), *(a.requires_grad_() for a in parameters(P))]

    def step(ids_TK: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        chosen = routing.route(inputs[0], inputs[1], ROUTER, expert_id_TK=ids_TK)
        stages = layer.moe_layer(*inputs, router=ROUTER, routing=chosen, group=group)
        results = (*moved(stages), stages.out_TD)
        return results if "export" in how else (*results, *torch.autograd.grad(stages.out_TD.sum(), inputs))

    class Step(torch.nn.Module):
        def forward(self, ids_TK: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return step(ids_TK, *inputs)

    first, *others = routings(P, rank, 5)
    if how == "make_fx":
        graph = run = make_fx(step, tracing_mode="symbolic")(first, *inputs)
    else:
        program = torch.export.export(Step(), (first, *inputs), strict=how == "strict export").run_decompositions({})
        graph, run = program.graph_module, program.module()
    found, rows, same = Measured("torch", "", P, how), [], True
    describe(found, {"forward": graph})
    values = [value for _, value in tensors(graph)]
    most = P * values[0].shape[0] * min(K, E // P)  # the ids come first; to make_fx, their number is a symbol too
    sizes = [n for value in values for n in value.shape if isinstance(n, torch.SymInt) and free_unbacked_symbols(n)]
    bounded = bool(sizes) and all(statically_known_true(n <= most) for n in sizes)
    for ids_TK in (first, *others):
        expected, actual = step(ids_TK, *inputs), run(ids_TK, *inputs)
        rows.append(len(expected[5]))
        same &= all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    return Captured(found, bounded, rows, same)


def permute_of(many_counts: list[list[int]], output_size: int | None, backend: str, _: Any) -> list[list[float] | str]:
    """Compile a permute whose size is known when it runs, and run it for all counts: the rows, or what it said."""
    torch._dynamo.reset()

    def permute(x_RD: Tensor, counts_Pe: Tensor) -> Tensor:
        rows = counts_Pe.sum().item()
        torch._check(rows >= 0)
        torch._check(rows <= 16)
        return layout.to_expert_major(x_RD[:rows], counts_Pe, output_size).x_RD

    run, results = torch.compile(permute, backend=backend, fullgraph=True), []
    for counts in many_counts:
        try:
            results.append(run(torch.arange(16.0)[:, None], torch.tensor([counts])).flatten().tolist())
        except RuntimeError as error:
            results.append(str(error))
    return results


def ids_out_of_range(backend: str, group: dist.ProcessGroup | None) -> str:
    """Compile the layer and choose an expert that does not exist; ids are not read under capture. What it says."""
    torch._dynamo.reset()

    def moe(ids_TK, *inputs):
        chosen = routing.Routing(ids_TK.float(), ids_TK, routing.count_per_expert(ids_TK, E))
        return layer.moe_layer(*inputs, router=ROUTER, routing=chosen, group=group).out_TD

    ids_TK, inputs = torch.tensor([[0, 1]] * T), [normal(T, D), *parameters(dist.get_world_size(group))]
    run = torch.compile(moe, backend=backend, fullgraph=True)
    run(ids_TK, *inputs)
    ids_TK[3, 1] = E
    try:
        run(ids_TK, *inputs)
    except RuntimeError as error:
        return str(error)
    return ""


def static_and_compiled(dtype: str, n_bins: int, group: dist.ProcessGroup | None) -> list[bool]:
    """Whether static PyTorch, on one rank, gives the same output and gradients eager and compiled whole, bit by bit."""
    torch._dynamo.reset()
    inputs = [a.to(getattr(torch, dtype)).requires_grad_() for a in (normal(T, D), *parameters(1))]
    capacity = static.Capacity(n_bins, T)  # some drop

    def both_ways(layer):
        out_TD = layer(*inputs, router=ROUTER, capacity=capacity, group=group).out_TD
        return out_TD, *torch.autograd.grad(out_TD, inputs, torch.ones_like(out_TD))

    compiled = torch.compile(static.moe_layer, backend="aot_eager", fullgraph=True)
    return [torch.equal(a, b) for a, b in zip(both_ways(static.moe_layer), both_ways(compiled), strict=True)]


def swiglu_through_stand_ins(dtype: torch.dtype, group: dist.ProcessGroup | None) -> tuple[bool, bool]:
    """SwiGLU compiled, with what runs anywhere in the kernels' places: equal to eager, and whether through them.

    The stand-in for the backward kernel gives the wrong gradient, by which it is known.
    """
    torch._dynamo.reset()
    kept = kernels.use_kernels, kernels.swiglu, kernels.swiglu_backward
    kernels.use_kernels = lambda x: not (torch.is_grad_enabled() and x.is_floating_point())
    kernels.swiglu = lambda gate, up, _: (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
    kernels.swiglu_backward = lambda dhidden, gate, up, _: (dhidden * up, dhidden * gate)
    try:
        gate, up = (normal(6, 8, seed=i).to(dtype).requires_grad_() for i in range(2))
        results = []
        for run in (glu, torch.compile(glu, backend="aot_eager", fullgraph=True)):
            hidden = run(gate, up, Experts())
            results.append((hidden, *torch.autograd.grad(hidden, (gate, up), torch.ones_like(hidden))))
        equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        return equal, torch.equal(results[1][1], up)
    finally:
        kernels.use_kernels, kernels.swiglu, kernels.swiglu_backward = kept


# Token 0 chooses expert 0; its second choice ties between all others.
TIED_DE = torch.cat([torch.eye(1, E), torch.eye(E).roll(1, dims=1)[1:] + torch.eye(E)[1:] / 2])


def recomputed(replay: bool, how: str, rank: int, group: dist.ProcessGroup | None) -> str:
    """Recompute the dispatch in backward, where the tie falls to the highest id: replayed or chosen again.

    "equal" if the gradients are those of a step that keeps everything, bit for bit; otherwise what went wrong.
    """
    torch._dynamo.reset()
    T = D
    weights = parameters(dist.get_world_size(group))[1:]
    inputs = [a.requires_grad_() for a in (torch.eye(T), TIED_DE.clone(), *weights)]
    chosen = 0

    def choose(x_TD: Tensor, router_DE: Tensor) -> Tensor:
        nonlocal chosen
        chosen += 1
        if chosen == 1:
            return routing.route(x_TD, router_DE, ROUTER).expert_id_TK
        return E - 1 - routing.route(x_TD, router_DE.flip(1), ROUTER).expert_id_TK

    def moe(ids_TK, x_TD, router_DE, *weights):
        ids_TK = choose(x_TD.detach(), router_DE.detach()) if ids_TK is None else ids_TK
        routed = routing.route(x_TD, router_DE, ROUTER, expert_id_TK=ids_TK)
        return layer.moe_layer(x_TD, router_DE, *weights, router=ROUTER, routing=routed, group=group).out_TD

    kept_TK = choose(inputs[0].detach(), inputs[1].detach())
    dout_TD = normal(T, D, seed=rank)
    expected = torch.autograd.grad(moe(kept_TK, *inputs), inputs, dout_TD)
    chosen = 0
    ids_TK = choose(inputs[0].detach(), inputs[1].detach()) if replay else None

    def step(*inputs):
        return checkpoint(moe, ids_TK, *inputs, use_reentrant=False)

    run = step if how == "eager" else torch.compile(step, backend=how, fullgraph=True)
    try:
        actual = torch.autograd.grad(run(*inputs), inputs, dout_TD)
    except CheckpointError as error:
        return str(error)
    return "equal" if all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)) else "another gradient"
