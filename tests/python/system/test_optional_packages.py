"""What is said where an optional package is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import zimage_mxfp8 as zm
from zimage_mxfp8.system import extras, optional_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code], capture_output=True, text=True, **options
    )


def run_without(module: str, code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Python where a module cannot be imported."""
    return run(f"import sys; sys.modules[{module!r}] = None\n{code}", **options)


NEEDS = [
    ("ZImageTransformer", "torch", "torch", "torch"),
    ("analyse_sensitivity", "torch", "torch", "torch"),
    ("ZImageGenerator", "torch", "torch", "generate"),
    ("ZImageGenerator", "diffusers", "diffusers", "generate"),
    ("ZImageGenerator", "transformers", "transformers", "generate"),
    ("evaluate", "skimage", "scikit-image", "evaluate"),
    ("evaluate", "flip_evaluator", "flip-evaluator", "evaluate"),
    ("EvaluationReport", "scipy", "scipy", "evaluate"),
]


@pytest.mark.slow
def test_names_that_need_an_extra() -> None:
    code = f"""
import sys
import zimage_mxfp8 as zm
for name, module, *_ in {NEEDS}:
    sys.modules[module] = None
    for get in (lambda: getattr(zm, name), lambda: exec("from zimage_mxfp8 import " + name)):
        try:
            get()
        except ImportError as error:
            assert isinstance(error, zm.MissingFeatureError) and isinstance(error, zm.Error)
            print(type(error).__name__, error.name, error, sep="|")
    del sys.modules[module]
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    wanted = [
        f"MissingExtraError|{module}|{name} needs {package}, which is not installed; "
        f'run pip install "zimage-mxfp8[{extra}]"'
        for name, module, package, extra in NEEDS
    ]
    assert result.stdout.splitlines() == [line for line in wanted for _ in range(2)]


def test_quantizer_names_its_package() -> None:
    result = run_without("diffusers", "import zimage_mxfp8.diffusers")
    assert result.stderr.splitlines()[-1] == (
        "zimage_mxfp8.errors.MissingExtraError: zimage_mxfp8.diffusers needs diffusers, which is "
        'not installed; run pip install "zimage-mxfp8[generate]"'
    )


def test_names_that_need_nothing() -> None:
    code = "import zimage_mxfp8 as zm; zm.convert, zm.compare, zm.ZImageConfig, zm.quantize"
    assert run_without("torch", code).returncode == 0


def test_compare_names_its_package(small_file: Path) -> None:
    code = f"import zimage_mxfp8 as zm; zm.compare({str(small_file)!r})"
    result = run_without("ml_dtypes", code)
    assert result.stderr.splitlines()[-1].endswith(
        "MissingExtraError: comparing formats needs ml-dtypes, which is not installed; "
        'run pip install "zimage-mxfp8[analysis]"'
    )


def test_bfloat16_in_numpy_names_its_package() -> None:
    code = """
import numpy as np, zimage_mxfp8 as zm
zm.dequantize(zm.quantize(np.ones((2, 2), np.float32)), "bfloat16")
"""
    (line,) = run_without("ml_dtypes", code).stderr.splitlines()[-1:]
    assert "bfloat16 in NumPy needs ml-dtypes, which is not installed" in line


def test_a_package_that_is_there_and_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open\\nmore')")
    code = "import zimage_mxfp8 as zm; zm.ZImageTransformer"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stderr.splitlines()[-1].endswith(
        "ZImageTransformer needs torch, which cannot be imported (libcudart.so: cannot open); "
        'run pip install "zimage-mxfp8[torch]"'
    )


def test_a_dependency_of_a_package_is_not_called_the_package() -> None:
    result = run_without("regex", "import zimage_mxfp8 as zm; zm.ZImageGenerator")
    if result.returncode == 0:
        pytest.skip("the generator does not import it")
    line = result.stderr.splitlines()[-1]
    assert "which cannot be imported (" in line and 'zimage-mxfp8[generate]"' in line


def test_our_own_mistakes_are_no_missing_packages() -> None:
    with (
        pytest.raises(ImportError, match="no_such_module") as caught,
        optional_packages.needed("torch", "a test"),
    ):
        import zimage_mxfp8.no_such_module  # noqa: F401
    assert not isinstance(caught.value, zm.Error)


@pytest.mark.parametrize(
    "failure",
    [
        'OSError("no libfoo.so")',
        'AttributeError("no attribute x")',
        'RuntimeError("boom\\nmore")',
        'ImportError("gone")',
    ],
)
def test_a_package_that_fails_is_named(failure: str, tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text(f"raise {failure}")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from zimage_mxfp8.cli.main import main
sys.exit(main(["serve", "--model-dir", "x"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    reason = failure.partition('"')[2].rstrip('")').partition("\\n")[0]
    assert (result.returncode, result.stderr) == (
        1,
        f"zimage-mxfp8: error: serve needs fastapi, which cannot be imported ({reason}); run "
        'pip install "zimage-mxfp8[serve]"\n',
    )


def test_a_problem_is_told_once() -> None:
    with (
        pytest.raises(zm.MissingExtraError) as caught,
        optional_packages.needed("ray", "serve --ray"),
        optional_packages.needed("ray", "a module"),
    ):
        exec('raise RuntimeError("the package of grpc is too old")', {"__name__": "ray.serve"})
    assert str(caught.value).startswith(
        "serve --ray needs ray, which cannot be imported (the package of grpc is too old); run pip"
    )


def test_commands_say_the_same(small_file: Path, zimage_folder: Path) -> None:
    for module, words, sentence in (
        (
            "torch",
            ["sensitivity", zimage_folder],
            "sensitivity needs torch, which is not installed; run pip",
        ),
        (
            "torch",
            ["convert", small_file, "x.safetensors", "--bias-correction", "synthetic"],
            "the synthetic bias correction needs torch, which is not installed; run pip",
        ),
    ):
        code = f"from zimage_mxfp8.cli.main import main; sys.exit(main({list(map(str, words))}))"
        result = run_without(module, code)
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert sentence in result.stderr


def test_all_missing_packages_are_named() -> None:
    absent = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    code = f"sys.modules.update(dict.fromkeys({absent}))\n"
    code += "from zimage_mxfp8.cli.main import main; sys.exit(main(['serve']))"
    result = run_without("fastapi", code)
    assert result.returncode == 1
    assert result.stderr == (
        "zimage-mxfp8: error: serve needs fastapi, prometheus-client, python-multipart and "
        'uvicorn, which are not installed; run pip install "zimage-mxfp8[serve]"\n'
    )


def test_extras_that_are_named_exist_with_their_modules() -> None:
    """Those of `needed("torch", ...)` and the like, and what Python calls their packages."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    declared = project["project"]["optional-dependencies"]
    calls = re.compile(r"\b(?:needed|missing)\(\s*\"(\w+)\"")
    sources = Path(optional_packages.__file__).parents[1].rglob("*.py")
    named = {extra for file in sources for extra in calls.findall(file.read_text("utf-8"))}
    named |= set(optional_packages._NEEDED.values())
    assert {"analysis", "evaluate", "generate", "hub", "torch"} <= named
    assert named <= declared.keys() & extras.requirements().keys()
    for each in extras.requirements().values():
        for requirement in each:
            assert find_spec(requirement.module) is not None, requirement.package


def test_features_of_other_models_are_attribute_errors() -> None:
    assert issubclass(zm.MissingAttributeError, (AttributeError, zm.MissingFeatureError))
    assert not issubclass(zm.MissingExtraError, AttributeError)
