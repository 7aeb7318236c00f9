"""torchtitan's MoE, on one rank's tokens with all experts."""

import torch
from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.moe import (  # pyright: ignore[reportMissingImports]
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # pyright: ignore[reportMissingImports]

from parity import Unsupported, backend, only

# Parameters of the layer: its own name, our name, and its axes.
STORED = {
    "router.gate.weight": "router: E D", "w1_EFD": "w_gate: E F D", "w3_EFD": "w_up: E F D", "w2_EDF": "w_down: E D F",
    "expert_bias_E": "selection_bias: E",
}  # fmt: skip


@backend(framework="torch")
def layer(x_TD, router_DE, w_gate_EDF, w_up_EDF, w_down_EFD, case, selection_bias_E=None):
    """The layer, without a shared expert. Its router is in the dtype of the tokens: autocast knows no float32."""
    only(case, "scale", score_function=("softmax", "sigmoid"), renormalize=(False, True), router_dtype="activations",
         cast_scores=True)  # fmt: skip
    if case.dtype != "bfloat16":
        raise Unsupported("its experts compute in bfloat16, whatever the tokens are")
    D, F, E, K = case.width, case.hidden, case.experts, case.top_k
    router = TokenChoiceTopKRouter.Config(
        num_experts=E, top_k=K, gate=Linear.Config(in_features=D, out_features=E), score_func=case.score_function,
        route_norm=case.renormalize, route_scale=case.scale,
    )  # fmt: skip
    experts = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
    )
    moe = MoE(MoE.Config(num_experts=E, load_balance_coeff=1e-3, routed_experts=experts, router=router))
    weights = {"router.gate.weight": router_DE.T.to(x_TD.dtype)}
    weights |= {f"routed_experts.inner_experts.{name}": w.mT for name, w in
                (("w1_EFD", w_gate_EDF), ("w2_EDF", w_down_EFD), ("w3_EFD", w_up_EDF))}  # fmt: skip
    weights |= {} if selection_bias_E is None else {"expert_bias_E": selection_bias_E}
    return torch.func.functional_call(moe, weights, (x_TD[None],))[0]
