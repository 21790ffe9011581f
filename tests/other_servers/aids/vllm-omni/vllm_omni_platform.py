"""The entry point for the platform; vLLM-Omni calls it before the platform can be imported."""

from __future__ import annotations


def name() -> str:
    """Return the name of the class."""
    return "vllm_omni_cpu.CPUPlatform"
