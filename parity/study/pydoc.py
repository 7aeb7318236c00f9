"""A small byte-level MoE language model, trained on the documentation that Python ships; it records a trained router.

Random inputs load experts evenly; trained routers do not. This trains two blocks of causal attention and
`torch_impl.moe_layer` (two minutes on two cores), then saves what enters the last block's MoE layer on held-out text.
`python -m parity.study.pydoc` remakes the recording that comes with the presets; `--help` lists its options.
`init`, `batches` and `learning_rate` are NumPy and plain Python, so that any framework can start from the same weights
and see the same batches in the same order.

Letters besides the layer's own (here T = B*S): V byte values, B windows in a batch, S bytes in a window, H heads,
M recorded tokens.
"""

import hashlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, Integer, UInt8
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, rms_norm, scaled_dot_product_attention

from torch_impl import Router, moe_layer, route

V, S, D, F, E, K, H, BLOCKS = 256, 128, 64, 64, 16, 2, 4, 2
ROUTER = Router(K, renormalize=True)
B = 32
M = 512
BALANCE = 0.001  # weight of the auxiliary loss: enough that no expert dies, too little to even out the load
MIN_GAP = 1e-4  # a choice closer than this could fall differently in another framework's float32


# ---- NumPy and plain Python: the same start for every framework


def text(held_out: float = 0.1) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, " m"]]:
    """Python's help topics as bytes, in order of their names: all but the end to train on, the end held out."""
    whole = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode(), dtype=np.uint8)
    n = int(len(whole) * (1 - held_out))
    return whole[:n], whole[n:]


def init(seed: int) -> dict[str, np.ndarray]:
    """Initial weights, float32, normal with standard deviation 1/sqrt(fan in), less on the way into the residual."""
    rng = np.random.default_rng((seed, 0))

    def normal(*shape: int, std: float) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    residual = (2 * BLOCKS) ** -0.5
    p = {"embed_VD": normal(V, D, std=0.5), "position_SD": normal(S, D, std=0.5)}
    for i in range(BLOCKS):
        p |= {f"{i}.{name}_DD": normal(D, D, std=D**-0.5) for name in ("query", "key", "value")}
        p[f"{i}.mix_DD"] = normal(D, D, std=D**-0.5 * residual)
        p[f"{i}.router_DE"] = normal(D, E, std=D**-0.5)
        p[f"{i}.w_gate_EDF"] = normal(E, D, F, std=D**-0.5)
        p[f"{i}.w_up_EDF"] = normal(E, D, F, std=D**-0.5)
        p[f"{i}.w_down_EFD"] = normal(E, F, D, std=F**-0.5 * residual)
    return p | {"unembed_DV": normal(D, V, std=D**-0.5)}


def batches(
    seed: int, steps: int, text_n: UInt8[np.ndarray, " n"], windows: int = B
) -> Iterator[Integer[np.ndarray, "B S+1"]]:
    """`windows` windows of S bytes and the byte after, from random places, `steps` times."""
    rng = np.random.default_rng((seed, 1))
    for _ in range(steps):
        start_B = rng.integers(len(text_n) - S, size=windows)
        yield text_n[start_B[:, None] + np.arange(S + 1)].astype(np.int64)


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up over 50 steps to 3e-3, and a straight line down to a tenth of it."""
    return 3e-3 * min((step + 1) / 50, 1 - 0.9 * step / steps)


# ---- PyTorch


def forward(
    p: dict[str, Tensor], byte_BS: Integer[Tensor, "B S"], layer: Callable[..., Any] = moe_layer
) -> tuple[Float[Tensor, "B S V"], list[tuple[Float[Tensor, "T D"], Any]]]:
    """Logits of the next byte, and for each block what its MoE layer took in and all that it made of it (`Stages`)."""
    B, S = byte_BS.shape
    h_BSD = embedding(byte_BS, p["embed_VD"]) + p["position_SD"][:S]
    moe = []
    for i in range(BLOCKS):
        x_BSD = rms_norm(h_BSD, (D,), eps=1e-6)
        q, k, v = (
            (x_BSD @ p[f"{i}.{name}_DD"]).view(B, S, H, D // H).transpose(1, 2) for name in ("query", "key", "value")
        )
        mixed_BSD = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, D)
        h_BSD = h_BSD + mixed_BSD @ p[f"{i}.mix_DD"]
        x_TD = rms_norm(h_BSD, (D,), eps=1e-6).view(-1, D)
        weights = (p[f"{i}.{name}"] for name in ("router_DE", "w_gate_EDF", "w_up_EDF", "w_down_EFD"))
        stages = layer(x_TD, *weights, router=ROUTER)
        h_BSD = h_BSD + stages.out_TD.view(B, S, D)
        moe.append((x_TD, stages))
    return rms_norm(h_BSD, (D,), eps=1e-6) @ p["unembed_DV"], moe


def next_byte_loss(logits_BSV: Float[Tensor, "B S V"], next_BS: Integer[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Mean cross entropy, in nats per byte."""
    return cross_entropy(logits_BSV.flatten(0, 1), next_BS.flatten())


