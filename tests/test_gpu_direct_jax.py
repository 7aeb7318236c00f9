"""What only GPUs can show of rows that JAX writes straight to their places: the kernel, over two GPUs and more."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import bits, draw
from test_direct_jax import arguments_of, step

from jax_impl import direct, dynamic, kernels
from jax_impl.direct.rows import put_rows, ranks_of

AXIS = "ranks"
pytestmark = pytest.mark.gpu


def over_gpus(program, P: int, groups: int, *arguments):
    """`program` on P GPUs of each group, ready to run; and whether it has the kernel that writes to other GPUs.

    Arguments and results have a leading axis of all ranks.
    """
    if len(jax.devices()) < P * groups:
        pytest.skip(f"needs {P * groups} GPUs, and there are {len(jax.devices())}: run it where there are")

    def block(*arguments):
        result = program(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], result)

    names = ("groups", AXIS)
    mesh = jax.make_mesh((groups, P), names, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: P * groups])
    spec = PartitionSpec(names)
    arguments = jax.device_put(arguments, NamedSharding(mesh, spec))
    compiled = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec)).lower(*arguments).compile()
    return partial(compiled, *arguments), "mosaic_gpu" in str(compiled.as_text())


@pytest.mark.parametrize(("P", "groups"), [(2, 1), (4, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize(
    ("M", "K", "D", "dtype"),
    [
        (1, 1, 64, "bfloat16"),  # one row, 128 bytes
        (37, 1, 512, "bfloat16"),  # chunks of four rows, the last of one
        (1000, 3, 7168, "bfloat16"),  # chunks of two
        (333, 8, 2048, "float16"),
        (50, 2, 2880, "float32"),
        (5000, 32, 128, "bfloat16"),  # more chunks than blocks, many choices
    ],
)
def test_the_kernel_puts_what_the_plain_version_puts(monkeypatch, P, groups, M, K, D, dtype):
    """Twice, for what the first run leaves behind; with rows that go nowhere, and ranks that get none from another."""
    rng = np.random.default_rng(M)
    place_GPMK = np.stack([rng.permutation(P * M * K).reshape(P, M, K) for _ in range(groups)])
    place_GPMK[rng.random(place_GPMK.shape) < 0.3] = -1
    place_GPMK[:, 0, :, 0] = -1
    n_rows, place = M * K, jnp.asarray(place_GPMK.reshape(-1, M, K), jnp.int32)
    x = jnp.asarray(rng.normal(size=(P * groups, M, D)), dtype)

    def put(x, place):
        return put_rows(x, place, n_rows, ranks_of(AXIS))

    run, through_kernel = over_gpus(put, P, groups, x, place)
    found = [np.asarray(run()) for _ in range(2)]
    assert through_kernel
    monkeypatch.setattr(kernels, "can_reach_ranks", lambda axis_name: False)
    run, through_kernel = over_gpus(put, P, groups, x, place)
    expected = np.asarray(run())
    assert not through_kernel
    written = np.zeros((groups, P * n_rows), bool)
    for group, places in enumerate(place_GPMK.reshape(groups, -1)):
        written[group, places[places >= 0]] = True
    written = written.reshape(expected.shape[:2])
    assert bits(found[0][written]) == bits(found[1][written]) == bits(expected[written])


@pytest.mark.parametrize("P", [2, 4, 8])
@pytest.mark.parametrize("what", ["drawn", "idle"])
def test_a_step_gives_the_readable_corner_s_bits(P, what):
    """In bfloat16: outputs and every gradient, of which the scores' may be summed in another order."""
    problem = draw(P=P, T=512, D=256, F=128, E=16, K=4)
    problem = problem.with_ids([[0, 1, 2, 3]] * 512) if what == "idle" else problem
    arguments = arguments_of(problem, "bfloat16")
    results = []
    for layer in (dynamic.moe_layer, direct.moe_layer):
        run, through_kernel = over_gpus(partial(step, layer, E=16, axis_name=AXIS), P, 1, *arguments)
        results.append(jax.device_get(run()))
        assert through_kernel == (layer is direct.moe_layer)
    (readable, (dx, dscore, dweights), dropped), (out, (our_dx, our_dscore, our_dweights), our_dropped) = results
    assert np.isfinite(out).all()
    assert bits([out, our_dx, our_dweights, our_dropped]) == bits([readable, dx, dweights, dropped])
    np.testing.assert_allclose(our_dscore, dscore, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_check_of_this_corner(ranks):
    """With fewer GPUs than ranks, under vmap. Rows of 64 numbers are wide enough for the kernel in both dtypes."""
    presets = ["zipf", "bfloat16", "in-flight", "recomputed", "uneven", *["idle-rank"] * (ranks > 1)]
    command = [sys.executable, "-m", "parity", "check", "--device", "cuda", "--no-json", "--ranks", str(ranks)]
    command += [*presets, "--width", "64", "--backend", "jax-direct", "--backend", "jax"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
