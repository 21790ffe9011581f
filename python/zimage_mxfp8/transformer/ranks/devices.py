"""The devices of ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ...errors import UnsupportedError, UsageError
from ...system.devices import torch_device


def rank_devices(
    device: str | torch.device | None, devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    """Return the device of each rank; one for a model without ranks.

    Args:
        device: the argument for one device.
        devices: the argument for several.

    Raises:
        UsageError: both are given, or the devices are not of one type, or not different GPUs.
        UnsupportedError: this machine does not have a device, or this system cannot start ranks.
    """
    if devices is None:
        return [torch_device(device)]
    if device is not None:
        raise UsageError("devices", "contradicts device", "give one of them")
    if isinstance(devices, (str, torch.device)) or not isinstance(devices, Sequence) or not devices:
        raise UsageError("devices", f"must be a list of devices, not {repr(devices)[:80]}")
    places = [torch_device(each) for each in devices]
    if len({place.type for place in places}) > 1:
        raise UsageError("devices", "must all be GPUs, or all be the CPU")
    if places[0].type == "cuda" and len(set(places)) < len(places):
        raise UsageError("devices", "must be different GPUs", "name each once")
    if len(places) > 1 and sys.platform == "win32":
        raise UnsupportedError("several devices are not possible on Windows", "use one device")
    return places
