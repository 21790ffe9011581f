"""The example workflows: whole graphs, in the order that the guide describes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.documents import ROOT
from zimage_mxfp8.comfy.nodes import NODE_CLASS_MAPPINGS

FOLDER = ROOT / "examples" / "comfyui"
FILES = sorted(FOLDER.glob("*.json"))
SPEED_UP = "ZImageMXFP8SpeedUp"


def read(path: Path) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return workflow


def test_there_are_some() -> None:
    assert [path.stem for path in FILES] == ["controlnet", "lora", "text-to-image"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_links_join_ends_of_one_type(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, into, kind in workflow["links"]:
        output, given = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert number in output["links"] and given["link"] == number
        assert output["type"] == given["type"] == kind
    for node in nodes.values():
        assert all(given["link"] is not None for given in node["inputs"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_speed_up_is_behind_the_loaders(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    (fast,) = (node for node in nodes.values() if node["type"] == SPEED_UP)
    (compute,) = fast["widgets_values"]
    assert compute in NODE_CLASS_MAPPINGS[SPEED_UP].INPUT_TYPES()["required"]["compute"][0]
    sources = {link[3]: link[1] for link in workflow["links"] if link[5] == "MODEL"}
    before, node = [], fast["id"]
    while node in sources:
        node = sources[node]
        before.append(nodes[node]["type"])
    patches = {"lora": ["LoraLoaderModelOnly"], "controlnet": ["ZImageFunControlnet"]}
    assert before == [*patches.get(path.stem, []), "UNETLoader"]


@pytest.mark.comfyui
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_comfyui_has_the_other_nodes(comfy: SimpleNamespace, path: Path) -> None:
    import nodes

    extras = {"ModelSamplingAuraFlow", "EmptySD3LatentImage", "Canny"}  # of comfy_extras
    extras |= {"ModelPatchLoader", "ZImageFunControlnet"}
    for node in read(path)["nodes"]:
        known = nodes.NODE_CLASS_MAPPINGS.keys() | NODE_CLASS_MAPPINGS.keys() | extras
        assert node["type"] in known
