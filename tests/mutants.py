"""Mutants: every operator, comparison, constant, index, axis, flag and argument order of the implementations, changed
one at a time by machine, and what notices: `check` alone, or only the tests, or nothing.

    python tests/mutants.py --jobs 64 --seconds 500 --results mutants.jsonl
    python tests/mutants.py --tests --results mutants.jsonl

A mutant is judged in rounds (a preset, or presets that share a program; then, with --tests, files of tests) until one
kills it. What a round says is appended to the results, and no round is run twice on the same text. Each process is a
fork of one that has imported PyTorch and JAX. Where XLA has no uneven exchange, on a CPU, one stands in for it.
"""

import ast
import gc
import hashlib
import json
import os
import re
import resource
import runpy
import select
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
# Read at import. Each job has one core and no GPU, and what XLA compiles runs once.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

import pytest
import tyro
from ragged_exchange import ragged_all_to_all
from rich.console import Console
from rich.table import Table

from parity.cases.case import Case
from parity.cases.presets import PRESETS
from parity.judge.engine import run_cases
from parity.oracle.quantities import STAGES
from parity.run import supervisor
from parity.run.backend import BackendError, Setting
from parity.run.faults import PACKAGES, ROOT, Fault, plant
from parity.run.ours import BACKENDS

LEFT_OUT = {
    "kernels.py": "needs a GPU: on a CPU the plain versions run",
    "if kernels.use_...: the question, and calls of kernels": "the same",
    "_on_gpus": "the same: memory that kernels of other ranks write to",
    "_SwiGLU": "the same: the autograd function of such a kernel",
    "fits_grouped_mm": "chooses between two products that are equal on a CPU; where it is wrong, a GPU's raises",
    "strict=": "of zip: raises where lengths differ, which they never do",
}
SYMMETRIC = (  # whose arguments may change places
    b"torch.promote_types", b"np.promote_types", b"jnp.minimum", b"torch.logaddexp", b"jnp.logaddexp", b"min", b"max",
    b"np.array_equal",
)  # fmt: skip

# The most telling first, then every option of the model; all other presets follow.
ORDER = (
    "sigmoid", "drop-rank-score", "drop-expert-choice", "in-flight",
    "like-deepseek-v3", "like-gpt-oss", "groups-at-zero", "like-llama4", "like-qwen3-next", "like-gemma4",
    "like-nemotron-h", "like-deepseek-v4", "small-softplus", "t0", "wide", "capacity-exact", "pairs-08", "uneven",
    "bfloat16", "pairs-09", "recomputed", "ties", "p1", "idle-rank", "tiny-scores", "large-logits", "two-groups",
    "drop-rank-token", "expert-bins", "pairs-11", "pairs-02", "uneven-drop", "compiled",
)  # fmt: skip

BESIDE = {"torch": "torch-static", "jax": "jax-dynamic"}  # the corner that imports many files of the other

# What runs only where a case asks for it: only such cases can tell.
REACHED_BY: dict[str, Callable[[Case], bool]] = {
    r" (tell_most_received|is_captured):| moe_layer: .*_received\(": lambda case: case.way == "compiled",
    r"^torch_impl/matmul.py grouped_matmul: .*(captured|red\(\)|parity|ty\.g)": lambda case: case.way == "compiled",
    r"^jax_impl/matmul.py rows_of_experts:": lambda case: case.expert_bias,
    r"/glu.py module: .*(\"gelu\"|approximate)": lambda case: case.activation == "gelu",
    r"/glu.py module: .*relu": lambda case: case.activation == "relu2",
    r"/operators.py (_|_grouped_matmul|_weight_gradient|_backward):": lambda case: case.way == "compiled",
    r" in_best_groups:": lambda case: case.groups > 1,
    r"/routing.py choose: .*(outside|groups > )": lambda case: case.groups > 1,
    r"/routing.py logits: .*float32_": lambda case: case.router_dtype == "float32",
    r"/routing.py logits: .*activations_": lambda case: case.router_dtype == "activations",
    r" sqrt_softplus:": lambda case: case.score_function == "sqrt_softplus",
    r" take_by_expert:": lambda case: case.expert_scale,
    r" gelu_tanh:": lambda case: case.activation == "gelu_tanh",
    r" clamped:": lambda case: case.clamp is not None,
    r" add_bias:": lambda case: case.expert_bias,
    r" shared_expert:": lambda case: case.shared_hidden > 0,
}
ROUNDS_OF_CHECKS = 14  # valid input passes a check of arguments, whatever is asked of the layer
TESTS = (
    "test_bad_input", "test_worked_examples", "test_mirror", "test_round_trips", "test_semantics", "test_activations",
    "test_extremes", "test_one_sync", "test_corners", "test_direct", "test_ranks", "test_capture",
)  # fmt: skip

