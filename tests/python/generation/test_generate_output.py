"""What `generate` tells and writes besides the image: names, progress, summary, previews."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.images import SIZE, Generate, fails, generator_of, init_image, levels
from helpers.model_folder import make_pipeline
from zimage_mxfp8.checkpoint import output as output_module
from zimage_mxfp8.cli.generate import _peak_memory
from zimage_mxfp8.generation import generator as generator_module
from zimage_mxfp8.generation.images import (
    free_path,
    name_from_prompt,
    preview_path,
    preview_png_bytes,
    write_new,
)

QUICK = ("--prompt", "a red fox, in SNOW!", "--steps", 1, "--seed", 1234, *SIZE)


# ---- names


def test_default_name(generate: Generate, tmp_path: Path) -> None:
    for name in ("a-red-fox-in-snow-1234", "a-red-fox-in-snow-1234-2", "a-red-fox-in-snow-1234-3"):
        code, out, err = generate(*QUICK, "--overwrite")
        assert code == 0, err
        assert out.startswith(f"{name}.png: 64x48, seed 1234, ")
        assert (tmp_path / f"{name}.png").is_file()
    assert len(list(tmp_path.iterdir())) == 3


def test_default_names_of_a_batch_have_their_seeds(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "a-red-fox-in-snow-1235.png").write_text("mine")
    code, _, err = generate(*QUICK, "--batch", 3)
    assert code == 0, err
    names = [f"a-red-fox-in-snow-{end}.png" for end in ("1234", "1235-2", "1235", "1236")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / names[2]).read_text() == "mine"


def test_a_drawn_seed_is_in_the_name(generate: Generate) -> None:
    code, out, _ = generate("--prompt", "a", "--steps", 1, *SIZE)
    assert code == 0
    assert re.match(r"a-(\d+)\.png: 64x48, seed \1,", out)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red fox in snow", "a-red-fox-in-snow"),
        ("  A/B\\C..: *?\n<D>|", "a-b-c-d"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "image"),
        ("🦊❄️ !?", "image"),
        ("лиса в снегу", "лиса-в-снегу"),
        ("雪の中の狐", "雪の中の狐"),
        ("हिन्दी में", "हिन्दी-में"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("x" * 100, "x" * 40),
        ("ten letters " * 20, "ten-letters-ten-letters-ten-letters-ten"),
        ("a " * 100, "-".join("a" * 20)),
    ],
)
def test_names_from_prompts(prompt: str, name: str) -> None:
    assert name_from_prompt(prompt) == name


def test_free_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert free_path(path) == path
    path.symlink_to("nowhere")  # taken, too
    (tmp_path / "a-2.png").mkdir()
    assert free_path(path).name == "a-3.png"


def test_a_name_that_is_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = output_module.AtomicFile._create

    def beaten(self: Any) -> Any:
        monkeypatch.undo()
        (tmp_path / "a.png").write_text("another's")
        return create(self)

    monkeypatch.setattr(output_module.AtomicFile, "_create", beaten)
    assert write_new(tmp_path / "a.png", b"mine").name == "a-2.png"
    assert (tmp_path / "a.png").read_text() == "another's"
    with pytest.raises(zm.OutputError, match="could not be written"):
        write_new(tmp_path / "none" / "a.png", b"mine")


# ---- progress and summary


@pytest.mark.slow
def test_lines_without_a_terminal(cli: Run, zimage_folder: Path, zimage_quantized: Path) -> None:
    options = ("--prompt", "a", "-o", "o.png", "--steps", 40, "--device", "cpu", "--batch", 2)
    parts = ("--model-dir", zimage_folder, "--transformer", zimage_quantized)
    result = cli("generate", *parts, *options, "--height", 32, "--width", 32)
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("zimage-mxfp8: ") for line in result.stderr.splitlines()]
    steps = [int(line.split()[2]) for line in lines if line.startswith("denoising")]
    assert steps == [1, *range(4, 41, 4)]
    assert all(
        re.fullmatch(r"denoising: step \d+ of 40, \d+\.\d\d s per step", x) for x in lines[6:-3]
    )
    assert [line for line in lines if not line.startswith("denoising")] == [
        "checking the model folder and the output ...",
        "loading torch and diffusers ...",
        *(f"loading the {part}" for part in ("text encoder", "transformer", "VAE")),
        "encoding",
        *(f"decoding: image {i} of 2" for i in range(3)),
    ]
    *_, total = result.stdout.splitlines()
    assert re.fullmatch(r"total: \d+\.\d s, peak memory of the process: \S+ [MG]iB", total)


def test_the_first_line_comes_before_what_takes_long(zimage_folder: Path, tmp_path: Path) -> None:
    """NumPy, torch and the like are not even looked for when it is printed."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name in ("numpy", "torch", "diffusers", "transformers"):
            print("looking for", name, file=sys.stderr, flush=True)
        if name == "torch":
            os._exit(7)
