"""This project's backends: each implementation in each framework, as a record."""

import re
from pathlib import Path

import msgspec

from parity.cases.case import Case
from parity.oracle.quantities import names
from parity.oracle.rows import Layout
from parity.run import own
from parity.run.backend import Backend, Setting, resolve

# Where each stage is written, the same in all.
FILES = {
    "route": "routing.py",
    "group_by_expert": "grouping.py",
    "exchange_counts": "exchange.py",
    "send_tokens": "exchange.py",
    "to_expert_major": "layout.py",
    "apply_experts": "experts.py",
    "to_rank_major": "layout.py",
    "return_tokens": "exchange.py",
    "combine": "grouping.py",
    "layer": "layer.py",
}


def _ours(name: str, framework: str, layout: Layout, stages: str, folder: str = "", **own: str) -> Backend:
    """A backend of this project; `own`: stages that its folder shares with the package above it."""
    package = f"{framework}_impl"
    files = {stage: f"{own.get(stage, folder or package)}/{file}" for stage, file in FILES.items()}
    run = f"parity.run.{framework}_stages"
    # JAX's arrays are immutable, and a gradient that is asked for twice is computed once.
    provides = tuple(n for n in names(layout) if framework != "jax" or not n.endswith(("/changed", "/again")))
    return Backend(
        name, framework, layout, provides, files, needs=(framework,),
        run=f"{run}:run_all", stages=f"{run}:{stages}",
        refuses="parity.run.ours:refuses_ragged" if layout == "ragged" else "",
    )  # fmt: skip


def refuses_ragged(case: Case, setting: Setting) -> str:
    """Why JAX's uneven exchange cannot run a case: where XLA has none."""
    if setting.device == "cpu":
        return "ragged_all_to_all is not implemented on XLA:CPU; use --device cuda"
    if case.ranks > 1 and setting.jax_ranks == "vmap":
        return f"ragged_all_to_all has no vmap rule, so --ranks {case.ranks} needs as many GPUs: use fewer ranks"
    if case.ranks > 1 and case.way == "eager":
        return "ragged_all_to_all has no vmap rule, and --way eager runs ranks under vmap: use --ranks 1 or another way"
    return ""


BACKENDS = {
    backend.name: backend
    for backend in (
        _ours("torch", "torch", "dynamic", "Dynamic"),
        _ours("jax", "jax", "static", "Static"),
        _ours("torch-static", "torch", "static", "Static", "torch_impl/static", route="torch_impl"),
        _ours("jax-dynamic", "jax", "ragged", "Ragged", "jax_impl/dynamic", route="jax_impl", apply_experts="jax_impl"),
        _ours("torch-direct", "torch", "direct", "Direct", "torch_impl/direct", route="torch_impl"),
        _ours("jax-direct", "jax", "direct", "Direct", "jax_impl/direct", route="jax_impl", apply_experts="jax_impl"),
    )
}
FRAMEWORKS = tuple(dict.fromkeys(backend.framework for backend in BACKENDS.values()))

# What `check` runs unless told otherwise: of each framework the first.
DEFAULT = tuple(next(b for b in BACKENDS.values() if b.framework == framework) for framework in FRAMEWORKS)

# Published layers: a file each, and in it one function, `layer`, or several.
PUBLISHED = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "published").glob("[!_]*.py")))


def _published(name: str) -> Backend | None:
    """The layer that `maxtext` or `transformers:mixtral` names, or None where it names none of those published."""
    named = re.fullmatch(r"(\w+)(:[\w.]+(?:,\w+=[\w.+-]+)*)?(@.*)?", name)
    if not named or named[1] not in PUBLISHED:
        return None
    if named[1] == "families":
        return _family((named[2] or "")[1:], (named[3] or "")[1:], name)
    found = own.read(f"parity.published.{named[1]}{named[2] or ':layer'}{named[3] or ''}")
    if not found:
        asked = named[2][1:] if named[2] else "layer"
        raise ValueError(f"--backend {name}: parity/published/{named[1]}.py has no function {asked}: name one it has")
    return msgspec.structs.replace(found, asked=name, needs=(*found.needs, named[1]))


def _family(block: str, python: str, asked: str) -> Backend:
    """The backend for a block of transformers, built from its configuration."""
    if not block:
        raise ValueError(f"--backend {asked}: name a block of transformers, such as families:mixtral")
    name = re.sub("[,=]", "-", f"families.{block}")
    found = own.taking_all(name, "torch", f"parity.published.families:{block}", asked)
    return msgspec.structs.replace(
        found, needs=("torch", "transformers"), python=own.interpreter(python, asked) if python else ""
    )


def everything() -> dict[str, tuple[str, Backend]]:
    """What `--backend` can name without a file of the user's own, and what each is, in a sentence."""
    layouts = {
        "dynamic": "as many rows as there are",
        "static": "padded to a capacity",
        "ragged": "in a buffer for the most there can be",
        "direct": "rows straight to their places",
    }
    found = {name: (f"this project's layer, {layouts[b.layout]}", b) for name, b in BACKENDS.items()}
    for file in PUBLISHED:
        for function, about in own.marked(Path(__file__).parents[1] / "published" / f"{file}.py").items():
            name = file if function == "layer" else f"{file}:{function}"
            found[name] = (about, find(name))
    return found


def find(name: str) -> Backend:
    """The backend of that name, a published layer, the layer in a file, or what `package.module:name` names.

    The last is a layer, or a record.

    Raises ValueError when there is none.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    if published := _published(name):
        return published
    try:
        found = own.read(name) if ":" in name or name.partition("@")[0].endswith(".py") else None
        found = found or (resolve(name) if ":" in name else None)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--backend {name}: {error}") from error
    if not isinstance(found, Backend):
        what = f"{name} is a {type(found).__name__}, not a Backend" if ":" in name else f"no backend is called {name}"
        there = ", ".join(BACKENDS)
        also = f". Published layers are in {', '.join(PUBLISHED)}"
        raise ValueError(
            f"{what}. There are: {there}; or name a file of your own, such as mine.py, or package.module:name{also}"
        )
    if found.name in BACKENDS and found != BACKENDS[found.name]:
        raise ValueError(f"--backend {name} is called {found.name}, as one of this project is: give it another name")
    if not found.run:
        raise ValueError(f"--backend {name} has no function to run it: set `run` in its record")
    return msgspec.structs.replace(found, asked=name)
