"""What a compiler sees of the dispatch, for one P and one way to size the permute.

Each measurement is a process of its own, so that its peak memory can be measured.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.testing._internal.distributed.fake_pg import FakeStore

from parity.capture.measure import Clock, D, K, Measured, T, Way, e, peak_mib
from parity.run.supervisor import end_with_parent
from torch_impl import exchange, layout, rows


def measure(P: int, way: Way) -> Measured:
    """Capture one step forward and backward, without running it, and say how large its sizes became."""
    found = Measured("torch", str(torch.__version__), P, way)
    with ranks(P):
        before = peak_mib()
        try:
            graphs, found.capture_s = captured_graphs(partial(step, way=way), *inputs(P))
            describe(found, graphs)
            found.syncs = count_syncs(partial(step, way=way), P, graphs["backward"])
        except Exception as error:
            found.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        found.peak_mib = round(peak_mib() - before, 1)
    return found


def compile_seconds(P: int, way: Way) -> float:
    """CPU seconds that capture and Inductor take, forward and backward, in this process and the C++ compiler."""
    with ranks(P), torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        return capture(partial(step, way=way), inputs(P), compile_fx)


@contextmanager
def ranks(P: int) -> Iterator[None]:
    """A process group of P ranks in which only this one exists: enough to capture a step, not to run it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=P)
    try:
        yield
    finally:
        dist.destroy_process_group()


