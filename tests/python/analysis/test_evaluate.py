"""Images of two transformers: metrics against plain arithmetic, the gate, the page, bad input."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.browser import Browser
from helpers.checkpoints import random_tensors
from helpers.commands import Run, fails, only
from helpers.damaged_models import SWAPPED, corrupt_scales, round_to_nvfp4, with_nvfp4_error
from helpers.images import levels
from zimage_mxfp8.analysis.evaluate import page as page_module
from zimage_mxfp8.analysis.evaluate.metrics import compare_images, summarize
from zimage_mxfp8.analysis.evaluate.prompts import MAX_CHARACTERS, read_prompts
from zimage_mxfp8.analysis.evaluate.weights import LayerDifference, WeightComparison
from zimage_mxfp8.analysis.pages.page import Page, render_page
from zimage_mxfp8.streaming.jobs import StageProgress
from zimage_mxfp8.zimage.layers import zimage_shapes

PROMPTS = ["a red fox", "a <b>blue</b> & green house"]
SEEDS = [3, 11]
SETTINGS: dict[str, Any] = {"steps": 2, "size": (32, 48), "device": "cpu", "dtype": "float32"}
SMALL = ("--size", 32, "--steps", 1, "--seeds", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def report(zimage_folder: Path, zimage_quantized: Path) -> zm.EvaluationReport:
    return zm.evaluate(
        zimage_folder, zimage_quantized, prompts=PROMPTS, seeds=SEEDS, min_psnr=10, **SETTINGS
    )


@pytest.fixture
def evaluate(
    zimage_folder: Path, in_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """`zimage-mxfp8 evaluate` in this process and in `tmp_path`, for one pair of small images."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # the command sets them, and this restores them
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    (tmp_path / "p.txt").write_text("a red fox\n")

    def run(*options: object) -> Any:
        given = [
            ("--model-dir", zimage_folder),
            ("--prompts", "p.txt"),
            *zip(SMALL[::2], SMALL[1::2], strict=True),
        ]
        words = [word for pair in given if pair[0] not in options for word in pair]
        return in_process("evaluate", *words, *options)

    return run


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


# ---- images and latents


def test_images_are_those_of_the_generator(
    report: zm.EvaluationReport, zimage_folder: Path, zimage_quantized: Path
) -> None:
    assert [(pair.prompt, pair.seed) for pair in report.pairs] == [
        (prompt, seed) for prompt in PROMPTS for seed in SEEDS
    ]
    pair = report.pairs[3]
    settings = zm.GenerationSettings(pair.prompt, steps=2, height=32, width=48, seed=pair.seed)
    for png, transformer in ((pair.image, zimage_quantized), (pair.against, None)):
        generator = zm.ZImageGenerator(zimage_folder, transformer, "cpu", dtype="float32")
        assert np.array_equal(levels(opened(png)), levels(generator.generate(settings).images[0]))


