"""Images side by side with titles, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _TEXT, _FONT_SIZE = 8, 18, 12  # pixels


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]
) -> Image.Image:
    """Return a picture with a titled column for each list of images, and a caption below each row.

    Args:
        columns: title -> images of the same size, one per row.
        captions: of the rows.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    width, height = next(iter(columns.values()))[0].size
    cell = _GAP + max(width, *(round(font.getlength(title)) for title in columns))
    row = height + _GAP + _TEXT
    sheet = Image.new(
        "RGB", (_GAP + cell * len(columns), _GAP + _TEXT + row * len(captions)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(columns.items()):
        draw.text((_GAP + i * cell, _GAP), title, "black", font)
        for j, image in enumerate(images):
            sheet.paste(image.convert("RGB"), (_GAP + i * cell, _GAP + _TEXT + j * row))
    for j, caption in enumerate(captions):
        draw.text((_GAP, _GAP + _TEXT + j * row + height + 2), caption, "gray", font)
    return sheet
