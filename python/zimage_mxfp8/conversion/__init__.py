"""Conversion of checkpoints to MXFP8: the plan, the streaming work and the report."""
