"""One configuration for all tests: eight virtual JAX devices, shapes checked, repeatable examples."""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU, JAX would take most of its memory

import jax
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked under test only. Has to come before the packages are imported.
install_import_hook(["torch_impl", "jax_impl"], "beartype.beartype")

from torch_ranks import TorchRanks  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("explore", deadline=None, max_examples=1000)  # pytest --hypothesis-profile explore
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def torch_ranks() -> Iterator[TorchRanks]:
    """Up to four real processes; see `TorchRanks`."""
    ranks = TorchRanks()
    yield ranks
    ranks.stop()


_gpu_tests_left_out: set[str] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    _gpu_tests_left_out.update(item.nodeid for item in items if item.get_closest_marker("gpu"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes; each leaves out the same
        session.config.workeroutput["gpu_tests_left_out"] = list(_gpu_tests_left_out)  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _gpu_tests_left_out.update(getattr(node, "workeroutput", {}).get("gpu_tests_left_out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _gpu_tests_left_out:
        n, there = len(_gpu_tests_left_out), "there is one" if torch.cuda.is_available() else "there is none here"
        terminalreporter.write_line(f"{n} tests need a GPU and were not run ({there}): make test-gpu")
