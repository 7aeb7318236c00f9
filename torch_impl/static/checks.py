"""Wrong capacities are refused here. All other checks are in `torch_impl.checks`."""

from fractions import Fraction

from torch_impl.checks import check_experts_per_rank


def check_capacity_factor(factor: object, per: str, n_experts: int, n_ranks: int, align: int) -> None:
    """Raises ValueError unless the factor is None or a finite positive number, and the bins are ranks or experts."""
    check_experts_per_rank(n_experts, n_ranks)
    if per not in ("rank", "expert"):
        raise ValueError(f"capacity_per is {per!r}: it must be 'rank' or 'expert'")
    if align < 1:
        raise ValueError(f"align is {align}: it must be at least 1")
    if factor is None:
        return
    try:
        exact = Fraction(str(factor))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if exact <= 0:
        raise ValueError(
            f"the capacity factor is {factor!r}: it must be finite and positive, as a decimal ('1.25') or a fraction "
            "('5/4'); leave it out for the bound at which nothing drops"
        )


def check_capacity(n_bins: int, rows: int, priority: str, n_experts: int) -> None:
    """Raises ValueError unless bins hold at least one row, divide the experts, and the priority is known."""
    if rows < 1:
        raise ValueError(f"the capacity is {rows} rows per bin: it must be at least 1")
    if n_bins < 1 or n_experts % n_bins:
        raise ValueError(f"{n_bins} bins for {n_experts} experts: use one bin per rank, or one per expert")
    check_priority(priority)


def check_priority(priority: str) -> None:
    """Raises ValueError on an unknown priority."""
    if priority not in ("token", "choice", "score"):
        raise ValueError(f"priority is {priority!r}: it must be 'token', 'choice' or 'score'")


def check_bins(n_bins: int, n_ranks: int, n_experts: int) -> None:
    """Raises ValueError unless there is a bin for each rank, or one for each expert."""
    if n_bins not in (n_ranks, n_experts):
        raise ValueError(
            f"{n_bins} bins for {n_ranks} ranks of {n_experts} experts in all: use one bin per rank, or one per expert"
        )
