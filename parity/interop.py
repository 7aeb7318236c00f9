"""PyTorch and JAX in one process on the same memory: by DLPack without a copy, or a ValueError.

The other direction, PyTorch inside jitted JAX, is not here, because JAX alone has no way without a host round trip:
`jax.pure_callback` brings its arguments to the host, on a GPU too (seen on an H100: they arrive on the CPU device).
`jax.ffi` runs a compiled handler on the GPU's pointers and stream, so it needs C++ (torch2jax compiles one) or XLA's C
structs mirrored in ctypes (as NVIDIA Warp does, for its own kernels); and the dynamic layer's one device-to-host sync
would stall XLA's stream inside such a handler.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.core import Tracer
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# JAX reads it when it first looks for a GPU. Otherwise it takes three quarters of its memory, whatever PyTorch needs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# What both frameworks have, by the same name.
DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
# Bytes. On a CPU, JAX copies what is aligned worse; on a GPU it takes it, and the program that reads it fails.
ALIGNMENT = {"cpu": 64, "cuda": 16}


def to_jax(tensor: Tensor) -> Array:
    """The tensor's memory as a JAX array, ready once PyTorch's work on the current stream is done.

    JAX takes arrays to be immutable: do not write to the tensor while the array is in use. Do not donate the array: a
    GPU's program would write its result over the tensor.

    Raises ValueError where JAX cannot take the memory as it is: a tensor that requires grad, is not contiguous or not
    aligned (64 bytes on a CPU, 16 on a GPU), has a dtype that JAX lacks or would narrow (64 bits while x64 is off), or
    is where JAX has no device.
    """
    _check_tensor(tensor)
    return _borrow(tensor)


def _borrow(tensor: Tensor) -> Array:
    # Both ends of the order: from_dlpack names a stream that JAX's programs wait for, and PyTorch makes that one wait
    # for its current stream. Lifetime: JAX drops the tensor when the programs that read it are done, not when the
    # array goes, so PyTorch's allocator never hands the memory on too early.
    with torch.cuda.device_of(tensor):  # PyTorch exports from the current device only
        array = jax.dlpack.from_dlpack(tensor, copy=False)
    _check_same_memory(tensor, array)
    return array


def to_torch(array: Array) -> Tensor:
    """The array's memory as a tensor; PyTorch's current stream waits until JAX has written it.

    JAX takes arrays to be immutable: do not write to the tensor. On a GPU, as with PyTorch's own tensors, another
    stream that uses it must be joined to the current one before the tensor goes; and the memory of a tensor that is
    gone is JAX's again at the next conversion to PyTorch, or `release`.

    Raises ValueError where PyTorch cannot take the memory as it is: a tracer, a deleted array, one over several devices
    or processes or in host memory of a GPU, or a dtype or device that PyTorch lacks.
    """
    release()
    return _lend(array)


def _lend(array: Array) -> Tensor:
    device = _check_array(array)
    tensor = torch.from_dlpack(array)  # passes the current stream, and JAX makes it wait
    _check_same_memory(tensor, array)
    if device.platform != "cpu":
        storage = StorageWeakRef(tensor.untyped_storage())
        with _lent_lock:
            _lent.append(_Loan(array, storage, torch.cuda.current_stream(tensor.device)))
    return tensor


def release() -> None:
    """Give JAX back the memory of tensors from `to_torch` that are gone, where the GPU is done with them."""
    with _lent_lock:
        _lent[:] = [loan for loan in _lent if not loan.over()]


@dataclass
class _Loan:
    """JAX's memory in PyTorch's hands. JAX would reuse it as soon as the last tensor goes, while kernels still read."""

    array: Array
    storage: StorageWeakRef
    stream: torch.cuda.Stream
    done: Any = None  # an event, once no tensor is left

    def over(self) -> bool:
        if self.done is None and self.storage.expired():
            self.done = self.stream.record_event()
        return self.done is not None and self.done.query()


_lent: list[_Loan] = []
_lent_lock = threading.Lock()  # autograd runs a GPU's backward in a thread of its own


def jax_in_torch(f: Callable) -> Callable:
    """The JAX function `f`, compiled, as a function of tensors that PyTorch differentiates.

    Arguments and results are pytrees of tensors, all on one device; bind anything else with functools.partial. Each
    shape and set of arguments that require grad compiles once forward and once backward. `save_for_backward` keeps what
    backward needs: in-place changes are noticed, hooks and checkpointing work, and it is freed when PyTorch frees it.

    Raises ValueError on what `to_jax` and `to_torch` refuse, on tensors on several devices, and on a second derivative.
    """
    program = _Program(f)

    @wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        paths_and_leaves, tree = jax.tree.flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths_and_leaves]
        for (_, *path), leaf in paths_and_leaves:
            _check_argument(leaf, jax.tree_util.keystr(tuple(path)), leaves[0])
        wanted = tuple(torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves)
        out_tree, *outputs = _Call.apply(program, tree, wanted, *leaves)  # type: ignore[misc]
        return jax.tree.unflatten(out_tree, outputs)

    return call


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["places", "vjp"])
@dataclass
class _Residuals:
    """The leaves of the vjp function, but not those that are inputs or outputs: XLA would return a copy of each."""

    arrays: list[Array] = field(default_factory=list)
    places: tuple[int, ...] = ()  # of each leaf, in [*inputs, *outputs, *arrays]
    vjp: Any = None  # the structure of the vjp function


class _Program:
    """`f` forward and backward, each compiled by JAX once per structure and shape."""

    def __init__(self, f: Callable):
        def forward(tree, wanted: tuple[bool, ...], leaves: list[Array]) -> tuple[Any, _Residuals]:
            def of_wanted(some: list[Array]):
                given = iter(some)
                args, kwargs = jax.tree.unflatten(
                    tree, [next(given) if w else a for w, a in zip(wanted, leaves, strict=True)]
                )
                return f(*args, **kwargs)

            some = [a for w, a in zip(wanted, leaves, strict=True) if w]
            if not some:
                return of_wanted(some), _Residuals()
            out, vjp = jax.vjp(of_wanted, some)
            return out, _residuals(vjp, [*leaves, *jax.tree.leaves(out)])

        def backward(vjp_tree, like: "_Like", residuals: list[Array], cotangents: list[Array]) -> list[Array]:
            # Conjugated both ways: PyTorch's gradient of a complex number is the conjugate of JAX's.
            given = (a.conj() for a in cotangents)
            filled = [next(given) if shape is None else np.zeros(shape, jax.dtypes.float0) for shape in like.integers]
            (gradients,) = jax.tree.unflatten(vjp_tree, residuals)(jax.tree.unflatten(like.tree, filled))
            return [a.conj() for a in gradients]

        self.forward = jax.jit(forward, static_argnums=(0, 1))
        self.backward = jax.jit(backward, static_argnums=(0, 1))


@dataclass(frozen=True)
class _Like:
    """The structure of f's result, and the shapes of its leaves that have no gradient (None: has one)."""

    tree: Any
    integers: tuple[tuple[int, ...] | None, ...]


