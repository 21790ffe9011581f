"""The pairs of images on the page: as a whole in it, or from files beside it, with previews."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..pages.markup import element, text
from .report import EvaluationReport, ImagePair
from .wording import psnr_text, shortened

_FOLDER = Path(__file__).parent
STYLES, SCRIPTS = ((_FOLDER / f"pairs.{kind}").read_text("utf-8") for kind in ("css", "js"))
_MAX_SHOWN = 100  # pairs; a page with more is large even without images
_SMALL = 256  # pixels up to which images are enlarged without smoothing
_PREVIEW = 256  # pixels of the longer side
_PREVIEW_QUALITY = 85
_MODES = (
    ("side", "Side by side", "true"),
    ("slider", "Slider", "false"),
    ("flicker", "Flicker", "false"),
    ("difference", "Difference x 8", "false"),
)
_WHOLE = "The images are in this page, and as files in the folder images/."
_FILES = "The images are the files in the folder images/ beside this page."
_ALONE = (
    "The folder images/ is not beside this page. Images are previews of at most "
    f"{_PREVIEW} pixels, whose compression shows in their difference, or missing."
)


@dataclass(frozen=True)
class Pairs:
    """The pairs of lowest PSNR, with buttons for the ways to compare them.

    Without scripts they are side by side.

    Attributes:
        report: the evaluation.
        names: addresses of A's and B's image of each pair of the report, relative to the page.
        room: bytes that images may add to the page. If all fit, they are in it; otherwise it shows
            the files, and has previews for a page without its folder, as long as they fit.
    """

    report: EvaluationReport
    names: Sequence[tuple[str, str]]
    room: int = 0

    def html(self) -> str:
        """Return the block as HTML."""
        shown = sorted(zip(self.report.pairs, self.names, strict=True), key=lambda x: x[0].psnr)
        shown = shown[:_MAX_SHOWN]
        files = [_figure(pair, names) for pair, names in shown]
        figures = self._fitting(files, (_figure(pair, _whole(pair)) for pair, _ in shown))
        if is_whole := len(figures) == len(files):
            words = _WHOLE
        else:
            words = _FILES
            figures = self._fitting(
                files, (_figure(pair, names, _previews(pair)) for pair, names in shown)
            )
            figures += files[len(figures) :]
        if len(files) < len(self.report.pairs):
            words = f"These are the {len(files):,} pairs of lowest PSNR. {words}"
        buttons = "".join(
            element("button", label, type="button", data_mode=mode, aria_pressed=pressed)
            for mode, label, pressed in _MODES
        )
        tools = element("div", buttons, class_="tools", role="group", aria_label="View")
        notes = element("p", words, class_="where")
        if not is_whole:
            notes += element("p", _ALONE, class_="alone", hidden=True)
        is_small = max(self.report.height, self.report.width) <= _SMALL
        return element(
            "div",
            tools + notes + element("div", "\n".join(figures), class_="figures"),
            class_="pairs small" if is_small else "pairs",
            data_mode="side",
        )

    def _fitting(self, files: Sequence[str], larger: Iterable[str]) -> list[str]:
        """Return the first of the larger figures, as many as there is room for."""
        room, found = self.room, []
        for file, figure in zip(files, larger, strict=True):
            room -= len(figure) - len(file)
            if room < 0:
                break
            found.append(figure)
        return found


def _figure(
    pair: ImagePair, sources: tuple[str, str], previews: tuple[str, str] | None = None
) -> str:
    prompt = shortened(pair.prompt)
    caption = element("span", text(prompt), class_="prompt")
    figures = f"seed {pair.seed} · {_figures_of(pair)}"
    a, b = (
        element(
            "img",
            alt=name,
            src=sources[i],
            loading=None if sources[i].startswith("data:") else "lazy",
            class_=name.lower(),
            data_preview=previews and previews[i],
        )
        for i, name in enumerate("AB")
    )
    slider = element(
        "input", type="range", min="0", max="100", value="50", aria_label="A to the left, B"
    )
    stage = element("div", b + a + slider, class_="stage")
    return element("figure", stage + element("figcaption", caption + element("span", figures)))


def _figures_of(pair: ImagePair) -> str:
    return f"PSNR {psnr_text(pair.psnr)} · SSIM {pair.ssim:.4f} · FLIP {pair.flip:.4f}"


def _whole(pair: ImagePair) -> tuple[str, str]:
    return _embedded(pair.image, "png"), _embedded(pair.against, "png")


def _previews(pair: ImagePair) -> tuple[str, str]:
    return _preview(pair.image), _preview(pair.against)


def _preview(png: bytes) -> str:
    image = Image.open(io.BytesIO(png))
    image.thumbnail((_PREVIEW, _PREVIEW))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_PREVIEW_QUALITY)
    return _embedded(file.getvalue(), "jpeg")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
