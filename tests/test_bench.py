"""`bench`: its floors add up, its baselines compute what ours do, and every figure asked for comes out."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import torch
from jax_ranks import over_ranks
from problems import close, dense_experts
from ragged_exchange import ragged_all_to_all
from rich.console import Console

from jax_impl.dynamic import exchange
from jax_impl.grouping import Capacity
from parity.bench import in_jax as bench_jax
from parity.bench import in_torch as bench_torch
from parity.bench import plan as bench
from parity.bench.peers import JAX_PEERS, TORCH_PEERS, TORCH_PEERS_OVER_RANKS, find_peers
from parity.bench.plan import DIRECTIONS, Figure, Plan, Ran, draw_routing, expert_flops, row_passes, run_bench
from parity.bench.report import plot_bench, print_bench
from parity.cases.case import Case
from parity.cli import main
from parity.run.backend import BackendError

pytestmark = pytest.mark.usefixtures("warm")

TINY = Case("tiny", ranks=2, tokens=16, width=8, hidden=8, experts=4, top_k=2, capacity_factor="1")


# Rows read plus rows written of 10 tokens and 30 assignments: forward, and backward.
PASSES = {"group_by_expert": (40, 40), "to_expert_major": (60, 60), "to_rank_major": (60, 60), "combine": (40, 70)}


def test_floors_are_those_of_the_formula():
    forward, both = DIRECTIONS
    for stage, (there, back) in PASSES.items():
        assert row_passes(stage, forward, 10, 30) == there
        assert row_passes(stage, both, 10, 30) == there + back
    assert row_passes("whole", forward, 10, 30) == 6 * 30 + 2 * 10 == 200
    assert row_passes("whole", both, 10, 30) == 200 + 7 * 30 + 2 * 10


def test_a_floor_takes_the_fastest_copy_whoever_measured_it(monkeypatch):
    """Copies at 2 and 4 bytes a second, links at 0.5 and 0.25; what failed has none, nor has a link unmeasured."""

    def figure(framework, part, **more):
        return Figure("", framework, "", part, "", 2.0, 1.0, 3.0, 9, **more)

    def measure(plan, framework):
        if not plan.parts:
            n = 4 if framework == "torch" else 8
            yield figure(framework, "copy", bytes=n)
            yield figure(framework, "link", link_bytes=1 if framework == "torch" else 0.5)
        else:
            yield figure(framework, "whole", bytes=6, link_bytes=1)
            yield figure(framework, "combine", bytes=6)
            yield figure(framework, "experts", flops=6)
            yield figure(framework, "whole", bytes=6, error="failed")

    monkeypatch.setattr(bench, "_measure", measure)
    figures = list(run_bench(Plan()))
    assert [f.part for f in figures[:4]] == ["copy", "link"] * 2  # before anything is held against them
    for whole, combine, experts, failed in (figures[4:8], figures[8:12]):
        assert (whole.floor, whole.share) == (6 / 4 + 1 / 0.5, 3.5 / 2)
        assert (combine.floor, combine.share) == (1.5, 0.75)
        assert experts.floor is failed.floor is None
    no_link = figure("torch", "whole", bytes=6, link_bytes=1)
    bench.note_floor(no_link, memory=4, link=0)
    assert no_link.floor is None


def test_launches_that_overlap_keep_the_device_busy_once():
    figure = Figure("", "torch", "", "", "", 1, 1, 1, 1)
    bench.note_launches(figure, [Ran("b", 4, 6), Ran("a", 1, 3), Ran("a", 2, 2.5), Ran("c", 5, 7)])
    assert (figure.launches, figure.busy, figure.span) == (4, 5, 6)
    assert figure.kernels == {"a": 2.5, "b": 2, "c": 2}
    bench.note_launches(empty := Figure("", "torch", "", "", "", 1, 1, 1, 1), [])
    assert empty.launches is None


def test_flops_are_those_of_three_matmuls():
    assert expert_flops(TINY, 10, "forward") == 3 * 2 * 10 * 8 * 8
    assert expert_flops(TINY, 10, "forward+backward") == 9 * 2 * 10 * 8 * 8


def test_routing_repeats_and_a_token_s_experts_differ():
    score_TK, ids_TK, counts_E = draw_routing(TINY, seed=3)
    assert all(len(set(row)) == TINY.top_k for row in ids_TK.tolist())
    assert counts_E.sum() == TINY.assignments
    np.testing.assert_array_equal(ids_TK, draw_routing(TINY, seed=3)[1])
    assert (score_TK != draw_routing(TINY, seed=4)[0]).any()


def test_torch_baseline_computes_the_same():
    assert_same_movement(bench_torch.PLAIN)


def assert_same_movement(movement):
    """Of small integers, whose products and sums are exact in any order: the same bits."""
    _, ids_TK, counts_E = (torch.from_numpy(a) for a in draw_routing(TINY, seed=0))
    x_TD = torch.randint(-9, 10, (TINY.tokens, TINY.width)).float().requires_grad_()
    score_TK = torch.randint(1, 10, ids_TK.shape).float().requires_grad_()
    results = []
    for m in (bench_torch.OURS, movement):
        scores, ids, counts, counts_Pe = m.prepare(score_TK, ids_TK, counts_E, counts_E.reshape(TINY.ranks, -1))
        x_ND, slot, assignment = m.group_by_expert(x_TD, ids, counts)
        x_RD, source, target = m.to_expert_major(x_ND, counts_Pe)
        out_TD = m.combine(m.to_rank_major(x_RD, source, target), scores, slot, assignment)
        results.append((x_ND, x_RD, out_TD, *torch.autograd.grad(out_TD.square().sum(), (x_TD, score_TK))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("rows_per_bin", [TINY.assignments, 12])
def test_jax_baseline_computes_the_same(rows_per_bin):
    """Of small integers again."""
    _, ids_TK, counts_E = (jnp.asarray(a) for a in draw_routing(TINY, seed=0))
    capacity = Capacity(TINY.ranks, rows_per_bin)
    rng = np.random.default_rng(0)
    x_TD = jnp.asarray(rng.integers(-9, 10, (TINY.tokens, TINY.width)), jnp.float32)
    score_TK = jnp.asarray(rng.integers(1, 10, ids_TK.shape), jnp.float32)
    outs = []
    for movement in (bench_jax.OURS, bench_jax.PLAIN):
        x_BCD, slot_TK, assignment, *_ = movement.group_by_expert(x_TD, ids_TK, score_TK, counts_E, capacity)
        kept_Pe = jnp.zeros(4, int).at[ids_TK.reshape(-1)].add((slot_TK < 2 * rows_per_bin).reshape(-1)).reshape(2, 2)
        x_SD, source, target = movement.to_expert_major(x_BCD, kept_Pe)
        y_BCD = movement.to_rank_major(x_SD, source, target)
        outs.append((x_BCD, x_SD, y_BCD, movement.combine(y_BCD, score_TK, slot_TK, assignment)))
    for ours, plain in zip(*outs, strict=True):
        np.testing.assert_array_equal(ours, plain)


# What peers offer, as far as it is called, in the fewest words.
FAKES = {
    "megatron/core/transformer/moe/moe_utils.py": """
