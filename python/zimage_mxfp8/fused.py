"""The fused kernels of the core (in the making)."""