def inputs(P: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A rank's rows, and how many are for each expert."""
    return torch.zeros(T * K, D, device=device, requires_grad=True), torch.zeros(
        P * e, dtype=torch.int64, device=device
    )


def step(x_ND: Tensor, counts_E: Tensor, way: Way) -> Tensor:
    """Move rows to the ranks of their experts, into expert-major order, and back: stages 3, 4, 5, 7 and 8."""
    if way == "torch_impl":
        counts_Pe, splits = exchange.exchange_counts(counts_E)
        torch._check(splits.n_received <= counts_Pe.shape[0] * T * min(K, e))
        x_RD = exchange.send_tokens(x_ND, splits)
        x_RD, source_R, target_R = layout.to_expert_major(x_RD, counts_Pe, splits.n_received)
        return exchange.return_tokens(layout.to_rank_major(x_RD, source_R, target_R), splits)

    # Public stacks pass the splits to the exchange as lists of integers.
    group = dist.group.WORLD
    assert group is not None
    P = n_ranks = dist.get_world_size()
    sent_Pe = counts_E.reshape(P, -1)
    counts_Pe = collectives.all_to_all_single(sent_Pe, None, None, group)
    splits_2P = torch.stack([sent_Pe.sum(dim=1), counts_Pe.sum(dim=1)]).cpu()
    send_P, receive_P = splits_2P.tolist()
    for n in (*send_P, *receive_P):
        torch._check(n >= 0)
        torch._check(n <= T * min(K, e))
    x_RD = collectives.all_to_all_single_autograd(x_ND, receive_P, send_P, group)
    x_RD = collectives.wait_tensor(x_RD)
    if way == "none":
        size = torch.repeat_interleave(counts_Pe.reshape(-1)).shape[0]  # asks the device
    elif way == "list_sum":
        size = sum(receive_P)
    elif way == "received_shape":
        size = x_RD.shape[0]
    else:
        size = splits_2P[1].sum().item()
        torch._check(size >= 0)
        torch._check(size <= n_ranks * T * min(K, e))
        torch._check(size == x_RD.shape[0])
    source_R = rows.expert_major_source(counts_Pe, size)  # type: ignore[arg-type]
    target_R = rows.inverse_permutation(source_R)
    x_RD = rows.permute_rows(x_RD, source_R, target_R)
    y_RD = rows.permute_rows(x_RD, target_R, source_R)
    return collectives.wait_tensor(collectives.all_to_all_single_autograd(y_RD, send_P, receive_P, group))


class _CapturedError(Exception):
    """Raised once the graphs are captured: the step must not run, as there are no other ranks."""


def capture(function: Callable, arguments: tuple, compiler: Callable) -> float:
    """CPU seconds until `compiler` is through with the one graph of `function`, backward included; it is not run."""
    torch._dynamo.reset()
    seconds, clock = [], Clock()

    def backend(gm: GraphModule, example: list[Any]) -> Callable:
        # Make backward compile now: it would otherwise compile at its first run, unless a symbol is saved for it.
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            compiler(gm, example)
        seconds.append(clock.seconds())
        raise _CapturedError

    try:
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    except BackendCompilerFailed:
        if not seconds:
            raise
    return seconds[0]


def captured_graphs(function: Callable, *arguments: Any) -> tuple[dict[str, GraphModule], float]:
    """The forward and the backward graph of a function, as every backend gets them, and the seconds they took."""
    graphs: dict[str, GraphModule] = {}

    def keep(name: str) -> Callable:
        def compiler(gm: GraphModule, _: list[Any]) -> Callable:
            graphs[name] = gm
            return gm.forward

        return compiler

    seconds = capture(function, arguments, aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward")))
    return graphs, seconds


def describe(found: Measured, graphs: dict[str, GraphModule]) -> None:
    """Count the nodes, the unbacked symbols and the terms of the sizes in both graphs."""
    values = [(name, node, value) for name, gm in graphs.items() for node, value in tensors(gm)]
    shape_env = shape_env_of(values[0][2])
    sizes = [(name, node, expression(n)) for name, node, value in values for n in value.shape]
    permutes = {name: [s for n, node, s in sizes if n == name and is_gather(node)] for name in graphs}
    found.nodes = sum(len(gm.graph.nodes) for gm in graphs.values())
    found.symbols = len(set().union(*(s.free_symbols for _, _, s in sizes)))
    found.symbols_in_all = len(shape_env.var_to_range)
    found.terms = max(terms(s) for _, _, s in sizes)
    found.permute_terms = max((terms(s) for s in permutes["forward"]), default=0)
    found.permute_terms_backward = max((terms(s) for s in permutes.get("backward", ())), default=0)
    longest = max(permutes["forward"], key=terms)
    found.size = str(longest) if len(str(longest)) <= 40 else f"{str(longest)[:18]} ... {str(longest)[-18:]}"
    bound = shape_env.bound_sympy(longest)
    found.range = [str(bound.lower), str(bound.upper)]
    found.guards = len(shape_env.guards)
    found.runtime_asserts = sum(map(len, shape_env.deferred_runtime_asserts.values()))


def tensors(gm: GraphModule) -> list[tuple[Node, FakeTensor]]:
    """Every node that makes a tensor, and its shape as a fake tensor."""
    return [(node, node.meta["val"]) for node in gm.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]


def shape_env_of(value: FakeTensor) -> ShapeEnv:
    """The shape environment that holds the symbols of a graph."""
    shape_env = value.fake_mode.shape_env
    assert shape_env is not None
    return shape_env


def expression(n: int | torch.SymInt) -> Any:
    """A size as an expression in unbacked symbols; a number is one without any."""
    import sympy

    return n.node.expr if isinstance(n, torch.SymInt) and free_unbacked_symbols(n) else sympy.Integer(0)


def terms(size: Any) -> int:
    """How many terms a size adds up: u0 + u1 + u2 has three, u0 has one, a number none."""
    return len(size.args) if size.is_Add else len(size.free_symbols)


def is_gather(node: Node) -> bool:
    """Whether a node moves rows into another order: the permute and its inverse, forward and backward."""
    return node.target in (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)


def count_syncs(function: Callable, P: int, backward: GraphModule) -> int:
    """How often one eager step would make the host wait for a GPU, forward and backward.

    No GPU is needed: what eager mode dispatches is recorded with `meta` as the device. Backward cannot run there, so
    its reads are counted in its graph.
    """
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        x_ND, counts_E = inputs(P, "meta")
        forward = make_fx(function)(x_ND.detach(), counts_E)
    return len(syncs(forward, "meta")) + len(syncs(backward, "cpu"))


def syncs(gm: GraphModule, device: str) -> list[Node]:
    """The nodes that wait for a device: copies to the host, reads of one number, sizes that only the device knows."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and _waits(node, device)]


def _waits(node: Node, device: str) -> bool:
    on = [a.meta["val"].device.type for a in node.all_input_nodes if isinstance(a.meta.get("val"), FakeTensor)]
    if device not in on:
        return False
    result = node.meta.get("val")
    to_host = isinstance(result, FakeTensor) and result.device.type != device
    unsized = node.target is torch.ops.aten.repeat_interleave.Tensor and node.kwargs.get("output_size") is None
    reads = node.target in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    return to_host or unsized or reads


def warm_up(compiler: Callable) -> None:
    """Import what only the first compilation imports."""
    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        capture(lambda x: x.sin().sum(), (torch.zeros(8, requires_grad=True),), compiler)


def main(P: int, way: Way, inductor: bool) -> None:
    """Measure, and print what is known before Inductor runs, as that may take too long."""
    torch.set_num_threads(1)
    warm_up(compile_fx if inductor else aot_autograd(fw_compiler=lambda gm, _: gm.forward))
    found = measure(P, way)
    print(msgspec.json.encode(found).decode(), flush=True)
    if inductor and not found.error:
        found.compile_s = compile_seconds(P, way)
        print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    end_with_parent()
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["inductor"])  # type: ignore[arg-type]
