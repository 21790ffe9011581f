"""Measurements of the error that quantisation causes in a checkpoint, as a basis for recipes."""