import torch

def permute(tokens, routing_map, num_out_tokens):
    token_N = routing_map.T.nonzero()[:, 1]
    assert len(token_N) == num_out_tokens
    return tokens[token_N], None, token_N, None, None

def unpermute(permuted, token_N, restore_shape):
    return torch.zeros(restore_shape).index_add(0, token_N, permuted)

def sort_chunks_by_idxs(rows, sizes, order):
    chunks = rows.split(sizes.tolist())
    return torch.cat([chunks[i] for i in order]), None
""",
    "megatron/core/transformer/moe/token_dispatcher.py": """
import torch
from torch_impl.exchange import exchange_counts, return_tokens, send_tokens

class MoEAlltoAllTokenDispatcher:
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection):
        assert len(local_expert_indices) == num_local_experts
        assert pg_collection["ep"] is pg_collection["tp_ep"] is torch.distributed.group.WORLD
        assert config["expert_model_parallel_size"] * num_local_experts == config["num_moe_experts"]

    def dispatch_preprocess(self, tokens, routing_map, probs):
        expert_N, self.token_N = routing_map.T.nonzero(as_tuple=True)
        self.shape, self.splits = tokens.shape, exchange_counts(routing_map.sum(0))[1]
        return tokens[self.token_N], probs[self.token_N, expert_N]

    def token_dispatch(self, rows, scores):
        return send_tokens(rows, self.splits), send_tokens(scores[:, None], self.splits)[:, 0]

    def dispatch_postprocess(self, rows, scores):
        return rows, None, scores

    def combine_preprocess(self, rows):
        return rows

    def token_combine(self, rows):
        return return_tokens(rows, self.splits)

    def combine_postprocess(self, rows):
        return rows.new_zeros(self.shape).index_add(0, self.token_N, rows)
