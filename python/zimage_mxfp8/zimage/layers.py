"""The table of Z-Image's layers: every name, shape and role of a tensor is a row here.

Names are those of the ComfyUI single file, which the original repository shares, and of diffusers'
`ZImageTransformer2DModel`. `table.py` derives values from the rows; `rows.py` defines the kinds of
rows. The forward pass itself is in `transformer/`.
"""

from __future__ import annotations

from .constants import HEAD_DIM, MAX_MODULATION_DIM, PATCH_FEATURES, TIME_FEATURES
from .rows import Layer, Size, Stack
from .table import LayerTable

_TIME_HIDDEN = 1024

ZIMAGE = LayerTable(
    sizes=(
        Size("dim", lambda _: 3840, (("cap_embedder.1.weight", 0),)),
        Size(
            "caption_dim",
            lambda _: 2560,
            (("cap_embedder.1.weight", 1), ("cap_embedder.0.weight", 0)),
        ),
        Size("hidden", lambda s: int(s["dim"] / 3 * 8), (("feed_forward.w1.weight", 0),)),
        Size("modulation", lambda s: min(s["dim"], MAX_MODULATION_DIM)),
    ),
    stacks=(
        Stack("noise_refiner", "n_refiner_layers", "image", modulated=True, title="noise "),
        Stack("context_refiner", "n_refiner_layers", "caption", modulated=False, title="context "),
        Stack("layers", "n_layers", "joint", modulated=True, main=True),
    ),
    block=(
        Layer(
            "attention.qkv",
            "linear",
            lambda s: (3 * s["dim"], s["dim"]),
            diffusers=("attention.to_q", "attention.to_k", "attention.to_v"),
            slot="qkv",
        ),
        Layer(
            "attention.out",
            "linear",
            lambda s: (s["dim"], s["dim"]),
            diffusers=("attention.to_out.0",),
            slot="out",
        ),
        Layer(
            "attention.q_norm",
            "norm",
            lambda _: (HEAD_DIM,),
            diffusers=("attention.norm_q",),
            slot="q_norm",
        ),
        Layer(
            "attention.k_norm",
            "norm",
            lambda _: (HEAD_DIM,),
            diffusers=("attention.norm_k",),
            slot="k_norm",
        ),
        Layer("feed_forward.w1", "linear", lambda s: (s["hidden"], s["dim"]), slot="ffn_in"),
        Layer("feed_forward.w2", "linear", lambda s: (s["dim"], s["hidden"]), slot="ffn_out"),
        Layer("feed_forward.w3", "linear", lambda s: (s["hidden"], s["dim"]), slot="ffn_in"),
        Layer("attention_norm1", "norm", lambda s: (s["dim"],), slot="attention_norm1"),
        Layer("attention_norm2", "norm", lambda s: (s["dim"],), slot="attention_norm2"),
        Layer("ffn_norm1", "norm", lambda s: (s["dim"],), slot="ffn_norm1"),
        Layer("ffn_norm2", "norm", lambda s: (s["dim"],), slot="ffn_norm2"),
        Layer(
            "adaLN_modulation.0",
            "modulation",
            lambda s: (4 * s["dim"], s["modulation"]),
            bias=True,
        ),
    ),
    outside=(
        Layer(
            "x_embedder",
            "linear",
            lambda s: (s["dim"], PATCH_FEATURES),
            bias=True,
            group="embedders",
        ),
        Layer("cap_embedder.0", "norm", lambda s: (s["caption_dim"],), group="embedders"),
        Layer(
            "cap_embedder.1",
            "linear",
            lambda s: (s["dim"], s["caption_dim"]),
            bias=True,
            group="embedders",
        ),
        Layer(
            "t_embedder.mlp.0",
            "linear",
            lambda _: (_TIME_HIDDEN, TIME_FEATURES),
            bias=True,
            group="embedders",
        ),
        Layer(
            "t_embedder.mlp.2",
            "linear",
            lambda s: (s["modulation"], _TIME_HIDDEN),
            bias=True,
            group="embedders",
        ),
        Layer("x_pad_token", "token", lambda s: (1, s["dim"]), group="embedders"),
        Layer("cap_pad_token", "token", lambda s: (1, s["dim"]), group="embedders"),
        Layer(
            "final_layer.linear",
            "linear",
            lambda s: (PATCH_FEATURES, s["dim"]),
            bias=True,
        ),
        Layer(
            "final_layer.adaLN_modulation.1",
            "linear",
            lambda s: (s["dim"], s["modulation"]),
            bias=True,
        ),
    ),
    diffusers_modules=(  # 2-1: for patches of 2 x 2 in one frame
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
    ),
    anchor="cap_embedder.1.weight",
    signature=(
        "cap_embedder.1.weight",
        "cap_pad_token",
        "noise_refiner.0.attention.k_norm.weight",
    ),
    time_embedder="t_embedder",
    title="Z-Image transformer",
)


def zimage_shapes(
    dim: int | None = None,
    layers: int = 30,
    refiner_layers: int = 2,
    caption_dim: int | None = None,
    hidden: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of Z-Image's tensors in ComfyUI's layout; defaults: the real model's.

    Args:
        dim: width of the model, a multiple of 128.
        layers: number of main blocks.
        refiner_layers: number of blocks in each of the two refiners.
        caption_dim: features of the text encoder.
        hidden: width of the feed-forward layers, by default int(dim / 3 * 8).
    """
    given = {"dim": dim, "caption_dim": caption_dim, "hidden": hidden}
    sizes = {name: size for name, size in given.items() if size is not None}
    return ZIMAGE.shapes(sizes, {"n_layers": layers, "n_refiner_layers": refiner_layers})
