"""`zimage-mxfp8 doctor`, against what the parts of the installation say and do themselves."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors
import torch
import transformers

import zimage_mxfp8 as zm
from helpers.commands import Run
from helpers.fake_driver import make_driver
from zimage_mxfp8 import _core
from zimage_mxfp8.system.extras import find_extras
from zimage_mxfp8.transformer.arithmetic.int8 import quantize_rotated

CMAKE = Path(__file__).parents[3] / "CMakeLists.txt"
LIBRARIES = (torch, np, safetensors, diffusers, transformers)
MADE_FOR = {
    "dequantize": "BF16 x MXFP8",
    "fp8_rowwise": "row-scaled FP8",
    "int8_sm90": "INT8",
    "int8_sm80": "INT8",
    "mixed_sm90": "BF16 x MXFP8",
    "mxfp8_sm100": "MXFP8 x MXFP8",
    "mxfp8_sm120": "MXFP8 x MXFP8",
}
SIZE = 4096  # of the products that are asked about


def operands(what: str, matrix: torch.Tensor) -> tuple[Any, Any]:
    """Those of a kind of product, by the name that the command gives it."""
    if what == "row-scaled FP8":
        return zm.quantize_rows(matrix), zm.quantize_rows(matrix)
    if what == "INT8":
        encoded = quantize_rotated(matrix)
        return encoded, encoded
    first, second = what.split(" x ")
    assert second == "MXFP8" and first in ("MXFP8", "BF16")
    return zm.quantize(matrix) if first == "MXFP8" else matrix, zm.quantize(matrix)


def refusal(kernel: Any, matrix: torch.Tensor) -> str:
    """What is said to a product that asks for a path which is not there."""
    with pytest.raises(zm.UnsupportedError) as caught:
        zm.gemm(*operands(MADE_FOR[kernel], matrix), kernel=kernel)
    return str(caught.value)


def test_versions(in_process: Run) -> None:
    found = json.loads(in_process("doctor", "--json").stdout)
    project = re.search(r"project\(zimage_mxfp8 VERSION ([0-9.]+)", CMAKE.read_text("utf-8"))
    assert project and found["version"] == project[1] == zm.__version__
    assert found["python"].startswith(f"{platform.python_version()}, ")
    for library in LIBRARIES:
        assert found["libraries"][library.__name__] == library.__version__


def test_compiled_architectures(in_process: Run) -> None:
    found = json.loads(in_process("doctor", "--json").stdout)
    targets = found["architectures"]
    assert set(targets) <= {"80", "86", "89", "90a", "100f", "120f"}
    assert bool(found["cutlass"]) == any(target.endswith("f") for target in targets)
    for path, target in (("sm90", "90a"), ("sm100", "100f"), ("sm120", "120f")):
        # The stub of a path that was left out is in the module in its place.
        lacks = f"this build has no kernels for {path}".encode()
        assert (lacks in Path(_core.__file__).read_bytes()) == (target not in targets)
    assert bool(targets) == bool(found["cuda"]) != bool(found["no_cuda"])


def test_the_processor(cli: Run) -> None:
    found = json.loads(cli("doctor", "--json", env={"ZIMAGE_MXFP8_CPU": "baseline"}).stdout)
    assert found["cpu_target"] == "baseline" and "baseline" in found["cpu_targets"]
    matrix = torch.ones(32, 32).bfloat16()
    assert set(found["cpu"]["chosen"].values()) == {"reference"}
    for what, kernel in found["cpu"]["chosen"].items():
        assert zm.gemm_kernel(*operands(what, matrix)) == kernel
    names = {kernel.name for kernel in _core.gemm_kernels()}
    assert set(found["cpu"]["reasons"]) == names - {"reference"} == {*MADE_FOR, "fp8_sm90"}
    for kernel, reason in found["cpu"]["reasons"].items():
        if kernel == "fp8_sm90":  # for epilogues only
            assert reason == "GEMMs with an epilogue need a CUDA device"
            continue
        assert refusal(kernel, matrix).startswith(f"{reason}; ")
    assert found["cpu"]["compute"] == ["weight-only", "fp8", "int8", "mxfp8-emulated"]


def test_what_people_read(cli: Run) -> None:
    result = cli("doctor", env={"ZIMAGE_MXFP8_CPU": "baseline"})
    assert result.returncode == 0 and result.stderr == ""
    found = json.loads(cli("doctor", "--json").stdout)
    kernels = ", ".join(found["architectures"]) if found["cuda"] else f"none: {found['no_cuda']}"
    for what, value in (
        ("zimage-mxfp8", re.escape(zm.__version__)),
        ("CPU kernels", "baseline, of baseline"),
        ("CUDA kernels", re.escape(kernels)),
        ("torch", re.escape(torch.__version__)),
        ("BF16 x MXFP8", "reference"),
        ("transformer's compute modes", r"weight-only \(auto\), fp8, int8, mxfp8-emulated"),
        ("transformer's default dtype", "bfloat16"),
        ("mixed_sm90", "mixed_sm90 needs a CUDA device"),
    ):
        assert re.search(rf"│ {what} +│ {value}", result.stdout), what
    assert ("No CUDA device: " in result.stdout) == (found["devices"] == [])
    for device in found["devices"]:
        assert f"{device['name']}, compute capability {device['capability']}, " in result.stdout


def test_gpus_that_only_the_driver_shows(cli: Run, tmp_path: Path) -> None:
    """Without kernels, and with a torch that cannot use them."""
    if _core.build_info().cuda or torch.version.cuda:
        pytest.skip("needs a build and a torch without CUDA")
    environment = make_driver(tmp_path)
    found = json.loads(cli("doctor", "--json", env=environment).stdout)
    assert (found["driver"], found["no_devices"], found["torch_cuda"]) == ("12.8", "", "")
    assert "built" in found["no_cuda"]
    ada, blackwell = found["devices"]
    assert (ada["name"], ada["capability"], ada["memory"]) == ("Fake RTX 4090", "8.9", 24 << 30)
    assert not ada["kernels"] and ada["with_kernels"] == [
        "int8",
        "fp8",
        "weight-only",
        "mxfp8-emulated",
    ]
    assert ada["without_kernels"] == ada["with_kernels"]
    assert blackwell["without_kernels"] == ["fp8", "int8", "weight-only", "mxfp8-emulated"]
    assert blackwell["with_kernels"] == ["mxfp8", *blackwell["without_kernels"]]
    assert ada["gemm"]["compute"] == []
    reason = f"the torch that is installed ({torch.__version__}) does not find this device"
    assert set(ada["gemm"]["missing_modes"].values()) == {reason}
    shown = cli("doctor", env=environment)
    assert shown.returncode == 0 and shown.stderr == ""
    assert "Fake RTX 5090, compute capability 12.0, 32.00 GiB" in shown.stdout
    assert re.search(r"compute modes +│ none ", shown.stdout)
    assert re.search(
        r"compute modes with kernels +│ mxfp8, fp8, int8, weight-only, mxfp8-emulated ",
        shown.stdout,
    )
    assert "To get CUDA kernels, install nvcc 12.8" in shown.stdout
    assert "No CUDA device" not in shown.stdout


def test_without_torch(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    environment = make_driver(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    found = json.loads(cli("doctor", "--json", env=environment).stdout)
    assert [device["name"] for device in found["devices"]] == ["Fake RTX 4090", "Fake RTX 5090"]
    for device in found["devices"]:
        assert device["gemm"]["compute"] == []
        assert set(device["gemm"]["missing_modes"].values()) == {
            "torch is not installed, or cannot be imported"
        }


def test_extras_are_those_of_the_project_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((CMAKE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {
        name: requirements
        for name, requirements in project["optional-dependencies"].items()
        if name not in ("test", "dev", "docs", "all")  # of contributors; the sum of the others
    }
    assert all(extra.missing == [] for extra in find_extras())  # the tests need them
    monkeypatch.setattr("zimage_mxfp8.system.extras.version", missing := Missing())
    found = {extra.name: extra for extra in find_extras()}
    assert list(found) == list(wanted)
    for name, requirements in wanted.items():
        own = [text for text in requirements if not text.startswith("zimage-mxfp8[")]
        names = [re.split(r"[>=\[]", text)[0] for text in own]
        assert found[name].missing == list(dict.fromkeys(names))
        assert found[name].command == f'pip install "zimage-mxfp8[{name}]"'
    missing.found = {"transformers": "4.57.3", "torch": "2.10.0+cu130"}
    generate = {extra.name: extra for extra in find_extras()}["generate"]
    assert "transformers 5 or newer (4.57.3 is installed)" in generate.missing
    assert not any("torch" in package for package in generate.missing)


def test_a_diagnosis_prints_as_doctor_does(in_process: Run) -> None:
    assert str(zm.diagnose()).split() == in_process("doctor").stdout.split()


class Missing:
    """`importlib.metadata.version` where few packages are installed."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self.found:
            raise PackageNotFoundError(name)
        return self.found[name]


@pytest.mark.gpu
def test_a_device_takes_the_path_that_is_told() -> None:
    devices = zm.diagnose().devices
    assert [device.name for device in devices] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    for index, device in enumerate(devices):
        major, minor = torch.cuda.get_device_capability(index)
        assert device.capability == f"{major}.{minor}"
        generator = torch.Generator(f"cuda:{index}").manual_seed(index)
        matrix = torch.randn(SIZE, SIZE, generator=generator, device=generator.device).bfloat16()
        for what, kernel in device.gemm.chosen.items():
            a, b = operands(what, matrix)
            if kernel:
                assert zm.gemm_kernel(a, b) == kernel
                by_name: Any = kernel
                assert torch.equal(zm.gemm(a, b), zm.gemm(a, b, kernel=by_name))
            else:
                with pytest.raises(zm.UnsupportedError, match="no fast kernel"):
                    zm.gemm(a, b)
        for kernel, reason in device.gemm.reasons.items():
            if kernel not in MADE_FOR:  # for epilogues only
                continue
            assert kernel not in device.gemm.chosen.values()
            assert refusal(kernel, matrix).startswith(f"{reason}; ")
