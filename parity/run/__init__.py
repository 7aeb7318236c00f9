"""How implementations are run: backends, their ranks, their stages, planted faults."""
