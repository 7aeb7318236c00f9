"""One configuration for all tests: eight JAX devices, shapes checked, repeatable examples, nothing compiled twice."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity.run.worker import keep_what_xla_compiles

if TYPE_CHECKING:
    from torch_ranks import TorchRanks

# Of each process that tests start, too. There is one for each core already, and their matrices are small.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU, JAX would take most of its memory

# Files that take long and whose tests share nothing: one by one, to whichever worker is free.
ONE_BY_ONE = {
    "test_bench", "test_corners", "test_faults", "test_pallas_kernels", "test_parity_check", "test_parity_stability",
    "test_supervisor", "test_wheel",
}  # fmt: skip

# For --quick: the oracle, the comparison, both implementations on one rank, and that they are mirrors of each other.
QUICK = {
    "test_activations", "test_checkpoints", "test_compare", "test_extremes", "test_fields", "test_imports",
    "test_inputs", "test_mirror", "test_reference", "test_results", "test_rows", "test_simulate", "test_tolerances",
    "test_vectorised", "test_worked_examples",
}  # fmt: skip
STARTS_PROCESSES = {"torch_ranks", "warm_python", "warm"}

PYTHON = sys.executable
COMPILED = Path(__file__).parent.parent / ".cache"
COMPILED_BYTES = 500_000_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only files that start no process and compile little")


def _hands_out(config: pytest.Config) -> bool:
    """Whether this process only hands out tests, and needs none of what they need."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if _hands_out(config):
        return
    on_gpu = config.getoption("markexpr") == "gpu"
    if not on_gpu:
        compile_quickly()
        keep_what_xla_compiles(COMPILED)

    import jax
    import torch
    from hypothesis import settings
    from jaxtyping import install_import_hook

    if not on_gpu:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    torch.set_num_threads(1)
    # Shapes and dtypes in signatures are checked under test only. Has to come before the packages are imported.
    install_import_hook(["torch_impl", "jax_impl"], "beartype.beartype")
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
    settings.register_profile("explore", deadline=None, max_examples=1000)  # pytest --hypothesis-profile explore
    settings.load_profile(config.getoption("--hypothesis-profile") or "repeatable")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    python = collection_path.name.startswith("test_")
    return True if python and config.getoption("--quick") and collection_path.stem not in QUICK else None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For --dist loadgroup: a file's tests go to one worker, which has its fixtures."""
    if config.getoption("--quick"):
        items[:] = [item for item in items if not STARTS_PROCESSES & set(getattr(item, "fixturenames", ()))]
    for item in items:
        if item.path.stem not in ONE_BY_ONE:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def compile_quickly() -> None:
    """A test's program runs once: XLA should spend little on it. `as_users_compile` is for tests of what users run."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if version("jaxlib").startswith("0.10."):  # its older way to write kernels takes half the time; 0.11 has none
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()


@pytest.fixture
def as_users_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This test, and processes that it starts, compile with the optimisation that XLA has by itself."""
    import jax

    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):  # the latter was read here before
        monkeypatch.delenv(name, raising=False)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def torch_ranks() -> Iterator["TorchRanks"]:
    """Up to four real processes; see `TorchRanks`."""
    from torch_ranks import TorchRanks

    ranks = TorchRanks()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def warm_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What starts a module as `sys.executable` does, with PyTorch and JAX already imported; see `warm`."""
    import warm

    if request.config.getoption("markexpr") == "gpu" or not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    server = warm.Server(tmp_path_factory.mktemp("warm"), sys.executable)
    yield str(server.python)
    server.stop()


@pytest.fixture(scope="module")
def warm(warm_python: str) -> Iterator[None]:
    """Processes that tests of this module start are warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        yield


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this test are not."""
    monkeypatch.setattr(sys, "executable", PYTHON)


_gpu_tests_left_out: set[str] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    _gpu_tests_left_out.update(item.nodeid for item in items if item.get_closest_marker("gpu"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes; each leaves out the same
        session.config.workeroutput["gpu_tests_left_out"] = list(_gpu_tests_left_out)  # type: ignore[attr-defined]
    else:
        forget_the_oldest()


def forget_the_oldest() -> None:
    """Of what XLA compiled, beyond the limit; others may be at it too."""
    with suppress(OSError):
        files = sorted((path.stat().st_atime, path.stat().st_size, path) for path in COMPILED.glob("jax-*/*"))
        excess = sum(size for _, size, _ in files) - COMPILED_BYTES
        for _, size, path in files:
            if excess <= 0:
                break
            path.unlink()
            excess -= size


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _gpu_tests_left_out.update(getattr(node, "workeroutput", {}).get("gpu_tests_left_out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _gpu_tests_left_out:
        n, there = len(_gpu_tests_left_out), any(Path("/dev").glob("nvidia[0-9]*"))
        why = "there is one" if there else "there is none here"
        terminalreporter.write_line(f"{n} tests need a GPU and were not run ({why}): make test-gpu")
