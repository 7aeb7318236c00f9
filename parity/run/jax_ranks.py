"""How ranks are had in JAX: a device each under `shard_map`, in one process or in one each; or one for all, `vmap`."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parity.oracle.problem import Problem
from parity.run.backend import Backend, Setting, resolve
from parity.run.supervisor import DONE
from parity.run.trace import Trace

AXIS = "ranks"
Arrays = dict[str, jax.Array]
Work = Callable[[Problem, Backend, str], Trace]  # a problem on all ranks; how they are had


def run_all(backend: Backend, folder: Path, setting: Setting, ranks: dict[Path, int], work: Work) -> None:
    """Run these problems and save the traces in `folder`; `ranks` says how many each has."""
    if setting.jax_ranks == "processes":
        for P in sorted(set(ranks.values())):
            _start_processes(backend, folder, P, [path for path in ranks if ranks[path] == P], work)
        return
    jax.config.update("jax_num_cpu_devices", max(ranks.values(), default=1))
    _run_each(backend, folder, ranks, setting.jax_ranks, work)


def _run_each(backend: Backend, folder: Path, paths: Iterable[Path], how: str, work: Work) -> None:
    for path in paths:
        start = time.perf_counter()
        trace = work(Problem.load(path), backend, how)
        trace.seconds = time.perf_counter() - start
        if jax.process_index() == 0:
            trace.save(folder)
            print(DONE + trace.case.name, flush=True)


def _start_processes(backend: Backend, folder: Path, P: int, paths: list[Path], work: Work) -> None:
    """A process per rank, each with one device, that find each other by `jax.distributed`. All end when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = "from parity.run.jax_ranks import join; join()"
    record, function = msgspec.json.encode(backend).decode(), f"{work.__module__}:{work.__qualname__}"
    names = [path.name for path in paths]
    group = [
        subprocess.Popen(
            [sys.executable, "-c", code, record, function, str(folder), address, str(P), str(rank), *names]
        )
        for rank in range(P)
    ]
    while any(process.poll() is None for process in group):
        time.sleep(0.1)
        failed = [rank for rank, process in enumerate(group) if process.poll()]
        if failed:
            for process in group:
                process.kill()
            sys.exit(f"rank {failed[0]} of {P} ended with exit code {group[failed[0]].returncode}")


def join() -> None:
    """One rank of several processes."""
    record, function, folder, address, P, rank, *names = sys.argv[1:]
    local = [int(rank)] if jax.config.jax_platforms != "cpu" else None  # type: ignore[attr-defined]
    jax.config.update("jax_num_cpu_devices", 1)
    if int(P) > 1:
        jax.distributed.initialize(address, int(P), int(rank), local_device_ids=local)
    backend = msgspec.json.decode(record, type=Backend)
    _run_each(backend, Path(folder), [Path(folder) / name for name in names], "processes", resolve(function))


def put(tree: dict[str, np.ndarray], P: int, how: str) -> Arrays:
    """On the devices: a rank's part on the rank's device, the router on all."""
    if how == "vmap" or P == 1:
        return {name: jnp.asarray(a) for name, a in tree.items()}

    def place(name: str, a: np.ndarray) -> jax.Array:
        # Not device_put, which compares what the processes give it, and to which NaN is not equal to NaN.
        return jax.make_array_from_callback(a.shape, sharding(P, name != "router"), lambda index: a[index])

    return {name: place(name, np.asarray(a)) for name, a in tree.items()}


def fetch(arrays: Arrays, how: str) -> dict[str, np.ndarray]:
    """On the host, those of every process's devices."""
    if how == "processes" and jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_get(arrays)


def sharding(P: int, split: bool) -> NamedSharding:
    """Over ranks along the leading axis, or the same on all."""
    return NamedSharding(_mesh(P), PartitionSpec(AXIS) if split else PartitionSpec())


def _mesh(P: int) -> jax.sharding.Mesh:
    return jax.make_mesh((P,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:P])


def over_ranks(f: Callable, P: int, how: str, *, replicated: tuple[int, ...] = ()) -> Callable:
    """`f` on every rank: arguments and results have a leading rank axis, but for the arguments `replicated`."""
    axis = AXIS if P > 1 else None
    if how == "vmap" and P > 1:
        return lambda *args: jax.vmap(
            f, in_axes=tuple(None if i in replicated else 0 for i in range(len(args))), axis_name=axis
        )(*args)

    def block(*args):
        args = [a if i in replicated else jax.tree.map(lambda a: a[0], a) for i, a in enumerate(args)]
        return jax.tree.map(lambda a: a[None], f(*args))

    if P == 1:
        return block

    def sharded(*args):
        specs = tuple(PartitionSpec() if i in replicated else PartitionSpec(AXIS) for i in range(len(args)))
        return jax.shard_map(block, mesh=_mesh(P), in_specs=specs, out_specs=PartitionSpec(AXIS))(*args)

    return sharded