def test_latents_are_those_of_diffusers(
    report: zm.EvaluationReport, zimage_folder: Path, zimage_quantized: Path
) -> None:
    kept: list[list[torch.Tensor]] = []
    for transformer in (zimage_quantized, zimage_folder / "transformer"):
        model = zm.ZImageTransformer.from_checkpoint(
            transformer, "cpu", "weight-only", torch.float32
        )
        pipeline = ZImagePipeline.from_pretrained(zimage_folder, transformer=model)
        pipeline.set_progress_bar_config(disable=True)
        steps: list[torch.Tensor] = []
        pipeline(
            PROMPTS[1],
            **{"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 0.0},
            generator=torch.Generator().manual_seed(SEEDS[0]),
            callback_on_step_end=lambda _p, _i, _t, x, to=steps: to.append(x["latents"]) or {},
        )
        kept.append(steps)
    want = [float((a - b).norm() / b.norm()) for a, b in zip(*kept, strict=True)]
    assert report.pairs[2].latent_errors == pytest.approx(want, rel=1e-3)
    assert 1e-4 < want[0] < 1
    by_step = [pair.latent_errors[1] for pair in report.pairs]
    assert report.latent_errors[1].mean == pytest.approx(sum(by_step) / 4)
    assert report.latent_errors[1].worst == max(by_step)


def test_one_transformer_is_in_memory_at_a_time(
    zimage_folder: Path, zimage_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from zimage_mxfp8.generation import generator as module

    order: list[str] = []
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    for name in ("TextEncoder", "VAE"):
        real = getattr(module, name)

        def load(*arguments: object, real: Any = real, name: str = name) -> object:
            part = real(*arguments)
            order.append(f"{name} with {len(alive)}")
            if name == "TextEncoder":
                alive.add(part)
            return part

        monkeypatch.setattr(module, name, load)
    from_checkpoint = zm.ZImageTransformer.from_checkpoint

    def load_transformer(path: Path, *arguments: object, **options: object) -> object:
        model = from_checkpoint(path, *arguments, **options)
        order.append(f"transformer with {len(alive)}")
        alive.add(model)
        return model

    monkeypatch.setattr(zm.ZImageTransformer, "from_checkpoint", load_transformer)
    zm.evaluate(
        zimage_folder,
        zimage_quantized,
        prompts=["a", "b"],
        **{**SETTINGS, "steps": 1, "size": (32, 32)},
    )
    expected = ["TextEncoder with 0", "transformer with 0", "VAE with 1"]
    assert order == [*expected, *expected[1:]]  # once for all prompts, seeds and images


# ---- metrics


def gaussian_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al.'s index of one channel, window by window."""
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + c1)
                * (2 * both + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(found))


def two_images(noise: float) -> tuple[Image.Image, Image.Image]:
    rng = np.random.default_rng(5)
    smooth = np.array(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((20, 16)))
    noisy = np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), Image.fromarray(smooth)


def test_psnr_and_ssim_are_plain_arithmetic() -> None:
    image, reference = two_images(12)
    a, b = levels(image).astype(float), levels(reference).astype(float)
    found = compare_images(image, reference)
    error = sum((x - y) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    want = np.mean([gaussian_ssim(a[..., c], b[..., c]) for c in range(3)])
    assert found.ssim == pytest.approx(want, abs=1e-9)
    assert 0.3 < found.ssim < 0.98


def test_flip_grows_with_the_difference() -> None:
    found = [compare_images(*two_images(noise)).flip for noise in (1, 4, 16)]
    assert 0 < found[0] < found[1] < found[2] < 1
    black, white = (Image.new("RGB", (32, 32), level) for level in ("black", "white"))
    assert compare_images(black, white).flip > 0.9


def test_equal_images() -> None:
    image, _ = two_images(12)
    assert compare_images(image, image.copy()) == type(compare_images(image, image))(math.inf, 1, 0)


ANY = (-math.inf, math.inf)


def test_intervals_end_where_the_metric_does() -> None:
    found = summarize([0.01, 0.2], high_is_good=False, limits=(0, 1))
    assert found.low == 0 and found.high == 1  # Student's t alone: -1.1 to 1.3
    assert found.mean == pytest.approx(0.105)


def test_summaries() -> None:
    found = summarize([4.0, 1.0, 3.0, 2.0], high_is_good=True, limits=ANY)
    # The table of Student's t has 3.182446 for 3 degrees of freedom and 97.5 %.
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.worst) == (2.5, 1.0)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert summarize([4.0, 1.0], high_is_good=False, limits=ANY).worst == 4.0
    assert summarize([4.0], high_is_good=True, limits=ANY).low is None
    some = summarize([math.inf, 30.0, 20.0], high_is_good=True, limits=ANY)
    assert (some.mean, some.worst) == (25.0, 20.0)  # an equal pair hides no other
    assert summarize([math.inf] * 2, high_is_good=True, limits=ANY).mean == math.inf


def test_metrics_of_the_report_are_those_of_its_images(report: zm.EvaluationReport) -> None:
    for pair in report.pairs:
        a, b = (levels(opened(png)).astype(float) for png in (pair.image, pair.against))
        assert a.shape == (32, 48, 3)
        assert pair.psnr == pytest.approx(10 * math.log10(255**2 / ((a - b) ** 2).mean()))
        assert 15 < pair.psnr < 70
    assert report.psnr.mean == pytest.approx(np.mean([pair.psnr for pair in report.pairs]))
    assert report.psnr.worst == min(pair.psnr for pair in report.pairs)
    assert report.flip.worst == max(pair.flip for pair in report.pairs)


