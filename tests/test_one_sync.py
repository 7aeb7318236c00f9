"""One device-to-host copy a dispatch, counted where there is no device: every read of a tensor's values is seen."""

from typing import Any

import numpy as np
import pytest
import torch
from problems import draw

import torch_impl
from torch_impl import checks, rows

READS = {
    "cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose", "bincount",
    "__bool__", "__int__", "__float__", "__index__", "__array__",
}  # fmt: skip


class OnDevice(torch.Tensor):
    """A tensor that counts what would make the host wait for a GPU."""

    reads: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        by_mask = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if name in READS or unsized or by_mask or (name == "to" and "cpu" in map(str, args)):
            cls.reads.append(name)
        result: Any = super().__torch_function__(func, types, args, kwargs)
        # What was copied to the host is on the host: reading it again costs nothing.
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(OnDevice, "reads", [])
    monkeypatch.setattr(checks, "check_expert_ids", lambda *_: None)  # reads values on a CPU, and only there
    return OnDevice.reads


def on_device(a: torch.Tensor) -> torch.Tensor:
    return a.detach().clone().as_subclass(OnDevice).requires_grad_(a.is_floating_point())


def run(ids: torch.Tensor | None) -> None:
    problem = draw(P=1, T=12, D=8, F=8, E=4, K=2)
    inputs = [on_device(a.float()) for a in (problem.x_PTD[0], problem.router_DE, *problem.weights)]
    routing = (
        None
        if ids is None
        else torch_impl.route(inputs[0], inputs[1], torch_impl.Router(2), expert_id_TK=on_device(ids))
    )
    stages = torch_impl.moe_layer(*inputs, router=torch_impl.Router(2), routing=routing)  # type: ignore[arg-type]
    assert isinstance(stages.out_TD, OnDevice)
    stages.out_TD.backward(on_device(problem.dout_PTD[0].float()))
    assert all(a.grad is not None for a in inputs)


@pytest.mark.parametrize("ids", [None, torch.tensor([[0, 1]] * 12)], ids=["routed", "replayed"])
def test_forward_and_backward_read_values_once(reads, ids):
    run(ids)
    assert reads == ["cpu"]


def test_one_more_is_seen(reads, monkeypatch):
    plain = rows.exclusive_cumsum
    monkeypatch.setattr(rows, "exclusive_cumsum", lambda counts: plain(counts) * int(counts.sum() >= 0))
    run(None)
    assert reads == ["cpu", "__int__", "__int__"]


def test_a_permute_without_output_size_is_seen(reads, monkeypatch):
    plain = torch.repeat_interleave
    monkeypatch.setattr(torch, "repeat_interleave", lambda a, b, output_size: plain(a, b))
    run(None)
    assert reads == ["cpu", "repeat_interleave"]


def test_the_counter_counts():
    OnDevice.reads.clear()
    a = on_device(torch.tensor([1.0, 2.0]))
    assert a.sum().item() == 3
    assert bool((a > 0).all())
    assert np.asarray(a.detach().cpu()).sum() == 3
    assert a[a > 1].shape == (1,)
    assert OnDevice.reads == ["item", "__bool__", "cpu", "__getitem__"]
    OnDevice.reads.clear()
