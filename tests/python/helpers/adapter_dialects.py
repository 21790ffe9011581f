"""Every dialect of adapter files, written for diffusers' model."""

from __future__ import annotations

from functools import lru_cache

import torch

from . import adapter_files as af
from .diffusers_reference import make_reference


@lru_cache(maxsize=1)
def dialects(model) -> dict[str, af.Written]:
    """Return adapters in each dialect. The weights of the model must not have changed since."""
    every = af.modules_of(model)
    blocks = {name: layer for name, layer in every.items() if "adaLN" not in name}
    blocks = {name: layer for name, layer in blocks.items() if "layers" in name or "ref" in name}
    attention = {name: layer for name, layer in blocks.items() if "attention" in name}
    unsplit = {
        name: layer
        for name, layer in every.items()
        if not name.endswith((".to_q", ".to_k", ".to_v"))
    }
    half = lambda stem: stem  # noqa: E731
    a, down = ".lora_A.weight", ".lora_down.weight"
    b, up = ".lora_B.weight", ".lora_up.weight"
    qkv, native = af.fused_qkv(model), af.dotted("diffusion_model.")
    fused = {
        "musubi for ComfyUI": af.write_block_diagonal(qkv, af.underscored("lora_unet_"), 2.0),
        "LoHa": af.write_loha(qkv, "lora_unet_", 2, 1.0),
        "LoKr, whole": af.write_lokr(qkv, native, "none", float("inf")),
        "LoKr, split": af.write_lokr(qkv, native, "second", 3.0),
        "DoRA": af.write_dora(model, native, ".dora_scale", modules=qkv),
        "difference": af.write_differences(qkv, native),
    }
    return {
        **{f"{name}, fused": af.of_parts(written) for name, written in fused.items()},
        "diffusers": af.write_pairs(every, af.dotted("transformer."), a, b),
        "diffusers, header": af.write_peft(model, 6.0, False),
        "diffusers, rsLoRA": af.write_peft(model, 6.0, True),
        "ai-toolkit": af.write_pairs(every, af.dotted("diffusion_model."), a, b),
        "musubi": af.write_pairs(blocks, af.underscored("lora_unet_"), down, up, 1.0),
        "musubi, every layer": af.write_pairs(every, af.underscored("lora_unet_"), down, up, 3.0),
        "VideoX-Fun": af.write_pairs(blocks, af.underscored("lora_unet__"), down, up, 4.0),
        "VideoX-Fun, alpha 0": af.write_pairs(blocks, af.underscored("lora_unet__"), down, up, 0.0),
        "DiffSynth": af.write_pairs(
            blocks, half, ".lora_A.default.weight", ".lora_B.default.weight"
        ),
        "OneTrainer, legacy": af.write_pairs(blocks, af.dotted("transformer."), down, up, 2.0),
        "OneTrainer, original": af.write_pairs(blocks, half, a, b, 2.0),
        "PEFT": af.write_pairs(blocks, af.dotted("base_model.model."), a, b),
        "PEFT of a pipeline": af.write_pairs(
            blocks, af.dotted("base_model.model.transformer."), a, b
        ),
        "old diffusers": af.write_pairs(
            attention, af.dotted("transformer."), ".lora.down.weight", ".lora.up.weight"
        ),
        "old diffusers, linear layer": af.write_pairs(
            attention,
            af.dotted("transformer."),
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        "underscore before lora": af.write_pairs(
            attention, half, "_lora.down.weight", "_lora.up.weight"
        ),
        "no .weight": af.write_pairs(attention, half, ".lora_A", ".lora_B"),
        "lora_transformer": af.write_pairs(
            blocks, af.underscored("lora_transformer_"), down, up, 4.0
        ),
        "lycoris": af.write_pairs(blocks, af.underscored("lycoris_"), down, up, 4.0),
        "two prefixes": af.write_pairs(blocks, af.dotted("transformer.diffusion_model."), a, b),
        "ComfyUI, fused": af.write_fused_qkv(model, af.dotted("diffusion_model."), a, b),
        "kohya, fused": af.write_fused_qkv(model, af.underscored("lora_unet_"), down, up),
        "native names": af.write_pairs(
            unsplit, lambda module: f"diffusion_model.{af.native(module)}", a, b
        ),
        "kohya, native names": af.write_pairs(
            unsplit,
            lambda module: af.underscored("lora_unet_")(af.native(module)),
            down,
            up,
            2.0,
        ),
        "LoHa": af.write_loha(attention, "lora_unet_", 2, 1.0),
        "LoHa of high rank": af.write_loha(attention, "lora_unet_", 12, 6.0),
        "LoKr, whole": af.write_lokr(
            attention, af.dotted("diffusion_model."), "none", float("inf")
        ),
        "LoKr, split": af.write_lokr(attention, af.underscored("lycoris_"), "second", 1.0),
        "LoKr, both split": af.write_lokr(attention, af.dotted("transformer."), "both", 1.0),
        "DoRA, PEFT": af.write_dora(model, af.dotted("transformer."), ".lora_magnitude_vector"),
        "DoRA, PEFT's weight": af.write_dora(
            model, af.dotted("transformer."), ".lora_magnitude_vector.weight"
        ),
        "DoRA, OneTrainer": af.write_dora(model, af.dotted("transformer."), ".dora_scale"),
        "musubi fork, rsLoRA": af.write_pairs(
            blocks, af.underscored("lora_unet_"), down, up, 4.0, rank_scaled=True
        ),
        "musubi fork, DoRA": musubi_fork_dora(model),
        "DoRA, ai-toolkit": af.write_dora(model, af.dotted("diffusion_model."), ".magnitude"),
    }


def musubi_fork_dora(model) -> af.Written:
    written = af.write_dora(
        model, af.underscored("lora_unet_"), ".dora_layer.weight", alpha=3.0, rank_scaled=False
    )
    written.tensors["use_dora_flag"] = torch.tensor(True)
    return written


NAMES = list(dialects(make_reference(dim=256)))