HANGS = 10.0  # seconds asleep, of all ranks; ten times as many of CPU time
CHECK, TEST = 600.0, 900.0  # seconds on the wall, fair to nobody: for when whoever judges hangs
MEMORY = 16 * 2**30

# Mutants that compute the same: patterns of their names, and why.
EQUIVALENT = {
    r"gelu_tanh: .*\(-10, 10\).* -> .*\((-9|-11|-10), (9|10|11)\)": "past 9 the share is 0 or 1 to the last bit",
    r"inverse_permutation: .*scatter\(0, .* -> .*scatter\(-1, ": "of an array with one axis",
    r"group_by_expert: .*\(expert_N < E\).* -> .*\(expert_N <= E\)": "E becomes E",
    r"static/rows.py inverse_permutation: .*n_rows \+ 1,.* -> .*n_rows \+ 2,": "one place more that is left out",
    r"dynamic/exchange.py _all_to_all: .*tiled=True.* -> .*tiled=False": "of an axis with a row for each rank",
    r"_ragged: .*\.clip\(\w.*, 0, .* -> .*\.clip\(0, ": "the larger of both, either way",
    r"operators.py module: .*::weight_gradient\"": "nobody calls it by that name",
    r"jax_impl/rows.py take_or_zero: .*\[\(0, 1\)\] .* -> .*\[\((0, 2|1, 1)\)\] ": "zeros, and nothing else",
    r"jax_impl/matmul.py grouped_matmul: .* -> .*<= counts_e\.sum\(\)": "on a CPU, ragged_dot leaves zeros there",
    r"jax_impl/routing.py route: .*clip\(0, .* -> .*clip\(-1, ": "an id that is none has some expert's score",
    r"choose: .* -> if \(?router\.groups (>= 1|> 0)": "a single group is the best, and nothing outside it",
    r"in_best_groups: .*like\(score_TGn\[\.\.\., 0\].* -> .*\[\.\.\., -1\]": "only its shape counts",
    r"sqrt_softplus: .*max=-40.* -> .*max=-39": "of logits of which the other formula is taken",
    r"sqrt_softplus: .*min=-40.* -> .*min=-41": "the same",
    r"sqrt_softplus: _small_TE = logits_TE < -40.* -> .*< -(39|41)": "about there both formulas are exact",
    r"sqrt_softplus: .*(is_small_TE, logits_TE, -40|is_small_TE, -40).* -> .*-(39|41)": "the same",
    r"sqrt_softplus: .*logits_TE < -40.* -> .*logits_TE <= -40": "at -40 both formulas are equal",
    r"static/matmul.py add_bias: .*new_ones.* -> .*\* b_eF": "of a column and a row, both products are equal",
    r"static/matmul.py .*\[:, j, None\].* -> .*\[:, None, j\]": "both are [M, 1]",
    r"check_expert_ids: .*nonzero\(\)\[0\]\[0.* -> .*nonzero\(\)\[-1\]\[0": "of one axis there is one array",
    r"jax_impl/checks.py check_expert_ids: .*reshape\(-1.* -> .*reshape\(-2": "NumPy takes any negative number for -1",
    r"check_capacity_factor: exact = Fraction\(0.* -> .*Fraction\(-1": "which is refused as well",
    r"static/matmul.py .*torch\.bfloat16\)? and fits.* -> .*!= torch": "both products are equal on a CPU",
    r"direct/experts.py .*(w is not None\].* -> .*w is None|grouped = .* -> .*( or | != ))": "the same",
    r"direct/experts.py .*any\(bias is .* -> .*is None": "the same",
    r"direct/exchange.py make_buffers\.make: .*(_on_gpus|HAS_TRITON|columns, dtype, device, group)": (
        "a CPU has no such memory"
    ),
    r"direct/exchange.py make_buffers: .*float32\), 1 .* -> .*float32\), 0 ": "neither is several",
    r"direct/exchange.py put_tokens: .* -> .*(\(0, 2\), value=-1|value=-2\))": "a place more, and negative is nowhere",
    r"direct/rows.py put_here: .*n_rows \+ 1,\), -1\).* -> .*(, -2\)|n_rows \+ 2,)": "the same",
    r"direct/rows.py put_here: .*clamp\(min=0\).* -> .*min=-1": "of rows that stay as they are",
    r"direct/rows.py put_here: .*scatter\(0, .* -> .*scatter\(-1, ": "of an array with one axis",
    r"direct/rows.py put_rows_once: .*-1\).* -> .*-2\)": "what is negative is nowhere",
    r"direct/rows.py put_rows: check_rows\(": "of two that differ, each differs from the other",
    r"direct/rows.py (module: .*barrier|put_rows_once: .*barrier=False.* -> .*barrier=True)": "there are none on a CPU",
    r"direct/rows.py exchange_places: .*stable=True.* -> .*stable=False": "rows take their places along",
    r"direct/rows.py expert_major_rows: .* -> .*(\(P, e, P\)\.permute\(1, 2, 0|\(e, P, P\)\.permute\(2, 0, 1)": (
        "flattened, it is the same"
    ),
}