def balance_loss(
    x_TD: Float[Tensor, "T D"], router_DE: Float[Tensor, "D E"], counts_E: Integer[Tensor, " E"]
) -> Float[Tensor, ""]:
    """E * sum over experts of share of assignments * mean probability, 1 when even. Switch Transformer, equation 4."""
    prob_E = (x_TD @ router_DE).softmax(dim=-1).mean(dim=0)
    return E * (counts_E / counts_E.sum() * prob_E).sum()


def optimizer(p: dict[str, Tensor]) -> torch.optim.Adam:
    """Adam on all weights; `training_step` sets the learning rate."""
    return torch.optim.Adam(p.values(), betas=(0.9, 0.95), eps=1e-8)


def training_step(
    p: dict[str, Tensor],
    adam: torch.optim.Adam,
    batch: Integer[np.ndarray, "B S+1"],
    rate: float,
    layer: Callable[..., Any] = moe_layer,
) -> tuple[Tensor, list[Any]]:
    """Take one step on the loss plus BALANCE times the auxiliary loss; return the loss before it and all `Stages`."""
    byte_BS = torch.from_numpy(batch)
    logits_BSV, moe = forward(p, byte_BS[:, :-1], layer)
    loss = next_byte_loss(logits_BSV, byte_BS[:, 1:])
    balance = sum(balance_loss(x_TD, p[f"{i}.router_DE"], s.routing.counts_E) for i, (x_TD, s) in enumerate(moe))
    adam.param_groups[0]["lr"] = rate
    adam.zero_grad()
    (loss + BALANCE * balance).backward()
    adam.step()
    return loss.detach(), [stages for _, stages in moe]


def train(seed: int, steps: int, text_n: UInt8[np.ndarray, " n"]) -> dict[str, Tensor]:
    """Train with Adam on `batches` from `init`. Prints progress on stderr."""
    p = {name: torch.from_numpy(w).requires_grad_() for name, w in init(seed).items()}
    adam = optimizer(p)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps)
        for step, batch in enumerate(batches(seed, steps, text_n)):
            loss, _ = training_step(p, adam, batch, learning_rate(step, steps))
            progress.update(task, advance=1, description=f"{loss.item() / np.log(2):.3f} bits per byte")
    return {name: w.detach() for name, w in p.items()}


@torch.no_grad()
def bits_per_byte(p: dict[str, Tensor], text_n: UInt8[np.ndarray, " n"]) -> float:
    """Mean loss in bits over consecutive windows of S bytes; each window starts without context."""
    start_B = np.arange(0, len(text_n) - S, S)
    byte_BS = torch.from_numpy(text_n[start_B[:, None] + np.arange(S + 1)].astype(np.int64))
    return float(next_byte_loss(forward(p, byte_BS[:, :-1])[0], byte_BS[:, 1:]) / np.log(2))


