"""A platform for vLLM-Omni, which has none for CPUs. Only for tests: it knows nothing of memory."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


class CPUPlatform(OmniPlatform, CpuPlatform):
    """The CPU, with attention by torch."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        pass

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def synchronize(cls) -> None:
        pass

    @classmethod
    def empty_cache(cls) -> None:
        pass

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        return 8 << 30

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        return 8 << 30, 16 << 30

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 16 << 30

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False

    @classmethod
    def get_diffusion_attn_backend_cls(cls, *arguments: Any, **named: Any) -> str:
        # It asks for the platform when it is imported.
        from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

        path: str = DiffusionAttentionBackendEnum.TORCH_SDPA.get_path()
        return path

    @classmethod
    def reset_peak_memory_stats(cls, device: Any = None) -> None:
        pass

    @classmethod
    def max_memory_allocated(cls, device: Any = None) -> int:
        return 0

    max_memory_reserved = memory_allocated = max_memory_allocated
