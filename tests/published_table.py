"""Each preset against each published layer, as a table: `make published`, or this file in an environment that has them.

Names of layers, as `--backend` knows them, and of presets choose which.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import version

# Each layer, and what presets are changed to, where it has but one kind of scores.
SOFTMAX, SIGMOID = ("--renormalize", "True"), ("--score-function", "sigmoid", "--renormalize", "True")
# And one precision of the router, which matters in 16 bits: logits as the tokens, scores in float32 or rounded.
LOGITS = ("--router-dtype", "activations")
SCORES = (*LOGITS, "--cast-scores", "True")
LAYERS: dict[str, tuple[str, ...]] = {
    "transformers:qwen3_moe": SCORES, "transformers:olmoe": SCORES, "transformers:flex_olmo": SCORES,
    "transformers:jamba": SCORES, "transformers:mixtral": SOFTMAX + LOGITS, "transformers:minimax": SOFTMAX + LOGITS,
    "transformers:granitemoe": SOFTMAX + SCORES, "transformers:deepseek_v3": SIGMOID, "transformers:glm4_moe": SIGMOID,
    "transformers:lfm2_moe": (*SIGMOID, *SCORES, "--epsilon", "1e-6"),
    "megatron": (), "torchtitan": SCORES, "tokamax": (),
    "maxtext:dense": SOFTMAX + SCORES, "maxtext:dense_over_ranks": SOFTMAX + SCORES, "maxtext:ragged": SOFTMAX + SCORES,
    "maxtext:ragged_over_ranks": SOFTMAX + SCORES, "maxtext:ring_over_ranks": SOFTMAX + SCORES,
}  # fmt: skip
PRESETS = (
    "balanced", "zipf", "one-expert", "empty-expert", "idle-rank", "stay-home", "ties", "k1", "k-all", "t1", "p1", "p4",
    "p8", "sigmoid", "drop-rank-token", "bfloat16", "float16", "pydoc-bfloat16", "large-logits", "tiny-scores", "eager",
    "recomputed",
)  # fmt: skip
PACKAGES = ("torch", "jax", "transformers", "megatron-core", "torchtitan", "tokamax", "maxtext")


def outcome(lines: list[dict], backend: str) -> dict[str, str]:
    """By preset, what became of it, in words."""
    found = {}
    for line in lines:
        if line["kind"] == "case":
            found[line["case"]["name"]] = line["not_supported"].get(backend, "") and (
                f"not supported: {line['not_supported'][backend]}"
            )
        if line["kind"] == "blame":
            where = f"{line['check']['value']}, {line['direction']}"
            common = "; ".join(line["check"].get("common", ()))
            found[line["case"]] = f"MISMATCH: {where}" + f": {common}" * bool(common)
    return found


def check(layer: str, presets: list[str]) -> dict[str, str]:
    """What `check` says of all presets against one layer, a preset each where it does not get through all."""
    changes = LAYERS[layer]

    def run(*presets: str) -> tuple[dict[str, str], str]:
        command = [sys.executable, "-m", "parity", "check", *presets, *changes, "--json", "--backend", layer]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        got = outcome(lines, lines[0]["backends"][0]["name"]) if lines else {}
        if done.returncode == 2 and len(presets) == 1:
            got = {presets[0]: "no such case: its recording has other scores"}
        return {name.removesuffix("-changed"): what for name, what in got.items()}, done.stderr.strip()

    found, _ = run(*presets)
    for preset in (p for p in presets if p not in found):
        got, error = run(preset)
        found |= got or {preset: f"ERROR: {error[-150:]}"}
    return found


def main(layers: list[str], presets: list[str]) -> None:
    """Print the table: a mark for each, and what the marks mean."""
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES), f"Python {platform.python_version()}",
          sep=", ")  # fmt: skip
    found, notes = {}, {}
    for layer in layers:
        found[layer] = check(layer, presets)
        print(layer, *LAYERS[layer], {what: sum(v.startswith(what) for v in found[layer].values() if v or not what)
              for what in ("MISMATCH", "not supported", "ERROR")}, file=sys.stderr)  # fmt: skip
    columns = {layer: chr(ord("A") + i) for i, layer in enumerate(layers)}
    print(" " * 16, *(f"{letter:3}" for letter in columns.values()))
    for preset in presets:
        marks = []
        for layer in layers:
            what = found[layer][preset]
            note = what and notes.setdefault(what, len(notes) + 1)
            marks.append(f"{'✗' if what[:1].isupper() else '-'}{note}" if what else "✓")
        print(f"{preset:16}", *(f"{mark:3}" for mark in marks))
    for layer, letter in columns.items():
        print(f"{letter}   {layer}", *LAYERS[layer])
    for what, note in notes.items():
        print(f"{note:<3} {what}")


if __name__ == "__main__":
    asked = sys.argv[1:]
    main([a for a in asked if a in LAYERS] or [*LAYERS], [a for a in asked if a in PRESETS] or [*PRESETS])