# ---- the report


def test_the_report_in_words_and_numbers(
    report: zm.EvaluationReport, zimage_quantized: Path
) -> None:
    assert report.ok and "Passed: all thresholds are reached." in str(report)
    assert re.fullmatch(r"EvaluationReport\('.+', 4 pairs, PSNR \d+\.\d\d dB\)", repr(report))
    text = str(report)
    for part in (f"{report.psnr.mean:.2f}", f"{report.ssim.worst:.4f}", PROMPTS[1], "weight-only"):
        assert part in text
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["metrics"]["psnr"]["mean"] == report.psnr.mean
    assert document["thresholds"] == {
        "min_psnr": 10.0,
        "min_ssim": None,
        "max_flip": None,
        "max_weight_error": 0.005,
    }
    assert [pair["latent_errors"] for pair in document["pairs"]] == [
        list(pair.latent_errors) for pair in report.pairs
    ]
    assert 0 < report.a.nbytes < report.b.nbytes and report.a.path == str(zimage_quantized)
    weights = document["weights"]
    assert weights["relative_squared_error"] == report.weights.relative_squared_error
    assert {layer["a"] for layer in weights["layers"]} == {"F32", "MXFP8"}
    assert f"a relative squared error of {weights['relative_squared_error']:.2e}, " in text
    errors = {layer["name"]: layer["relative_squared_error"] for layer in weights["layers"]}
    assert errors[weights["worst"]] == max(errors.values()) and weights["not_comparable"] == []
    assert f"{max(errors.values()):.2e} in the worst, {weights['worst']} (threshold of" in text
    for run in (report.a, report.b):
        assert run.step_seconds > 0
        assert run.peak_nbytes is None or run.peak_nbytes > run.nbytes


def test_progress_counts_every_step(zimage_folder: Path) -> None:
    seen: list[StageProgress] = []
    zm.evaluate(
        zimage_folder,
        zimage_folder / "transformer",
        prompts=["a"],
        **{**SETTINGS, "size": (32, 32)},
        progress=seen.append,
    )
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].stage) == (8, 8, "done")  # 2 x 2 seeds x 2
    assert {each.done for each in seen} == set(range(9))
    stages = {each.stage for each in seen}
    assert {"making images with A", "making images with B", "comparing the weights"} < stages
    assert "weights: 100 %" in {each.what for each in seen}


# ---- the folder and its page


