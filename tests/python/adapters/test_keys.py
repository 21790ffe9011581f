"""Names of tensors in adapter files: every spelling of every module leads to its target."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zimage_mxfp8.adapters.keys import is_text_encoder_key, split_key, unsupported_type
from zimage_mxfp8.adapters.targets import Target, Targets

COUNTS = {"n_layers": 30, "n_refiner_layers": 2}
TARGETS = Targets(COUNTS)

# Modules of a block in ComfyUI's and diffusers' spelling, with the rows of which layer they are.
BLOCK = {
    "attention.qkv": ("attention.qkv", 0, 1),
    "attention.to_q": ("attention.qkv", 0, 3),
    "attention.to_k": ("attention.qkv", 1, 3),
    "attention.to_v": ("attention.qkv", 2, 3),
    "attention.out": ("attention.out", 0, 1),
    "attention.to_out.0": ("attention.out", 0, 1),
    "feed_forward.w1": ("feed_forward.w1", 0, 1),
    "feed_forward.w2": ("feed_forward.w2", 0, 1),
    "feed_forward.w3": ("feed_forward.w3", 0, 1),
    "attention.norm_q": ("attention.q_norm", 0, 1),
    "attention.k_norm": ("attention.k_norm", 0, 1),
    "ffn_norm2": ("ffn_norm2", 0, 1),
}
MODULATION = {"adaLN_modulation.0": ("adaLN_modulation.0", 0, 1)}
OUTSIDE = {
    "x_embedder": "x_embedder",
    "all_x_embedder.2-1": "x_embedder",
    "final_layer.linear": "final_layer.linear",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
}
MODULES = {name: Target(layer) for name, layer in OUTSIDE.items()} | {
    f"{stack}.{i}.{name}": Target(f"{stack}.{i}.{layer}", part, parts)
    for stack, count in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2))
    for i in range(count)
    for name, (layer, part, parts) in (
        BLOCK if stack == "context_refiner" else BLOCK | MODULATION
    ).items()
}
DOTTED = (
    *("", "transformer.", "diffusion_model.", "transformer.diffusion_model."),
    *("base_model.model.", "base_model.model.transformer."),
    *("transformer.transformer.", "transformer.."),
)
UNDERSCORED = (
    *("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"),
    *("transformer.lora_transformer_", "transformer.lycoris_"),
)
ROLES = {
    "down": (
        *(".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora_down.weight"),
        *(".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight"),
    ),
    "up": (
        *(".lora_B.weight", ".lora_B.my-own_1.weight", ".lora_B", ".lora_up.weight"),
        *(".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight"),
    ),
    "up_bias": (".lora_B.bias", ".lora_B.default.bias"),
    "alpha": (".alpha",),
    "magnitude": (
        *(".dora_scale", ".magnitude", ".lora_magnitude_vector"),
        *(".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight"),
        ".dora_layer.weight",
    ),
    "hada_w1_a": (".hada_w1_a",),
    "hada_w2_b": (".hada_w2_b",),
    "lokr_w1": (".lokr_w1",),
    "lokr_w2_a": (".lokr_w2_a",),
    "diff": (".diff", ".w_norm"),
    "diff_bias": (".diff_b", ".b_norm"),
    "mid": (".lora_mid.weight",),
    "unsupported": (
        *(".oft_blocks", ".oft_R.weight", ".a1.weight", ".b2", ".set_weight", ".hada_t1"),
        ".reshape_weight",
    ),
}
SUFFIXES = [(role, suffix) for role, suffixes in ROLES.items() for suffix in suffixes]


@given(
    st.sampled_from(sorted(MODULES)),
    st.sampled_from(SUFFIXES),
    st.sampled_from(DOTTED + UNDERSCORED),
)
def test_a_spelling_leads_to_its_target(module: str, suffix: tuple[str, str], prefix: str) -> None:
    role, ending = suffix
    spelled = module.replace(".", "_") if prefix in UNDERSCORED else module
    key = split_key(prefix + spelled + ending)
    assert key is not None
    assert (key.role, key.prefix, key.module) == (role, prefix, spelled)
    assert TARGETS.find(key.module) == MODULES[module]
    assert not is_text_encoder_key(key.name)


@given(st.sampled_from(sorted(MODULES)), st.randoms())
def test_dots_and_underscores_may_be_mixed(module: str, random) -> None:
    """Diffusers writes "final.layer.linear" for "final_layer.linear"."""
    spelled = "".join(random.choice("._") if x in "._" else x for x in module)
    assert TARGETS.find(spelled) == MODULES[module]


def test_no_two_modules_have_one_spelling() -> None:
    names = [name.replace(".", "_") for name in MODULES]
    assert len(set(names)) == len(names)


PIECES = st.sampled_from(
    [*DOTTED, *UNDERSCORED, *(x for _, x in SUFFIXES), *list(MODULES)[:40], "lora_te_", ".", "_"]
)


@given(st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5))).map("".join)))
def test_any_text_is_a_key_or_none(name: str) -> None:
    is_text_encoder_key(name)
    unsupported_type(name)
    key = split_key(name)
    if key is not None:
        assert name.startswith(key.prefix + key.module) and key.role
        target = TARGETS.find(key.module)
        assert target is None or target.layer
