"""The two packages say the same in the same order: files, functions, parameters, tuples; what differs is declared."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["layer", "routing", "grouping", "exchange", "layout", "experts", "checks"]

# Names that only one side has: dynamic shapes need splits and an output size, static ones a capacity.
TORCH_ONLY = {
    "exchange.Splits": "row counts on the host",
    "checks.check_splits": "finds, at no sync, ids out of range on a GPU",
    "checks.check_output_size": "the permute's size is an argument",
    "checks.check_received": "the bound on the one symbol, for a compiler",
    "checks.check_autocast": "PyTorch's, and no other's",
    "checks.check_sizes": "a fact for a compiler, an error otherwise",
    "checks.is_captured": "whether a compiler is looking",
    "experts.fits_grouped_mm": "what grouped_mm takes",
    "experts.group_ends": "offsets, as grouped_mm wants them",
}
JAX_ONLY = {
    "grouping.Capacity": "the static size of a bin",
    "grouping.plan_capacity": "computes it",
    "grouping.keep_within_capacity": "who is dropped",
    "layout.rows_or_zero": "a gather in which an index past the end reads padding",
    "layout.segments_source": "what repeat_interleave does in PyTorch, with padding at the end",
    "checks.check_capacity_factor": "",
    "checks.check_capacity": "",
    "checks.check_priority": "",
    "checks.check_bins": "",
}
# One name there, another here.
RENAMED = {"expert_major_source": ("rank_bins_source", "expert_bins_source"), "group": ("axis_name",)}
# Parameters and fields that only one side has.
TORCH_ONLY_PARAMETERS = {"splits", "output_size", "max_tokens"}
JAX_ONLY_PARAMETERS = {"capacity", "dropped", "kept"}
# group_by_expert drops here and only here, so only JAX's needs scores to choose by.
JAX_ONLY_HERE = {"group_by_expert": {"score"}, "invert": {"size"}}


def stem(name: str) -> str:
    """A name without its shape suffix: x_ND -> x, counts_Pe -> counts, expert_id_TK -> expert_id."""
    return re.sub(r"_(?:[A-Ze]+)$", "", name)


def members(module: ModuleType) -> dict[str, object]:
    """Public functions and classes that the file itself defines, in its order."""
    tree = ast.parse(inspect.getsource(module))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def renamed(names: list[str]) -> list[str]:
    return [new for name in names for new in RENAMED.get(name, (name,))]


def stems(member: object) -> list[str]:
    if isinstance(member, type):
        return [stem(name) for name in member._fields]  # type: ignore[attr-defined]
    return [stem(name) for name in inspect.signature(member).parameters]  # type: ignore[arg-type]


def test_the_same_files():
    for package in ("torch_impl", "jax_impl"):
        found = {path.stem for path in (ROOT / package).glob("*.py")}
        assert found == {*FILES, "kernels", "__init__"}  # of kernels, each has what its own plain versions need


@pytest.mark.parametrize("file", FILES)
def test_the_same_names_in_the_same_order(file):
    ours, theirs = (list(members(import_module(f"{package}.{file}"))) for package in ("torch_impl", "jax_impl"))
    ours = renamed([name for name in ours if f"{file}.{name}" not in TORCH_ONLY])
    theirs = [name for name in theirs if f"{file}.{name}" not in JAX_ONLY]
    assert ours == theirs


@pytest.mark.parametrize("file", FILES)
def test_the_same_parameters_and_fields_in_the_same_order(file):
    ours, theirs = (members(import_module(f"{package}.{file}")) for package in ("torch_impl", "jax_impl"))
    compared = 0
    for name, our in ours.items():
        for new in RENAMED.get(name, (name,)):
            if f"{file}.{name}" in TORCH_ONLY or new == "rank_bins_source" or new == "expert_bins_source":
                continue
            only_jax = JAX_ONLY_PARAMETERS | JAX_ONLY_HERE.get(name, set())
            left = renamed([stem for stem in stems(our) if stem not in TORCH_ONLY_PARAMETERS])
            right = [stem for stem in stems(theirs[new]) if stem not in only_jax]
            assert left == right, f"{file}.{name}"
            compared += 1
    assert compared


@pytest.mark.parametrize("file", FILES)
def test_the_same_defaults(file):
    ours, theirs = (members(import_module(f"{package}.{file}")) for package in ("torch_impl", "jax_impl"))
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], type):
            continue
        left, right = (
            {stem(p.name): p.default for p in inspect.signature(m[name]).parameters.values()}  # type: ignore[arg-type]
            for m in (ours, theirs)
        )
        for parameter in left.keys() & right.keys():
            assert left[parameter] == right[parameter], f"{file}.{name}({parameter})"


def test_what_is_declared_exists():
    for declared, package in ((TORCH_ONLY, "torch_impl"), (JAX_ONLY, "jax_impl")):
        other = {"torch_impl": "jax_impl", "jax_impl": "torch_impl"}[package]
        for name in declared:
            file, member = name.split(".")
            assert member in members(import_module(f"{package}.{file}"))
            assert member not in members(import_module(f"{other}.{file}"))


@pytest.mark.parametrize(("package", "foreign"), [("torch_impl", "jax"), ("jax_impl", "torch")])
def test_neither_imports_the_other(package, foreign):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names}.isdisjoint(
                {foreign, f"{foreign}_impl", "jaxlib", "parity"}
            ), path


def test_the_layer_fits_on_a_screen():
    """Nine stages, one assignment each, in order; the body without its signature and docstring."""
    order = [
        "group_by_expert", "exchange_counts", "send_tokens", "to_expert_major", "apply_experts", "to_rank_major",
        "return_tokens", "combine",
    ]  # fmt: skip
    for package in ("torch_impl", "jax_impl", "torch_impl/static", "jax_impl/dynamic"):
        source = (ROOT / package / "layer.py").read_text()
        assert len(source.splitlines()) <= 80
        calls = re.findall(r"^    \w+(?:, \w+)* = (\w+)\(", source.split('"""')[-1], re.MULTILINE)
        assert [call for call in calls if call in order] == order


