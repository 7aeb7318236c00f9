"""Refuses places that cannot exchange rows by sizes on the device. All other checks are in `jax_impl.checks`."""

import jax


def check_ragged_exchange(axis_name: str) -> None:
    """Raises ValueError unless `axis_name` is an axis of `shard_map`, on devices where XLA can exchange rows."""
    if jax.default_backend() == "cpu":
        raise ValueError(
            "ragged_all_to_all is not implemented on XLA:CPU: run the dynamic layer on GPUs, or use "
            "jax_impl.moe_layer, whose static capacity runs everywhere"
        )
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"{axis_name!r} is not an axis of shard_map here, and ragged_all_to_all has no vmap rule: map the dynamic "
            "layer over devices with jax.shard_map, or use jax_impl.moe_layer, which runs under vmap too"
        )
