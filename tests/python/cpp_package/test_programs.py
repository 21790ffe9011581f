"""C++ programs that link the installed package, against this package and diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.diffusers_reference import load_reference, make_reference
from helpers.documents import GUIDE, ROOT, blocks
from programs.fuzz_headers import mutated
from zimage_mxfp8.checkpoint.header import read_header
from zimage_mxfp8.checkpoint.mxfp8_storage import MXFP8Storage
from zimage_mxfp8.checkpoint.quantization import layer_marker, marker_bytes
from zimage_mxfp8.checkpoint.quantized_layers import LayerReader, QuantizedLayers
from zimage_mxfp8.checkpoint.scopes import Scope
from zimage_mxfp8.checkpoint.source import Checkpoint, open_checkpoint
from zimage_mxfp8.errors import CheckpointError
from zimage_mxfp8.system.diagnosis import cmake_dir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("c++")), reason="no CMake or no C++ compiler"
    ),
]

GUIDE_MAIN = """
int main(int, char** words) {
  print_layers(words[1]);
  const zimage_mxfp8::Checkpoint checkpoint(words[1]);
  std::vector<float> x(2 * 256, 1.0f), conditioning(256, 1.0f);
  const std::int32_t positions[6] = {1, 0, 0, 2, 0, 0};
  run(checkpoint, "layers.0", x.data(), 2, positions, conditioning.data());
  std::printf("x begins with %g\\n", x[0]);
  convert(words[2], words[3]);
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built programs."""
    build = tmp_path_factory.mktemp("programs")
    guide = build / "guide.cpp"
    guide.write_text("\n".join(blocks(GUIDE / "cpp.md", "cpp")) + GUIDE_MAIN, "utf-8")
    source = ROOT / "tests" / "cpp" / "package"
    options = (f"-Dzimage_mxfp8_DIR={cmake_dir()}", f"-DGUIDE={guide}")
    for command in (
        ("cmake", "-S", source, "-B", build, *options),
        ("cmake", "--build", build, "--parallel", "2"),
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return build


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in MXFP8 by the recipe `uniform`, with a hidden size of 682."""
    folder = tmp_path_factory.mktemp("quantized")
    make_reference(dim=256).save_pretrained(folder / "transformer")
    zm.convert(folder / "transformer", folder / "model.safetensors")
    return folder / "model.safetensors"


UNIFORM = Path(zm.__file__).parent / "conversion" / "recipes" / "uniform.toml"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_converted_file_is_that_of_the_python_package(
    prefix: str, programs: Path, small_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source.safetensors"
    tensors = {prefix + name: tensor for name, tensor in load_file(small_file).items()}
    save_file(tensors, source, {"note": 'caf\u00e9 "\n'})
    options = ("--recipe", UNIFORM, *(("--prefix", prefix) if prefix else ()))
    done = run(programs / "convert" / "convert", source, tmp_path / "cpp.safetensors", *options)
    assert done.returncode == 0, done.stderr
    zm.convert(source, tmp_path / "python.safetensors", bias_correction="none")
    with (
        safe_open(tmp_path / "cpp.safetensors", "np") as found,
        safe_open(tmp_path / "python.safetensors", "np") as wanted,
    ):
        assert found.metadata()["note"] == wanted.metadata()["note"]
        if not prefix:  # where Python leaves the layers to the markers
            key = "_quantization_metadata"
            assert found.metadata()[key] == wanted.metadata()[key]
    found, wanted = (read_header(tmp_path / f"{name}.safetensors") for name in ("cpp", "python"))
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.tensors.items()
    }
    first, second = ((tmp_path / f"{x}.safetensors").read_bytes() for x in ("cpp", "python"))
    for name, place in found.tensors.items():
        other = wanted.tensors[name]
        assert first[place.begin : place.end] == second[other.begin : other.end], name
    assert f"{sum(n.endswith('.weight_scale') for n in found.tensors)} layers" in done.stdout
    assert zm.validate(tmp_path / "cpp.safetensors").ok


def test_descriptions_that_are_left_out_are_told(
    programs: Path, small_file: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(small_file).items()}
    others = {"text_encoder.x": {"format": "float8_e4m3fn"}}
    key = "_quantization_metadata"
    save_file(tensors, source, {key: json.dumps({"layers": others})})
    done = run(programs / "convert" / "convert", source, target, "--prefix", "model.")
    assert done.returncode == 0 and "describes other quantised layers" in done.stderr
    with safe_open(target, "np") as found:
        assert "text_encoder.x" not in found.metadata().get(key, "")
    zm.convert(source, tmp_path / "python.safetensors")
    with safe_open(tmp_path / "python.safetensors", "np") as found:
        assert json.loads(found.metadata()[key])["layers"] == others


def test_a_conversion_that_fails_is_one_sentence_and_leaves_nothing(
    programs: Path, quantized: Path, tmp_path: Path
) -> None:
    convert, target = programs / "convert" / "convert", tmp_path / "out.safetensors"
    save_file({"l.weight": torch.full((200, 64), torch.nan)}, tmp_path / "nan.safetensors")
    target_of_another = tmp_path / "taken.safetensors"
    target_of_another.write_bytes(b"mine")
    for code, words, part in (
        (1, (tmp_path / "nan.safetensors", target), '"l.weight" has NaN or infinity at row 0'),
        (1, (quantized, target), "in MXFP8 already"),
        (1, (tmp_path / "none", target), "cannot be read"),
        (1, (tmp_path / "nan.safetensors", target_of_another), "exists"),
        (2, (tmp_path / "nan.safetensors",), "usage:"),
        (2, ("a", "b", "--keep", "("), "regular expression"),
    ):
        done = run(convert, *words)
        assert (done.returncode, done.stdout) == (code, "")
        assert part in done.stderr
    names = ["nan.safetensors", "taken.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert target_of_another.read_bytes() == b"mine"


@pytest.mark.parametrize("block", ["layers.1", "noise_refiner.0", "context_refiner.0"])
def test_a_block_gives_what_diffusers_gives(
    block: str, programs: Path, quantized: Path, tmp_path: Path
) -> None:
    zm.dequantize_checkpoint(quantized, tmp_path / "plain.safetensors")
    reference = make_reference(dim=256)
    load_reference(reference, tmp_path / "plain.safetensors")
    stack, number = block.split(".")
    generator = torch.Generator().manual_seed(3)
    tokens = 70
    inputs = {
        "x": torch.randn(tokens, 256, generator=generator),
        "positions": torch.randint(0, 99, (tokens, 3), generator=generator, dtype=torch.int32),
        "conditioning": torch.randn(1, 256, generator=generator),
    }
    module = getattr(reference, stack)[int(number)]
    with torch.no_grad():
        wanted = module(
            inputs["x"][None],
            torch.ones(1, tokens, dtype=torch.bool),
            reference.rope_embedder(inputs["positions"])[None],
            *([] if stack == "context_refiner" else [inputs["conditioning"]]),
        )[0]
    save_file(inputs, tmp_path / "input.safetensors")
    output = tmp_path / "output.safetensors"
    for checkpoint in (quantized, tmp_path / "plain.safetensors"):
        done = run(
            programs / "block" / "block", checkpoint, block, tmp_path / "input.safetensors", output
        )
        assert done.returncode == 0, done.stderr
        found = load_file(output)["x"]
        assert ((found - wanted).norm() / wanted.norm()).item() < 2e-6


def test_a_block_that_cannot_run_is_one_sentence(
    programs: Path, quantized: Path, tmp_path: Path
) -> None:
    given, bare, output = (tmp_path / name for name in ("given", "bare", "output"))
    tokens = {"x": torch.zeros(1, 256)}
    save_file(tokens, bare)
    save_file(tokens | {"positions": torch.zeros(1, 3, dtype=torch.int32)}, given)
    for code, words, part in (
        (1, (quantized, "layers.0", bare, output), 'has no tensor "positions"'),
        (1, (quantized, "layers.9", given, output), '"layers.9.attention_norm1.weight" is missing'),
        (1, (quantized, "layers.0", given, output), "needs a conditioning"),
        (1, (given, "layers.0", given, output), "ComfyUI's layout"),
        (2, (quantized, "layers.0"), "usage:"),
        (2, (quantized, "layers.0", given, output, "tpu"), "usage:"),
    ):
        done = run(programs / "block" / "block", *words)
        assert done.returncode == code, done.stderr
        assert part in done.stderr
    assert not output.exists()


def small_content(folder: Path) -> bytes:
    """A file with two MXFP8 layers and other tensors, of a few kilobytes."""
    marker = marker_bytes(layer_marker((30, 20)))
    tensors, path = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}, folder / "small"
    for layer in ("layers.0.attention.out", "layers.1.x"):
        tensors[f"{layer}.weight"] = torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
        tensors[f"{layer}.weight_scale"] = torch.zeros(128, 4, dtype=torch.uint8)
        tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    save_file(tensors, path, {"note": "text"})
    return path.read_bytes()


def layers_of(checkpoint: Checkpoint) -> QuantizedLayers:
    return LayerReader(checkpoint, Scope("", zimage=False), MXFP8Storage()).read()


def verdict_of_python(path: Path) -> str:
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return "header"
    found = layers_of(checkpoint)
    if found.breaches:
        return "layers"
    return f"ok {len(checkpoint.tensors)} {len(found.layers)}"


def test_mutated_files_are_judged_as_by_the_python_package(programs: Path, tmp_path: Path) -> None:
    content = small_content(tmp_path)
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2000)]
    for seed, file in enumerate(files):
        file.write_bytes(mutated(content, seed))
    done = subprocess.run(
        [programs / "verdicts"],
        input="".join(f"{file}\n" for file in files).encode(),
        capture_output=True,
        check=True,
    )
    verdicts = done.stdout.decode().split("\0")[:-1]
    wanted = [verdict_of_python(file) for file in files]
    for file, found, want in zip(files, verdicts, wanted, strict=True):
        kind, _, sentence = found.partition(" ")
        if kind == "ok":
            assert found == want, file
        else:
            assert kind == want, (file, found)
            assert str(file) in sentence
            assert "; " in sentence
    assert min(Counter(verdict.split()[0] for verdict in wanted).values()) > 100


def test_the_guides_code_runs(
    programs: Path, quantized: Path, small_file: Path, tmp_path: Path
) -> None:
    done = run(programs / "guide", quantized, small_file, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    layers = layers_of(open_checkpoint(quantized)).layers
    assert len(done.stdout.splitlines()) == len(layers) + 1
    assert "layers.0.attention.qkv: 768 x 256, begins with " in done.stdout
    assert "x begins with " in done.stdout
    assert zm.validate(tmp_path / "out.safetensors").ok
