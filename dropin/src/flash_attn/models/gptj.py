"""GPT-J and GPT-JT as a GPTModel."""

from flash_attn.models._config import gpt2_config
from flash_attn.models._remap import LAYER, WORDS, Remap, Rule, qkv_rows, stacked, vocabulary

_THEIRS = "transformer.h.{i}."
_REMAP = Remap(
    [
        Rule(WORDS, "transformer.wte.weight", vocabulary()),
        Rule("lm_head.*", "lm_head.*", vocabulary()),
        Rule("transformer.ln_f.*", "transformer.ln_f.*"),
        Rule(LAYER + "norm1.*", _THEIRS + "ln_1.*"),
        Rule(LAYER + "mlp.fc1.*", _THEIRS + "mlp.fc_in.*"),
        Rule(LAYER + "mlp.fc2.*", _THEIRS + "mlp.fc_out.*"),
        Rule(
            LAYER + "mixer.Wqkv.weight",
            [_THEIRS + f"attn.{x}_proj.weight" for x in "qkv"],
            stacked(qkv_rows),
        ),
        Rule(LAYER + "mixer.out_proj.weight", _THEIRS + "attn.out_proj.weight"),
    ],
    dropped=r"\.attn\.(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)$",
)


def remap_state_dict_hf_gptj(state_dict, config):
    """Our names and layouts for transformers' GPTJForCausalLM; config is the GPT2Config."""
    return _REMAP(state_dict, config)


def inv_remap_state_dict_hf_gptj(state_dict, config):
    """The inverse of `remap_state_dict_hf_gptj`."""
    return _REMAP.inverse(state_dict, config)


def gptj_config_to_gpt2_config(gptj_config):
    """The GPT2Config of a GPTJConfig."""
    head_dim = gptj_config.n_embd // gptj_config.n_head
    return gpt2_config(
        gptj_config,
        n_inner=gptj_config.n_inner,
        activation_function=gptj_config.activation_function,
        resid_pdrop=gptj_config.resid_pdrop,
        embd_pdrop=gptj_config.embd_pdrop,
        attn_pdrop=gptj_config.attn_pdrop,
        layer_norm_epsilon=gptj_config.layer_norm_epsilon,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=(gptj_config.rotary_dim or head_dim) / head_dim,
        rotary_emb_interleaved=True,
        tie_word_embeddings=False,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )
