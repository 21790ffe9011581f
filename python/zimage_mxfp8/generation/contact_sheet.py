"""Images side by side with titles, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE, _FONT_SIZE = 8, 18, 12  # pixels


@dataclass(frozen=True)
class Panel:
    """An image of a contact sheet.

    Attributes:
        image: the image.
        note: a few words below it.
    """

    image: Image.Image
    note: str = ""


def contact_sheet(columns: Mapping[str, Sequence[Panel]], captions: Sequence[str]) -> Image.Image:
    """Return a picture with a titled column for each list of images, and a caption below each row.

    Args:
        columns: title -> images of the same size, one per row.
        captions: of the rows.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    width, height = next(iter(columns.values()))[0].image.size
    cell = _GAP + max(width, *(round(font.getlength(title)) for title in columns))
    row = height + 2 * _LINE + _GAP
    sheet = Image.new(
        "RGB", (_GAP + cell * len(columns), _GAP + _LINE + row * len(captions)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (title, panels) in enumerate(columns.items()):
        left = _GAP + i * cell
        draw.text((left, _GAP), title, "black", font)
        for j, panel in enumerate(panels):
            top = _GAP + _LINE + j * row
            sheet.paste(panel.image.convert("RGB"), (left, top))
            draw.text((left, top + height + 2), panel.note, "black", font)
    for j, caption in enumerate(captions):
        draw.text((_GAP, _GAP + j * row + height + 2 * _LINE), caption, "gray", font)
    return sheet
