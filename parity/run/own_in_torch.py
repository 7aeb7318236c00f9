"""A layer of the user's own in PyTorch, run on each rank with that rank's tokens; gradients by autograd."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

import torch_impl
from parity import Unsupported, record, recording
from parity.cases.parameters import BY_NAME
from parity.oracle.problem import Problem
from parity.run import inside, own, torch_ranks
from parity.run.backend import Backend, Setting
from parity.run.inside import Hook
from parity.run.naming import together
from parity.run.own import OwnLayerError, Signature
from parity.run.torch_ranks import At
from parity.run.torch_stages import (
    Group,
    environment,
    experts_of,
    gradients,
    learned_of,
    options_of,
    poisoned_memory,
    to_numpy,
    to_torch,
)  # fmt: skip
from parity.run.trace import Trace, differing_bits
from torch_impl import routing

Arrays = dict[str, np.ndarray]


def run_all(backend: Backend, folder: Path, setting: Setting) -> None:
    """Run every problem in `folder` and save the traces there; the user's file is run once, before ranks are forked."""
    torch_ranks.run_all(backend, folder, setting, work(backend, setting))


def work(backend: Backend, setting: Setting) -> torch_ranks.Work:
    """The function that each rank runs."""
    layer, takes = own.load(backend)
    hooks = [Hook.parse(text) for text in setting.record]

    def hooked(**arguments: Any) -> Any:
        with hooks_on_modules(hooks, backend):
            return layer(**arguments)

    return partial(run, wraps(layer)(hooked) if hooks else layer, takes)


def run(
    layer: Callable[..., Any], takes: Signature, problem: Problem, backend: Backend, rank: int, device: torch.device,
    at: At,
) -> Trace | None:  # fmt: skip
    """One rank's part of a problem; rank 0 gets everybody's and returns the trace.

    The layer runs on these inputs and on these again, with fresh memory full of NaN.
    """
    case = problem.case
    why = own.refusal(layer, takes, problem)
    try:
        if why:
            raise Unsupported(why)
        if takes.given("group"):
            torch_ranks.alone(device)
        group = torch_ranks.my_group(1, rank)[1]
        at("the first step")
        first, _, _ = _step(layer, takes, problem, backend, rank, device, group)
        at("the first step, repeated")
        with poisoned_memory():
            again, within, orders = _step(layer, takes, problem, backend, rank, device, group)
    except Unsupported as reason:
        return None if rank else Trace(case, backend, environment(device) | {"not supported": str(reason)})
    mine = again | {
        name.replace("e2e", "repeat", 1): np.array(int(differing_bits(a, again[name]))) for name, a in first.items()
    }
    everybody = torch_ranks.gathered(mine | within, case.ranks, rank)
    if rank:
        return None
    names = dict.fromkeys(name for arrays in everybody for name in arrays if name not in mine)
    given = inside.placed(problem, backend, {n: inside.of_all(backend, n, everybody) for n in names}, orders)
    arrays = {n: [a[n] for a in everybody] for n in mine} | given
    return Trace(case, backend.providing(inside.quantities(given)), environment(device), arrays=arrays)


@contextmanager
def hooks_on_modules(hooks: Sequence[Hook], backend: Backend) -> Iterator[None]:
    """Record what modules return within this block, known by their name within the module that is called, or by class.

    Raises OwnLayerError where no module has such a name.
    """
    names: dict[torch.nn.Module, str] = {}
    called: set[str] = set()
    depth = 0

    def before(module: torch.nn.Module, _: object) -> None:
        nonlocal depth
        if depth == 0:
            names.update({one: name for name, one in module.named_modules()})
        depth += 1

    def after(module: torch.nn.Module, _: object, output: Any) -> None:
        nonlocal depth
        depth -= 1
        own_names = {names.get(module, ""), type(module).__name__} - {""}
        called.update(own_names)
        for hook in hooks:
            if any(fnmatchcase(name, hook.module) for name in own_names):
                values = output if isinstance(output, tuple) else (output,)
                if hook.index >= len(values):
                    raise OwnLayerError(
                        f"{backend.files['']}: --record {hook.module}[{hook.index}]: it returns {len(values)} values, "
                        "numbered from 0"
                    )
                record(hook.name, values[hook.index], hook.order)

    registered = (register_module_forward_pre_hook(before), register_module_forward_hook(after))
    try:
        yield
    finally:
        for one in registered:
            one.remove()
    for hook in hooks:
        if not any(fnmatchcase(name, hook.module) for name in called):
            raise OwnLayerError(
                f"{backend.files['']} calls no module {hook.module}, which --record names: it calls "
                f"{', '.join(sorted(called)) or 'none'}"
            )