sys.meta_path.insert(0, Watch())
from zimage_mxfp8.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["generate", "--model-dir", str(zimage_folder), "--device", "cpu", *map(str, QUICK)]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr
    assert result.stderr.splitlines() == [
        "zimage-mxfp8: checking the model folder and the output ...",
        "looking for numpy",
        "zimage-mxfp8: loading torch and diffusers ...",
        "looking for torch",
    ]


def test_peak_memory_of_the_process(generate: Generate) -> None:
    """At least what it takes at the moment, at most what the system ever gave it."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    code, out, _ = generate(*QUICK)
    assert code == 0
    number, unit = re.search(r"the process: (\S+) ([MG])iB", out).groups()  # type: ignore[union-attr]
    peak = float(number) * {"M": 2**20, "G": 2**30}[unit]
    import resource

    assert 0.99 * before < peak < 1.01 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_peak_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("allocated", 7 << 30), ("reserved", 2 << 32)):
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", {"cuda:1": value}.__getitem__)
    assert _peak_memory("cuda:1") == (
        ", peak memory of cuda:1: 7.00 GiB allocated, 8.00 GiB reserved"
    )


# ---- previews


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Path], list[np.ndarray]]]:
    """Every preview: the step after it was written, the files in the folder, their pixels."""
    seen = []
    make = generator_module.Previews

    def watched(vae: Any, every: int, show: Callable[..., object]) -> Any:
        def then(step: int, images: Any) -> None:
            show(step, images)
            files = sorted(Path().glob("*.png"))
            seen.append((step, files, [levels(file) for file in files]))

        return make(vae, every, then)

    monkeypatch.setattr(generator_module, "Previews", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    [(), ("--batch", 2), ("--offload",), ("--guidance", 2), ("--init-image", "in.jpg")],
    ids=lambda options: " ".join(map(str, options)),
)
def test_previews_come_and_go_and_change_nothing(
    generate: Generate, tmp_path: Path, shown: list[Any], options: tuple[Any, ...]
) -> None:
    init_image(tmp_path / "in.jpg", (64, 48))
    size = () if "--init-image" in options else SIZE
    strength = ("--strength", 1) if "--init-image" in options else ()
    common = ("--prompt", "a", "--seed", 3, "--steps", 7, *options, *size, *strength)
    code, _, err = generate(*common, "-o", "a.png", "--preview", 3)
    assert (code, err) == (0, "")
    names = ["a-0.preview.png", "a-1.preview.png"] if "--batch" in options else ["a.preview.png"]
    assert [step for step, _, _ in shown] == [3, 6]
    for _, files, images in shown:
        assert [file.name for file in files] == names
        assert all(image.shape == (48, 64, 3) for image in images)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {name.replace(".preview", "") for name in names} | {"in.jpg"}
    code, _, err = generate(*common, "-o", "b.png")
    assert code == 0, err
    for name in made - {"in.jpg"}:
        other = tmp_path / name.replace("a", "b", 1)
        assert (tmp_path / name).read_bytes() == other.read_bytes()


def test_previews_show_where_the_steps_lead(
    generate: Generate, tmp_path: Path, shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model whose velocity is constant every step leads to the image itself."""
    goal = torch.randn(16, 1, 6, 8, generator=torch.Generator().manual_seed(0))

    def forward(self: Any, x: Any, t: torch.Tensor, *_: Any, **options: Any) -> Any:
        # Between noise at 0 and the goal at 1; t and the latents say where the noise was.
        return ([(goal - image) / (1 - time) for image, time in zip(x, t, strict=True)],)

    monkeypatch.setattr(zm.ZImageTransformer, "forward", forward)
    code, _, err = generate(
        "--prompt", "a", "-o", "o.png", "--steps", 6, "--seed", 1, "--preview", 1, *SIZE
    )
    assert code == 0, err
    assert [step for step, _, _ in shown] == [2, 3, 4, 5]
    for _, _, (preview,) in shown:
        assert abs(preview - levels(tmp_path / "o.png")).max() <= 1


