"""A small Z-Image transformer with trained weights: `python -m benchmarks.trained OUT`."""
