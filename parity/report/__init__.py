"""What a run of comparisons looks like."""
