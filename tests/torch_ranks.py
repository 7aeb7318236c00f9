"""PyTorch ranks: real processes that talk over gloo, and what the tests have them do."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from problems import Problem
from torch import Tensor

from torch_impl import Router, Stages, moe_layer, route, static
from torch_impl.exchange import Splits, exchange_counts, return_tokens, send_tokens

SECONDS = 60  # until a rank counts as stuck


class TorchRanks:
    """Four processes, started at the first call and kept, as starting them takes seconds.

    `ranks(program, *arguments)` runs `program(*arguments_of_rank, group)` on P ranks at once and returns a list of P
    results. Every argument is a list with one item per rank. P = 4 uses the default group, as None. P = 2 uses a group
    of the processes 1 and 3, so that a rank in the group is not the rank in the world. P = 1 is a group of process 2.

    What a rank raises is raised here with its traceback, and all processes are then stopped: the others may be stuck.
    """

    size = 4
    members = {1: [2], 2: [1, 3], 4: [0, 1, 2, 3]}

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, program: Callable, *arguments: list) -> list:
        if not self.processes:
            self.start()
        members = self.members[len(arguments[0])]
        for rank, of_rank in zip(members, zip(*arguments, strict=True), strict=True):
            self.pipes[rank].send_bytes(pickle.dumps((program, of_rank, len(members))))
        results: dict[Connection, Any] = {self.pipes[rank]: None for rank in members}
        missing, deadline = set(results), time.monotonic() + SECONDS
        while missing:
            ready = wait(list(missing), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise TimeoutError(f"no answer from {len(missing)} of {len(members)} ranks in {SECONDS} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                missing.remove(pipe)
                try:
                    error, results[pipe] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    error = "a rank ended without an answer"
                if error:
                    self.stop()
                    raise RuntimeError(error)
        return list(results.values())

    def start(self) -> None:
        # Not forked from here: JAX has threads by now, and a fork would copy their locks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "jaxtyping"])
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name) / "store"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        """End the processes; the next call starts new ones."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
            process.close()
        if self.folder:
            self.folder.cleanup()
        self.processes, self.pipes, self.folder = [], [], None


def _serve(rank: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=TorchRanks.size,
        timeout=timedelta(seconds=600),  # TorchRanks stops them sooner
    )
    groups = {P: dist.new_group(members) for P, members in TorchRanks.members.items() if TorchRanks.size != P}
    while True:
        try:
            program, arguments, P = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            reply = None, program(*arguments, groups.get(P))
        except Exception:
            reply = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(reply))


def layer_arguments(problem: Problem, rank: int, n_ranks: int, dtype: torch.dtype = torch.float64) -> list:
    """One rank's arguments of `run_layer`, less the group."""
    weights = tuple(w.to(dtype) for w in problem.weights_of(rank, n_ranks))
    x_TD, router_DE, dout_TD = (a.to(dtype) for a in (problem.x_PTD[rank], problem.router_DE, problem.dout_PTD[rank]))
    return [x_TD, router_DE, weights, dout_TD, Router(**problem.how), problem.expert_id_PTK[rank]]


def run_layer(
    x_TD: Tensor,
    router_DE: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    dout_TD: Tensor,
    router: Router,
    expert_id_TK: Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[Stages, dict[str, Tensor]]:
    """The layer forward and backward. The router's gradient is this rank's part of it."""
    x_TD, router_DE, *weights_ = (a.detach().clone().requires_grad_() for a in (x_TD, router_DE, *weights))
    routing = route(x_TD, router_DE, router, expert_id_TK=expert_id_TK)
    routing.score_TK.retain_grad()
    stages = moe_layer(x_TD, router_DE, *weights_, router=router, routing=routing, group=group)
    stages.out_TD.backward(dout_TD)
    of = {"x": x_TD, "router": router_DE, "score": routing.score_TK}
    of |= dict(zip(("w_gate", "w_up", "w_down"), weights_, strict=True))
    gradients = {name: a.grad for name, a in of.items() if a.grad is not None}
    assert len(gradients) == len(of)
    return detach(stages), gradients


def second_gradients(
    x_TD: Tensor,
    router_DE: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    dout_TD: Tensor,
    router: Router,
    expert_id_TK: Tensor,
    capacity: static.Capacity | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of tokens and weights, of the squares of the tokens' gradient. Static, if there is a capacity."""
    x_TD, gate, up, down = leaves = [a.detach().clone().requires_grad_() for a in (x_TD, *weights)]
    routing = route(x_TD, router_DE, router, expert_id_TK=expert_id_TK)
    arguments: dict[str, Any] = {"router": router, "routing": routing, "group": group}
    if capacity is None:
        out_TD = moe_layer(x_TD, router_DE, gate, up, down, **arguments).out_TD
    else:
        out_TD = static.moe_layer(x_TD, router_DE, gate, up, down, capacity=capacity, **arguments).out_TD
    (dx_TD,) = torch.autograd.grad(out_TD, x_TD, dout_TD, create_graph=True)
    return torch.autograd.grad(dx_TD.square().sum(), leaves)


class Exchanged(NamedTuple):
    counts_Pe: Tensor
    splits: Splits
    received_RD: Tensor
    returned_ND: Tensor
    dx_ND: Tensor  # the gradient that send_tokens gives, from dreceived
    dreceived_RD: Tensor  # the gradient that return_tokens gives, from x


def run_exchange(
    x_ND: Tensor, counts_E: Tensor, dreceived_RD: Tensor | None, group: dist.ProcessGroup | None
) -> Exchanged:
    """Stages 3, 4 and 8 forward and backward. The gradient into 4 is `dreceived_RD`, or what 4 received."""
    counts_Pe, splits = exchange_counts(counts_E, group)
    x_ND.requires_grad_()
    received_RD = send_tokens(x_ND, splits, group)
    cotangent_RD = received_RD.detach() if dreceived_RD is None else dreceived_RD
    (dx_ND,) = torch.autograd.grad(received_RD, x_ND, cotangent_RD)
    received_RD = received_RD.detach().requires_grad_()
    returned_ND = return_tokens(received_RD, splits, group)
    (dreceived_RD,) = torch.autograd.grad(returned_ND, received_RD, x_ND.detach())
    return detach(Exchanged(counts_Pe, splits, received_RD, returned_ND, dx_ND, dreceived_RD))


def detach(tree: Any) -> Any:
    """Tensors in nested tuples, out of the graph: a process cannot send the graph."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, tuple):
        parts = [detach(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree
