"""A MoE layer in PyTorch, to be changed into yours: `python -m parity check zipf --backend FILE` judges it.

What the arguments are called says what the layer is given; leave out what it does not need. It runs on each rank.
    x          tokens, [T, D], of this rank
    router     [D, E] in float32, or in float64 where the tokens are
    w_gate, w_up, w_down    of all experts, [E, D, F], [E, D, F], [E, F, D]; of this rank's only, with `group`
    score, expert_id        [T, K], for a layer that is given its routing
    keep       [T, K], false where an assignment is dropped
    router_bias, selection_bias, expert_scale, b_gate, b_up, b_down, shared_w_gate, shared_w_up, shared_w_down,
    shared_score            what some models have beside them (docs/models.md)
    case       sizes and options: `case.top_k`, `case.score_function`, ... (`python -m parity check --help`)
    group      the process group: for a layer that exchanges tokens between ranks
"""

import torch
from torch.nn.functional import silu

from parity import backend, only


@backend(framework="torch")
def layer(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case):
    """The layer: [T, D] of the tokens."""
    only(case, "scale", score_function=("softmax", "sigmoid"), renormalize=(False, True))
    accum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(accum_dtype) @ router_DE
    score_TE = logits_TE.softmax(-1) if case.score_function == "softmax" else logits_TE.sigmoid()
    score_TK, id_TK = score_TE.topk(case.top_k)
    if case.renormalize:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + 1e-20)
    out_TD = torch.zeros_like(x_TD, dtype=accum_dtype)
    for e in range(case.experts):
        t, k = (id_TK == e).nonzero(as_tuple=True)
        hidden_nF = silu((x_TD[t] @ w_gate_EDF[e]).to(accum_dtype)) * (x_TD[t] @ w_up_EDF[e]).to(accum_dtype)
        y_nD = hidden_nF.to(x_TD.dtype) @ w_down_EFD[e]
        out_TD = out_TD.index_add(0, t, case.scale * score_TK[t, k, None] * y_nD)
    return out_TD.to(x_TD.dtype)
