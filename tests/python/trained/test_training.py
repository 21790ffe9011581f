"""The parts of `python -m benchmarks.trained`, and the whole of it twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from benchmarks.trained import scenes, text, transformer, vae

ROOT = Path(__file__).parents[3]
SCENES = [scenes.random_scene(np.random.default_rng(seed)) for seed in range(200)]


def nearest_colour(pixel: np.ndarray) -> str:
    distances = {
        name: float(np.abs((pixel + 1) / 2 - colour).sum())
        for name, colour in scenes.COLOURS.items()
    }
    return min(distances, key=distances.__getitem__)


@pytest.mark.parametrize("pattern", scenes.PATTERNS)
def test_a_scene_shows_what_its_caption_says(pattern: str) -> None:
    shown = [scene for scene in SCENES if scene.pattern == pattern][:20]
    for scene in shown:
        image = scenes.draw(scene)
        assert image.shape == (128, 128, 3)
        assert nearest_colour(image[2, 2]) == scene.colour
        tones = np.unique(image[[2, 2, 18, 18], [2, 125, 2, 20]], axis=0)
        assert len(tones) == (1 if pattern == "plain" else 2)
        for thing in scene.things:
            if thing.shape != "ring" and thing is scene.things[-1]:  # nothing lies above it
                assert nearest_colour(image[round(thing.y), round(thing.x)]) == thing.colour
            assert f"{thing.size} {thing.colour} {thing.shape}" in scene.caption
        if scene.relation in ("left of", "right of"):
            first, second = (thing.x for thing in scene.things)
            assert (first < second) == (scene.relation == "left of")
        if scene.relation in ("above", "below"):
            first, second = (thing.y for thing in scene.things)
            assert (first < second) == (scene.relation == "above")


def test_a_large_object_covers_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_SHADOW_STRENGTH", 0.0)
    for shape in scenes.SHAPES:
        areas = []
        for size, radius in scenes.SIZES.items():
            thing = scenes.Thing(size, "red", shape, 64.0, 64.0)
            image = scenes.draw(scenes.Scene("black", "plain", (thing,), None))
            areas.append((image[..., 0] > 0).sum() / radius**2)
        assert areas[0] == pytest.approx(areas[1], rel=0.1), shape
        assert 0.8 < areas[0] < 3.2, shape


def test_unseen_captions_are_of_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "TRAINING_SCENES", 3000)
    seen = {scenes.random_scene(np.random.default_rng(seed)).caption for seed in range(3000)}
    found = scenes.unseen_captions(10)
    assert len(found) == 10 and not seen & set(found)
    for caption, seed in found.items():
        assert scenes.random_scene(np.random.default_rng(seed)).caption == caption


def test_captions_are_encoded_as_the_pipeline_encodes_them() -> None:
    tokenizer = text.make_tokenizer()
    encoder = text.make_text_encoder(tokenizer)
    captions = [scene.caption for scene in SCENES[:4]]
    unknown = tokenizer.unk_token_id
    assert all(unknown not in tokenizer(caption)["input_ids"] for caption in captions)
    pipeline = ZImagePipeline(None, None, encoder, tokenizer, None)
    found = text.CaptionEncoder(tokenizer, encoder)(captions)
    # The pipeline writes its template into the list.
    want, _ = pipeline.encode_prompt(captions, "cpu", do_classifier_free_guidance=False)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs.float()).abs().max() < 0.05  # of BF16: batches are padded differently


def test_the_batched_forward_is_the_models_own() -> None:
    model = transformer.make_transformer(128)
    del model.layers[2:]
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(n, text.FEATURES, generator=random) for n in (20, 14, 32, 1)]
    captions = transformer.pad_captions(features, "cpu")
    assert transformer.check_batched(model, captions, "cpu") < 1e-5


def test_padded_feed_forwards_compute_the_same_and_are_cut_again() -> None:
    model = transformer.make_transformer(128)
    del model.layers[1:]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captions = transformer.pad_captions([torch.randn(5, text.FEATURES)], "cpu")
    x = torch.randn(1, 64, 64)

    def forward() -> torch.Tensor:
        batched = transformer.BatchedModel(model, "cpu")
        result: torch.Tensor = batched(x, torch.tensor([0.3]), captions)
        return result

    want = forward()
    transformer.pad_feed_forward(model)
    assert model.layers[0].feed_forward.w2.weight.shape == (128, 344)
    found = forward()
    assert torch.allclose(found, want, atol=1e-5 * want.abs().max().item())
    found.square().sum().backward()
    for name, parameter in model.named_parameters():  # so that training leaves them zero
        if name.endswith((".w1.weight", ".w3.weight")) and parameter.grad is not None:
            assert not parameter.grad[341:].any()
        elif name.endswith(".w2.weight") and parameter.grad is not None:
            assert not parameter.grad[:, 341:].any()
    transformer.cut_feed_forward(model, 341)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    transformer.pad_feed_forward(model)
    model.layers[0].feed_forward.w1.weight.data[343, 0] = 1
    with pytest.raises(ValueError, match="not zero"):
        transformer.cut_feed_forward(model, 341)


def test_patches_are_of_the_latents() -> None:
    latents = torch.arange(2 * 16 * 16 * 16.0).view(2, 16, 16, 16)
    patches = transformer.to_patches(latents)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        patch = patches[1, row * 8 + column].view(2, 2, 16)
        for dy in range(2):
            for dx in range(2):
                want = latents[1, :, 2 * row + dy, 2 * column + dx]
                assert torch.equal(patch[dy, dx], want)


def test_the_vae_has_eight_pixels_per_latent() -> None:
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    assert vae.encode(vae.make_vae(), images, "cpu").shape == (2, 16, 16, 16)


def test_steps_end_at_the_image() -> None:
    times = transformer.steps_of(8)
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert len(times) == 9
    assert times == sorted(times)


@pytest.mark.parametrize(("dim", "width"), [(128, 341), (384, 1024)])
def test_widths_of_feed_forwards(dim: int, width: int) -> None:
    """341 is a multiple of neither 8 nor 32, and 1024 of both."""
    state = transformer.make_transformer(dim).state_dict()
    shapes = {tuple(state[name].shape) for name in state if name.endswith("feed_forward.w1.weight")}
    turned = {tuple(state[name].shape) for name in state if name.endswith("feed_forward.w2.weight")}
    assert shapes == {(width, dim)} and turned == {(dim, width)}


@pytest.mark.slow
def test_the_training_gives_the_same_bytes_again(tmp_path: Path) -> None:
    """Train twice without torch.compile, which would take most of a minute."""
    digests = []
    for name in ("first", "second"):
        program = [sys.executable, "-m", "benchmarks.trained", str(tmp_path / name)]
        subprocess.run(
            [*program, "--quick", "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
            check=True,
        )
        log = (tmp_path / name / "training.log").read_text()
        digests.append(re.findall(r"sha256 ([0-9a-f]{64}) (\S+)$", log, re.MULTILINE))
        assert (tmp_path / name / "samples.png").is_file()
    assert [name.split("/")[0] for _, name in digests[0]] == ["text_encoder", "transformer", "vae"]
    assert digests[0] == digests[1]
