"""The table of file kinds, with their error sentences and the commands that take them.

`foreign_files.py` recognises files that are not safetensors by their first bytes, `identify.py`
all others by tensor names and dtypes. To accept another format, change one row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Uses that a file is opened for. "original" is the file that `validate` compares with.
Use = Literal[
    "convert",
    "original",
    "merge",
    "analyse",
    "measure",
    "validate",
    "dequantize",
    "export",
    "run",
    "control",
]

# The commands and calls of each use, as users know them.
USES: Final[dict[Use, str]] = {
    "convert": "convert",
    "original": "validate (as the original)",
    "merge": "merge-lora",
    "analyse": "probe, compare",
    "validate": "validate",
    "dequantize": "dequantize",
    "export": "export",
    "measure": "sensitivity",
    "run": "generate, serve, evaluate, ZImageTransformer",
    "control": "generate with a ControlNet, ZImageControlNet",
}
# Those that take other models with `any_model`.
USES_AS_OTHER_MODEL: Final[dict[Use, str]] = {
    "convert": "convert (any model)",
    "analyse": "compare (any model)",
}

_PLAIN: Final[frozenset[Use]] = frozenset(
    ("convert", "original", "merge", "analyse", "measure", "export", "run")
)
_MXFP8: Final[frozenset[Use]] = frozenset(("validate", "dequantize", "export", "run", "control"))
_INT8: Final[frozenset[Use]] = _MXFP8 - {"export"}
_CONTROLNET: Final[frozenset[Use]] = frozenset(("convert", "original", "control"))
_OTHER_MODEL: Final[frozenset[Use]] = frozenset(("convert", "original", "analyse"))


@dataclass(frozen=True)
class Kind:
    """A kind of file, or a format that a model is quantised with.

    Attributes:
        title: its name in `inspect`.
        problem: completes "FILE ..." if the file is refused. "{0}" stands for the evidence: a
            tensor, a folder, a description.
        remedy: what to do instead, in the imperative.
        uses: the uses that accept it.
        uses_as_other_model: the uses that accept it with `any_model` in addition.
        holds_layers: whether MXFP8 layers in it can be validated and decoded.
        quantised_remedy: the remedy for such a file that is quantised; "" if it is the same.
    """

    title: str
    problem: str
    remedy: str
    uses: frozenset[Use] = frozenset()
    uses_as_other_model: frozenset[Use] = frozenset()
    holds_layers: bool = False
    quantised_remedy: str = ""

    def accepts(self, use: Use, *, any_model: bool = False) -> bool:
        """Return whether a file of this kind can be used this way."""
        return use in self.uses or (any_model and use in self.uses_as_other_model)


def _format(title: str, uses: frozenset[Use] = frozenset()) -> Kind:
    return Kind(
        title,
        f'is quantised already ({title}, see "{{0}}")',
        "start from the BF16, F16 or F32 checkpoint",
        uses,
    )


def _other_model(title: str, problem: str | None = None) -> Kind:
    return Kind(
        title,
        problem or f'is {title}, not Z-Image (see "{{0}}")',
        "use a Z-Image checkpoint, or give `any_model=True` to convert or compare this one",
        uses_as_other_model=_OTHER_MODEL,
        holds_layers=True,
        quantised_remedy="use a Z-Image checkpoint; this one is quantised, so that it cannot be "
        "converted or compared either",
    )


def _part(title: str) -> Kind:
    return Kind(
        title,
        f'is a {title}, not a transformer (see "{{0}}")',
        "use the checkpoint of the Z-Image transformer",
        uses_as_other_model=_OTHER_MODEL,
        holds_layers=True,
    )


def _not_safetensors(title: str, remedy: str) -> Kind:
    return Kind(title, f"is {title}, not a safetensors file", remedy)


# ---- Z-Image: whole and plain, or with an obstacle

ZIMAGE = Kind(
    "Z-Image",
    "has no MXFP8 layers: it is not quantised",
    "convert it first (zimage-mxfp8 convert)",
    _PLAIN,
)
ADAPTED = Kind(
    "Z-Image with adapter matrices inside",
    'has adapter matrices inside the model ("{0}")',
    "merge the adapter into the weights, or save the model without it",
)
PEFT_WRAPPED = Kind(
    "Z-Image saved with a PEFT adapter attached",
    'was saved with a PEFT adapter attached ("{0}")',
    "save it again after fuse_lora() and unload_lora_weights()",
)
TWO_PATCH_SIZES = Kind(
    "Z-Image with several patch sizes",
    'has embedders for several patch sizes ("{0}" is one), where ComfyUI has a place for 2-1 only',
    "save it with all_patch_size=(2,) and all_f_patch_size=(1,)",
)
SHARD = Kind(
    "one shard of a sharded Z-Image",
    "is one shard of several",
    "give the folder with all shards and their index: {0}",
)
INCOMPLETE = Kind(
    "part of a Z-Image",
    'is part of a Z-Image only: it lacks "{0}"',
    "use the whole checkpoint, or download it again",
    holds_layers=True,
)
DIFFUSERS_QUANTISED = Kind(
    "quantised, with diffusers names",
    'has diffusers names and quantised layers ("{0}"): converters between layouts leave scales '
    "behind",
    "convert the original checkpoint to a single MXFP8 file",
)

# ---- formats that a model is quantised with

MXFP8 = _format("MXFP8", _MXFP8)
FP8 = _format("FP8")
SCALED_FP8 = _format("FP8 with scales")
ROWWISE_FP8 = _format("FP8 with one scale per row")
NVFP4 = _format("NVFP4")
INT8_CONVROT = _format("INT8 ConvRot", _INT8)
INT8 = _format("INT8")
FOUR_BIT = _format("4-bit")
MXFP8_AND_OTHERS = _format("MXFP8 and other formats", frozenset(("validate",)))
SEVERAL_FORMATS = _format("several formats")
OTHER_FORMAT = _format("ComfyUI quantised")

# ---- adapters, parts of a pipeline, other models

ADAPTER = Kind(
    "adapter",
    "is an adapter, not a model: {0}",
    "name a model, and give this file to convert, merge-lora or generate with `loras`, in Python "
    "also to load_lora",
)
ZIMAGE_CONTROLNET = Kind(
    "ControlNet for Z-Image",
    'is a ControlNet for Z-Image, not the model itself (see "{0}")',
    "use the checkpoint of the Z-Image transformer",
    _CONTROLNET,
    holds_layers=True,
)
PLAIN_CONTROLNET = Kind(
    "ControlNet for Z-Image, not quantised",
    ZIMAGE.problem,
    ZIMAGE.remedy,
)
NOT_A_CONTROLNET = Kind(
    "no ControlNet for Z-Image",
    "is not a ControlNet for Z-Image ({0})",
    "give a Z-Image-Fun-Controlnet-Union file or one of its kin",
)
CONTROLNET = Kind(
    "ControlNet",
    'is a ControlNet, not a model (see "{0}")',
    "use the checkpoint of the Z-Image transformer",
)
VAE = _part("VAE")
TEXT_ENCODER = _part("text encoder")
VISION_ENCODER = _part("vision encoder")
FLUX = _other_model("Flux")
QWEN_IMAGE = _other_model("Qwen-Image")
WAN = _other_model("Wan")
SDXL = _other_model("Stable Diffusion XL")
STABLE_DIFFUSION = _other_model("Stable Diffusion")
LUMINA2 = _other_model("Lumina 2")
UNKNOWN = _other_model("not Z-Image", 'is not a Z-Image checkpoint (its first tensor is "{0}")')

# ---- files that are not safetensors

GGUF = _not_safetensors("a GGUF file", "GGUF is quantised already: use the BF16 checkpoint")
PICKLE = _not_safetensors(
    "a PyTorch pickle (.pt, .pth, .ckpt, .bin)", "use the model's safetensors file"
)
ZIP = _not_safetensors("a zip archive", "unpack it first")
LFS_POINTER = _not_safetensors(
    "a Git LFS pointer", "fetch the file itself: run git lfs pull, or download it"
)
HTML = _not_safetensors("a web page", "download the file itself, logged in if the site asks for it")
SHARD_INDEX = _not_safetensors(
    "the index of a sharded checkpoint", "give the folder that it is in: {0}"
)
JSON_FILE = _not_safetensors("a JSON file", "give the model's safetensors file, or its folder")
TEXT_FILE = _not_safetensors("a text file", "download the model's file again")
EMPTY_FILE = Kind("an empty file", "is empty", "download it again")
DANGLING_LINK = Kind(
    "a link to a missing file", "is a link to {0}, which does not exist", "restore that file"
)
LINK_LOOP = Kind(
    "a link that leads back to itself",
    "is a link to {0}, which leads back to it",
    "link to the file itself",
)
NO_WEIGHTS = Kind(
    "a folder without a checkpoint",
    "is not a diffusers folder: neither it nor its transformer/ has "
    "diffusion_pytorch_model.safetensors or its index",
    "{0}",
)
