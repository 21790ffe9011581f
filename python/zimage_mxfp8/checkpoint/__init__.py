"""Checkpoint files: reading, checking, naming and writing them."""
