"""Bad input on the command line: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import (
    PREFIX,
    Tensors,
    random_tensors,
    small_shapes,
    to_diffusers,
    write_shards,
)
from helpers.commands import Run, drop_the_right_to_ignore_permissions, fails, only
from zimage_mxfp8.checkpoint.output import AtomicFile
from zimage_mxfp8.errors import OutputError
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.zimage.layers import zimage_shapes

# ---- what the input can be


def test_missing_input(cli: Run, tmp_path: Path) -> None:
    fails(cli("convert", "-i", "none.safetensors"), 1, "none.safetensors does not exist")
    only(tmp_path)


def test_input_is_a_folder_without_weights(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fails(in_process("convert", "-i", "folder"), 1, "folder is not a diffusers folder")


def test_truncated_input(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    content = small_file.read_bytes()
    for keep in (4, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:keep])
        fails(in_process("convert", "-i", "cut.safetensors"), 1, "cut.safetensors")
        only(tmp_path, "cut.safetensors")


def test_empty_checkpoint(in_process: Run, tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    fails(in_process("convert", "-i", "empty.safetensors"), 1, "empty.safetensors has no tensors")


def test_input_becomes_shorter_while_it_is_read(small_model: Tensors, tmp_path: Path) -> None:
    import zimage_mxfp8 as zm

    source = tmp_path / "in.safetensors"
    shapes = small_shapes(1) | {"layers.0.feed_forward.w1.weight": (4096, 4096)}
    save_file(random_tensors(shapes), source)

    def cut(progress: zm.Progress) -> None:
        if source.stat().st_size > 10**6:
            os.truncate(source, 10**5)

    with pytest.raises(zm.CheckpointError, match="the file became shorter"):
        zm.convert(source, tmp_path / "out.safetensors", threads=1, progress=cut, any_model=True)
    only(tmp_path, "in.safetensors")


def quantised_models() -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, str], str]]:
    weight = "layers.0.feed_forward.w1.weight"
    layer = weight.removesuffix(".weight")
    float8 = torch.zeros(75, 40).to(torch.float8_e4m3fn)
    marker = {"format": "nvfp4"}
    header = json.dumps({"format_version": "1.0", "layers": {layer: marker}})
    text = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    yield "fp8", {weight: float8}, {}, "(FP8, see"
    yield "scaled", {weight: float8, layer + ".scale_weight": torch.ones(1)}, {}, "FP8 with scales"
    yield "marker", {"scaled_fp8": torch.zeros(2)}, {}, "FP8 with scales"
    yield (
        "mxfp8",
        {
            weight: float8,
            layer + ".weight_scale": torch.zeros(128, 4, dtype=torch.uint8),
            layer + ".comfy_quant": text,
        },
        {},
        "(MXFP8, see",
    )
    yield "nvfp4", {weight: float8, layer + ".weight_scale_2": torch.ones(1)}, {}, "(NVFP4, see"
    yield "header", {}, {"_quantization_metadata": header}, "(NVFP4, see"
    yield "garbled header", {}, {"_quantization_metadata": "?"}, "(ComfyUI quantised, see"
    yield "int8", {weight: torch.zeros(75, 40, dtype=torch.int8)}, {}, "(INT8, see"
    yield "4 bit", {layer + ".qweight": torch.zeros(75, 10, dtype=torch.int32)}, {}, "(4-bit, see"


@pytest.mark.parametrize("model", list(quantised_models()), ids=lambda model: model[0])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_quantised_input_is_refused_by_name(
    in_process: Run, tmp_path: Path, prefix: str, model: tuple[str, Tensors, dict[str, str], str]
) -> None:
    _, changes, metadata, sentence = model
    tensors = random_tensors(small_shapes(1)) | changes
    if prefix and "_quantization_metadata" in metadata:
        metadata = {k: v.replace("layers.0", f"{prefix}layers.0") for k, v in metadata.items()}
    save_file({prefix + n: t for n, t in tensors.items()}, tmp_path / "in.safetensors", metadata)
    fails(in_process("convert", "-i", "in.safetensors"), 1, "is quantised already", sentence)
    only(tmp_path, "in.safetensors")


def test_gguf_is_refused_by_name(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "z.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    fails(
        in_process("convert", "-i", "z.gguf"),
        1,
        "is a GGUF file, not a safetensors file",
        "quantised already",
    )


def test_own_output_is_refused(in_process: Run, small_file: Path) -> None:
    assert in_process("convert", "-i", small_file, "-o", "a.safetensors").returncode == 0
    fails(in_process("convert", "-i", "a.safetensors", "-o", "b.safetensors"), 1, "(MXFP8, see")


@pytest.mark.parametrize(
    "name", ["cap_pad_token", "cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"]
)
def test_incomplete_zimage_is_told_from_other_models(
    in_process: Run, tmp_path: Path, name: str
) -> None:
    tensors = random_tensors(small_shapes(1))
    del tensors[name]
    save_file(tensors, tmp_path / "in.safetensors")
    result = in_process("convert", "-i", "in.safetensors")
    fails(result, 1, f'"{name}"')
    assert "--any-model" not in result.stderr
    save_file({"a.weight": torch.zeros(32, 32)}, tmp_path / "in.safetensors")
    fails(in_process("convert", "-i", "in.safetensors"), 1, "is not a Z-Image checkpoint")


def test_float64_weight(in_process: Run, tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(1))
    name = "layers.0.feed_forward.w1.weight"
    save_file(tensors | {name: tensors[name].double()}, tmp_path / "in.safetensors")
    fails(
        in_process("convert", "-i", "in.safetensors"),
        1,
        f'tensor "{name}" is F64',
        "--exclude-layers",
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda i: i["weight_map"].update({"x": "gone.safetensors"}), "missing; download it again"),
        (lambda i: i["weight_map"].update({"x": "../up.safetensors"}), "outside its folder"),
        (lambda i: i["weight_map"].update({"x": "/etc/passwd"}), "outside its folder"),
        (lambda i: i["weight_map"].update({"x": "C:\\a.safetensors"}), "outside its folder"),
        (lambda i: i["weight_map"].update({"x": 3}), 'gives tensor "x" no shard name'),
        (lambda i: i["weight_map"].update({"x": ".."}), 'gives tensor "x" no shard name'),
        (
            lambda i: i["weight_map"].update({"x": next(iter(i["weight_map"].values()))}),
            'lacks tensor "x"',
        ),
        (lambda i: i.pop("weight_map"), "has no weight_map"),
        (lambda i: i["weight_map"].clear(), "has no weight_map"),
    ],
)
def test_bad_index(in_process: Run, tmp_path: Path, change: object, sentence: str) -> None:
    write_shards(tmp_path / "z", to_diffusers(random_tensors(small_shapes(1))))
    index = tmp_path / "z" / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    change(document)  # type: ignore[operator]
    index.write_text(json.dumps(document))
    fails(in_process("convert", "-i", "z"), 1, "z/", sentence)
    only(tmp_path, "z")


def test_index_that_is_not_json(in_process: Run, tmp_path: Path) -> None:
    write_shards(tmp_path / "z", to_diffusers(random_tensors(small_shapes(1))))
    (tmp_path / "z" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    fails(in_process("convert", "-i", "z"), 1, "is not JSON")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop("layers.0.attention.to_k.weight"),
            'lacks tensor "layers.0.attention.to_k',
        ),
        (
            lambda t: t.update(
                {"layers.0.attention.to_k.weight": t["layers.0.attention.to_k.weight"].float()}
            ),
            "cannot be stacked",
        ),
        (
            lambda t: t.update({"layers.0.attention.to_v.weight": torch.zeros(40, 41).bfloat16()}),
            "cannot be stacked",
        ),
        (
            lambda t: t.update({"layers.0.attention.qkv.weight": torch.zeros(120, 40).bfloat16()}),
            "both under its own and under its diffusers name",
        ),
    ],
)
def test_diffusers_tensors_that_do_not_fit(
    in_process: Run, tmp_path: Path, change: object, sentence: str
) -> None:
    tensors = to_diffusers(random_tensors(small_shapes(1)))
    change(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "in.safetensors")
    fails(in_process("convert", "-i", "in.safetensors"), 1, sentence)


# ---- what the options can be


def test_invalid_regular_expression(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    result = in_process("convert", "-i", small_file, "-o", "o.safetensors", "--exclude-layers", "(")
    fails(result, 2, '--exclude-layers "(" is not a regular expression')
    only(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "best"], '--recipe "best" does not exist; name one of '),
        (["--timesteps", "0"], "--timesteps must be"),
        (["--timesteps", "soon"], "--timesteps must be"),
        (["--threads", "-1"], "--threads"),
        (["--calib-samples", "0"], "--calib"),
        (["--zimage", "--simple", "--recipe", "uniform"], "drop them or --recipe"),
        (["--mxfp8", "--zimage"], "add --simple"),
        (["--zimage"], "add --simple, or choose the filter with --recipe zimage"),
        (["--int8"], "asks convert_to_quant for INT8"),
        (["--nvfp4"], "asks convert_to_quant for NVFP4"),
        (["--optimizer", "prodigy"], "asks convert_to_quant for learned rounding"),
        (["--num_iter", "500"], "asks convert_to_quant for learned rounding"),
        (["--wan"], "another model's filter"),
        (["--output-dtype", "float16"], "another output dtype"),
        (["--lr-gamma", "0.9"], "asks convert_to_quant for learned rounding"),
        (["--scaling_mode", "row"], "asks convert_to_quant for FP8 with other scales"),
        (["--layer-config", "a.json"], "asks convert_to_quant for mixed formats"),
        (["--device", "tpu"], '--device must be "cpu", "cuda" or "cuda:N", not "tpu"'),
        (["--device", "cuda:x", "--dry-run"], "device must be"),
        (["--no-such-option"], "--no-such-option"),
        (["--exclude-layers", "a{99999999999999}"], "is not a regular expression"),
        (["--exclude-layers", "(" * 5000 + ")" * 5000], "is not a regular expression"),
        (["--dry-run", "--report", "r.json"], "--report needs a conversion"),
        (
            ["--report", "../{folder}/o.safetensors"],
            "--report and another output are the same file",
        ),
        (["--recipe", "none.toml"], "--recipe none.toml does not exist"),
        (["--report", "folder/"], "folder/ is a folder; name a file"),
        (["--report", "-"], "--report: - names no file or folder here; write ./- if one does"),
        (["--report", "o.safetensors"], "--report and another output are the same file"),
    ],
)
def test_wrong_usage(
    in_process: Run, small_file: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    arguments = [argument.replace("{folder}", tmp_path.name) for argument in arguments]
    result = in_process("convert", "-i", small_file, "-o", "o.safetensors", *arguments)
    fails(result, 2, sentence)
    assert len(result.stderr.splitlines()) == 1
    only(tmp_path)


@pytest.mark.peer
def test_every_option_of_convert_to_quant_is_known(in_process: Run, small_file: Path) -> None:
    code = (
        "from convert_to_quant.cli.main import get_parser\n"
        "for action in get_parser()._actions:\n"
        "    print(*[o for o in action.option_strings if o.startswith('--')])"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    options = [line.split() for line in listed.stdout.splitlines() if line.startswith("--")]
    assert len(options) > 100
    known = in_process("convert", "--help").stdout
    for spellings in options:
        for option in spellings:
            documented = option.replace("_", "-")
            if documented in known or option in ("--output", "--input"):
                continue
            result = in_process("convert", "-i", small_file, option)
            assert result.returncode == 2, option
            assert f"{documented} asks convert_to_quant for" in result.stderr, result.stderr


def test_no_command(cli: Run) -> None:
    assert cli().returncode == 2


# ---- where the output can go


def test_output_folder_is_missing(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    fails(in_process("convert", "-i", small_file, "-o", "no/o.safetensors"), 1, "no does not exist")
    only(tmp_path)


def test_output_is_a_folder(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").mkdir()
    fails(in_process("convert", "-i", small_file, "-o", "o.safetensors"), 2, "is a folder")


@pytest.mark.parametrize("how", ["same", "other spelling", "symbolic link", "hard link", "shard"])
def test_output_is_the_input(in_process: Run, small_file: Path, tmp_path: Path, how: str) -> None:
    source = tmp_path / "in.safetensors"
    shutil.copy(small_file, source)
    output = source
    if how == "other spelling":
        output = tmp_path / "." / ".." / tmp_path.name / "in.safetensors"
    elif how == "symbolic link":
        output = tmp_path / "link.safetensors"
        output.symlink_to(source)
    elif how == "hard link":
        output = tmp_path / "link.safetensors"
        output.hardlink_to(source)
    elif how == "shard":
        source = tmp_path / "z"
        write_shards(source, to_diffusers(random_tensors(small_shapes(1))))
        output = min(source.glob("*.safetensors"))
    before = output.read_bytes()
    result = in_process("convert", "-i", source, "-o", output, "--overwrite")
    fails(result, 2, "is the input; choose another name")
    assert output.read_bytes() == before


def test_existing_output_is_protected(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").write_bytes(b"precious")
    result = in_process("convert", "-i", small_file, "-o", "o.safetensors")
    fails(result, 1, "o.safetensors exists; --overwrite replaces it")
    assert (tmp_path / "o.safetensors").read_bytes() == b"precious"
    assert (
        in_process("convert", "-i", small_file, "-o", "o.safetensors", "--overwrite").returncode
        == 0
    )
    assert (tmp_path / "o.safetensors").stat().st_size > 1000
    only(tmp_path, "o.safetensors")


def test_overwriting_through_a_link_keeps_the_link(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "real.safetensors").write_bytes(b"old")
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    assert (
        in_process("convert", "-i", small_file, "-o", "link.safetensors", "--overwrite").returncode
        == 0
    )
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "real.safetensors").stat().st_size > 1000


def test_free_space_is_checked_first(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with (
        pytest.raises(OutputError, match=r"needs 1,001 bytes, but .* has 1,000 free"),
        AtomicFile(tmp_path / "o.safetensors", 1001, overwrite=False),
    ):
        pass
    only(tmp_path)


def test_other_inputs_are_protected(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "z", to_diffusers(random_tensors(small_shapes(1))))
    index = tmp_path / "z" / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "my.toml").write_text('title = "mine"')
    before = index.read_bytes()
    arguments = ("-o", "o.safetensors", "--overwrite", "--report")
    fails(in_process("convert", "-i", "z", *arguments, index), 2, "is the input")
    recipe = ("--recipe", "my.toml")
    fails(
        in_process("convert", "-i", small_file, *arguments, *recipe[1:], *recipe), 2, "is the input"
    )
    assert index.read_bytes() == before and (tmp_path / "my.toml").stat().st_size < 99


def test_what_is_no_regular_file(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    pipe = "pipe.safetensors"
    fails(
        in_process("convert", "-i", pipe, "-o", "o.safetensors"),
        1,
        "pipe.safetensors is not a regular",
    )
    fails(
        in_process("convert", "-i", "/dev/zero", "-o", "o.safetensors"), 1, "is not a regular file"
    )
    fails(in_process("inspect", pipe), 1, "pipe.safetensors is not a regular file")
    result = in_process("convert", "-i", small_file, "-o", pipe, "--overwrite")
    fails(result, 1, "pipe.safetensors is not a regular file")
    assert (tmp_path / pipe).is_fifo()
    result = in_process("convert", "-i", small_file, "-o", "loop.safetensors")
    fails(result, 1, "loop.safetensors is a link that leads back to itself; name another")
    fails(in_process("convert", "-i", "/"), 2, "--output must be given")


def test_report_is_no_shard_of_the_input(in_process: Run, tmp_path: Path) -> None:
    write_shards(tmp_path / "z", to_diffusers(random_tensors(small_shapes(1))))
    shard = min((tmp_path / "z").glob("*.safetensors"))
    before = shard.read_bytes()
    result = in_process(
        "convert", "-i", "z", "-o", "o.safetensors", "--report", shard, "--overwrite"
    )
    fails(result, 2, "is the input; choose another name")
    assert shard.read_bytes() == before


def test_something_else_under_the_hidden_name(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    (tmp_path / ".o.safetensors.zimage-mxfp8-partial").symlink_to("nowhere")
    fails(in_process("convert", "-i", small_file, "-o", "o.safetensors"), 1, "could not be written")


def test_permissions(cli: Run, small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors").chmod(0)
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "blind").mkdir(mode=0o300)
    drop = {"preexec_fn": drop_the_right_to_ignore_permissions}
    fails(
        cli("convert", "-i", "in.safetensors", **drop),
        1,
        "in.safetensors cannot be read: no permission",
    )
    (tmp_path / "in.safetensors").chmod(0o600)
    (tmp_path / "closed" / "transformer").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    fails(cli("inspect", "closed", **drop), 1, "closed cannot be read: no permission; allow")
    inside = "closed/transformer/m.safetensors"
    for command in (["convert", inside], ["inspect", inside], ["validate", inside]):
        fails(cli(*command, **drop), 1, f"{inside} cannot be read: no permission; allow")
    for command in (
        ["convert", "closed/transformer"],
        ["generate", "--prompt", "a", "--model-dir", "closed/transformer"],
        ["generate", "--model-dir", "a", "--settings-from", "closed/transformer/i.png"],
    ):
        result = cli(*command, **drop)
        assert (result.returncode, result.stdout) == (1, "")
        last = result.stderr.splitlines()[-1]
        assert "closed/transformer" in last and "no permission; allow" in last, result.stderr
    result = cli("convert", "in.safetensors", "closed/transformer/o.safetensors", **drop)
    fails(result, 1, "closed/transformer is not writable")
    result = cli("recipes", "closed/transformer/r.toml", **drop)
    fails(result, 1, "recipe closed/transformer/r.toml cannot be read: Permission denied")
    result = cli("convert", "-i", "in.safetensors", "-o", "locked/o.safetensors", **drop)
    fails(result, 1, "locked is not writable")
    # Writable but not listable: cleaning up and flushing the folder fail, the conversion does not.
    result = cli("convert", "-i", "in.safetensors", "-o", "blind/o.safetensors", **drop)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "blind" / "o.safetensors").stat().st_size > 1000


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_disk_that_fills_up(cli: Run, small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").write_bytes(b"old")
    result = cli(
        *("convert", "-i", small_file, "-o", "o.safetensors", "--overwrite"),
        preexec_fn=limit_file_size,
    )
    fails(result, 1, "o.safetensors could not be written", "nothing was kept")
    assert (tmp_path / "o.safetensors").read_bytes() == b"old"
    only(tmp_path, "o.safetensors")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_tmpfs(cli: Run, small_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        # Sparse: it takes no space now, so the check passes and writing is what fails.
        script = (
            "import shutil, sys\n"
            "usage = shutil.disk_usage('/')\n"
            "shutil.disk_usage = lambda _: usage\n"
            "from zimage_mxfp8.cli.main import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, "convert", "-i", str(small_file), "-o"]
            + [str(disk / "o.safetensors")],
            capture_output=True,
            text=True,
            check=False,
        )
        fails(result, 1, "could not be written: No space left on device")
        only(disk)
        result = cli("convert", "-i", small_file, "-o", disk / "o.safetensors")
        fails(result, 1, "o.safetensors needs", "free")
        only(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- what can happen on the way


@pytest.fixture(scope="module")
def slow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a moment to convert."""
    path = tmp_path_factory.mktemp("slow") / "in.safetensors"
    shapes = small_shapes(1) | {
        f"layers.0.feed_forward.{w}.weight": (8192, 4096) for w in ("w1", "w2", "w3")
    }
    save_file(random_tensors(shapes), path)
    return path


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zimage_mxfp8.cli.main", "convert", "--overwrite", "--any-model"]
        + ["-i", str(source), "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have what runs in the background ignore Ctrl-C; this test may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_partial_output(child: subprocess.Popen[str], folder: Path) -> None:
    """Until it writes, or is done: what starts before that takes longer."""
    while child.poll() is None and not list(folder.glob(".*")):
        time.sleep(0.001)


def test_kill_leaves_the_old_file_or_the_new_one(slow_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    child = start(slow_file, output)
    wait_for_partial_output(child, tmp_path)
    began = time.monotonic()
    child.communicate(timeout=60)
    duration = time.monotonic() - began
    complete = output.read_bytes()
    outcomes = set()
    left_behind = False
    kills = 6
    for i in range(kills):
        output.write_bytes(b"old")
        for left in tmp_path.glob(".*"):
            left.unlink()
        child = start(slow_file, output)
        wait_for_partial_output(child, tmp_path)
        time.sleep(duration * i / kills)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        content = output.read_bytes()
        assert content in (b"old", complete), f"partial output of {len(content)} bytes"
        outcomes.add(content == complete)
        left_behind |= len(list(tmp_path.iterdir())) > 1
    assert left_behind, "no kill came in the middle of the writing"
    assert False in outcomes
    child = start(slow_file, output)
    child.communicate(timeout=60)
    assert output.read_bytes() == complete
    only(tmp_path, "o.safetensors")


def test_next_run_cleans_up_for_other_targets_too(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    (tmp_path / ".gone.safetensors.zimage-mxfp8-partial").write_bytes(b"left by a crash")
    assert in_process("convert", "-i", small_file, "-o", "o.safetensors").returncode == 0
    only(tmp_path, "o.safetensors")


def test_two_writers_of_one_target(small_file: Path, cli: Run, tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "o.safetensors", 10, overwrite=False) as file:
        result = cli("convert", "-i", small_file, "-o", "o.safetensors")
        fails(result, 1, "another process is writing")
        assert cli("convert", "-i", small_file, "-o", "other.safetensors").returncode == 0
        writer = file.open()
        writer.write(0, np.frombuffer(b"0123456789", np.uint8))
        writer.flush()
        writer.close()
    assert (tmp_path / "o.safetensors").read_bytes() == b"0123456789"
    only(tmp_path, "o.safetensors", "other.safetensors")


def test_interrupt(slow_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    output.write_bytes(b"old")
    for _ in range(20):
        child = start(slow_file, output)
        wait_for_partial_output(child, tmp_path)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        if child.returncode != 0:
            break
        output.write_bytes(b"old")  # it was done before the signal came
    assert child.returncode == 130
    assert errors == "zimage-mxfp8: error: interrupted; no partial output was left\n"
    assert output.read_bytes() == b"old"
    only(tmp_path, "o.safetensors")


def test_interrupt_while_workers_start(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zimage_mxfp8 as zm

    started = []
    real = threading.Thread.start

    def start_once(thread: threading.Thread) -> None:
        if started:
            raise KeyboardInterrupt
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start_once)
    with pytest.raises(KeyboardInterrupt):
        zm.convert(small_file, tmp_path / "o.safetensors", threads=4)
    assert not started[0].is_alive()
    only(tmp_path)


@pytest.mark.parametrize("possible", [0, 2])
def test_system_without_threads(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, possible: int
) -> None:
    import zimage_mxfp8 as zm

    started = []
    real = threading.Thread.start

    def start_some(thread: threading.Thread) -> None:
        if len(started) == possible:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    if possible:
        assert zm.convert(small_file, tmp_path / "o.safetensors", threads=8).quantized == 185
    else:
        with pytest.raises(zm.UnsupportedError, match="cannot start a thread"):
            zm.convert(small_file, tmp_path / "o.safetensors", threads=8)
        only(tmp_path)


def test_failing_progress_callback_stops_the_work(small_file: Path, tmp_path: Path) -> None:
    import zimage_mxfp8 as zm

    def fail(progress: zm.Progress) -> None:
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        zm.convert(small_file, tmp_path / "o.safetensors", progress=fail)
    only(tmp_path)


def test_header_decides_how_much_memory_is_used(tmp_path: Path, cli: Run) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    fails(
        cli("convert", "-i", path, preexec_fn=limit_memory),
        1,
        "in.safetensors is not a safetensors file",
    )


@pytest.mark.parametrize("value", [5, "a\0b", b"a\0b", ["a"], "", "\ud800"])
def test_paths_of_wrong_types(small_file: Path, value: Any) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: zm.convert(small_file, recipe=value),
        lambda: zm.load_recipe(value),
        lambda: zm.GenerationSettings("a", init_image=value),
        lambda: zm.ZImageTransformer.from_checkpoint(value),
        lambda: zm.ZImageTransformer.from_pretrained(value),
        lambda: zm.ZImageControlNet.from_checkpoint(value),
        lambda: zm.ZImageGenerator(value),
        lambda: zm.evaluate(value, small_file, prompts=["a"]),
        lambda: zm.convert(value),
        lambda: zm.convert(small_file, value),
        lambda: zm.convert(small_file, report=value),
        lambda: zm.inspect(value),
        lambda: zm.validate(value),
        lambda: zm.dequantize_checkpoint(small_file, value),
    )
    for call in calls:
        with pytest.raises(zm.UsageError, match=r"must be .*path"):
            call()
    only(small_file.parent, small_file.name)


def test_tensors_in_f64(in_process: Run, tmp_path: Path) -> None:
    """ComfyUI takes them where they are kept; `generate` does not, and `convert` says so."""
    norm, extra = "layers.0.attention_norm1.weight", "layers.0.attention.out.bias"
    model = random_tensors(zimage_shapes(dim=128, layers=1, caption_dim=32, hidden=64))
    changes = {norm: model[norm].double(), extra: torch.zeros(128, dtype=torch.float64)}
    save_file(model | changes, tmp_path / "in.safetensors")
    result = in_process("convert", "in.safetensors", "out.safetensors")
    assert result.returncode == 0, result.stderr
    refused = "it is copied, and generate refuses the converted file"
    assert f'"{norm}" is F64, which generate does not take: {refused}' in result.stderr
    assert f'"{extra}" is not part of a Z-Image transformer, and would' in result.stderr
    for name in (norm, extra):
        save_file(model | {name: changes[name]}, tmp_path / "in.safetensors")
        zm.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", overwrite=True)
        with pytest.raises(zm.CheckpointError, match=re.escape(name)):
            open_model(tmp_path / "out.safetensors")


def test_an_embedder_in_f64(in_process: Run, small_model: Tensors, tmp_path: Path) -> None:
    name = "t_embedder.mlp.0.weight"
    save_file(small_model | {name: small_model[name].double()}, tmp_path / "in.safetensors")
    result = in_process("convert", "in.safetensors", "out.safetensors")
    problem = f'in.safetensors: tensor "{name}" is F64, not BF16, F16 or F32, and the bias'
    fails(result, 1, problem, "--bias-correction none does without")
    only(tmp_path, "in.safetensors")


def test_a_kept_nan_is_told_once(in_process: Run, small_model: Tensors, tmp_path: Path) -> None:
    changed = dict(small_model)
    for name in ("layers.0.attention.qkv.weight", "layers.0.attention_norm1.weight"):
        changed[name] = torch.full_like(small_model[name], torch.nan)
    save_file(changed, tmp_path / "in.safetensors")
    result = in_process("convert", "in.safetensors", "out.safetensors", "--nonfinite", "keep")
    assert result.returncode == 0
    assert result.stderr.count("has NaN or Inf and is kept") == 2, result.stderr


def test_vectors_that_the_model_does_not_have(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    """They are copied, as ComfyUI ignores them, with a warning that `generate` does not."""
    tensors = load_file(small_file)
    names = [f"layers.0.attention.{part}.bias" for part in "abcdefg"]
    tensors |= {name: torch.zeros(8, dtype=torch.bfloat16) for name in names}
    save_file(tensors, tmp_path / "in.safetensors")
    result = in_process("convert", "in.safetensors", "out.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("it is copied, and generate refuses the converted file") == 5
    assert "2 more of such tensors" in result.stderr
    assert names[6] in load_file(tmp_path / "out.safetensors")
    with pytest.raises(zm.CheckpointError, match=re.escape(names[0])):
        open_model(tmp_path / "out.safetensors")
