"""State dicts of GPT-2 in transformers and in Megatron-LM."""

from flash_attn.models._remap import (
    HEAD,
    LAYER,
    POSITIONS,
    WORDS,
    Remap,
    Rule,
    grouped_qkv,
    heads,
    transposed,
    vocabulary,
)

_HF = "transformer.h.{i}."
_HF_REMAP = Remap(
    [
        Rule(WORDS, "transformer.wte.weight", vocabulary()),
        Rule(POSITIONS, "transformer.wpe.weight"),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.*", "transformer.ln_f.*"),
        Rule(LAYER + "norm1.*", _HF + "ln_1.*"),
        Rule(LAYER + "norm2.*", _HF + "ln_2.*"),
        Rule(LAYER + "mlp.fc1.*", _HF + "mlp.c_fc.*", transposed()),
        Rule(LAYER + "mlp.fc2.*", _HF + "mlp.c_proj.*", transposed()),
        Rule(LAYER + "mixer.Wqkv.*", _HF + "attn.c_attn.*", transposed()),
        Rule(LAYER + "mixer.out_proj.*", _HF + "attn.c_proj.*", transposed()),
    ],
    dropped=r"\.attn\.(bias|masked_bias)$",
    renamed=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),  # the published checkpoints have no prefix
)
_MEGATRON = "language_model.encoder.layers.{i}."
_MEGATRON_REMAP = Remap(
    [
        Rule(WORDS, "language_model.embedding.word_embeddings.weight", vocabulary()),
        Rule(POSITIONS, "language_model.embedding.position_embeddings.weight"),
        Rule("transformer.ln_f.*", "language_model.encoder.final_layernorm.*"),
        Rule(LAYER + "norm1.*", _MEGATRON + "input_layernorm.*"),
        Rule(LAYER + "norm2.*", _MEGATRON + "post_attention_layernorm.*"),
        Rule(LAYER + "mlp.fc1.*", _MEGATRON + "mlp.dense_h_to_4h.*"),
        Rule(LAYER + "mlp.fc2.*", _MEGATRON + "mlp.dense_4h_to_h.*"),
        Rule(
            LAYER + "mixer.Wqkv.*",
            _MEGATRON + "self_attention.query_key_value.*",
            grouped_qkv(lambda config: (heads(config)[0], 1)),
        ),
        Rule(LAYER + "mixer.out_proj.*", _MEGATRON + "self_attention.dense.*"),
    ],
    dropped=r"rotary_emb\.inv_freq$|^language_model\.rotary_pos_emb\.",
    renamed=(
        (r"^language_model\.transformer\.", "language_model.encoder."),  # names of older versions
        (r"(layers\.\d+)\.attention\.", r"\1.self_attention."),
    ),
)


def remap_state_dict_hf_gpt2(state_dict, config):
    """Our names and layouts for transformers' GPT2LMHeadModel or a published GPT-2 checkpoint."""
    return _HF_REMAP(state_dict, config)


def inv_remap_state_dict_hf_gpt2(state_dict, config):
    """The inverse of `remap_state_dict_hf_gpt2`, for GPT2LMHeadModel."""
    return _HF_REMAP.inverse(state_dict, config)


def remap_state_dict_megatron(state_dict, config):
    """Our names and layouts for Megatron-LM's GPT, whose head is tied."""
    return _MEGATRON_REMAP(state_dict, config)


def inv_remap_state_dict_megatron(state_dict, config):
    """The inverse of `remap_state_dict_megatron`."""
    return _MEGATRON_REMAP.inverse(state_dict, config)
