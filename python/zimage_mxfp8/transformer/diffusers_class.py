"""The class that diffusers' pipelines see where they check the types of their parts."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


def class_for_pipelines(cls: type) -> type:
    """Return the class itself or, where diffusers is in use, one that also derives from its base.

    To derive from it always would mean to import diffusers, which takes longer than everything else
    until the first image.
    """
    return _with_diffusers_base(cls) if "diffusers" in sys.modules else cls


@cache
def _with_diffusers_base(cls: type) -> type:
    from diffusers.models.modeling_utils import ModelMixin

    return type(cls.__name__, (cls, ModelMixin), {"__module__": cls.__module__})


def new_object(cls: Any) -> Any:
    """Return an empty object, for `__reduce__` of a class with another `__class__`.

    Pickling by default compares the two, and fails.
    """
    return cls.__new__(cls)
