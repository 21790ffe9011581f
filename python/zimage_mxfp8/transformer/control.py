"""ControlNets for Z-Image: what they compute, and where it is added.

A ControlNet runs inside the transformer's forward, because it reads what the transformer has
computed so far: its tokens before the noise refiner and before the main blocks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import file_or_folder, finite_number
from ..errors import InvalidArgumentError, UnsupportedError
from ..printing.progress import byte_bar, shown
from ..streaming.jobs import ProgressCallback
from ..system.device_notes import report_line
from ..system.devices import core_index, torch_device
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.control import EMBEDDER, LAYERS, REFINER, ControlConfig
from . import ops
from .block import Block, BlockState, Hints, Modulation, run_blocks, split_modulations
from .compute import Compute, choose
from .diffusers_class import class_for_pipelines, new_object
from .floating_dtype import as_dtype, default_dtype, dtype_after, name_of, sums_dtype
from .inputs import ControlInputs
from .linear import Linear, PlainLinear
from .loading import LoadedWeights, load_parts
from .model_file import open_control
from .ops import ScaledMatrix
from .sequence import Layout, Segment, Shape, fill_up, image_part, joined, patchify

# The transformer's stacks that hints are added in.
CONTROLLED_STACKS = ("noise_refiner", "layers")
# Modules of the transformer that diffusers' pipelines give to their ControlNet.
_OF_THE_TRANSFORMER = frozenset(
    (
        *("t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder"),
        *("noise_refiner", "context_refiner", "x_pad_token", "cap_pad_token"),
    )
)


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet with its input, for the argument `controlnet_block_samples` of the transformer.

    Attributes:
        net: the ControlNet.
        images: its input for each item, [16 or 33, 1, H, W], as large as the latent image.
        strength: what its hints are multiplied by.
        image_only: whether its blocks see the tokens of the image alone, as in ComfyUI, and not
            also its fillers and those of the caption, as in training and in diffusers.
    """

    net: ZImageControlNet
    images: tuple[torch.Tensor, ...]
    strength: float
    image_only: bool = False

    def inputs(self, device: torch.device, dtype: torch.dtype) -> ControlInputs:
        """Return the tensors of the forward."""
        return ControlInputs(
            tuple(image.to(dtype) for image in self.images),
            torch.tensor(self.strength, dtype=torch.float32, device=device),
            self.image_only,
        )

    def __contains__(self, _: object) -> bool:
        """Refuse diffusers' own transformer, which looks for hints by number of the block."""
        raise UnsupportedError(
            "a ZImageControlNet runs inside a ZImageTransformer, not with another transformer",
            "load the transformer with `ZImageTransformer.from_checkpoint` too",
        )


