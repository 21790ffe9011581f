"""Picture files: the one to start from, and those that were made."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

# One key with a name of our own: ComfyUI and others give keys like "prompt" a meaning.
METADATA_KEY = "zimage-mxfp8"
_SUFFIX = ".png"


def picture_paths(output: Path, batch: int) -> list[Path]:
    """Where the pictures of a batch go: `output` itself if it is one, else numbered from 0.

    Raises:
        UsageError: the name is not that of a PNG file.
    """
    if output.name.lower() == _SUFFIX:  # to the system a hidden file without a suffix
        raise UsageError(f"the output {output} has no name before {_SUFFIX}; give it one")
    if output.suffix.lower() != _SUFFIX:
        raise UsageError(f"the output {output} must end with {_SUFFIX}, which is what is written")
    if batch == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(batch)]


def png_bytes(image: Image, metadata: Mapping[str, Any]) -> bytes:
    """A PNG file; the metadata is JSON in a tEXt chunk, under `METADATA_KEY`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def open_init_image(path: Path) -> Image:
    """Read a picture, upright and in RGB: transparent pixels on white, 16 bits as 8.

    Raises:
        CheckpointError: there is no such file, it is no picture that Pillow reads, or one whose
            numbers have no fixed black and white.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for its other end
            raise CheckpointError(f"the init image {path} is no regular file; name a picture file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
        if picture.mode in ("I", "F"):
            raise CheckpointError(
                f"the init image {path} has 32-bit pixels, whose black and white nothing tells; "
                "save it with 8 or 16 bits per channel"
            )
        return _as_rgb(picture)
    except FileNotFoundError:
        raise CheckpointError(f"the init image {path} does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CheckpointError(f"the init image {path} is too large; scale it down") from None
    except UnidentifiedImageError:
        raise CheckpointError(f"the init image {path} is in no format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError) as error:  # whatever a damaged file leads to
        raise CheckpointError(f"the init image {path} cannot be read: {error}") from None


def _as_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I;16"):  # convert would clip at 255
        levels = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        # convert would show the colours that transparent pixels happen to have.
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")
