"""Proof that work on a CUDA device does not wait for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# Other tests change the free memory of the device, which a test compares.
on_a_device_alone = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="needs a device alone: run it without -n"
)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make torch raise where it would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
