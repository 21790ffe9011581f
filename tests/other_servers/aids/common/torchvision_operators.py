"""Schemas of two operators of torchvision.

PyPI's torchvision is built for CUDA, and its library cannot be loaded beside torch for CPUs. Its
Python code registers fake versions of these two when it is imported, and fails if they are unknown.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