@pytest.fixture(scope="module")
def saved(report: zm.EvaluationReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "out"
    report.save(folder)
    return folder


def test_the_folder_holds_everything(saved: Path, report: zm.EvaluationReport) -> None:
    only(saved, "images", "evaluate.html", "evaluate.json")
    document = json.loads((saved / "evaluate.json").read_text("utf-8"))
    assert len(list((saved / "images").iterdir())) == 8
    for entry, pair in zip(document["pairs"], report.pairs, strict=True):
        assert (saved / entry["image"]).read_bytes() == pair.image
        assert (saved / entry["against"]).read_bytes() == pair.against
    with pytest.raises(zm.OutputError, match="exists; `overwrite=True`"):
        report.save(saved)


PAGE = """
const pairs = document.querySelector('.pairs'), result = {};
const stages = [...pairs.querySelectorAll('.stage')];
const images = [...pairs.querySelectorAll('img')];
await Promise.all(images.map((image) => image.decode()));
result.sizes = images.map((image) => [image.naturalWidth, image.naturalHeight]);
result.prompts = [...pairs.querySelectorAll('.prompt')].map((prompt) => prompt.textContent);
result.tiles = [...document.querySelectorAll('.tile')].map((tile) => tile.textContent);
const box = (element) => element.getBoundingClientRect();
const press = (mode) => pairs.querySelector(`button[data-mode=${mode}]`).click();
const a = stages[0].querySelector('.a'), b = stages[0].querySelector('.b');
result.side = box(a).right <= box(b).left + 1;
press('slider');
const slider = stages[0].querySelector('input');
slider.value = '25';
slider.dispatchEvent(new Event('input'));
result.slider = [box(a).left === box(b).left, getComputedStyle(a).clipPath,
                 box(slider).height === box(stages[0]).height];
press('flicker');
result.flicker = [];
for (let i = 0; i < 2; i++) {
  stages[0].click();
  result.flicker.push(getComputedStyle(a).visibility);
}
press('difference');
result.difference = getComputedStyle(a).mixBlendMode;
result.wide = document.documentElement.scrollWidth > innerWidth;
return result;
"""


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_the_page_in_a_browser(
    saved: Path, report: zm.EvaluationReport, tmp_path: Path, width: int, dark: bool
) -> None:
    page = tmp_path / "alone.html"  # without the images' files
    shutil.copy(saved / "evaluate.html", page)
    browser = Browser(tmp_path)
    try:
        with browser.open(page, width=width, dark=dark) as tab:
            found = tab.run(PAGE)
            assert tab.console() == []
            assert [url for url in tab.requests() if url.startswith(("http", "file"))] == [
                page.as_uri()
            ]
    finally:
        browser.close()
    assert found["sizes"] == [[48, 32]] * 8
    assert found["prompts"] == [pair.prompt for pair in report.worst_first]
    assert len(found["tiles"]) == 5 and f"{report.psnr.mean:.2f} dB" in found["tiles"][0]
    assert found["side"] and not found["wide"]
    assert found["slider"] == [True, "inset(0px 75% 0px 0px)", True]
    assert sorted(found["flicker"]) == ["hidden", "visible"]
    assert found["difference"] == "difference"


def large(report: zm.EvaluationReport, pairs: int, **changes: Any) -> zm.EvaluationReport:
    """The report with more pairs, of noise that no PNG makes smaller."""
    rng = np.random.default_rng(0)
    noise = []
    for _ in range(2):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (384, 288, 3), np.uint8)).save(file, "PNG")
        noise.append(file.getvalue())
    pair = replace(report.pairs[0], image=noise[0], against=noise[1], **changes)
    many = tuple(replace(pair, seed=i, psnr=20 + i / 1000) for i in range(pairs))
    return replace(report, pairs=many, height=384, width=288)


LARGE = """
const images = [...document.querySelectorAll('.pairs img')];
for (const image of images) image.loading = 'eager';
// A broken image is complete before its error event, which sets the preview.
const isSettled = (image) => image.naturalWidth ||
  (image.complete && !image.dataset.preview && !image.src.startsWith('data:'));
for (let i = 0; i < 100 && !images.every(isSettled); i++) {
  await new Promise((resolve) => setTimeout(resolve, 50));
}
const note = document.querySelector('.alone');
return { sizes: images.map((image) => [image.naturalWidth, image.naturalHeight]),
         note: note.getClientRects().length ? note.textContent : '',
         where: document.querySelector('.where').textContent };
"""


def test_large_images_come_from_the_folder_or_as_previews(
    report: zm.EvaluationReport, tmp_path: Path
) -> None:
    large(report, 12).save(tmp_path / "out")
    page = tmp_path / "alone.html"
    shutil.copy(tmp_path / "out" / "evaluate.html", page)
    assert 600_000 < page.stat().st_size <= 1_000_000
    browser = Browser(tmp_path)
    try:
        with browser.open(tmp_path / "out" / "evaluate.html") as tab:
            beside = tab.run(LARGE)
        with browser.open(page) as tab:
            alone = tab.run(LARGE)
            errors = [message for message in tab.console() if "ERR_FILE_NOT_FOUND" not in message]
            assert errors == []
    finally:
        browser.close()
    assert beside["sizes"] == [[288, 384]] * 24 and beside["note"] == ""
    assert "the files in the folder images/ beside this page" in beside["where"]
    count = alone["sizes"].count([192, 256])
    assert 4 <= count < 24 and alone["sizes"] == [[192, 256]] * count + [[0, 0]] * (24 - count)
    assert "The folder images/ is not beside this page." in alone["note"]


