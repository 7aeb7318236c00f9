"""The MoE blocks that Hugging Face's transformers has, found in its source without importing it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# A class that creates experts, and is not itself the experts, their router, or a layer or model around them.
AROUND = re.compile(
    r"(Layer|Attention|Router|Gate|Gating|Experts|Expert|MoA|Model|GLU|NaiveMoe)$|ForCausalLM|ForConditional"
)
MAKES_EXPERTS = re.compile(r"self\.\w*experts\b|Experts\(")
EXPERTS_LAYER = {"AriaTextMoELayer"}  # named a layer, but is the block


@cache
def blocks() -> dict[str, tuple[str, str]]:
    """Module and class of each block by name: mixtral, or dots3_note.Dots3NoteVisionMoE if a module has several."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for path in _sources():
        package = path.parent.name
        module = f"transformers.models.{package}.{path.stem}"
        found.setdefault(package, []).extend((package, module, name) for name in _classes(path.read_text()))
    return {
        package if len(of) == 1 else f"{package}.{name}": (module, name)
        for package, of in sorted(found.items())
        for _, module, name in of
    }


def _sources() -> Iterator[Path]:
    spec = find_spec("transformers")
    if spec and spec.origin:
        yield from sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py"))


def _classes(source: str) -> Iterator[str]:
    if not MAKES_EXPERTS.search(source):
        return
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or (AROUND.search(node.name) and node.name not in EXPERTS_LAYER):
            continue
        methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        if {"__init__", "forward"} <= methods.keys() and MAKES_EXPERTS.search(ast.unparse(methods["__init__"])):
            yield node.name
