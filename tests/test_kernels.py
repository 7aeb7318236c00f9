"""Triton kernels against the plain versions they stand for: bit for bit wherever rows move or are summed over K.

On a GPU as they are (`make test-gpu`); on a CPU in Triton's interpreter (`make test-kernels`). Without either, what is
left to test is that the plain versions serve.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import gamma

from torch_impl import kernels, static
from torch_impl.direct.rows import expert_major_rows as places
from torch_impl.direct.rows import put_here, weigh_rows
from torch_impl.experts import Experts
from torch_impl.glu import glu
from torch_impl.grouping import combine, group_by_expert
from torch_impl.layout import to_expert_major, to_rank_major
from torch_impl.rows import expert_major_source, inverse_permutation
from torch_impl.static import grouping as static_grouping
from torch_impl.static import rows as static_rows
from torch_impl.static.rows import take_or_zero

# Of Triton's interpreter, under NumPy 2.2; under 2.4 it does not run at all.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Powers of two and others, one expert per token and all of them, wider than one program's chunk.
SHAPES = [(1, 8, 1, 1), (7, 24, 4, 3), (16, 32, 8, 2), (33, 130, 6, 6), (5, 9000, 3, 2)]  # T, D, E, K
LARGE = [(4096, 7168, 256, 8), (8192, 4096, 8, 2), (4099, 2048, 128, 7)]
ON_GPU = torch.cuda.is_available()
INTERPRETED = kernels.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1" and not ON_GPU
cases = pytest.mark.parametrize(
    ("device", "shape"),
    [pytest.param("cpu", shape, id=f"cpu-{shape}") for shape in SHAPES if INTERPRETED]
    + [pytest.param("cuda", shape, id=f"cuda-{shape}", marks=pytest.mark.gpu) for shape in SHAPES + LARGE],
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize(
    "dtype", DTYPES[INTERPRETED:], ids=str
)  # the interpreter cuts bfloat16 off instead of rounding


@pytest.fixture
def plain(monkeypatch):
    """A context in which nothing goes through kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "use_kernels", lambda x: False)
            return function(*arguments)

    return call


