"""A diffusers folder of Z-Image's shape, with the real classes and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from helpers.diffusers_reference import CAPTION, make_reference

# What Qwen3's own template gives for one message of a user with thinking enabled.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_ENCODER = {
    "hidden_size": CAPTION,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def make_tokenizer() -> Qwen2TokenizerFast:
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *MARKS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=MARKS[0],
        eos_token=MARKS[2],
        additional_special_tokens=list(MARKS[1:]),
        chat_template=TEMPLATE,
    )


def make_parts(text_encoder: dict[str, Any], vae: dict[str, Any]) -> dict[str, Any]:
    """All but the transformer, in float32, of these sizes."""
    tokenizer = make_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(
            Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=512, **text_encoder)
        ).eval(),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **vae,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    }


def make_pipeline(seed: int = 0) -> ZImagePipeline:
    """The pipeline in float32; `save_pretrained` makes the folder."""
    torch.manual_seed(seed)
    return ZImagePipeline(**make_parts(TEXT_ENCODER, VAE), transformer=make_reference())


def make_folder(path: Path) -> Path:
    """Write the folder."""
    make_pipeline().save_pretrained(path)
    return path
