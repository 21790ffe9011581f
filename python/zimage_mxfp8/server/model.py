"""The model of a server: where it is and how it runs, for this process or for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import hub
from ..generation.limits import DEFAULT_SIZE
from ..generation.parts import open_parts
from ..generation.small_model import FOLDER, TRANSFORMER, examples
from ..system.optional_packages import needed

if TYPE_CHECKING:
    from ..generation.generator import GenerationCallback
    from .engine import GeneratorEngine

Find = Callable[[str, Sequence[str]], Path]


@dataclass(frozen=True)
class ServedModel:
    """What an engine is made of; another process or machine with the same files can make it, too.

    Attributes:
        name: of the model, for clients.
        side: width and height of images in pixels, if a request does not say.
        model_dir: the diffusers folder.
        transformer: file or folder; None: the folder's own.
        device, compute, dtype, offload: see `ZImageGenerator`.
        gpus: number of GPUs that share each image.
    """

    name: str
    side: int
    model_dir: Path
    transformer: Path | None
    device: str | None = None
    compute: str = "auto"
    dtype: str | None = None
    offload: bool = False
    gpus: int = 1

    def load(self, progress: GenerationCallback | None = None) -> GeneratorEngine:
        """Load the model.

        Args:
            progress: called while parts are loaded.

        Raises:
            CheckpointError, UsageError, UnsupportedError, CudaError: see `ZImageGenerator`.
        """
        with needed("serve", "serve"):
            from ..generation.generator import ZImageGenerator
        from ..system.devices import first_gpus, torch_device
        from .engine import GeneratorEngine

        devices = first_gpus(self.gpus) if self.gpus > 1 else None
        generator = ZImageGenerator(
            self.model_dir,
            self.transformer,
            None if devices else self.device,
            self.compute,
            self.dtype,
            devices=devices,
            offload=self.offload,
            progress=progress,
        )
        device = str(devices[0] if devices else torch_device(self.device))
        return GeneratorEngine(generator, self.name, (self.side, self.side), device)


def find_model(
    model_dir: str | None,
    transformer: str | None,
    device: str | None = None,
    compute: str = "auto",
    dtype: str | None = None,
    *,
    gpus: int = 1,
    offload: bool = False,
    find: Find = hub.resolve,
) -> ServedModel:
    """Find the files of a model.

    Args:
        model_dir: folder, or a name on the Hugging Face hub; None: the small trained model of the
            package.
        transformer: file, folder or name; None: the folder's own.
        device: see `ZImageGenerator`, as are the next three.
        compute: its mode.
        dtype: its dtype.
        gpus: number of GPUs that share each image.
        offload: whether parts are loaded in turn.
        find: returns the path of a name, see `hub.resolve`.

    Raises:
        CheckpointError: a part is missing.
    """
    how = (device, compute, dtype, offload, gpus)
    if model_dir is None:
        return ServedModel(FOLDER.name, examples()[0], FOLDER, TRANSFORMER, *how)
    own = () if transformer else (hub.TRANSFORMER,)
    folder = find(model_dir, (*hub.COMPONENTS, *own))
    file = find(transformer, (hub.TRANSFORMER,)) if transformer else None
    open_parts(folder, file, None, compute)
    name = file.stem if file and file.is_file() else hub.name_of(folder)
    return ServedModel(name, DEFAULT_SIZE, folder, file, *how)