@pytest.fixture
def nothing_past_the_end(monkeypatch):
    """Every array of rows that a kernel allocates has one more behind it, which stays as it is."""
    allocated, plain_new_empty = [], torch.Tensor.new_empty

    def new_empty(like, *sizes, **how):
        if how:  # the interpreter's own
            return plain_new_empty(like, *sizes, **how)
        allocated.append(torch.full((sizes[0] + 1, *sizes[1:]), 7, dtype=like.dtype, device=like.device))
        return allocated[-1][:-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert allocated
    assert all((rows[-1] == 7).all() for rows in allocated)


def routing(T, E, K, device):
    """Uneven: some experts are chosen by nobody, some by all."""
    favour_E = torch.linspace(0, 3, E) * (torch.arange(E) % 3 > 0)
    ids_TK = (torch.rand(T, E) + favour_E).argsort(dim=1, descending=True)[:, :K]
    return ids_TK.to(device), torch.bincount(ids_TK.reshape(-1), minlength=E).to(device)


def same(ours, theirs):
    """Bit for bit, the sign of zero and all."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    assert torch.equal(ours.contiguous().view(integers), theirs.contiguous().view(integers))


@cases
@pytest.mark.parametrize("integers", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_sort_by_key(device, shape, integers):
    T, _, E, K = shape
    ids_TK, _ = routing(T, E, K, device)
    E += 256  # more keys than the least of the dtypes has numbers
    order_N, place_N = kernels.sort_by_key(ids_TK.to(integers).reshape(-1), E)
    expected_N = ids_TK.reshape(-1).argsort(stable=True)
    same(order_N, expected_N)
    same(place_N, inverse_permutation(expected_N))


@cases
def test_ids_that_are_no_expert_s_still_get_a_row_each(device, shape):
    T, _, E, K = shape
    ids_TK, _ = routing(T, E, K, device)
    ids_TK[0, 0], ids_TK[T // 2, -1] = -5, E + 2**33
    order_N, place_N = kernels.sort_by_key(ids_TK.reshape(-1), E)
    expert_N = torch.where((ids_TK < 0) | (ids_TK >= E), E, ids_TK).reshape(-1)
    same(order_N, expert_N.argsort(stable=True))
    same(place_N, inverse_permutation(order_N))


@cases
def test_no_assignments(device, shape):
    _, D, E, K = shape
    ids_TK = torch.zeros(0, K, dtype=torch.int64, device=device)
    assert kernels.sort_by_key(ids_TK.reshape(-1), E)[0].shape == (0,)
    assert kernels.expand_rows(torch.zeros(0, D, device=device), ids_TK).shape == (0, D)
    assert kernels.sum_rows(torch.zeros(0, D, device=device), ids_TK).shape == (0, D)
    row_RD = kernels.gather_rows(torch.zeros(0, D, device=device), torch.zeros(3, dtype=torch.int64, device=device))
    assert row_RD.tolist() == [[0.0] * D] * 3


@cases
@pytest.mark.usefixtures("nothing_past_the_end")
def test_no_assignments_but_padding(device, shape):
    _, D, _, K = shape
    none_TK, padding_S = (torch.zeros(*s, dtype=torch.int64, device=device) for s in ((0, K), (5,)))
    x_TD, y_SD, score_TK = (torch.zeros(*s, device=device) for s in ((0, D), (5, D), (0, K)))
    same(kernels.expand_rows(x_TD, none_TK, padding_S), y_SD)
    same(kernels.weighted_sum_backward(x_TD, y_SD, score_TK, none_TK, padding_S)[0], y_SD)


@cases
@pytest.mark.parametrize("P", [1, 2, 3])
def test_expert_major_rows(device, shape, P):
    T, _, e, _ = shape
    counts_Pe = torch.randint(0, T + 1, (P, e), device=device) * (torch.rand(P, e, device=device) > 0.3)
    R = int(counts_Pe.sum())
    source_R, target_R = kernels.expert_major_rows(counts_Pe, R)
    same(source_R, expert_major_source(counts_Pe, R))
    same(target_R, inverse_permutation(source_R))


@cases
@dtypes
def test_rows_moved_and_summed_are_bitwise_equal(device, shape, dtype, plain):
    T, D, E, K = shape
    ids_TK, counts_E = routing(T, E, K, device)
    x_TD, dx_ND = torch.randn(T, D, device=device).to(dtype), torch.randn(T * K, D, device=device).to(dtype)
    dx_ND[::3] = -0.0
    score_TK = torch.randn(T, K, device=device, dtype=torch.promote_types(dtype, torch.float32))
    x_TD.requires_grad_()
    x_ND, slot_TK, assignment_N = plain(group_by_expert, x_TD, ids_TK, counts_E)
    same(kernels.expand_rows(x_TD.detach(), slot_TK), x_ND)
    same(kernels.gather_rows(dx_ND, assignment_N), dx_ND[assignment_N])
    same(kernels.sum_rows(dx_ND, slot_TK), plain(torch.autograd.grad, x_ND, x_TD, dx_ND)[0])
    same(kernels.sum_rows(dx_ND, slot_TK, score_TK), plain(combine, dx_ND, score_TK, slot_TK, assignment_N))


@cases
@dtypes
def test_gradients_of_combine(device, shape, dtype, plain):
    T, D, E, K = shape
    ids_TK, counts_E = routing(T, E, K, device)
    y_ND, dout_TD = torch.randn(T * K, D, device=device).to(dtype), torch.randn(T, D, device=device).to(dtype)
    score_TK = torch.randn(T, K, device=device, dtype=torch.promote_types(dtype, torch.float32))
    _, slot_TK, assignment_N = plain(group_by_expert, dout_TD, ids_TK, counts_E)
    for leaf in (y_ND, score_TK):
        leaf.requires_grad_()
    out_TD = plain(combine, y_ND, score_TK, slot_TK, assignment_N)
    expected_dy_ND, _ = plain(torch.autograd.grad, out_TD, (y_ND, score_TK), dout_TD)
    dy_ND, dscore_TK = kernels.weighted_sum_backward(dout_TD, y_ND.detach(), score_TK.detach(), slot_TK)
    same(dy_ND, expected_dy_ND)
    # The sum over D has no fixed order: any has an error of at most D roundings of the sum of magnitudes.
    products_TKD = dout_TD.double()[:, None] * y_ND.detach().double()[slot_TK]
    error_TK = (dscore_TK.double() - products_TKD.sum(dim=2)).abs()
    assert (error_TK <= D * torch.finfo(score_TK.dtype).eps * products_TKD.abs().sum(dim=2)).all()


@cases
@dtypes
@pytest.mark.usefixtures("nothing_past_the_end")
def test_indices_past_the_end_are_zero_and_padding_is_written(device, shape, dtype, plain):
    """The static layer's: some assignments have no row, some rows no assignment, and hold NaN."""
    T, D, E, K = shape
    ids_TK, counts_E = routing(T, E, K, device)
    C = -(-T * K // 2)  # two bins: one drops and one is padded, unless the two are even
    capacity = static.Capacity(1 if E % 2 else 2, C if E % 2 else max(1, C - 2))
    score_TK = torch.randn(T, K, device=device, dtype=torch.promote_types(dtype, torch.float32))
    x_TD, dout_TD = (torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    arguments = (x_TD, ids_TK, score_TK, counts_E, capacity)
    x_BCD, slot_TK, assignment_BC, _ = plain(static_grouping.group_by_expert, *arguments)
    S = assignment_BC.numel()
    y_BCD = torch.where((assignment_BC < T * K)[..., None], torch.randn_like(x_BCD), torch.nan)
    same(kernels.expand_rows(x_TD, slot_TK, assignment_BC.reshape(-1)).reshape(x_BCD.shape), x_BCD)
    y_SD = y_BCD.reshape(S, D)
    gathered_TKD = take_or_zero(y_SD, slot_TK)
    assert gathered_TKD.isfinite().all()
    same(kernels.gather_rows(y_SD, slot_TK), gathered_TKD)

    y_BCD.requires_grad_()
    score_TK.requires_grad_()
    out_TD = plain(static_rows.weighted_sum, y_BCD, score_TK, slot_TK, assignment_BC)
    same(kernels.sum_rows(y_SD, slot_TK, score_TK.detach()), out_TD.detach())
    expected_dy_BCD, _ = plain(torch.autograd.grad, out_TD, (y_BCD, score_TK), dout_TD)
    dy_SD, dscore_TK = kernels.weighted_sum_backward(
        dout_TD, y_SD, score_TK.detach(), slot_TK, assignment_BC.reshape(-1)
    )
    same(dy_SD, expected_dy_BCD.reshape(S, D))
    products_TKD = dout_TD.double()[:, None] * gathered_TKD.double()
    error_TK = (dscore_TK.double() - products_TKD.sum(dim=2)).abs()
    assert (error_TK <= D * torch.finfo(score_TK.dtype).eps * products_TKD.abs().sum(dim=2)).all()


def rounded_once(ours, exact, roundings, size, dtype):
    """Half a unit in the last place of the exact value, and so many roundings of float32 of what is added up."""
    least = torch.finfo(dtype).smallest_normal
    unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp(min=least).log2().floor())
    assert ours.dtype == dtype
    assert ((ours.double() - exact).abs() <= unit / 2 + 2.0**-24 * roundings * size).all()


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16][INTERPRETED:], ids=str)
@pytest.mark.usefixtures("nothing_past_the_end")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's: it is meant to
def test_swiglu_is_rounded_once(device, shape, dtype):
    """Half a unit in the last place, and roundings of float32: 16 of what is added up, for a quotient and products, and
    two for each unit of the gate, as exp(-g) is a power of two of a rounded product.
    """
    T, D, _, _ = shape
    dhidden, gate, up = (scale * torch.randn(T, D, device=device) for scale in (1, 8, 1))
    gate[0, :8] = torch.tensor([0.0, -0.0, 80, -80, 120, -120, 1e-3, -1e-3])  # exp overflows in float32 past 88
    dhidden, gate, up = (a.to(dtype) for a in (dhidden, gate, up))
    dh, g, u = (a.double() for a in (dhidden, gate, up))
    s = g.sigmoid()
    expected = g * s * u, dh * u * s * (1 + g * (1 - s)), dh * g * s
    added = expected[0].abs(), (dh * u * s).abs() * (1 + g.abs() * (1 - s)), expected[2].abs()
    found = kernels.swiglu(gate, up), *kernels.swiglu_backward(dhidden, gate, up)
    for ours, exact, size in zip(found, expected, added, strict=True):
        rounded_once(ours, exact, 16 + 2 * g.abs(), size, dtype)
    count = torch.tensor(T // 2, device=device)
    counted = kernels.swiglu(gate, up, count), *kernels.swiglu_backward(dhidden, gate, up, count)
    for part, whole in zip(counted, found, strict=True):
        same(part[: T // 2], whole[: T // 2])


@cases
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_swiglu_through_kernels_is_differentiated_once_and_twice(device, shape, monkeypatch, plain):
    """Once through the backward kernel; twice through what the plain version would do. Each number is rounded once.

    The second gradient is of half the squares of the first, so it starts from the first as it was rounded. A sigmoid
    is in it up to three times, of 5 roundings each; with products and sums, that is under 32.
    """
    if device == "cpu":
        monkeypatch.setattr(kernels, "use_kernels", lambda x: not torch.is_grad_enabled())
    T, D, _, _ = shape
    gate, up, dhidden = (torch.randn(T, D, device=device, dtype=torch.float16) for _ in range(3))
    dh, g, u = (a.double() for a in (dhidden, gate, up))
    s = g.sigmoid()
    silu, slope, curve = g * s, s * (1 + g * (1 - s)), s * (1 - s) * (2 + g * (1 - 2 * s))
    # What is added up, where 1 - s counts as 1: that is what it is off by a rounding of.
    of_slope, of_curve = s * (1 + g.abs()), s * (2 + 3 * g.abs())
    gate.requires_grad_()
    up.requires_grad_()

    def check_gradients():
        hidden = glu(gate, up, Experts())
        once = torch.autograd.grad(hidden, (gate, up), dhidden, retain_graph=True)
        kept = torch.autograd.grad(hidden, (gate, up), dhidden, create_graph=True)
        twice = torch.autograd.grad([a.float().square().sum() / 2 for a in kept], (gate, up))
        rounded_once(hidden.detach(), silu * u, 16 + 2 * g.abs(), (silu * u).abs(), torch.float16)
        for dgate, dup in (once, kept):
            rounded_once(dgate.detach(), dh * u * slope, 16 + 2 * g.abs(), (dh * u).abs() * of_slope, torch.float16)
            rounded_once(dup.detach(), dh * silu, 16 + 2 * g.abs(), (dh * silu).abs(), torch.float16)
        dgate, dup = (a.detach().double() for a in kept)
        of_gate = (dgate * dh * u).abs() * of_curve + (dup * dh).abs() * of_slope
        rounded_once(twice[0], dgate * dh * u * curve + dup * dh * slope, 32, of_gate, torch.float16)
        rounded_once(twice[1], dgate * dh * slope, 32, (dgate * dh).abs() * of_slope, torch.float16)

    assert type(glu(gate, up, Experts()).grad_fn).__name__ == "_SwiGLUBackward"
    check_gradients()
    plain(check_gradients)


def test_float32_does_not_take_swiglu_s_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    assert kernels.use_swiglu_kernels(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.use_swiglu_kernels(torch.zeros(1))


def test_a_cpu_tensor_takes_the_plain_way():
    assert not kernels.use_kernels(torch.zeros(1))


def dispatch_and_combine(x_TD, score_TK, ids_TK, counts_E):
    x_ND, slot_TK, assignment_N = group_by_expert(x_TD, ids_TK, counts_E)
    x_RD, source_R, target_R = to_expert_major(x_ND, counts_E.reshape(2, -1))
    return combine(to_rank_major(x_RD, source_R, target_R), score_TK, slot_TK, assignment_N)


def gradients(run, x_TD, score_TK, ids_TK, counts_E):
    x_TD, score_TK = x_TD.detach().requires_grad_(), score_TK.detach().requires_grad_()
    out_TD = run(x_TD, score_TK, ids_TK, counts_E)
    return out_TD.detach(), *torch.autograd.grad(out_TD, (x_TD, score_TK), torch.ones_like(out_TD))


@cases
@pytest.mark.parametrize("dtype", [*DTYPES[INTERPRETED:], torch.int64], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_put_rows(device, shape, dtype, ranks, weighted):
    """Into parts that stand for other ranks' memory, each with a row behind it that stays as it is."""
    T, D, _, K = shape
    n_rows = T * K // ranks + 2  # more than are put
    place_MK = torch.randperm(ranks * n_rows, device=device)[: T * K].reshape(T, K)
    place_MK[torch.rand(T, K, device=device) < 0.2] = -1
    x_MD = (100 * torch.randn(T, D, device=device)).to(dtype)
    parts = [torch.full((n_rows + 1, D), 7, dtype=dtype, device=device) for _ in range(ranks)]
    pointers_P = torch.tensor([part.data_ptr() for part in parts], device=device)
    score_MK = torch.rand(T, K, device=device) if weighted and dtype.is_floating_point else None
    kernels.put_rows(x_MD, place_MK, pointers_P, n_rows, score_MK)
    expected = torch.full((ranks * n_rows, D), 7, dtype=dtype, device=device)
    if score_MK is not None:
        x_MD, place_MK = weigh_rows(x_MD, score_MK), place_MK.reshape(-1, 1)
    put_here(x_MD, place_MK, expected)
    for part, rows in zip(parts, expected.chunk(ranks), strict=True):
        same(part[:-1], rows)
        assert (part[-1] == 7).all()


@cases
@pytest.mark.parametrize("ranks", [1, 3])
def test_place_rows(device, shape, ranks, plain):
    """Uneven counts, more of one segment than a program takes at once, and room past the last."""
    T, _, E, K = shape
    counts_PE = (torch.rand(ranks, ranks * E, device=device) ** 4 * T * K / E).long()
    counts_PE[0, 0] = 1030
    n_slots = int(counts_PE.sum(dim=1).max()) + 3
    n_rows = int(counts_PE.reshape(ranks, ranks, E).sum(dim=(0, 2)).max()) + 5
    for rank in range(ranks):
        n_own_slots = n_slots - rank
        ours = kernels.place_rows(counts_PE, rank, n_own_slots, n_slots, n_rows)
        for found, expected in zip(ours, plain(places, counts_PE, rank, n_own_slots, n_slots, n_rows), strict=True):
            same(found, expected)


def test_rows_next_to_each_other_go_out_far_apart():
    """Of rows that lie by rank, any 64 that go out one after the other are for 8 ranks in nearly equal parts."""
    for M in (4096, 32768, 50000):
        order = [program * kernels.put_stride(M) % M for program in range(M)]
        assert sorted(order) == list(range(M))
        for first in range(0, M - 64, 999):
            ranks = [row * 8 // M for row in order[first : first + 64]]
            assert {ranks.count(rank) for rank in range(8)} <= {6, 7, 8, 9, 10}
    assert [kernels.put_stride(M) for M in range(5)] == [1, 1, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 256, 6, 3), *LARGE], ids=str)
def test_the_whole_chain_on_a_gpu(shape, plain):
    """Equal to the plain version, and the same bits again over memory that holds NaN; one launch per movement."""
    T, D, E, K = shape
    ids_TK, counts_E = routing(T, E, K, "cuda")
    inputs = torch.randn(T, D, device="cuda", dtype=torch.bfloat16), torch.rand(T, K, device="cuda"), ids_TK, counts_E
    out, dx, dscore = gradients(dispatch_and_combine, *inputs)
    expected = plain(gradients, dispatch_and_combine, *inputs)
    same(out, expected[0])
    same(dx, expected[1])
    size_T1 = inputs[0].double().abs().sum(dim=1, keepdim=True)  # of the products that a score's gradient sums
    assert ((dscore - expected[2]).abs() <= 2 * gamma(D, "float32") * size_T1).all()
    poison = [torch.full((T * K, D), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    del poison
    for first, again in zip((out, dx, dscore), gradients(dispatch_and_combine, *inputs), strict=True):
        same(first, again)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gradient_of_a_gradient_on_paper(device, plain):
    """Kernels leave no graph behind, so a backward that is differentiated again does not go through them.

        out = S x, S = sum of K scores          dx = 2 S^2 x          dscore = 2 S |x|^2, for each k
        penalty = |dx|^2 + |dscore|^2 = 4 S^4 |x|^2 + 4 K S^2 |x|^4

    All terms of a sum have one sign here, so a sum of n products is off by n roundings more than its terms. From out to
    dscore, to the gradient of out and to that of a score, two sums over D and three over K lie behind one another, and
    six roundings of their own.
    """
    T, D, K = 33, 64, 3
    ids_TK, counts_E = routing(T, 6, K, device)
    x_TD, score_TK = torch.randn(T, D, device=device), torch.rand(T, K, device=device)

    def penalty(x_TD, score_TK):
        x_TD, score_TK = x_TD.detach().requires_grad_(), score_TK.detach().requires_grad_()
        out_TD = dispatch_and_combine(x_TD, score_TK, ids_TK, counts_E)
        dx_TD, dscore_TK = torch.autograd.grad(out_TD.square().sum(), (x_TD, score_TK), create_graph=True)
        return torch.autograd.grad(dx_TD.square().sum() + dscore_TK.square().sum(), (x_TD, score_TK))

    x, S = x_TD.double(), score_TK.double().sum(dim=1, keepdim=True)
    square = x.square().sum(dim=1, keepdim=True)
    exact = (8 * S**4 + 16 * K * S**2 * square) * x, (16 * S**3 * square + 8 * K * S * square**2).expand(T, K)
    for found in (penalty(x_TD, score_TK), plain(penalty, x_TD, score_TK)):
        for ours, expected in zip(found, exact, strict=True):
            assert ((ours.double() - expected).abs() <= gamma(2 * D + 3 * K + 6, "float32") * expected.abs()).all()


@pytest.mark.gpu
def test_the_whole_chain_is_captured_whole():
    """In a process of its own: here every call checks its shapes, which no compiler sees through."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, __file__], check=True, cwd=root, env=os.environ | {"PYTHONPATH": paths})


def capture():
    """`torch.compile(fullgraph=True)` and a CUDA graph give the bits of the eager run."""
    ids_TK, counts_E = routing(64, 8, 2, "cuda")
    inputs = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16), torch.rand(64, 2, device="cuda")
    expected = gradients(dispatch_and_combine, *inputs, ids_TK, counts_E)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = dispatch_and_combine(*inputs, ids_TK, counts_E)
    graph.replay()
    torch.cuda.synchronize()
    same(out_TD, expected[0])
    compiled = torch.compile(dispatch_and_combine, fullgraph=True)
    for ours, theirs in zip(gradients(compiled, *inputs, ids_TK, counts_E), expected, strict=True):
        same(ours, theirs)


if __name__ == "__main__":
    capture()
