"""This project's layer in JAX as one of somebody's own, which gives its output and gradients and nothing else.

It imports `jax_impl` from where the process runs: run from a copy with a planted fault, it is a layer that has it.
"""

import jax_impl
from jax_impl.grouping import plan_capacity
from parity import backend
from parity.cases.case import not_default
from parity.run.jax_stages import options_of
from parity.run.naming import stem, together


@backend(framework="jax")
def layer(
    x_TD,
    router_DE,
    w_up_eDF,
    w_down_eFD,
    case,
    axis_name,
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
    """The layer with the options of the case, [T, D] of this rank's tokens; its capacity is that of the case."""
    values = {stem(name): a for name, a in locals().items()}
    capacity = plan_capacity(
        case.capacity_factor, x_TD.shape[0], case.top_k, case.experts, case.ranks, **not_default(case.capacity_options)
    )
    how = options_of(case) | together(jax_impl, values)
    stages = jax_impl.moe_layer(
        x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, **how, capacity=capacity, axis_name=axis_name
    )
    return stages.out_TD


@backend(framework="jax")
def dropping(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, case, axis_name):
    """The same with a capacity of its own, whatever that of the case is: three quarters, for each expert."""
    how = {"per": "expert", "priority": case.priority}
    capacity = plan_capacity("3/4", x_TD.shape[0], case.top_k, case.experts, case.ranks, **how)
    how = options_of(case) | {"capacity": capacity, "axis_name": axis_name}
    return jax_impl.moe_layer(x_TD, router_DE, w_gate_eDF, w_up_eDF, w_down_eFD, **how).out_TD
