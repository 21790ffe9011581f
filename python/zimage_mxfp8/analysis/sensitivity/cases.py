"""Inputs for measuring the model: latents between noise and image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...generation.sampler import denoise
from ...transformer.model import ZImageTransformer
from .settings import chosen_steps


@dataclass(frozen=True)
class Case:
    """A step of a sampling run, with the output of the original model.

    Attributes:
        step: number of the step, from 0.
        time: 0 for noise to 1 for an image.
        latents: [16, 1, H, W] each, in the model's dtype.
        captions: [tokens, features] each.
        velocities: the model's output, float32 [16, 1, H, W] each.
    """

    step: int
    time: float
    latents: list[torch.Tensor]
    captions: list[torch.Tensor]
    velocities: list[torch.Tensor]

    def run(self, model: ZImageTransformer) -> list[torch.Tensor]:
        """Return the output of a model that may have been changed, float32."""
        t = torch.full((len(self.latents),), self.time, device=model.device)
        (velocities,) = model(self.latents, t, self.captions, return_dict=False)
        return [velocity.float() for velocity in velocities]


def record_cases(
    model: ZImageTransformer,
    captions: Sequence[torch.Tensor],
    size: tuple[int, int],
    timesteps: int,
    seed: int,
) -> list[Case]:
    """Sample an image for each caption with the original model, and keep some of the steps.

    Args:
        model: the original model.
        captions: [tokens, features] each.
        size: height and width of the images in pixels, multiples of 16.
        timesteps: number of the 8 steps of Turbo's sampler to keep.
        seed: seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (16, 1, size[0] // 8, size[1] // 8)
    noise = [torch.randn(shape, generator=generator).to(model.device) for _ in captions]
    features = [caption.to(model.device, model.dtype) for caption in captions]
    wanted, cases, step = set(chosen_steps(timesteps)), [], 0

    def recording(
        latents: list[torch.Tensor],
        t: torch.Tensor,
        cap_feats: Sequence[torch.Tensor],
        return_dict: bool,
    ) -> tuple[list[torch.Tensor]]:
        nonlocal step
        inputs = [image.to(model.dtype) for image in latents]
        (velocities,) = model(inputs, t, cap_feats, return_dict=return_dict)
        if step in wanted:
            outputs = [velocity.float() for velocity in velocities]
            cases.append(Case(step, float(t[0]), inputs, features, outputs))
        step += 1
        return (velocities,)

    denoise(recording, noise, features)
    return cases
