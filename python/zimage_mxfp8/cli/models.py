"""Options of the commands that run a model, and the libraries that load it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..system import devices
from ..transformer.compute import COMPUTE_MODES, check_device
from .arguments import count
from .wording import CommandLineError

if TYPE_CHECKING:
    import torch


def add_model_dir(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--model-dir`."""
    parser.add_argument(
        "--model-dir",
        required=required,
        metavar="DIR",
        help="diffusers folder of Z-Image, or OWNER/NAME[@REVISION] from the Hugging Face cache",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        type=_device,
        metavar="cpu|cuda|cuda:N",
        help="where to run (default: cuda if torch has it)",
    )


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--dtype`; its default is None, for the one that suits the device."""
    add_device(parser)
    default = "default: bfloat16; float16 on GPUs before compute capability 8.0"
    add_dtype(parser, ("bfloat16", "float16", "float32"), None, default)


def add_dtype(
    parser: argparse.ArgumentParser, choices: Sequence[str], default: str | None, told: str
) -> None:
    """Add `--dtype`; its help ends with what is told of the default."""
    parser.add_argument(
        "--dtype",
        choices=choices,
        default=default,
        help=f"type of all numbers that are not 8 bits wide ({told})",
    )


def add_gpus(parser: argparse.ArgumentParser, *names: str, of_what: str = "each image") -> None:
    """Add `--gpus`.

    Args:
        parser: of the command.
        names: more names of the option.
        of_what: what the GPUs share.
    """
    parser.add_argument(
        "--gpus",
        *names,
        type=count(1),
        metavar="N",
        help=f"GPUs that share {of_what}, each with all weights of the transformer (default: 1, or "
        "the CPU without a GPU; more than two were never tried)",
    )


def gpus_or_none(arguments: argparse.Namespace) -> list[torch.device] | None:
    """Return the devices of `--gpus`; None for one device, which `--device` names.

    Raises:
        UnsupportedError: there are fewer GPUs.
    """
    if arguments.gpus == 1:
        return None
    return devices.first_gpus(arguments.gpus)


def settle_devices(arguments: argparse.Namespace) -> None:
    """Set `--gpus` and `--device` where they were left out.

    Raises:
        CommandLineError: they contradict each other.
        UnsupportedError: there is no GPU, or the device cannot have the mode of `--compute`.
    """
    gpus, device = arguments.gpus, arguments.device
    allowed = device in (None, "cuda") if gpus != 1 else device != "cpu"
    if gpus is not None and not allowed:
        raise CommandLineError(f"--device {device} contradicts --gpus {gpus}; leave one out")
    if gpus == 1 and device is None:
        if not getattr(arguments, "ray", False):  # a cluster may have it elsewhere
            devices.first_gpus(1)
        arguments.device = "cuda"
    arguments.gpus = gpus or 1
    check_device(arguments.compute, arguments.device)


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add `--compute`."""
    parser.add_argument(
        "--compute",
        choices=("auto", *COMPUTE_MODES),
        default="auto",
        help="how quantised layers are multiplied (default: chosen for the device)",
    )


def add_offload(parser: argparse.ArgumentParser) -> None:
    """Add `--offload`."""
    parser.add_argument(
        "--offload",
        action="store_true",
        help="load text encoder, transformer and VAE one after another, so that memory holds one",
    )


def _device(text: str) -> str:
    """Return the name of a device, for `type=`: torch is not asked whether it is there."""
    try:
        devices.check_name(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    return text


def keep_libraries_quiet() -> None:
    """Disable network access, and the libraries' progress bars and notes.

    Libraries read these variables when they are imported; the hub's library may be imported
    already.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars

        constants.HF_HUB_OFFLINE = True
        disable_progress_bars()
