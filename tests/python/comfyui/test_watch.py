"""What the watch finds on a model between calls, against a plain walk over the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zimage_mxfp8.comfy.watch import Watch

CPU, META = torch.device("cpu"), torch.device("meta")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.act = nn.Sequential(nn.SiLU())


def model() -> Any:
    whole = nn.Module()
    whole.token = nn.Parameter(torch.zeros(3, 4))
    whole.layers = nn.ModuleList(Block() for _ in range(3))
    return whole


def replace_a_module(whole: Any) -> None:
    whole.layers[1].first = nn.Linear(4, 4)


def replace_a_module_without_children(whole: Any) -> None:
    whole.layers[1].act[0] = nn.Linear(4, 4)


def wrap_a_module(whole: Any) -> None:
    whole.layers[1].first = nn.Sequential(whole.layers[1].first)  # on the same weights


def delete_a_block(whole: Any) -> None:
    del whole.layers[1]  # torch makes a new dictionary


def append_a_block(whole: Any) -> None:
    whole.layers.append(Block())


def swap_blocks(whole: Any) -> None:
    whole.layers[0], whole.layers[1] = whole.layers[1], whole.layers[0]


def add_a_module_to_a_leaf(whole: Any) -> None:
    whole.layers[1].first.branch = nn.Linear(4, 4)


def replace_a_parameter(whole: Any) -> None:
    whole.layers[1].first.weight = nn.Parameter(whole.layers[1].first.weight.detach().clone())


def remove_a_parameter(whole: Any) -> None:
    whole.layers[1].first.bias = None


def fill_an_empty_parameter(whole: Any) -> None:
    whole.layers[1].second.bias = nn.Parameter(torch.ones(4))


def add_a_parameter(whole: Any) -> None:
    whole.layers[1].act.weight = nn.Parameter(torch.ones(4))  # it had none


def add_a_parameter_at_the_end(whole: Any) -> None:
    whole.layers[2].norm.scale = nn.Parameter(torch.ones(4))


def parametrize(whole: Any) -> None:
    layer = whole.layers[1].first
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    layer.parametrizations.weight.original.data = layer.weight.detach().clone()


def replace_data(whole: Any) -> None:
    whole.layers[1].first.weight.data = torch.ones(4, 4)


def cast(whole: Any) -> None:
    whole.to(torch.bfloat16)


def move_all(whole: Any) -> None:
    whole.to(META)


def move_a_layer(whole: Any) -> None:
    whole.layers[1].first.to(META)


CHANGES: list[Callable[[Any], None]] = [
    *(replace_a_module, replace_a_module_without_children, wrap_a_module, delete_a_block),
    *(append_a_block, swap_blocks, add_a_module_to_a_leaf, replace_a_parameter),
    *(remove_a_parameter, fill_an_empty_parameter, add_a_parameter, add_a_parameter_at_the_end),
    *(parametrize, replace_data, cast, move_all, move_a_layer),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_those_of_now(change: Callable[[Any], None]) -> None:
    whole = model()
    watch = Watch(whole)
    before = watch.state()
    same = watch.state()
    assert same.names is before.names and same.addresses is before.addresses
    assert before.devices == {CPU} and len(before.addresses) == 1 + 3 * 3
    kept = list(whole.parameters())  # so that no address is used again
    change(whole)
    found = watch.state()
    weights = {name: each.data_ptr() for name, each in whole.named_parameters()}
    assert dict(zip(found.names, found.addresses, strict=True)) == weights
    assert found.devices == {each.device for each in whole.parameters()}
    assert (found.names, found.addresses) != (before.names, before.addresses)
    assert kept and not found.patched


# What nodes put on a module, and how they take it away.


def hook(layer: Any) -> Callable[[], None]:
    handle: Callable[[], None] = layer.register_forward_hook(lambda *_: None).remove
    return handle


def pre_hook(layer: Any) -> Callable[[], None]:
    handle: Callable[[], None] = layer.register_forward_pre_hook(lambda *_: None).remove
    return handle


def hook_in_a_new_dictionary(layer: Any) -> Callable[[], None]:
    layer._forward_hooks = type(layer._forward_hooks)()
    return hook(layer)


def forward(layer: Any) -> Callable[[], None]:
    layer.forward = lambda x: x
    return lambda: delattr(layer, "forward")


def forward_set_back(layer: Any) -> Callable[[], None]:
    """As ComfyUI does with object patches: the method stays on the module."""
    previous = layer.forward
    layer.forward = lambda x: x
    return lambda: setattr(layer, "forward", previous)


def forward_of_another_layer(layer: Any) -> Callable[[], None]:
    layer.forward = nn.Linear(4, 4).forward
    return lambda: delattr(layer, "forward")


def weight_function(layer: Any) -> Callable[[], None]:
    layer.weight_function = [lambda weight: weight]
    return lambda: setattr(layer, "weight_function", [])


def bias_function(layer: Any) -> Callable[[], None]:
    layer.bias_function = []
    layer.bias_function.append(lambda bias: bias)
    return layer.bias_function.clear


@pytest.mark.parametrize(
    "put",
    [
        *(hook, pre_hook, hook_in_a_new_dictionary, forward, forward_set_back),
        *(forward_of_another_layer, weight_function, bias_function),
    ],
    ids=lambda put: put.__name__,
)
@pytest.mark.parametrize("name", ["layers.1.second", "layers.1.norm", "layers.1"])
def test_patches_come_and_go(put: Callable[[Any], Callable[[], None]], name: str) -> None:
    whole = model()
    watch = Watch(whole)
    before = watch.state()
    assert not before.patched
    take_away = put(whole.get_submodule(name))
    assert watch.state().patched == name
    take_away()
    assert watch.state() == before


def test_patches_of_the_model_itself_are_not_its_modules() -> None:
    """They run around ComfyUI's forward, whose place the speed-up takes."""
    whole = model()
    whole.register_forward_hook(lambda *_: None)
    assert not Watch(whole).state().patched


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_counts_as_a_patch() -> None:
    """Its modules have no dictionaries to compare."""
    whole = model()
    watch = Watch(whole)
    watch.state()
    whole.layers[1].first = torch.jit.script(nn.Linear(4, 4))
    assert watch.state().patched == "layers.1.first"


def test_a_patch_on_a_new_module() -> None:
    whole = model()
    watch = Watch(whole)
    watch.state()
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    whole.layers[2].first = layer
    assert watch.state().patched == "layers.2.first"


def test_what_is_forgotten_is_free() -> None:
    whole = model()
    watch = Watch(whole)
    watch.state()
    weight = weakref.ref(whole.layers[1].first.weight)
    block = weakref.ref(whole.layers[2])
    replace_a_parameter(whole)
    del whole.layers[2]
    assert weight() is not None and block() is not None
    watch.forget()
    assert weight() is None and block() is None
    assert sorted(watch.state().addresses) == sorted(x.data_ptr() for x in whole.parameters())
