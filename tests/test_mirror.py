"""The six layers say the same in the same order: files, names, parameters, fields, defaults, and where it is declared,
lines. What differs is declared too, with a reason, and a declaration that no longer holds is an error.
"""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["layer", "routing", "grouping", "exchange", "layout", "experts", "rows", "matmul", "glu", "checks"]


class Pair(NamedTuple):
    """Two layers side by side, and what only one of them has.

    By name: of a function or tuple that only one has, why; of one that both have, its parameters or fields.
    """

    left: str
    right: str
    left_only: dict[str, str | set[str]]
    right_only: dict[str, str | set[str]]


# A dynamic layer has splits and an output size, a static one has a capacity.

ONLY_IN_TORCH: dict[str, str | set[str]] = {
    "checks.check_splits": "finds, at no sync, ids out of range on a GPU",
    "checks.check_output_size": "the permute's size is an argument",
    "checks.tell_most_received": "the bound on the one symbol, for a compiler",
    "checks.check_autocast": "PyTorch's, and no other's",
    "checks.check_sizes": "a fact for a compiler, an error otherwise",
    "checks.is_captured": "whether a compiler is looking",
    "matmul.fits_grouped_mm": "what grouped_mm takes",
    "matmul.group_ends": "offsets, as grouped_mm wants them",
    "glu.glu": {"n_rows"},  # on the device, in buffers of the most that can arrive; XLA computes all rows
}
MAIN = Pair(
    "torch_impl",
    "jax_impl",
    ONLY_IN_TORCH
    | {
        "exchange.Splits": "row counts on the host",
        "exchange.send_tokens": {"splits"},
        "exchange.return_tokens": {"splits"},
        "layout.to_expert_major": {"output_size"},
        "rows.expert_major_rows": {"output_size"},
        "rows.expert_major_source": "of rows that follow each other without gaps",
        "layer.Stages": {"splits"},
        "layer.moe_layer": {"max_tokens"},
    },
    {
        "grouping.Capacity": "the static size of a bin",
        "grouping.plan_capacity": "computes it",
        "grouping.keep_within_capacity": "who is dropped",
        "grouping.Grouped": {"kept"},
        "grouping.group_by_expert": {"score", "capacity"},  # it drops, here and only here, and chooses by score
        "rows.expert_major_rows": {"n_bins", "capacity"},
        "rows.rank_bins_source": "of rows in bins, each with padding at its end",
        "rows.expert_bins_source": "the same where bins are experts",
        "rows.segments_source": "what repeat_interleave does in PyTorch, with padding at the end",
        "rows.sum_rows": "a token's rows, which the direct layer sums too",
        "rows.score_gradient": "the same of the scores' gradient",
        "matmul.matmul": "accumulates in float32, which in PyTorch is the default",
        "glu.clamped": "with the slope at the bounds that PyTorch's clamp has",
        "rows.take_or_zero": "a gather in which an index past the end reads padding",
        "layer.Stages": {"dropped"},
        "layer.moe_layer": {"capacity"},
        "checks.check_capacity_factor": "",
        "checks.check_capacity": "",
        "checks.check_priority": "",
        "checks.check_bins": "",
    },
)
STATIC = Pair(
    "torch_impl.static",
    "jax_impl",
    {
        "matmul.zero_padding": "grouped_mm leaves garbage in rows past the groups",
        "rows.add_rows": "the plain version of sum_rows, rounded elsewhere where PyTorch compiles it",
        "glu.glu": ONLY_IN_TORCH["glu.glu"],
    },
    {name: MAIN.right_only[name] for name in ("matmul.matmul", "glu.clamped")},
)
DYNAMIC = Pair(
    "jax_impl.dynamic",
    "torch_impl",
    {
        "layer.Stages": {"dropped"},  # ids that are none, which cannot be refused while tracing
        "grouping.Grouped": {"kept"},
        "exchange.Splits": {"received_at", "returned_at"},  # places in the buffers of other ranks
        "exchange.send_tokens": {"output_size"},
        "exchange.return_tokens": {"output_size"},
        "checks.check_ragged_exchange": "it does not run everywhere",
    },
    ONLY_IN_TORCH
    | {
        "exchange.Splits": {"n_sent", "n_received"},  # known on the device only
        "layer.moe_layer": {"max_tokens"},  # shapes are static: the buffer is for as many tokens as here
        "layout.to_expert_major": {"output_size"},  # the buffer's
    },
)
DIRECT = Pair(
    "torch_impl.direct",
    "torch_impl",
    {
        "layer.Stages": {"placed", "dropped"},  # rows arrive in their places; ids that are none, which nobody looks at
        "layer.moe_layer": {"buffers"},
        "grouping.Grouped": {"kept"},
        "grouping.combine": {"returned", "place", "buffers"},  # returned rows are summed, y has the gradient
        "exchange.Buffers": "what other ranks write into",
        "exchange.make_buffers": "makes them, once",
        "exchange.exchange_counts": {"buffers"},
        "exchange.send_tokens": {"slot", "place", "origin", "buffers"},
        "exchange.return_tokens": {"place", "origin", "buffers"},
        "exchange.sends_once": "whether a token goes to each rank once",
        "exchange.put_tokens": "tokens go to their places, and so does the gradient of the output",
        "layout.ExpertMajor": {"place", "origin"},
        "layout.to_expert_major": {"slot", "buffers"},  # where rows go, and no rows
        "rows.Buffer": "one of the buffers",
        "rows.Arrivals": "where tokens lie that go to each rank once",
        "rows.put_rows": "the one way that rows move",
        "rows.put_rows_once": "the same, to each rank once",
        "rows.weigh_rows": "the plain version of rows times scores",
        "rows.exchange_places": "the plain version of it, to other ranks",
        "rows.put_here": "the plain version of it, on one rank",
        "rows.expert_major_rows": {"rank", "n_own_slots", "n_slots", "n_rows"},
        "rows.shift_segments": "what repeat_interleave does, for sizes on the device",
        "checks.check_same_sizes": "a rank writes where another has room",
        "checks.check_same_offset": "the same",
        "checks.of_all_ranks": "what these compare",
        "checks.check_buffers": "of this layer",
        "checks.check_rows": "a kernel would write to the wrong addresses",
        "checks.check_first_gradient": "what is written to another rank leaves no graph",
        "checks.check_not_reused": "buffers hold one step at a time",
    },
    {
        "exchange.exchange_counts": {"group"},  # that of the buffers, as in all that follow
        "exchange.send_tokens": {"splits", "group"},
        "exchange.return_tokens": {"splits", "group"},
        "grouping.Grouped": {"x", "assignment"},  # no row moves before it is sent
        "grouping.combine": {"assignment"},
        "grouping.group_by_expert": {"x"},
        "layer.Stages": {"splits", "received", "rank_major"},
        "layer.moe_layer": {"max_tokens", "group"},
        "layout.ExpertMajor": {"x", "source", "target"},
        "layout.to_expert_major": {"x", "output_size"},
        "rows.expert_major_rows": {"output_size"},
    },
)
# In JAX an array is a result, and its memory is XLA's: there are no buffers, nor what makes and guards them.
DIRECT_IN_JAX = Pair(
    "jax_impl.direct",
    "torch_impl.direct",
    {
        "layer.moe_layer": {"group"},
        "exchange.exchange_counts": {"group"},
        "exchange.send_tokens": {"group"},
        "exchange.put_tokens": {"n_rows", "ranks"},
        "exchange.return_tokens": {"group"},
        "grouping.combine": {"group"},
        "layout.to_expert_major": {"group"},
        "rows.Ranks": "what a backward keeps of the mapped axis, which JAX may not know there any more",
        "rows.ranks_of": "finds it out",
        "rows.put_rows": {"n_rows", "ranks"},
        "rows.exchange_places": {"n_rows", "ranks"},
        "rows.put_here": {"n_rows"},
    },
    ONLY_IN_TORCH
    | {
        "layer.moe_layer": {"buffers"},
        "exchange.Splits": MAIN.left_only["exchange.Splits"],
        "exchange.Buffers": DIRECT.left_only["exchange.Buffers"],
        "exchange.make_buffers": DIRECT.left_only["exchange.make_buffers"],
        "exchange.exchange_counts": {"buffers"},
        "exchange.send_tokens": {"buffers"},
        "exchange.sends_once": DIRECT.left_only["exchange.sends_once"],
        "exchange.put_tokens": {"buffer", "buffers"},
        "exchange.return_tokens": {"buffers"},
        "grouping.combine": {"buffers"},
        "layout.to_expert_major": {"buffers"},
        "rows.Buffer": DIRECT.left_only["rows.Buffer"],
        "rows.Arrivals": DIRECT.left_only["rows.Arrivals"],
        "rows.put_rows": {"buffer", "barrier"},
        "rows.put_rows_once": DIRECT.left_only["rows.put_rows_once"],
        "rows.exchange_places": {"buffer"},
        "rows.put_here": {"own"},
        "rows.expert_major_rows": {"n_own_slots"},  # in JAX all ranks have equally many
        "rows.expert_major_source": MAIN.left_only["rows.expert_major_source"],
        **{name: what for name, what in DIRECT.left_only.items() if name.startswith("checks.")},
    },
)
PAIRS = [MAIN, STATIC, DYNAMIC, DIRECT, DIRECT_IN_JAX]
# The files a layer has. What it has no file for, and names that its own file lacks, it takes from the package above it.
OWN_FILES = {
    "torch_impl": {*FILES, "kernels", "operators"},  # kernels: what its plain versions need. operators: for a compiler
    "jax_impl": {*FILES, "kernels"},
    "torch_impl.static": set(FILES) - {"routing", "glu"},
    "jax_impl.dynamic": set(FILES) - {"routing", "glu", "experts", "matmul"},
    "torch_impl.direct": set(FILES) - {"routing", "glu", "matmul"},
    "jax_impl.direct": set(FILES) - {"routing", "glu", "matmul", "experts", "checks"},
}
SAME_NAME = {"axis_name": "group"}

pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.left} and {pair.right}")
files = pytest.mark.parametrize("file", FILES)


def own_members(package: str, file: str) -> dict[str, object]:
    """Public functions and classes that the file itself defines, in its order."""
    path = ROOT / package.replace(".", "/") / f"{file}.py"
    if not path.exists():
        return {}
    module, tree = import_module(f"{package}.{file}"), ast.parse(path.read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def members(package: str, file: str) -> dict[str, object]:
    """Its own, and what it takes from the package above it."""
    above = own_members(package.split(".")[0], file) if "." in package else {}
    return above | own_members(package, file)


def stem(name: str) -> str:
    """A name without its shape suffix: x_ND -> x, counts_Pe -> counts, expert_id_TK -> expert_id."""
    return re.sub(r"_(?:[A-Ze]+)$", "", name)


def parts(member: object) -> dict[str, object]:
    """Parameters or fields by stem, in order, with their defaults. Two fields of one stem are one."""
    if isinstance(member, type):
        defaults = member._field_defaults  # type: ignore[attr-defined]
        return {stem(name): defaults.get(name, inspect.Parameter.empty) for name in member._fields}  # type: ignore[attr-defined]
    parameters = inspect.signature(member).parameters.values()  # type: ignore[arg-type]
    return {SAME_NAME.get(stem(p.name), stem(p.name)): p.default for p in parameters}


def only_names(declared: dict[str, str | set[str]], file: str) -> set[str]:
    """Names in the file that are declared as one layer's alone."""
    return {key.split(".")[1] for key, what in declared.items() if key.split(".")[0] == file and isinstance(what, str)}


@pytest.mark.parametrize("package", OWN_FILES)
def test_the_same_files(package):
    found = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")}
    assert found == OWN_FILES[package] | {"__init__"}


@pairs
@files
def test_the_same_names_in_the_same_order(pair, file):
    left_only, right_only = only_names(pair.left_only, file), only_names(pair.right_only, file)
    theirs = own_members(pair.right, file) | members(pair.right, file)  # its own in their order
    shared = [name for name in theirs if name not in right_only]
    assert members(pair.left, file).keys() >= set(shared)
    assert [name for name in own_members(pair.left, file) if name not in left_only] == [
        name for name in shared if name in own_members(pair.left, file)
    ]
    assert left_only <= own_members(pair.left, file).keys()
    assert right_only <= theirs.keys()
    assert not left_only & theirs.keys()
    assert not right_only & members(pair.left, file).keys()


@pairs
@files
def test_the_same_parameters_fields_and_defaults(pair, file):
    ours, theirs = members(pair.left, file), members(pair.right, file)
    compared = 0
    for name in ours.keys() & theirs.keys():
        key, left, right = f"{file}.{name}", parts(ours[name]), parts(theirs[name])
        left_only, right_only = (set(declared.get(key, ())) for declared in (pair.left_only, pair.right_only))
        assert left_only <= left.keys() - right.keys(), key
        assert right_only <= right.keys() - left.keys(), key
        assert [p for p in left if p not in left_only] == [p for p in right if p not in right_only], key
        for part in left.keys() & right.keys():
            assert left[part] == right[part], f"{key}: {part}"
        compared += 1
    assert compared


@pairs
def test_what_is_declared_is_looked_for(pair):
    for declared in (pair.left_only, pair.right_only):
        for key, what in declared.items():
            file, name = key.split(".")
            assert file in FILES
            assert isinstance(what, str) or name in members(pair.left, file).keys() & members(pair.right, file).keys()


def test_what_a_package_offers():
    torch_, static = (import_module(name).__all__ for name in ("torch_impl", "torch_impl.static"))
    jax_, dynamic, direct = (
        import_module(name).__all__ for name in ("jax_impl", "jax_impl.dynamic", "jax_impl.direct")
    )
    assert static == jax_
    assert dynamic == torch_ == direct
    assert set(import_module("torch_impl.direct").__all__) == {*torch_, "Buffers", "make_buffers"}
    assert set(jax_) - set(torch_) == {"Capacity", "plan_capacity"}
    assert set(torch_) <= set(jax_)


@pytest.mark.parametrize("value", ["Router", "Experts"])
def test_routers_and_experts_are_the_same_everywhere(value):
    kinds = [getattr(import_module(name), value) for name in OWN_FILES]
    assert len({kind._fields for kind in kinds}) == 1
    assert all(kind._field_defaults == kinds[0]._field_defaults for kind in kinds)


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
    """Nine stages, one assignment each, in order; the body without its signature and docstring.

    Where rows go straight to their places, places come first, and rows are never rank-major.
    """
    order = [
        "group_by_expert", "exchange_counts", "send_tokens", "to_expert_major", "apply_experts", "to_rank_major",
        "return_tokens", "combine",
    ]  # fmt: skip
    for package in OWN_FILES:
        source = (ROOT / package.replace(".", "/") / "layer.py").read_text()
        assert len(source.splitlines()) <= 90
        calls = re.findall(r"^    \w+(?:, \w+)* = (\w+)\(", source.split('"""')[-1], re.MULTILINE)
        straight = package.endswith(".direct")
        expected = [*order[:2], order[3], order[2], order[4], *order[6:]] if straight else order
        assert [call for call in calls if call in order] == expected


def legend(package: str) -> dict[str, str]:
    """What each letter means, as the layer's first lines say."""
    lines = (import_module(f"{package}.layer").__doc__ or "").splitlines()
    cells = [cell for line in lines if line.startswith("    ") for cell in re.split(r" {3,}", line.strip())]
    return dict(cell.split("  ") for cell in cells)


def test_letters_mean_the_same_in_every_layer():
    said: dict[str, str] = {}
    for package in OWN_FILES:
        source = (ROOT / package.replace(".", "/") / "layer.py").read_text()
        used = {letter for shape in re.findall(r'\w+\[(?:Tensor|Array), " ?\*?([^"]*)"', source) for letter in shape}
        words = legend(package)
        assert used - {" ", "*"} <= words.keys()
        assert all(said.setdefault(letter, meaning) == meaning for letter, meaning in words.items())
    assert len(set(said.values())) == len(said) == 12


# Lines that must be the same. What the frameworks call the same thing by is renamed; comments and how a statement is
# wrapped do not count.

RENAMED = [
    (r"\b(torch|jnp|jax\.nn)\.", "np."),
    (r"\.to\(", ".astype("),
    (r"\bdim=", "axis="),
    (r"\bkeepdim=", "keepdims="),
    (r", device=[\w.]+", ""),
    (r"\.numel\(\)", ".size"),
    (r"\baxis_name\b", "group"),
]
SAME: tuple[list[str], list[str]] = ([], [])
# By function the lines that may differ, as they are after renaming: left, right.
SAME_LINES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    MAIN.left: {  # but for suffixes of shapes, which are what differs
        "routing.route": (
            ["clamped_id = expert_id.long().clamp(0, router.shape[1] - 1)", "score = score.gather(1, clamped_id)"],
            [
                "clamped_id = expert_id.clip(0, router.shape[1] - 1)",
                "score = np.take_along_axis(score, clamped_id, axis=1)",
            ],
        ),
        "routing.logits": (
            [
                "logits_dtype = np.float32 if dtype == 'float32' else np.promote_types(x.dtype, np.float32)",
                "logits = x.astype(matmul_dtype) @ router.astype(matmul_dtype)",
            ],
            [
                "logits_dtype = np.dtype(np.float32) if dtype == 'float32' else np.promote_types(x.dtype, np.float32)",
                "logits = matmul(x.astype(matmul_dtype), router.astype(matmul_dtype))",
            ],
        ),
        "routing.choose": (
            [
                "    outside = ~in_best_groups(score, router)",
                "    score = score.masked_fill(outside, 0 if router.outside_groups == 'zero' else -np.inf)",
            ],
            [
                "    outside = 0 if router.outside_groups == 'zero' else -np.inf",
                "    score = np.where(in_best_groups(score, router), score, outside)",
            ],
        ),
        "routing.top_k_indices": (
            ["return score_Tn.argsort(axis=-1, descending=True, stable=True)[:, :k]"],
            [
                "id_Tk = score_Tn.argsort(axis=-1, descending=True, stable=True)[:, :k]",
                "axes = jax.typeof(score_Tn).manual_axis_type.varying - jax.typeof(id_Tk).manual_axis_type.varying",
                "return jax.lax.pcast(id_Tk, tuple(axes), to='varying') if axes else id_Tk",
            ],
        ),
        "routing.take_by_expert": (
            ["return one_hot.astype(a.dtype) @ a"],
            ["return matmul(one_hot.astype(a.dtype), a)"],
        ),
        "routing.count_per_expert": SAME,
        "grouping.combine": SAME,
        "layout.to_rank_major": SAME,
        "experts.apply_experts": SAME,
        "rows.sort_by_key": SAME,
        "rows.exclusive_cumsum": SAME,
        "glu.glu": (
            [
                "if gate is not None and experts == ('silu', None, 0) and kernels.use_swiglu_kernels(gate):",
                "    return _SwiGLU.apply(gate, up, n_rows)",
                "    gate, up = (gate.clamp(max=experts.clamp), up.clamp(-experts.clamp, experts.clamp))",
            ],
            ["    gate, up = (clamped(gate, -np.inf, experts.clamp), clamped(up, -experts.clamp, experts.clamp))"],
        ),
        "glu.gelu_tanh": (["near = gate.clamp(-10, 10)"], ["near = gate.clip(-10, 10)"]),
        "matmul.grouped_linear": SAME,
        "matmul.rows_of_experts": SAME,
        "checks.check_options": SAME,
        "checks.check_expert_options": SAME,
        "routing.renormalized": SAME,
        "checks.check_experts_per_rank": SAME,
    },
    STATIC.left: {
        "layer.moe_layer": SAME,
        "grouping.plan_capacity": SAME,
        "grouping.group_by_expert": SAME,
        "grouping.keep_within_capacity": (
            [
                "    key_N = np.arange(N) % top_k if priority == 'choice' else -score_N.detach()",
                "    by_key_N = key_N.argsort(stable=True)",
                "    by_bin_N, _ = sort_by_key(bin_N[by_key_N], B)",
                "    place_N = inverse_permutation(by_key_N[by_bin_N])",
            ],
            [
                "    key_N = np.arange(N) % top_k if priority == 'choice' else -jax.lax.stop_gradient(score_N)",
                "    place_N = inverse_permutation(np.lexsort((key_N, bin_N)))",
            ],
        ),
        "grouping.combine": SAME,
        "exchange.exchange_counts": SAME,
        "layout.to_expert_major": SAME,
        "layout.to_rank_major": SAME,
        "experts.apply_experts": (
            [
                "x_MD = zero_padding(x_MD, counts_e)",
                "return zero_padding(grouped_linear(hidden_MF, w_down_eFD, counts_e, biases.down_eD), counts_e)",
            ],
            ["return grouped_linear(hidden_MF, w_down_eFD, counts_e, biases.down_eD)"],
        ),
        "rows.expert_major_rows": (
            [],
            [
                "if n_bins == P and kernels.use_kernels(counts_Pe):",
                "    source_S, target_S = kernels.expert_major_rows(counts_Pe, capacity)",
                "    return (source_S, target_S.reshape(n_bins, capacity))",
            ],
        ),
        "rows.rank_bins_source": SAME,
        "rows.expert_bins_source": SAME,
        "rows.segments_source": (
            ["segment_O = np.searchsorted(ends, row_O, right=True)"],
            ["segment_O = np.searchsorted(ends, row_O, side='right', method='compare_all')"],
        ),
        "checks.check_capacity_factor": SAME,
        "checks.check_capacity": SAME,
        "checks.check_priority": SAME,
        "checks.check_bins": SAME,
    },
    DYNAMIC.left: {
        "layer.moe_layer": (
            [
                "counts_Pe, splits = exchange_counts(grouped.kept_E, group)",
                "received_RD = send_tokens(grouped.x_ND, splits, P * T * min(K, e), group)",
                "expert_major = to_expert_major(received_RD, counts_Pe)",
                "returned_ND = return_tokens(rank_major_RD, splits, T * K, group)",
                "return Stages(routing, grouped, counts_Pe, splits, received_RD, expert_major, y_RD, rank_major_RD, "
                "returned_ND, shared_TD, out_TD, expert_id_TK.size - grouped.kept_E.sum())",
            ],
            [
                "counts_Pe, splits = exchange_counts(counts_E, group)",
                "tell_most_received(splits.n_received, P * (T if max_tokens is None else max_tokens) * min(K, e))",
                "received_RD = send_tokens(grouped.x_ND, splits, group)",
                "expert_major = to_expert_major(received_RD, counts_Pe, splits.n_received)",
                "returned_ND = return_tokens(rank_major_RD, splits, group)",
                "return Stages(routing, grouped, counts_Pe, splits, received_RD, expert_major, y_RD, rank_major_RD, "
                "returned_ND, shared_TD, out_TD)",
            ],
        ),
        "grouping.combine": SAME,
        "layout.to_expert_major": (
            ["source_R, target_R = expert_major_rows(counts_Pe, x_RD.shape[0])"],
            [
                "output_size = x_RD.shape[0] if output_size is None else output_size",
                "check_output_size(output_size, x_RD.shape[0])",
                "source_R, target_R = expert_major_rows(counts_Pe, output_size)",
            ],
        ),
        "layout.to_rank_major": SAME,
    },
    DIRECT_IN_JAX.left: {
        "layer.moe_layer": (
            [
                "P = ranks_of(group).count",
                "check_experts(x_TD, counts_E.shape[0], P, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, shared)",
                "counts_PE = exchange_counts(grouped.kept_E, group)",
                "expert_major = to_expert_major(grouped.slot_TK, counts_PE, group)",
                "placed_RD = send_tokens(input_TD, grouped.slot_TK, place_N, origin_R, group)",
                "counts_e = counts_PE.sum(axis=0).reshape(P, -1)[ranks_of(group).own]",
                "returned_ND = return_tokens(y_RD, place_N, origin_R, group)",
                "out_TD = combine(y_RD, returned_ND, weight_TK, grouped.slot_TK, place_N, group)",
            ],
            [
                "n_ranks = buffers.counts_PE.own_OD.shape[0]",
                "check_experts(x_TD, counts_E.shape[0], n_ranks, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, "
                "shared)",
                "check_buffers(x_TD, expert_id_TK, counts_E, buffers)",
                "counts_PE = exchange_counts(grouped.kept_E, buffers)",
                "expert_major = to_expert_major(grouped.slot_TK, counts_PE, buffers)",
                "placed_RD = send_tokens(input_TD, grouped.slot_TK, place_N, origin_R, buffers)",
                "counts_e = counts_PE.sum(axis=0).chunk(n_ranks)[buffers.rank]",
                "returned_ND = return_tokens(y_RD, place_N, origin_R, buffers)",
                "out_TD = combine(y_RD, returned_ND, weight_TK, grouped.slot_TK, place_N, buffers)",
            ],
        ),
        "grouping.group_by_expert": (
            [
                "before_KK = np.tril(np.ones((K, K), bool), -1)",
                "again_TK = (before_KK & (expert_id_TK[:, :, None] == expert_id_TK[:, None, :])).any(axis=2)",
                "_, slot_N = sort_by_key(expert_N, E)",
                "return Grouped(slot_TK, (np.arange(E)[:, None] == expert_N).sum(axis=1))",  # fast enough in XLA
            ],
            [
                "again_TK = (expert_id_TK[:, :, None] == expert_id_TK[:, None, :]).tril(-1).any(axis=2)",
                "order_N, slot_N = sort_by_key(expert_N, E)",
                "expert_E = np.arange(E, dtype=expert_N.dtype)",
                "end_E = np.searchsorted(expert_N[order_N], expert_E, right=True)",
                "return Grouped(slot_TK, end_E.diff(prepend=end_E.new_zeros(1)))",
            ],
        ),
        "rows.weigh_rows": (
            [
                "weighed_MKD = score_MK.astype(accum_dtype)[:, :, None] * x_MD.astype(accum_dtype)[:, None]",
                "return weighed_MKD.astype(x_MD.dtype).reshape(-1, x_MD.shape[1])",
            ],
            [
                "return (score_MK.astype(accum_dtype)[:, :, None] * x_MD.astype(accum_dtype)[:, None])"
                ".astype(x_MD.dtype).flatten(0, 1)",
            ],
        ),
        "rows.expert_major_rows": (
            [
                "counts_PeP = counts_PE.reshape(P, P, e).transpose(1, 2, 0)",
                "row_PE = (counts_PeP_flat.cumsum(axis=1) - counts_PeP_flat).reshape(P, e, P).transpose(2, 0, 1)"
                ".reshape(P, E)",
                "mine = rank * e + np.arange(e)",
                "place_N = shift_segments(counts_PE[rank], shift_PE[rank] + first_row_E, n_slots)",
            ],
            [
                "if kernels.use_kernels(counts_PE):",
                "    return kernels.place_rows(counts_PE, rank, n_own_slots, n_slots, n_rows)",
                "counts_PeP = counts_PE.reshape(P, P, e).permute(1, 2, 0)",
                "row_PE = (counts_PeP_flat.cumsum(axis=1) - counts_PeP_flat).reshape(P, e, P).permute(2, 0, 1)"
                ".reshape(P, E)",
                "mine = slice(rank * e, (rank + 1) * e)",
                "place_N = shift_segments(counts_PE[rank], shift_PE[rank] + first_row_E, n_own_slots)",
            ],
        ),
        "rows.shift_segments": (
            [
                "ends = counts_G.cumsum(axis=0)",
                "segment_O = np.searchsorted(ends, row_O, side='right', method='compare_all')",
            ],
            ["segment_O = np.searchsorted(counts_G.cumsum(axis=0), row_O, right=True)"],
        ),
    },
    DIRECT.left: {
        "layer.moe_layer": (
            [
                "n_ranks = buffers.counts_PE.own_OD.shape[0]",
                "check_experts(x_TD, counts_E.shape[0], n_ranks, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases, "
                "shared)",
                "check_buffers(x_TD, expert_id_TK, counts_E, buffers)",
                "grouped = group_by_expert(expert_id_TK, counts_E)",
                "counts_PE = exchange_counts(grouped.kept_E, buffers)",
                "expert_major = to_expert_major(grouped.slot_TK, counts_PE, buffers)",
                "place_N, origin_R = expert_major",
                "placed_RD = send_tokens(input_TD, grouped.slot_TK, place_N, origin_R, buffers)",
                "counts_e = counts_PE.sum(axis=0).chunk(n_ranks)[buffers.rank]",
                "y_RD = apply_experts(placed_RD, counts_e, w_gate_eDF, w_up_eDF, w_down_eFD, experts, biases)",
                "returned_ND = return_tokens(y_RD, place_N, origin_R, buffers)",
                "out_TD = combine(y_RD, returned_ND, weight_TK, grouped.slot_TK, place_N, buffers)",
                "return Stages(routing, grouped, counts_PE, expert_major, placed_RD, y_RD, returned_ND, shared_TD, "
                "out_TD, expert_id_TK.size - grouped.kept_E.sum())",
            ],
            [
                "check_experts(x_TD, counts_E.shape[0], n_ranks(group), w_gate_eDF, w_up_eDF, w_down_eFD, experts, "
                "biases, shared)",
                "grouped = group_by_expert(input_TD, expert_id_TK, counts_E)",
                "counts_Pe, splits = exchange_counts(counts_E, group)",
                "(T, K), (P, e) = (expert_id_TK.shape, counts_Pe.shape)",
                "tell_most_received(splits.n_received, P * (T if max_tokens is None else max_tokens) * min(K, e))",
                "received_RD = send_tokens(grouped.x_ND, splits, group)",
                "expert_major = to_expert_major(received_RD, counts_Pe, splits.n_received)",
                "y_RD = apply_experts(expert_major.x_RD, counts_Pe.sum(axis=0), w_gate_eDF, w_up_eDF, w_down_eFD, "
                "experts, biases)",
                "rank_major_RD = to_rank_major(y_RD, expert_major.source_R, expert_major.target_R)",
                "returned_ND = return_tokens(rank_major_RD, splits, group)",
                "out_TD = combine(returned_ND, weight_TK, grouped.slot_TK, grouped.assignment_N)",
                "return Stages(routing, grouped, counts_Pe, splits, received_RD, expert_major, y_RD, rank_major_RD, "
                "returned_ND, shared_TD, out_TD)",
            ],
        ),
    },
}


