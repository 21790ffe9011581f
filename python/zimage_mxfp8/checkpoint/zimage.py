"""What the tensors of Z-Image are called: shapes, where they are in a file, groups.

Names are those of the ComfyUI single file, which the original repository shares. A file may have
them under a prefix, such as `model.diffusion_model.`, and other models next to them. Diffusers
splits `attention.qkv` and renames a few others; `diffusers_layout.py` undoes that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

# In every Z-Image and in both layouts, however many blocks there are.
ANCHOR = "cap_embedder.1.weight"
PAD_TOKENS = ("cap_pad_token", "x_pad_token")
SIGNATURE = (  # what ComfyUI recognises Z-Image by
    ANCHOR,
    "cap_pad_token",
    "noise_refiner.0.attention.k_norm.weight",
)
COMFYUI_PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.", "model.")

_HEAD_DIM = 128
_PATCH_FEATURES = 64  # 2 x 2 patches of 16 latent channels

# Numbers as Z-Image writes them: 07 or digits of other scripts would be taken for another block.
BLOCK_TENSOR = re.compile(
    r"^(?P<stack>layers|noise_refiner|context_refiner)\.(?P<block>0|[1-9][0-9]{0,8})\.(?P<part>.+)$"
)
_MODULATION = re.compile(r"^(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.0$")
STACKS = ("layers", "noise_refiner", "context_refiner")
_EMBEDDERS = ("x_embedder.", "cap_embedder.", "t_embedder.", "x_pad_token", "cap_pad_token")


def _usual_hidden_width(dim: int) -> int:
    return int(dim / 3 * 8)


def zimage_shapes(
    dim: int = 3840,
    layers: int = 30,
    refiner_layers: int = 2,
    caption_dim: int = 2560,
    hidden: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of Z-Image's tensors in the ComfyUI layout; the defaults are the real model's.

    Args:
        dim: width of the model, a multiple of 128.
        layers: number of main blocks.
        refiner_layers: number of blocks in each of the two refiners.
        caption_dim: features of the text encoder.
        hidden: width of the feed-forward layers, by default int(dim / 3 * 8).
    """
    hidden = _usual_hidden_width(dim) if hidden is None else hidden
    modulation = min(dim, 256)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, _PATCH_FEATURES),
        "x_embedder.bias": (dim,),
        "cap_embedder.0.weight": (caption_dim,),
        "cap_embedder.1.weight": (dim, caption_dim),
        "cap_embedder.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (modulation, 1024),
        "t_embedder.mlp.2.bias": (modulation,),
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        "final_layer.linear.weight": (_PATCH_FEATURES, dim),
        "final_layer.linear.bias": (_PATCH_FEATURES,),
        "final_layer.adaLN_modulation.1.weight": (dim, modulation),
        "final_layer.adaLN_modulation.1.bias": (dim,),
    }
    stacks = {"layers": layers, "noise_refiner": refiner_layers, "context_refiner": refiner_layers}
    for stack, count in stacks.items():
        for i in range(count):
            block = f"{stack}.{i}."
            shapes[block + "attention.qkv.weight"] = (3 * dim, dim)
            shapes[block + "attention.out.weight"] = (dim, dim)
            shapes[block + "attention.q_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "attention.k_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "feed_forward.w1.weight"] = (hidden, dim)
            shapes[block + "feed_forward.w2.weight"] = (dim, hidden)
            shapes[block + "feed_forward.w3.weight"] = (hidden, dim)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}{norm}.weight"] = (dim,)
            if stack != "context_refiner":
                shapes[block + "adaLN_modulation.0.weight"] = (4 * dim, modulation)
                shapes[block + "adaLN_modulation.0.bias"] = (4 * dim,)
    return shapes


NOT_TRANSFORMER = " (not the transformer)"  # behind the group of a tensor out of scope

# First parts of the names of all tensors.
MODULES = frozenset(name.partition(".")[0] for name in zimage_shapes(128, 1, 1, 128))


@dataclass(frozen=True)
class Scope:
    """Which tensors of a file are the model's.

    Attributes:
        prefix: what stands before their names.
        zimage: whether only names of Z-Image's modules count, and not all that begin so.
    """

    prefix: str
    zimage: bool

    def __contains__(self, name: str) -> bool:
        if not name.startswith(self.prefix):
            return False
        return not self.zimage or self.inner(name).partition(".")[0] in MODULES

    def inner(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return name[len(self.prefix) :]

    def inner_names(self, names: Iterable[str]) -> dict[str, str]:
        """Inner name -> name of those that are the model's."""
        return {self.inner(name): name for name in names if name in self}


WHOLE_FILE = Scope("", zimage=False)


def find_scopes(names: Collection[str]) -> list[Scope]:
    """Every set of Z-Image names in a file, the one to use first.

    A prefix that ComfyUI strips comes before others, and others before copies of averaged weights
    ("ema"). Names may be in either layout.
    """
    prefixes = {
        name.removesuffix(ANCHOR)
        for name in names
        if name.endswith(ANCHOR) and (name == ANCHOR or name[-len(ANCHOR) - 1] in "._")
    }
    whole = [p for p in prefixes if any(p + pad in names for pad in PAD_TOKENS)]

    def rank(prefix: str) -> tuple[bool, bool, int, str]:
        return "ema" in prefix.lower(), prefix not in COMFYUI_PREFIXES, len(prefix), prefix

    return [Scope(prefix, zimage=True) for prefix in sorted(whole, key=rank)]


def is_modulation(layer: str) -> bool:
    """Whether a layer, named without prefix, is the modulation of a block."""
    return _MODULATION.match(layer) is not None


def group_of(name: str, scope: Scope) -> str:
    """The group that a tensor is shown under in tables."""
    if name not in scope:
        return name.split(".", 1)[0] + NOT_TRANSFORMER
    inner = scope.inner(name)
    if match := BLOCK_TENSOR.match(inner):
        part = match["part"]
        if "norm" in part:
            return f"{match['stack']} norms"
        for ending in (".weight", ".bias", ".weight_scale", ".comfy_quant"):
            part = part.removesuffix(ending)
        return f"{match['stack']} {part.removesuffix('.0')}"
    if inner.startswith(_EMBEDDERS):
        return "embedders"
    if inner.startswith("final_layer."):
        return "final_layer"
    return "other"


def expected_shapes(
    inner: Mapping[str, tuple[int, ...]], padded: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> shape that a Z-Image with these tensors should have, in the ComfyUI layout.

    The number of blocks and the widths are taken from the tensors themselves.

    Args:
        inner: name without prefix -> shape; "cap_embedder.1.weight" must be two-dimensional.
        padded: names of tensors that are rounded up to multiples of 32.
    """
    # As many blocks as there are different numbers: a stray "layers.999999." is one, not a million.
    blocks: dict[str, set[str]] = {stack: set() for stack in STACKS}
    for name in inner:
        stack, _, rest = name.partition(".")
        number, dot, _ = rest.partition(".")
        if stack in blocks and dot and number.isdecimal():
            blocks[stack].add(number)
    counts = {stack: len(numbers) for stack, numbers in blocks.items()}
    dim, caption_dim = inner[ANCHOR]
    if ANCHOR in padded and len(inner.get("cap_embedder.0.weight", ())) == 1:
        caption_dim = inner["cap_embedder.0.weight"][0]
    return zimage_shapes(
        dim,
        counts["layers"],
        max(counts["noise_refiner"], counts["context_refiner"]),
        caption_dim,
        _hidden_width(inner, dim, padded),
    )


def _hidden_width(
    inner: Mapping[str, tuple[int, ...]], dim: int, padded: Collection[str]
) -> int | None:
    """The feed-forward width that most blocks have: a single wrong one is then named."""
    widths: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    for name, shape in sorted(inner.items()):
        if name.endswith("feed_forward.w1.weight") and len(shape) == 2 and 0 not in shape:
            widths[name in padded][shape[0]] += 1
    if widths[False]:
        return widths[False].most_common(1)[0][0]
    if widths[True]:
        width = widths[True].most_common(1)[0][0]
        usual = _usual_hidden_width(dim)
        return usual if -(-usual // 32) * 32 == width else width
    return None
