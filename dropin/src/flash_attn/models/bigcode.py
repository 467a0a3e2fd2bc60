"""StarCoder and other GPTBigCode models as a GPTModel; their single key/value head is repeated for every head."""

import torch

from flash_attn.models._config import gpt2_config, refuse
from flash_attn.models._remap import HEAD, LAYER, POSITIONS, WORDS, Layout, Remap, Rule, heads, vocabulary


def _repeat(tensors, config):
    count, _, dim = heads(config)
    q, k, v = tensors[0].split((count * dim, dim, dim))
    return torch.cat((q, *[k] * count, *[v] * count))


def _single(x, config):
    count, _, dim = heads(config)
    q, k, v = x.unflatten(0, (3 * count, dim)).chunk(3)
    for name, copies in (("key", k), ("value", v)):
        if not torch.equal(copies, copies[:1].expand_as(copies)):
            raise ValueError(f"the {name} heads differ, so they do not fit into the single one of a multi-query model")
    return [torch.cat((q.flatten(0, 1), k[0], v[0]))]


_THEIRS = "transformer.h.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "transformer.wte.weight", vocabulary()),
        Rule(POSITIONS, "transformer.wpe.weight"),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.*", "transformer.ln_f.*"),
        Rule(LAYER + "norm1.*", _THEIRS + "ln_1.*"),
        Rule(LAYER + "norm2.*", _THEIRS + "ln_2.*"),
        Rule(LAYER + "mlp.fc1.*", _THEIRS + "mlp.c_fc.*"),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "mlp.c_proj.*"),
        Rule(LAYER + "mixer.Wqkv.*", _THEIRS + "attn.c_attn.*", Layout(_repeat, _single)),
        Rule(LAYER + "mixer.out_proj.*", _THEIRS + "attn.c_proj.*"),
    ],
    dropped=r"\.attn\.(bias|masked_bias)$",
)


def remap_state_dict_hf_bigcode(state_dict, config):
    """Our names and layouts for transformers' GPTBigCodeForCausalLM; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_bigcode(state_dict, config):
    """The inverse of `remap_state_dict_hf_bigcode`.

    Raises:
        ValueError: key or value heads have become different from each other.
    """
    return _REMAP.inverse(state_dict, config)


def bigcode_config_to_gpt2_config(bigcode_config):
    """The GPT2Config of a GPTBigCodeConfig with multi-query attention."""
    assert bigcode_config.multi_query, "only GPTBigCode models with multi_query=True are supported"
    refuse(bigcode_config, scale_attn_weights=False)
    return gpt2_config(
        bigcode_config,
        n_positions=bigcode_config.n_positions,
        n_inner=bigcode_config.n_inner,
        activation_function=bigcode_config.activation_function,
        resid_pdrop=bigcode_config.resid_pdrop,
        embd_pdrop=bigcode_config.embd_pdrop,
        attn_pdrop=bigcode_config.attn_pdrop,
        layer_norm_epsilon=bigcode_config.layer_norm_epsilon,
        multi_query=True,
        tie_word_embeddings=bigcode_config.tie_word_embeddings,
    )
