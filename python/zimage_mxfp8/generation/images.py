"""Image files: those of the input and generated images."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.output import write_file
from ..errors import CheckpointError, OutputError, UsageError, remedy
from . import infotext
from .png_text import read_texts

if TYPE_CHECKING:
    from PIL.Image import Image

# One key with this package's name: ComfyUI and others interpret keys like "prompt".
METADATA_KEY = "zimage-mxfp8"
_PREVIEW_KEY = "zimage-mxfp8-preview"
_SUFFIX = ".png"
# Of images that clients send: those that browsers show. Others run programs or are rarely tried.
_SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MAX_STEM = 40  # characters of a name made from a prompt


def image_paths(output: Path, batch: int) -> list[Path]:
    """Return the paths of a batch's images: `output` itself for one, else numbered from 0.

    Raises:
        UsageError: if the name is not that of a PNG file.
    """
    if output.name.lower() == _SUFFIX:  # to the system a hidden file without a suffix
        raise UsageError("output", f"{output} has no name before {_SUFFIX}", "give it one")
    if output.suffix.lower() != _SUFFIX:
        raise UsageError("output", f"{output} must end with {_SUFFIX}, the format that is written")
    if batch == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(batch)]


def preview_path(output: Path) -> Path:
    """Return the path of an image's previews."""
    return output.with_name(f"{output.stem}.preview{_SUFFIX}")


def name_from_prompt(prompt: str) -> str:
    """Return the first words of a prompt as a file name without a suffix: letters and digits only.

    Words are shortened to 40 characters in all; "image" if the prompt has no letters.
    """
    # Marks belong to the letters before them, as the vowels of Devanagari do.
    letters = "".join(
        c if c.isalnum() or unicodedata.category(c).startswith("M") else " "
        for c in unicodedata.normalize("NFC", prompt.lower())
    )
    words = [word for word in letters.split() if any(c.isalnum() for c in word)]
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:_MAX_STEM]
        if len(longer) > _MAX_STEM:
            break
        name = longer
    return name or "image"


def free_path(path: Path) -> Path:
    """Return the path itself if it is free, else the first free one of name-2, name-3, ..."""
    names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(each for each in itertools.chain([path], names) if not os.path.lexists(each))


def write_new(path: Path, content: bytes) -> Path:
    """Write a file to the path or, if that is taken, to the next free one, and return which.

    Raises:
        OutputError: it cannot be written.
    """
    while True:
        free = free_path(path)
        try:
            write_file(free, content, overwrite=False)
        except OutputError:
            if not os.path.lexists(free):  # otherwise another process was faster
                raise
        else:
            return free


def png_bytes(image: Image, metadata: Mapping[str, Any]) -> bytes:
    """Return a PNG file, with its settings as JSON under `METADATA_KEY` and as an infotext.

    Args:
        image: the image.
        metadata: see `Generation.metadata`.
    """
    texts = {METADATA_KEY: json.dumps(metadata), infotext.KEY: infotext.write_infotext(metadata)}
    return _png_bytes(image, texts)


def plain_png_bytes(image: Image) -> bytes:
    """Return a PNG file without metadata."""
    return _png_bytes(image, {})


def preview_png_bytes(image: Image) -> bytes:
    """Return a PNG file that says that it is a preview, and nothing else."""
    return _png_bytes(image, {_PREVIEW_KEY: "preview"})


def _png_bytes(image: Image, texts: Mapping[str, str]) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)  # iTXt if it is not Latin-1
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def is_preview(path: Path) -> bool:
    """Return whether a file is a preview: one is left when a program is killed."""
    try:
        return _PREVIEW_KEY in read_texts(path, [_PREVIEW_KEY])
    except CheckpointError:  # another file, or none
        return False


def open_image(source: Path | Image, what: str = "init image") -> Image:
    """Return an image, upright and in RGB: transparent pixels on white, 16 bits as 8.

    Args:
        source: its file, or the image itself.
        what: the image, for the sentences of errors.

    Raises:
        CheckpointError: the file does not exist, Pillow cannot read it, or the pixels have an
            unknown range.
    """
    name = f"the {what} {source}" if isinstance(source, Path) else f"the {what}"
    with _reading(name):
        if isinstance(source, Path):
            return _read(source, name)
        return _upright_rgb(source, name)


def decode_image(content: bytes, what: str, max_pixels: int) -> Image:
    """Return the image of a file's content, upright: PNG, JPEG, WebP, GIF or BMP.

    Args:
        content: the file.
        what: the image, for the sentences of errors.
        max_pixels: most pixels that are accepted; a larger image is refused by its header.

    Raises:
        CheckpointError: it is empty, too large, or not an image of these formats.
    """
    from PIL import Image, UnidentifiedImageError

    name = f"the {what}"
    if not content:
        raise CheckpointError(f"{name} is empty; send another")
    with _reading(name):
        try:
            opened = Image.open(io.BytesIO(content), formats=_SENT_FORMATS)
        except UnidentifiedImageError:
            raise CheckpointError(f"{name} must be a PNG, JPEG, WebP, GIF or BMP file") from None
    with _reading(name), opened:
        if opened.width * opened.height > max_pixels:
            raise CheckpointError(
                f"{name} has {opened.width} x {opened.height} pixels, more than {max_pixels:,}; "
                "scale it down"
            )
        return _upright(opened)


def eight_bits(image: Image) -> Image:
    """Return an image with 16 bits per pixel in 8, and others as they are."""
    from PIL import Image

    if not image.mode.startswith("I;16"):  # which convert would clip at 255
        return image
    levels = (np.asarray(image).astype(np.uint32) + 128) // 257
    return Image.fromarray(levels.astype(np.uint8))


def _read(path: Path, name: str) -> Image:
    from PIL import Image

    if path.exists() and not path.is_file():  # opening a pipe waits for its other end
        raise CheckpointError(f"{name} is not a regular file; name an image file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            return _upright_rgb(opened, name)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (TypeError, AttributeError, LookupError, OverflowError, struct.error):
        # Pillow writes the tags again and does not check them.
        raise ValueError("its EXIF data is damaged") from None


def _upright_rgb(image: Image, name: str) -> Image:
    image = _upright(image)
    if image.mode in ("I", "F"):
        raise CheckpointError(
            f"{name} has 32-bit pixels of unknown range; save it with 8 or 16 bits per channel"
        )
    return _as_rgb(image)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn Pillow's errors into sentences that begin with the image's name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{name} does not exist; check the path") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CheckpointError(f"{name} is too large; scale it down") from None
    except UnidentifiedImageError:
        raise CheckpointError(
            f"{name} has a format unknown to Pillow; save it as PNG or JPEG"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # any error of a damaged file
        cause, what_to_do = str(error), "save it again"
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not Pillow's
            cause, what_to_do = str(error.strerror), remedy(error)
        raise CheckpointError(f"{name} cannot be read: {cause}; {what_to_do}") from None


def _as_rgb(image: Image) -> Image:
    from PIL import Image

    image = eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # convert would show the arbitrary colours of transparent pixels.
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
