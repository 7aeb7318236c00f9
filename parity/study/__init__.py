"""What a static capacity drops, pads and costs."""
