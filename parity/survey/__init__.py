"""The map: what each published layer is, and how far two of them differ."""
