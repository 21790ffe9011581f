"""The tokenizer and the text encoder: a token per word, and a small Qwen3 with random weights.

The encoder is not trained: the embedding of a word is all that the transformer needs to know of
it, and its first layer keeps it in the residual stream.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from .scenes import words

FEATURES = 96
# Qwen3's turns. A caption starts at the same position in each.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
_PAD, _UNKNOWN, _START, _END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each word of the captions."""
    tokens = [_PAD, _UNKNOWN, _START, _END, "user", "assistant", *words()]
    tokenizer = Tokenizer(
        models.WordLevel(vocab={token: i for i, token in enumerate(tokens)}, unk_token=_UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[_START],
        chat_template=_TEMPLATE,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3Model:
    """Make a Qwen3 of two layers whose second to last hidden state is [tokens, 96]."""
    torch.manual_seed(1)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=FEATURES,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
        )
    ).eval()
    with torch.no_grad():
        encoder.embed_tokens.weight.normal_()  # large beside what the layer adds
    return encoder.to(torch.bfloat16)


class CaptionEncoder:
    """Captions to features, as ZImagePipeline makes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: Qwen3Model) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[torch.Tensor]:
        """Return one float32 tensor [tokens, 96] per caption."""
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for caption in captions
        ]
        batch = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.encoder.device)
        mask = batch["attention_mask"]
        states = self.encoder(
            input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True
        ).hidden_states[-2]
        return [state[keep.bool()].float() for state, keep in zip(states, mask, strict=True)]
