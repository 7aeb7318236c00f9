"""The right answer: a dense float64 layer, its tolerances, and which row lies where."""
