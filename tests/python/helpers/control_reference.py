"""ControlNets with random weights, and two references of what they compute.

Diffusers' own classes are one. The other is the forward of the original authors' repository
(VideoX-Fun), written here with the blocks of diffusers' transformer: it differs from diffusers'
in that the hints of the refiner go to the transformer's own noise refiner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from safetensors.torch import save_file

Kind = Literal["1.0", "2.0", "2.1"]
Tensors = dict[str, torch.Tensor]
_OWN_REFINER: dict[Kind, str | None] = {
    "1.0": None,
    "2.0": "control_layers",
    "2.1": "control_noise_refiner",
}
EMBEDDER = "control_all_x_embedder.2-1"


def make_controlnet(
    kind: Kind, places: Sequence[int], dim: int = 256, refiners: int = 2, seed: int = 7
) -> ZImageControlNetModel:
    """Diffusers' class in float32, with weights that keep activations near 1."""
    model = ZImageControlNetModel(
        control_layers_places=list(places),
        control_refiner_layers_places=None if kind == "1.0" else list(range(refiners)),
        control_in_dim=16 if kind == "1.0" else 33,
        add_control_noise_refiner=_OWN_REFINER[kind],
        dim=dim,
        n_refiner_layers=refiners,
        n_heads=dim // 128,
        n_kv_heads=dim // 128,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model


def silence_refiner(model: ZImageControlNetModel) -> None:
    """Make the hints of a 2.1 net's refiner none: there diffusers and the authors differ."""
    with torch.no_grad():
        for block in model.control_noise_refiner:
            block.after_proj.weight.zero_()
            block.after_proj.bias.fill_(1e-30)  # all zeros would be a file of 2.0


def file_tensors(kind: Kind, model: ZImageControlNetModel) -> Tensors:
    """The tensors of a published file with these weights."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "2.0":  # it has a refiner whose projections are as they were before training
        dim = tensors[f"{EMBEDDER}.weight"].shape[0]
        unused = make_controlnet("2.1", model.control_layers_places, dim, seed=99).state_dict()
        refiner = {n: t.clone() for n, t in unused.items() if n.startswith("control_noise_")}
        for name, tensor in refiner.items():
            if "_proj." in name:
                tensor.zero_()
        tensors |= refiner
    return tensors


def write_controlnet(path: Path, tensors: Tensors, dtype: torch.dtype = torch.float32) -> Path:
    """Write a file."""
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def control_images(
    sizes: Sequence[tuple[int, int]], channels: int, seed: int = 3
) -> list[torch.Tensor]:
    """Inputs of a ControlNet for latents of (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, 1, *size, generator=generator) for size in sizes]


@dataclass
class Controlled:
    """A ControlNet and its input, for `authors_forward`.

    With `image_only` it sees the tokens of the image alone, as in ComfyUI.
    """

    kind: Kind
    tensors: Tensors
    images: Sequence[torch.Tensor]
    strength: float
    image_only: bool = False


@torch.no_grad()
def authors_forward(
    base: ZImageTransformer2DModel,
    x: Sequence[torch.Tensor],
    t: torch.Tensor,
    captions: Sequence[torch.Tensor],
    nets: Sequence[Controlled],
) -> list[torch.Tensor]:
    """The samples, item by item."""
    return [
        _one(base, x[i], t[i : i + 1], captions[i], [(net, net.images[i]) for net in nets])
        for i in range(len(x))
    ]


def _tokens(image: torch.Tensor) -> torch.Tensor:
    channels, _, height, width = image.shape
    patches = image[:, 0].reshape(channels, height // 2, 2, width // 2, 2)
    return patches.permute(1, 3, 2, 4, 0).reshape(-1, 4 * channels)


def _filled(tokens: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens, filler.expand(-len(tokens) % 32, -1)])


