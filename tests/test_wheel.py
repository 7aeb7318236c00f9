"""The wheel: every file of the packages is in it, and what it installs runs from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("parity", "torch_impl", "jax_impl")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", ".", cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_every_file_is_in_it(wheel):
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(PACKAGES)}
    assert held == files
    assert {f"{package}/py.typed" for package in PACKAGES} < files


def test_what_it_installs_runs_from_another_folder(wheel, tmp_path):
    """A check with a recording and a page, which take files that are not Python."""
    site, python = tmp_path / "site", sys.executable
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()

    def there(*command: str | Path) -> str:
        return run(*command, cwd=elsewhere, PYTHONPATH=str(site))

    where = f"from importlib.util import find_spec; print(*(find_spec(p).origin for p in {PACKAGES!r}))"
    assert there(python, "-c", where).split() == [str(site / package / "__init__.py") for package in PACKAGES]
    assert "usage: python -m parity check" in there(site / "bin" / "moe-parity", "check", "--help")
    small = ["pydoc", "--backend", "torch", "--ranks", "1", "--tokens", "8"]
    assert there(python, "-m", "parity", "check", *small, "--no-json", "--html", "page.html").endswith("match\n")
    assert (elsewhere / "page.html").stat().st_size > 10_000
    there(python, "-m", "parity", "new", "mine.py")
    assert there(python, "-m", "parity", "check", "p1", "--backend", "mine.py", "--no-json").endswith("match\n")
    there(python, "-c", "import parity, mine; parity.assert_match(mine.layer, 'p1')")
