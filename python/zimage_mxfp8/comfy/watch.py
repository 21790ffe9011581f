"""What has changed in a model between calls: its modules, its weights, what nodes put on it.

To walk a model takes milliseconds, as much as a tenth of a call for 512 x 512 on a GPU. So it is
walked once, and each call compares what is there with what the walk found, mostly in loops of C.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import MethodType
from typing import Any

import torch

from .weights import is_mxfp8

_children_of = itemgetter("_modules")
_parameters_of = itemgetter("_parameters")
_codes_of = attrgetter("_qdata")


@dataclass(frozen=True)
class State:
    """A model as a call finds it.

    Attributes:
        patched: the name of a module that a node has put something on; "" if there is none.
        devices: of the weights.
        names: of the weights.
        addresses: of the weights, in the same order; of one in MXFP8 that of its codes. While names
            and addresses stay the same, so do the tuples, which makes comparing them quick.
    """

    patched: str
    devices: frozenset[torch.device]
    names: tuple[str, ...]
    addresses: tuple[int, ...]


class Watch:
    """A model of ComfyUI, seen again in every call."""

    def __init__(self, module: Any) -> None:
        """Take the model; the first `state` walks it."""
        self._module = module
        self._walk: _Walk | None = None

    def state(self) -> State:
        """Return what is there now. It refers to no weight, but the watch does, see `forget`."""
        if self._walk is None or self._walk.is_outdated():
            self._walk = _Walk(self._module)
        return self._walk.state()

    def forget(self) -> None:
        """Drop the references to modules and weights, so that replaced ones are free."""
        self._walk = None


class _Walk:
    """The modules and parameters of a model, as long as they are the same objects.

    Modules are kept as their `__dict__`, because torch and nodes also replace the dictionaries in
    it, for instance `_modules` where a block is deleted.
    """

    def __init__(self, module: Any) -> None:
        named = [(name, each, vars(each)) for name, each in module.named_modules()]
        self._inner = named[1:]
        # TorchScript has no dictionaries here; its modules count as patched.
        self._own = [own for *_, own in named if isinstance(_children_of(own), dict)]
        self._children = [dict(_children_of(own)) for own in self._own]
        self._filled = [own for own in self._own if _parameters_of(own)]
        self._empty = [own for own in self._own if not _parameters_of(own)]
        self._parameters = self._read_parameters()
        present = list(module.named_parameters())
        mxfp8 = [(name, each) for name, each in present if is_mxfp8(each)]
        plain = [(name, each) for name, each in present if not is_mxfp8(each)]
        self._names = tuple(name for name, _ in (*mxfp8, *plain))
        self._mxfp8, self._plain = ([each for _, each in some] for some in (mxfp8, plain))
        self._addresses: tuple[int, ...] = ()
        self._devices: frozenset[torch.device] = frozenset()

    def is_outdated(self) -> bool:
        """Return whether a module or a parameter was replaced, added or removed."""
        if list(map(_children_of, self._own)) != self._children:
            return True
        if any(map(_parameters_of, self._empty)):
            return True
        # By identity: == of tensors compares their elements.
        now = self._read_parameters()
        return len(now) != len(self._parameters) or not all(map(is_, now, self._parameters))

    def state(self) -> State:
        """Return what is there, of the same modules and parameters."""
        weights = [*map(_codes_of, self._mxfp8), *self._plain]
        addresses = tuple(map(torch.Tensor.data_ptr, weights))
        if addresses != self._addresses:
            self._addresses = addresses
            self._devices = frozenset(weight.device for weight in weights)
        return State(self._patched(), self._devices, self._names, self._addresses)

    def _read_parameters(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, map(_parameters_of, self._filled))))

    def _patched(self) -> str:
        changed = (  # one expression, because a function call per module would double the time
            name
            for name, module, own in self._inner
            if own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own.get("weight_function")
            or own.get("bias_function")
            or ("forward" in own and not _is_of_class(own["forward"], module))
        )
        return next(changed, "")


def _is_of_class(forward: Any, module: Any) -> bool:
    """Return whether a module's attribute `forward` is the method of its class.

    ComfyUI leaves that behind when it undoes an object patch.
    """
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return forward.__func__ is getattr(type(module), "forward", None)
