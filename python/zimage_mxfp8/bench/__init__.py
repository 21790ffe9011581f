"""Measure the speed of a device: forwards of the transformer in every mode, and its GEMMs."""
