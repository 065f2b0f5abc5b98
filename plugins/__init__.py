"""ForkAttention: the native kernels and where to find the built library."""
