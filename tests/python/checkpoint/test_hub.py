"""Models named as on the Hugging Face hub, against a server on this machine.

The real hub was never asked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import Qwen3Model

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.hub_server import Hub, serve_hub
from helpers.images import STAGES
from zimage_mxfp8.checkpoint import hub as hub_module

TURBO = "Tongyi-MAI/Z-Image-Turbo"
IMAGE = ("--prompt", "a cat", "-o", "o.png", "--seed", 7, "--steps", 1, "--height", 32)
IMAGE = (*IMAGE, "--width", 32, "--device", "cpu")
JUNK = (
    "README.md",
    "assets/reel.png",
    "transformer/diffusion_pytorch_model.fp32.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/model.onnx",
    "text_encoder/pytorch_model.bin",
    "text_encoder/generation_config.json",
    "text_encoder/model.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/flax_model.msgpack",
    "tokenizer/preview.webp",
    "whole.ckpt",
)
TOKENIZER = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
PARTS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    *(f"text_encoder/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    "text_encoder/model.safetensors.index.json",
    *(f"tokenizer/{name}" for name in TOKENIZER),
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(zimage_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it would be on the hub: its text encoder in shards, among other files."""
    folder = tmp_path_factory.mktemp("hub") / "published"
    shutil.copytree(zimage_folder, folder)
    shutil.rmtree(folder / "text_encoder")
    model = Qwen3Model.from_pretrained(zimage_folder / "text_encoder", local_files_only=True)
    model.save_pretrained(folder / "text_encoder", max_shard_size="250KB")
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serve_hub() as served:
        served.add(TURBO, published)
        yield served


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For processes that know no other hub, and have a cache of their own."""
    home = tmp_path / "hub-home"
    home.mkdir()
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def in_environment(
    hub: Hub, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let huggingface_hub, which reads the environment when it is imported, know that hub alone."""
    cache = Path(environment["HF_HOME"]) / "hub"
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def command(in_process: Run, in_environment: None, monkeypatch: pytest.MonkeyPatch) -> Command:
    from transformers.utils import logging

    logging.disable_progress_bar()  # too late for the variable that `generate` sets

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # `generate` sets it
        return in_process(*arguments)

    return run


@pytest.fixture
def cached(hub: Hub, in_environment: None) -> None:
    """Everything that `generate` needs is in the cache."""
    hub_module.resolve(TURBO, (*hub_module.COMPONENTS, hub_module.TRANSFORMER), download=True)
    assert hub.downloaded() == sorted([*PARTS, WEIGHTS])
    hub.requests.clear()


def fails(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    *_, line = result.stderr.splitlines()
    assert line.startswith("zimage-mxfp8: error: ") and "Traceback" not in result.stderr
    for part in parts:
        assert part in line, (part, line)


# ---- names


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (TURBO, (TURBO, None, None)),
        (f"{TURBO}@v1.0", (TURBO, "v1.0", None)),
        (f"{TURBO}@refs/pr/3", (TURBO, "refs/pr/3", None)),
        ("a/b/c.safetensors", ("a/b", None, "c.safetensors")),
        ("a/b@main/c/d.safetensors", ("a/b", "main", "c/d.safetensors")),
        ("a/b@refs/pr/3/d.safetensors", ("a/b", "refs/pr/3", "d.safetensors")),
    ],
)
def test_names_on_the_hub(text: str, want: tuple[str | None, ...]) -> None:
    reference = hub_module.parse(text)
    assert reference is not None and str(reference) == text
    assert (reference.repo, reference.revision, reference.file) == want


@pytest.mark.parametrize(
    "text",
    [
        *("model", "/a/b", "./a/b", "../a", "a/../b", "a/b/", "a/b/c", "a/b/c.bin", "a//b", ""),
        *("folder/model.safetensors", "a/b@", "a/..", "~/a", "a/b/../c.safetensors", "-a/b"),
        *("C:\\a/b", "a/" + "b" * 96, "a/b\n"),
    ],
)
def test_paths_are_no_names(text: str) -> None:
    assert hub_module.parse(text) is None
    assert hub_module.resolve(text, ("transformer",)) == Path(text)


def test_web_addresses_are_neither_names_nor_paths() -> None:
    assert hub_module.parse("https://host/a/b") is None
    with pytest.raises(zm.CheckpointError, match="https://host/a/b is a web address; name a"):
        hub_module.resolve("https://host/a/b", ("transformer",), download=True)
    with pytest.raises(zm.UsageError, match="not 'https://host/a/b'"):
        zm.GenerationSettings("a", init_image="https://host/a/b")  # type: ignore[arg-type]


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_module.parse("a/b") is not None
    assert hub_module.parse(Path("a/b")) is None  # type: ignore[arg-type]
    Path("a/b").mkdir(parents=True)
    assert hub_module.parse("a/b") is None


def test_snapshots_are_called_after_their_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert hub_module.name_of(snapshot) == hub_module.name_of(tmp_path / "link") == TURBO
    assert hub_module.name_of(tmp_path) == tmp_path.name


# ---- without --download


