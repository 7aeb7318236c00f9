"""PyTorch and JAX on the same memory: pointers say so, what cannot be shared is refused, no read is too early."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec
from problems import WEIGHTS, close, dense
from torch.utils.checkpoint import checkpoint

from jax_impl import Router as RouterJax
from jax_impl import moe_layer as moe_layer_jax
from jax_impl import plan_capacity
from parity.interop import DTYPES, jax_in_torch, release, to_jax, to_torch
from torch_impl import Router, moe_layer, route

exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def of_dtype(dtype: str, device: str = "cpu") -> torch.Tensor:
    """[4, 8] of that dtype, any bits that a bool can have too."""
    size = 32 * getattr(torch, dtype).itemsize
    bits = torch.arange(size, dtype=torch.uint8, device=device) % 2
    return bits.view(getattr(torch, dtype)).reshape(4, 8)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_memory_both_ways(dtype, device):
    tensor = of_dtype(dtype, device)
    with jax.enable_x64(True):
        array = to_jax(tensor)
        back = to_torch(array)
    assert array.dtype == dtype
    assert array.shape == (4, 8)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr() == back.data_ptr()
    assert back.dtype == tensor.dtype
    assert torch.equal(bits(back), bits(tensor))
    assert np.asarray(array).tobytes() == bytes(bits(tensor).tolist())


@DEVICES
def test_same_memory_of_jax(device):
    array = jax.device_put(jnp.arange(12.0).reshape(3, 4), jax.devices(device)[0])
    tensor = to_torch(array)
    assert tensor.device.type == device
    assert tensor.data_ptr() == array.unsafe_buffer_pointer() == to_jax(tensor).unsafe_buffer_pointer()
    assert tensor.tolist() == np.arange(12.0).reshape(3, 4).tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
def test_smallest_shapes(shape):
    assert to_jax(torch.ones(shape)).shape == shape
    assert to_torch(to_jax(torch.ones(shape))).shape == shape
    assert to_torch(jnp.ones(shape)).shape == shape


def test_memory_outlives_its_first_owner():
    tensor = torch.arange(1000.0)
    array = to_jax(tensor)
    del tensor
    other = torch.full((1000,), -1.0)
    assert (np.asarray(array) == np.arange(1000)).all()
    tensor = to_torch(array)
    del array, other
    jnp.full(1000, -1.0).block_until_ready()
    assert torch.equal(tensor, torch.arange(1000.0))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (lambda: np.ones(3), "ndarray: to_jax takes a torch.Tensor"),
        (lambda: torch.ones(3, requires_grad=True), r"requires grad.*tensor.detach\(\), or use jax_in_torch"),
        (lambda: torch.ones(3, dtype=torch.int64), r"int64.*x64 off.*int32.*tensor.to\(torch.int32\)"),
        (lambda: torch.ones(3, dtype=torch.uint64), r"uint64.*tensor.to\(torch.uint32\)"),
        (lambda: torch.ones(3, dtype=torch.float64), r"float64.*tensor.to\(torch.float32\).*jax_enable_x64"),
        (lambda: torch.ones(3, dtype=torch.complex128), r"complex128.*tensor.to\(torch.complex64\)"),
        (
            lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "float4_e2m1fn_x2, which JAX lacks: convert",
        ),
        (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "bits8, which JAX lacks"),
        (lambda: torch.ones(2, 3).T, r"shape \(3, 2\) and strides \(1, 3\).*tensor.contiguous\(\)"),
        (lambda: torch.ones(8)[::2], r"strides \(2,\).*tensor.contiguous\(\)"),
        (lambda: torch.ones(1).expand(3), r"strides \(0,\).*tensor.contiguous\(\)"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "lazily conjugated.*resolve_conj"),
        (lambda: torch.ones(1, dtype=torch.complex64).conj().imag, "negated.*resolve_neg"),
        (lambda: torch.ones(8)[1:], r"4 bytes past a multiple of the 64.*tensor.clone\(\)"),
        (lambda: torch.eye(3).to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
        (lambda: torch.ones(3, device="meta"), "on meta, but JAX has only .*move the tensor"),
    ],
)
def test_refused_by_to_jax(tensor, words):
    with pytest.raises(ValueError, match=words):
        to_jax(tensor())


def test_refused_without_a_backend(monkeypatch):
    def none(backend=None):
        if backend:
            raise RuntimeError(f"Unknown backend {backend}")
        return []

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(ValueError, match=r"on cpu, but JAX has only .*install JAX"):
        to_jax(torch.ones(3))


class Wrapper(torch.Tensor):
    """As DTensor: a tensor by name, its memory elsewhere."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_refused_wrapper():
    with pytest.raises(ValueError, match=r"Wrapper.*DTensor.to_local\(\)"):
        to_jax(torch.ones(3).as_subclass(Wrapper))
    assert to_jax(torch.nn.Parameter(torch.ones(3), requires_grad=False)).shape == (3,)


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


