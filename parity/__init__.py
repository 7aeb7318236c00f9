"""Does a Mixture-of-Experts layer compute the same thing in PyTorch and in JAX?"""
