"""A ControlNet in diffusers' pipelines that have no place for one, in a part of the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..transformer.control import ZImageControlNet
from ..transformer.model import ZImageTransformer
from .settings import GenerationSettings


class ControlledTransformer(nn.Module):
    """Stands for a transformer in a pipeline, and adds a ControlNet to its forwards.

    It counts the steps, so it serves one run of a pipeline.
    """

    def __init__(
        self,
        transformer: ZImageTransformer,
        net: ZImageControlNet,
        latent: torch.Tensor,
        settings: GenerationSettings,
    ) -> None:
        """Take what is to be combined.

        Args:
            transformer: for the steps.
            net: the ControlNet.
            latent: of the control image, [1, 16, H, W].
            settings: with strength, start and end, resolved.
        """
        super().__init__()
        # Not as submodules: the pipeline has nothing to do with the ControlNet.
        self._parts: tuple[ZImageTransformer, ZImageControlNet] = transformer, net
        missing = net.config.control_in_dim - latent.shape[1]  # mask and latent of what is kept
        self._image = torch.cat([latent, latent.new_zeros(1, missing, *latent.shape[2:])], dim=1)
        self._settings = settings
        self._done = 0
        self.count_steps: Callable[[], int] = lambda: settings.steps

    @property
    def device(self) -> torch.device:
        """That of the transformer."""
        return self._parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """That of the transformer."""
        return self._parts[0].dtype

    @property
    def in_channels(self) -> int:
        """Those of the transformer."""
        return self._parts[0].in_channels

    @property
    def config(self) -> Any:
        """That of the transformer."""
        return self._parts[0].config

    def forward(
        self,
        x: Sequence[torch.Tensor],
        t: torch.Tensor,
        cap_feats: Sequence[torch.Tensor],
        **others: Any,
    ) -> Any:
        """Run the transformer, with the ControlNet if it is its turn."""
        transformer, net = self._parts
        total, settings = self.count_steps(), self._settings
        begin, end = self._done / total, (self._done + 1) / total
        self._done += 1
        assert settings.control_start is not None and settings.control_end is not None  # resolved
        if settings.control_start <= begin and end <= settings.control_end:
            images = [self._image.transpose(0, 1)] * len(x)
            assert settings.control_strength is not None
            others["controlnet_block_samples"] = net.control(images, settings.control_strength)
        return transformer(x, t, cap_feats, **others)
