"""What a comparison on this machine would run with, and which settings would make it unfair."""

import importlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import msgspec
from rich.table import Table
from rich.text import Text


class Finding(msgspec.Struct):
    """One setting, its value, and what is wrong with it, if anything."""

    subject: str
    setting: str
    value: str
    problem: str = ""


# What the comparison was run with. Older ones lack what the code needs; newer ones are likely to work.
OLDEST = {"torch": (2, 11), "jax": (0, 10)}


def examine() -> list[Finding]:
    """Everything, framework by framework. Imports both, and asks each for its devices."""
    found = [
        Finding("machine", "platform", platform.platform()),
        Finding("machine", "python", platform.python_version()),
    ]
    found.append(Finding("machine", "cores", str(os.cpu_count())))
    for name in ("numpy", "ml_dtypes", "safetensors"):
        found.append(Finding("machine", name, metadata.version(name)))
    for name, look in (("torch", _torch), ("jax", _jax)):
        try:
            importlib.import_module(name)
        except ImportError as error:
            why = f"cannot be imported ({error}): pip install -e '.[{name}]'"
            found.append(Finding(name, "version", "none", why))
            continue
        found += [Finding(name, "version", metadata.version(name), _too_old(name)), *look()]
    return found


def _too_old(name: str) -> str:
    version = tuple(int(part) for part in metadata.version(name).split("+")[0].split(".")[:2])
    oldest = ".".join(map(str, OLDEST[name]))
    return "" if version >= OLDEST[name] else f"older than {oldest}, the oldest that this was run with: upgrade it"


def _torch() -> Iterator[Finding]:
    import torch

    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["CPU"]
    yield Finding("torch", "devices", ", ".join(names))
    yield Finding("torch", "threads", str(torch.get_num_threads()))
    precision = torch.get_float32_matmul_precision()
    tf32 = cuda and torch.backends.cuda.matmul.allow_tf32
    wrong = (
        "float32 matmuls may round their inputs to TF32 or bfloat16: call torch.set_float32_matmul_precision('highest')"
    )
    unfair = tf32 or precision != "highest"
    yield Finding("torch", "float32 matmul", f"{precision}, TF32 {'on' if tf32 else 'off'}", wrong if unfair else "")
    reduced = cuda and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    wrong = (
        "bfloat16 matmuls may add up split sums in bfloat16: set "
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False"
    )
    yield Finding("torch", "bfloat16 split sums", "in bfloat16" if reduced else "in float32", wrong if reduced else "")
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield Finding("torch", "deterministic algorithms", "required" if deterministic else "not required")
    if cuda:
        yield Finding("torch", "CUDA", str(torch.version.cuda))
        yield Finding("torch", "allocator", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"))
        from torch.cuda import nccl as library

        nccl = torch.distributed.is_nccl_available()
        version = ".".join(map(str, library.version())) if nccl else "none"
        yield Finding("torch", "NCCL", version, "" if nccl else "ranks on GPUs need it: install a PyTorch that has it")


def _jax() -> Iterator[Finding]:
    import jax

    devices = jax.devices()
    gpu = devices[0].platform in ("gpu", "cuda")
    yield Finding("jax", "devices", ", ".join(sorted({d.device_kind for d in devices})) + f" x {len(devices)}")
    yield Finding("jax", "jaxlib", metadata.version("jaxlib"))
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    on_tf32 = gpu and precision not in ("highest", "float32")
    wrong = (
        "float32 matmuls round their inputs to TF32 unless each one says otherwise (the layer here does): "
        "set JAX_DEFAULT_MATMUL_PRECISION=highest"
    )
    yield Finding("jax", "float32 matmul", str(precision or "default"), wrong if on_tf32 else "")
    yield Finding("jax", "x64", "on" if jax.config.jax_enable_x64 else "off, float64 becomes float32")  # type: ignore[attr-defined]
    yield Finding("jax", "XLA_FLAGS", os.environ.get("XLA_FLAGS", "none"))
    if gpu:
        preallocates = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true") == "true"
        wrong = (
            "JAX takes 75% of the GPU's memory when it starts, and PyTorch gets the rest: "
            "set XLA_PYTHON_CLIENT_PREALLOCATE=false"
        )
        yield Finding("jax", "memory", "preallocated" if preallocates else "as needed", wrong if preallocates else "")
        flags = os.environ.get("XLA_FLAGS", "")
        deterministic = "xla_gpu_deterministic_ops=true" in flags
        yield Finding("jax", "deterministic ops", "required" if deterministic else "not required")
    elif _has_nvidia_card():
        yield Finding(
            "jax", "backend", "CPU", "there is an NVIDIA GPU, but JAX does not use it: pip install 'jax[cuda13]'"
        )


def _has_nvidia_card() -> bool:
    return os.path.exists("/proc/driver/nvidia/version")


def doctor_table(found: list[Finding]) -> Table:
    """The findings, and under each that has one, the problem."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("setting", no_wrap=True)
    table.add_column("value, and what is wrong with it")
    before = ""
    for f in found:
        table.add_row("" if f.subject == before else f.subject, f.setting, Text(f.value))
        if f.problem:
            table.add_row("", "", Text(f.problem, "bold red"))
        before = f.subject
    return table
