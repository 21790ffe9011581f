"""The nodes of ComfyUI's node package, see integrations/comfyui."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..streaming.jobs import ProgressCallback
from ..transformer.compute import IN_PLACE_MODES
from .loading import load_model
from .native import NativeForward
from .patches import AdapterTensors, take_adapters

_KEY = "zimage_mxfp8"
_CATEGORY = "Z-Image MXFP8"
_FOLDER = "diffusion_models"
_FORWARD = "diffusion_model._forward"
_RECIPES = ("uniform", "zimage")
# Names of comfy.patcher_extension.CallbacksMP: of copies, and when weights have changed.
_CLONE = "on_clone"
_WEIGHTS_CHANGE = ("on_load_after", "on_detach_after", "on_apply_hooks")
_END = "on_cleanup"  # of a sampling


def speed_up(model: Any, compute: str = "auto") -> Any:
    """Return a copy of a ComfyUI MODEL that runs on this package's blocks.

    The weights are the MODEL's own. LoRA, LoHa and LoKr patches that it has by now become live
    branches; other patches stay ComfyUI's.

    Args:
        model: a ModelPatcher of Z-Image.
        compute: one of `IN_PLACE_MODES`, or "auto" for the one chosen for the device.

    Raises:
        ValueError: the MODEL is not Z-Image.
    """
    module = model.model.diffusion_model
    if not all(hasattr(module, name) for name in ("noise_refiner", "cap_pad_token", "layers")):
        raise ValueError(
            f"the model is {type(model.model).__name__}, not Z-Image; connect a Z-Image model"
        )
    patched = _clone(model)
    adapters, patched.patches = take_adapters(patched.patches)
    earlier = patched.object_patches.get(_FORWARD)
    if isinstance(earlier, NativeForward):  # the node stands behind another one
        adapters |= {f"earlier {name}": each for name, each in earlier.adapters.items()}
    patched.patches_uuid = uuid.uuid4()  # otherwise ComfyUI takes the weights for patched ones
    _attach(patched, compute, adapters)
    return patched


def _clone(model: Any) -> Any:
    """Copy a MODEL, as one whose weights are on the device as a whole.

    With dynamic VRAM, weights are streamed; ComfyUI then loads the file again without it, as for
    its compiling nodes. Never run on a GPU.
    """
    if not model.is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError:  # of a loader that does not say how; its calls will fall back
        return model.clone()


def _attach(model: Any, compute: str, adapters: Mapping[str, AdapterTensors]) -> None:
    forward = NativeForward(model.model.diffusion_model, compute, adapters)
    model.add_object_patch(_FORWARD, forward)
    for event in (*_WEIGHTS_CHANGE, _END, _CLONE):
        model.remove_callbacks_with_key(event, _KEY)
    for event in _WEIGHTS_CHANGE:
        model.add_callback_with_key(event, _KEY, lambda *_: forward.forget())
    model.add_callback_with_key(_END, _KEY, lambda *_: forward.forget_controls())
    model.add_callback_with_key(_CLONE, _KEY, _follow)


def _follow(_: Any, clone: Any) -> None:
    """Give a copy with weights of its own a forward on these."""
    forward = clone.object_patches.get(_FORWARD)
    module = clone.model.diffusion_model
    if isinstance(forward, NativeForward) and forward.module is not module:
        _attach(clone, forward.compute, forward.adapters)


class SpeedUp:
    """MODEL to MODEL: run Z-Image on this package's blocks."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Runs the whole transformer of Z-Image on MXFP8 blocks. Put it after Load Diffusion Model "
        "and after the LoRA nodes, whose LoRAs then stay exact."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs."""
        return {"required": {"model": ("MODEL",), "compute": (["auto", *IN_PLACE_MODES],)}}

    def apply(self, model: Any, compute: str) -> tuple[Any]:
        """Run the node."""
        return (speed_up(model, compute),)


class Load:
    """A Z-Image file of models/diffusion_models to MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Loads a Z-Image file, in MXFP8, INT8 ConvRot or plain, without dynamic VRAM. Put the LoRA "
        "nodes and the speed-up after it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs."""
        return {"required": {"file": (_files(),)}}

    def load(self, file: str) -> tuple[Any]:
        """Run the node."""
        return (load_model(_path(file), _progress_bar()),)


class Convert:
    """A file in models/diffusion_models to an MXFP8 file beside it."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    FUNCTION = "convert"
    CATEGORY = _CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Converts a Z-Image file of models/diffusion_models to MXFP8, beside it. Refresh ComfyUI "
        "to see the file in Load Diffusion Model."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs."""
        return {
            "required": {
                "file": (_files(),),
                "recipe": (list(_RECIPES),),
                "overwrite": ("BOOLEAN", {"default": False}),
            }
        }

    def convert(self, file: str, recipe: str, overwrite: bool) -> dict[str, Any]:
        """Run the node; the result is the name of the new file."""
        from ..conversion.convert import convert, default_output

        source = _path(file)
        target = default_output(source)
        report = convert(
            source,
            target,
            recipe=recipe,
            overwrite=overwrite,
            progress=_progress_bar(),
        )
        name = str(Path(file).with_name(target.name))
        return {"ui": {"text": [*report.warnings, f"wrote {name}"]}, "result": (name,)}


def _files() -> list[str]:
    import folder_paths

    files: list[str] = folder_paths.get_filename_list(_FOLDER)
    return files


def _path(file: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise(_FOLDER, file))


def _progress_bar() -> ProgressCallback:
    """Return a callback that moves the bar on the node which is running."""
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)
    return lambda done: bar.update_absolute(done.done, done.total)


NODE_CLASS_MAPPINGS = {
    "ZImageMXFP8Load": Load,
    "ZImageMXFP8SpeedUp": SpeedUp,
    "ZImageMXFP8Convert": Convert,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ZImageMXFP8Load": "Load Z-Image MXFP8",
    "ZImageMXFP8SpeedUp": "Z-Image MXFP8 speed-up",
    "ZImageMXFP8Convert": "Convert to MXFP8 (Z-Image)",
}
