"""Falcon as a GPTModel."""

from flash_attn.models._config import gpt2_config, refuse, rotary_base
from flash_attn.models._remap import HEAD, LAYER, WORDS, Remap, Rule, grouped_qkv, heads, vocabulary


def _groups(config) -> tuple[int, int]:
    count, count_k, _ = heads(config)
    return count_k, count // count_k


_THEIRS = "transformer.h.{i}."


def _rules(norm1: str, norm2: str) -> list[Rule]:
    return [
        Rule(WORDS, "transformer.word_embeddings.weight", vocabulary()),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.*", "transformer.ln_f.*"),
        Rule(LAYER + "norm1.*", _THEIRS + norm1 + ".*"),
        Rule(LAYER + "norm2.*", _THEIRS + norm2 + ".*"),
        Rule(LAYER + "mlp.fc1.*", _THEIRS + "mlp.dense_h_to_4h.*"),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "mlp.dense_4h_to_h.*"),
        Rule(LAYER + "mixer.Wqkv.*", _THEIRS + "self_attention.query_key_value.*", grouped_qkv(_groups)),
        Rule(LAYER + "mixer.out_proj.*", _THEIRS + "self_attention.dense.*"),
    ]


_DROPPED = r"self_attention\.(maybe_)?rotary(_emb)?\.inv_freq$"
_SEQUENTIAL = Remap(_rules("input_layernorm", "post_attention_layernorm"), _DROPPED)
_PARALLEL = Remap(_rules("ln_attn", "ln_mlp"), _DROPPED)


def _remap(config) -> Remap:
    has_two = getattr(config, "parallel_block", False) and not getattr(config, "parallel_block_tied_norm", False)
    return _PARALLEL if has_two else _SEQUENTIAL


def remap_state_dict_hf_falcon(state_dict, config):
    """Our names and layouts for transformers' FalconForCausalLM; config is the GPT2Config."""
    return _remap(config)(state_dict, config)


def inv_remap_state_dict_hf_falcon(state_dict, config):
    """The inverse of `remap_state_dict_hf_falcon`."""
    return _remap(config).inverse(state_dict, config)


def _heads_k(config) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    legacy = getattr(config, "n_head_kv", None)  # the name in the first release of the 40B model
    if legacy is not None:
        return legacy
    return 1 if getattr(config, "multi_query", False) else config.num_attention_heads


def falcon_config_to_gpt2_config(falcon_config):
    """The GPT2Config of a FalconConfig.

    Raises:
        NotImplementedError: ALiBi, which Falcon scales with the scores.
    """
    refuse(falcon_config, alibi=True)
    is_new = getattr(falcon_config, "new_decoder_architecture", False) or hasattr(falcon_config, "n_head_kv")
    has_two_norms = is_new and getattr(falcon_config, "num_ln_in_parallel_attn", None) in (None, 2)
    bias = falcon_config.bias
    return gpt2_config(
        falcon_config,
        n_inner=getattr(falcon_config, "ffn_hidden_size", None) or 4 * falcon_config.hidden_size,
        activation_function=getattr(falcon_config, "activation", "gelu"),
        resid_pdrop=falcon_config.hidden_dropout,
        attn_pdrop=falcon_config.attention_dropout,
        layer_norm_epsilon=falcon_config.layer_norm_epsilon,
        parallel_block=is_new or falcon_config.parallel_attn,
        parallel_block_tied_norm=not has_two_norms,
        n_head_kv=_heads_k(falcon_config),
        rotary_emb_fraction=1.0,
        rotary_emb_base=rotary_base(falcon_config),
        tie_word_embeddings=falcon_config.tie_word_embeddings,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )
