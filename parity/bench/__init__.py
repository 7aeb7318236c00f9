"""How fast rows move, compared with the floor that memory bandwidth sets."""
