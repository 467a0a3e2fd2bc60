"""BTLM as a GPTModel."""

from flash_attn.models._config import gpt2_config
from flash_attn.models._remap import HEAD, LAYER, POSITIONS, WORDS, Remap, Rule, stacked, transposed, vocabulary

_THEIRS = "transformer.h.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "transformer.wte.weight", vocabulary()),
        Rule(POSITIONS, "transformer.wpe.weight"),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.*", "transformer.ln_f.*"),
        Rule(LAYER + "norm1.*", _THEIRS + "ln_1.*"),
        Rule(LAYER + "norm2.*", _THEIRS + "ln_2.*"),
        Rule(LAYER + "mlp.fc1.*", (_THEIRS + "mlp.c_fc.*", _THEIRS + "mlp.c_fc2.*"), transposed(stacked(2))),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "mlp.c_proj.*", transposed()),
        Rule(LAYER + "mixer.Wqkv.*", _THEIRS + "attn.c_attn.*", transposed()),
        Rule(LAYER + "mixer.out_proj.*", _THEIRS + "attn.c_proj.*", transposed()),
    ],
    dropped=r"\.attn\.(bias|masked_bias)$|relative_pe\.slopes$",
)


def remap_state_dict_hf_btlm(state_dict, config):
    """Our names and layouts for the published BTLM models; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_btlm(state_dict, config):
    """The inverse of `remap_state_dict_hf_btlm`."""
    return _REMAP.inverse(state_dict, config)


def btlm_config_to_gpt2_config(btlm_config):
    """The GPT2Config of a BTLMConfig."""
    has_alibi = btlm_config.position_embedding_type == "alibi"
    return gpt2_config(
        btlm_config,
        n_positions=0 if has_alibi else btlm_config.n_positions,
        n_inner=btlm_config.n_inner,
        activation_function=btlm_config.activation_function,
        resid_pdrop=btlm_config.resid_pdrop,
        embd_pdrop=btlm_config.embd_pdrop,
        attn_pdrop=btlm_config.attn_pdrop,
        layer_norm_epsilon=btlm_config.layer_norm_epsilon,
        use_alibi=has_alibi,
        use_flash_attn=has_alibi,  # which ALiBi needs
        mup_width_scale=btlm_config.mup_width_scale,
        mup_embeddings_multiplier=btlm_config.mup_embeddings_scale,
        mup_output_multiplier=btlm_config.mup_output_alpha,
        mup_scale_qk_dot_by_d=btlm_config.mup_scale_qk_dot_by_d,
        mlp_multiple_of=1,
    )