def test_previews_of_large_images_are_small(
    generate: Generate, tmp_path: Path, shown: list[Any]
) -> None:
    options = ("--steps", 3, "--preview", 2, "--height", 512, "--width", 256)
    code, _, err = generate("--prompt", "a", "-o", "o.png", *options)
    assert code == 0, err
    ((step, _, (preview,)),) = shown
    assert step == 2 and preview.shape == (256, 128, 3)


def test_previews_spare_what_was_there(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "o.preview.png").write_text("mine")
    options = ("--prompt", "a", "-o", "o.png", "--steps", 3, *SIZE)
    fails(generate(*options, "--preview", 2), 1, "o.preview.png exists; --overwrite replaces it")
    assert generate(*options)[0] == 0
    assert (tmp_path / "o.preview.png").read_text() == "mine"
    fails(generate(*options, "--preview", 0), 2, "--preview")


def test_previews_of_a_killed_program_are_replaced(generate: Generate, tmp_path: Path) -> None:
    preview = tmp_path / "o.preview.png"
    preview.write_bytes(preview_png_bytes(Image.new("RGB", (8, 8))))
    options = ("--prompt", "a", "-o", "o.png", "--steps", 3, *SIZE)
    assert generate(*options, "--preview", 2)[0] == 0
    assert not preview.exists() and (tmp_path / "o.png").is_file()