def _residuals(vjp: Callable, known: list[Array]) -> _Residuals:
    known = list(known)
    place_of = {id(array): place for place, array in reversed(list(enumerate(known)))}
    leaves, tree = jax.tree.flatten(vjp)
    n_known = len(known)
    for leaf in leaves:
        if id(leaf) not in place_of:
            place_of[id(leaf)] = len(known)
            known.append(leaf)
    return _Residuals(known[n_known:], tuple(place_of[id(leaf)] for leaf in leaves), tree)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, tree, wanted: tuple[bool, ...], *tensors: Tensor):
        # The arrays live until the current stream waits for the results, so for what PyTorch does next, JAX has read.
        release()
        arrays = [_borrow(tensor.detach()) for tensor in tensors]  # checked by the caller, who knows their names
        out, residuals = program.forward(tree, wanted, arrays)
        out_arrays, out_tree = jax.tree.flatten(out)
        outputs = [_lend(array) for array in out_arrays]
        inexact = [jnp.issubdtype(array.dtype, jnp.inexact) for array in out_arrays]
        everything = [*tensors, *outputs, *map(_lend, residuals.arrays)]
        ctx.save_for_backward(*(everything[place] for place in residuals.places))
        ctx.like = _Like(out_tree, tuple(None if i else a.shape for i, a in zip(inexact, out_arrays, strict=True)))
        ctx.program, ctx.wanted, ctx.vjp_tree = program, wanted, residuals.vjp
        ctx.x64 = jax.dtypes.canonicalize_dtype("float64") == "float64"
        return out_tree, *outputs

    @staticmethod
    def backward(ctx: Any, _, *cotangents: Tensor):  # type: ignore[override]
        release()
        with jax.enable_x64(ctx.x64):  # set for a thread, and this may be another one
            residuals = [to_jax(tensor.detach()) for tensor in ctx.saved_tensors]
            shapes = zip(cotangents, ctx.like.integers, strict=True)
            arrays = [to_jax(_plain(cotangent)) for cotangent, shape in shapes if shape is None]
            gradients = [*map(_lend, ctx.program.backward(ctx.vjp_tree, ctx.like, residuals, arrays))]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _NoSecondDerivative.apply(torch.empty(0, requires_grad=True), *gradients)
        given = iter(gradients)  # type: ignore[arg-type]
        return None, None, None, *(next(given) if w else None for w in ctx.wanted)


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that object to being differentiated: as mere results of `to_torch` they would count as constants."""

    @staticmethod
    def forward(_ctx: Any, _: Tensor, *gradients: Tensor):  # type: ignore[override]
        return gradients

    @staticmethod
    def backward(_ctx: Any, *_: Tensor):  # type: ignore[override]
        raise ValueError(
            "the gradient of a jax_in_torch function was differentiated, but PyTorch sees only its first derivative: "
            "take the second inside the JAX function (jax.grad), or pass create_graph=False"
        )


def _plain(cotangent: Tensor) -> Tensor:
    """Autograd's own, often expanded, transposed or a slice: the one place where a copy is ours to make."""
    cotangent = cotangent.resolve_conj().resolve_neg().contiguous()
    aligned = cotangent.data_ptr() % ALIGNMENT[cotangent.device.type] == 0
    return cotangent if aligned else cotangent.clone()


