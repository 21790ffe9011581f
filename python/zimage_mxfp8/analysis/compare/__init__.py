"""Errors of formats on the weights of a checkpoint."""