def sharded(spec: PartitionSpec) -> jax.Array:
    mesh = jax.make_mesh((2,), ("ranks",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    return jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (lambda: np.ones(3), "ndarray: to_torch takes a jax.Array"),
        (deleted, "deleted or donated"),
        (lambda: sharded(PartitionSpec("ranks")), "over 2 devices.*addressable_shards.*jax.device_put"),
        (lambda: sharded(PartitionSpec()), "over 2 devices"),
        (lambda: jnp.ones(4, "int4"), "int4, which PyTorch lacks"),
        (lambda: jnp.ones(4, "float8_e3m4"), "float8_e3m4, which PyTorch lacks"),
        (lambda: jax.random.key(0), "key<fry>, which PyTorch lacks"),
    ],
)
def test_refused_by_to_torch(array, words):
    with pytest.raises(ValueError, match=words):
        to_torch(array())


def test_refused_tracer():
    with pytest.raises(ValueError, match=r"float32\[3\] is a tracer, which has no memory yet"):
        jax.jit(lambda x: to_torch(x))(jnp.ones(3))


def test_refused_array_of_other_processes(monkeypatch):
    array = jnp.ones(3)
    monkeypatch.setattr(type(array), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match="not all in this process"):
        to_torch(array)


def test_a_shard_is_shared():
    for shard in sharded(PartitionSpec("ranks")).addressable_shards:
        assert to_torch(shard.data).data_ptr() == shard.data.unsafe_buffer_pointer()


def test_copies_are_noticed(monkeypatch):
    """Whatever another version of either framework does inside."""
    from_jax, from_torch = jax.dlpack.from_dlpack, torch.from_dlpack
    monkeypatch.setattr(jax.dlpack, "from_dlpack", lambda tensor, copy: from_jax(tensor.clone()))
    with pytest.raises(ValueError, match=r"DLPack made a copy: torch.float32 at 0x"):
        to_jax(torch.ones(3))
    monkeypatch.setattr(torch, "from_dlpack", lambda array: from_torch(array).clone())
    with pytest.raises(ValueError, match="DLPack made a copy"):
        to_torch(jnp.ones(3))
    monkeypatch.setattr(torch, "from_dlpack", lambda array: from_torch(array).view(torch.int32))
    with pytest.raises(ValueError, match=r"DLPack made a copy: torch.int32 .* float32 at"):
        to_torch(jnp.ones(3))


def test_jax_in_flight_on_a_cpu():
    """JAX returns before a CPU has computed, too."""
    for n in range(3):
        y = long_way(jnp.full(1 << 16, float(n)), 512)
        assert (to_torch(y) == n).all()


@partial(jax.jit, static_argnums=1)
def long_way(x: jax.Array, width: int) -> jax.Array:
    """x, read after a while: few large products, since a GPU is done with small ones as soon as they are launched."""
    done = jax.lax.fori_loop(0, 60, lambda _, m: jnp.tanh(m @ m), jnp.full((width, width), 1e-3) + 0 * x[0])
    return x + 0 * done[0, 0]


# Functions of PyTorch tensors


def model(inputs: dict, scale: jax.Array) -> dict:
    """Nested, with integers in and out, and an output nobody has to use."""
    x, (w, index) = inputs["x"], inputs["rest"]
    picked = jnp.square(x @ w)[index]
    return {"y": (picked * scale, index + 1), "unused": jnp.exp(x), "any": picked.sum() > 0}


def model_inputs() -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Small integers, whose products and sums are exact in both frameworks.
    x, w = (torch.randint(-9, 10, (4, 4), generator=generator).float().requires_grad_() for _ in range(2))
    return {"x": x, "rest": (w, torch.tensor([2, 0, 2], dtype=torch.int32))}, torch.tensor(3.0, requires_grad=True)


def test_pytrees_integers_and_unused_outputs():
    inputs, scale = model_inputs()
    out = jax_in_torch(model)(inputs, scale=scale)
    picked, index = out["y"]
    assert index.tolist() == [3, 1, 3]
    assert out["any"].dtype == torch.bool
    assert [t.requires_grad for t in (picked, index, out["any"], out["unused"])] == [True, False, False, True]
    dout = torch.randint(-9, 10, (3, 4), generator=torch.Generator().manual_seed(1)).float()
    (picked * dout).sum().backward()

    w, i = inputs["rest"]
    x, w, scale_too = (t.detach().requires_grad_() for t in (inputs["x"], w, scale))
    expected = torch.square(x @ w)[i.long()] * scale_too
    (expected * dout).sum().backward()
    exactly(picked, expected)
    for ours, theirs in zip((inputs["x"], inputs["rest"][0], scale), (x, w, scale_too), strict=True):
        exactly(ours.grad, theirs.grad)


