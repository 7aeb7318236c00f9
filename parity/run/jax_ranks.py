"""How JAX runs ranks: one device each under `shard_map`, in one process or several; or all on one, under `vmap`."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parity.oracle.problem import Problem
from parity.run.backend import Backend, Setting, resolve
from parity.run.ranks import Notes, run_cases
from parity.run.supervisor import READING, WRITING
from parity.run.trace import Trace

AXIS, GROUPS = "ranks", "groups"
Arrays = dict[str, jax.Array]
At = Callable[[str], None]  # notes that a stage begins
Work = Callable[[Problem, Backend, str, At], Trace]  # a problem on all ranks; how ranks are mapped

WAIT = 86400  # seconds, for another rank: whoever watches, and not a rank that waits, should say who hangs


def run_all(backend: Backend, folder: Path, setting: Setting, ranks: dict[Path, int], work: Work) -> None:
    """Run these problems and save the traces in `folder`; `ranks` says how many each has.

    In processes forked from this one, which must not have used JAX but for importing it.
    """
    how = setting.jax_ranks
    if how != "processes":
        in_one = partial(_rank, backend, max(ranks.values(), default=1), how, work)
        run_cases(backend, folder, list(ranks), 1, setting.timeout, in_one)
        return
    for P in sorted(set(ranks.values())):
        paths = [path for path in ranks if ranks[path] == P]
        run_cases(backend, folder, paths, P, setting.timeout, partial(_rank, backend, P, how, work))


def _rank(
    backend: Backend, P: int, how: str, work: Work, rank: int, notes: Notes, own: Path, paths: Sequence[Path]
) -> None:
    """One rank of several processes, or all of them in one."""
    jax.config.update("jax_num_cpu_devices", 1 if how == "processes" else P)
    if how == "processes" and P > 1:
        _meet(own / "address", P, rank)
    for path in paths:
        notes.at(path.stem, READING)
        start, problem = time.perf_counter(), Problem.load(path)
        trace = work(problem, backend, how, partial(notes.at, path.stem))
        trace.seconds = time.perf_counter() - start
        if rank == 0:
            notes.at(path.stem, WRITING)
            trace.save(own.parent)
            notes.done(path.stem)
    notes.at("", "shutdown")


def join(folder: Path, problems: Sequence[Problem], setting: Setting, backends: Sequence[Backend]) -> int:
    """Run problems in the group of processes that this one belongs to; the first saves the traces. Returns its number.

    Raises ValueError where they have not a device for each rank.
    """
    jax.config.update("jax_platforms", setting.device)
    address = None if setting.coordinator == "auto" else setting.coordinator
    jax.distributed.initialize(address, setting.processes, setting.process)
    for problem in problems:
        if problem.case.processes != jax.device_count():
            raise ValueError(
                f"{jax.process_count()} processes have {jax.device_count()} devices, but {problem.case.name} has "
                f"--ranks {problem.case.ranks}: add --ranks {jax.device_count()}"
            )
    for backend in backends:
        work: Work = resolve(backend.run.replace(":run_all", ":work"))(backend, setting)
        for problem in problems:
            start = time.perf_counter()
            trace = work(problem, backend, "processes", lambda stage: None)  # noqa: ARG005
            trace.seconds = time.perf_counter() - start
            if jax.process_index() == 0:
                trace.save(folder)
    jax.distributed.shutdown()
    return jax.process_index()


def _meet(file: Path, P: int, rank: int) -> None:
    """Join the other processes, at an address that the first one writes down."""
    with socket.socket() as free:
        if rank == 0:
            free.bind(("127.0.0.1", 0))
            (whole := file.with_suffix(".new")).write_text(f"127.0.0.1:{free.getsockname()[1]}")
            whole.rename(file)
    while not file.exists():
        time.sleep(0.05)
    local = [rank] if jax.config.jax_platforms != "cpu" else None  # type: ignore[attr-defined]
    jax.distributed.initialize(
        file.read_text(), P, rank, local_device_ids=local,
        initialization_timeout=WAIT, heartbeat_timeout_seconds=WAIT, shutdown_timeout_seconds=WAIT,
    )  # fmt: skip


@dataclass
class Program:
    """A function that is compiled at its first call, and then run: two stages, to tell which of them hangs."""

    jitted: Any
    compiled: Any = None

    def __call__(self, at: At, stage: str, *arguments: Any) -> Any:
        """Run it, in a stage of that name."""
        if self.compiled is None:
            at(f"compiling {stage}")
            self.compiled = self.jitted.lower(*arguments).compile()
        at(stage)
        return jax.block_until_ready(self.compiled(*arguments))


@dataclass
class Eager:
    """A function run an operation at a time, called as a `Program` is."""

    function: Callable

    def __call__(self, at: At, stage: str, *arguments: Any) -> Any:
        """Run it, in a stage of that name."""
        at(stage)
        return jax.block_until_ready(self.function(*arguments))


def put(tree: dict[str, np.ndarray], P: int, how: str, *, split: bool = True, groups: int = 1) -> Arrays:
    """Put an array on devices: each rank's part on its own; without `split`, all of it on every device of its group."""
    if how == "vmap" or P * groups == 1:
        return {name: jnp.asarray(a) for name, a in tree.items()}

    def place(a: np.ndarray) -> jax.Array:
        # Not device_put: it compares the values that the processes pass, and NaN is not equal to NaN.
        return jax.make_array_from_callback(a.shape, sharding(P, split, groups), lambda index: a[index])

    return {name: place(np.asarray(a)) for name, a in tree.items()}