class ZImageControlNet(nn.Module):
    """A ControlNet for Z-Image (Fun-Controlnet-Union), made with `from_checkpoint`.

    It takes the place of diffusers' `ZImageControlNetModel` in its pipelines, together with a
    `ZImageTransformer`, with which it shares the embedders and in whose forward it runs.

    Attributes:
        config: its sizes.
        compute: the compute mode, see `from_checkpoint`.
        path: the file that it was loaded from; None for weights from elsewhere.
    """

    def __init__(
        self,
        config: ControlConfig,
        parts: LoadedWeights,
        compute: Compute,
        dtype: torch.dtype,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.path = path
        self._dtype = dtype
        self._weights_token = object()
        self.embedder = _projection(parts, EMBEDDER)
        self.modulation = PlainLinear(*parts.modulation)
        self.refiner = _ControlStack(parts, REFINER)
        self.layers = _ControlStack(parts, LAYERS)
        # Listed once, because that takes longer than to look for their adapters.
        self._captured_linears = tuple(x for x in self.modules() if isinstance(x, Linear))

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
        progress: ProgressCallback | bool | None = None,
    ) -> ZImageControlNet:
        """Load a ControlNet.

        Args:
            path: an MXFP8 file of `convert`, or the plain file that was published.
            device: where to put it, which must be where the transformer is; by default the current
                CUDA device if torch has one, else the CPU.
            compute: how its MXFP8 layers are multiplied, see `ZImageTransformer.from_checkpoint`.
            dtype: that of the transformer, see there.
            progress: called with a `Progress` while weights are read; True draws a bar on a
                terminal.

        Raises:
            CheckpointError: unreadable, not a ControlNet for Z-Image, incomplete, or quantised in
                another way; the sentence names the tensor.
            UsageError: not a path, no such device, mode or dtype, or a mode for MXFP8 and the file
                has none.
            UnsupportedError: the device does not have the mode.
            CudaError: the device has too little memory.
        """
        given = None if dtype is None else as_dtype(dtype)
        file = open_control(file_or_folder("path", path))
        place = torch_device(device)
        chosen = given or default_dtype(place)
        mode = choose(compute, core_index(place), file.weights)
        report_line(place, device)
        with shown(progress, byte_bar("loading the ControlNet")) as callback:
            parts = load_parts(file, place, mode, chosen, callback, file.config.table)
        return cls(file.config, parts, mode, chosen, Path(file.path).absolute())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.modulation.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not 8 bits wide."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def weights_token(self) -> object:
        """An object that stands for the weights as they are now, and where."""
        return self._weights_token

    @property
    def graph_key(self) -> tuple[Any, ...]:
        """What a CUDA graph that holds this ControlNet depends on."""
        return (self._weights_token, *(layer.adapter for layer in self._captured_linears))

    def __repr__(self) -> str:
        return (
            f"ZImageControlNet(Fun-Controlnet-Union {self.config.generation}, "
            f"dim {self.config.dim}, {self.device}, {name_of(self._dtype)}, "
            f"{self.nbytes / 2**30:.2f} GiB, compute={self.compute})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return new_object, (type(self),), {**self.__dict__, "_weights_token": object()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but for the transformer's modules that diffusers' pipelines set."""
        if name not in _OF_THE_TRANSFORMER:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> ZImageControlNet:
        dtype = dtype_after(fn, self._dtype, self.device)
        super()._apply(fn, recurse)
        self._weights_token = object()  # graphs hold the old addresses
        self._dtype = dtype
        for layer in self._captured_linears:
            layer.dtype = dtype
        return self

    def working_nbytes(self, tokens: int, ragged: bool) -> int:
        """Return the peak bytes of its blocks on a CUDA device, see `Block.working_nbytes`."""
        blocks = self.layers.block_list
        return max((block.working_nbytes(tokens, ragged) for block in blocks), default=0)

    def kept_nbytes(self, tokens: int) -> int:
        """Return the bytes of the tokens that it keeps while the transformer's blocks run.

        These are the tokens of its main blocks, the same after the norm, and a hint.
        """
        count = tokens * self.config.dim
        formats = self.layers.block_list[0].qkv.input_formats
        tokens_nbytes = 2 * count * sums_dtype(self._dtype).itemsize
        return tokens_nbytes + ops.activation_nbytes(formats, count, self._dtype)

    def control(
        self, images: Sequence[torch.Tensor] | torch.Tensor, strength: float = 1.0
    ) -> Control:
        """Return this ControlNet with its input.

            control = net.control(latents, strength=0.75)
            sample = transformer(x, t, captions, controlnet_block_samples=control)

        Args:
            images: for each item [16, 1, H, W], the latent of the control image; or [33, 1, H, W]:
                that latent, a mask (1 where the image is kept), and the latent of what is kept. The
                number of channels is `config.control_in_dim`; where nothing is to be kept, mask and
                latent are zeros.
            strength: what the hints are multiplied by.

        Raises:
            InvalidArgumentError: not tensors of that shape.
            UsageError: the strength is not a finite number.
        """
        checked = finite_number("strength", strength)
        if not isinstance(images, (list, tuple, torch.Tensor)) or not len(images):
            raise InvalidArgumentError("images must be a list of tensors [channels, 1, H, W]")
        channels = self.config.control_in_dim
        for i, image in enumerate(images):
            if not isinstance(image, torch.Tensor) or not image.is_floating_point():
                found = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
                raise InvalidArgumentError(
                    f"images[{i}] must be a floating-point tensor, not {found}"
                )
            if image.dim() != 4 or image.shape[0] != channels:
                raise InvalidArgumentError(
                    f"images[{i}] must be [{channels}, 1, H, W], not {list(image.shape)}"
                )
        return Control(self, tuple(images), checked)

    def forward(
        self,
        x: Sequence[torch.Tensor],  # noqa: ARG002 - the transformer has them too
        t: torch.Tensor,  # noqa: ARG002
        cap_feats: Sequence[torch.Tensor],  # noqa: ARG002
        control_context: Sequence[torch.Tensor] | torch.Tensor,
        conditioning_scale: float = 1.0,
    ) -> Control:
        """Return what diffusers' pipelines give to the transformer: see `control`.

        Nothing is computed yet.

        Args:
            x: not used.
            t: not used.
            cap_feats: not used.
            control_context: the images of `control`.
            conditioning_scale: the strength of `control`.
        """
        return self.control(control_context, conditioning_scale)


class _ControlStack(nn.Module):
    """Blocks of a ControlNet with their projections.

    Attributes:
        before: projection of the first block's input; None in a refiner without hints.
        after: projections of the blocks' results, which are the hints.
    """

    before: PlainLinear | None

    def __init__(self, parts: LoadedWeights, name: str) -> None:
        super().__init__()
        blocks = parts.blocks[name]
        self.blocks = nn.ModuleList(blocks)
        has_hints = f"{name}.0.after_proj.weight" in parts.others
        self.before = _projection(parts, f"{name}.0.before_proj") if has_hints else None
        self.after = nn.ModuleList(
            _projection(parts, f"{name}.{i}.after_proj") for i in range(len(blocks) * has_hints)
        )

    def begin(self, c: torch.Tensor, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """Return its input from the control tokens c and rows of the transformer's x."""
        assert self.before is not None
        start: torch.Tensor = self.before(self.before.encode(c))
        for own, theirs in rows.pairs(start, x):
            own.add_(theirs)
        return start

    @property
    def block_list(self) -> list[Block]:
        """The blocks."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def after_list(self) -> list[PlainLinear]:
        """The projections of the blocks' results."""
        return list(self.after)  # type: ignore[arg-type]


def _projection(parts: LoadedWeights, name: str) -> PlainLinear:
    return PlainLinear(parts.others[f"{name}.weight"], parts.others[f"{name}.bias"])


@dataclass(frozen=True)
class _Rows:
    """The rows of the transformer's tokens that belong to those of a ControlNet.

    Attributes:
        lengths: tokens of each item in the ControlNet.
        starts: row of the first in the transformer; empty if all rows belong together.
    """

    lengths: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    def pairs(
        self, own: torch.Tensor, theirs: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return views of both, [tokens, dim], that have the same tokens."""
        if not self.starts:
            yield own, theirs
            return
        items = own.split(list(self.lengths))
        for item, start in zip(items, self.starts, strict=True):
            yield item, theirs[start : start + len(item)]

    def spread(self, own: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return [tokens, dim] of the transformer, with zeros in the rows of no own tokens."""
        if not self.starts:
            return own
        spread = own.new_zeros(tokens, own.shape[1])
        for item, rows in self.pairs(own, spread):
            rows.copy_(item)
        return spread


class _StackHints:
    """The hints of a stack, each computed when its turn comes, so that memory holds one."""

    def __init__(
        self,
        stack: _ControlStack,
        places: tuple[int, ...],
        start: torch.Tensor,
        modulations: Sequence[Modulation],
        part: Segment,
        rows: _Rows,
        strength: torch.Tensor,
    ) -> None:
        """Begin with tokens of `_ControlStack.begin`, [tokens, dim]; hints are for `rows`."""
        self.places = places
        self._stack = stack
        self._modulations = modulations
        self._part = part
        self._rows = rows
        self._strength = strength.reshape(1)
        blocks = stack.block_list
        self._norms = [b.input_norm(m) for b, m in zip(blocks, modulations, strict=True)]
        first = self._norms[0]
        normed = ops.norm_modulate(start, first.weight, first.scale, part.items, first.formats)
        self._state = BlockState(start, normed)
        self._done = 0

    def next_hint(self, tokens: int) -> ScaledMatrix:
        self._run_block()
        after = self._stack.after_list[self._done - 1]
        hint: torch.Tensor = after(after.encode(self._state.x))
        return ScaledMatrix(self._rows.spread(hint, tokens), self._strength)

    def finish(self) -> torch.Tensor:
        """Run the blocks that are left, and return the control tokens."""
        while self._done < len(self._norms):
            self._run_block()
        return self._state.x

    def _run_block(self) -> None:
        i = self._done
        following = self._norms[i + 1] if i + 1 < len(self._norms) else None
        block = self._stack.blocks[i]
        self._state = block(self._state, self._modulations[i], self._part, following)
        self._done += 1


class ControlRun:
    """One ControlNet during a forward of the transformer."""

    def __init__(
        self,
        net: ZImageControlNet,
        inputs: ControlInputs,
        model: ZImageConfig,
        time: torch.Tensor,
        filler: torch.Tensor,
        layout: Layout,
        shapes: Sequence[Shape],
    ) -> None:
        """Embed the control images.

        Args:
            net: the ControlNet.
            inputs: its tensors.
            model: sizes of the transformer.
            time: the transformer's embedded times, [items, modulation width].
            filler: the transformer's token for filling up images, [1, dim].
            layout: of the batch.
            shapes: of the batch's items.
        """
        self._net = net
        self._model = model
        self._layout = layout
        self._image_part = image_part(tuple(shapes), filler.device) if inputs.image_only else None
        self._strength = inputs.strength
        modulation = net.modulation(net.modulation.encode(time))
        modulations = split_modulations(modulation, net.config.dim)
        refiners = len(net.refiner.blocks)
        self._of_refiner, self._of_layers = modulations[:refiners], modulations[refiners:]
        patches = [patchify(image) for image in inputs.images]
        c = net.embedder(net.embedder.encode(torch.cat(patches)))
        part, _ = self._place(layout.images)
        c = fill_up(c, [len(each) for each in patches], part.lengths, filler)
        self._c = part.mine(c)
        self._hints: _StackHints | None = None

    def _place(self, whole: Segment) -> tuple[Segment, _Rows]:
        """Return the layout of its tokens, and their rows in the transformer's segment."""
        part = self._image_part
        if part is None:
            return whole, _Rows()
        starts = itertools.accumulate(whole.lengths[:-1], initial=0)  # an item's image comes first
        return part, _Rows(part.lengths, tuple(starts))

    def image_hints(self, x: torch.Tensor) -> Hints | None:
        """Return the hints of the noise refiner, from its input x [tokens of images, dim].

        None for a ControlNet that gives none there.
        """
        net, (part, rows) = self._net, self._place(self._layout.images)
        if net.config.refiner == "plain":
            self._c = run_blocks(net.refiner.block_list, self._c, self._of_refiner, part)
            return None
        own = net.config.refiner == "hints"
        stack = net.refiner if own else net.layers
        self._hints = _StackHints(
            stack,
            net.config.refiner_places(self._model),
            stack.begin(self._c, x, rows),
            self._of_refiner if own else self._of_layers,
            part,
            rows,
            self._strength,
        )
        return self._hints

    def joint_hints(self, joint: torch.Tensor, captions: torch.Tensor) -> Hints:
        """Return the hints of the main blocks, after which this object is of no more use.

        Those of the noise refiner must have been added before.

        Args:
            joint: input of the transformer's main blocks, [tokens of all items, dim].
            captions: the refined captions, [tokens of captions, dim].
        """
        c = self._c if self._hints is None else self._hints.finish()
        part, rows = self._place(self._layout.joint)
        if self._image_part is None:
            c = part.mine(joined(self._layout.images.whole(c), captions, self._layout))
        start = self._net.layers.begin(c, joint, rows)
        del self._c, self._hints  # memory that the main blocks need
        return _StackHints(
            self._net.layers,
            self._net.config.places(self._model),
            start,
            self._of_layers,
            part,
            rows,
            self._strength,
        )


def check_controls(
    given: Any,
    x: Sequence[torch.Tensor],
    model: ZImageConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Control, ...]:
    """Check the argument `controlnet_block_samples` of the transformer's forward.

    Args:
        given: None, a `Control`, or a list of such.
        x: the latent images, checked.
        model: sizes of the transformer.
        device: of the transformer.
        dtype: of the transformer.

    Raises:
        InvalidArgumentError: something else, or a ControlNet or image that does not fit.
    """
    controls = () if given is None else (given,) if isinstance(given, Control) else given
    if not isinstance(controls, (list, tuple)) or not all(
        isinstance(control, Control) for control in controls
    ):
        raise InvalidArgumentError(
            f"controlnet_block_samples is not supported as {type(given).__name__}: give what a "
            "ZImageControlNet returns, or a list of such"
        )
    for control in controls:
        net = control.net
        if problem := net.config.misfit(model):
            raise InvalidArgumentError(
                f"the ControlNet does not fit this transformer: {problem}", "use one for this model"
            )
        if (net.device, net.dtype) != (device, dtype):
            raise InvalidArgumentError(
                f"the ControlNet is on {net.device} in {net.dtype}, but the model is on {device} "
                f"in {dtype}",
                "load both alike",
            )
        if len(control.images) != len(x):
            raise InvalidArgumentError(
                f"there are {plural(len(control.images), 'control image')} for "
                f"{plural(len(x), 'latent image')}",
                "give one for each",
            )
        for i, (image, latent) in enumerate(zip(control.images, x, strict=True)):
            wanted = [net.config.control_in_dim, *latent.shape[1:]]
            if list(image.shape) != wanted:
                raise InvalidArgumentError(
                    f"control image {i} must be {wanted}, as large as x[{i}], not "
                    f"{list(image.shape)}"
                )
            if image.device != device:
                raise InvalidArgumentError(
                    f"control image {i} is on {image.device}, but the model is on {device}",
                    "move it there",
                )
    return tuple(controls)