def _step(
    layer: Callable[..., Any], takes: Signature, problem: Problem, backend: Backend, rank: int, device: torch.device,
    group: Group,
) -> tuple[Arrays, Arrays, dict[str, str]]:  # fmt: skip
    """Output and gradients by name, what the layer records from its inside, and the row orders that it names."""
    case, own_experts = problem.case, experts_of(problem.case, rank)

    def put(a: np.ndarray) -> Tensor:
        return to_torch(a).to(device)

    leaves = {"x": put(problem.x[rank])}
    leaves |= learned_of(problem, slice(None) if takes.all_experts else own_experts, device)
    leaves = {name: leaf.requires_grad_(name not in BY_NAME or BY_NAME[name].learned) for name, leaf in leaves.items()}
    ids = put(problem.expert_id[rank])
    given: dict[str, Any] = {"expert_id": ids, "keep": put(problem.keep[rank]), "case": case, "group": group}

    within: dict[str, Any] = {}
    orders: dict[str, str] = {}

    def whole(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        values = given | dict(zip(leaves, inputs, strict=True))
        score = inputs[0].new_zeros(())
        if takes.given("score"):
            more = together(torch_impl, values, "per_expert")
            chosen = routing.route(values["x"], values["router"], options_of(case)["router"], expert_id_TK=ids, **more)
            values["score"] = score = chosen.score_TK
        with recording() as recorded:
            result = layer(**own.arguments(takes, values))
        found = inside.split(result, recorded, torch.cat, backend)
        within.update({name: a.detach() for name, a in found.arrays.items()})
        orders.update(found.orders)
        return found.out, score

    if case.way == "compiled":
        whole = torch.compile(whole, backend="aot_eager", dynamic=True)
    if case.way == "recomputed":
        whole = partial(checkpoint, whole, use_reentrant=False)
    out, score = whole(*leaves.values())
    own.checked(out, (case.tokens, case.width), leaves["x"].dtype, backend)
    taken = [name for name, leaf in leaves.items() if leaf.requires_grad and (name == "x" or own.needs(takes, name))]
    found = _gradients(out, score, {name: leaves[name] for name in taken}, problem, put, rank, backend)
    values = {"combine/out": out, "route/dx": found.pop("x")}
    for name in [name for name in found if takes.all_experts and BY_NAME[name].per_rank]:
        found[name] = torch_ranks.all_sum(found[name], group)[own_experts]
    values |= gradients(case, found, group)
    outside = {f"e2e/{name}": to_numpy(a) for name, a in values.items()}
    return outside, {name: to_numpy(a) for name, a in within.items()}, orders


def _gradients(
    out: Tensor, score: Tensor, leaves: dict[str, Tensor], problem: Problem, put: Callable[[np.ndarray], Tensor],
    rank: int, backend: Backend,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of the leaves. Experts without a token may be outside the graph: their gradient is zero.

    Raises OwnLayerError when the output depends on none of them, or not on the tokens or the router.
    """
    where = backend.files[""]
    if not out.requires_grad:
        if problem.case.tokens:
            raise OwnLayerError(f"{where}: the output depends on nothing that has a gradient: is it detached?")
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    outputs = [(out, put(problem.dout[rank]))] + [(score, put(problem.aux[rank]))] * score.requires_grad
    of, cotangents = zip(*outputs, strict=True)
    found = torch.autograd.grad(of, tuple(leaves.values()), cotangents, allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        if gradient is None and problem.case.tokens and (name in ("x", "router") or problem.case.ranks == 1):
            raise OwnLayerError(
                f"{where}: d{name}: the output does not depend on {name}; pass weights to a module with "
                "torch.func.functional_call: copied into its parameters, they are other tensors"
            )
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in pairs}