# The other two corners. What a subpackage lacks, it has from its package, where the code is the same.

CORNERS = [("torch_impl.static", "jax_impl"), ("jax_impl.dynamic", "torch_impl")]
both_corners = pytest.mark.parametrize(("corner", "other"), CORNERS)
OTHER_NAME = {"axis_name": "group"}
# What the other side has and the corner does not.
CORNER_LACKS = {
    "torch_impl.static": {},
    "jax_impl.dynamic": {
        "exchange.Splits": {"sent", "total"},  # rows: known on the device only
        "layer.moe_layer": {"max_tokens"},  # shapes are static: the buffer is for as many tokens as here
        "layout.to_expert_major": {"output_size"},  # the buffer's
    },
}
# What the corner has and the other side does not.
CORNER_ONLY = {
    "torch_impl.static": {},
    "jax_impl.dynamic": {
        "layer.Stages": {"dropped"},  # ids that are none
        "exchange.Splits": {"received_at", "returned_at"},  # places in the buffers of other ranks
        "exchange.send_tokens": {"output_size"},
        "exchange.return_tokens": {"output_size"},
        "grouping.Grouped": {"kept"},  # ids that are none cannot be refused while tracing
        "checks.check_ragged_exchange": None,  # it does not run everywhere
    },
}


def corner_members(corner: str, file: str) -> dict[str, object]:
    path = ROOT / corner.replace(".", "/") / f"{file}.py"
    return members(import_module(f"{corner}.{file}")) if path.exists() else {}


@both_corners
def test_a_corner_has_the_same_files(corner, other):
    assert {path.stem for path in (ROOT / corner.replace(".", "/")).glob("*.py")} <= {*FILES, "__init__"}
    assert import_module(corner).__all__ == import_module(other).__all__


@both_corners
@pytest.mark.parametrize("file", FILES)
def test_a_corner_has_the_same_names_in_the_same_order(corner, other, file):
    own, theirs = corner_members(corner, file), members(import_module(f"{other}.{file}"))
    package = members(import_module(f"{corner.split('.')[0]}.{file}"))
    mine = [name for name in own if CORNER_ONLY[corner].get(f"{file}.{name}", set()) is not None]
    assert mine == [name for name in theirs if name in own]
    if corner == "torch_impl.static":  # what it lacks and its package has not either would be missing
        assert own.keys() | package.keys() >= theirs.keys()


@both_corners
@pytest.mark.parametrize("file", FILES)
def test_a_corner_has_the_same_parameters_fields_and_defaults(corner, other, file):
    theirs = members(import_module(f"{other}.{file}"))
    for name, member in corner_members(corner, file).items():
        key = f"{file}.{name}"
        if name not in theirs:
            assert CORNER_ONLY[corner][key] is None
            continue
        only, lacks = (declared[corner].get(key, set()) for declared in (CORNER_ONLY, CORNER_LACKS))
        assert only <= set(stems(member))
        assert lacks <= set(stems(theirs[name]))
        left = [OTHER_NAME.get(s, s) for s in stems(member) if s not in only]
        right = [OTHER_NAME.get(s, s) for s in stems(theirs[name]) if s not in lacks]
        assert left == right, key
        if not isinstance(member, type):
            ours, others = (inspect.signature(m).parameters for m in (member, theirs[name]))  # type: ignore[arg-type]
            for parameter in ours.keys() & others.keys() - {"output_size"}:
                assert ours[parameter].default == others[parameter].default, f"{key}({parameter})"


@pytest.mark.parametrize("corner", [corner for corner, _ in CORNERS])
def test_what_is_declared_of_a_corner_exists(corner):
    for declared in (CORNER_ONLY, CORNER_LACKS):
        for key in declared[corner]:
            file, name = key.split(".")
            assert name in corner_members(corner, file)
