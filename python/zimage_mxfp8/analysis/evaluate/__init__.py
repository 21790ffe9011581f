"""Images of two transformers at the same seeds, compared."""
