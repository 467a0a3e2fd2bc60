"""Baichuan as a GPTModel."""

from flash_attn.models._config import gpt2_config, no_bias
from flash_attn.models._remap import HEAD, LAYER, WORDS, Remap, Rule, stacked, vocabulary

_THEIRS = "model.layers.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "model.embed_tokens.weight", vocabulary()),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.weight", "model.norm.weight"),
        Rule(LAYER + "norm1.weight", _THEIRS + "input_layernorm.weight"),
        Rule(LAYER + "norm2.weight", _THEIRS + "post_attention_layernorm.weight"),
        Rule(
            LAYER + "mlp.fc1.weight",
            (_THEIRS + "mlp.up_proj.weight", _THEIRS + "mlp.gate_proj.weight"),
            stacked(2),
        ),
        Rule(LAYER + "mlp.fc2.weight", _THEIRS + "mlp.down_proj.weight"),
        Rule(LAYER + "mixer.Wqkv.weight", _THEIRS + "self_attn.W_pack.weight"),
        Rule(LAYER + "mixer.out_proj.weight", _THEIRS + "self_attn.o_proj.weight"),
    ],
    dropped=r"self_attn\.rotary_emb\.|future_mask$|alibi_mask$",
)


def remap_state_dict_hf_baichuan(state_dict, config):
    """Our names and layouts for the published Baichuan models; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_baichuan(state_dict, config):
    """The inverse of `remap_state_dict_hf_baichuan`."""
    return _REMAP.inverse(state_dict, config)


def baichuan_config_to_gpt2_config(baichuan_config):
    """The GPT2Config of a BaichuanConfig.

    Their config names neither the position embedding nor the head, so sizes tell: the 7B models use rotary embedding
    and the 13B ones ALiBi, and version 2, with the larger vocabulary, has a normalised head.
    """
    has_rotary = baichuan_config.hidden_size < 5000
    return gpt2_config(
        baichuan_config,
        n_inner=baichuan_config.intermediate_size,
        activation_function="swiglu",
        layer_norm_epsilon=baichuan_config.rms_norm_eps,
        rms_norm=True,
        rotary_emb_fraction=1.0 if has_rotary else 0.0,
        rotary_emb_interleaved=False,
        use_alibi=not has_rotary,
        use_flash_attn=not has_rotary,  # which ALiBi needs
        tie_word_embeddings=False,
        norm_head=baichuan_config.vocab_size > 70000,
        mlp_multiple_of=1,
        **no_bias(),
    )
