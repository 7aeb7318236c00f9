"""Published layers, each as a reader would write theirs: `python -m parity check --backend transformers:mixtral`."""
