"""Stands for triton, 1 GB, where nothing is compiled: SGLang imports it and decorates functions.

Every name of this package and of its modules exists. Decorators give their function back, and
calling one that a kernel's launch needs fails, because there is no kernel.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

__version__ = "3.7.0"  # SGLang compares it


class _Class:
    """A class of triton, such as `Config`."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        pass

    def __class_getitem__(cls, _item: object) -> type:
        return cls


class _Anything(ModuleType):
    """A module, function or decorator of triton; names in capitals are classes."""

    __path__: list[str] = []  # noqa: RUF012 - of a package without files

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = type(name, (_Class,), {})
        else:
            value = sys.modules.setdefault(f"{self.__name__}.{name}", _made(self, name))
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Decorate a function, or return the decorator."""
        if len(arguments) == 1 and callable(arguments[0]) and not named:
            return arguments[0]
        return lambda function: function

    def __or__(self, _other: object) -> _Anything:
        return self

    __ror__ = __or__
    __getitem__ = __or__


def _made(parent: ModuleType, name: str) -> _Anything:
    return _Anything(f"{parent.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the package."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> Any:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = sys.modules[__name__]
        for part in spec.name.split(".")[1:]:
            module = getattr(module, part)
        return module  # type: ignore[no-any-return]

    def exec_module(self, _module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Anything
sys.meta_path.insert(0, _Finder())
