"""Denoising without diffusers: the flow-match Euler sampler on latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..zimage.sampling import sampler_timesteps

# Latent images, times and captions -> velocities, as `ZImageTransformer.forward` has them.
Transformer = Callable[..., tuple[list[torch.Tensor]]]


def denoise(
    transformer: Transformer,
    latents: Sequence[torch.Tensor],
    captions: Sequence[torch.Tensor],
    sampler: str | int = "turbo",
) -> list[torch.Tensor]:
    """Turn noise into latent images.

    Args:
        transformer: called with `return_dict=False`.
        latents: noise, float32 [16, 1, H, W] each.
        captions: caption features, [tokens, features] each.
        sampler: see `sampler_timesteps`.

    Returns:
        Latent images, float32 [16, 1, H, W] each.
    """
    times = [time / 1000.0 for time in sampler_timesteps(sampler)]
    images = list(latents)
    for time, following in zip(times, [*times[1:], 1.0], strict=True):
        t = torch.full((len(images),), time, dtype=torch.float32, device=images[0].device)
        (velocities,) = transformer(images, t, captions, return_dict=False)
        images = [
            image + (following - time) * velocity.float()
            for image, velocity in zip(images, velocities, strict=True)
        ]
    return images
