"""Recordings of routing: what a file may hold, and the case that it fixes."""

import re
import shlex
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
from safetensors import SafetensorError, safe_open

from parity.cases.case import Case, Experts, Router, flag
from parity.cases.parameters import BY_NAME, PARAMETERS, parameters_of

Array = np.ndarray
MANY_EXPERTS = 4096
RECORDINGS = Path(__file__).parent / "recordings"

# The form of a recording: what it may hold, and the shape of each. expert_id alone is enough. dscore is the gradient of
# the scores that an auxiliary loss adds.
FORM = {"expert_id": "M K", "x": "M D", **{one.name: one.axes for one in PARAMETERS}, "dscore": "M K"}


def recording_path(recording: str) -> Path:
    """The path of a recording: one that the package ships, by name, or a file."""
    brought = {path.stem: path for path in RECORDINGS.glob("*.safetensors")}
    return brought.get(recording, Path(recording))


def recording_name(recording: str) -> str:
    """The name of a recording in reports and files: its path without the folder."""
    return re.sub(r"[^\w.+-]", "-", Path(recording).stem)


def read_recording(recording: str, with_checkpoint: bool = False) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a recording and its metadata; beside a checkpoint, hidden states are enough.

    Raises ValueError when it cannot be read, lacks expert_id, or its tensors' shapes contradict each other.
    """
    path = recording_path(recording)
    if path.is_dir() or path.suffix == ".json":
        folder, kind = (path, "a folder") if path.is_dir() else (path.parent, "JSON")
        raise ValueError(
            f"--recording {recording}: a recording is a file of tensors, and this is {kind}. For a layer "
            f"of a checkpoint use --checkpoint {shlex.quote(str(folder))}"
        )
    try:
        with safe_open(path, framework="numpy") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  safe_open is no dict
            metadata = f.metadata() or {}
    except (OSError, SafetensorError, AttributeError) as error:  # AttributeError: a dtype that NumPy lacks
        raise ValueError(f"--recording {recording}: cannot read {path} as safetensors: {error}") from error
    if any(LAYER.fullmatch(name) for name in tensors):
        raise ValueError(
            f"--recording {recording}: {path.name} has {next(filter(LAYER.fullmatch, tensors))}: it is part of a "
            f"checkpoint. For a layer of it use --checkpoint {shlex.quote(str(path.parent))}, a folder with config.json"
        )
    if {"score", "scores"} & tensors.keys():
        raise ValueError(
            f"--recording {recording}: it has scores, which are computed from x and router: save those instead, or "
            "leave scores out, and x and router are drawn"
        )
    if unknown := tensors.keys() - FORM.keys():
        meant = [f"{name} (meant: {near[0]}?)" if (near := get_close_matches(name, FORM)) else name for name in unknown]
        raise ValueError(
            f"--recording {recording}: it has {', '.join(sorted(meant))}, which is not known here, so the layer may "
            f"be another one. Known are {', '.join(FORM)}: leave out what is not part of the layer"
        )
    said: dict[str, tuple[int, str]] = {}  # each letter's size, and the tensor that it comes from
    for name, form in FORM.items():
        if name not in tensors:
            continue
        shape = tensors[name].shape
        if len(shape) != len(form.split()):
            raise ValueError(f"--recording {recording}: {name} has shape {shape}, expected [{form}]")
        for axis, (letter, size) in enumerate(zip(form.split(), shape, strict=True)):
            known, of = said.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"--recording {recording}: {name} has shape {shape}, but {letter} is {known} in {of}, so axis "
                    f"{axis} should be {known}, not {size}: expected [{form}]{_turned(form, shape, said)}"
                )
    for name, a in tensors.items():
        if name != "expert_id" and a.dtype.kind in "iub":
            raise ValueError(f"--recording {recording}: {name} is of {a.dtype}: it must be floating point")
        if name != "expert_id" and not np.isfinite(a.astype(np.float64)).all():
            raise ValueError(f"--recording {recording}: {name} holds numbers that are not finite")
    ids, held = tensors.get("expert_id"), ", ".join(f"{name} of {a.dtype}" for name, a in sorted(tensors.items()))
    if ids is None and with_checkpoint and "x" in tensors:
        return tensors, metadata
    if ids is None or ids.dtype.kind not in "iu":
        raise ValueError(f"--recording {recording}: needs a tensor expert_id of integers, [M, K], and has {held}")
    if not ids.size:
        raise ValueError(f"--recording {recording}: expert_id has shape {ids.shape}: there is nothing in it")
    if ("x" in tensors) != ("router" in tensors) and not with_checkpoint:
        raise ValueError(f"--recording {recording}: x and router come together or not at all: scores need both")
    return tensors, metadata


def sizes_of_recording(recording: str) -> set[str]:
    """The letters whose sizes a recording fixes: without a D and an F, it does not say how wide its layer is."""
    tensors, _ = read_recording(recording)
    return {letter for name in tensors for letter in FORM[name].split()}


LAYER = re.compile(r"(.*\.)?layers\.\d+\..*")  # what tensors are called in a checkpoint


def _turned(form: str, shape: tuple[int, ...], said: dict[str, tuple[int, str]]) -> str:
    """A hint where the shape would fit with its last two axes exchanged."""
    other = [*shape[:-2], *shape[:-3:-1]]
    fits = all(said.get(letter, (size, ""))[0] == size for letter, size in zip(form.split(), other, strict=True))
    return ". Its last two axes are the other way round: transpose them" if len(shape) > 1 and fits else ""


def case_of_recording(case: Case) -> Case:
    """The case with every size that its recording fixes: E, K, D, F, H, the layer's form, and T = M // P.

    Raises ValueError as `read_recording` and `Case` do.
    """
    if case.recording is None:
        return case
    tensors, metadata = read_recording(case.recording, case.checkpoint is not None)
    sizes = {
        letter: size
        for name, form in FORM.items()
        if name in tensors
        for letter, size in zip(form.split(), tensors[name].shape, strict=True)
    }
    if case.tokens > (most := sizes["M"] // case.ranks):
        raise ValueError(f"--tokens {case.tokens} on --ranks {case.ranks}, but the recording has {sizes['M']} tokens")
    if case.checkpoint is not None:
        return replace(_beside_checkpoint(case, tensors, sizes), tokens=case.tokens or most)
    said = _metadata(case.recording, metadata)
    if "E" not in sizes and "n_experts" not in said:
        _no_stray_id(case.recording, tensors["expert_id"])
    if sizes.setdefault("E", said.get("n_experts", int(tensors["expert_id"].max()) + 1)) != said.get(
        "n_experts", sizes["E"]
    ):
        raise ValueError(
            f"--recording {case.recording}: n_experts is {said['n_experts']}, but its tensors have {sizes['E']} experts"
        )
    form = {name: True for name in ("router_bias", "selection_bias", "expert_scale", "shared_score") if name in tensors}
    form |= {"expert_bias": True} if "b_down" in tensors else {}
    form |= {"gated": "w_gate" in tensors} if "w_up" in tensors else {}
    form |= {"shared_hidden": sizes["H"]} if "H" in sizes else {}
    found = replace(
        case,
        tokens=case.tokens or most,
        top_k=sizes["K"],
        experts=sizes["E"],
        width=sizes.get("D", case.width),
        hidden=sizes.get("F", case.hidden),
        **form,
        **{name: value for name, value in said.items() if name != "n_experts"},
    )
    there = {one.name for one in parameters_of(found)}
    if idle := [name for name in tensors if name in BY_NAME and name not in there]:
        raise ValueError(
            f"--recording {case.recording}: it has {', '.join(idle)}, but lacks what goes with it: biases of experts "
            "are b_up and b_down, and b_gate with w_gate; a shared expert is shared_w_up and shared_w_down, and "
            "shared_w_gate where experts have a gate"
        )
    return found


def _no_stray_id(recording: str, ids: Array) -> None:
    """Raises ValueError where nothing says how many experts there are, and the largest id seems to be a mistake.

    Every expert up to the largest id would get weights, though no layer has so many, or hardly any are chosen.
    """
    most = int(ids.max())
    if most >= MANY_EXPERTS or (most >= 64 and most >= 16 * np.unique(ids).size):
        token = int((ids == most).any(axis=1).argmax())
        raise ValueError(
            f"--recording {recording}: token {token} chose expert {most}, the largest of {np.unique(ids).size} ids, "
            "and nothing says how many experts there are: set n_experts in the metadata, or correct the id"
        )


def _beside_checkpoint(case: Case, tensors: dict[str, Array], sizes: dict[str, int]) -> Case:
    """The case of a checkpoint. Raises ValueError when a recording has weights too, or other sizes."""
    if learned := [name for name in tensors if name in BY_NAME]:
        raise ValueError(
            f"--recording {case.recording}: it has {', '.join(learned)}, and so has the checkpoint: leave them out"
        )
    for letter, name in {"D": "width", "K": "top_k"}.items():
        if sizes.get(letter, getattr(case, name)) != getattr(case, name):
            raise ValueError(
                f"--recording {case.recording}: its {letter} is {sizes[letter]}, but the checkpoint's is "
                f"{getattr(case, name)}"
            )
    return case


def _metadata(recording: str, metadata: dict[str, str]) -> dict[str, Any]:
    """The layer's fields in a recording's metadata. Raises ValueError on a value that a field cannot have."""
    types = {f.name: f.type for f in fields(Case) if f.name in (*Router._fields, *Experts._fields)}
    types = {"n_experts": int} | {name: kind for name, kind in types.items() if name != "top_k"}
    for name in metadata.keys() - types.keys():
        if meant := get_close_matches(name, types, cutoff=0.8):
            raise ValueError(f"--recording {recording}: its metadata has {name}: should that be {meant[0]}?")
    said = {}
    for name in types.keys() & metadata.keys():
        try:
            said[name] = _value(types[name], metadata[name].lower())
        except (KeyError, ValueError) as error:
            wanted = " or ".join(get_args(types[name])) if get_origin(types[name]) is Literal else ""
            wanted = wanted or {bool: "true or false", int: "an integer"}.get(types[name], "a number")
            raise ValueError(
                f"--recording {recording}: its metadata has {name} {metadata[name]!r}: it must be {wanted}"
            ) from error
    return said


def _value(kind: Any, text: str) -> Any:
    """A field's value from its text. Raises ValueError or KeyError on another."""
    if get_origin(kind) is Literal:
        return {word: word for word in get_args(kind)}[text]
    if kind is bool:
        return {"true": True, "false": False}[text]
    return int(text) if kind is int else float(text)