def lines(source: str, suffixes: bool = True) -> list[str]:
    """A function's statements, a line each, without its docstring, and with the frameworks' words renamed."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:] if ast.get_docstring(function) else function.body
    text = "\n".join(ast.unparse(statement) for statement in body)
    for theirs, common in RENAMED:
        text = re.sub(theirs, common, text)
    if not suffixes:
        text = re.sub(r"\b([a-z]\w*?)_[A-Ze]+\b", r"\1", text)
    return text.splitlines()


def differing(left: list[str], right: list[str], other: tuple[list[str], list[str]]) -> list[tuple[str, str]]:
    """Lines that are not the same, beside each other, less those that may differ, all of which have to be there."""
    rest = []
    for found, allowed in zip((left, right), other, strict=True):
        missing = [line for line in allowed if found.count(line) != 1]
        assert not missing, f"no such line, or more than one: {missing}"
        rest.append([line for line in found if line not in allowed])
    longest = max(map(len, rest))
    padded = [[*lines, *[""] * (longest - len(lines))] for lines in rest]
    return [(a, b) for a, b in zip(*padded, strict=True) if a != b]


def source_of(package: str, key: str) -> str:
    file, name = key.split(".")
    path = ROOT / package.replace(".", "/") / f"{file}.py"
    source = path.read_text()
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return ast.get_source_segment(source, node) or ""


@pytest.mark.parametrize(("left", "key"), [(left, key) for left, keys in SAME_LINES.items() for key in keys])
def test_the_same_lines(left, key):
    (right,) = [pair.right for pair in PAIRS if pair.left == left]
    ours, theirs = (lines(source_of(package, key), left != MAIN.left) for package in (left, right))
    assert differing(ours, theirs, SAME_LINES[left][key]) == []


@pytest.mark.parametrize("left", SAME_LINES)
def test_a_line_that_differs_is_seen(left):
    """Whichever it is, and whether changed, left out, or said twice."""
    for key, other in SAME_LINES[left].items():
        (right,) = [pair.right for pair in PAIRS if pair.left == left]
        ours, theirs = (lines(source_of(package, key), left != MAIN.left) for package in (left, right))
        for i, line in enumerate(ours):
            if line not in other[0]:
                assert differing([*ours[:i], f"{line}.T", *ours[i + 1 :]], theirs, other)
                assert differing([*ours[:i], *ours[i + 1 :]], theirs, other)
                assert differing([*ours[:i], line, *ours[i:]], theirs, other)