def _check_argument(leaf: Any, name: str, first: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"argument {name} is {type(leaf).__name__}, not a tensor: bind it to the function with functools.partial"
        )
    if leaf.device != first.device:
        raise ValueError(f"argument {name} is on {leaf.device} and the first on {first.device}: move one of them")
    _check_tensor(leaf.detach(), f"argument {name}")


def _check_tensor(tensor: Tensor, name: str = "tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}: to_jax takes a torch.Tensor")
    wrapper = getattr(type(tensor), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
    if wrapper or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, not one block of memory: pass its "
            "parts (DTensor.to_local(); values and indices), or tensor.to_dense()"
        )
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but what JAX does with it would not be in PyTorch's graph: pass tensor.detach(), "
            "or use jax_in_torch for gradients through a JAX function"
        )
    _check_device(tensor, name)
    _check_dtype(tensor, name)
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{name} is a lazily conjugated or negated view, whose memory holds the other sign: "
            "pass tensor.resolve_conj() or tensor.resolve_neg()"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, but JAX takes rows in order, "
            "without gaps: pass tensor.contiguous()"
        )
    if tensor.data_ptr() % ALIGNMENT[tensor.device.type]:
        raise ValueError(
            f"{name} starts {tensor.data_ptr() % ALIGNMENT[tensor.device.type]} bytes past a multiple of the "
            f"{ALIGNMENT[tensor.device.type]} that JAX needs on {tensor.device.type}, as a slice can: "
            "pass tensor.clone()"
        )


def _check_device(tensor: Tensor, name: str) -> None:
    try:
        devices = jax.local_devices(backend={"cpu": "cpu", "cuda": "gpu"}[tensor.device.type])
    except (KeyError, RuntimeError):
        devices = []
    if tensor.device.index not in (None, *(device.local_hardware_id for device in devices)) or not devices:
        raise ValueError(
            f"{name} is on {tensor.device}, but JAX has only {jax.local_devices()}: install JAX for that device "
            "(jax[cuda13]; JAX_PLATFORMS must not exclude it), or move the tensor to a device that both have"
        )
    if tensor.device.type == "cpu" and tensor.is_pinned():
        raise ValueError(
            f"{name} is in pinned memory, which JAX takes for a GPU's: pass tensor.clone(), in plain memory"
        )


def _check_dtype(tensor: Tensor, name: str) -> None:
    dtype = _name(tensor.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}, which JAX lacks: convert to one of {', '.join(DTYPES)}")
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if narrow != dtype:
        raise ValueError(
            f"{name} is {dtype}, which JAX, with x64 off, would convert to a copy in {narrow}: pass "
            f"tensor.to(torch.{narrow}), or call jax.config.update('jax_enable_x64', True)"
        )


def _check_array(array: Array) -> Any:
    """The one device that the array is on."""
    if isinstance(array, Tracer):
        raise ValueError(
            f"{array.aval} is a tracer, which has no memory yet: call to_torch on what the jitted function returns"
        )
    if not isinstance(array, Array):
        raise ValueError(f"array is {type(array).__name__}: to_torch takes a jax.Array")
    if array.is_deleted():
        raise ValueError(
            "array was deleted or donated: keep it, or call to_torch on the result of the function it was donated to"
        )
    if not array.is_fully_addressable or len(array.devices()) > 1:
        raise ValueError(
            f"array is spread over {len(array.devices())} devices, or not all in this process ({array.sharding}): call "
            "to_torch on each of array.addressable_shards' data, or gather it on one device with jax.device_put"
        )
    (device,) = array.devices()
    kind = array.sharding.memory_kind
    if device.platform not in ("cpu", "gpu") or kind not in (None, device.default_memory().kind):
        raise ValueError(
            f"array is in {kind} memory of {device}, but a tensor can share only a CPU's or a GPU's own memory: "
            "move it with jax.device_put(array, jax.devices('cpu')[0]), or to a GPU"
        )
    if device.platform == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            f"array is on {device}, but this PyTorch has no GPU: install PyTorch for CUDA, or jax.device_put to a CPU"
        )
    if _name(array.dtype) not in DTYPES:
        raise ValueError(f"array is {array.dtype}, which PyTorch lacks: convert to one of {', '.join(DTYPES)}")
    return device


def _check_same_memory(tensor: Tensor, array: Array) -> None:
    if _name(tensor.dtype) != _name(array.dtype) or (
        tensor.numel() and tensor.data_ptr() != array.unsafe_buffer_pointer()
    ):
        raise ValueError(
            f"DLPack made a copy: {tensor.dtype} at {tensor.data_ptr():#x} in PyTorch, {array.dtype} at "
            f"{array.unsafe_buffer_pointer():#x} in JAX. Copy or convert it yourself first, and please report this"
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
