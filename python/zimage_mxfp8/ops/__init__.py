"""The operations of the core on NumPy arrays and torch tensors."""
