"""Llama and Code Llama as a GPTModel, from Meta's checkpoints and from transformers'."""

import json
from pathlib import Path

import torch

from flash_attn.models._config import gpt2_config, no_bias, rotary_base
from flash_attn.models._remap import HEAD, LAYER, WORDS, Layout, Remap, Rule, heads, qkv_rows, stacked, vocabulary


def _interleaved(x, dim):
    """Rows of each head from the order (half, pair) to (pair, half): ours turns neighbours, theirs the halves."""
    return x.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


def _halved(x, dim):
    """The inverse of `_interleaved`."""
    return x.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _join_qkv(tensors, config):
    q, k, v = tensors
    dim = heads(config)[2]
    return torch.cat((_interleaved(q, dim), _interleaved(k, dim), v))


def _split_qkv(x, config):
    q, k, v = x.split(qkv_rows(config))
    dim = heads(config)[2]
    return [_halved(q, dim), _halved(k, dim), v]


_HF = "model.layers.{i}."
_HF_REMAP = Remap(
    [
        Rule(WORDS, "model.embed_tokens.weight", vocabulary()),
        Rule(HEAD, "lm_head.weight", vocabulary()),
        Rule("transformer.ln_f.weight", "model.norm.weight"),
        Rule(LAYER + "norm1.weight", _HF + "input_layernorm.weight"),
        Rule(LAYER + "norm2.weight", _HF + "post_attention_layernorm.weight"),
        Rule(LAYER + "mlp.fc1.*", (_HF + "mlp.up_proj.*", _HF + "mlp.gate_proj.*"), stacked(2)),
        Rule(LAYER + "mlp.fc2.*", _HF + "mlp.down_proj.*"),
        Rule(
            LAYER + "mixer.Wqkv.*",
            [_HF + f"self_attn.{x}_proj.*" for x in "qkv"],
            Layout(_join_qkv, _split_qkv),
        ),
        Rule(LAYER + "mixer.out_proj.*", _HF + "self_attn.o_proj.*"),
    ],
    dropped=r"rotary_emb\.inv_freq$",
)
_META = "layers.{i}."
_META_REMAP = Remap(
    [
        Rule(WORDS, "tok_embeddings.weight", vocabulary()),
        Rule(HEAD, "output.weight", vocabulary()),
        Rule("transformer.ln_f.weight", "norm.weight"),
        Rule(LAYER + "norm1.weight", _META + "attention_norm.weight"),
        Rule(LAYER + "norm2.weight", _META + "ffn_norm.weight"),
        Rule(
            LAYER + "mlp.fc1.weight",
            (_META + "feed_forward.w3.weight", _META + "feed_forward.w1.weight"),
            stacked(2),
        ),
        Rule(LAYER + "mlp.fc2.weight", _META + "feed_forward.w2.weight"),
        Rule(LAYER + "mixer.Wqkv.weight", [_META + f"attention.w{x}.weight" for x in "qkv"], stacked(qkv_rows)),
        Rule(LAYER + "mixer.out_proj.weight", _META + "attention.wo.weight"),
    ],
    dropped=r"rope\.freqs$",
)


def remap_state_dict_meta_llama(state_dict, config):
    """Our names and layouts for Meta's checkpoint, or for one of its shards; config is the GPT2Config."""
    return _META_REMAP(state_dict, config)


def inv_remap_state_dict_meta_llama(state_dict, config):
    """The inverse of `remap_state_dict_meta_llama` for a whole state dict."""
    return _META_REMAP.inverse(state_dict, config)


def remap_state_dict_hf_llama(state_dict, config):
    """Our names and layouts for transformers' LlamaForCausalLM; config is the GPT2Config."""
    return _HF_REMAP(state_dict, config)


def inv_remap_state_dict_hf_llama(state_dict, config):
    """The inverse of `remap_state_dict_hf_llama`."""
    return _HF_REMAP.inverse(state_dict, config)


def _vocab_size(folder: Path, params: dict) -> int:
    tokenizer = folder / "tokenizer.model"
    if tokenizer.is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(str(tokenizer)).vocab_size()
    return params.get("vocab_size", -1) if params.get("vocab_size", -1) > 0 else 32000


def config_from_meta_checkpoint(checkpoint_path, model_name):
    """The LlamaConfig of Meta's `params.json` in checkpoint_path/model_name."""
    from transformers import LlamaConfig

    folder = Path(checkpoint_path) / model_name
    params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    # Meta gives the hidden size of the MLP as a rule: two thirds of 4 * dim, times a factor, rounded up.
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params.get("multiple_of", 1)
    config = LlamaConfig(
        hidden_size=params["dim"],
        intermediate_size=multiple * ((hidden + multiple - 1) // multiple),
        num_attention_heads=params["n_heads"],
        num_hidden_layers=params["n_layers"],
        num_key_value_heads=params.get("n_kv_heads"),
        rms_norm_eps=params["norm_eps"],
        vocab_size=_vocab_size(folder, params),
    )
    if "rope_theta" in params:
        config.rotary_emb_base = params["rope_theta"]
    return config


def config_from_hf_checkpoint(checkpoint_path, model_name):
    """The LlamaConfig in checkpoint_path/model_name-hf."""
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(Path(checkpoint_path) / f"{model_name}-hf" / "config.json")


def config_from_checkpoint(checkpoint_path, model_name, checkpoint_format="meta"):
    """The LlamaConfig of a checkpoint in the format "meta" or "hf"."""
    readers = {"meta": config_from_meta_checkpoint, "hf": config_from_hf_checkpoint}
    if checkpoint_format not in readers:
        raise ValueError(f"checkpoint_format must be 'meta' or 'hf', not {checkpoint_format!r}")
    return readers[checkpoint_format](checkpoint_path, model_name)


def state_dicts_from_checkpoint(checkpoint_path, model_name):
    """Meta's shards, in order; `remap_state_dict_meta_llama` each and combine them by `combine_state_dicts_tp`."""
    shards = sorted((Path(checkpoint_path) / model_name).glob("consolidated.*.pth"))
    return [torch.load(path, map_location="cpu", weights_only=True) for path in shards]


def llama_config_to_gpt2_config(llama_config):
    """The GPT2Config of a LlamaConfig.

    Raises:
        NotImplementedError: scaled rotary frequencies, or a head dim that is not hidden size / heads.
    """
    width, count = llama_config.hidden_size, llama_config.num_attention_heads
    head_dim = getattr(llama_config, "head_dim", None)
    if head_dim is not None and head_dim * count != width:
        raise NotImplementedError(f"head_dim ({head_dim}) must be hidden_size / heads ({width} / {count})")
    attention_bias = getattr(llama_config, "attention_bias", False)
    mlp_bias = getattr(llama_config, "mlp_bias", False)
    return gpt2_config(
        llama_config,
        n_inner=llama_config.intermediate_size,
        activation_function="swiglu",
        layer_norm_epsilon=llama_config.rms_norm_eps,
        rms_norm=True,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=True,
        rotary_emb_base=rotary_base(llama_config, "rotary_emb_base"),
        n_head_kv=llama_config.num_key_value_heads,
        tie_word_embeddings=llama_config.tie_word_embeddings,
        mlp_multiple_of=1,  # the hidden size is meant exactly
        **no_bias()
        | {
            "qkv_proj_bias": attention_bias,
            "out_proj_bias": attention_bias,
            "mlp_fc1_bias": mlp_bias,
            "mlp_fc2_bias": mlp_bias,
        },
    )
