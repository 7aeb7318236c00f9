"""What is right: comparison, blame, records of a run."""
