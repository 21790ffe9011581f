"""The time of forwards of the whole transformer, in every compute mode and in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..system.devices import core_index
from ..transformer.compute import MODES, Compute, Weights, unsupported
from ..transformer.floating_dtype import default_dtype, name_of
from ..transformer.model import ZImageTransformer
from ..zimage.constants import LATENT_CHANNELS
from .attempts import Attempts
from .models import deep_parts, diffusers_model, random_tensors
from .report import ForwardTime
from .timing import milliseconds
from .workload import Workload

_OURS, _PEER = "zimage-mxfp8", "diffusers"
_STORED: tuple[Weights, ...] = ("plain", "mxfp8")
_MODELS: list[tuple[Weights, Compute]] = [
    (weights, mode) for weights in _STORED for mode in MODES[weights]
]
MODEL_COUNT = 1 + len(_MODELS)  # for progress


class Forwards:
    """Measurements of forwards.

    Args:
        workload: sizes of the model and its inputs.
        device: the CPU, or the current CUDA device.
        attempts: takes what fails, and reports progress.

    Attributes:
        times: what was measured.
    """

    def __init__(self, workload: Workload, device: torch.device, attempts: Attempts) -> None:
        self.times: list[ForwardTime] = []
        self._workload, self._device, self._attempts = workload, device, attempts
        self._dtype = default_dtype(device)
        self._plain = name_of(self._dtype)  # as reports name it

    def measure(self) -> None:
        """Measure all models, one after the other in memory."""
        name = self._name(_PEER, "")
        self._attempts.begin(name)
        with self._attempts.at("forward", name):
            self._measure_peer()
        for weights, compute in _MODELS:
            mode = "" if weights == "plain" else compute
            name = self._name(_OURS, mode)
            self._attempts.begin(name)
            if why := unsupported(compute, core_index(self._device)):
                self._attempts.leave_out("forward", name, why)
                continue
            with self._attempts.at("forward", name):
                self._measure_ours(weights, compute, mode)

    def _measure_peer(self) -> None:
        model = diffusers_model(self._workload.config, self._device, self._dtype)
        self._measure_sizes(model, _PEER, self._plain, "", graph=False)

    def _measure_ours(self, weights: Weights, compute: Compute, mode: str) -> None:
        config = self._workload.config
        tensors = random_tensors(config, weights, self._device, self._dtype)
        parts = deep_parts(config, *tensors, compute, self._dtype)
        stored = self._plain if weights == "plain" else weights
        for graph in (False, True) if self._device.type == "cuda" else (False,):
            model = ZImageTransformer(config, parts, compute, self._dtype, graph)
            self._measure_sizes(model, _OURS, stored, mode, graph=graph)

    def _measure_sizes(
        self, model: Callable[..., Any], program: str, weights: str, mode: str, *, graph: bool
    ) -> None:
        for side in self._workload.sides:
            how = " in a CUDA graph" if graph else ""
            what = f"{self._name(program, mode)} at {side}x{side}{how}"
            with self._attempts.at("forward", what), torch.no_grad():
                inputs = self._inputs(side)

                def forward(inputs: Any = inputs) -> object:
                    return model(*inputs, return_dict=False)

                # The first call with a size runs without a graph, the second captures it.
                ms, runs = milliseconds(forward, self._device, 2 if graph else 1)
                self.times.append(ForwardTime(program, weights, mode, graph, side, ms, runs))

    def _inputs(self, side: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Return latents, timestep and caption features of one image."""

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=self._dtype, device=self._device)

        image = random(LATENT_CHANNELS, 1, side // 8, side // 8)
        caption = random(self._workload.caption_tokens, self._workload.config.cap_feat_dim)
        return [image], torch.full((1,), 0.5, device=self._device), [caption]

    def _name(self, program: str, mode: str) -> str:
        """Return the name of a model in progress and reasons."""
        return mode or f"{program} in {self._plain}"
