"""The files that make a model: all checks of their headers, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..transformer.compute import MODES, check_mode
from ..transformer.model_file import ModelFile, open_control, open_model
from ..zimage.config import ZImageConfig
from ..zimage.control import ControlConfig
from .folder import ModelFolder, open_model_folder


@dataclass(frozen=True)
class ModelParts:
    """A diffusers folder, a transformer and a ControlNet that go together.

    Attributes:
        folder: the folder.
        file: the transformer's file or folder.
        transformer: its headers.
        control_file: the ControlNet's file; None without one.
        controlnet: its headers.
        compute: the mode that was asked for, or "auto".
    """

    folder: ModelFolder
    file: Path
    transformer: ModelFile[ZImageConfig]
    control_file: Path | None
    controlnet: ModelFile[ControlConfig] | None
    compute: str

    @property
    def control_compute(self) -> str:
        """The mode for the ControlNet, or "auto"."""
        # A mode is meant for the files that have layers for it.
        fits = self.controlnet is not None and self.compute in MODES[self.controlnet.weights]
        return self.compute if fits else "auto"


def open_parts(
    model_dir: Path, transformer: Path | None, controlnet: Path | None, compute: str
) -> ModelParts:
    """Check the parts of a model, without loading any.

    Args:
        model_dir: the diffusers folder.
        transformer: file or folder; None: the folder's own.
        controlnet: file of a ControlNet.
        compute: "auto" or a compute mode.

    Raises:
        CheckpointError: a part is missing, of another kind, or does not fit the others.
        UsageError: no such mode, or one that the transformer's layers cannot be multiplied in.
    """
    folder = open_model_folder(model_dir)
    if transformer is None and not folder.transformer.is_dir():
        files = sorted(Path(model_dir).glob("*.safetensors"))
        remedy = f", such as {files[0]}" if files else ", or download the model again"
        raise CheckpointError(
            f"{model_dir} has no transformer/", f"name a file with `transformer`{remedy}"
        )
    file = folder.transformer if transformer is None else transformer
    headers = open_model(file)
    folder.check_captions_fit(file, headers.config.cap_feat_dim)
    check_mode(compute, headers.weights)
    control = None if controlnet is None else open_control(controlnet)
    if control is not None and (problem := control.config.misfit(headers.config)):
        raise CheckpointError(
            f"the ControlNet {controlnet} does not fit the transformer {file}: {problem}; "
            "use one that was made for this model"
        )
    return ModelParts(folder, file, headers, controlnet, control, compute)
