"""What a compiler sees of the dispatch."""
