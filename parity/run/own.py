"""A layer of the user's own: one function in a file, known by the names of its arguments."""

import ast
import inspect
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME, PARAMETERS, parameters_of
from parity.oracle.problem import Problem
from parity.oracle.quantities import OUTSIDE
from parity.run.backend import Backend, resolve

# The names that an argument may have, without a suffix for its shape: x_TD is x.
ARGUMENTS = ("x", *BY_NAME, "expert_id", "score", "keep", "case", "group", "axis_name")
# What a layer may compute itself instead of taking it. Then its values differ, and the report shows that.
BASIC = ("router", "w_gate", "w_up", "w_down")
KNOW_RANKS = {"torch": "group", "jax": "axis_name"}


class OwnLayerError(Exception):
    """A layer of one's own returned something that cannot be compared."""


class Signature(NamedTuple):
    """What a layer is given."""

    arguments: dict[str, str]  # the name in the function by what it is: {"x": "x_TD"}
    per_rank: bool  # whether it is called on each rank, with the group or the axis
    all_experts: bool  # whether it gets the weights of all experts; else of this rank's
    optional: frozenset[str] = frozenset()  # of the arguments, those that have a default: None is given where it is not

    def given(self, name: str) -> bool:
        """Whether it takes this."""
        return name in self.arguments


def signature(framework: str, names: list[str], where: str, optional: Collection[str] = ()) -> Signature:
    """What a function with these arguments is given; `optional` are those that have a default.

    Raises ValueError on a name that says nothing.
    """
    found: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"_[A-Za-z]{1,4}$", "", name) if name not in ARGUMENTS else name
        if stem not in ARGUMENTS:
            raise ValueError(
                f"{where} takes {name}, which is not known: a layer can take {', '.join(ARGUMENTS)}, each with a "
                "suffix for its shape if you like, as in x_TD"
            )
        found[stem] = name
    of_experts = [one.name for one in PARAMETERS if one.per_rank and one.name in found]
    if of_experts and not {"w_up", "w_down"} <= found.keys():
        raise ValueError(
            f"{where} takes {' and '.join(of_experts)} only: take w_gate (where experts have a gate), w_up and w_down, "
            "or none of them"
        )
    if "x" not in found:
        raise ValueError(f"{where} takes no x: it must take the tokens, [T, D] on each rank")
    other = next(word for of, word in KNOW_RANKS.items() if of != framework)
    if other in found:
        raise ValueError(
            f"{where} takes {other}, which a layer in {framework} is not given: it can take {KNOW_RANKS[framework]}"
        )
    per_rank = KNOW_RANKS[framework] in found
    suffixes = {found[w].removeprefix(w).lstrip("_")[:1] for w in of_experts}
    all_experts = not per_rank if suffixes <= {""} else suffixes == {"E"}
    has_default = frozenset(what for what, name in found.items() if name in optional)
    return Signature(found, per_rank or framework == "torch", all_experts, has_default)


