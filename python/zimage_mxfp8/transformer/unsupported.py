"""Features of diffusers' models that this transformer lacks, with alternatives."""

from __future__ import annotations

import re

# By a common part of the attributes' names.
_INSTEAD = {
    "peft|add_adapter|save_lora": (
        "adapters are loaded with load_lora or a pipeline's load_lora_weights; to train or save "
        "one, use diffusers' model"
    ),
    "save_|push_to_hub": (
        "its weights stay in the file that they came from; to save a pipeline, set its transformer "
        "to None, save it again, and pass the transformer to from_pretrained"
    ),
    "cache": "every step is computed in full; leave the call out",
    "gradient_checkpointing": "it is for inference only; train diffusers' model and convert that",
    "layerwise_casting": "its weights keep their types; convert the checkpoint to save memory",
    "group_offload": "call the pipeline's enable_model_cpu_offload",
    "compile_repeated_blocks": "on CUDA it runs CUDA graphs already; leave the call out",
    "attn|attention|qkv_projections": (
        "it runs the fastest attention that torch has for it; leave the call out"
    ),
}


def alternative_to(attribute: str) -> str | None:
    """Return the alternative to an attribute of diffusers' models; None without one."""
    return next((advice for names, advice in _INSTEAD.items() if re.search(names, attribute)), None)
