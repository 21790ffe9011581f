"""`zimage-mxfp8 bench` on the CPU, with a tiny model. No test looks at a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.commands import Run, fails, only
from helpers.documents import GUIDE, text_of
from zimage_mxfp8 import _core
from zimage_mxfp8.bench import commit, forwards, gemms, models, run, timing
from zimage_mxfp8.bench.attempts import Attempts
from zimage_mxfp8.bench.gemms import Gemms, block_gemms
from zimage_mxfp8.bench.report import BenchReport, GemmTime, MeasuredDevice, Missing
from zimage_mxfp8.bench.run import bench
from zimage_mxfp8.bench.workload import WHOLE, Workload
from zimage_mxfp8.ops.gemm import operand
from zimage_mxfp8.printing.bench import print_bench
from zimage_mxfp8.printing.screen import as_text
from zimage_mxfp8.streaming.jobs import StageProgress
from zimage_mxfp8.system import devices, driver
from zimage_mxfp8.transformer.adoption import adopt
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported
from zimage_mxfp8.transformer.linear import Linear
from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.zimage.config import ZImageConfig
from zimage_mxfp8.zimage.layers import zimage_shapes

CPU = torch.device("cpu")
CONFIG = ZImageConfig.of_shapes(
    zimage_shapes(dim=128, layers=5, refiner_layers=2, caption_dim=64, hidden=96)
)
TINY = Workload(CONFIG, (32, 64), 32)
MODES = [mode for mode in COMPUTE_MODES if not unsupported(mode, -1)]
ON_CPU = [("diffusers", "bfloat16", ""), ("zimage-mxfp8", "bfloat16", "")] + [
    ("zimage-mxfp8", "mxfp8", mode) for mode in MODES
]


@pytest.fixture(autouse=True)
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_WARM_UP", "_RUNS"):
        monkeypatch.setattr(timing, name, 1)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    """Of a device that has nothing but ours in BF16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards, "_MODELS", [("plain", "weight-only")])
        patch.setattr(forwards.Forwards, "_measure_peer", lambda _: None)
        return bench("cpu", workload=replace(TINY, sides=(32,)))


# ---- The command