""",
    "megatron/core/process_groups_config.py": "ProcessGroupCollection = dict",
    "megatron/core/transformer/transformer_config.py": "TransformerConfig = dict",
    "tokamax/__init__.py": "from jax.lax import ragged_dot",
}


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    for name, text in FAKES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "tokamax")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "tokamax")]:
        del sys.modules[name]


def test_a_peer_is_found_where_it_is_installed_and_computes_the_same(fake_peers, capsys):
    assert_same_movement(find_peers("torch", TORCH_PEERS)["megatron"])
    x, gate, up, down = (jnp.asarray(np.random.default_rng(0).standard_normal(s)) for s in ((6, 4), *[(2, 4, 4)] * 3))
    counts_e = jnp.asarray([2, 4])
    x_RD, *weights = (torch.from_numpy(np.array(a)) for a in (x, gate, up, down))
    expected = dense_experts(x_RD, torch.tensor([2, 4]), (weights[0], weights[1], weights[2]), "float32")
    for apply_experts in (find_peers("jax", JAX_PEERS)["tokamax"], bench_jax.apply_experts):
        close(apply_experts(x, counts_e, gate, up, down), expected, "out")
    assert find_peers("jax", {"nobody_has_this": pytest.fail}) == {}
    assert capsys.readouterr().out == ""


def test_a_peer_that_does_not_import_is_said_to(fake_peers, capsys):
    (fake_peers / "tokamax/__init__.py").write_text("raise ImportError('needs another jax')")
    assert find_peers("jax", JAX_PEERS) == {}
    assert "tokamax" in (line := capsys.readouterr().out)
    assert "ImportError: needs another jax" in line


def test_every_figure_comes_out_with_its_floor(fake_peers):
    plan = Plan(shapes=(TINY,), parts=("whole", "experts"), dtype="float32", compiled=False, seconds=0.001)
    figures = [f for f in run_bench(plan) if f.variant != "transformer_engine"]  # found on a GPU
    assert [f.error for f in figures if f.error] == []
    found = [(f.framework, f.variant, f.direction) for f in figures if f.part == "whole"]
    variants = [("torch", "ours"), ("torch", "plain"), ("torch", "megatron"), ("jax", "ours"), ("jax", "plain")]
    assert found == [(*variant, d) for variant in variants for d in DIRECTIONS]
    experts = ["grouped_mm", "einsum over expert bins", "rank bins", "rank bins, tokamax"]
    found = [(f.variant, f.direction) for f in figures if f.part == "experts"]
    assert found == [(variant, d) for variant in experts for d in DIRECTIONS]
    assert [f.framework for f in figures if f.part == "copy"] == ["torch", "jax"]
    assert all(f.share and f.floor and f.low <= f.median <= f.high for f in figures if f.part == "whole")


def test_every_figure_across_ranks_comes_out_with_what_left_the_rank(tmp_path):
    plan = Plan(shapes=(TINY,), parts=("exchange", "whole"), seconds=0.001, ranks=2)
    figures = list(run_bench(plan))
    assert [f.error for f in figures if f.error] == []
    found = [(f.framework, f.part, f.variant, f.direction) for f in figures if f.shape]
    rows = [("torch", "exchange", "2 ranks"), ("torch", "whole", "2 ranks"), ("torch", "whole", "2 ranks, direct")]
    assert [row for row in found if row[0] == "torch"] == [(*row, d) for row in rows for d in DIRECTIONS]
    found = [(f.part, f.direction) for f in figures if f.shape and f.framework == "jax"]
    assert found == [(p, d) for p in ("exchange", "whole") for d in DIRECTIONS]
    leaving = 16 * 2 // 2 * 8 * 2  # half of the rows, in bfloat16
    assert [f.link_bytes for f in figures if f.shape] == [leaving * n for n in (1, 2, 2, 4, 2, 4, 1, 2, 2, 4)]
    moved = [f.bytes for f in figures if f.part == "whole" and f.framework == "torch"]
    assert moved == [n * 8 * 2 for n in (6 * 32 + 2 * 16, 13 * 32 + 4 * 16)] * 2  # N = 32, T = 16, D = 8
    plot_bench(figures, tmp_path / "empty.png")
    drawn = [Figure("tiny", "torch", "ours", "whole", d, 1, 1, 1, 1, share=0.5) for d in DIRECTIONS]
    plot_bench([*figures, *drawn], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 2 * (tmp_path / "empty.png").stat().st_size


OVER_RANKS = Plan(shapes=(TINY,), parts=("exchange", "whole"), dtype="float32", seconds=0.001, ranks=2)


def compare_with_megatron(rank: int, plan: Plan, address: str) -> None:
    """On one of several ranks: outputs and gradients of its whole and of ours."""
    device = bench_torch.join_ranks(rank, plan.ranks, address)
    _, ids_TK, _ = (torch.from_numpy(a).to(device) for a in draw_routing(TINY, seed=rank))
    torch.manual_seed(rank)
    whole, inputs, cotangent = bench_torch.draw_for_ranks(plan, TINY, device, "whole", rank)
    torch.manual_seed(rank)
    prepare = TORCH_PEERS_OVER_RANKS["megatron"]()
    theirs, their_inputs, _ = bench_torch.draw_of_peer(plan, TINY, device, "whole", rank, prepare)
    out, their_out = whole(*inputs), theirs(*their_inputs)
    dx, dscore = torch.autograd.grad(out, inputs, cotangent)
    their_dx, dscore_TE = torch.autograd.grad(their_out, their_inputs, cotangent)
    for got, want in ((their_out, out), (their_dx, dx), (dscore_TE.gather(1, ids_TK), dscore)):
        torch.testing.assert_close(got, want)
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("fake_peers")
def test_a_peer_over_ranks_computes_the_same_and_is_measured(capfd):
    assert bench_torch.run_ranks(compare_with_megatron, OVER_RANKS, 2) == ""
    capfd.readouterr()
    bench_torch.peers_over_ranks(msgspec.structs.replace(OVER_RANKS, baselines=False))
    bench_torch.peers_over_ranks(msgspec.structs.replace(OVER_RANKS, parts=("exchange",)))
    assert capfd.readouterr().out == ""
    bench_torch.peers_over_ranks(OVER_RANKS)
    figures = [msgspec.json.decode(line, type=Figure) for line in capfd.readouterr().out.splitlines()]
    assert [f.error for f in figures if f.error] == []
    found = [(f.shape, f.framework, f.variant, f.part, f.direction) for f in figures]
    assert found == [("tiny", "torch", "2 ranks, megatron", "whole", d) for d in DIRECTIONS]
    assert [f.link_bytes for f in figures] == [16 * 2 // 2 * 8 * 4 * n for n in (2, 4)]


def test_a_peer_that_fails_on_one_rank_is_a_figure_that_says_so(fake_peers, capfd):
    """The other rank waits for it in a collective."""
    with (fake_peers / "megatron/core/transformer/moe/token_dispatcher.py").open("a") as file:
        file.write(
            "\n    def token_dispatch(self, rows, scores):\n"
            "        if torch.distributed.get_rank() == 1:\n            raise MemoryError('planted')\n"
            "        return send_tokens(rows, self.splits), scores\n"
        )
    bench_torch.peers_over_ranks(OVER_RANKS)
    (figure,) = (msgspec.json.decode(line, type=Figure) for line in capfd.readouterr().out.splitlines())
    assert (figure.framework, figure.variant, figure.part) == ("torch", "2 ranks, megatron", "whole")
    assert "rank 1" in figure.error
    assert "MemoryError: planted" in figure.error


def test_jax_sends_as_many_rows_as_there_are(monkeypatch):
    """With the collective replaced, as XLA has none on a CPU: every row arrives, and the whole weights each token."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(exchange, "check_ragged_exchange", lambda _: None)
    way, P = bench_jax.ragged_over_ranks(TINY), TINY.ranks
    routing = [draw_routing(TINY, seed=rank) for rank in range(P)]
    score_PTK, ids_PTK, counts_PE = (np.stack(a) for a in zip(*routing, strict=True))
    rng = np.random.default_rng(0)
    x_PTD, x_PND = (rng.standard_normal((P, n, TINY.width), np.float32) for n in (TINY.tokens, TINY.assignments))

    for whole in (way.whole, bench_jax.direct_over_ranks(TINY).whole):
        out_PTD = over_ranks(whole)(x_PTD, score_PTK, ids_PTK, counts_PE)
        np.testing.assert_allclose(out_PTD, x_PTD * score_PTK.sum(2, keepdims=True), rtol=1e-5)

    assert x_PND.shape[1:] == way.sent
    assert way.send
    received_PRD = over_ranks(way.send)(x_PND, *over_ranks(way.splits)(counts_PE))
    assert received_PRD.shape == (P, *way.received)
    ends = counts_PE.reshape(P, P, -1).sum(2).cumsum(1)
    for rank in range(P):
        sent = [x_PND[p, ends[p, rank - 1] if rank else 0 : ends[p, rank]] for p in range(P)]
        np.testing.assert_array_equal(received_PRD[rank][: sum(map(len, sent))], np.concatenate(sent))
        assert not received_PRD[rank][sum(map(len, sent)) :].any()


