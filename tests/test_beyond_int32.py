"""Arrays of more than 2^32 elements, past the end of offsets in 32 bits: every row of every movement, bit for bit.

The same code runs at a small size on a CPU, so that on a GPU only the size is new. There each corner has a process of
its own: it gives its memory back, and a wrong offset may leave its GPU unusable.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import jax_impl.dynamic.grouping
import jax_impl.dynamic.layout
import jax_impl.grouping
import jax_impl.layout
import torch_impl.grouping
import torch_impl.kernels
import torch_impl.layout
import torch_impl.static.grouping
import torch_impl.static.layout
from parity.interop import to_jax, to_torch
from parity.run.faults import ROOT, find, plant

Array = np.ndarray
K, NOTHING = 2, -1  # choices of a token; in place of a row's number, that there is none


class Size(NamedTuple):
    """Tokens, their width, experts and ranks."""

    T: int
    D: int
    E: int
    P: int


# Arrays of tokens are past 2^31 elements, where signed offsets end; of rows, past 2^32, where unsigned ones do.
SIZES = {"small": Size(57, 40, 8, 4), "large": Size(2**19 + 24, 4096, 16, 4)}
AT_ONCE = 2**26  # elements that are made or compared


def parts(n_rows: int, D: int) -> list[slice]:
    step = AT_ONCE // D
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def values(row_M: Tensor, D: int) -> Tensor:
    """[M, D] in float32 of row numbers below 2^25: any five columns tell a row from all others.

    All are integers from 1 to 32, so that sums of two, and of D products of two, are exact in float32.
    """
    column_D = torch.arange(D, device=row_M.device)
    return (((row_M[:, None] >> 5 * (column_D % 5)) + column_D) % 32 + 1).float()


def values_or(padding: float, row_M: Tensor, D: int) -> Tensor:
    """The same, and padding where there is nothing."""
    return torch.where((row_M != NOTHING)[:, None], values(row_M, D), padding)


@torch.no_grad()
def array(row_M: Tensor, D: int) -> Tensor:
    """Rows with these numbers in bfloat16, and NaN where there is nothing."""
    made_MD = torch.empty(len(row_M), D, dtype=torch.bfloat16, device=row_M.device)
    for part in parts(*made_MD.shape):
        made_MD[part] = values_or(torch.nan, row_M[part], D)
    return made_MD


@torch.no_grad()
def check_rows(what: str, found: Tensor, D: int, expected: Callable[[slice], Tensor]) -> None:
    """Each row is the expected one bit for bit; `expected` makes some of them."""
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    found = found.detach().reshape(-1, found.shape[-1])
    off = [(found[p].view(bits) != expected(p).to(found.dtype).view(bits)).any(dim=1) for p in parts(len(found), D)]
    wrong = torch.cat(off).nonzero()[:, 0].tolist()
    assert not wrong, f"{what}: {len(wrong)} of {len(found)} rows are wrong, from row {wrong[0]} to row {wrong[-1]}"


def added(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(dim=0)


def call_torch(f: Callable, leaves: list[Tensor], cotangent: Tensor, indices: list[Array]) -> Any:
    leaves = [a.requires_grad_() for a in leaves]
    out, *rest = f(*leaves, *(torch.from_numpy(i).to(cotangent.device) for i in indices))
    return out, rest, torch.autograd.grad(out, leaves, cotangent.reshape(out.shape))


def call_jax(f: Callable, leaves: list[Tensor], cotangent: Tensor, indices: list[Array]) -> Any:
    @jax.jit
    def both(leaves, cotangent, indices):
        def first_apart(*leaves):
            out, *rest = f(*leaves, *indices)
            return out, rest

        out, vjp, rest = jax.vjp(first_apart, *leaves, has_aux=True)
        return out, rest, vjp(cotangent.reshape(out.shape))

    given = [to_jax(a) for a in leaves], to_jax(cotangent), [jnp.asarray(i.astype(np.int32)) for i in indices]
    return jax.tree.map(to_torch, both(*given))


class Corner(NamedTuple):
    """Its stages, and how one is called: what it returns, and the gradients of its first arguments."""

    grouping: Any
    layout: Any
    static: bool
    call: Callable


CORNERS = {
    "torch": Corner(torch_impl.grouping, torch_impl.layout, False, call_torch),
    "torch-static": Corner(torch_impl.static.grouping, torch_impl.static.layout, True, call_torch),
    "jax": Corner(jax_impl.grouping, jax_impl.layout, True, call_jax),
    "jax-dynamic": Corner(jax_impl.dynamic.grouping, jax_impl.dynamic.layout, False, call_jax),
}


def expert_ids(size: Size) -> Array:
    """The higher ones are chosen more often, so that the last bin is full: [T, K]."""
    rng = np.random.default_rng(0)
    first_T = size.E - 1 - (size.E * rng.random(size.T) ** 2).astype(np.int64)
    return np.stack([first_T, (first_T + rng.integers(1, size.E, size.T)) % size.E], axis=1)


def capacity_of(size: Size) -> int:
    """For all assignments, if they were even: as they are not, some bins drop and some have padding."""
    return -(-size.T * K // size.P) + 3


def grouped(size: Size, static: bool) -> tuple[Array, Array]:
    """By argsort: the row of each assignment [N], and the assignment of each row [M]; past the end for none."""
    expert_N = expert_ids(size).reshape(-1)
    N, C, bin_N = expert_N.size, capacity_of(size), expert_N // (size.E // size.P)
    order_N = expert_N.argsort(kind="stable")
    if not static:
        return order_N.argsort(), order_N
    kept_n = np.concatenate([np.flatnonzero(bin_N == b)[:C] for b in range(size.P)])
    kept_n = kept_n[expert_N[kept_n].argsort(kind="stable")]
    bin_n = bin_N[kept_n]
    slot_n = bin_n * C + np.arange(kept_n.size) - np.searchsorted(bin_n, bin_n)
    slot_N, assignment_M = np.full(N, size.P * C), np.full(size.P * C, N)
    slot_N[kept_n], assignment_M[slot_n] = slot_n, kept_n
    return slot_N, assignment_M


def received(corner: str, size: Size) -> tuple[Array, Array, Array]:
    """By argsort: counts [P, e], and of each row where it comes from and where it goes to; past the end for none."""
    e, C, N = size.E // size.P, capacity_of(size), size.T * K
    rng = np.random.default_rng(1)
    if CORNERS[corner].static:
        real_P = [C - missing for missing in (0, 5, 1, 0)]
        counts_Pe = np.stack([np.bincount((e * rng.random(n) ** 2).astype(int), minlength=e) for n in real_P])
        rows_P = [C] * size.P
    else:
        real = N - 5 if corner == "jax-dynamic" else N
        counts_Pe = np.bincount((size.E * rng.random(real) ** 2).astype(int), minlength=size.E).reshape(size.P, e)
        rows_P = [*counts_Pe.sum(axis=1)[:-1], counts_Pe.sum(axis=1)[-1] + N - real]
    key_M = np.concatenate([
        np.append(np.repeat(np.arange(e), counts_e), np.full(rows - counts_e.sum(), e))
        for counts_e, rows in zip(counts_Pe, rows_P, strict=True)
    ])  # fmt: skip
    source_M = key_M.argsort(kind="stable")
    target_M = source_M.argsort()
    return counts_Pe, past_the_end(source_M, key_M[source_M] == e), past_the_end(target_M, key_M == e)


def past_the_end(index_M: Array, nothing_M: Array) -> Array:
    return np.where(nothing_M, index_M.size, index_M)


def row_numbers(index: Array, n_rows: int, device: str) -> Tensor:
    """On the device, with NOTHING for what is past the end."""
    return torch.from_numpy(np.where(index < n_rows, index, NOTHING)).to(device)


def check_group(name: str, size: Size, device: str) -> None:
    """Stage 2: a token to its K rows, and the sum of their gradients to the token."""
    corner, (T, D, E, P) = CORNERS[name], size
    slot_N, assignment_M = grouped(size, corner.static)
    ids_TK, M = expert_ids(size), assignment_M.size
    counts_E = np.bincount(ids_TK.reshape(-1), minlength=E)
    assignment, slot = row_numbers(assignment_M, T * K, device), row_numbers(slot_N, M, device)
    token_M = torch.where(assignment != NOTHING, assignment // K, NOTHING)
    real_M = torch.where(assignment != NOTHING, torch.arange(M, device=device), NOTHING)

    def group(x, ids, counts):
        if not corner.static:
            return corner.grouping.group_by_expert(x, ids, counts)
        score = torch.zeros(T, K, device=device) if corner.call is call_torch else jnp.zeros((T, K))
        capacity = corner.grouping.Capacity(P, capacity_of(size))
        return corner.grouping.group_by_expert(x, ids, score, counts, capacity)

    x_TD = array(torch.arange(T, device=device), D)
    x_MD, (found_slot, found_assignment, *_), (dx_TD,) = corner.call(
        group, [x_TD], array(real_M, D), [ids_TK, counts_E]
    )
    assert (found_slot.cpu().numpy().reshape(-1) == slot_N).all()
    assert (found_assignment.cpu().numpy().reshape(-1) == assignment_M).all()
    check_rows("x", x_MD, D, lambda part: values_or(0, token_M[part], D))
    slot_TK = slot.reshape(T, K)
    check_rows("dx", dx_TD, D, lambda part: added(values_or(0, slot_T[part], D) for slot_T in slot_TK.unbind(dim=1)))


def check_layout(name: str, size: Size, device: str) -> None:
    """Stages 5 and 7: rank-major rows to expert-major ones, and back."""
    corner, (_, D, _, P) = CORNERS[name], size
    counts_Pe, source_M, target_M = received(name, size)
    M = source_M.size
    source, target = (row_numbers(index, M, device) for index in (source_M, target_M))
    row = torch.arange(M, device=device)
    here, there = (torch.where(index != NOTHING, row, NOTHING) for index in (target, source))
    rank_major = (P, M // P) if corner.static else (M,)

    def to_expert_major(x, counts):
        return corner.layout.to_expert_major(x.reshape(*rank_major, D), counts)

    def to_rank_major(y, source, target):
        return (corner.layout.to_rank_major(y, source, target.reshape(rank_major)),)

    x_MD, indices, (dx_MD,) = corner.call(to_expert_major, [array(here, D)], array(there, D), [counts_Pe])
    for found, expected in zip(indices, (source_M, target_M), strict=True):
        assert (found.cpu().numpy().reshape(-1) == expected).all()
    check_rows("x", x_MD, D, lambda part: values_or(0, source[part], D))
    check_rows("dx", dx_MD, D, lambda part: values_or(0, target[part], D))
    del x_MD, dx_MD
    y_MD, _, (dy_MD,) = corner.call(to_rank_major, [array(there, D)], array(here, D), [source_M, target_M])
    check_rows("y", y_MD, D, lambda part: values_or(0, target[part], D))
    check_rows("dy", dy_MD, D, lambda part: values_or(0, source[part], D))


def check_combine(name: str, size: Size, device: str) -> None:
    """Stage 9: a token's K rows, weighted; their gradients, and those of the scores."""
    corner, (T, D, _, P) = CORNERS[name], size
    slot_N, assignment_M = grouped(size, corner.static)
    M = assignment_M.size
    assignment, slot_TK = row_numbers(assignment_M, T * K, device), row_numbers(slot_N, M, device).reshape(T, K)
    real_M = torch.where(assignment != NOTHING, torch.arange(M, device=device), NOTHING)
    bins = (P, M // P) if corner.static else (M,)
    score_TK = (1 + torch.arange(T * K, device=device) % 5).float().reshape(T, K) / 2  # products are exact in bfloat16

    def combine(y, score, slot, assignment):
        return (corner.grouping.combine(y.reshape(*bins, D), score, slot, assignment.reshape(bins)),)

    def expected_out(part):
        rows = zip(score_TK[part].unbind(dim=1), slot_TK[part].unbind(dim=1), strict=True)
        return added(score_T[:, None] * values_or(0, slot_T, D) for score_T, slot_T in rows)

    def expected_dy(part):
        a = assignment[part]
        token = torch.where(a != NOTHING, a // K, NOTHING)
        return score_TK.reshape(-1)[a.clamp(min=0)][:, None] * values_or(0, token, D)

    def expected_dscore(part):
        token = values(torch.arange(part.start, part.stop, device=device), D)
        return torch.stack([(token * values_or(0, slot, D)).sum(dim=1) for slot in slot_TK[part].unbind(dim=1)], dim=1)

    indices = [slot_N.reshape(T, K), assignment_M]
    dout_TD = array(torch.arange(T, device=device), D)
    out_TD, _, (dy_MD, dscore_TK) = corner.call(combine, [array(real_M, D), score_TK], dout_TD, indices)
    check_rows("out", out_TD, D, expected_out)
    check_rows("dy", dy_MD, D, expected_dy)
    check_rows("dscore", dscore_TK, D, expected_dscore)


CHECKS = (check_group, check_layout, check_combine)


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("check", CHECKS)
def test_small(check, name):
    check(name, SIZES["small"], "cpu")


def apart(name: str, *sizes: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """A corner on the GPU, in a process of its own. JAX gives back memory that is not in use there, as PyTorch does."""
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    there = os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    command = [sys.executable, __file__, name, *sizes]
    return subprocess.run(command, env=there, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CORNERS)
def test_beyond(name):
    run = apart(name, *SIZES)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_an_offset_in_32_bits_shows_at_this_size_only(name, tmp_path):
    root = plant(find(f"{name}-kernel-offset-in-32-bits"), tmp_path / "planted")
    small, large = (apart(name, size, root=root) for size in SIZES)
    assert small.returncode == 0, small.stdout + small.stderr
    # Rows are other rows or were never written; or the GPU refuses the address.
    assert large.returncode != 0
    assert "rows are wrong" in large.stderr or "illegal memory access" in large.stderr.lower(), large.stderr


if __name__ == "__main__":
    for size in sys.argv[2:]:
        for check in CHECKS:
            check(sys.argv[1], SIZES[size], "cuda")
            torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("counted", [False, True])
def test_swiglu_past_2_to_the_31(counted):
    """Each row is all one number, so that every block of a large array equals a row of a small one."""
    M, F = 2**20 + 3, 2048
    value_M = (torch.arange(M, device="cuda") % 251 - 125).to(torch.bfloat16) / 32
    gate, up, dhidden = (a[:, None].expand(M, F).contiguous() for a in (value_M, value_M.flip(0), value_M.roll(7)))
    count = torch.tensor(M, device="cuda") if counted else None
    few = [a[:, :8].contiguous() for a in (gate, up, dhidden)]
    found = torch_impl.kernels.swiglu(gate, up, count)
    expected = torch_impl.kernels.swiglu(*few[:2])
    assert all(found[part].eq(expected[part, :1]).all() for part in parts(M, F))
    found = torch_impl.kernels.swiglu_backward(dhidden, gate, up, count)
    expected = torch_impl.kernels.swiglu_backward(few[2], *few[:2])
    for large, small in zip(found, expected, strict=True):
        assert all(large[part].eq(small[part, :1]).all() for part in parts(M, F))