def test_gradients_only_where_required():
    inputs, scale = model_inputs()
    x, w, scale = inputs["x"].detach(), inputs["rest"][0], scale.detach()
    f = jax_in_torch(lambda x, w, scale: jnp.tanh(x @ w) * scale)
    f(x, w, scale).sum().backward()
    assert x.grad is scale.grad is None
    assert w.grad is not None
    assert not f(x, w.detach(), scale).requires_grad
    with torch.no_grad():
        assert not f(x, w, scale).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_against_finite_differences(dtype):
    """PyTorch's own check, of real and of complex numbers, unused outputs included."""

    def f(x, w):
        return x @ w, (jnp.sin(x) * w * 1.5).sum(axis=0), jnp.abs(w)

    with jax.enable_x64(True):
        inputs = [torch.rand(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(n)) + 0.5 for n in range(2)]
        assert torch.autograd.gradcheck(jax_in_torch(f), [t.requires_grad_() for t in inputs], fast_mode=True)


@DEVICES
def test_64_bits_backward_after_x64_is_off(device):
    """It is set for a thread and a while; a GPU's backward runs in a thread of autograd's."""
    x = torch.tensor([1 + 2**-40], dtype=torch.float64, device=device, requires_grad=True)
    with jax.enable_x64(True):
        y = jax_in_torch(lambda x: x * x)(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.item() == 2 * x.item()


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.sum(),  # expanded
        lambda y: (y.T @ torch.eye(4, dtype=y.dtype)).square().sum(),  # transposed
        lambda y: torch.cat([torch.ones(1), y.reshape(-1)]).square().sum(),  # a slice, and so not aligned
        lambda y: (y.conj() * 1j).sum(),  # lazily conjugated
    ],
)
def test_gradients_however_they_come(use):
    x = torch.rand(4, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (ours,) = torch.autograd.grad(use(jax_in_torch(lambda x: x * 2)(x)).real, x)
    (theirs,) = torch.autograd.grad(use(x * 2).real, x)
    exactly(ours, theirs)


@pytest.fixture
def compiled():
    """Names of what JAX compiles, as it does."""
    names = []

    def listen(event, duration_secs, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compiled_once_forward_and_once_backward(compiled):
    f = jax_in_torch(model)
    for _ in range(10):
        inputs, scale = model_inputs()
        f(inputs, scale)["y"][0].sum().backward()
    assert compiled == ["jit(forward)", "jit(backward)"]
    with torch.no_grad():
        f(inputs, scale)
    assert compiled == ["jit(forward)", "jit(backward)", "jit(forward)"]  # without residuals


@DEVICES
def test_inputs_are_not_donated(device):
    """JAX would write its result over PyTorch's tensor."""
    x = torch.arange(64.0, device=device)
    y = jax_in_torch(jax.jit(jnp.negative, donate_argnums=0))(x)
    assert [-value for value in y.tolist()] == x.tolist() == list(range(64))


def test_twice_over_one_graph():
    x = torch.rand(3, requires_grad=True)
    y = jax_in_torch(jnp.square)(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    exactly(x.grad, 4 * x.detach())


def test_second_derivative_is_refused():
    """Also where PyTorch by itself would take the first one for a constant, and return something wrong."""
    x = torch.rand(3, requires_grad=True)
    (first,) = torch.autograd.grad(jax_in_torch(jnp.square)(x).sum(), x, create_graph=True)
    exactly(first.detach(), 2 * x.detach())
    with pytest.raises(ValueError, match=r"only its first derivative: take the second inside.*jax.grad"):
        (first.square().sum() + x.sum()).backward()


def saved_by(f, *inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        out = f(*inputs)
    return out, saved


def test_inputs_and_outputs_are_not_kept_twice():
    """Weights above all: XLA returns a copy of an input that is a result."""
    x, w = (torch.rand(4, 4, requires_grad=True) for _ in range(2))
    _, saved = saved_by(jax_in_torch(jnp.matmul), x, w)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), w.data_ptr()}
    _, saved = saved_by(jax_in_torch(jnp.matmul), x.detach(), w)
    assert {t.data_ptr() for t in saved} == {x.data_ptr()}
    y, (residual,) = saved_by(jax_in_torch(jnp.exp), x)
    assert residual.data_ptr() == y.data_ptr()


def test_changes_in_place_are_noticed():
    """The residuals are the very memory of inputs and outputs."""
    x = torch.rand(4, requires_grad=True)
    y = jax_in_torch(lambda x: x * x)(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = jax_in_torch(jnp.exp)(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing():
    """What backward needs is PyTorch's to drop and to compute again."""
    inputs, scale = model_inputs()

    def loss():
        f = jax_in_torch(model)
        return f(inputs, scale)["y"][0].square().sum()

    (plain,) = torch.autograd.grad(loss(), scale)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = checkpoint(loss, use_reentrant=False)
    assert not any(tensor.numel() for tensor in saved)
    (again,) = torch.autograd.grad(value, scale)
    assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda x: ((x, {"k": 2}), {}), r"argument \[1\]\['k'\] is int, not a tensor: bind it.*functools.partial"),
        (lambda x: ((x,), {"w": x.detach().double()}), r"argument \['w'\] is float64, which JAX, with x64 off,"),
        (lambda x: ((x, x.T), {}), r"argument \[1\] has shape .*tensor.contiguous\(\)"),
        (lambda x: ((x, torch.ones(3, device="meta")), {}), r"argument \[1\] is on meta and the first on cpu"),
    ],
)
def test_refused_arguments_have_names(arguments, words):
    args, kwargs = arguments(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match=words):
        jax_in_torch(lambda *args, **kwargs: args[0])(*args, **kwargs)


def test_refused_results():
    with pytest.raises(ValueError, match="int4, which PyTorch lacks"):
        jax_in_torch(lambda x: x.astype("int4"))(torch.ones(3))


# The layer

T, D, E, F, K = 6, 8, 4, 16, 2


class MoE(torch.nn.Module):
    """A layer in a PyTorch model, between two layers of its own."""

    def __init__(self, layer, device="cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(D, D), (D, E), (E, D, F), (E, D, F), (E, F, D), (D, D)]
        self.weights = torch.nn.ParameterList(torch.randn(s, generator=generator).to(device) / 4 for s in shapes)
        self.layer = layer

    def forward(self, x_TD):
        before, *weights, after = self.weights
        self.x_TD = torch.tanh(x_TD @ before)
        self.out_TD = self.layer(self.x_TD, *weights)
        return self.out_TD @ after


def jax_layer(*arguments: jax.Array) -> jax.Array:
    return moe_layer_jax(*arguments, router=RouterJax(K), capacity=plan_capacity(None, T, K, E, 1)).out_TD


@DEVICES
def test_the_layer_in_a_model(device):
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(device)
    ours = MoE(jax_in_torch(jax_layer), device)
    theirs = MoE(lambda *arguments: moe_layer(*arguments, router=Router(K)).out_TD, device)
    for m in (ours, theirs):
        m(x_TD)
        m.x_TD.retain_grad()
        m.out_TD.retain_grad()
        (m.out_TD @ m.weights[-1]).square().sum().backward(retain_graph=True)

    arguments = [to_jax(t.detach()) for t in (ours.x_TD, *ours.weights[1:-1])]
    out, vjp = jax.vjp(jax.jit(jax_layer), *arguments)
    direct = vjp(to_jax(ours.out_TD.grad))
    np.testing.assert_array_equal(out, ours.out_TD.numpy(force=True))
    for gradient, tensor in zip(direct, (ours.x_TD, *ours.weights[1:-1]), strict=True):
        assert tensor.grad is not None
        np.testing.assert_array_equal(gradient, tensor.grad.cpu())
    for m in (ours, theirs):
        assert_is_the_dense_layer(m)


def assert_is_the_dense_layer(m: MoE) -> None:
    """Within the allowance that `check` has; what is before it gets the layer's gradient, bit for bit."""
    router, gate, up, down = (w.detach().cpu() for w in list(m.weights)[1:-1])
    x_TD, out_TD = m.x_TD.detach().cpu(), m.out_TD.detach().cpu()
    ids_TK = route(x_TD, router, Router(K)).expert_id_TK
    dbefore, *gradients = (w.grad for w in list(m.weights)[:-1])
    dx_TD, dout_TD = m.x_TD.grad, m.out_TD.grad
    assert dx_TD is not None
    assert dout_TD is not None
    expected = dense(x_TD, router, (gate, up, down), dout_TD.cpu(), {"top_k": K}, ids_TK, dtype="float32")
    close(out_TD, expected, "out")
    for name, gradient in zip(("x", "router", *WEIGHTS), (dx_TD, *gradients), strict=True):
        assert gradient is not None
        close(gradient.cpu(), expected, name)
    exactly(dbefore, *torch.autograd.grad(m.x_TD, m.weights[0], dx_TD))


# On a GPU, where both frameworks return before their work is done. 256 MB take a while to write.

N = 64 * 2**20
IN_FLIGHT = 20


@pytest.fixture(params=["default stream", "side stream"])
def stream(request):
    chosen = torch.cuda.default_stream() if request.param == "default stream" else torch.cuda.Stream()
    with torch.cuda.stream(chosen):
        yield chosen
    torch.cuda.synchronize()
    release()


@jax.jit
def extremes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x.min(), x.max()


def fill_later(tensor: torch.Tensor, value: float) -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # ten milliseconds or more
    tensor.fill_(value)


def all_are(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor == value).all())


@pytest.mark.gpu
def test_jax_reads_what_torch_is_writing(stream):
    for n in range(IN_FLIGHT):
        tensor = torch.full((N,), -1.0, device="cuda")
        fill_later(tensor, n)
        low, high = extremes(to_jax(tensor))
        assert low == high == n


@pytest.mark.gpu
def test_torch_reads_what_jax_is_writing(stream):
    for n in range(IN_FLIGHT):
        array = jnp.full(N, float(n)).block_until_ready()
        assert all_are(to_torch(long_way(array, 4096)), n)


@pytest.mark.gpu
def test_torch_reuses_no_memory_that_jax_reads(stream):
    for n in range(IN_FLIGHT):
        tensor = torch.full((N,), float(n), device="cuda")
        result = long_way(to_jax(tensor), 4096)
        del tensor
        new = torch.full((N,), -1.0, device="cuda")
        assert extremes(result) == (n, n)
        del new


@pytest.mark.gpu
def test_jax_reuses_no_memory_that_torch_reads(stream):
    """Nor of a view: the tensor that `to_torch` returned is gone before it."""
    for n in range(IN_FLIGHT):
        view = to_torch(jnp.full(N, float(n)))[1:]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        copy = view + 0
        del view
        new = [jnp.full(N, -1.0) for _ in range(2)]  # waits for nothing of PyTorch's
        jax.block_until_ready(new)
        assert all_are(copy, n)


@pytest.mark.gpu
def test_jax_gets_its_memory_back(stream):
    def in_use() -> int:
        torch.cuda.synchronize()
        release()  # notes the end of PyTorch's use
        torch.cuda.synchronize()
        release()
        return jax.devices()[0].memory_stats()["bytes_in_use"]

    before = in_use()
    tensor = to_torch(jnp.ones(N))
    assert in_use() >= before + 4 * N
    del tensor
    assert in_use() < before + 4 * N


@pytest.mark.gpu
def test_a_chain_of_both(stream):
    """Forward and backward, with nothing but the streams to hold them together; memory is reused all along."""
    step = jax_in_torch(lambda x: x * 0.5 + x * 0.5 + 1)
    x = torch.zeros(N, device="cuda", requires_grad=True)
    step(x).sum().backward()  # compiling would give PyTorch the time it needs
    x.grad = None
    with torch.no_grad():
        fill_later(x, 3)
    y = x
    for _ in range(IN_FLIGHT):
        y = step(y * 2) - y
    torch.cuda._sleep(20_000_000)
    y.backward(torch.full_like(y, 5))
    assert all_are(y.detach(), 3 + IN_FLIGHT)
    assert x.grad is not None
    assert all_are(x.grad, 5)


@pytest.mark.gpu
def test_refused_on_a_gpu():
    with pytest.raises(ValueError, match=r"pinned memory, which JAX takes for a GPU's: tensor.clone\(\)"):
        to_jax(torch.ones(3).pin_memory())
    with pytest.raises(ValueError, match=r"4 bytes past a multiple of the 16 .* on cuda"):
        to_jax(torch.ones(8, device="cuda")[1:])
    assert to_jax(torch.ones(8, device="cuda")[4:]).sum() == 4
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    with pytest.raises(ValueError, match=r"array is in pinned_host memory of .*jax.device_put"):
        to_torch(jax.device_put(jnp.ones(3), on_host))
    with pytest.raises(ValueError, match=r"argument \[1\] is on cuda:0 and the first on cpu"):
        jax_in_torch(jnp.add)(torch.ones(3), torch.ones(3, device="cuda"))


@pytest.mark.gpu
def test_neither_takes_the_whole_card():
    jnp.ones(3).block_until_ready()
    release()
    total = torch.cuda.mem_get_info()[1]
    assert torch.empty(total // 2, dtype=torch.uint8, device="cuda").numel() == total // 2
    torch.cuda.empty_cache()
