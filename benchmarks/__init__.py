"""Benchmarks: `python -m benchmarks SUITE`, run from the repository's root."""
