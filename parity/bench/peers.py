"""Other people's row movements and experts, measured by `bench` beside ours where they are installed.

Only their public functions are called. None is a dependency: a package that is not installed is not measured.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from parity.bench.plan import Movement, emit, failure
from parity.cases.case import Case


def find_peers(framework: str, peers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The peers whose package is installed. One that does not import becomes a figure with the error."""
    found = {}
    for package, load in peers.items():
        if find_spec(package):
            try:
                found[package] = load()
            except Exception as error:
                emit(failure(framework, error, variant=package))
    return {package: peer for package, peer in found.items() if peer is not None}


def load_transformer_engine() -> Movement | None:
    """NVIDIA's Triton kernels, which need a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    te = import_module("transformer_engine.pytorch")

    def group_by_expert(x_TD, map_TE, n_rows):
        return *te.moe_permute(x_TD, map_TE, n_rows, map_type="mask"), None

    def combine(y_ND, score_TE, row_map, _):
        return te.moe_unpermute(y_ND, row_map, score_TE, (len(score_TE), y_ND.shape[1]), map_type="mask")

    sort_chunks = te.moe_sort_chunks_by_index
    return Movement(group_by_expert, move_there(sort_chunks), sort_chunks, combine, by_map)


def load_megatron() -> Movement:
    """Megatron-Core's functions, without TransformerEngine. They read chunk sizes on the host, and get them there.

    Rows are weighted in their dtype before `unpermute`, which is given no scores, as in its all-to-all dispatcher.
    """
    megatron = import_module("megatron.core.transformer.moe.moe_utils")

    def group_by_expert(x_TD, map_TE, place_N):
        x_ND, _, token_N, *_ = megatron.permute(x_TD, map_TE, num_out_tokens=len(place_N))
        return x_ND, token_N, place_N

    def sort_chunks(x_RD, sizes, order):
        return megatron.sort_chunks_by_idxs(x_RD, sizes, order)[0]

    def combine(y_ND, score_TE, token_N, place_N):
        score_N = score_TE.T.reshape(-1)[place_N].to(y_ND.dtype)
        return megatron.unpermute(y_ND * score_N[:, None], token_N, (len(score_TE), y_ND.shape[1]))

    def prepare(score_TK, ids_TK, counts_E, counts_Pe):
        score_TE, map_TE, _, chunks = by_map(score_TK, ids_TK, counts_E, counts_Pe.cpu())
        return score_TE, map_TE, map_TE.T.reshape(-1).nonzero()[:, 0], chunks

    return Movement(group_by_expert, move_there(sort_chunks), sort_chunks, combine, prepare)


def load_megatron_dispatcher() -> Callable[..., tuple[Callable[..., Any], Any]]:
    """Megatron-Core's all-to-all dispatcher over the default group, without TransformerEngine.

    Scores travel with the rows, which are weighted in their dtype on the rank of their expert. Megatron-Core's own
    experts weight them there too, but within their activation, at the hidden width.
    """
    import torch.distributed as dist

    dispatching = import_module("megatron.core.transformer.moe.token_dispatcher")
    groups = import_module("megatron.core.process_groups_config")
    config = import_module("megatron.core.transformer.transformer_config")

    def prepare(shape: Case, score_TK, ids_TK, counts_E):
        P, world = shape.ranks, dist.group.WORLD
        options = config.TransformerConfig(
            num_layers=1, num_attention_heads=1, hidden_size=shape.width, num_moe_experts=shape.experts,
            moe_router_topk=shape.top_k, moe_router_dtype="fp32", moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=P, add_bias_linear=False,
        )  # fmt: skip
        e = shape.experts // P
        own = list(range(dist.get_rank() * e, (dist.get_rank() + 1) * e))
        ranks = groups.ProcessGroupCollection(ep=world, tp_ep=world, expt_tp=None)
        dispatcher = dispatching.MoEAlltoAllTokenDispatcher(e, own, options, ranks)
        score_TE, map_TE, *_ = by_map(score_TK, ids_TK, counts_E, counts_E.reshape(P, -1))

        def whole(x_TD, score_TE):
            rows, scores = dispatcher.dispatch_preprocess(x_TD, map_TE, score_TE)
            rows, scores = dispatcher.token_dispatch(rows, scores)
            rows, _, scores = dispatcher.dispatch_postprocess(rows, scores)
            rows = dispatcher.combine_preprocess(rows * scores.to(rows.dtype)[:, None])
            return dispatcher.combine_postprocess(dispatcher.token_combine(rows))

        return whole, score_TE

    return prepare


def by_map(score_TK, ids_TK, counts_E, counts_Pe) -> tuple:
    """Scores and choices as [T, E], the number of rows, and the chunks' sizes and order, there and back."""
    import torch

    score_TE = score_TK.new_zeros(len(ids_TK), len(counts_E)).scatter(1, ids_TK, score_TK)
    map_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, ids_TK, True)
    chunk_Pe = torch.arange(counts_Pe.numel(), device=counts_Pe.device).reshape(counts_Pe.shape)
    there = counts_Pe.reshape(-1), chunk_Pe.T.reshape(-1)
    back = counts_Pe.T.reshape(-1), chunk_Pe.reshape(counts_Pe.T.shape).T.reshape(-1)
    return score_TE, map_TE, ids_TK.numel(), (*there, *back)


def move_there(sort_chunks: Callable[..., Any]) -> Callable[..., Any]:
    """A function that moves rows to expert-major order, and returns also what the way back needs."""

    def to_expert_major(x_RD, chunks):
        sizes, order, *back = chunks
        return sort_chunks(x_RD, sizes, order), *back

    return to_expert_major


def load_tokamax() -> Callable[..., Any]:
    """The layer's experts over rank bins, with the grouped matmul that tokamax picks for the device."""
    import jax

    ragged_dot = import_module("tokamax").ragged_dot

    def apply_experts(x_SD, counts_e, w_gate_eDF, w_up_eDF, w_down_eFD):
        gate_SF, up_SF = (ragged_dot(x_SD, w, counts_e).astype("float32") for w in (w_gate_eDF, w_up_eDF))
        return ragged_dot((jax.nn.silu(gate_SF) * up_SF).astype(x_SD.dtype), w_down_eFD, counts_e)

    return apply_experts


TORCH_PEERS = {"transformer_engine": load_transformer_engine, "megatron": load_megatron}
# Peers that send rows to other ranks, for which they need GPUs. The function that is loaded takes a shape, scores,
# expert ids and counts_E. It returns the whole, a function of x_TD and scores, and the scores in the form it takes.
TORCH_PEERS_OVER_RANKS = {"megatron": load_megatron_dispatcher}
JAX_PEERS = {"tokamax": load_tokamax}