@torch.no_grad()
def record(p: dict[str, Tensor], text_n: UInt8[np.ndarray, " n"]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The last block's MoE layer on the first M bytes in a row whose every choice is clear: (tensors, metadata).

    The tensors are expert_id [M, K] int32, x [M, D], router [D, E], w_gate and w_up [E, D, F], w_down [E, F, D].

    Raises ValueError when no stretch of the text keeps the K+1 largest logits of every token MIN_GAP apart.
    """
    last = BLOCKS - 1
    router_DE = p[f"{last}.router_DE"]
    for start in range(0, len(text_n) - M + 1, M):
        byte_BS = torch.from_numpy(text_n[start : start + M].astype(np.int64)).view(-1, S)
        x_MD, stages = forward(p, byte_BS)[1][last]
        expert_id_MK = stages.routing.expert_id_TK
        logit_ME = (x_MD @ router_DE).sort(descending=True).values
        gap = float((logit_ME[:, :K] - logit_ME[:, 1 : K + 1]).min())  # the order of choices must be clear too
        if gap >= MIN_GAP:
            break
    else:
        raise ValueError(
            f"every {M} bytes in a row hold a choice closer than {MIN_GAP}: take more steps or another seed"
        )
    assert torch.equal(expert_id_MK, route(x_MD, router_DE, ROUTER).expert_id_TK)
    tensors = {"expert_id": expert_id_MK.int(), "x": x_MD, "router": router_DE}
    tensors |= {w: p[f"{last}.{w}_{s}"] for w, s in (("w_gate", "EDF"), ("w_up", "EDF"), ("w_down", "EFD"))}
    metadata = {
        "n_experts": str(E),
        "score_function": "softmax",
        "renormalize": "true",
        "scale": "1.0",
        "stretch": f"held-out bytes {start} to {start + M}, in {M // S} windows",
        "smallest_gap": f"{gap:.2g}",
        "load_percent": " ".join(f"{100 * c / (M * K):.1f}" for c in stages.routing.counts_E.tolist()),
    }
    return {name: np.ascontiguousarray(a.numpy()) for name, a in tensors.items()}, metadata


def main(steps: int = 1000, seed: int = 0, out: Path = Path("parity/cases/recordings/pydoc.safetensors")) -> None:
    """Train the model and record its last MoE layer on held-out text.

    Args:
        steps: training steps, of B*S = 4096 bytes each.
        seed: seed of the initial weights and of the batches.
        out: file to write the recording to (safetensors).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: an untrained router is not what this records, take at least 1")
    train_n, held_out_n = text()
    p = train(seed, steps, train_n)
    tensors, metadata = record(p, held_out_n)
    metadata |= {
        "what": f"input, router, experts and choices of the last MoE layer of a byte-level language model, {M} tokens",
        "command": shlex.join(["python", "-m", "parity.study.pydoc", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),  # they split the sums, and training amplifies the last bit
        "date": date.today().isoformat(),
        "train_text": f"pydoc_data.topics, {len(train_n)} bytes",
        "train_text_sha256": hashlib.sha256(train_n.tobytes()).hexdigest(),
        "steps": str(steps),
        "seed": str(seed),
        # use as much training text as held-out text, so that the two figures compare
        "train_bits_per_byte": f"{bits_per_byte(p, train_n[: len(held_out_n)]):.3f}",
        "held_out_bits_per_byte": f"{bits_per_byte(p, held_out_n):.3f}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata=metadata)
    console = Console(highlight=False)
    for name in ("train_bits_per_byte", "held_out_bits_per_byte", "load_percent", "smallest_gap", "stretch"):
        console.print(f"{name.replace('_', ' '):>22}  {metadata[name]}", soft_wrap=True)
    console.print(f"{'wrote':>22}  {out}, {out.stat().st_size:,} bytes", soft_wrap=True)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m parity.study.pydoc")