# What is changed.

OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "**": "*", "@": "*", "&": "|", "|": "&", "<<": ">>",
    ">>": "<<", "^": "&",
}  # fmt: skip
COMPARISONS = {
    "<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",),
    "is": ("is not",), "is not": ("is",), "in": ("not in",), "not in": ("in",),
}  # fmt: skip
OPERATOR = re.compile(rb"\*\*|//|<<|>>|[-+*/%@&|^]")
COMPARISON = re.compile(rb"not\s+in|is\s+not|\bin\b|\bis\b|[<>=!]=|[<>]")
BOOLEAN = re.compile(rb"\band\b|\bor\b")


@cache
def hash_of(file: str) -> str:
    """Of its text."""
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes from `start` to `end` of a file become `new`, and all others stay."""

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    nth: int  # of those in the function that read the same
    start: int
    end: int
    new: bytes
    checking: bool = False  # in a call of a check of arguments

    @property
    def name(self) -> str:
        """The same when lines are added above the function."""
        return f"{self.file} {self.function}: {self.before} -> {self.after}" + f" #{self.nth}" * (self.nth > 1)

    @property
    def id(self) -> str:
        where, _, rest = self.name.partition(" ")
        return f"{where}:{self.line} {self.kind} {rest}"

    @property
    def hash(self) -> str:
        """Of the file's text."""
        return hash_of(self.file)

    @property
    def equivalent(self) -> bool:
        """Whether it computes the same."""
        return any(re.search(pattern, self.name) for pattern in EQUIVALENT)

    @property
    def rank(self) -> int:
        """In an order that has nothing to do with what is changed."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16)

    @property
    def backend(self) -> str:
        corner = {"torch_impl/static": "torch-static", "torch_impl/direct": "torch-direct"}
        corner |= {"jax_impl/dynamic": "jax-dynamic", "jax_impl/direct": "jax-direct"}
        return corner.get(str(Path(self.file).parent)) or self.file.partition("_")[0]

    @property
    def in_checks(self) -> bool:
        """Whether it is in a check of arguments."""
        return self.checking or Path(self.file).name == "checks.py"

    @property
    def fault(self) -> Fault:
        source = (ROOT / self.file).read_bytes()
        changed = source[: self.start] + self.new + source[self.end :]
        return Fault(self.id, self.backend, STAGES[0], self.id, self.file, source.decode(), changed.decode())


class Finder(ast.NodeVisitor):
    """All mutants of a source text."""

    def __init__(self, source: bytes, file: str) -> None:
        self.source, self.file = source, file
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.inside: list[str] = []
        self.kind, self.checking = "constant", False
        self.seen: Counter[tuple[str, str, str]] = Counter()
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def span(self, node: Any) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: Any) -> bytes:
        start, end = self.span(node)
        return self.source[start:end]

    def add(self, kind: str, start: int, end: int, new: bytes) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        left = self.source[max(start - 24, self.starts[line - 1]) : start]
        right = self.source[end:].split(b"\n")[0][:24]
        before, after = (
            " ".join((left + text + right).decode(errors="ignore").split()) for text in (self.source[start:end], new)
        )
        function = ".".join(self.inside) or "module"
        self.seen[function, before, after] += 1
        nth = self.seen[function, before, after]
        self.found.append(Mutant(self.file, function, line, kind, before, after, nth, start, end, new, self.checking))

    # What is not code that runs.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in LEFT_OUT:
            return
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(part)
        self.within(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name not in LEFT_OUT:
            self.within(node)

    def within(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.inside.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.inside.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.text(node.targets[0]) != b"__all__":
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.checking = self.text(node).startswith(b"check_")
            self.generic_visit(node)
            self.checking = False

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    # What is changed.

    def visit_If(self, node: ast.If) -> None:
        if self.text(node.test) != b"TYPE_CHECKING":
            self.condition(node.test)
            for statement in (*(() if self.on_gpu(node.test) else node.body), *node.orelse):
                self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        for branch in (*(() if self.on_gpu(node.test) else (node.body,)), node.orelse):
            self.visit(branch)

    def on_gpu(self, test: ast.expr) -> bool:
        return b"kernels.use_" in self.text(test)

    def condition(self, test: ast.expr) -> None:
        if self.on_gpu(test):
            return
        self.visit(test)
        negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if b"fits" in self.text(test):  # `fits_grouped_mm`, see LEFT_OUT
            return
        if not negated and not isinstance(test, ast.Compare | ast.BoolOp):
            self.add("condition", *self.span(test), b"(not " + self.text(test) + b")")

    def between(self, left: ast.expr, right: ast.expr, pattern: re.Pattern[bytes]) -> tuple[int, int, str]:
        """Where the operator between two operands is, and which."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), self.source[start:end])
        found = pattern.search(gap)
        assert found, gap
        return start + found.start(), start + found.end(), " ".join(found[0].decode().split())

    def replace(self, kind: str, node: ast.expr, start: int, end: int, new: str) -> None:
        """Another operator in an expression, which stays one."""
        first, last = self.span(node)
        self.add(kind, first, last, b"(" + self.source[first:start] + new.encode() + self.source[end:last] + b")")

    def visit_BinOp(self, node: ast.BinOp) -> None:
        start, end, operator = self.between(node.left, node.right, OPERATOR)
        self.replace("operator", node, start, end, OPERATORS[operator])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in pairwise(node.values):
            start, end, operator = self.between(left, right, BOOLEAN)
            self.replace("operator", node, start, end, {"and": "or", "or": "and"}[operator])
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right in pairwise(operands):
            start, end, operator = self.between(left, right, COMPARISON)
            for other in COMPARISONS[operator]:
                self.replace("comparison", node, start, end, other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, end = self.span(node)
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            self.number(start, end, -node.operand.value)  # type: ignore[operator]
            return
        self.add("operator", start, start + (3 if isinstance(node.op, ast.Not) else 1), b"")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add("flag", start, end, str(not node.value).encode())
        elif isinstance(node.value, int | float):
            self.number(start, end, node.value)
        elif isinstance(node.value, str):
            self.add(self.kind, end - 1, end - 1, b"_")

    def number(self, start: int, end: int, value: float) -> None:
        if isinstance(value, float):
            self.add(self.kind, start, end, repr(value * 1.01 or 1.0).encode())
        elif self.kind == "axis":
            self.add(self.kind, start, end, b"1" if value == 0 else b"0")
        else:
            for other in (value + 1, value - 1):
                self.add(self.kind, start, end, str(other).encode())

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if re.search(rb"_[A-Za-z]\.shape$", self.text(node.value)):  # of one axis: the first is the last
            return
        before, self.kind = self.kind, "index"
        self.visit(node.slice)
        self.kind = before
        if isinstance(node.slice, ast.Tuple):
            self.swaps("index", node.slice.elts)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in filter(None, (node.lower, node.upper)):
            if isinstance(bound, ast.Name | ast.Attribute | ast.Call):
                for step in (b" + 1", b" - 1"):
                    self.add("index", *self.span(bound), self.text(bound) + step)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self.text(node.func) == b"fits_grouped_mm":
            return
        if self.text(node.func) not in SYMMETRIC:
            self.swaps("order", node.args)
        for one, other in pairwise(node.keywords):
            if type(one.value) is type(other.value):
                self.swaps("order", [one.value, other.value])
        before, self.kind = self.kind, "constant"
        self.generic_visit(node)
        self.kind = before

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg == "strict":
            return
        before, self.kind = self.kind, "axis" if node.arg in ("axis", "dim") else "constant"
        self.visit(node.value)
        self.kind = before

    def swaps(self, kind: str, nodes: Sequence[ast.expr]) -> None:
        """Two neighbours change places."""
        for one, other in pairwise(nodes):
            (start, middle), (then, end) = self.span(one), self.span(other)
            starred = isinstance(one, ast.Starred) or isinstance(other, ast.Starred)
            if not starred and self.text(one) != self.text(other):
                self.add(kind, start, end, self.text(other) + self.source[middle:then] + self.text(one))


def files() -> list[str]:
    """Of both implementations, but for those that are left out."""
    paths = [path.relative_to(ROOT) for side in ("torch_impl", "jax_impl") for path in (ROOT / side).rglob("*.py")]
    return sorted(str(path) for path in paths if path.name not in LEFT_OUT)


@cache
def mutants() -> tuple[Mutant, ...]:
    """All, in an order in which any beginning is a fair sample."""
    found = [mutant for file in files() for mutant in Finder((ROOT / file).read_bytes(), file).found]
    return tuple(sorted(found, key=lambda mutant: mutant.rank))


def unchanged() -> list[Mutant]:
    """The code as it is, on each backend that `check` runs here: no round may kill it."""
    packages = {"torch_impl": ("", "static/", "direct/"), "jax_impl": ("", "dynamic/", "direct/")}
    files = [f"{package}/{corner}layer.py" for package, corners in packages.items() for corner in corners]
    return [Mutant(file, "module", 0, "nothing", "itself", "itself", 1, 0, 0, b"") for file in files]


# What a mutant is put through.


@cache
def presets() -> dict[str, list[str]]:
    """Rounds of presets, in order: one, or those by pairs that share a program.

    Compiling takes torch.compile a minute: such rounds come last, and of a program compiled only the first case.
    """
    rounds: dict[str, list[str]] = {name: [] for name in ORDER}
    for name in sorted(PRESETS, key=compiles):
        names = rounds.setdefault(re.sub(r"^((pairs|options)-\d+)[a-z]$", r"\1", name), [])
        names += [name] if not (names and compiles(name)) else []
    return rounds


def compiles(name: str) -> bool:
    return PRESETS[name].way == "compiled"


@cache
def reaching(pattern: str) -> list[str]:
    """Rounds that run a function of `REACHED_BY`."""
    return [name for name, cases in presets().items() if any(REACHED_BY[pattern](PRESETS[case]) for case in cases)]


@cache
def refused(backend: str) -> set[str]:
    """Rounds that a backend cannot run, were there a GPU for each rank."""
    refusal, there = BACKENDS[backend].refusal, Setting("cuda")
    found = {name for name, cases in presets().items() if any(refusal(PRESETS[case], there) for case in cases)}
    if backend == "torch-direct":  # which says so of each case by itself
        found |= {name for name, cases in presets().items() if all(compiles(case) for case in cases)}
    return found


def rounds_of(mutant: Mutant, tests: bool) -> list[str]:
    pattern = next((pattern for pattern in REACHED_BY if re.search(pattern, mutant.name)), None)
    found = [name for name in (reaching(pattern) if pattern else presets()) if name not in refused(mutant.backend)]
    if mutant.in_checks:
        found = found[:ROUNDS_OF_CHECKS]
    elif mutant.backend in BESIDE:
        found = [*found, f"{ORDER[0]}/{BESIDE[mutant.backend]}"]
    tested = tests and (mutant.kind != "nothing" or mutant.backend == "torch")  # code as it is: once is enough
    return found + [f"{name}.py" for name in TESTS if tested]


def is_tests(round: str) -> bool:
    """Whether a round is a file of tests."""
    return round.endswith(".py")


Verdict = Literal["match", "mismatch", "crash", "hang", "error"]
KILLED = ("mismatch", "crash", "hang")


INTERNAL = 3  # an exit code, as pytest's


def fork(run: Callable[[], object], home: Path, *files: int) -> int:
    """Run it in a fork of this process, from another folder and with these standard files; the fork's number."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        os.setsid()
        for to, fd in enumerate(files):
            os.dup2(fd, to)
        os.chdir(home)
        sys.path.insert(0, str(home))
        code = run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        code = INTERNAL
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


class Forked:
    """Stands in for `subprocess.Popen`: `python -m module ...` in a fork of this process, from another folder."""

    def __init__(self, command: Sequence[str], *, stderr: Any, env: dict[str, str], cwd: Path, **_: Any) -> None:
        (stdin, own_in), (own_out, stdout) = os.pipe(), os.pipe()
        self.returncode: int | None = None

        def run() -> None:
            for fd in (own_in, own_out):
                os.close(fd)
            os.environ |= env
            sys.argv = list(command[2:])
            if json.loads(command[4])["layout"] == "ragged":
                stand_in()
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)

        self.pid = fork(run, cwd, stdin, stdout, stderr.fileno())
        for fd in (stdin, stdout):
            os.close(fd)
        self.stdin, self.stdout = os.fdopen(own_in, "wb", 0), os.fdopen(own_out, "rb", 0)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def stand_in() -> None:
    """For the uneven exchange of JAX, and for the check that refuses a CPU, which has none."""
    jax: Any = import_module("jax")
    exchange: Any = import_module("jax_impl.dynamic.exchange")
    jax.lax.ragged_all_to_all, exchange.check_ragged_exchange = ragged_all_to_all, lambda _: None


def check(mutant: Mutant, round: str) -> tuple[Verdict, str]:
    """What `check` says of it."""
    name, _, beside = round.partition("/")
    cases, fault = [PRESETS[case] for case in presets()[name]], replace(mutant.fault, backend=beside or mutant.backend)
    setting = Setting("cpu", "shard_map", HANGS)
    try:
        report = run_cases(cases, [BACKENDS[fault.backend]], setting, fault=fault, show_progress=False)
    except BackendError as error:
        return "hang" if "hangs" in str(error) else "crash", str(error)[-200:]
    assert report is not None
    failing = (c for checks in report.checks.values() for c in checks if not c.ok)
    how = next((f"{c.case}: {c.mode} {c.stage}/{c.value} {c.note}"[:200] for c in failing), "")
    verdict: dict[int, Verdict] = {0: "match", 1: "mismatch"}
    return verdict.get(report.footer.exit_code, "error"), how


def run_tests(mutant: Mutant, file: str, folder: Path) -> tuple[Verdict, str]:
    """What a file of tests says of it, in a copy of everything."""
    home = plant(mutant.fault, folder / "planted")
    shutil.copytree(ROOT / "tests", home / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and not (home / path.name).exists():
            (home / path.name).symlink_to(path)

    def run() -> int:
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules["__main__"] = ModuleType("__main__")  # which ranks would import, and with it what is not changed
        os.environ["PYTHONPATH"] = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
        jax = import_module("jax")
        jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache/jax-mutants"))  # most is the same each time
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what has been imported
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *quiet, f"tests/{file}"]
        return int(pytest.main(arguments, plugins=[RanksLast()]))

    with (folder / "said").open("w+b") as said:
        _, status = os.waitpid(fork(run, home, os.open(os.devnull, os.O_RDONLY), said.fileno(), said.fileno()), 0)
        said.seek(0)
        lines = [line for line in said.read().decode().splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    verdict: dict[int, Verdict] = {0: "match", 1: "mismatch", INTERNAL: "error", 4: "error", 5: "error"}
    return verdict.get(os.waitstatus_to_exitcode(status), "crash"), " ".join(lines[-1:])[:200]


class RanksLast:
    """Has pytest run last what starts processes, which takes longest."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: "torch_ranks" in getattr(item, "fixturenames", ()))


@dataclass
class Job:
    """One round of one mutant, in a process of its own."""

    mutant: Mutant
    round: str
    folder: Path
    pid: int = 0
    pipe: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def limit(self) -> float:
        return TEST if is_tests(self.round) else CHECK

    def start(self) -> None:
        self.pipe, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.write(answer, json.dumps(self.judge()).encode())
            finally:
                os._exit(0)
        os.close(answer)

    def judge(self) -> tuple[Verdict, str]:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        tempfile.tempdir = str(self.folder)
        os.cpu_count = lambda: 1  # no process for each core: there is a job for each
        supervisor.subprocess = SimpleNamespace(Popen=Forked, PIPE=-1)  # type: ignore[assignment]
        try:
            if is_tests(self.round):
                return run_tests(self.mutant, self.round, self.folder)
            return check(self.mutant, self.round)
        except Exception:
            return "error", traceback.format_exc()[-400:]

    def end(self, late: bool = False) -> dict[str, Any]:
        """The line for the results."""
        data = b"" if late else os.read(self.pipe, 2**16)
        supervisor.end_all(self.pid)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        lost = ("hang", f"no end after {self.limit:g} s") if late else ("error", "whoever judges it ended")
        verdict, how = json.loads(data) if data else lost
        seconds = round(time.monotonic() - self.began, 1)
        about = {"id": self.mutant.id, "hash": self.mutant.hash, "round": self.round}
        about |= {"tests": hash_of(f"tests/{self.round}")} if is_tests(self.round) else {}
        return about | {"verdict": verdict, "how": how, "seconds": seconds}


def run_all(chosen: Sequence[Mutant], known: "Known", tests: bool, jobs: int, seconds: float) -> Iterator[dict]:
    """Run what is left, the first rounds of all before the second ones; a line for each round that ended."""
    end, running = time.monotonic() + seconds, {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        left = [(i, mutant) for mutant in chosen if (i := known.next_round(mutant, tests)) is not None]
        left.sort(key=lambda one: (one[0], one[1].rank))
        n = 0
        while (left or running) and time.monotonic() < end:
            while left and len(running) < jobs:
                i, mutant = left.pop(0)
                folder = Path(temporary) / str(n := n + 1)
                folder.mkdir()
                job = Job(mutant, rounds_of(mutant, tests)[i], folder)
                job.start()
                running[job.pipe] = job
            ready, _, _ = select.select(list(running), [], [], 0.5)
            for pipe, job in list(running.items()):
                late = time.monotonic() - job.began > job.limit
                if pipe not in ready and not late:
                    continue
                del running[pipe]
                line = job.end(late and pipe not in ready)
                known.add(line)
                yield line
                if (i := known.next_round(job.mutant, tests)) is not None:
                    left.append((i, job.mutant))
                    left.sort(key=lambda one: (one[0], one[1].rank))
        for job in running.values():
            supervisor.end_all(job.pid)
            os.waitpid(job.pid, 0)


class Known:
    """What rounds have said."""

    def __init__(self, path: Path) -> None:
        self.said: dict[tuple[str, str], dict[str, dict]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            self.add(json.loads(line))

    def add(self, line: dict) -> None:
        """Note it, unless the tests were others."""
        if is_tests(line["round"]) and line.get("tests") != hash_of(f"tests/{line['round']}"):
            return
        self.said.setdefault((line["id"], line["hash"]), {})[line["round"]] = line

    def of(self, mutant: Mutant) -> dict[str, dict]:
        return self.said.get((mutant.id, mutant.hash), {})

    def killer(self, mutant: Mutant) -> dict | None:
        return next((line for line in self.of(mutant).values() if line["verdict"] in KILLED), None)

    def next_round(self, mutant: Mutant, tests: bool) -> int | None:
        """The first that it has not been through; None where there is no need."""
        if mutant.equivalent or self.killer(mutant):
            return None
        said = self.of(mutant)
        return next((i for i, name in enumerate(rounds_of(mutant, tests)) if name not in said), None)

    def outcome(self, mutant: Mutant) -> str:
        if mutant.equivalent:
            return "equivalent"
        killer = self.killer(mutant)
        if killer:
            return "tests" if is_tests(killer["round"]) else "check"
        return "survives" if self.next_round(mutant, tests=False) is None else "not done"


# What is said of it.

OUTCOMES = ("check", "tests", "equivalent", "survives", "not done")


def print_report(console: Console, chosen: Sequence[Mutant], known: Known) -> int:
    """A table, and those that survive; how many do."""
    table = Table("backend", "mutants", *OUTCOMES, "by check alone", title="mutants by what kills them")
    for in_checks in (False, True):
        for backend in BACKENDS:
            some = [m for m in chosen if m.backend == backend and m.in_checks == in_checks]
            if not some:
                continue
            counts = Counter(map(known.outcome, some))
            judged = len(some) - counts["equivalent"] - counts["not done"]
            share = f"{counts['check'] / judged:.1%}" if judged else ""
            name = backend + ": checks of arguments" * in_checks
            table.add_row(name, str(len(some)), *(str(counts[outcome]) for outcome in OUTCOMES), share)
    console.print(table)
    for title in ("tests", "survives"):
        found = sorted((m for m in chosen if known.outcome(m) == title), key=lambda m: m.id)
        if found:
            console.print(f"\n{'survive' if title == 'survives' else 'killed by tests only'}:")
        for mutant in found:
            tested = " (no tests yet)" * (title == "survives" and known.next_round(mutant, True) is not None)
            killer = known.killer(mutant)
            by = f" [{killer['round']}]" if killer else ""
            console.print(mutant.id + by + tested, markup=False, highlight=False, soft_wrap=True)
    for name, why in LEFT_OUT.items():
        console.print(f"{name}: {why}", markup=False)
    for lines in known.said.values():
        for line in lines.values():
            if line["verdict"] == "error":
                console.print(f"error: {line['id']} in {line['round']}: {line['how']}", markup=False)
    for mutant in unchanged():
        if killer := known.killer(mutant):
            console.print(f"NOTHING HERE COUNTS: {mutant.backend} as it is fails {killer['round']}: {killer['how']}")
    return sum(known.outcome(mutant) == "survives" for mutant in chosen)


def main(
    results: Path = ROOT / ".cache/mutants.jsonl",
    only: Literal["torch", "jax", "both"] = "both",
    jobs: int = os.cpu_count() or 1,
    seconds: float = float("inf"),
    sample: int = 1,
    tests: bool = False,
    report: bool = False,
) -> None:
    """What kills the mutants of the implementations? Exit code: 0 when none survives, 1 otherwise.

    Args:
        results: Lines of JSON, appended to; what is there for the same text is not run again.
        only: One side.
        jobs: Processes at once.
        seconds: Stop after this long; what is done is kept.
        sample: Every so many of them only.
        tests: Put those that survive `check` through the tests, too.
        report: Run nothing, and say what is known.
    """
    chosen = [m for m in mutants() if m.rank % sample == 0 and (only == "both" or m.file.startswith(only))]
    known = Known(results)
    if not report:
        for name in (*import_module("warm").HEAVY, "hypothesis", "beartype"):
            import_module(name)
        gc.freeze()
        itself = [m for m in unchanged() if only == "both" or m.file.startswith(only)]
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            for line in run_all([*itself, *chosen], known, tests, jobs, seconds):
                print(json.dumps(line), file=file, flush=True)
    sys.exit(print_report(Console(width=120), chosen, known) > 0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