def load_recording(case: Case) -> dict[str, Array]:
    """A recording's tensors, its first P*T tokens laid out over the ranks.

    Raises ValueError when an expert id is out of range or twice in one token, or a shape is not the case's.
    """
    assert case.recording is not None
    if (full := case_of_recording(case)) != case:
        other = [f.name for f in fields(Case) if getattr(full, f.name) != getattr(case, f.name)]
        said = (
            f"--{flag(name)} is {getattr(case, name)}, but the recording has {getattr(full, name)}" for name in other
        )
        raise ValueError(f"--recording {case.recording}: {', '.join(said)}")
    tensors, _ = read_recording(case.recording, case.checkpoint is not None)
    M = case.ranks * case.tokens
    if "expert_id" not in tensors:
        return {"x": tensors["x"][:M].reshape(case.ranks, case.tokens, -1)}
    ids = tensors["expert_id"]
    if ids.size and (ids.min() < 0 or ids.max() >= case.experts):
        raise ValueError(
            f"--recording {case.recording}: expert ids run from {ids.min()} to {ids.max()} with {case.experts} experts"
            ": set n_experts in the metadata, or correct the ids"
        )
    twice = (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1)
    if twice.any():
        token = int(twice.argmax())
        raise ValueError(f"--recording {case.recording}: token {token} chose experts {ids[token]}: they must differ")
    for name in {"expert_id", "x", "dscore"} & tensors.keys():
        tensors[name] = tensors[name][:M].reshape(case.ranks, case.tokens, -1)
    return tensors | {"expert_id": tensors["expert_id"].astype(np.int32)}
