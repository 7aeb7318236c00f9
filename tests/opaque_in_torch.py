"""This project's layer in PyTorch as one of somebody's own, which gives its output and gradients and nothing else.

It imports `torch_impl` from where the process runs: run from a copy with a planted fault, it is a layer that has it.
"""

import torch_impl
from parity import backend
from parity.run.naming import stem, together
from parity.run.torch_stages import options_of


@backend(framework="torch")
def layer(
    x_TD,
    router_DE,
    w_up_eDF,
    w_down_eFD,
    case,
    group,
    w_gate_eDF=None,
    router_bias_E=None,
    selection_bias_E=None,
    expert_scale_E=None,
    b_gate_eF=None,
    b_up_eF=None,
    b_down_eD=None,
    shared_w_gate_DH=None,
    shared_w_up_DH=None,
    shared_w_down_HD=None,
    shared_score_D=None,
):
    """The layer with the options of the case: [T, D] of this rank's tokens."""
    values = {stem(name): a for name, a in locals().items()}
    how = options_of(case) | together(torch_impl, values)
    stages = torch_impl.moe_layer(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, **how, group=group)
    return stages.out_TD
