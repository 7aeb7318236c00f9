"""One symbol, not a sum of P: what a compiler sees of the dynamic path, and that what it makes of it is right."""

import json
import re
import subprocess
import sys
from functools import partial

import capture_ranks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_ranks import layer_arguments, over_ranks, run_layer
from problems import STANDARD, bits
from torch_ranks import TorchRanks

import jax_impl
import torch_impl.matmul
from parity.capture import measure as capture
from parity.capture.measure import K, Measured, T, e
from parity.cli import main
from parity.run.faults import ROOT, Fault, plant


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Compiling may take longer than the ranks are given otherwise."""
    monkeypatch.setattr("torch_ranks.SECONDS", 600)


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_the_product_that_a_compiler_is_given_has_either_gradient_alone(frozen):
    counts = torch.tensor([2, 0, 3])
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (3, 4, 6)))
    (leaf,) = leaves = [a for name, a in (("x", x), ("w", w)) if name != frozen]
    x, w = (a if a is leaf else a.detach() for a in (x, w))
    products = (torch.ops.moe_parity.grouped_matmul, torch_impl.matmul.grouped_matmul)
    got, plain = (torch.autograd.grad(product(x, w, counts).square().sum(), leaves)[0] for product in products)
    assert bits(got) == bits(plain)


LIST_SUM = "    n_sent, n_received = map(sum, splits_2P.tolist())\n"
SUM_ON_THE_DEVICE = "    n_sent, n_received = splits_2P[0].sum().item(), counts_Pe.sum().item()\n"
# What is planted, in what it is seen, and what is then wrong.
STEPS_BACK = {
    "list-sum": (
        "exchange", "    n_sent, n_received = splits_2P.sum(dim=1).tolist()\n", LIST_SUM, "step",
        {"terms", "permute_terms", "permute_terms_backward"},
    ),
    "sum-on-the-device": (
        "exchange", "    n_sent, n_received = splits_2P.sum(dim=1).tolist()\n", SUM_ON_THE_DEVICE, "step", {"syncs"},
    ),
    "no-output-size": ("rows", ", output_size=output_size)", ")", "step", {"syncs", "symbols"}),
    "no-bound": ("layer", "    tell_most_received(", "    (", "bfloat16", {"range"}),
}  # fmt: skip
RIGHT = [("step", 2), ("step", 64), ("bfloat16", 1024), ("float32", 4)]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> dict[tuple[str, int] | str, dict]:
    """What a compiler sees, as the packages are and after each step back."""
    folder = tmp_path_factory.mktemp("planted")
    jobs = [f"{ROOT},{what},{P}" for what, P in RIGHT]
    for name, (file, old, new, what, _) in STEPS_BACK.items():
        fault = Fault(name, "torch", "exchange_counts", "", f"torch_impl/{file}.py", old, new)
        jobs.append(f"{plant(fault, folder / name)},{what},4")
    command = [sys.executable, str(ROOT / "tests" / "capture_sizes.py"), *jobs]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(jobs), run.stderr
    return dict(zip([*RIGHT, *STEPS_BACK], found, strict=True))


def wrong(found: dict, T: int) -> set[str]:
    """What is not as it is of a dispatch that is sized by one bounded symbol and waits for the device once."""
    bound = ["0", str(found["ranks"] * T * min(K, e))]
    right = {"symbols": 1, "terms": 1, "permute_terms": 1, "permute_terms_backward": 1, "range": bound, "error": ""}
    syncs = set() if found["syncs"] in (None, 1) else {"syncs"}
    return {name for name, value in right.items() if found[name] != value} | syncs


@pytest.mark.parametrize(("what", "P"), RIGHT)
def test_one_symbol(sizes, what, P):
    found = sizes[what, P]
    assert found["ranks"] == P
    assert wrong(found, T if what == "step" else 8) == set()
    assert found["syncs"] == (1 if what == "step" else None)


def test_what_the_compiler_has_to_look_at_does_not_grow(sizes):
    steps = [sizes["step", P] for P in (2, 64)]
    assert len({(found["nodes"], found["runtime_asserts"], found["symbols_in_all"]) for found in steps}) == 1


@pytest.mark.parametrize("name", STEPS_BACK)
def test_a_step_back_is_seen(sizes, name):
    *_, what, seen = STEPS_BACK[name]
    assert wrong(sizes[name], T if what == "step" else 8) >= seen


def fifty_routings(ranks: TorchRanks, P: int, backend: str, dtype: torch.dtype, on: str = "cpu") -> None:
    """All ranks together: one graph for every routing, the bits of the eager layer where data moves."""
    results = ranks(capture_ranks.run_both, list(range(P)), *([value] * P for value in (P, 50, backend, dtype, on)))
    for found in results:
        assert len(found.rows) == 50
        assert len(set(found.rows)) > 3
        assert (found.graphs, found.graph_breaks) == (1, 0)  # a recompilation would be one more graph
        assert found.moved_differ == 0
        # aot_eager runs the same operations. Inductor fuses some: a few units of rounding of the largest value.
        assert found.error <= (64 if backend == "inductor" else 0)
    assert results[1].rows[1:3] == [0, 1]  # neither is a special case to the compiler


def test_one_graph_for_fifty_routings(torch_ranks: TorchRanks):
    fifty_routings(torch_ranks, 2, "aot_eager", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("P", "backend", "dtype"),
    [
        (4, "aot_eager", torch.float32), (2, "aot_eager", torch.float64),
        (2, "inductor", torch.bfloat16), (2, "inductor", torch.float32), (4, "inductor", torch.bfloat16),
    ],
)  # fmt: skip
def test_one_graph_for_fifty_routings_more(torch_ranks: TorchRanks, P, backend, dtype):
    fifty_routings(torch_ranks, P, backend, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_fifty_routings_gpu(torch_ranks: TorchRanks, backend, dtype):
    """Over NCCL where each rank has a GPU of its own, else over gloo on one."""
    fifty_routings(torch_ranks, 2, backend, dtype, "cuda")


@pytest.mark.parametrize(
    "how", ["strict export", *(pytest.param(how, marks=pytest.mark.slow) for how in ("export", "make_fx"))]
)
def test_other_ways_to_capture(torch_ranks: TorchRanks, how):
    results = torch_ranks(capture_ranks.captured_by, [how] * 2, [0, 1], [2] * 2)
    for found in results:
        assert found.same
        assert (found.of.symbols, found.of.terms, found.of.permute_terms) == (1, 1, 1)
        assert found.bounded
    assert results[1].rows[1:3] == [0, 1]


def test_two_layers_in_one_graph(torch_ranks: TorchRanks):
    """A symbol for each, no size of two, and no graph more for another routing of either."""
    for found in torch_ranks(capture_ranks.two_layers, [0, 1], [2, 2]):
        assert found == capture_ranks.TwoLayers(graphs=1, graph_breaks=0, terms=1, symbols=2, same=True)


def test_uneven_tokens_with_a_promise(torch_ranks: TorchRanks):
    """The bound on R takes the most tokens of any rank; a rank that has none itself could not know it."""
    assert torch_ranks(capture_ranks.uneven, [8, 0], ["aot_eager"] * 2) == [True, True]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_wrong_output_size_is_refused_when_compiled(torch_ranks: TorchRanks, backend):
    """The size is a plain number, right for the counts it is compiled with. Inductor alone would not notice."""
    counts = [[1, 3, 2], [2, 3, 1], [2, 3, 3], [2, 3, 0]]
    (results,) = torch_ranks(capture_ranks.permute_of, [counts], [6], [backend])
    assert results[:2] == [[0, 1, 2, 3, 4, 5]] * 2
    for refused in results[2:]:
        assert re.search(r"u0 [<>]= 6", refused)


def test_a_permute_that_is_not_told_its_size(torch_ranks: TorchRanks):
    (results,) = torch_ranks(capture_ranks.permute_of, [[[2, 3, 1], [0, 0, 1], [0, 0, 0]]], [None], ["aot_eager"])
    assert results == [[0, 1, 2, 3, 4, 5], [0], []]


def test_ids_out_of_range_are_refused_when_compiled(torch_ranks: TorchRanks):
    (message,) = torch_ranks(capture_ranks.ids_out_of_range, ["aot_eager"])
    assert "assertion failed for expression u0 >= 16" in message


@pytest.mark.parametrize(
    ("dtype", "n_bins"),
    [
        ("float32", 1),
        ("bfloat16", capture_ranks.E),
        *(
            pytest.param(dtype, n_bins, marks=pytest.mark.slow)
            for dtype, n_bins in [
                ("bfloat16", 1),
                ("float16", 1),
                ("float64", 1),
                ("float32", capture_ranks.E),
                ("float16", capture_ranks.E),
                ("float64", capture_ranks.E),
            ]
        ),
    ],
)
def test_static_pytorch_compiles_whole_in_every_dtype(torch_ranks: TorchRanks, dtype, n_bins):
    (same,) = torch_ranks(capture_ranks.static_and_compiled, [dtype], [n_bins])
    assert all(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_is_captured_whole_with_its_kernels(torch_ranks: TorchRanks, dtype):
    """Chosen in 16 bits, with their own backward. Dynamo sees through the choice and the Function."""
    ((equal, through_kernels),) = torch_ranks(capture_ranks.swiglu_through_stand_ins, [dtype])
    assert equal
    assert through_kernels == (dtype == torch.bfloat16)


# Recomputation: a tie that falls one way in the forward and another in backward


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_recomputation_reuses_the_routing_torch(torch_ranks: TorchRanks, how):
    assert torch_ranks(capture_ranks.recomputed, [True] * 2, [how] * 2, [0, 1]) == ["equal", "equal"]


def test_recomputation_that_chooses_anew_is_seen_torch(torch_ranks: TorchRanks):
    """One row more here and one fewer there: PyTorch refuses."""
    for message in torch_ranks(capture_ranks.recomputed, [False] * 2, ["eager"] * 2, [0, 1]):
        assert "Recomputed values for the following tensors have different metadata" in message


def recomputed_jax(replay: bool) -> tuple[list[bytes], list[bytes], int]:
    """A step that keeps everything and one that recomputes, gradients too; how often the latter chose experts."""
    T = E = D = 8
    router_DE, inputs = capture_ranks.TIED_DE, capture_ranks.parameters(1)[1:]
    arguments = [jnp.asarray(a.numpy()) for a in (torch.eye(T), router_DE, *inputs)]
    dout_TD = jnp.asarray(capture_ranks.normal(T, D).numpy())
    chosen = []

    def choose(logits_TE: np.ndarray) -> np.ndarray:
        chosen.append(1)
        logits_TE = np.asarray(logits_TE)
        if len(chosen) == 1:
            return np.argsort(-logits_TE, axis=1, kind="stable")[:, :2].astype(np.int32)
        return (E - 1 - np.argsort(-logits_TE[:, ::-1], axis=1, kind="stable")[:, :2]).astype(np.int32)

    def ids_of(x_TD, router_DE):
        shape = jax.ShapeDtypeStruct((T, 2), jnp.int32)
        return jax.pure_callback(choose, shape, jax.lax.stop_gradient(x_TD @ router_DE))

    def layer(ids_TK, x_TD, router_DE, *weights):
        ids_TK = ids_of(x_TD, router_DE) if ids_TK is None else ids_TK
        routed = jax_impl.route(x_TD, router_DE, jax_impl.Router(2), expert_id_TK=ids_TK)
        capacity = jax_impl.plan_capacity(None, T, 2, E, 1)
        return jax_impl.moe_layer(
            x_TD, router_DE, *weights, router=jax_impl.Router(2), capacity=capacity, routing=routed
        ).out_TD

    @partial(jax.jit, static_argnames=("checkpointed", "replay"))
    def gradients(arguments, checkpointed, replay):
        ids_TK = ids_of(*arguments[:2]) if replay else None
        run = partial(jax.checkpoint(layer) if checkpointed else layer, ids_TK)
        out_TD, vjp = jax.vjp(run, *arguments)
        return out_TD, *vjp(dout_TD)

    expected = bits(jax.device_get(gradients(arguments, checkpointed=False, replay=True)))
    chosen.clear()
    actual = bits(jax.device_get(gradients(arguments, checkpointed=True, replay=replay)))
    return expected, actual, len(chosen)


def test_recomputation_reuses_the_routing_jax():
    expected, actual, chosen = recomputed_jax(replay=True)
    assert chosen == 1
    assert actual == expected


def test_recomputation_that_chooses_anew_is_seen_jax():
    """Shapes are static, so nothing fails: the gradient is that of another function, without a word."""
    expected, actual, chosen = recomputed_jax(replay=False)
    assert chosen == 2
    assert actual != expected


# The JAX mirror of the question


def test_one_executable_for_fifty_routings():
    program = over_ranks(
        partial(
            run_layer, router=jax_impl.Router(3), capacity=jax_impl.plan_capacity(None, 6, 3, 8, 2), axis_name="ranks"
        )
    )
    *inputs, ids_PTK = layer_arguments(STANDARD)
    received = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        ids = rng.permuted(np.tile(np.arange(8, dtype=ids_PTK.dtype), (2, 6, 1)), axis=2)[:, :, :3]
        stages, _ = program(*inputs, jnp.asarray(ids if seed else 0 * ids + np.arange(3, dtype=ids.dtype)))
        received |= set(np.asarray(stages.counts_Pe).sum(axis=(1, 2)).tolist())
    assert {0, 36} < received  # a rank that gets nothing, one that gets everything
    assert program._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", capture.JAX_WAYS)
def test_the_lowered_program_does_not_grow(way):
    small, large = (capture.measured(P, way, timeout=120) for P in (4, 16))
    assert small.error == large.error == ""
    assert small.nodes == large.nodes
    assert small.nodes


# The command


def capture_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["capture", *arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.slow
def test_the_command(capsys, tmp_path):
    arguments = ["--ranks", "2", "--ways", "torch_impl", "--no-inductor", "--plot", str(tmp_path / "plot.png")]
    assert capture_command(*arguments, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert wrong(json.loads(line), T) == set()
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def fabricated(P: int, way: capture.Way, *_) -> Measured:
    terms = P if way == "list_sum" else 1
    error = "stopped after 1 s" if way == "none" else ""
    return Measured(
        "torch", "2", P, way, error, permute_terms=terms, permute_terms_backward=terms, range=["0", "int_oo"]
    )


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(capture, "measured", fabricated)
    assert capture_command("--ranks", "512", "--ways", "none", "list_sum", "torch_impl", "--no-json") == 0
    none, list_sum, torch_impl = capsys.readouterr().out.splitlines()[1:4]
    assert none.split()[:2] == ["none", "512"]
    assert none.endswith("stopped after 1 s")
    assert list_sum.split()[5:9] == ["-", "512", "512", "unbounded"]
    assert torch_impl.split()[5:9] == ["-", "1", "1", "unbounded"]


def test_more_than_one_symbol_is_a_failure(monkeypatch):
    monkeypatch.setattr(capture, "measured", lambda P, *_: Measured("torch", "2", P, "torch_impl", "does not capture"))
    assert capture_command("--ranks", "4", "--json") == 1


def test_one_rank_is_refused(capsys):
    assert capture_command("--ranks", "4", "1") == 2
    assert "--ranks 4 1: give numbers of 2 or more" in capsys.readouterr().err
