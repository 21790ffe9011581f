"""Validation of a quantised checkpoint against the file contract and its original."""
