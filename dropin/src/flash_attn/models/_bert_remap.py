"""State dicts of BERT in transformers."""

import torch

from flash_attn.models._remap import Remap, Rule, stacked, vocabulary

_OURS = "bert.encoder.layers.{i}."
_THEIRS = "bert.encoder.layer.{i}."
_WQKV = _OURS + "mixer.Wqkv.*"
_HEAD_BIAS = "cls.predictions.decoder.bias"
# A padded token must never win, and its row of the decoder is zero.
_NEVER = -100.0
_REMAP = Remap(
    [
        Rule("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight", vocabulary()),
        Rule("bert.emb_ln.*", "bert.embeddings.LayerNorm.*"),
        Rule(_WQKV, [_THEIRS + f"attention.self.{x}.*" for x in ("query", "key", "value")], stacked(3)),
        Rule(_OURS + "mixer.out_proj.*", _THEIRS + "attention.output.dense.*"),
        Rule(_OURS + "norm1.*", _THEIRS + "attention.output.LayerNorm.*"),
        Rule(_OURS + "mlp.fc1.*", _THEIRS + "intermediate.dense.*"),
        Rule(_OURS + "mlp.fc2.*", _THEIRS + "output.dense.*"),
        Rule(_OURS + "norm2.*", _THEIRS + "output.LayerNorm.*"),
        Rule("cls.predictions.transform.layer_norm.*", "cls.predictions.transform.LayerNorm.*"),
        Rule("cls.predictions.decoder.weight", "cls.predictions.decoder.weight", vocabulary()),
        Rule(_HEAD_BIAS, "cls.predictions.bias", vocabulary(_NEVER)),
    ],
    dropped=r"embeddings\.position_ids$",
    renamed=(
        (r"\.gamma$", ".weight"),
        (r"\.beta$", ".bias"),
        (r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
    ),
)


def _last_layer(config) -> str | None:
    """The prefix of the layer that is cross-attention, if there is one."""
    if not getattr(config, "last_layer_subset", False):
        return None
    return f"bert.encoder.layers.{config.num_hidden_layers - 1}.mixer."


def remap_state_dict(state_dict, config):
    """Our names and layouts for transformers' BertForPreTraining."""
    ours = _REMAP(state_dict, config)
    prefix = _last_layer(config)
    for kind in ("weight", "bias") if prefix else ():
        if prefix + "Wqkv." + kind in ours:
            x = ours.pop(prefix + "Wqkv." + kind)
            ours[prefix + "Wq." + kind], ours[prefix + "Wkv." + kind] = x.split((x.shape[0] // 3, 2 * x.shape[0] // 3))
    return ours


def inv_remap_state_dict(state_dict, config):
    """The inverse of `remap_state_dict`; `config.orig_vocab_size` tells the vocabulary without padding."""
    state_dict = dict(state_dict)
    prefix = _last_layer(config)
    for kind in ("weight", "bias") if prefix else ():
        if prefix + "Wq." + kind in state_dict:
            parts = (state_dict.pop(prefix + name + kind) for name in ("Wq.", "Wkv."))
            state_dict[prefix + "Wqkv." + kind] = torch.cat(tuple(parts))
    theirs = _REMAP.inverse(state_dict, config)
    if "cls.predictions.bias" in theirs:  # one parameter under two names
        theirs[_HEAD_BIAS] = theirs["cls.predictions.bias"]
    return theirs
