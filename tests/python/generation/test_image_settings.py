"""Settings in image files: what `generate` writes, and `--settings-from`."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import zimage_mxfp8 as zm
from helpers.images import SIZE, Generate, fails, init_image, levels, settings_of
from zimage_mxfp8.generation import infotext
from zimage_mxfp8.generation.images import METADATA_KEY
from zimage_mxfp8.generation.png_text import MAX_TEXT, read_texts
from zimage_mxfp8.generation.stored import read_settings

METADATA: dict[str, Any] = {
    "prompt": "a red fox",
    "negative_prompt": None,
    "seed": 1234,
    "steps": 8,
    "width": 64,
    "height": 48,
    "guidance": 0.0,
    "init_image": None,
    "strength": None,
    "loras": [],
    "model": "Z-Image-Turbo",
    "transformer": "z_image_turbo-mxfp8.safetensors",
    "compute": "weight-only",
    "dtype": "bfloat16",
    "version": "1.2.3",
}
PROMPTS = ["a red fox", "лиса 🦊 в снегу", 'one, "two": three\nfour \\ five', "a\n\nb", "été", ""]


def parse_as_a1111(text: str) -> dict[str, str]:
    """Read an infotext by the rules that AUTOMATIC1111's web UI publishes for it.

    The last line is settings if three or more pairs are in it. Pairs are separated by commas, and
    values with a comma, colon or line break are JSON strings. Of the lines before, those from
    "Negative prompt:" on are the negative prompt.
    """
    *lines, last = text.strip().split("\n")
    result = {"Prompt": "", "Negative prompt": ""}
    pairs = []
    rest = last
    while rest:
        name, _, rest = rest.partition(":")
        rest = rest.lstrip()
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].partition(",")[2]
        else:
            value, _, rest = rest.partition(",")
        pairs.append((name.strip(), value))
    assert len(pairs) >= 3
    where = "Prompt"
    for line in (each.strip() for each in lines):
        if line.startswith("Negative prompt:"):
            where, line = "Negative prompt", line[len("Negative prompt:") :].strip()
        result[where] += ("\n" if result[where] else "") + line
    return {**result, **dict(pairs)}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, *chunks: bytes) -> None:
    """A PNG file with these chunks before its pixels."""
    Image.new("RGB", (1, 1)).save(path)
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + b"".join(chunks) + content[at:])


def write_texts(path: Path, **texts: str) -> None:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key.replace("_", "-"), text)
    Image.new("RGB", (1, 1)).save(path, pnginfo=info)


# ---- A1111's form


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", [None, "blurry 🦊, grey\nlow: quality"])
def test_infotext_says_what_was_asked_for(prompt: str, negative: str | None) -> None:
    changes = {"prompt": prompt, "negative_prompt": negative, "guidance": 3.3 if negative else 0.0}
    text = infotext.write_infotext({**METADATA, **changes, "model": "a, b: c"})
    assert text.splitlines()[-1] == (
        f"Steps: 8, Sampler: Euler, CFG scale: {4.3 if negative else 1}, Seed: 1234, Size: 64x48, "
        "Model: z_image_turbo-mxfp8, Version: zimage-mxfp8 1.2.3"
    )
    found = parse_as_a1111(text)
    assert found["Prompt"] == prompt
    assert found["Negative prompt"] == (negative or "")
    read = infotext.read_infotext(text)
    assert read.is_ours and not read.loras
    assert read.values == {
        **{"prompt": prompt, "seed": 1234, "steps": 8, "width": 64, "height": 48},
        "guidance": changes["guidance"],
        **({} if negative is None else {"negative_prompt": negative}),
    }


def test_infotext_quotes_names() -> None:
    own = {"transformer": "transformer", "model": "a, b: c"}
    text = infotext.write_infotext({**METADATA, **own, "strength": 0.6})
    found = parse_as_a1111(text)
    assert found["Model"] == "a, b: c"
    assert found["Denoising strength"] == "0.6"
    assert found["Version"] == "zimage-mxfp8 1.2.3"


@given(st.floats(0, 100), st.integers(0, 2**63 - 1))
def test_numbers_come_back_from_infotext(guidance: float, seed: int) -> None:
    text = infotext.write_infotext({**METADATA, "guidance": guidance, "seed": seed})
    assert not re.search(r"CFG scale: \S*[eE]", text)
    read = infotext.read_infotext(text)
    assert read.values["guidance"] == pytest.approx(guidance, rel=0, abs=1e-25)
    assert read.values["seed"] == seed


@pytest.mark.parametrize("prompt", PROMPTS)
def test_images_hold_both_texts(generate: Generate, tmp_path: Path, prompt: str) -> None:
    options = ("--guidance", 1.5, "--negative-prompt", "blurry, grey", "--steps", 1, *SIZE)
    code, _, err = generate("--prompt", prompt, "-o", "o.png", "--seed", 5, *options)
    assert code == 0, err
    with Image.open(tmp_path / "o.png") as image:  # Pillow reads what it finds, in all forms
        found = parse_as_a1111(image.text["parameters"])
        assert json.loads(image.text[METADATA_KEY])["prompt"] == prompt
    assert found == {
        **{"Prompt": prompt, "Negative prompt": "blurry, grey", "Steps": "1", "Sampler": "Euler"},
        **{"CFG scale": "2.5", "Seed": "5", "Size": "64x48", "Model": "quantized"},
        "Version": f"zimage-mxfp8 {zm.__version__}",
    }


# ---- texts of PNG files


@pytest.mark.parametrize("text", ["plain", "été", "лиса 🦊\n", "x" * 10_000])
@pytest.mark.parametrize("compressed", [False, True])
def test_texts_are_what_pillow_wrote(tmp_path: Path, text: str, compressed: bool) -> None:
    info = PngInfo()
    info.add_text("other", "no")
    info.add_text("key", text, zip=compressed)
    info.add_text("key", "second")
    Image.new("RGB", (1, 1)).save(tmp_path / "i.png", pnginfo=info)
    assert read_texts(tmp_path / "i.png", ("key", "none")) == {"key": text}


def test_texts_after_the_pixels_are_found(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "i.png")
    content = (tmp_path / "i.png").read_bytes()
    at = content.index(b"IEND") - 4
    late = content[:at] + chunk(b"tEXt", b"key\0late") + content[at:]
    (tmp_path / "i.png").write_bytes(late)
    assert read_texts(tmp_path / "i.png", ("key",)) == {"key": "late"}
    (tmp_path / "i.png").write_bytes(late[:-12])  # cut off after the text
    assert read_texts(tmp_path / "i.png", ("key",)) == {"key": "late"}
    (tmp_path / "i.png").write_bytes(late[: at - 2])  # and before it
    with pytest.raises(zm.CheckpointError, match="damaged or incomplete PNG"):
        read_texts(tmp_path / "i.png", ("key",))


BOMB = zlib.compress(bytes(100 << 20), 9)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (chunk(b"tEXt", b"parameters\0" + bytes(MAX_TEXT)), "has 1,048,587 bytes; more than"),
        (chunk(b"tEXt", b"parameters\0" + bytes(100 << 20)), "has 104,857,611 bytes; more than"),
        (chunk(b"zTXt", b"parameters\0\0" + BOMB), "is damaged, or too long"),
        (chunk(b"iTXt", b"parameters\0\1\0\0\0" + BOMB), "is damaged, or too long"),
        (chunk(b"zTXt", b"parameters\0\0no"), "is damaged"),
        (chunk(b"iTXt", b"parameters\0"), "is damaged"),
        (chunk(b"iTXt", b"parameters\0\0\0\0\0\xff"), "is damaged"),
        (chunk(b"tEXt", b"parameters\0a")[:-1] + b"?", "is damaged"),
    ],
)
def test_bad_texts_are_sentences(
    generate: Generate, tmp_path: Path, data: bytes, sentence: str
) -> None:
    write_png(tmp_path / "i.png", data)
    result = generate("--settings-from", "i.png")
    fails(result, 1, 'the text "parameters" of i.png ', sentence)
    assert ("copy or download it again" in result[2]) == ("is damaged" in sentence)
    assert len(result[2]) < 200
    assert [path.name for path in tmp_path.iterdir()] == ["i.png"]


def test_texts_of_other_keys_may_be_large(tmp_path: Path) -> None:
    write_png(
        tmp_path / "i.png",
        chunk(b"tEXt", b"workflow\0" + bytes(2 * MAX_TEXT)),
        chunk(b"zTXt", b"workflow\0\0" + BOMB),
        chunk(b"tEXt", b"key\0value"),
    )
    assert read_texts(tmp_path / "i.png", ("key",)) == {"key": "value"}


# ---- --settings-from


def test_the_image_again(generate: Generate, tmp_path: Path) -> None:
    options = ("--guidance", 1.5, "--negative-prompt", "собака", "--steps", 3, "--width", 64)
    code, _, err = generate("--prompt", "снег 🦊\nx", "-o", "a.png", *options, "--height", 48)
    assert (code, err) == (0, "")
    code, _, err = generate("--settings-from", "a.png", "-o", "b.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_images_of_a_batch_again(generate: Generate, tmp_path: Path) -> None:
    common = ("--prompt", "a", "--steps", 1, *SIZE)
    assert generate(*common, "-o", "a.png", "--batch", 2, "--seed", 8)[0] == 0
    assert generate("--settings-from", "a-1.png", "-o", "b.png")[0] == 0
    assert settings_of(tmp_path / "b.png")["seed"] == 9
    assert abs(levels(tmp_path / "a-1.png") - levels(tmp_path / "b.png")).max() <= 1


def test_options_replace_settings(generate: Generate, tmp_path: Path) -> None:
    write_texts(tmp_path / "a.png", zimage_mxfp8=json.dumps({**METADATA, "guidance": 2.0}))
    changes = {"--prompt": "b", "--steps": 2, "--seed": 3, "--width": 32, "--guidance": 0}
    code, _, err = generate(
        "--settings-from", "a.png", "-o", "b.png", *(x for pair in changes.items() for x in pair)
    )
    assert code == 0, err
    found = settings_of(tmp_path / "b.png")
    assert {name: found[name.removeprefix("--")] for name in changes} == changes
    assert found["height"] == 48


def test_a_negative_prompt_goes_with_its_guidance(generate: Generate, tmp_path: Path) -> None:
    stored = {**METADATA, "guidance": 2.0, "negative_prompt": "b", "steps": 1}
    write_texts(tmp_path / "a.png", zimage_mxfp8=json.dumps(stored))
    code, _, err = generate("--settings-from", "a.png", "-o", "b.png", "--guidance", 0)
    assert code == 0, err
    assert settings_of(tmp_path / "b.png")["negative_prompt"] is None
    result = generate(
        "--settings-from", "a.png", "-o", "c.png", "--guidance", 0, "--negative-prompt", "c"
    )
    fails(result, 2, "--negative-prompt has no effect without guidance")


def test_the_init_image_must_be_named(generate: Generate, tmp_path: Path) -> None:
    init_image(tmp_path / "in.png", (64, 48))
    options = ("--init-image", "in.png", "--strength", 0.5, "--steps", 2)
    assert generate("--prompt", "a", "-o", "a.png", *options)[0] == 0
    again = ("--settings-from", "a.png", "-o", "b.png")
    fails(
        generate(*again),
        2,
        "--init-image must be given: a.png was made from the image 'in.png'; name ",
    )
    code, _, err = generate(*again, "--init-image", "in.png")
    assert code == 0, err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_differs_is_a_warning(generate: Generate, tmp_path: Path, zimage_folder: Path) -> None:
    common = ("--prompt", "a", "--steps", 1, *SIZE)
    assert generate(*common, "-o", "a.png", "--compute", "mxfp8-emulated")[0] == 0
    code, _, err = generate(
        "--settings-from", "a.png", "-o", "b.png", transformer=zimage_folder / "transformer"
    )
    assert code == 0
    assert err == (
        "zimage-mxfp8: warning: a.png was made with transformer quantized.safetensors (now "
        "transformer), compute mxfp8-emulated (now weight-only): the image differs\n"
    )


def test_settings_of_another_program(generate: Generate, tmp_path: Path) -> None:
    text = (
        "a cat,\n  (sharp:1.2)\nNegative prompt: blurry,\ngrey\nSteps: 2, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 3.5, Seed: 42, Size: 64x48, Model hash: 0123, "
        'Model: sd, Lora hashes: "a: 1, b: 2", Denoising strength: 0.7, Version: v1.10.1'
    )
    write_texts(tmp_path / "a.png", parameters=text)
    code, _, err = generate("--settings-from", "a.png", "-o", "b.png")
    assert code == 0
    assert err == (
        "zimage-mxfp8: warning: a.png is from another program: the same settings give another "
        "image\n"
    )
    found = settings_of(tmp_path / "b.png")
    assert {name: found[name] for name in list(METADATA)[:9]} == {
        **{"prompt": "a cat,\n(sharp:1.2)", "negative_prompt": "blurry,\ngrey", "seed": 42},
        **{"steps": 2, "width": 64, "height": 48, "guidance": 2.5},
        **{"init_image": None, "strength": None},
    }


MADE_FROM = {
    "adapters": (
        {"loras": [{"name": "ink.safetensors", "weight": 0.5}]},
        "must be given: .* was made with ink:0.5",
    ),
    "image": ({"strength": 0.7}, "must be given: .* an image, which it does not name"),
    "mask": ({"strength": 0.7, "mask_image": "m.png"}, "must be given"),
    "ControlNet": (
        {"controlnet": "n", "control_strength": 1, "control_start": 0, "control_end": 1},
        "must be given: .* an image, which it does not name",
    ),
}


@pytest.mark.parametrize(("changes", "words"), MADE_FROM.values(), ids=MADE_FROM)
def test_our_infotext_alone_leaves_nothing_out(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    text = infotext.write_infotext({**METADATA, **changes})
    write_texts(tmp_path / "a.png", parameters=text)
    stored = read_settings(tmp_path / "a.png")
    with pytest.raises(zm.UsageError, match=words):
        stored.with_options({})
    (warning,) = stored.warnings({})
    assert "does not tell the compute mode" in warning


def test_our_infotext_alone_has_all_numbers(tmp_path: Path) -> None:
    control = {"control_strength": 0.4, "control_start": 0.1, "control_end": 0.9}
    changes = {"strength": 0.7, "mask_image": "m.png", "controlnet": "n", **control}
    text = infotext.write_infotext({**METADATA, **changes})
    write_texts(tmp_path / "a.png", parameters=text)
    stored = read_settings(tmp_path / "a.png")
    assert set(stored.images) == {"init_image", "mask_image", "control_image"}
    settings = stored.with_options({name: Image.new("RGB", (64, 48)) for name in stored.images})
    assert settings.strength == 0.7
    assert {name: getattr(settings, name) for name in control} == control


def test_adapters_of_other_programs_are_named(tmp_path: Path) -> None:
    text = "a <lora:ink:0.5> fox <lora:oil:1:0.2>\nSteps: 8, CFG scale: 1.0, Seed: 1, Size: 64x64"
    write_texts(tmp_path / "a.png", parameters=text)
    stored = read_settings(tmp_path / "a.png")
    assert stored.with_options({}).prompt == "a  fox"
    _, adapters = stored.warnings({"loras": []})
    assert "which are left out: ink:0.5, oil:1:0.2" in adapters
    assert len([*stored.warnings({"loras": [{"name": "ink", "weight": 1}]})]) == 1


def test_cfg_1_is_no_guidance(tmp_path: Path) -> None:
    text = "a\nNegative prompt: b\nSteps: 8, CFG scale: 1.0, Seed: 1"
    write_texts(tmp_path / "a.png", parameters=text)
    settings = read_settings(tmp_path / "a.png").with_options({})
    assert settings == zm.GenerationSettings("a", seed=1)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({}, "i.png has no settings: neither those of generate nor a text"),
        ({"workflow": "{}", "prompt": "{}"}, "i.png has no settings"),
        ({"zimage_mxfp8": "{"}, 'text "zimage-mxfp8" of i.png is not a JSON object'),
        ({"zimage_mxfp8": "[]"}, "is not a JSON object"),
        ({"zimage_mxfp8": "[" * 100_000}, "is not a JSON object"),
        ({"zimage_mxfp8": '{"steps": ' + "9" * 5000 + "}"}, "is not a JSON object"),
        ({"zimage_mxfp8": "{}"}, "the settings of i.png have no prompt; give --prompt"),
        *(
            (
                {"zimage_mxfp8": json.dumps({**METADATA, **change})},
                f"the settings of i.png cannot be used: {sentence}",
            )
            for change, sentence in (
                ({"prompt": 3}, "prompt must be a text, not 3"),
                ({"steps": "8"}, "steps must be a whole number, not '8'"),
                ({"steps": 0}, "steps must be 1 to 1000, not 0; replace it with --steps"),
                ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
                ({"seed": True}, "seed must be a whole number, not True"),
                ({"width": 40}, "width must be a multiple of 16 up to 8192, not 40"),
                ({"height": [64]}, "height must be a whole number, not [64]"),
                ({"guidance": float("nan")}, "guidance must be a finite number, not nan"),
                ({"guidance": {}}, "guidance must be a finite number, not {}"),
                ({"guidance": 1, "negative_prompt": 2}, "negative_prompt must be a text, not 2"),
                ({"prompt": "\ud800"}, "prompt must be UTF-8 text"),
            )
        ),
        ({"parameters": "just a prompt"}, 'text "parameters" of i.png does not end with a line of'),
        ({"parameters": "a\nSteps: x, Seed: 1, Size: 64x64"}, "has a number that cannot be read"),
        ({"parameters": "a\nSteps: 1, Seed: 1, Size: 64"}, "has a number that cannot be read"),
        ({"parameters": "a\nSteps: 1, Seed: 1, CFG scale: x"}, "has a number that cannot be read"),
        ({"parameters": "a\nSteps: 1, Seed: 1, CFG scale: 0.5"}, "has a CFG scale below 1"),
        ({"parameters": "a\nSteps: 1, Seed: 1, CFG scale: NaN"}, "must be a finite number"),
        ({"parameters": "a\nSteps: 1, Seed: 1, Size: 72x64"}, "width must be a multiple of 16"),
        (
            {"parameters": "a\nSteps: 1, Seed: 1, CFG scale: 1e999999999"},
            'text "parameters" of i.png has a number that cannot be read',
        ),
        ({"parameters": "a\n" + "word " * 50_000}, 'text "parameters" of i.png does not end with'),
    ],
)
def test_bad_settings_are_sentences(
    generate: Generate, tmp_path: Path, texts: dict[str, str], sentence: str
) -> None:
    write_texts(tmp_path / "i.png", **texts)
    fails(generate("--settings-from", "i.png"), 1, sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["i.png"]


def test_bad_options_are_not_the_files_fault(generate: Generate, tmp_path: Path) -> None:
    write_texts(tmp_path / "i.png", zimage_mxfp8=json.dumps(METADATA))
    result = generate("--settings-from", "i.png", "--width", 40)
    fails(result, 2, "error: --width must be a multiple of 16 up to 8192, not 40")
    result = generate("--settings-from", "i.png", "-o", "i.png", "--overwrite")
    fails(result, 2, "--output i.png is the input")


def cut_off(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "i.png does not exist; name a PNG file made by generate"),
        (lambda path: path.mkdir(), "i.png is not a regular file; name a PNG file"),
        (lambda path: path.touch(), "i.png is not a PNG file"),
        (lambda path: Image.new("RGB", (8, 8)).save(path, "JPEG"), "i.png is not a PNG file"),
        (lambda path: path.symlink_to("i.png"), "i.png cannot be read: "),
        (cut_off, "i.png is a damaged or incomplete PNG file; copy or download it again"),
    ],
)
def test_files_without_settings(
    generate: Generate, tmp_path: Path, make: Any, sentence: str
) -> None:
    make(tmp_path / "i.png")
    fails(generate("--settings-from", "i.png"), 1, sentence)


@pytest.mark.parametrize(
    "last", ["word " * 50_000, "Steps: 2, Seed: 1, Size: 16x16, " + "a/" * 100_000, 'a:"' * 50_000]
)
def test_long_infotexts_end(last: str) -> None:
    """Backtracking would take minutes over these."""
    try:
        assert infotext.read_infotext(f"prompt\n{last}").values["prompt"] == "prompt"
    except ValueError as error:
        assert "does not end with a line of settings" in str(error)


def test_infotext_with_a_huge_number() -> None:
    with pytest.raises(ValueError, match="has a number that cannot be read"):
        infotext.read_infotext("a\nSteps: 2, Seed: 1, Size: 16x16, CFG scale: 1e999999999")