def read(whole: str) -> Backend | None:
    """The backend that `FILE.py`, `FILE.py:name` or `package.module:name` names, without running it.

    `@PYTHON` after it is the interpreter that runs it.

    None where a module has no function of that name marked as a backend: it may be a record.

    Raises ValueError when the file cannot be read, or is none of this kind.
    """
    asked, _, python = whole.partition("@")
    python = interpreter(python, whole) if python else ""
    source, _, name = asked.partition(":")
    if source.endswith(".py"):
        path = Path(source)
    else:
        spec = find_spec(source)
        if not spec or not spec.origin:
            return None
        path = Path(spec.origin)
    try:
        tree = ast.parse(path.read_text(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"--backend {asked}: {error}") from error
    marked = _marked_in(tree)
    if not source.endswith(".py") and name not in marked:
        return None
    if name and name not in marked:
        raise ValueError(f"--backend {asked}: {path} has no function {name} marked @backend(framework=...)")
    if not name and len(marked) != 1:
        what = f"{len(marked)} functions" if marked else "no function"
        which = (
            f": name one, such as {source}:{next(iter(marked))}"
            if marked
            else ": mark one (`from parity import backend`)"
        )
        raise ValueError(f"--backend {asked}: {path} has {what} marked @backend(framework=...){which}")
    of = str(path.resolve()) if source.endswith(".py") else source
    found = _record(whole, path, of, marked[name or next(iter(marked))], bool(name) and len(marked) > 1)
    return msgspec.structs.replace(found, python=python)


def interpreter(python: str, asked: str) -> str:
    """The path of an interpreter. Raises ValueError where there is none."""
    path = shutil.which(python)
    if not path:
        raise ValueError(f"--backend {asked}: there is no interpreter {python}")
    return str(Path(path).absolute())


def marked(path: Path) -> dict[str, str]:
    """The functions of a file that are marked as backends, each with the first line of its docstring."""
    of = _marked_in(ast.parse(path.read_text()))
    return {name: (ast.get_docstring(node) or "").split("\n")[0] for name, node in of.items()}


def _marked_in(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and _mark_of(node)}


def _mark_of(node: ast.FunctionDef) -> ast.Call | None:
    """The call of `backend` or `parity.backend` that a function is decorated with."""
    for mark in node.decorator_list:
        called = mark.func if isinstance(mark, ast.Call) else None
        if isinstance(mark, ast.Call) and getattr(called, "id", getattr(called, "attr", "")) == "backend":
            return mark
    return None


def written(function: Callable[..., Any], path: Path) -> Backend:
    """The backend that a marked function is, wherever it stands; it is pickled into `path`, for another process.

    Raises ValueError when it is not marked, or cannot be pickled.
    """
    import cloudpickle  # not above: another interpreter, for which a file is enough, need not have it

    framework, name = getattr(function, "framework", None), getattr(function, "__name__", str(function))
    if framework is None:
        raise ValueError(f"{name} is not marked as a layer: put @parity.backend(framework=...) above it")
    code = inspect.unwrap(function).__code__
    where = f"{Path(code.co_filename).name}:{code.co_firstlineno}: {name}"
    takes = signature(framework, list(inspect.signature(function).parameters), where)
    if module := inspect.getmodule(function):  # whole, as whoever reads it may not find the module
        cloudpickle.register_pickle_by_value(module)
    try:
        path.write_bytes(pickle.dumps((sys.path, cloudpickle.dumps(function))))
    except Exception as error:
        raise ValueError(f"{where} cannot be given to another process: {error}") from error
    finally:
        if module:
            cloudpickle.unregister_pickle_by_value(module)
    in_file = code.co_filename.endswith(".py") and code.co_qualname == name
    return Backend(
        name, framework, "opaque", provided(takes), {"": where}, needs=(framework,),
        run=f"parity.run.own_in_{framework}:run_all", stages=f"{path}:{name}", takes=tuple(takes.arguments),
        asked=f"{code.co_filename if in_file else 'FILE.py'}:{name}",
    )  # fmt: skip


def _record(asked: str, path: Path, source: str, node: ast.FunctionDef, several: bool) -> Backend:
    """Of a function in a file, which `source` names: by its path, or as a module."""
    where, mark = f"{path.name}:{node.lineno}: {node.name}", _mark_of(node)
    assert mark
    given = {keyword.arg: keyword.value for keyword in mark.keywords}
    framework = getattr(given.get("framework"), "value", None)
    if framework not in KNOW_RANKS:
        raise ValueError(f'{where}: write @backend(framework="torch") or @backend(framework="jax")')
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    takes = signature(framework, names, where)
    name = re.sub(r"[^\w.+-]", "-", path.stem)  # which names files, and is a word
    return Backend(
        name + f".{node.name}" * several, framework, "opaque", provided(takes), {"": where}, needs=(framework,),
        run=f"parity.run.own_in_{framework}:run_all", stages=f"{source}:{node.name}", asked=asked,
        takes=tuple(takes.arguments),
    )  # fmt: skip


def taking_all(name: str, framework: str, stages: str, asked: str) -> Backend:
    """The backend of a function that takes every input of a case, and says itself which cases it does not compute."""
    takes = signature(framework, ["x", *BY_NAME, "case"], stages, BY_NAME)
    return Backend(
        name, framework, "opaque", provided(takes), {"": stages}, needs=(framework,),
        run=f"parity.run.own_in_{framework}:run_all", stages=stages, asked=asked, takes=tuple(takes.arguments),
    )  # fmt: skip


def provided(takes: Signature) -> tuple[str, ...]:
    """What is compared: the output and the gradients of what the layer takes; and each again, from a second run."""
    has = {f"e2e/{one.gradient}": needs(takes, one.name) for one in PARAMETERS}
    names = [name for name in OUTSIDE if has.get(name, True)]
    return (*names, *(name.replace("e2e", "repeat", 1) for name in names))


def needs(takes: Signature, name: str) -> bool:
    """Whether what a layer returns depends on what is learned: it takes it, or the scores that are made with it."""
    return takes.given(name) or (BY_NAME[name].stage == "route" and takes.given("score"))


def load(backend: Backend) -> tuple[Callable[..., Any], Signature]:
    """The function, of a file that is run for it, and what it is given."""
    function = _function(backend.stages)
    arguments = inspect.signature(function).parameters
    optional = [name for name, argument in arguments.items() if argument.default is not argument.empty]
    return function, signature(backend.framework, list(arguments), backend.files[""], optional)


@cache  # not once for each case
def _function(named: str) -> Callable[..., Any]:
    """What `/path/FILE.py:name` or `package.module:name` names, or what was `written`."""
    source, _, name = named.rpartition(":")
    if source.endswith(".pickle"):
        import cloudpickle

        path, pickled = pickle.loads(Path(source).read_bytes())
        sys.path.extend(folder for folder in path if folder not in sys.path)
        return cloudpickle.loads(pickled)
    if not source.endswith(".py"):
        return resolve(named)
    path = Path(source)
    spec = spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    sys.path.insert(0, str(path.parent))
    module = sys.modules[path.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def refusal(function: Callable[..., Any], takes: Signature, problem: Problem) -> str:
    """Why a layer does not compute a case, or an empty string."""
    if problem.second:
        return "it runs one step at a time, and the case has two"
    if problem.case.uneven:
        return "some tokens are padding"
    if not problem.keep.all() and not takes.given("keep") and not getattr(function, "drops", False):
        return "assignments are dropped, but it takes no `keep`, which says which, and is not marked drops=True"
    if problem.aux.any() and not takes.given("score"):
        return "the case gives the scores a gradient of an auxiliary loss, but it takes no `score`"
    there = {one.name for one in parameters_of(problem.case)}
    if lacking := [name for name in BY_NAME if name in there and not needs(takes, name) and name not in BASIC]:
        return f"it takes no {', '.join(f'`{name}`' for name in lacking)}"
    if absent := [name for name in BY_NAME if takes.given(name) and name not in there and name not in takes.optional]:
        return f"the case has no {', '.join(f'`{name}`' for name in absent)}, and that argument has no default"
    answer = getattr(function, "supports", bool)(problem.case)
    return answer if isinstance(answer, str) else "" if answer else "its `supports` says no"


def checked(array: Any, shape: tuple[int, ...], dtype: Any, backend: Backend) -> None:
    """Whether what a layer returned is of this shape and dtype. Raises OwnLayerError."""
    where = backend.files[""]
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise OwnLayerError(f"{where} returned a {type(array).__name__}: it must return the output only, {list(shape)}")
    if tuple(array.shape) != shape:
        raise OwnLayerError(f"{where} returned shape {list(array.shape)}: the output must be {list(shape)}")
    if array.dtype != dtype:
        raise OwnLayerError(f"{where} returned {array.dtype}: the output must be of the tokens' dtype, {dtype}")


def of_rank(case: Case, a: np.ndarray, rank: int) -> np.ndarray:
    """A rank's part of an array for all experts."""
    e = case.experts // case.ranks
    return a[rank * e : (rank + 1) * e]


def arguments(takes: Signature, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under the function's own names. Missing ones are left to their defaults."""
    return {own: values[what] for what, own in takes.arguments.items() if what in values}
