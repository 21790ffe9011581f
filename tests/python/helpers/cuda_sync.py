"""Proof that work on a CUDA device neither waits for it nor allocates."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


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


def free_memory() -> int:
    """Return the free bytes of the device; under pytest-xdist skip, as other tests change them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("free memory can be compared on a device alone: run this without -n")
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