@pytest.mark.parametrize("prompt", ['"' * 10_000, "狐" * 10_000, "\U0010ffff" * 10_000])
def test_the_page_stays_small(report: zm.EvaluationReport, prompt: str) -> None:
    everything = large(report, 1000, prompt=prompt)
    names = [(f"images/{i:09}-a.png", f"images/{i:09}-b.png") for i in range(1000)]
    page = page_module.evaluation_page(everything, names)
    assert len(page.encode()) <= 1_000_000
    assert "These are the 100 pairs of lowest PSNR." in page and page.count("<figure>") == 100
    assert "The 300 pairs of lowest PSNR; evaluate.json has all 1,000." in page
    assert "<dd>0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (1,000)</dd>" in page


# ---- the weights on the page


def words_of_the_map(report: zm.EvaluationReport) -> str:
    page = page_module.evaluation_page(report, [("a", "b")] * len(report.pairs))
    section = page[page.index("<h2>The network</h2>") :]
    return section[: section.index("</section>")]


def with_weights(
    report: zm.EvaluationReport, change: Callable[[LayerDifference], LayerDifference]
) -> zm.EvaluationReport:
    weights = report.weights
    return replace(report, weights=replace(weights, layers=tuple(map(change, weights.layers))))


def test_one_file_in_two_modes_has_equal_weights(report: zm.EvaluationReport) -> None:
    equal = with_weights(report, lambda layer: replace(layer, squared_error=0.0))
    both = replace(equal, b=replace(report.a, compute="mxfp8-emulated"))
    text = words_of_the_map(both)
    assert "A and B are one file, so their weights are equal" in text
    assert "from the compute modes, weight-only and mxfp8-emulated" in text
    assert 'type="range"' not in text and "cell kept" in text and "no error" in text
    assert "All weight matrices of A and B are equal once they are decoded" in words_of_the_map(
        equal
    )
    assert "no difference (threshold of each: 0.005)." in str(equal)


def test_nothing_is_kept_of_a_file_that_quantises_nothing(report: zm.EvaluationReport) -> None:
    plain = with_weights(report, lambda layer: replace(layer, a_format="BF16", b_format="MXFP8"))
    text = words_of_the_map(plain)
    assert "A quantises no layer of a block that differs from B" in text
    assert 'type="range"' not in text
    assert text.count('class="cell"') == 0 < text.count('class="cell kept"')


def test_layers_that_cannot_be_compared_are_empty(report: zm.EvaluationReport) -> None:
    name = "layers.1.attention.qkv.weight"
    some = with_weights(
        report,
        lambda layer: (
            replace(layer, squared_error=None, squared_signal=0.0, b_format=None)
            if layer.name == name
            else layer
        ),
    )
    text = words_of_the_map(some)
    assert "Empty where a file lacks the layer or has it in another shape." in text
    assert '"not comparable"' in text and '"no such layer"' in text
    assert "not comparable" not in words_of_the_map(report)
    assert some.to_dict()["weights"]["layers"][-1]["relative_squared_error"] is not None


# ---- the gate

MIN_PSNR = 36.0  # between the sound file and the damaged ones, for these random weights


def test_equal_transformers_pass(evaluate: Run, zimage_quantized: Path, tmp_path: Path) -> None:
    files = ("--transformer", zimage_quantized, "--against", zimage_quantized)
    limits = ("--min-psnr", 200, "--min-ssim", 1, "--max-flip", 0, "--max-weight-error", 0)
    (tmp_path / "probe.html").write_text(render_page(Page("probe", "", "", [], [], [])), "utf-8")
    result = evaluate(*files, *limits, "-o", "out")
    assert result.returncode == 0, result.stderr
    assert '<a href="out/evaluate.html">' in (tmp_path / "probe.html").read_text("utf-8")
    assert '<a href="../probe.html">' in (tmp_path / "out" / "evaluate.html").read_text("utf-8")
    assert "All pairs are equal." in result.stdout
    document = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert document["equal_pairs"] == 1 and document["metrics"]["psnr"]["mean"] is None
    assert document["ok"] and document["pairs"][0]["latent_errors"] == [0.0]


