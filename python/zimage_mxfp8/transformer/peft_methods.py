"""The methods through which diffusers' pipelines load and steer adapters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingAttributeError, UsageError
from .lora import Lora, LoraSet, Weight


class PeftMethods:
    """Methods of diffusers' `PeftAdapterMixin`, with the same arguments.

    `ZImagePipeline.load_lora_weights` and its kin call them. Adapters stay branches of their own:
    `fuse_lora` fixes their weight and lets them survive `unload_lora`, as fused ones do.
    """

    _loras: LoraSet

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
        prefix: str | None = "transformer",  # noqa: ARG002
        hotswap: bool = False,
        adapter_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Load an adapter, which alone is active from then on.

        Args:
            pretrained_model_name_or_path_or_dict: a file or tensors by name.
            prefix: has no effect: names are recognised with any prefix.
            hotswap: replace the adapter of this name, and keep its weight.
            adapter_name: by default "default_0" and so on.
            metadata: PEFT's settings.
            others: diffusers' further arguments, which have no effect here.

        Raises:
            CheckpointError: see `ZImageTransformer.load_lora`.
            UsageError: a name that is taken, or one to replace that is not loaded.
        """
        source = pretrained_model_name_or_path_or_dict
        if hotswap:
            self._loras.replace(source, adapter_name, metadata)
            return
        free = (x for i in range(len(self._loras) + 1) if (x := f"default_{i}") not in self._loras)
        name = adapter_name or next(free)
        self._loras.load(source, name, metadata=metadata)
        self._loras.set({name: 1.0})

    def set_adapters(self, adapter_names: Sequence[str] | str, weights: Any = None) -> None:
        """Make adapters active, each with a weight or weights by part of the blocks' names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not isinstance(weights, (list, tuple)):
            weights = [weights] * len(names)
        if len(names) != len(weights):
            raise UsageError(
                "weights", f"are {len(weights)} for {len(names)} adapters", "give one for each"
            )
        given: dict[str, Weight] = {
            name: 1.0 if weight is None else weight
            for name, weight in zip(names, weights, strict=True)
        }
        self._loras.set(given)

    def set_adapter(self, adapter_name: Sequence[str] | str) -> None:
        """Make adapters active with weight 1."""
        self.set_adapters(adapter_name)

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._loras.active

    @property
    def peft_config(self) -> dict[str, Lora]:
        """The adapters that are loaded, by name; missing if there are none."""
        loaded = self._loras.listed
        if not loaded:
            raise MissingAttributeError("the transformer has no peft_config: no adapter is loaded")
        return loaded

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Take adapters off. If no other one is active, the first that is left becomes active.

        Raises:
            UsageError: no adapter of a name; none is taken off.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if unknown := [name for name in names if name not in self._loras.listed]:
            raise UsageError("adapter_names", f"has {unknown[0]!r}, which is not loaded")
        for name in names:
            self._loras.unload(name)
        left = self._loras.listed
        if left and not self._loras.active:
            first = next(iter(left.values()))
            self._loras.set({first.name: first.weight})

    def unload_lora(self, name: str | None = None) -> None:
        """Take one adapter off, or without a name all that are not fused.

        Raises:
            UsageError: no adapter of that name.
        """
        if name is None:
            self._loras.unload_all()
        else:
            self._loras.unload(name)

    def disable_lora(self) -> None:
        """Compute without adapters until `enable_lora`."""
        self._loras.enable(False)

    def enable_lora(self) -> None:
        """Compute with adapters again."""
        self._loras.enable(True)

    disable_adapters, enable_adapters = disable_lora, enable_lora

    def fuse_lora(
        self,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,  # noqa: ARG002 - adapters with NaN are never loaded
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Fix active adapters at their weight times `lora_scale`.

        Quantised weights cannot take them without a second rounding, so they stay branches, at the
        same cost.

        Warns:
            UserWarning: that they stay branches.
        """
        self._loras.fuse(lora_scale, adapter_names)
        warnings.warn(
            "fuse_lora keeps adapters as branches beside the quantised weights: images are those "
            "of fused weights, at the same speed as before; to save the time, merge the adapter "
            "while converting",
            stacklevel=2,
        )

    def unfuse_lora(self) -> None:
        """End what `fuse_lora` did."""
        self._loras.unfuse()

    def enable_lora_hotswap(self, **settings: Any) -> None:
        """Do nothing: adapters of any rank can be replaced at any time."""
