"""The transformer model, with the interface of torch and diffusers."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import hub
from ..checks import file_or_folder, text
from ..errors import (
    CudaError,
    MissingAttributeError,
    UnsupportedError,
    UsageError,
)
from ..printing.progress import byte_bar, shown
from ..streaming.jobs import ProgressCallback
from ..system.device_notes import report_line
from ..system.devices import core_index, is_out_of_host_memory
from ..zimage.config import ZImageConfig
from ..zimage.constants import FINAL_NORM_EPS, HEAD_DIM, TIME_FEATURES, TIME_SCALE
from ..zimage.layers import ZIMAGE
from ..zimage.rows import Stack, TokenKind
from ..zimage.table import LayerTable
from . import ops
from .arithmetic import by_core
from .attention import has_cudnn_attention
from .block import Block, Hints, Modulation, run_blocks, split_modulations
from .compute import DESCRIPTIONS, Compute, choose
from .control import CONTROLLED_STACKS, ControlRun, ZImageControlNet, check_controls
from .diffusers_class import class_for_pipelines, new_object
from .floating_dtype import as_dtype, default_dtype, dtype_after, name_of, sums_dtype
from .graphs import GraphCache
from .inputs import ForwardInputs, check_arguments, lora_scale
from .linear import Linear, PlainLinear
from .loading import LoadedWeights, load_parts
from .lora import Lora, LoraSet, Weight
from .model_file import open_model
from .peft_methods import PeftMethods
from .places import LinearPlace, linear_places, norm_places
from .ranks.devices import rank_devices
from .ranks.division import divide
from .ranks.group import RankGroup
from .ranks.loras import SharedLoraSet
from .ranks.other_ranks import OtherRanks, check_shared
from .sequence import (
    Segment,
    Shape,
    fill_up,
    image_tokens,
    joined,
    joint_length,
    layout_of,
    patchify,
    unpatchify,
)
from .unsupported import alternative_to

# Values of diffusers' arguments that match the behaviour here.
_WITHOUT_EFFECT = {
    "local_files_only": (True,),
    "low_cpu_mem_usage": (True, False),
    "use_safetensors": (True,),
}
_WORKSPACES = 2 * by_core.LIBRARY_WORKSPACE  # of cuBLAS's libraries: torch's and ours


class TransformerOutput(NamedTuple):
    """Result of `forward`: a tuple with one named element."""

    sample: list[torch.Tensor]


class ZImageTransformer(PeftMethods, nn.Module):
    """Z-Image's transformer, made with `from_checkpoint`.

    It takes the place of diffusers' `ZImageTransformer2DModel` in its pipelines. Each stack of the
    table of layers is a `ModuleList` with the stack's name.

    Attributes:
        config: the model's sizes.
        compute: the compute mode, see `from_checkpoint`.
        max_fold_error: the largest relative error that folding added to a layer (mode "fp8").
    """

    cap_embedder_norm: torch.Tensor
    cap_pad_token: torch.Tensor
    x_pad_token: torch.Tensor

    # Diffusers' ControlNet pipelines hand these to the ControlNet; ours has no need of them.
    t_scale = t_embedder = all_x_embedder = rope_embedder = None

    def __init__(
        self,
        config: ZImageConfig,
        parts: LoadedWeights,
        compute: Compute,
        dtype: torch.dtype,
        cuda_graphs: bool,
        table: LayerTable = ZIMAGE,
        *,
        ranks: RankGroup | None = None,
        others: OtherRanks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.max_fold_error = parts.max_fold_error
        self._dtype = dtype
        self._cuda_graphs = cuda_graphs
        self._graphs = GraphCache(has_exchanges=ranks is not None)
        self._ranks = ranks
        self._other_ranks = others
        if others is not None:
            others.use_graphs(self._graphs)
        self._stacks = table.stacks
        for stack in table.stacks:
            self.add_module(stack.name, nn.ModuleList(parts.blocks[stack.name]))
        tensors = parts.others

        def linear(name: str) -> PlainLinear:
            return PlainLinear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        self.modulation = PlainLinear(*parts.modulation)
        self.x_embedder = linear("x_embedder")
        self.cap_embedder = linear("cap_embedder.1")
        self.t_embedder_in = linear("t_embedder.mlp.0")
        self.t_embedder_out = linear("t_embedder.mlp.2")
        self.final_modulation = linear("final_layer.adaLN_modulation.1")
        self.final_layer = linear("final_layer.linear")
        self.register_buffer("cap_embedder_norm", tensors["cap_embedder.0.weight"])
        self.register_buffer("x_pad_token", tensors["x_pad_token"])
        self.register_buffer("cap_pad_token", tensors["cap_pad_token"])
        # Listed once, because that takes longer than to look for their adapters.
        self._captured_linears = tuple(self._linears())
        of_adapters = (
            config.shapes(),
            self._linear_places,
            self._norm_places,
            self._adapters_change,
        )
        self._loras = SharedLoraSet(others, *of_adapters) if others else LoraSet(*of_adapters)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Where diffusers is in use, a class that its pipelines take."""
        return class_for_pipelines(type(self))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        compute: str = "auto",
        dtype: torch.dtype | str | None = None,
        *,
        devices: Sequence[str | torch.device] | None = None,
        cuda_graphs: bool = True,
        progress: ProgressCallback | bool | None = None,
    ) -> ZImageTransformer:
        """Load a checkpoint.

        All checks come before the first weight goes to the device, and host memory stays small.
        Weights are not searched for NaN and Inf, which on the CPU takes longer than reading them:
        `zimage-mxfp8 validate` does that, and `ZImageGenerator` names the step in which an image
        becomes NaN or infinite. Only folding, which reads every weight anyway, refuses NaN. Of INT8
        the scales are checked, which are few, and the codes are not.

        Args:
            path: an MXFP8 file of `convert` or of ComfyUI's, a plain single file, or a diffusers
                folder with plain weights. Any number of layers and any width of whole heads.
            device: where to put the model; by default the current CUDA device if torch has one,
                else the CPU. A CUDA device that this build has no kernels for works through torch.
            compute: the compute mode of the MXFP8 layers:

                - "mxfp8": MXFP8 x MXFP8 on the tensor cores of compute capability 10.x and 12.x
                  (these kernels have never run on such a device; without kernels it is missing).
                - "fp8": scales folded into one per row, FP8 tensor cores of 8.9 and newer;
                  activations are quantised per token.
                - "weight-only": weights decoded exactly, activations not quantised; any device.
                - "int8": weights and activations rotated and rounded to INT8; the CPU and 7.5 and
                  newer (of GPUs it ran on an H200 alone).
                - "mxfp8-emulated": activations in MXFP8 too, as on 10.x and 12.x, with GEMMs of
                  decoded numbers; any device.
                - "auto": "mxfp8", "int8" or "fp8", as the device has them fast; "weight-only" on
                  the CPU.
            dtype: of everything that is not 8 bits wide: bfloat16, float16 or float32, as torch's
                dtype or its name. By default bfloat16; float16 on GPUs before compute capability
                8.0, whose tensor cores have no bfloat16 (it has not run on such a GPU yet). In
                float16 the tokens between blocks and all that norms read are in float32, and rows
                are scaled before they are multiplied, so that sums beyond 65504 stay finite.
            devices: share each forward among these, each of which holds all weights; instead of
                `device`. The first one takes inputs and has results; a process is started for each
                of the others, which ends when the model is garbage. Hooks and adapters that are set
                on layers by hand are not shared. Tested on CPUs and on two H200s.
            cuda_graphs: on CUDA, run each shape through a CUDA graph from its second call on.
                Without graphs, forward hooks on the model's modules, which include every linear
                layer and every block, run in every call.
            progress: called with a `Progress` while weights are read; True draws a bar on a
                terminal.

        Raises:
            CheckpointError: unreadable, not Z-Image, incomplete, or quantised in another way; the
                sentence names the tensor.
            UsageError: not a path, no such device, mode or dtype, or a mode for MXFP8 and the
                checkpoint has none; the sentence names the argument.
            UnsupportedError: the device does not have the mode, or the system no several devices.
            CudaError: the device has too little memory.
            RankError: the process of another device has ended.

        Warns:
            DeviceWarning: once per process, if no device was named and a GPU is not used, or this
                build has no kernels for it.
        """
        given = None if dtype is None else as_dtype(dtype)
        file = open_model(file_or_folder("path", path))
        places = rank_devices(device, devices)
        place = places[0]
        chosen = given or default_dtype(place)
        mode = choose(compute, core_index(place), file.weights)
        report_line(place, device if devices is None else place)
        if place.type == "cuda":
            has_cudnn_attention(place)  # for its warning, now instead of in the middle of an image
        others = None
        if len(places) > 1:
            others = OtherRanks(file, places, mode, chosen, cuda_graphs=cuda_graphs)
        try:
            with shown(progress, byte_bar("loading the transformer")) as callback:
                parts = load_parts(file, place, mode, chosen, callback)
            ranks = others.join() if others else None
        except BaseException:
            if others:
                others.end()
            raise
        return cls(file.config, parts, mode, chosen, cuda_graphs, ranks=ranks, others=others)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        device: str | torch.device | None = None,
        compute: str = "auto",
        dtype: torch.dtype | str | None = None,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        download: bool = False,
        cuda_graphs: bool = True,
        progress: ProgressCallback | None = None,
        **others: Any,
    ) -> ZImageTransformer:
        """Load a checkpoint with the method name and arguments of diffusers' models.

        Args:
            path_or_id: a file or folder, see `from_checkpoint`, or a name on the Hugging Face hub
                that the local cache has: `owner/name`, `owner/name@revision` or
                `owner/name/file.safetensors`.
            device: see `from_checkpoint`.
            compute: see `from_checkpoint`.
            dtype: see `from_checkpoint`.
            subfolder: folder of the weights in that folder or repository; by default the folder
                itself, or its "transformer".
            torch_dtype: the same as `dtype`, as older versions of diffusers name it.
            download: fetch files that the cache lacks from the hub; without it there is no network
                access.
            cuda_graphs: see `from_checkpoint`.
            progress: see `from_checkpoint`.
            others: arguments of diffusers' models without an effect here, such as
                `low_cpu_mem_usage`; any other must be None.

        Raises:
            CheckpointError: as from `from_checkpoint`; or not in the cache, or not on the hub.
            UsageError: as from `from_checkpoint`; or an argument that has no counterpart here.
            UnsupportedError: as from `from_checkpoint`; or huggingface_hub is not installed.
            CudaError: the device has too little memory.
        """
        for name, value in others.items():
            accepted = (None, *_WITHOUT_EFFECT.get(name, ()))
            if not any(value is each for each in accepted):
                raise UsageError(
                    name,
                    f"is not supported by from_pretrained (given: {repr(value)[:80]})",
                    "leave it out"
                    + ("" if name != "revision" else " and write owner/name@revision"),
                )
        if None not in (dtype, torch_dtype) and dtype is not torch_dtype:
            raise UsageError("torch_dtype", "is the same argument as dtype", "give one of them")
        chosen = torch_dtype if dtype is None else dtype
        file_or_folder("path_or_id", path_or_id)  # for its error
        folder = text("subfolder", subfolder) if subfolder else ""
        path = hub.resolve(path_or_id, (folder or hub.TRANSFORMER,), download=download)
        return cls.from_checkpoint(
            path / folder, device, compute, chosen, cuda_graphs=cuda_graphs, progress=progress
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.modulation.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents, captions and results, and of weights that are not 8 bits wide."""
        return self._dtype

    @property
    def in_channels(self) -> int:
        """Channels of a latent image."""
        return self.config.in_channels

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, buffer or module.

        Raises:
            AttributeError: no attribute has that name. For attributes of diffusers' models it is
                the subclass `MissingAttributeError` with a remedy; libraries ask with `hasattr`.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if advice := alternative_to(name):
                raise MissingAttributeError(f"the transformer has no {name}: {advice}") from None
            raise

    def __repr__(self) -> str:
        formats = Counter(layer.weight_format for layer in self._linears())
        layers = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        return (
            f"ZImageTransformer({self.config.n_layers} layers, dim {self.config.dim}, "
            f"{self._places}, {name_of(self._dtype)}, "
            f"{self.nbytes / 2**30:.2f} GiB, compute={self.compute} "
            f"({DESCRIPTIONS[self.compute]}); linear layers: {layers})"
        )

    @property
    def _places(self) -> str:
        return f"{self._ranks.size} devices from {self.device}" if self._ranks else str(self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._ranks is not None:
            raise UnsupportedError("a transformer on several devices cannot be copied or pickled")
        return new_object, (type(self),), {**self.__dict__, "_graphs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a copy; graphs are captured again."""
        super().__setstate__(state)
        self._graphs = GraphCache()

    def _apply(self, fn: Any, recurse: bool = True) -> ZImageTransformer:
        # .to() and similar calls: graphs hold the old addresses, and dtype may change.
        dtype = dtype_after(fn, self._dtype, self.device)
        if self._ranks is not None:
            self._check_stays(fn, dtype)
            return self
        self._graphs.clear()
        super()._apply(fn, recurse)
        self._dtype = dtype
        for layer in self._linears():
            layer.dtype = self._dtype
        self._loras.rebuild()
        return self

    def check_ranks(self) -> None:
        """Do nothing if all ranks of a transformer on several devices are alive.

        Raises:
            RankError: the process of one has ended, which a forward may not notice before its end.
        """
        if self._other_ranks is not None:
            self._other_ranks.check()

    def _check_stays(self, fn: Any, dtype: torch.dtype) -> None:
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.device))
        if (moved.device, dtype) != (self.device, self._dtype):
            raise UnsupportedError(
                "a transformer on several devices stays where it is and in its dtype; load it "
                "again to change them"
            )

    def load_lora(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None = None,
        weight: Weight = 1.0,
    ) -> Lora:
        """Load an adapter: its layers compute W x + weight * dW x from now on.

        The weights of the model stay as they are. LoRA, LoHa, LoKr, DoRA with a magnitude per row,
        and whole differences (`.diff`) are taken, in the names of every known trainer.

        Args:
            source: a safetensors file, or tensors by name.
            name: for `set_lora` and `unload_lora`; by default "lora0" and so on.
            weight: how much of it counts, also negative; or weights by part of the layers' names,
                such as `{"layers.0.": 0.5}` or `{"attention.to_q": 0.0}`, and 1 for others.

        Returns:
            What was loaded, and which tensors were not.

        Raises:
            CheckpointError: unreadable, for another model, of a type that is not supported, or
                damaged; the sentence names the file and the tensor, and the model is unchanged.
            UsageError: a name that is taken, or a weight that is not a number within 1e6 of 0.
            CudaError: the device has too little memory.
        """
        return self._loras.load(source, name, weight)

    def set_lora(self, weights: Mapping[str, Weight]) -> None:
        """Set the weights of adapters by name. Those that are not named are switched off.

        CUDA graphs stay valid, so this may be called between any two steps.

        Raises:
            UsageError: no adapter of that name, or a weight that is not a number within 1e6 of 0.
        """
        self._loras.set(weights)

    @property
    def loras(self) -> dict[str, Lora]:
        """The adapters that are loaded, by name. Those that are switched off have the weight 0."""
        return self._loras.in_effect

    def _adapters_change(self) -> None:
        self._graphs.clear()  # they hold layers without the branch

    def modules(self, *arguments: Any, **options: Any) -> Iterator[nn.Module]:
        """Return all modules, with the one by which diffusers' pipelines see adapters."""
        loras = self.__dict__.get("_loras")  # missing while the model is made
        if loras and "peft" in sys.modules and "_adapter_marker" not in self._modules:
            from .peft_marker import AdapterMarker

            self._adapter_marker = AdapterMarker(loras)
        return super().modules(*arguments, **options)

    def _linear_places(self) -> dict[str, LinearPlace]:
        outside = {
            "x_embedder": self.x_embedder,
            "cap_embedder.1": self.cap_embedder,
            "t_embedder.mlp.0": self.t_embedder_in,
            "t_embedder.mlp.2": self.t_embedder_out,
            "final_layer.linear": self.final_layer,
            "final_layer.adaLN_modulation.1": self.final_modulation,
        }
        stacks = {stack.name: self._blocks(stack) for stack in self._stacks}
        return linear_places(stacks, self.modulation, outside)

    def _norm_places(self) -> dict[str, torch.Tensor]:
        stacks = {stack.name: self._blocks(stack) for stack in self._stacks}
        return norm_places(stacks, {"cap_embedder.0": self.cap_embedder_norm})

    def _blocks(self, stack: Stack) -> list[Block]:
        return list(getattr(self, stack.name))

    def _blocks_on(self, tokens: TokenKind) -> list[Block]:
        stacks = (stack for stack in self._stacks if stack.tokens == tokens)
        return [block for stack in stacks for block in self._blocks(stack)]

    def _linears(self) -> Iterator[Linear]:
        return (module for module in self.modules() if isinstance(module, Linear))

    @torch.no_grad()
    def forward(
        self,
        x: Sequence[torch.Tensor],
        t: torch.Tensor,
        cap_feats: Sequence[torch.Tensor],
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Predict the velocity of each latent image (with the sign of diffusers' model).

        Images and captions of a batch may differ in size.

        Args:
            x: latent images, [16, 1, H, W] each, H and W even, 1024 at most.
            t: [batch], 0 for noise to 1 for an image.
            cap_feats: caption features, [tokens, cap_feat_dim] each, 1504 tokens at most.
            return_dict: name the result's only element `sample`.
            others: `controlnet_block_samples`, the result of a `ZImageControlNet`, or a list of
                several. `joint_attention_kwargs={"scale": s}` multiplies the weights of adapters;
                calls from threads with different scales wait for each other. Arguments of
                diffusers' model for features that this one lacks (several images per item) must be
                None.

        Returns:
            `(sample,)`: a list of [16, 1, H, W] in `dtype`.

        Raises:
            InvalidArgumentError: an argument has another shape or device; the sentence names it.
            CudaError: the device ran out of memory.
            RankError: the process of another device has ended. After it and after any other error,
                a transformer on several devices must be loaded again.
            UnsupportedError: a ControlNet that cannot run on several devices.
        """
        given = others.pop("controlnet_block_samples", None)
        check_arguments(x, t, cap_feats, others, self.config, self.device)
        controls = check_controls(given, x, self.config, self.device, self._dtype)
        if self._ranks is not None:
            check_shared(controls)
        nets = tuple(control.net for control in controls)
        wide = sums_dtype(self._dtype)
        inputs = ForwardInputs(
            tuple(image.to(wide) for image in x),
            t.to(self.device, torch.float32),
            tuple(caption.to(wide) for caption in cap_feats),
            tuple(control.inputs(self.device, wide) for control in controls),
        )

        try:
            sample = self.run(inputs, nets, lora_scale(others))
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations of the forward
            raise CudaError(self._out_of_memory(inputs.shapes, nets)) from None
        except RuntimeError as error:
            if not is_out_of_host_memory(error):
                raise
            raise UnsupportedError(
                f"not enough memory for a forward over {_tokens(inputs.shapes)} tokens; use a "
                "smaller size or batch"
            ) from None
        return TransformerOutput(sample) if return_dict else (sample,)

    @torch.no_grad()
    def run(
        self, inputs: ForwardInputs, nets: Sequence[ZImageControlNet], scale: float
    ) -> list[torch.Tensor]:
        """Compute a forward from checked inputs; each rank calls this with the same ones.

        Args:
            inputs: the tensors, on this device.
            nets: the ControlNets of `inputs.controls`.
            scale: multiplies the weights of adapters.

        Returns:
            The velocity of each item; on ranks other than 0 nothing.

        Raises:
            RankError: the process of another rank has ended.
        """
        others = self._other_ranks

        def compute(inputs: ForwardInputs) -> list[torch.Tensor]:
            return self._compute(inputs, nets)

        with (
            torch.autocast(self.device.type, enabled=False),
            self._loras.scaled(scale),
            others.forward(inputs, nets, scale) if others else nullcontext(),
        ):
            if self.device.type != "cuda" or not self._cuda_graphs:
                return compute(inputs)
            adapters = tuple(layer.adapter for layer in self._captured_linears)
            of_controls = zip(nets, inputs.controls, strict=True)
            keys = tuple((net.graph_key, control.image_only) for net, control in of_controls)
            key = inputs.shapes, adapters, keys
            with torch.cuda.device(self.device):
                return self._graphs.run(key, compute, inputs)

    def _out_of_memory(self, shapes: Sequence[Shape], nets: Sequence[ZImageControlNet]) -> str:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        needed = self._working_nbytes(shapes, nets)
        control = sum(net.nbytes for net in nets)
        of_nets = f", those of ControlNets {control / 2**30:.1f}" if control else ""
        return (
            f"{self.device} ran out of memory in a forward over {_tokens(shapes)} tokens, which "
            f"needs about {needed / 2**30:.1f} GiB: {free / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB are free, and the transformer's weights take "
            f"{self.nbytes / 2**30:.1f}{of_nets}; use a smaller size or batch"
        )

    def _working_nbytes(
        self, shapes: Sequence[Shape], nets: Sequence[ZImageControlNet] = ()
    ) -> int:
        """Return the approximate bytes that a forward takes on CUDA in addition to the weights.

        The peak is in a block, of the transformer or of a ControlNet. In addition there are the
        tokens, separate and joined, the rotations of both, and the tokens of ControlNets.
        """
        lengths = [joint_length(shape) for shape in shapes]
        ranks = self._ranks.size if self._ranks else 1
        tokens, ragged = -(-sum(lengths) // ranks), len(set(lengths)) > 1
        token = self.config.dim * sums_dtype(self._dtype).itemsize
        kept = 2 * token + 2 * HEAD_DIM * torch.float32.itemsize
        blocks = self._blocks_on("joint") or self._blocks_on("image")
        block = max((block.working_nbytes(tokens, ragged) for block in blocks), default=0)
        block = max([block, *(net.working_nbytes(tokens, ragged) for net in nets)])
        kept_by_nets = sum(net.kept_nbytes(tokens) for net in nets)
        gathered = 0  # keys and values of all tokens, twice
        if ranks > 1:
            gathered = 2 * sum(lengths) * 2 * self.config.dim * self._dtype.itemsize
        widest = max(self.config.dim, self.config.hidden_dim)
        temporaries = ops.temporaries_nbytes(tokens * widest, self._dtype, self.device)
        return _WORKSPACES + tokens * kept + kept_by_nets + block + gathered + temporaries

    # ---- The model itself, all of which a CUDA graph can hold

    def _compute(
        self, inputs: ForwardInputs, nets: Sequence[ZImageControlNet] = ()
    ) -> list[torch.Tensor]:
        """Return the velocity of each item, on ranks other than 0 nothing."""
        sizes = [size for size, _ in inputs.shapes]
        division = divide(inputs.shapes, self._ranks)
        inputs = inputs.of_items(division.items)
        shapes = inputs.shapes
        layout = layout_of(shapes, self.device).shared(division.team)
        for block in self._blocks_on("joint")[:1]:  # before the smaller part of the image
            block.reserve(layout.joint)
        time = self._embed_time(inputs.times)
        modulations = self._modulations(time)

        patches = torch.cat([patchify(image) for image in inputs.images])
        x = _run(self.x_embedder, patches)
        counts = [image_tokens(size) for size, _ in shapes]
        x = layout.images.mine(fill_up(x, counts, layout.images.lengths, self.x_pad_token))
        runs = [
            ControlRun(net, control, self.config, time, self.x_pad_token, layout, shapes)
            for net, control in zip(nets, inputs.controls, strict=True)
        ]
        hints = [hints for run in runs if (hints := run.image_hints(x)) is not None]
        x = self._run_stacks("image", x, modulations, layout.images, hints)

        features = ops.norm_modulate(
            torch.cat(inputs.captions),
            self.cap_embedder_norm,
            None,
            None,
            self.cap_embedder.input_formats,
        )
        c = self.cap_embedder(features)
        c = fill_up(c, [n for _, n in shapes], layout.captions.lengths, self.cap_pad_token)
        c = self._run_stacks("caption", c, modulations, layout.captions)

        joint = layout.joint.mine(joined(layout.images.whole(x), c, layout))
        hints = [run.joint_hints(joint, c) for run in runs]
        joint = self._run_stacks("joint", joint, modulations, layout.joint, hints)
        outputs = [
            self._final(joint[tokens], time[i])
            for i, tokens in enumerate(layout.joint.first_tokens(counts))
        ]
        collected = division.collect(outputs, [image_tokens(size) for size in sizes])
        return [
            unpatchify(tokens.to(self._dtype), size)
            for tokens, size in zip(collected, sizes, strict=False)
        ]

    def _run_stacks(
        self,
        tokens: TokenKind,
        x: torch.Tensor,
        modulations: dict[str, list[Modulation]],
        part: Segment,
        hints: Sequence[Hints] = (),
    ) -> torch.Tensor:
        """Run the stacks of some tokens on x [tokens, dim], which they write to, and return it."""
        for stack in self._stacks:
            if stack.tokens == tokens:
                controlled = hints if stack.name in CONTROLLED_STACKS else ()
                blocks = self._blocks(stack)
                x = run_blocks(blocks, x, modulations[stack.name], part, controlled)
        return x

    def _embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """Embed timesteps [batch]: [batch, modulation width]."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(
            -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        )
        angles = (t * TIME_SCALE)[:, None] * frequencies
        features = torch.cat((angles.cos(), angles.sin()), dim=1).to(sums_dtype(self._dtype))
        hidden = _run(self.t_embedder_in, features)
        return _run(self.t_embedder_out, F.silu(hidden))

    def _modulations(self, time: torch.Tensor) -> dict[str, list[Modulation]]:
        """Compute the modulations of all blocks, by stack, in one GEMM: their input is the time."""
        all_blocks = split_modulations(_run(self.modulation, time), self.config.dim)
        modulations, begin = {}, 0
        for stack in self._stacks:
            count = len(self._blocks(stack))
            if stack.modulated:
                modulations[stack.name] = all_blocks[begin : begin + count]
                begin += count
            else:
                modulations[stack.name] = [Modulation()] * count
        return modulations

    def _final(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Compute the final layer of [n, dim] with the item's [modulation width]: [n, 64]."""
        scale = 1 + _run(self.final_modulation, F.silu(time))
        normal = F.layer_norm(tokens, tokens.shape[-1:], eps=FINAL_NORM_EPS)
        return _run(self.final_layer, normal * scale)


def _run(layer: Linear, matrix: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer(layer.encode(matrix))
    return result


def _tokens(shapes: Sequence[Shape]) -> int:
    return sum(image_tokens(size) + caption for size, caption in shapes)