def everywhere(tree: dict[str, np.ndarray], P: int, how: str) -> Arrays:
    """Put the same arrays on the devices of all processes."""
    if how != "processes" or P == 1:
        return {name: jnp.asarray(a) for name, a in tree.items()}
    whole = sharding(P, split=False)
    return {n: jax.make_array_from_callback(a.shape, whole, lambda index, a=a: a[index]) for n, a in tree.items()}


def fetch(arrays: Any, how: str) -> Any:
    """The arrays of all processes' devices, on the host. A dictionary is emptied, so that no array is held twice."""
    if how == "processes" and jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    if not isinstance(arrays, dict):
        return jax.device_get(arrays)
    return {name: jax.device_get(arrays.pop(name)) for name in list(arrays)}


def sharding(P: int, split: bool, groups: int = 1) -> NamedSharding:
    """Sharded over ranks along the leading axis, or replicated. Several groups are sharded along an axis before it."""
    return NamedSharding(_mesh(P, groups), _spec(split, groups))


def _spec(split: bool, groups: int) -> PartitionSpec:
    return PartitionSpec(*[GROUPS] * (groups > 1), *[AXIS] * split)


def _mesh(P: int, groups: int) -> jax.sharding.Mesh:
    shape, names = ((groups, P), (GROUPS, AXIS)) if groups > 1 else ((P,), (AXIS,))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[: P * groups])


def over_ranks(f: Callable, P: int, how: str, *, groups: int = 1, replicated: tuple[int, ...] = ()) -> Callable:
    """`f` on every rank: arguments and results have a leading rank axis, but for the arguments `replicated`.

    Of several groups, which are another axis of the mesh, all arguments and results have a leading axis more.
    """
    axis = AXIS if P > 1 else None

    def block(*args):
        args = [_without(a, [groups > 1, i not in replicated]) for i, a in enumerate(args)]
        return jax.tree.map(lambda a: a[None, None] if groups > 1 else a[None], f(*args))

    def in_one(*args):
        if P == 1:
            result = f(*(_without(a, [i not in replicated]) for i, a in enumerate(args)))
            return jax.tree.map(lambda a: a[None], result)
        axes = tuple(None if i in replicated else 0 for i in range(len(args)))
        return jax.vmap(f, in_axes=axes, axis_name=axis)(*args)

    def one_by_one(*args):  # not one vmap in another: of jax 0.10's ragged_dot it ends in a TypeError
        results = [in_one(*jax.tree.map(lambda a, g=g: a[g], args)) for g in range(groups)]
        return jax.tree.map(lambda *a: jnp.stack(a), *results)

    if how == "vmap" or P * groups == 1:
        return one_by_one if groups > 1 else in_one

    def sharded(*args):
        specs = tuple(_spec(i not in replicated, groups) for i in range(len(args)))
        return jax.shard_map(block, mesh=_mesh(P, groups), in_specs=specs, out_specs=_spec(True, groups))(*args)

    return sharded


def _without(tree: Any, leading: Sequence[bool]) -> Any:
    """The first element along each leading axis."""
    for axis in leading:
        tree = jax.tree.map(lambda a: a[0], tree) if axis else tree
    return tree