def test_previews_that_cannot_be_written_stop_nothing(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = output_module.write_file

    def no_space(target: Path, content: bytes, *, overwrite: bool) -> None:
        if ".preview" in target.name:
            raise zm.OutputError(f"{target} could not be written: No space left on device")
        write(target, content, overwrite=overwrite)

    monkeypatch.setattr(output_module, "write_file", no_space)
    options = ("--prompt", "a", "-o", "o.png", "--steps", 4, "--preview", 1, *SIZE)
    code, _, err = generate(*options)
    assert code == 0 and (tmp_path / "o.png").is_file()
    assert err == (
        "zimage-mxfp8: warning: no more previews: o.preview.png could not be written: No space "
        "left on device\n"
    )


@pytest.mark.parametrize("error", [zm.GenerationError("broken", 3), KeyboardInterrupt()])
def test_previews_go_with_an_error(
    generate: Generate,
    tmp_path: Path,
    shown: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(zm.ZImageGenerator, "_check", broken)
    monkeypatch.setattr(zm.ZImageGenerator, "_decode", broken)
    options = ("--prompt", "a", "-o", "o.png", "--steps", 3, "--preview", 2, *SIZE)
    code, _, _ = generate(*options)
    assert code == (1 if isinstance(error, zm.GenerationError) else 130)
    assert len(shown) == 1 and not list(tmp_path.iterdir())


def test_previews_of_nan_leave_the_error_to_the_end(
    generate: Generate, tmp_path: Path, shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = zm.ZImageTransformer.forward

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        (sample,) = forward(self, *arguments, **options)
        return ([image * float("nan") for image in sample],)

    monkeypatch.setattr(zm.ZImageTransformer, "forward", broken)
    result = generate("--prompt", "a", "-o", "o.png", "--steps", 3, "--preview", 2, *SIZE)
    fails(result, 1, "became NaN or Inf in step 1 of 3")
    assert len(shown) == 1 and not list(tmp_path.iterdir())


def test_previews_from_python(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", dtype="float32")
    settings = zm.GenerationSettings("a", steps=4, height=48, width=64, batch=2, seed=1)
    seen: list[tuple[int, tuple[Image.Image, ...]]] = []
    generator.generate(settings, preview=lambda *preview: seen.append(preview))
    assert [(step, len(images)) for step, images in seen] == [(2, 2), (3, 2)]
    for every in (0, 1.5, True):
        with pytest.raises(zm.UsageError, match="preview_every must be "):
            generator.generate(settings, preview=print, preview_every=every)  # type: ignore[arg-type]


def test_preview_paths() -> None:
    assert preview_path(Path("a/b.c.PNG")) == Path("a/b.c.preview.png")


# ---- the model's folder


def test_the_current_folder_is_a_model(
    generate: Generate, zimage_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*QUICK, "-o", tmp_path / "o.png")
    assert generate(*common, transformer=None)[0] == 0
    want = (tmp_path / "o.png").read_bytes()
    for folder, name in ((zimage_folder, "."), (zimage_folder / "vae", "..")):
        monkeypatch.chdir(folder)
        code, _, err = generate(*common, "--overwrite", model=name, transformer=None)
        assert code == 0, err
        assert (tmp_path / "o.png").read_bytes() == want


# ---- guidance


@pytest.mark.parametrize("cfg", [1.5, 4.0, 7.0])
@pytest.mark.parametrize("kind", [ZImagePipeline, ZImageImg2ImgPipeline])
def test_guidance_is_comfyuis_cfg_minus_1(tmp_path: Path, cfg: float, kind: type) -> None:
    """In diffusers' own pipelines, the sampler gets negative + cfg * (positive - negative)."""
    outputs, predictions = [], []
    pipeline = kind(**make_pipeline().components)
    step = pipeline.scheduler.step

    def watched(prediction: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        predictions.append(prediction)
        return step(prediction, *arguments, **options)

    pipeline.transformer.register_forward_hook(
        lambda _module, _inputs, result: outputs.append(result[0])
    )
    pipeline.scheduler.step = watched
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 48, "width": 64}
    if kind is ZImageImg2ImgPipeline:
        options = {"image": init_image(tmp_path / "in.png", (64, 48)), "strength": 1.0}
    pipeline(
        "a cat",
        negative_prompt="a dog",
        num_inference_steps=2,
        guidance_scale=cfg - 1,
        generator=generator_of(1)[0],
        **options,
    )
    assert len(outputs) == len(predictions) == 2
    for (positive, negative), found in zip(outputs, predictions, strict=True):
        assert (positive - negative).abs().max() > 0.01
        want = negative + cfg * (positive - negative)
        # The pipeline turns the sign of the velocity.
        torch.testing.assert_close(-found[0].unsqueeze(1), want.float(), rtol=1e-4, atol=1e-4)


# ---- from_pretrained


def test_from_pretrained_is_from_checkpoint(zimage_folder: Path, zimage_quantized: Path) -> None:
    load = zm.ZImageTransformer.from_pretrained
    for model in (
        load(zimage_quantized, "cpu", "mxfp8-emulated", torch.float32),
        load(
            str(zimage_quantized), device="cpu", compute="mxfp8-emulated", torch_dtype=torch.float32
        ),
    ):
        assert (model.compute, model.dtype) == ("mxfp8-emulated", torch.float32)
    own = zm.ZImageTransformer.from_checkpoint(zimage_folder, "cpu").nbytes
    ignored = {"low_cpu_mem_usage": False, "use_safetensors": True, "variant": None}
    for path, options in (
        (zimage_folder, {}),
        (zimage_folder, {"subfolder": "transformer"}),
        (zimage_folder / "transformer", {"subfolder": ""}),
        (str(zimage_folder), {"subfolder": "transformer", "local_files_only": True, **ignored}),
    ):
        model = load(path, "cpu", **options)
        assert (model.nbytes, model.dtype) == (own, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"variant": "fp16"},
            r"variant is not supported by from_pretrained \(given: 'fp16'\); leave it out",
        ),
        ({"device_map": "auto"}, "device_map is not supported by from_pretrained"),
        ({"use_safetensors": False}, r"not supported by from_pretrained \(given: False\)"),
        ({"revision": "v1"}, "leave it out and write owner/name@revision"),
        ({"colour": np.zeros(3)}, r"colour is not supported by from_pretrained \(given: array"),
        (
            {"torch_dtype": torch.float64},
            "dtype must be bfloat16, float16 or float32, not torch.float64",
        ),
        ({"torch_dtype": "auto"}, "float16 or float32, not 'auto'"),
        (
            {"dtype": torch.float32, "torch_dtype": torch.bfloat16},
            "torch_dtype is the same argument as dtype; give one of them",
        ),
        ({"subfolder": 3}, "subfolder must be a text, not 3"),
    ],
)
def test_from_pretrained_refuses(
    zimage_folder: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(zm.UsageError, match=sentence):
        zm.ZImageTransformer.from_pretrained(zimage_folder, **{"device": "cpu", **options})


def test_from_pretrained_names_what_is_missing(zimage_folder: Path) -> None:
    with pytest.raises(zm.UsageError, match="path_or_id must be the path of a file or folder"):
        zm.ZImageTransformer.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(zm.CheckpointError, match="vae"):
        zm.ZImageTransformer.from_pretrained(zimage_folder, subfolder="vae")
    with pytest.raises(zm.CheckpointError, match=r"nowhere/at\.safetensors does not exist"):
        zm.ZImageTransformer.from_pretrained("nowhere/at.safetensors")
