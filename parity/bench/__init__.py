"""How fast rows move, beside the floor that memory sets."""
