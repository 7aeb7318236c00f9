"""Programs for a GPU, compiled without one: the compilers only ask what card it is. `make test-kernels` installs them.

Shows what neither a CPU nor an interpreter does: a kernel that the compiler refuses, rows that move in small pieces,
registers that spill, temporaries, and how much is launched.
"""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_impl import Router, direct, dynamic, kernels, moe_layer, plan_capacity
from jax_impl.grouping import Capacity, combine, group_by_expert
from jax_impl.layout import to_expert_major, to_rank_major
from jax_impl.matmul import grouped_matmul
from parity.bench.in_jax import first
from parity.capture import in_jax as capture_jax
from torch_impl import kernels as triton_kernels

# As XLA describes an H200 (its backends/gpu/target_config/specs/h200.txtpb).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
AXIS = "ranks"
pytestmark = [pytest.mark.compilers, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]


@pytest.fixture(autouse=True)
def _as_if_there_were_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    """Programs for a GPU that is not there can be kept, but not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def devices(n: int) -> list:
    return topologies.get_topology_desc("h200", "cuda", target_config=H200, topology=f"1x1x{n}").devices


def compiled(run, *arguments):
    """For one GPU, from arrays or their shapes."""
    one = SingleDeviceSharding(devices(1)[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), arguments)
    return jax.jit(run).lower(*shapes).compile()


def temporary_bytes(program) -> int:
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def launches(program) -> list[str]:
    """What the program starts, one after the other."""
    entry = re.search(r"^ENTRY .*?^}", program.as_text(), re.MULTILINE | re.DOTALL).group()  # type: ignore[union-attr]
    started = re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\(", entry, re.MULTILINE)
    return [name for name, kind in started if kind in ("fusion", "custom-call", "copy", "sort", "while", "convolution")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("how_mapped", "P", "layer"),
    [
        ("no axis", 1, "rank"), ("no axis", 1, "expert"), ("no axis", 1, "dynamic"), ("no axis", 1, "direct"),
        ("vmap", 4, "rank"), ("vmap", 4, "expert"), ("vmap", 4, "direct"),
        ("shard_map", 2, "rank"), ("shard_map", 2, "expert"), ("shard_map", 2, "dynamic"), ("shard_map", 2, "direct"),
        ("shard_map, one process", 2, "direct"), ("shard_map, one process", 4, "direct"),
    ],
)  # fmt: skip
def test_the_layer_compiles_forward_and_backward(how_mapped, P, layer, dtype, monkeypatch):
    monkeypatch.setattr("jax_impl.dynamic.exchange.check_ragged_exchange", lambda axis_name: None)
    remote = how_mapped == "shard_map, one process"
    if remote and jax.__version_info__ < (0, 11):
        pytest.skip("kernels write to other ranks from jax 0.11 on")
    monkeypatch.setattr(kernels, "can_reach_ranks", lambda axis_name: remote)
    T, D, F, E, K = 16, 64, 24, 8, 2
    of_layer = {"dynamic": dynamic.moe_layer, "direct": direct.moe_layer}.get(layer) or partial(
        moe_layer, capacity=plan_capacity("1.25", T, K, E, P, per=layer)
    )

    def run(x, router, *weights):
        return of_layer(
            x, router, *weights, router=Router(K), axis_name=None if how_mapped == "no axis" else AXIS
        ).out_TD

    def block(x, router, *weights):
        return run(x[0], router, *(w[0] for w in weights))[None]

    if how_mapped.startswith("shard_map"):
        mesh = Mesh(np.array(devices(P)), (AXIS,), axis_types=(AxisType.Auto,))
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        over = jax.shard_map(block, mesh=mesh, in_specs=(split, whole, split, split, split), out_specs=split)
        of_ranks, of_all = NamedSharding(mesh, split), NamedSharding(mesh, whole)
    else:
        of_ranks = of_all = SingleDeviceSharding(devices(1)[0])
        over = block if how_mapped == "no axis" else jax.vmap(run, axis_name=AXIS, in_axes=(0, None, 0, 0, 0))
    shapes = [
        jax.ShapeDtypeStruct((P, T, D), dtype, sharding=of_ranks),
        jax.ShapeDtypeStruct((D, E), "float32", sharding=of_all),
        *(jax.ShapeDtypeStruct((P, E // P, *s), dtype, sharding=of_ranks) for s in ((D, F), (D, F), (F, D))),
    ]

    def both(*arguments):
        y, vjp = jax.vjp(over, *arguments)
        return y, vjp(jnp.ones_like(y))

    program = str(jax.jit(both).lower(*shapes).compile().as_text())
    matmuls = 3 * 3 if dtype != "float32" and layer != "expert" else 0  # each forward, and its two gradients
    indices = {"direct": 2, "dynamic": 2, "expert": 2 * 2, "rank": 2 * 2 + 1}[layer]  # sorts, by bin too; where bins go
    moves = 7 if layer == "direct" else 8  # straight: four times rows, two sums, and the scores' gradient
    to_ranks = 4 if remote else 0
    assert program.count('custom_call_target="__gpu$xla.gpu.triton"') == moves - to_ranks + indices + matmuls
    assert program.count('custom_call_target="mosaic_gpu_v2"') == to_ranks


# Of each stage forward and backward, indices included, at the three shapes of `parity bench`: T, D, E, K over 8 ranks.
MODELS = {"deepseek-v3": (4096, 7168, 256, 8), "mixtral": (8192, 4096, 8, 2), "qwen3": (8192, 2048, 128, 8)}
MOST_LAUNCHES = {
    "group_by_expert": (17, 1), "to_expert_major": (3, 1), "to_rank_major": (1, 1), "combine": (1, 1)
}  # fmt: skip


def stage_programs(model: str, stage: str) -> tuple:
    """Of one rank, forward and backward, capacity factor 1."""
    (T, D, E, K), P = MODELS[model], 8
    C, shape = T * K // P, jax.ShapeDtypeStruct
    x, rows, sorted_rows = (shape(s, "bfloat16") for s in ((T, D), (P, C, D), (P * C, D)))
    score, ids, index, sorted_index = (
        shape((T, K), "float32"), shape((T, K), "int32"), shape((P, C), "int32"), shape((P * C,), "int32")
    )  # fmt: skip
    counts, counts_of_ranks = shape((E,), "int32"), shape((P, E // P), "int32")
    run, arguments, gradient = {
        "group_by_expert": (partial(group_by_expert, capacity=Capacity(P, C)), (x, ids, score, counts), rows),
        "to_expert_major": (to_expert_major, (rows, counts_of_ranks), sorted_rows),
        "to_rank_major": (to_rank_major, (sorted_rows, sorted_index, index), rows),
        "combine": (combine, (rows, score, ids, index), x),
    }[stage]
    n = 2 if stage == "combine" else 1  # its scores are differentiated too
    vjp = jax.eval_shape(lambda *a: jax.vjp(lambda *by: first(run(*by, *a[n:])), *a[:n])[1], *arguments)
    return compiled(run, *arguments), compiled(lambda vjp, dy: vjp(dy), vjp, gradient)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", MOST_LAUNCHES)
def test_one_launch_moves_rows_and_few_find_where(model, stage):
    for program, most in zip(stage_programs(model, stage), MOST_LAUNCHES[stage], strict=True):
        assert len(launches(program)) <= most, launches(program)
        assert temporary_bytes(program) < 2**20  # indices only: no row is written twice


def matmul_programs(model: str) -> tuple:
    """Rows of rank bins, and their two gradients; hidden width 2048."""
    (T, D, E, K), F = MODELS[model], 2048
    x, w, dy = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((T * K, D), (E // 8, D, F), (T * K, F)))
    counts = jax.ShapeDtypeStruct((E // 8,), "int32")
    vjp = jax.eval_shape(lambda x, w, counts: jax.vjp(lambda x, w: grouped_matmul(x, w, counts), x, w)[1], x, w, counts)
    return compiled(grouped_matmul, x, w, counts), compiled(lambda vjp, dy: vjp(dy), vjp, dy)


@pytest.mark.parametrize("model", MODELS)
def test_no_temporary_of_a_matmul_grows_with_the_experts(model):
    for program in matmul_programs(model):
        assert temporary_bytes(program) < 2**20


def exchange_program(P: int):
    """Stages 3 to 5, 7 and 8 forward and backward over P devices, as `parity capture` has them."""
    mesh = Mesh(np.array(devices(P)), (capture_jax.AXIS,), axis_types=(AxisType.Auto,))
    split = PartitionSpec(capture_jax.AXIS)
    run = jax.shard_map(capture_jax.value_and_gradient, mesh=mesh, in_specs=(split, split), out_specs=(split, split))
    shapes = [
        jax.ShapeDtypeStruct((P * a.shape[0], *a.shape[1:]), a.dtype, sharding=NamedSharding(mesh, split))
        for a in capture_jax.of_one_rank(P)
    ]
    return jax.jit(run).lower(*shapes).compile()


def test_the_program_does_not_grow_with_the_ranks():
    """XLA for CPUs takes each exchange apart into P pieces (docs/capture.md). For GPUs it stays one."""
    few, many = (str(exchange_program(P).as_text()) for P in (8, 1024))
    assert few.count(" all-to-all-start(") == many.count(" all-to-all-start(") == 5  # counts; rows twice, and back
    assert many.count(" = ") < 1.25 * few.count(" = ")


def triton_programs(D: int, K: int) -> dict:
    """Each kernel with the types of its arguments, its constants and its warps, as it is launched for such rows."""
    one, many = triton_kernels._tile(D, 1), triton_kernels._tile(D, K)
    x, index, score, number = "*bf16", "*i64", "*fp32", "i32"
    rows = {"M": number, "D": number}
    backward = dict.fromkeys(("dout", "y", "dy"), x) | dict.fromkeys(("slot", "assignment"), index)
    backward |= dict.fromkeys(("score", "dscore"), score) | rows | {"T": number}
    tile = {"BLOCK": many[0], "K": K}
    padding_rows = {"PADDING_ROWS": triton_kernels.PADDING_ROWS}
    padding = {"K_PADDED": triton_kernels._power_of_2(K)} | padding_rows
    of_expand = dict.fromkeys("xy", x) | dict.fromkeys(("slot", "assignment"), index) | rows
    of_expand |= {"T": number, "chunks": number}
    swiglu = {"COUNTED": True, "BLOCK": triton_kernels.SWIGLU_BLOCK}, triton_kernels.SWIGLU_WARPS
    of_put = {"x": x, "place": index, "pointers": index, "n_rows": number, "stride": number, "score": score} | rows
    of_swiglu = {"n_rows": index, "n": number, "F": number}
    of_sum = {"y": x, "slot": index, "out": x, "chunks": number} | rows
    return {
        "gather": ("_gather_rows", {"x": x, "index": index, "y": x, "chunks": number} | rows,
                   {"BLOCK": one[0]}, one[1]),
        "expand": ("_expand_rows", of_expand, {"BLOCK": one[0], "K": K, "PADDED": False} | padding_rows, one[1]),
        "padded expand": ("_expand_rows", of_expand, {"BLOCK": one[0], "K": K, "PADDED": True} | padding_rows, one[1]),
        "put": ("_put_rows", of_put, {"BLOCK": one[0], "K": K, "WEIGHTED": False}, one[1]),
        "weighted put": ("_put_rows", of_put, {"BLOCK": one[0], "K": K, "WEIGHTED": True}, one[1]),
        "sum": ("_sum_rows", of_sum | {"score": index}, tile | {"WEIGHTED": False}, many[1]),
        "weighted sum": ("_sum_rows", of_sum | {"score": score}, tile | {"WEIGHTED": True}, many[1]),
        "backward": ("_weighted_sum_backward", backward, tile | padding | {"PADDED": False, "ROWS": True},
                     max(many[1], 4)),
        "padded backward": ("_weighted_sum_backward", backward, tile | padding | {"PADDED": True, "ROWS": True},
                            max(many[1], 4)),
        "swiglu": ("_swiglu", dict.fromkeys(("gate", "up", "hidden"), x) | of_swiglu, *swiglu),
        "swiglu backward": ("_swiglu_backward", of_swiglu | dict.fromkeys(
            ("dhidden", "gate", "up", "dgate", "dup"), x), *swiglu),
    }  # fmt: skip


def ptx_of(name: str, types: dict, constants: dict, warps: int, aligned) -> str:
    """A Triton kernel compiled for an H200, where the arguments in `aligned` are multiples of 16."""
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    function = getattr(triton_kernels, name)
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in function.arg_names},
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton_kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return compiled.asm["ptx"]


@pytest.mark.parametrize(("D", "K"), [*((D, K) for _, D, _, K in MODELS.values()), (2048, 10), (1024, 32)])
@pytest.mark.parametrize("kernel", triton_programs(128, 1))
def test_rows_move_16_bytes_at_a_time(D, K, kernel):
    name, types, constants, warps = triton_programs(D, K)[kernel]
    ptx = ptx_of(name, types, constants, warps, aligned=types.keys() - {"chunks", "n_rows", "stride"})
    rows = [instruction for instruction in re.findall(r"(?:ld|st)\.global[\w.:]*", ptx) if "b64" not in instruction]
    assert rows.count("ld.global.v4.b32") >= 1
    assert rows.count("st.global.v4.b32") >= 1
    # Besides rows there are only indices, of 64 bits, and scores: one for each k at most.
    assert sum(not instruction.endswith("v4.b32") for instruction in rows) <= K + 1
    assert ".local" not in ptx  # registers spilled


@pytest.mark.parametrize("one", ["", "P", "e", "rank", "E", "n_rows", "stride", "M", "D"])
def test_places_and_puts_compile_whatever_is_one(one):
    """Triton compiles a kernel anew for an argument that is 1. The counts are put too, as 64-bit integers."""
    places = dict.fromkeys(("counts", "place", "origin"), "*i64")
    places |= dict.fromkeys(("P", "E", "e", "rank", "n_own_slots", "n_slots", "n_rows"), "i32")
    puts = dict.fromkeys(("x", "place", "pointers", "score"), "*i64") | dict.fromkeys(
        ("M", "D", "n_rows", "stride"), "i32"
    )
    for name, types, constants in (
        ("_place_rows", places, {"TILE": 1024}), ("_put_rows", puts, {"K": 4, "WEIGHTED": False, "BLOCK": 256}),
    ):  # fmt: skip
        constants |= {one: 1} if one in types else {}
        ptx = ptx_of(name, {n: t for n, t in types.items() if n != one}, constants, 4, aligned=())
        assert ".local" not in ptx


def test_no_thread_waits_for_another_in_a_comparison_of_keys():
    """Summed along the other axis, each is a sum over threads, which took 30 to 100 us on an H200."""
    types = dict.fromkeys(("key", "order", "place"), "*i64") | {"end": "*i32"}
    types |= dict.fromkeys(("N", "n_keys", "blocks"), "i32")
    block = triton_kernels.SORT_BLOCK
    ptx = ptx_of("_place_keys", types, {"BLOCK": block}, block // 32, aligned=types.keys() - {"n_keys", "blocks"})
    assert not re.search(r"shfl|redux|\.local", ptx)


def main() -> None:
    """Launches and temporaries, forward and backward, of the plain versions and through kernels."""
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for the libraries that only running needs
    for how in ("plain", "kernels"):
        kernels.use_kernels = lambda x, how=how: how == "kernels"
        jax.clear_caches()
        for model in MODELS:
            for stage in (*MOST_LAUNCHES, "experts"):
                programs = matmul_programs(model) if stage == "experts" else stage_programs(model, stage)
                each = "   ".join(
                    f"{len(launches(p)):3d} launches {temporary_bytes(p) / 1e6:9.1f} MB" for p in programs
                )
                print(f"{how:8s} {model:12s} {stage:16s} {each}")
    for P in (4, 64, 256, 1024):
        begin = time.perf_counter()
        instructions = str(exchange_program(P).as_text()).count(" = ")
        print(f"P = {P}: {instructions} XLA instructions, {time.perf_counter() - begin:.1f} s to trace and compile")


if __name__ == "__main__":
    main()