def _lengthened(hint: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Append zeros for the tokens that a hint does not have."""
    return F.pad(hint, (0, 0, 0, tokens.shape[1] - hint.shape[1]))


class _Blocks:
    """Blocks of one ControlNet, each with its projections."""

    def __init__(self, tensors: Tensors, stack: str) -> None:
        self._tensors = tensors
        self._stack = stack
        dim = tensors[f"{EMBEDDER}.weight"].shape[0]
        count = len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})
        self.blocks = []
        for i in range(count):
            block = ZImageTransformerBlock(i, dim, dim // 128, dim // 128, 1e-5, True).eval()
            prefix = f"{stack}.{i}."
            weights = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and "_proj." not in name
            }
            block.load_state_dict(weights, strict=True)
            self.blocks.append(block)

    def project(self, i: int, name: str, c: torch.Tensor) -> torch.Tensor:
        prefix = f"{self._stack}.{i}.{name}"
        return F.linear(c, self._tensors[f"{prefix}.weight"], self._tensors[f"{prefix}.bias"])

    def hints(self, c: torch.Tensor, x: torch.Tensor, *others: torch.Tensor):
        c = self.project(0, "before_proj", c) + x
        hints = []
        for i, block in enumerate(self.blocks):
            c = block(c, *others)
            hints.append(self.project(i, "after_proj", c))
        return hints, c


def _one(
    base: ZImageTransformer2DModel,
    image: torch.Tensor,
    t: torch.Tensor,
    caption: torch.Tensor,
    nets: Sequence[tuple[Controlled, torch.Tensor]],
) -> torch.Tensor:
    _, _, height, width = image.shape
    temb = base.t_embedder(t * 1000)
    caption_length = -(-len(caption) // 32) * 32
    rows, columns = height // 2, width // 2
    count = rows * columns
    image_positions = torch.zeros(-(-count // 32) * 32, 3, dtype=torch.int32)
    for token in range(count):
        place = (caption_length + 1, token // columns, token % columns)
        image_positions[token] = torch.tensor(place)
    caption_positions = torch.zeros(caption_length, 3, dtype=torch.int32)
    caption_positions[:, 0] = torch.arange(1, caption_length + 1)
    image_angles = base.rope_embedder(image_positions)[None]
    caption_angles = base.rope_embedder(caption_positions)[None]
    angles = torch.cat([image_angles, caption_angles], dim=1)

    def mask(tokens: torch.Tensor) -> torch.Tensor:
        return torch.ones(tokens.shape[:2], dtype=torch.bool)

    x = _filled(base.all_x_embedder["2-1"](_tokens(image)), base.x_pad_token)[None]
    controls = []
    for net, control in nets:
        weight, bias = (net.tensors[f"{EMBEDDER}.{part}"] for part in ("weight", "bias"))
        c = F.linear(_tokens(control), weight, bias)[None]
        if not net.image_only:
            c = _filled(c[0], base.x_pad_token)[None]
        seen, positions = x[:, : c.shape[1]], image_angles[:, : c.shape[1]]
        main, hints = _Blocks(net.tensors, "control_layers"), []
        if net.kind == "1.0":
            for block in _Blocks(net.tensors, "control_noise_refiner").blocks:
                c = block(c, mask(c), positions, temb)
        else:
            own = _Blocks(net.tensors, "control_noise_refiner")
            blocks = main if net.kind == "2.0" else own
            hints, c = blocks.hints(c, seen, mask(c), positions, temb)
        controls.append((net, main, c, hints))
    for i, block in enumerate(base.noise_refiner):
        x = block(x, mask(x), image_angles, temb)
        for net, _, _, hints in controls:
            if hints:
                x = x + _lengthened(hints[i], x) * net.strength
    y = _filled(base.cap_embedder(caption), base.cap_pad_token)[None]
    for block in base.context_refiner:
        y = block(y, mask(y), caption_angles)
    joint = torch.cat([x, y], dim=1)
    added = []
    for net, main, c, _ in controls:
        both = c if net.image_only else torch.cat([c, y], dim=1)
        seen, positions = joint[:, : both.shape[1]], angles[:, : both.shape[1]]
        hints, _ = main.hints(both, seen, mask(both), positions, temb)
        step = len(base.layers) // len(hints)
        added.append({i * step: hint * net.strength for i, hint in enumerate(hints)})
    for i, block in enumerate(base.layers):
        joint = block(joint, mask(joint), angles, temb)
        for hints in added:
            if i in hints:
                joint = joint + _lengthened(hints[i], joint)
    out = base.all_final_layer["2-1"](joint, c=temb)[0, :count]
    patches = out.reshape(rows, columns, 2, 2, 16).permute(4, 0, 2, 1, 3)
    return patches.reshape(16, 1, height, width)
