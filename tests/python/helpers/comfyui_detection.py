"""ComfyUI takes models of width 3840 alone for Z-Image; this makes it take the tests' width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .comfyui_sizes import DIM


def accept_small_models() -> Callable[[], None]:
    """Change ComfyUI's detection in this process; returns what undoes it."""
    import comfy.model_detection
    import comfy.supported_models

    own = comfy.model_detection.detect_unet_config
    known = comfy.supported_models.ZImage.unet_config

    def detect(state: Any, prefix: str, metadata: Any = None) -> dict[str, Any]:
        config: dict[str, Any] = own(state, prefix, metadata=metadata)
        heads = config["dim"] // 128
        hidden = state[f"{prefix}layers.0.feed_forward.w1.weight"].shape[0]
        return config | {
            **{"n_heads": heads, "n_kv_heads": heads, "ffn_dim_multiplier": hidden / config["dim"]},
            **{"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0},
            **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        }

    def undo() -> None:
        comfy.model_detection.detect_unet_config = own
        comfy.supported_models.ZImage.unet_config = known

    comfy.model_detection.detect_unet_config = detect
    comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": DIM}
    return undo
