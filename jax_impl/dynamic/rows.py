"""Where rows move to, when only the device knows how many rows are real. How they move is in `jax_impl.rows`."""

from jax import Array
from jaxtyping import Integer

from jax_impl.rows import exclusive_cumsum, inverse_permutation, segments_source


def expert_major_rows(
    counts_Pe: Integer[Array, "P e"], output_size: int
) -> tuple[Integer[Array, " R"], Integer[Array, " R"]]:
    """For each expert-major row the rank-major row it comes from, and the inverse.

    Shapes: source_R, target_R.
    """
    source_R = expert_major_source(counts_Pe, output_size)
    return source_R, inverse_permutation(source_R)


def expert_major_source(counts_Pe: Integer[Array, "P e"], output_size: int) -> Integer[Array, " R"]:
    """For each expert-major row, the rank-major row it comes from; `output_size`, past the end, for unused rows.

    Rows move in P*e segments, which follow each other without gaps.
    """
    start_Pe = exclusive_cumsum(counts_Pe.reshape(-1)).reshape(counts_Pe.shape)
    return segments_source(start_Pe, counts_Pe, output_size)
