"""The node package: installed by the command, the same in integrations/comfyui."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.commands import Run, fails, only
from helpers.documents import ROOT

FILES = ("__init__.py", "pyproject.toml")


def test_the_command_writes_the_folder_for_copying(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    result = in_process("comfyui", "install", "ComfyUI")
    assert result.returncode == 0, result.stderr
    written = tmp_path / "ComfyUI" / "custom_nodes" / "zimage-mxfp8"
    only(written, *FILES)
    for name in FILES:
        for_copying = ROOT / "integrations" / "comfyui" / name
        assert (written / name).read_bytes() == for_copying.read_bytes()
    assert "start ComfyUI again" in result.stdout
    fails(in_process("comfyui", "install", "ComfyUI"), 1, "exists; --overwrite replaces it")
    (written / "README.md").write_text("of a copy of the folder")
    assert in_process("comfyui", "install", "ComfyUI", "--overwrite").returncode == 0
    only(written, *FILES)


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes").mkdir()
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from zimage_mxfp8.cli.main import main\n"
        "sys.exit(main(['comfyui', 'install', '.']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    only(tmp_path / "custom_nodes" / "zimage-mxfp8", *FILES)


def test_the_package_exports_what_comfyui_looks_for() -> None:
    """Loaded as ComfyUI loads it, by its path."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('node', sys.argv[1] + '/__init__.py')\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()\n"
        "for node in module.NODE_CLASS_MAPPINGS.values():\n"
        "    assert callable(getattr(node(), node.FUNCTION)) and node.RETURN_TYPES\n"
        "from comfy_kitchen.registry import registry\n"
        "print(registry._priority[0])\n"
    )
    folder = str(ROOT / "integrations" / "comfyui")
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert result.stdout == "zimage_mxfp8\n", result.stderr


def test_a_link(in_process: Run, tmp_path: Path) -> None:
    nodes = tmp_path / "ComfyUI" / "custom_nodes"
    nodes.mkdir(parents=True)
    (nodes / "zimage-mxfp8").symlink_to(tmp_path / "nowhere")
    fails(in_process("comfyui", "install", "ComfyUI"), 2, "is a link to another folder")
    assert not (tmp_path / "nowhere").exists()


def test_another_folder(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    fails(
        in_process("comfyui", "install", "elsewhere"),
        2,
        "elsewhere has no folder custom_nodes",
        "name the folder that ComfyUI's main.py is in",
    )
    only(tmp_path / "elsewhere")