def test_nothing_is_asked_for_without_download(command: Command, hub: Hub) -> None:
    for arguments in (
        ("convert", "-i", TURBO),
        ("convert", "-i", f"{TURBO}@v1/{WEIGHTS}", "--dry-run"),
        ("generate", "--model-dir", TURBO, *IMAGE),
    ):
        fails(command(*arguments), f"{TURBO}", "not a path", "cache lacks it", "--download")
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_sockets_stay_closed_without_download(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """From the cache, with a library that would ask if it could."""
    code = """
import socket, sys
def refuse(*arguments, **_):
    print("SOCKET", arguments, file=sys.stderr)
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = refuse
import zimage_mxfp8 as zm
from zimage_mxfp8.cli.main import main
model, *options = sys.argv[1:]
assert main(["convert", "-i", model]) == 0
zm.ZImageTransformer.from_pretrained(model, "cpu")
zm.ZImageGenerator(model, device="cpu")
sys.exit(main(["generate", "--model-dir", model, *options]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, TURBO, *map(str, IMAGE)],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    assert "SOCKET" not in result.stderr
    assert hub.requests == []
    assert (tmp_path / "Z-Image-Turbo-mxfp8.safetensors").is_file()


def test_missing_library_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; "
        "from zimage_mxfp8.cli.main import main; sys.exit(main(['convert', '-i', 'a/b']))"
    )
    result = subprocess.run([sys.executable, "-c", code], **{"capture_output": True, "text": True})
    fails(result, "a/b does not exist here", 'pip install "zimage-mxfp8[hub]"')


def test_help_and_paths_need_no_library(small_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; "
        "from zimage_mxfp8.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["convert", "--help"], ["convert", "-i", small_file, "--dry-run"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert result.returncode == 0, result.stderr


# ---- with --download


def test_generate_downloads_what_it_needs(command: Command, hub: Hub, tmp_path: Path) -> None:
    result = command("generate", "--model-dir", TURBO, "--download", *IMAGE)
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == sorted([*PARTS, WEIGHTS])
    assert {path.split("/resolve/")[0] for _, path in hub.requests} == {
        f"/api/models/{TURBO}",
        f"/{TURBO}",
    }
    from PIL import Image

    with Image.open(tmp_path / "o.png") as image:
        assert json.loads(image.text["zimage-mxfp8"])["model"] == TURBO
        assert "Model: Tongyi-MAI/Z-Image-Turbo," in image.text["parameters"]

    hub.requests.clear()
    again = command("generate", "--model-dir", TURBO, "--download", *IMAGE, "--overwrite")
    assert again.returncode == 0 and STAGES.sub("", again.stderr) == ""
    assert hub.requests == []


def test_with_a_transformer_the_other_one_stays_there(
    command: Command, hub: Hub, zimage_quantized: Path
) -> None:
    options = ("--transformer", zimage_quantized, "--download", *IMAGE)
    result = command("generate", "--model-dir", f"{TURBO}@v1", *options)
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == PARTS


def test_sizes_are_told_before(command: Command, hub: Hub, published: Path) -> None:
    result = command("convert", "-i", TURBO, "--download")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == f"zimage-mxfp8: to download from {TURBO}:"
    cells = [re.split(r"\s*[┃│]\s*", line)[1:-1] for line in lines if line[0] in "┃│"]
    size = f"{(published / WEIGHTS).stat().st_size / 2**20:.1f} MiB"
    assert cells[1:] == [["transformer", "1", size], ["total", "1", size]]
    begin = lines.index(f"zimage-mxfp8: downloading {WEIGHTS} (1 of 1)")
    assert not any(line[0] in "┃│" for line in lines[begin:])
    assert "%|" not in result.stderr


def test_convert_downloads_the_transformer_only(
    command: Command, hub: Hub, published: Path, tmp_path: Path
) -> None:
    result = command("convert", "-i", TURBO, "--download")
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == [WEIGHTS]
    zm.convert(published, tmp_path / "want.safetensors")
    found = (tmp_path / "Z-Image-Turbo-mxfp8.safetensors").read_bytes()
    assert found == (tmp_path / "want.safetensors").read_bytes()

    hub.requests.clear()  # what generate needs besides
    result = command("generate", "--model-dir", TURBO, "--download", *IMAGE)
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == PARTS


def test_a_file_of_a_repository(
    command: Command, hub: Hub, small_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "repo" / "split").mkdir(parents=True)
    shutil.copy(small_file, tmp_path / "repo" / "split" / "z_image.safetensors")
    (tmp_path / "repo" / "other.safetensors").write_bytes(b"other")
    hub.add("Comfy-Org/z_image", tmp_path / "repo")
    name = "Comfy-Org/z_image/split/z_image.safetensors"
    fails(command("convert", "-i", name), f"{name} does not exist", "--download")
    result = command("convert", "-i", name, "--download")
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == ["split/z_image.safetensors"]
    assert zm.validate(tmp_path / "z_image-mxfp8.safetensors", small_file).ok
    result = command(
        "convert",
        "-i",
        name.replace("z_image/", f"z_image@{Hub.commit('Comfy-Org/z_image')}/"),
        "--dry-run",
    )
    assert result.returncode == 0, result.stderr


def test_a_repository_of_a_transformer_alone(
    command: Command, hub: Hub, published: Path, tmp_path: Path
) -> None:
    shutil.copytree(published / "transformer", tmp_path / "repo")
    hub.add("someone/transformer", tmp_path / "repo")
    result = command("convert", "-i", "someone/transformer", "--download")
    assert result.returncode == 0, result.stderr
    assert hub.downloaded() == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.usefixtures("cached")
def test_an_interrupted_download_goes_on(
    command: Command, hub: Hub, environment: dict[str, str]
) -> None:
    snapshot = Path(environment["HF_HOME"]) / "hub" / "models--Tongyi-MAI--Z-Image-Turbo"
    snapshot /= f"snapshots/{Hub.commit(TURBO)}"
    lost = ["text_encoder/model-00002-of-00003.safetensors", "vae/config.json"]
    for name in lost:
        (snapshot / name).resolve().unlink()
        (snapshot / name).unlink()
    options = ("generate", "--model-dir", TURBO, *IMAGE)
    fails(command(*options), "cache lacks a shard of its text_encoder/model.safetensors")
    assert hub.requests == []
    assert command(*options, "--download").returncode == 0
    assert hub.downloaded() == lost


def test_another_name_of_a_commit_is_remembered(command: Command, hub: Hub) -> None:
    assert command("convert", "-i", f"{TURBO}@v1", "--download").returncode == 0
    hub.requests.clear()
    assert command("convert", "-i", TURBO, "--download", "--overwrite").returncode == 0
    assert hub.downloaded() == []
    assert command("convert", "-i", TURBO, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no/where", "no/where is not on the hub, or private: check the name"),
        (
            f"{TURBO}@v9",
            f"{TURBO}@v9 is on the hub, but not in this revision; check the part after",
        ),
        ("gated/model", "gated/model is gated: accept its terms"),
        (f"{TURBO}/none.safetensors", "the hub lacks its none.safetensors; it has "),
        ("files/only", "lacks its transformer/diffusion_pytorch_model.safetensors; it has 1 safe"),
    ],
)
def test_what_the_hub_refuses(
    command: Command, hub: Hub, published: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "z.safetensors").write_bytes(b"")
    hub.add("files/only", tmp_path / "files")
    hub.add("gated/model", published)
    hub.gated.add("gated/model")
    fails(command("convert", "-i", name, "--download"), sentence)
    assert hub.downloaded() == []
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_hub_there(cli: Run, environment: dict[str, str]) -> None:
    for variables, end in (
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "; check the network, and start it again: complete files stay in the cache",
        ),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
    ):
        result = cli("convert", "-i", TURBO, "--download", env={**environment, **variables})
        fails(result, f"{TURBO} cannot be downloaded: ")
        assert result.stderr.endswith(f"{end}\n")


def test_an_output_that_is_there_is_told_before(command: Command, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "Z-Image-Turbo-mxfp8.safetensors").write_text("mine")
    fails(command("convert", "-i", TURBO, "--download"), "exists; --overwrite replaces it")
    (tmp_path / "o.png").write_text("mine")
    fails(command("generate", "--model-dir", TURBO, "--download", *IMAGE), "o.png exists")
    assert hub.requests == []


def test_a_disk_that_is_too_small(
    hub: Hub, environment: dict[str, str], published: Path, tmp_path: Path
) -> None:
    code = (
        "import shutil, sys; shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(9, 0, 9); "
        "from zimage_mxfp8.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "convert", "-i", TURBO, "--download"],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
        env={**os.environ, **environment},
    )
    size = (published / WEIGHTS).stat().st_size
    fails(result, f"{TURBO} needs {size:,} bytes, but the Hugging Face cache ", "has 9 free")
    assert hub.downloaded() == []


# ---- from Python


@pytest.mark.usefixtures("in_environment")
def test_from_pretrained_downloads_and_finds(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(zm.CheckpointError, match=f"{TURBO} does not exist on this machine"):
        zm.ZImageTransformer.from_pretrained(TURBO, "cpu")
    kept = zm.ZImageTransformer.from_pretrained(TURBO, "cpu", download=True)
    again = zm.ZImageTransformer.from_pretrained(f"{TURBO}@main", "cpu", subfolder="transformer")
    assert kept.nbytes == again.nbytes
    assert hub.downloaded() == [WEIGHTS]


@pytest.mark.parametrize("name", ["owner/name.", "owner/name-", "owner/name.git", "owner./name"])
def test_names_that_no_hub_has_are_paths(name: str) -> None:
    assert hub_module.parse(name) is None


def test_a_cache_that_cannot_be_read(tmp_path: Path, cli: Run) -> None:
    refs = tmp_path / "home" / "hub" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"\xff\xfe")
    result = cli("convert", "owner/name", env={"HF_HOME": str(tmp_path / "home")})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cache of owner/name cannot be read" in result.stderr
    assert "delete models--owner--name" in result.stderr