def test_jax_measures_rows_as_many_as_there_are():
    """In a process of its own, with two devices."""
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "jax.config.update('jax_cpu_enable_async_dispatch', False)\n"
        "from ragged_exchange import ragged_all_to_all; from jax_impl.dynamic import exchange\n"
        "jax.lax.ragged_all_to_all, exchange.check_ragged_exchange = ragged_all_to_all, lambda _: None\n"
        "from test_bench import TINY, bench_jax, Plan\n"
        "plan = Plan(parts=('exchange', 'whole'), seconds=0.001, ranks=2)\n"
        "bench_jax.across_ranks(plan, [TINY], [bench_jax.ragged_over_ranks, bench_jax.direct_over_ranks])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    figures = [msgspec.json.decode(line, type=Figure) for line in run.stdout.splitlines()]
    assert [f.error for f in figures if f.error] == []
    found = [(f.variant, f.part, f.direction) for f in figures]
    rows = [("2 ranks, ragged", "exchange"), ("2 ranks, ragged", "whole"), ("2 ranks, direct", "whole")]
    assert found == [(*row, d) for row in rows for d in DIRECTIONS]
    assert [f.link_bytes for f in figures] == [16 * 2 // 2 * 8 * 2 * n for n in (1, 2, 2, 4, 2, 4)]  # as in PyTorch
    assert [f.bytes for f in figures] == [n * 8 * 2 for n in (0, 0, *(6 * 32 + 2 * 16, 13 * 32 + 4 * 16) * 2)]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run(monkeypatch, tmp_path):
    """It does not go on to the next figure, where the others would wait for it in this one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.distributed as dist\n"
        "def fail(*_, **__):\n    raise RuntimeError('planted')\n"
        "dist.all_to_all_single = fail\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(BackendError, match="planted"):
        list(run_bench(Plan(shapes=(TINY,), frameworks=("torch",), parts=("exchange",), seconds=0.001, ranks=2)))


@pytest.mark.slow
@pytest.mark.usefixtures("cold")
def test_nothing_is_left_running_when_it_is_ended():
    """By SIGTERM, which runs no `finally`: the framework's process, and its ranks, see that their parent is gone."""
    arguments = ["bench", "small", "--ranks", "2", "--framework", "torch", "--seconds", "60"]
    command = [sys.executable, "-m", "parity", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            wait_until(lambda: len(children(run.pid)) >= 3)  # one that starts two ranks
            started = children(run.pid)
        finally:
            run.terminate()
    wait_until(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in started))


def children(pid: int) -> list[int]:
    """A process's descendants that are still running."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [descendant for child in own for descendant in children(child)]


def wait_until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < 60
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "--experts 16 do not divide over --ranks 3"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seconds", "inf"], "positive and finite"),
        (["--seconds", "nan"], "positive and finite"),
        (["--parts", "exchange"], "with --ranks 1 only"),
        (["--ranks", "2", "--parts", "experts"], "with --ranks 2 only exchange, whole"),
        (["--plot", "a.foo"], ".png, .svg or .pdf"),
        (["tiny"], "unknown: tiny"),
        (["--framework", "numpy"], "unknown: numpy. There are: torch, jax"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda plan, framework: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", *(["small"] if arguments != ["tiny"] else []), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_was_measured_is_shown_when_a_framework_fails(capsys, monkeypatch):
    def measure(plan, framework):
        if plan.parts and framework == "jax":
            raise BackendError("jax", "jax: no such platform")
        shape, part = ("small", "whole") if plan.parts else ("", "copy")
        yield Figure(shape, framework, "ours", part, "forward", 1, 1, 1, 1)

    monkeypatch.setattr(bench, "_measure", measure)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "small"])
    assert ended.value.code == 3
    captured = capsys.readouterr()
    assert re.search("torch +ours +whole", captured.out)
    assert "vary" not in captured.out
    assert "no such platform" in captured.err


def test_figures_that_vary_are_pointed_at():
    steady, wild = (
        Figure("small", "torch", "ours", "whole", "forward", 4, 4 - d, 4 + d, 9, device="cpu") for d in (1, 2)
    )
    for figures, warned in (([steady], False), ([steady, wild], True)):
        print_bench(console := Console(width=160, file=StringIO()), figures)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("is the machine busy?" in said) == warned
        assert "a share of the floor can exceed 1" in said


def test_bytes_alive_are_those_of_the_first_device():
    """In a process with two devices: an array split over both, and one on the second."""
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "import jax.numpy as jnp; from parity.bench.in_jax import live_bytes; from jax.sharding import *\n"
        "mesh = jax.make_mesh((2,), ('r',), axis_types=(AxisType.Auto,))\n"
        "split = jax.device_put(jnp.zeros(200, 'float32'), NamedSharding(mesh, PartitionSpec('r')))\n"
        "second = jax.device_put(jnp.zeros(500, 'float32'), jax.devices()[1])\n"
        "print(live_bytes(), live_bytes())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["400", "400"]
