"""What is compared: cases, presets, recordings of routing."""