def test_table_and_file(in_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SMALL", TINY)
    result = in_process("bench", "--device", "cpu", "-o", "card.json")
    assert result.returncode == 0, result.stderr
    only(tmp_path, "card.json")
    document = json.loads((tmp_path / "card.json").read_text())
    assert document["schema"] == 1 and document["gemms"] == []
    assert document["installation"] == json.loads(in_process("doctor", "--json").stdout)
    assert document["device"] == asdict(MeasuredDevice("cpu", "CPU", "", 0, ""))
    assert document["workload"]["config"] == asdict(CONFIG)
    keys = ("program", "weights", "mode", "graph", "side")
    found = [tuple(row[key] for key in keys) for row in document["forwards"]]
    assert found == [(*name, False, side) for name in ON_CPU for side in TINY.sides]
    assert all(row["milliseconds"] > 0 and row["runs"] == 1 for row in document["forwards"])
    refused = document["missing"]
    assert refused == [{"part": "forward", "what": "mxfp8", "reason": unsupported("mxfp8", -1)}]
    for text in (*MODES, *refused[0].values(), "32x32", "64x64", "random weights of 4"):
        assert text in result.stdout
    assert result.stdout.endswith("wrote card.json: the result, for a report\n")
    assert "measuring weight-only" in result.stderr


def test_the_guide_names_every_key(report: BenchReport) -> None:
    table = text_of(GUIDE / "bench.md").partition("## The JSON")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    gemm = GemmTime("new", "int8", "int8", "none", "qkv", 1, 1, 1, 1.0)
    missing = Missing("gemm", "old", "no")
    document = replace(report, gemms=[gemm], missing=[missing]).to_dict()
    assert list(rows) == list(document)
    values = [document["device"], document["workload"]]
    values += [document[key][0] for key in ("forwards", "gemms", "missing")]
    for key, value in zip(
        ("device", "workload", "forwards", "gemms", "missing"), values, strict=True
    ):
        assert set(value) <= set(re.findall(r"`(\w+)`", rows[key]))


def test_json_alone(
    in_process: Run, report: BenchReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "bench", lambda *_, **options: report)
    result = in_process("bench", "--json", "-o", "card.json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "card.json").read_text())
    assert result.stderr == "zimage-mxfp8: wrote card.json: the result, for a report\n"


def test_the_result_is_shown_if_its_file_cannot_be_written(
    in_process: Run, report: BenchReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bench(*_: object, **options: object) -> BenchReport:
        (tmp_path / "out").rmdir()
        return report

    monkeypatch.setattr(run, "bench", bench)
    for option, shown in (("--device=cpu", "random weights of 4"), ("--json", '"forwards": [')):
        (tmp_path / "out").mkdir()
        result = in_process("bench", "-o", "out/card.json", option)
        assert result.returncode == 1 and "card.json could not be written" in result.stderr
        assert shown in result.stdout


def test_a_failing_diagnosis_is_reported_before_measuring(
    in_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a wrong ZIMAGE_MXFP8_GEMM_KERNEL, which a process reads once."""

    def diagnose() -> None:
        raise zm.InvalidArgumentError('unknown GEMM kernel "fastest"')

    monkeypatch.setattr(run, "diagnose", diagnose)
    monkeypatch.setattr(forwards.Forwards, "measure", lambda _: pytest.fail("measured"))
    fails(in_process("bench", "--device", "cpu"), 1, 'unknown GEMM kernel "fastest"')


def test_bad_command_lines(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    fails(in_process("bench", "--device", "tpu"), 2, "--device", 'not "tpu"')
    fails(in_process("bench", "--device", "cuda:99"), 1, "device cuda:99", "use cpu")
    fails(in_process("bench", "-o", "missing/a.json"), 1, "missing does not exist; create it")
    fails(in_process("bench", "-o", "old.json"), 1, "old.json", "--overwrite")
    only(tmp_path, "old.json")


def test_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from zimage_mxfp8.cli.main import main; "
    result = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main(['bench', '-o', 'card.json']))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    fails(result, 1, "bench needs torch", 'run pip install "zimage-mxfp8[torch]"')
    only(tmp_path)


# ---- What is measured


def test_shared_blocks_compute_what_copies_do() -> None:
    """A transformer of copies, made another way, gives the same; each block is called."""
    plain, layers = models.random_tensors(CONFIG, "mxfp8", CPU, torch.bfloat16)
    parts = models.deep_parts(CONFIG, plain, layers, "weight-only", torch.bfloat16)
    model = ZImageTransformer(CONFIG, parts, "weight-only", torch.bfloat16, False)

    def copied(tensors: dict[str, Any]) -> dict[str, Any]:
        """Blocks 0 and 1 in turn, of refiners block 0."""
        result = {}
        for name, tensor in tensors.items():
            stack, number, rest = (*name.split(".", 2), "", "")[:3]
            if stack not in ("layers", "noise_refiner", "context_refiner"):
                result[name] = tensor
                continue
            count, step = (5, 2) if stack == "layers" else (2, 1)
            for block in range(int(number), count, step):
                result[f"{stack}.{block}.{rest}"] = tensor
        return result

    whole = adopt(copied(plain), copied(layers), "weight-only", torch.bfloat16)
    assert whole.config == model.config
    calls = [0]
    for block in {id(b): b for b in (*model.layers, *model.noise_refiner)}.values():
        block.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
    inputs = forwards.Forwards(TINY, CPU, Attempts(CPU, 0, None))._inputs(32)
    got, wanted = model(*inputs).sample[0], whole(*inputs).sample[0]
    assert torch.isfinite(wanted).all() and torch.equal(got, wanted)
    assert calls == [7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("fp8", "fp8"),
        ("weight-only", "mxfp8 (weight-only)"),
        ("int8", "int8 (rotated)"),
        ("mxfp8-emulated", "mxfp8"),
    ],
)
def test_all_layers_are_in_the_mode(mode: Any, weights: str, dtype: torch.dtype) -> None:
    """None is left out as one whose scales cannot be folded."""
    tensors = models.random_tensors(CONFIG, "mxfp8", CPU, dtype)
    parts = models.deep_parts(CONFIG, *tensors, mode, dtype)
    blocks = [block for stack in parts.blocks.values() for block in stack]
    linears = [x for block in blocks for x in block.modules() if isinstance(x, Linear)]
    assert {layer.weight_format for layer in linears} == {weights}
    assert {layer.dtype for layer in linears} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diffusers_model_has_the_whole_depth(dtype: torch.dtype) -> None:
    model = models.diffusers_model(CONFIG, CPU, dtype)
    stacks = (model.layers, model.noise_refiner, model.context_refiner)
    assert [len(stack) for stack in stacks] == [5, 2, 2]
    assert [len(set(stack)) for stack in stacks] == [2, 1, 1]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


def test_devices_without_bfloat16_are_measured_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forwards, gemms):
        monkeypatch.setattr(module, "default_dtype", lambda _: torch.float16)
    report = bench("cpu", workload=TINY)
    rows = {(row.program, row.weights, row.mode) for row in report.forwards}
    assert rows >= {("diffusers", "float16", ""), ("zimage-mxfp8", "float16", "")}
    assert rows >= {("zimage-mxfp8", "mxfp8", mode) for mode in MODES}
    text = as_text(lambda screen: print_bench(report, screen))
    assert "FP16" in text and "BF16" not in text
    first = next(Gemms(TINY, CPU, Attempts(CPU, 0, None))._ways_of_torch())
    assert (first.kernel, first.a, first.b) == ("torch linear", "float16", "float16")


def test_gemms_of_the_real_model() -> None:
    found = {gemm.layer: (gemm.rows, gemm.columns) for gemm in block_gemms(WHOLE.config)}
    assert found == {
        "qkv": (11520, 3840),
        "out": (3840, 3840),
        "w1+w3": (20480, 3840),
        "w2": (3840, 10240),
    }
    assert WHOLE.tokens == (1152, 4224)


def test_every_format_of_the_table_can_be_encoded() -> None:
    formats = {name for kernel in _core.gemm_kernels() for pair in kernel.operands for name in pair}
    matrix = torch.randn(32, 64).bfloat16()
    assert {name: operand(gemms._encode(matrix, name), "a")[0] for name in formats} == {
        name: name for name in formats
    }


def test_rows_follow_the_table_of_kernels(
    report: BenchReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with a clock instead of CUDA graphs: all calls are made."""
    table = [
        SimpleNamespace(name="new", operands=[("mxfp8", "mxfp8")], epilogues=["none"]),
        SimpleNamespace(name="old", operands=[("mxfp8", "mxfp8")], epilogues=["none"]),
        SimpleNamespace(name="fused", operands=[("row-scaled",) * 2], epilogues=["silu_multiply"]),
        SimpleNamespace(name="reference", operands=[("mxfp8", "mxfp8")], epilogues=["none"]),
    ]
    called: list[tuple[str, tuple[int, ...]]] = []

    def multiplication(kernel: str, epilogue: str) -> Callable[..., object]:
        def multiply(a: Any, b: Any, *arguments: object) -> None:
            assert arguments == (("bfloat16",) if kernel == "fused" else ())
            assert a.shape[1] == b.shape[1]
            called.append((kernel, b.shape))
            if kernel == "new" and b.shape == (128, 128):
                torch.empty(1 << 60)

        return multiply

    def captured(calls: timing.Calls) -> timing.Captured:
        for call in calls:
            call()
        return timing.Captured(torch.cuda.CUDAGraph, calls)  # type: ignore[arg-type]

    monkeypatch.setattr(_core, "gemm_kernels", lambda: table)
    monkeypatch.setattr(_core, "gemm_unsupported", lambda name, *_: "no" if name == "old" else "")
    monkeypatch.setattr(gemms, "_multiplication", multiplication)
    monkeypatch.setattr(gemms, "capture", captured)
    monkeypatch.setattr(gemms, "microseconds_in_turn", lambda ways, _: dict.fromkeys(ways, 1.0))
    monkeypatch.setattr(gemms.scaled_mm, "unsupported", lambda _: "no FP8")
    monkeypatch.setattr(gemms, "_CACHE", 0)

    attempts = Attempts(CPU, 4, None)
    measured = Gemms(replace(TINY, sides=(64,)), CPU, attempts)
    measured.measure()
    names = [(row.layer, row.kernel, row.a, row.m, row.n, row.k) for row in measured.times]
    sizes = {"qkv": (384, 128), "out": (128, 128), "w1+w3": (192, 128), "w2": (128, 96)}
    ways = [("torch linear", "bfloat16"), ("torch._int_mm", "int8"), ("new", "mxfp8")]
    wanted = [
        (layer, *way, 48, *size)
        for layer, size in sizes.items()
        for way in [*ways, ("fused", "row-scaled")]
        if (layer, way[0]) != ("out", "new") and (way[0] != "fused" or layer == "w1+w3")
    ]
    assert names == wanted
    assert {kernel for kernel, _ in called} == {"new", "fused"}
    assert measured.times[0].tflops == pytest.approx(2 * 48 * 384 * 128 / 1e6)
    failed = "new of mxfp8 x mxfp8, out at 48 tokens"
    assert attempts.missing[:2] == [
        Missing("gemm", "torch._scaled_mm", "no FP8"),
        Missing("gemm", "old", "no"),
    ]
    assert attempts.missing[2].what == failed
    assert attempts.missing[2].reason.startswith(f"not enough memory for {failed}; ")

    text = as_text(lambda screen: print_bench(replace(report, gemms=measured.times), screen))
    assert "at 48 tokens" in text and "fused, silu_multiply" in text and "INT8 x INT8" in text


def test_devices_without_kernels_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemms, "has_kernels", lambda _: False)
    monkeypatch.setattr(gemms.scaled_mm, "unsupported", lambda _: "")
    attempts = Attempts(CPU, 0, None)
    assert list(Gemms(TINY, CPU, attempts)._ways_of_kernels()) == []
    (missing,) = attempts.missing
    assert missing.reason == devices.why_no_kernels()


def test_after_exhausted_memory_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a forward, ours in BF16 at the first size, and once in making a model."""
    deep_parts, milliseconds, measured = models.deep_parts, timing.milliseconds, 0

    def in_int8(*arguments: Any) -> object:
        if arguments[3] == "int8":
            torch.empty(1 << 60)
        return deep_parts(*arguments)

    def in_third(*arguments: Any) -> object:
        nonlocal measured
        measured += 1
        if measured == 3:
            torch.empty(1 << 60)
        return milliseconds(*arguments)

    monkeypatch.setattr(forwards, "deep_parts", in_int8)
    monkeypatch.setattr(forwards, "milliseconds", in_third)
    seen: list[StageProgress] = []
    report = bench("cpu", workload=TINY, progress=seen.append)
    wanted = [(*name, side) for name in ON_CPU for side in TINY.sides if name[2] != "int8"]
    found = [(row.program, row.weights, row.mode, row.side) for row in report.forwards]
    assert found == wanted[:2] + wanted[3:]
    failed = ["zimage-mxfp8 in bfloat16 at 32x32", "int8"]
    assert [each for each in report.missing if each.what != "mxfp8"] == [
        Missing("forward", what, f"not enough memory for {what}; measure on another device")
        for what in failed
    ]
    assert [each.done for each in seen] == list(range(len(seen)))
    assert {each.total for each in seen} == {len(seen)}


# ---- The machine


def test_driver_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nprintf ' <driver_version>580.95.05</driver_version>\\n <cuda_version>13.0<'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert driver.release() == "580.95.05"
    program.write_text("#!/bin/sh\necho no devices\nexit 9\n")
    assert driver.release() == ""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert driver.release() == ""


def test_commit_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record: dict[str, Any] = {}

    def installed(_: str) -> SimpleNamespace:
        return SimpleNamespace(read_text=lambda _: json.dumps(record) if record else None)

    monkeypatch.setattr(commit, "distribution", installed)
    assert commit.installed_commit() == ""
    record |= {"url": (tmp_path / "a clone").as_uri(), "dir_info": {}}
    folder = tmp_path / "a clone"
    folder.mkdir()
    assert commit.installed_commit() == ""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    found = commit.installed_commit()
    assert found == head.stdout.strip()
    (folder / "x").touch()
    assert commit.installed_commit() == found
    subprocess.run(["git", "add", "x"], cwd=folder, check=True)
    assert commit.installed_commit() == f"{found}-dirty"
    record |= {"vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
    assert commit.installed_commit() == "0123abc"


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"url": 5}', '{"vcs_info": null}', '{"url": "file://[x/"}']
)
def test_a_damaged_record_of_pip_has_no_commit(
    record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = SimpleNamespace(read_text=lambda _: record)
    monkeypatch.setattr(commit, "distribution", lambda _: installed)
    assert commit.installed_commit() == ""


def test_the_table_names_the_gpu(report: BenchReport) -> None:
    gpu = MeasuredDevice("cuda:0", "Fake RTX 4090", "8.9", 24 << 30, "580.95.05")
    changed = replace(report, device=gpu, commit="0123abc")
    text = as_text(lambda screen: print_bench(changed, screen))
    for part in ("Fake RTX 4090", "8.9", "24.00 GiB", "580.95.05", zm.__version__, "0123abc"):
        assert part in text.splitlines()[0]
