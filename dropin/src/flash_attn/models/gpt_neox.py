"""GPT-NeoX, Pythia and RedPajama as a GPTModel."""

from flash_attn.models._config import gpt2_config, rotary_base, rotary_fraction
from flash_attn.models._remap import HEAD, LAYER, WORDS, Remap, Rule, grouped_qkv, heads, vocabulary

_THEIRS = "gpt_neox.layers.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "gpt_neox.embed_in.weight", vocabulary()),
        Rule(HEAD, "embed_out.weight", vocabulary()),
        Rule("transformer.ln_f.*", "gpt_neox.final_layer_norm.*"),
        Rule(LAYER + "norm1.*", _THEIRS + "input_layernorm.*"),
        Rule(LAYER + "norm2.*", _THEIRS + "post_attention_layernorm.*"),
        Rule(LAYER + "mlp.fc1.*", _THEIRS + "mlp.dense_h_to_4h.*"),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "mlp.dense_4h_to_h.*"),
        Rule(
            LAYER + "mixer.Wqkv.*",
            _THEIRS + "attention.query_key_value.*",
            grouped_qkv(lambda config: (heads(config)[0], 1)),
        ),
        Rule(LAYER + "mixer.out_proj.*", _THEIRS + "attention.dense.*"),
    ],
    dropped=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^gpt_neox\.rotary_emb\.",
    renamed=((r"^lm_head\.", "embed_out."),),  # the head's name in transformers 5
)


def remap_state_dict_hf_gpt_neox(state_dict, config):
    """Our names and layouts for transformers' GPTNeoXForCausalLM; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_gpt_neox(state_dict, config):
    """The inverse of `remap_state_dict_hf_gpt_neox`."""
    return _REMAP.inverse(state_dict, config)


def gpt_neox_config_to_gpt2_config(gpt_neox_config):
    """The GPT2Config of a GPTNeoXConfig."""
    return gpt2_config(
        gpt_neox_config,
        n_inner=gpt_neox_config.intermediate_size,
        activation_function=gpt_neox_config.hidden_act,
        resid_pdrop=gpt_neox_config.hidden_dropout,
        attn_pdrop=gpt_neox_config.attention_dropout,
        layer_norm_epsilon=gpt_neox_config.layer_norm_eps,
        parallel_block=gpt_neox_config.use_parallel_residual,
        parallel_block_tied_norm=False,
        rotary_emb_fraction=rotary_fraction(gpt_neox_config, "rotary_pct", "partial_rotary_factor"),
        rotary_emb_base=rotary_base(gpt_neox_config, "rotary_emb_base"),
        tie_word_embeddings=gpt_neox_config.tie_word_embeddings,
        qkv_proj_bias=gpt_neox_config.attention_bias,
        out_proj_bias=gpt_neox_config.attention_bias,
    )
