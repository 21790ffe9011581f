"""The names of tensors in adapter files: what trainers put before and after a module's name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.adapters import MODULE_PREFIXES

Role = Literal[
    # LoRA
    "down",
    "up",
    "up_bias",
    "mid",
    "alpha",
    "magnitude",
    # LoHa
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    # LoKr
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    # Whole differences
    "diff",
    "diff_bias",
    # Known, and refused by name
    "unsupported",
]

# Of a whole file, as a fork of musubi-tuner writes them. The second adds nothing to what the
# names of the tensors say.
RANK_SCALED_FLAG = "use_rslora_flag"
FLAGS = (RANK_SCALED_FLAG, "use_dora_flag")

_TEXT_ENCODER = re.compile(r"^(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?[._])")

_NAME = r"(?:\.[A-Za-z0-9_-]+)?"  # of PEFT's adapter
_PATTERNS: dict[Role, str] = {
    "up_bias": rf"\.lora_B{_NAME}\.bias",
    "down": rf"[._]lora(?:_A{_NAME}|_down|\.down|_linear_layer\.down)(?:\.weight)?",
    "up": rf"[._]lora(?:_B{_NAME}|_up|\.up|_linear_layer\.up)(?:\.weight)?",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "magnitude": rf"\.(?:dora_scale|lora_magnitude_vector{_NAME}(?:\.weight)?|magnitude"
    r"|dora_layer\.weight)",
    "hada_w1_a": r"\.hada_w1_a",
    "hada_w1_b": r"\.hada_w1_b",
    "hada_w2_a": r"\.hada_w2_a",
    "hada_w2_b": r"\.hada_w2_b",
    "lokr_w1_a": r"\.lokr_w1_a",
    "lokr_w1_b": r"\.lokr_w1_b",
    "lokr_w2_a": r"\.lokr_w2_a",
    "lokr_w2_b": r"\.lokr_w2_b",
    "lokr_w1": r"\.lokr_w1",
    "lokr_w2": r"\.lokr_w2",
    "diff_bias": r"\.(?:diff_b|b_norm)",
    "diff": r"\.(?:diff|w_norm)",
    "unsupported": (
        r"\.(?:oft_\w+(?:\.\w+)?|rescale|[ab][12](?:\.weight)?|hada_t[12]|lokr_t2|set_weight"
        r"|reshape_weight|use_\w+_flag)"
    ),
}
_SUFFIXES = {role: re.compile(f"(?:{pattern})$") for role, pattern in _PATTERNS.items()}
_UNSUPPORTED_TYPES = (
    ("OFT", re.compile(r"oft_|\.rescale$")),
    ("GLoRA", re.compile(r"\.[ab][12](?:\.weight)?$")),
    ("a Tucker decomposition", re.compile(r"lora_mid|hada_t|lokr_t2")),
    ("a replacement of the weight", re.compile(r"set_weight")),
    ("an adapter of a weight of another shape", re.compile(r"reshape_weight")),
)


@dataclass(frozen=True)
class Key:
    """One tensor's name, taken apart.

    Attributes:
        name: as the file has it.
        prefix: what stands before the module.
        module: the module's name as the file spells it.
        role: what the tensor is of the module's adapter.
    """

    name: str
    prefix: str
    module: str
    role: Role


def split_key(name: str) -> Key | None:
    """Take a name apart; None for one that no adapter has."""
    for role, pattern in _SUFFIXES.items():
        match = pattern.search(name)
        if match and match.start() > 0:
            module = name[: match.start()]
            prefix = next((x for x in MODULE_PREFIXES if module.startswith(x)), "")
            return Key(name, prefix, module[len(prefix) :], role)
    return None


def is_text_encoder_key(name: str) -> bool:
    """Whether a name belongs to an adapter of the text encoder."""
    return _TEXT_ENCODER.search(name) is not None


def unsupported_type(name: str) -> str | None:
    """Return what kind of adapter a tensor is of that is recognised and not supported."""
    return next((title for title, p in _UNSUPPORTED_TYPES if p.search(name)), None)
