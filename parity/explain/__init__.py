"""What a layer is, read off its outputs: probes, hypotheses, and the card of those that hold."""
