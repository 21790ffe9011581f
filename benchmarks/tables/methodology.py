"""The tables of docs/methodology.md that show trained weights: the small model's, and MiniLM's."""

from __future__ import annotations

from collections.abc import Callable

from .columns import Column, Row, Rows, label, one, rows_of, table

_TOO = ", modulations too"


def _rows(name: str) -> list[Row]:
    return rows_of("trained", table=name)


def _interval(mean: str, low: str, high: str) -> Callable[[Rows], str]:
    def show(rows: Rows) -> str:
        row = rows[0]
        text = f"{row[mean]:.1f} ({row[low]:.1f} to {row[high]:.1f})" if mean in row else ""
        return text.replace("-0.0", "0.0")

    return show


_NAME = Column("", label("{variant}"), right=False)
_WEIGHTS = Column("weights, relative squared error", label("{weights:.1e}"))
_LATENTS = Column("latents, relative error", label("{latents:.3f}"))
_PSNR = Column("PSNR (dB)", _interval("psnr", "low", "high"))
_WORST = Column("worst", label("{worst:.1f}"))
_GAIN = Column("difference, paired", _interval("gain", "gain_low", "gain_high"))
_IMAGES = (_PSNR, _WORST, Column("SSIM", label("{ssim:.4f}")), Column("FLIP", label("{flip:.3f}")))


def _table(name: str, *columns: Column) -> str:
    return table(_rows(name), ["variant"], [_NAME, *columns])


def formats() -> str:
    def too(rows: Rows) -> str:
        row = one(_rows("formats"), variant=rows[0]["variant"] + _TOO)
        assert row is not None
        return f"{row['psnr']:.1f}"

    rows = [row for row in _rows("formats") if not row["variant"].endswith(_TOO)]
    columns = [
        Column("format", label("{variant}"), right=False),
        Column("bits", label("{bits:.2f}")),
        *(_WEIGHTS, _LATENTS, *_IMAGES, _GAIN),
        Column("PSNR with modulations in it too", too),
    ]
    return table(rows, ["variant"], columns)


def recipes() -> str:
    size = Column("MiB", label("{mib:.1f}"))
    return _table("recipes", size, _LATENTS, *_IMAGES, _GAIN)


def branches() -> str:
    def gain(name: str) -> Callable[[Rows], str]:
        return lambda rows: f"{rows[0][name]:.1f}" if name in rows[0] else ""

    return _table(
        "branches",
        Column("bits", label("{bits:.2f}")),
        _WEIGHTS,
        Column("SNR of the weights, gain", gain("weights_gain")),
        Column("the same on noise", gain("noise_gain")),
        *(_PSNR, _GAIN),
    )


def statistics() -> str:
    columns = [
        Column("", lambda rows: rows[0]["variant"].replace("_", " "), right=False),
        Column("measured", label("{value:.2g}")),
    ]
    return table(_rows("statistics"), ["variant"], columns)


def minilm() -> str:
    everything = rows_of("minilm", weights="all")

    def of_all(rows: Rows) -> str:
        row = one(everything, format=rows[0]["format"])
        assert row is not None
        return f"{row['error']:.1e}"

    columns = [
        Column("format", label("{format}"), right=False),
        Column("bits per weight", label("{bits:.2f}")),
        Column("relative squared error", label("{error:.1e}")),
        Column("SNR (dB)", label("{snr:.1f}")),
        Column(f"the error on all {everything[0]['matrices']} matrices", of_all),
    ]
    return table(rows_of("minilm", weights="encoder"), ["format"], columns)


TABLES: dict[str, Callable[[], str]] = {
    "trained-formats": formats,
    "trained-branches": branches,
    "trained-recipes": recipes,
    "trained-bias": lambda: _table("bias", _LATENTS, *_IMAGES, _GAIN),
    "trained-modes": lambda: _table("modes", _LATENTS, *_IMAGES),
    "trained-steps": lambda: _table("steps", _LATENTS, *_IMAGES),
    "trained-statistics": statistics,
    "minilm": minilm,
}
