"""Identify a layer from its outputs: probes, hypotheses, and the card of those that hold."""