def test_a_sound_file_passes(evaluate: Run, zimage_quantized: Path, tmp_path: Path) -> None:
    """Also the threshold of the weights, which is there without an option."""
    result = evaluate("--transformer", zimage_quantized, "--min-psnr", MIN_PSNR, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["failures"] == []
    only(tmp_path, "p.txt")


@pytest.mark.parametrize("damage", [corrupt_scales, with_nvfp4_error])
def test_damaged_files_fail(
    evaluate: Run, zimage_folder: Path, tmp_path: Path, damage: Any
) -> None:
    damage(zimage_folder, tmp_path / "bad.safetensors")
    options = ("--transformer", "bad.safetensors", "--max-weight-error", "none")
    result = evaluate(*options, "--min-psnr", MIN_PSNR, "-o", "out")
    assert result.returncode == 1
    assert re.search(
        r"^zimage-mxfp8: error: the mean PSNR is [\d.]+ dB, below 36 dB$",
        result.stderr.splitlines()[-1],
    )
    assert "Failed: the mean PSNR" in result.stdout
    only(tmp_path / "out", "images", "evaluate.html", "evaluate.json")  # needed most then
    # The weights alone stop it against the original, without any option.
    result = evaluate("--transformer", "bad.safetensors")
    assert result.returncode == 1
    layer = "|".join(SWAPPED) if damage is corrupt_scales else ".+"
    assert re.search(
        rf"error: the relative squared error of (?:{layer})\.weight is [\d.]+, above 0\.005, "
        r"and that of \d+ other(?:s| weight matrix) too$",
        result.stderr.splitlines()[-1],
    )
    if damage is corrupt_scales:  # which nothing but the images or the original can show
        assert zm.validate(tmp_path / "bad.safetensors").ok


def test_nvfp4_of_the_helper_has_the_known_error() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    error = ((round_to_nvfp4(weight) - weight) ** 2).sum() / (weight**2).sum()
    assert 0.008 < float(error) < 0.010  # of normal numbers: 13 times that of MXFP8


def test_weights_without_a_counterpart_fail(report: zm.EvaluationReport) -> None:
    names = ("layers.1.attention.qkv.weight", "layers.1.attention.out.weight")
    some = with_weights(
        report,
        lambda layer: (
            replace(layer, squared_error=None, squared_signal=0.0, b_format=None)
            if layer.name in names
            else layer
        ),
    )
    problem = (
        "2 weight matrices, such as layers.1.attention.out.weight, have no counterpart of the same "
        "shape, so the error of the weights is not known"
    )
    assert report.ok and some.failures == (problem,) and not some.ok
    assert f"Failed: {problem}." in str(some)
    assert some.to_dict()["weights"]["not_comparable"] == sorted(names)
    page = page_module.evaluation_page(some, [("a", "b")] * len(some.pairs))
    assert '<article class="tile bad">' in page
    without = replace(some, thresholds=replace(some.thresholds, max_weight_error=None))
    assert without.ok


def test_the_tile_of_the_weights_has_the_verdict(report: zm.EvaluationReport) -> None:
    def tile(limit: float | None) -> str:
        limits = replace(report.thresholds, max_weight_error=limit)
        page = page_module.evaluation_page(
            replace(report, thresholds=limits), [("a", "b")] * len(report.pairs)
        )
        (found,) = re.findall(
            r'<article class="tile (\w+)"><h2>Squared error of the worst weights(.*?)</article>',
            page,
        )
        return " ".join(found).replace("<wbr>", "")

    errors = [layer.relative_squared_error or 0 for layer in report.weights.layers]
    name = report.weights.layers[errors.index(max(errors))].name
    assert tile(0.005).startswith("good")
    of_all = f"{100 * report.weights.relative_squared_error:.4f} %"
    shown = re.sub("<.*?>", " ", tile(0.005))
    assert re.search(
        rf"{100 * max(errors):.4f} % +{name}; of all {of_all}; threshold 0.5 %;", shown
    )
    assert tile(max(errors) * 0.99).startswith("bad")
    assert tile(None).startswith("none") and "no threshold" in tile(None)


def test_every_threshold_is_named() -> None:
    from zimage_mxfp8.analysis.evaluate.report import ImagePair, TransformerRun
    from zimage_mxfp8.analysis.evaluate.thresholds import Thresholds

    run = TransformerRun("a", "weight-only", 1, 1.0, None)
    pair = ImagePair("a", 0, 20.0, 0.8, 0.3, (0.1,), b"", b"")
    layers = tuple(
        LayerDifference(name, (32, 32), "MXFP8", "BF16", 1056, error, 100.0)
        for name, error in (("a.weight", 1.0), ("b.weight", 2.0), ("c.weight", 0.0))
    )
    found = zm.EvaluationReport(
        "m",
        run,
        run,
        WeightComparison(layers, 1),
        (pair,),
        Thresholds(30, 0.9, 0.1, 0.015),
        1,
        16,
        16,
        0.0,
        "cpu",
        "float32",
        (),
    )
    assert found.failures == (
        "the mean PSNR is 20.00 dB, below 30 dB",
        "the mean SSIM is 0.8000, below 0.9",
        "the mean FLIP is 0.3000, above 0.1",
        "the relative squared error of b.weight is 0.02, above 0.015",
    )
    both = replace(found, thresholds=Thresholds(max_weight_error=0.005))
    assert both.failures == (
        "the relative squared error of b.weight is 0.02, above 0.005, and that of 1 other weight "
        "matrix too",
    )
    assert replace(found, thresholds=Thresholds(20, 0.8, 0.3, 0.02)).ok
    assert "No threshold was given." in str(
        replace(found, thresholds=Thresholds(max_weight_error=None), steps=2)
    )


# ---- bad input


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the prompts file p.txt has no prompts"),
        (b"# only\n\n   \n", "the prompts file p.txt has no prompts"),
        (b"a\nb\xff\n", "line 2 of the prompts file p.txt is not UTF-8 text"),
        (b"a\n\n" + b"x" * (MAX_CHARACTERS + 1), "line 3 of the prompts file p.txt has 10,001"),
        (
            b"".join(b"%d\n" % i for i in range(600)),
            "--prompts and seeds make 1,200 pairs of images, and 1,000 are allowed",
        ),
    ],
)
def test_bad_prompts(
    evaluate: Run, zimage_quantized: Path, tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    result = evaluate("--transformer", zimage_quantized, "-o", "out", "--seeds", 0, 1)
    fails(result, 2 if "pairs" in problem else 1, problem)
    only(tmp_path, "p.txt")


def test_a_missing_prompts_file(evaluate: Run, zimage_quantized: Path, tmp_path: Path) -> None:
    result = evaluate("--transformer", zimage_quantized, "--prompts", "none.txt")
    fails(result, 1, "the prompts file none.txt does not exist")
    result = evaluate("--transformer", zimage_quantized, "--prompts", ".")
    fails(result, 1, "the prompts file . is not a regular file")


def test_prompts_with_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff# first\r\n  ein Fuchs, rötlich \r\n\r\nb # c".encode())
    assert read_prompts(tmp_path / "p.txt") == ["ein Fuchs, rötlich", "b # c"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (("--min-psnr", "nan"), 2, "--min-psnr must be a finite number, not nan"),
        (("--min-psnr", "inf"), 2, "--min-psnr must be a finite number, not inf"),
        (("--min-psnr", "-1"), 2, "--min-psnr must be 0 or more, not -1"),
        (("--min-ssim", "1.5"), 2, "--min-ssim must be 0 to 1, not 1.5"),
        (("--max-flip", "2"), 2, "--max-flip must be 0 to 1, not 2"),
        (("--max-flip", "x"), 2, "--max-flip"),
        (("--max-weight-error", "nan"), 2, "--max-weight-error must be a finite number, not nan"),
        (("--max-weight-error", "-1"), 2, "--max-weight-error must be 0 or more, not -1"),
        (("--max-weight-error", "x"), 2, '--max-weight-error: must be a number or none, not "x"'),
        (("--size", "40"), 2, "--size must be a multiple of 16 up to 8192, not 40"),
        (("--steps", "1001"), 2, "--steps must be 1 to 1000, not 1001"),
        (("--seeds", "1", "1"), 2, "--seeds must be different, but 1 is there more"),
        (("--seeds", str(2**63)), 2, "--seeds must be 0 or more, and below 2^63"),
        (("--guidance", "-1"), 2, "--guidance must be 0 to 100, not -1.0"),
        (("--compute", "mxfp8"), 1, "compute mode mxfp8: "),
        (("--against-compute", "fp8"), 2, "--against-compute fp8 is for MXFP8 checkpoints"),
        (("--model-dir", "none"), 1, "none does not exist"),
        (("--transformer", "none.safetensors"), 1, "none.safetensors does not exist"),
        (("--against", "p.txt"), 1, "p.txt"),
        (("-o", "none/out"), 1, "for none/out does not exist; create it first"),
        (("-o", "p.txt"), 1, "the output p.txt is a file; move it away, or name another folder"),
    ],
)
def test_bad_options(
    evaluate: Run,
    zimage_quantized: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    problem: str,
) -> None:
    own = () if "--transformer" in options else ("--transformer", zimage_quantized)
    fails(evaluate(*own, *options), code, problem)
    only(tmp_path, "p.txt")


