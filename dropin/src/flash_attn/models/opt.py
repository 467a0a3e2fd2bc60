"""OPT as a GPTModel."""

import torch

from flash_attn.models._config import gpt2_config, refuse
from flash_attn.models._remap import HEAD, LAYER, POSITIONS, WORDS, Layout, Remap, Rule, qkv_rows, stacked, vocabulary

# Their position table starts with two rows that no token without padding reads.
_POSITIONS = Layout(
    lambda tensors, config: tensors[0][2:],
    lambda x, config: [torch.cat((x.new_zeros(2, x.shape[1]), x))],
)
_THEIRS = "model.decoder.layers.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "model.decoder.embed_tokens.weight", vocabulary()),
        Rule(POSITIONS, "model.decoder.embed_positions.weight", _POSITIONS),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.embeddings.project_in.weight", "model.decoder.project_in.weight"),
        Rule("project_out.weight", "model.decoder.project_out.weight"),
        Rule("transformer.ln_f.*", "model.decoder.final_layer_norm.*"),
        Rule(LAYER + "norm1.*", _THEIRS + "self_attn_layer_norm.*"),
        Rule(LAYER + "norm2.*", _THEIRS + "final_layer_norm.*"),
        Rule(LAYER + "mlp.fc1.*", _THEIRS + "fc1.*"),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "fc2.*"),
        Rule(LAYER + "mixer.Wqkv.*", [_THEIRS + f"self_attn.{x}_proj.*" for x in "qkv"], stacked(qkv_rows)),
        Rule(LAYER + "mixer.out_proj.*", _THEIRS + "self_attn.out_proj.*"),
    ],
    # The norm behind the decoder was once called layer_norm, and the prefix was shorter.
    renamed=((r"^(?=decoder\.)", "model."), (r"^(model\.decoder)\.layer_norm\.", r"\1.final_layer_norm.")),
)


def remap_state_dict_hf_opt(state_dict, config):
    """Our names and layouts for transformers' OPTForCausalLM; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_opt(state_dict, config):
    """The inverse of `remap_state_dict_hf_opt`; the two unread rows of the position table come back as zeros."""
    return _REMAP.inverse(state_dict, config)


def opt_config_to_gpt2_config(opt_config):
    """The GPT2Config of an OPTConfig.

    Raises:
        NotImplementedError: layer drop, or a decoder without biases, norm weights or final norm.
    """
    if opt_config.layerdrop != 0.0:
        raise NotImplementedError(f"layerdrop must be 0, not {opt_config.layerdrop}")
    refuse(opt_config, enable_bias=False, layer_norm_elementwise_affine=False, _remove_final_layer_norm=True)
    width = opt_config.word_embed_proj_dim
    return gpt2_config(
        opt_config,
        n_positions=opt_config.max_position_embeddings,
        n_inner=opt_config.ffn_dim,
        activation_function=opt_config.activation_function,
        resid_pdrop=opt_config.dropout,
        embd_pdrop=opt_config.dropout,  # in front of the first norm, where they have none
        attn_pdrop=opt_config.attention_dropout,
        initializer_range=opt_config.init_std,
        prenorm=opt_config.do_layer_norm_before,
        word_embed_proj_dim=None if width == opt_config.hidden_size else width,
        tie_word_embeddings=opt_config.tie_word_embeddings,
    )
