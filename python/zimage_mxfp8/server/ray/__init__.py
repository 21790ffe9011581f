"""The server on many GPUs: Ray Serve runs a process for each, and `build` is for its configs."""

from __future__ import annotations

from ...system.optional_packages import needed

with needed("ray", "zimage_mxfp8.server.ray"):
    import ray.serve  # noqa: F401

from .application import BuildArguments, build

__all__ = ["BuildArguments", "build"]