def test_transformers_of_other_models(
    evaluate: Run, zimage_quantized: Path, tmp_path: Path
) -> None:
    shapes = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=64, hidden=18)
    save_file(random_tensors(shapes), tmp_path / "wide.safetensors")
    for option in ("--transformer", "--against"):
        own = () if option == "--transformer" else ("--transformer", zimage_quantized)
        result = evaluate(*own, option, "wide.safetensors", "-o", "out")
        fails(result, 1, "takes captions of ", "they belong to different models")
    save_file({"lora_A": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    result = evaluate("--transformer", "other.safetensors", "-o", "out")
    fails(result, 1, "other.safetensors")
    only(tmp_path, "other.safetensors", "p.txt", "wide.safetensors")


def test_a_folder_without_a_transformer(
    evaluate: Run, zimage_quantized: Path, turbo: Path, tmp_path: Path
) -> None:
    options = ("--model-dir", "Z-Image-Turbo", "--transformer", "Z-Image-Turbo-mxfp8.safetensors")
    result = evaluate(*options)
    fails(result, 1, "has no transformer/ to compare with; name a file with --against")


def test_an_output_folder_with_other_content(
    evaluate: Run, zimage_quantized: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    result = evaluate("--transformer", zimage_quantized, "-o", "out", "--overwrite")
    fails(result, 1, "the output out has other content (mine.txt), which would be lost")
    only(tmp_path / "out", "mine.txt")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"prompts": "a fox"}, "^prompts must be a list of texts, not 'a fox'"),
        ({"prompts": []}, r"^prompts must be a list of texts, not \[\]"),
        ({"prompts": [3]}, "^prompts must be a text, not 3"),
        (
            {"prompts": ["a", "b", "a"]},
            "^prompts must be different, but 'a' is there more than once",
        ),
        (
            {"against_compute": "fp8"},
            '^against_compute fp8 is .* use `against_compute="weight-only"`',
        ),
        ({"seeds": 3}, "^seeds must be a list of whole numbers, not 3"),
        ({"seeds": [0.5]}, "^seeds must be a whole number, not 0.5"),
        ({"size": 64}, r"^size must be \(height, width\), not 64"),
        ({"min_psnr": "30"}, "^min_psnr must be a finite number, not '30'"),
        ({"dtype": "float64"}, "^dtype must be bfloat16, float16 or float32"),
        ({"transformer": None}, "^transformer must be the path of a file or folder, not None"),
    ],
)
def test_bad_arguments(
    zimage_folder: Path, zimage_quantized: Path, arguments: dict[str, Any], problem: str
) -> None:
    given = {"transformer": zimage_quantized, "prompts": ["a"], "device": "cpu", **arguments}
    with pytest.raises(zm.UsageError, match=problem):
        zm.evaluate(zimage_folder, **given)
