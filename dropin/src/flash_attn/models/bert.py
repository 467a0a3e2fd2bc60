"""BERT with attention that leaves padding out."""

import logging
from collections import namedtuple
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from flash_attn.bert_padding import index_first_axis, index_first_axis_residual, pad_input, unpad_input
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models._bert_remap import inv_remap_state_dict, remap_state_dict
from flash_attn.models._config import is_config
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import BertEmbeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "BertEncoder",
    "BertForPreTraining",
    "BertLMPredictionHead",
    "BertModel",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict",
    "remap_state_dict",
]

logger = logging.getLogger(__name__)

_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@cache
def _output_class(name, *fields):
    """A class of transformers if it is installed, else a namedtuple of the same name."""
    try:
        from transformers import modeling_outputs
        from transformers.models.bert import modeling_bert
    except ImportError:
        return namedtuple(name, fields)
    return getattr(modeling_outputs, name, None) or getattr(modeling_bert, name)


def create_mixer_cls(config, cross_attn=False, return_residual=False):
    """A callable dim -> MHA as the config says."""
    rotary = {}
    if getattr(config, "position_embedding_type", "absolute") == "rotary":
        rotary = {
            "rotary_emb_dim": getattr(config, "rotary_emb_dim", config.hidden_size // config.num_attention_heads),
            "rotary_emb_base": getattr(config, "rotary_emb_base", 10000.0),
            "rotary_emb_scale_base": getattr(config, "rotary_emb_scale_base", None),
            "rotary_emb_interleaved": getattr(config, "rotary_emb_interleaved", False),
        }
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        causal=False,
        fused_bias_fc=getattr(config, "fused_bias_fc", False),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        return_residual=return_residual,
        **rotary,
    )


def _gelu(config):
    known = ("gelu", *_TANH_GELU)
    assert config.hidden_act in known, f"hidden_act must be one of {', '.join(known)}, not {config.hidden_act!r}"
    return partial(F.gelu, approximate="tanh" if config.hidden_act in _TANH_GELU else "none")


def create_mlp_cls(config, layer_idx=None, return_residual=False):
    """A callable dim -> MLP as the config says."""
    if not getattr(config, "fused_mlp", False):
        return partial(
            Mlp,
            hidden_features=config.intermediate_size,
            activation=_gelu(config),
            return_residual=return_residual,
        )
    assert config.hidden_act in _TANH_GELU, (
        f"fused_mlp needs hidden_act to be one of {', '.join(_TANH_GELU)}, not {config.hidden_act!r}"
    )
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if not isinstance(level, int):
        assert layer_idx is not None, "a list for mlp_checkpoint_lvl needs layer_idx"
        level = level[layer_idx]
    return partial(
        FusedMLP, hidden_features=config.intermediate_size, checkpoint_lvl=level, return_residual=return_residual
    )


def create_block(config, layer_idx=None):
    """One postnorm Block; with `last_layer_subset` the last one is cross-attention."""
    cross_attn = getattr(config, "last_layer_subset", False) and layer_idx == config.num_hidden_layers - 1
    # The cross-attention's residual is the asking tokens, but its mixer would return the tokens it looks at.
    return_residual = not cross_attn
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual=return_residual),
        create_mlp_cls(config, layer_idx, return_residual=return_residual),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        return_residual=return_residual,
    )


class BertEncoder(nn.Module):
    """The blocks; padding is removed in front of them and restored behind, unless attention is plain PyTorch."""

    def __init__(self, config):
        super().__init__()
        self.use_flash_attn = getattr(config, "use_flash_attn", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        self.layers = nn.ModuleList([create_block(config, layer_idx=i) for i in range(config.num_hidden_layers)])

    def forward(self, hidden_states, key_padding_mask=None, subset_mask=None):
        """hidden_states (b, s, e) -> (b, s, e), zero where there is padding.

        Args:
            key_padding_mask: bool (b, s), true for tokens.
            subset_mask: bool (b, s); the result is only these tokens (without padding), (n, e).
        """
        if key_padding_mask is not None and self.use_flash_attn:
            return self._unpadded(hidden_states, key_padding_mask, subset_mask)
        kwargs = None if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
        for layer in self.layers:
            hidden_states = layer(hidden_states, mixer_kwargs=kwargs)
        if subset_mask is None:
            return hidden_states
        return hidden_states[subset_mask if key_padding_mask is None else subset_mask & key_padding_mask]

    def _unpadded(self, hidden_states, key_padding_mask, subset_mask):
        batch, seqlen = hidden_states.shape[:2]
        hidden_states, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden_states, key_padding_mask)
        kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        is_subset = subset_mask is not None and self.last_layer_subset
        for layer in self.layers[:-1] if is_subset else self.layers:
            hidden_states = layer(hidden_states, mixer_kwargs=kwargs)
        if subset_mask is None:
            return pad_input(hidden_states, indices, batch, seqlen)
        index = torch.nonzero(subset_mask[key_padding_mask]).flatten()
        if not is_subset:
            return index_first_axis(hidden_states, index)
        lengths = (subset_mask & key_padding_mask).sum(dim=-1, dtype=torch.int32)
        asking, hidden_states = index_first_axis_residual(hidden_states, index)
        kwargs = {
            "x_kv": hidden_states,
            "cu_seqlens": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_seqlen": max_seqlen,  # an upper bound does
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_k": max_seqlen,
        }
        return self.layers[-1](asking, mixer_kwargs=kwargs)


def _linear_cls(config):
    return FusedDense if getattr(config, "fused_bias_fc", False) else nn.Linear


class BertPooler(nn.Module):
    """A dense layer with tanh on the first token."""

    def __init__(self, config):
        super().__init__()
        self.dense = _linear_cls(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states, pool=True):
        """(b, s, e) -> (b, e); without `pool` the input is the first tokens already."""
        return self.activation(self.dense(hidden_states[:, 0] if pool else hidden_states))


class BertPredictionHeadTransform(nn.Module):
    """Dense, activation and norm in front of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.dense = _linear_cls(config)(config.hidden_size, config.hidden_size)
        self.activation = _gelu(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states):
        """(..., e) -> (..., e)."""
        return _norm(self.layer_norm, self.activation(self.dense(hidden_states)), self.fused_dropout_add_ln)


def _norm(norm, x, fused):
    return layer_norm_fn(x, norm.weight, norm.bias, eps=norm.eps) if fused else norm(x)


def _padded_vocab_size(config):
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return -(-config.vocab_size // multiple) * multiple


class BertLMPredictionHead(nn.Module):
    """Logits of the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear_cls(config)(config.hidden_size, _padded_vocab_size(config), bias=True)

    def forward(self, hidden_states):
        """(..., e) -> (..., V)."""
        return self.decoder(self.transform(hidden_states))


class BertPreTrainingHeads(nn.Module):
    """Logits of the vocabulary, and of whether the second sentence follows the first."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output, pooled_output):
        """(..., e) and (b, e) -> (..., V) and (b, 2)."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


def _init_weights(module, initializer_range=0.02):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=initializer_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class BertPreTrainedModel(nn.Module):
    """Holds the config and loads published weights.

    Raises:
        ValueError: the config is not a BertConfig.
    """

    def __init__(self, config, *inputs, **kwargs):
        super().__init__()
        if not is_config(config, "BertConfig"):
            raise ValueError(f"{type(self).__name__} takes a BertConfig, not {type(config).__name__}")
        self.config = config

    @classmethod
    def from_pretrained(cls, model_name, config, *inputs, **kwargs):
        """A model with the weights of a checkpoint, as far as names agree; see `state_dict_from_pretrained`."""
        model = cls(config, *inputs, **kwargs)
        state_dict = remap_state_dict(state_dict_from_pretrained(model_name), config)
        if isinstance(model, BertModel):
            state_dict = {name.removeprefix("bert."): x for name, x in state_dict.items()}
        logger.info(model.load_state_dict(state_dict, strict=False))
        return model


class BertModel(BertPreTrainedModel):
    """Embeddings, encoder and pooler."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        assert getattr(config, "position_embedding_type", "absolute") in ("absolute", "rotary"), (
            f"position_embedding_type must be 'absolute' or 'rotary', not {config.position_embedding_type!r}"
        )
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            _padded_vocab_size(config),
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def forward(self, input_ids, position_ids=None, token_type_ids=None, attention_mask=None, masked_tokens_mask=None):
        """Hidden states of every token.

        Args:
            input_ids, position_ids, token_type_ids: (b, s).
            attention_mask: bool (b, s), true for tokens.
            masked_tokens_mask: bool (b, s); hidden states of these tokens only.

        Returns:
            An output with `last_hidden_state` (b, s, e), or with `masked_tokens_mask` (n, e), and `pooler_output`
            (b, e).
        """
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        hidden_states = self.emb_drop(_norm(self.emb_ln, hidden_states, self.fused_dropout_add_ln))
        subset_mask = None
        if masked_tokens_mask is not None:  # the pooler needs the first token of each sequence
            first = torch.zeros_like(masked_tokens_mask)
            first[:, 0] = True
            subset_mask = masked_tokens_mask | first
        output = self.encoder(hidden_states, key_padding_mask=attention_mask, subset_mask=subset_mask)
        pooled = None
        if masked_tokens_mask is None:
            if self.pooler is not None:
                pooled = self.pooler(output)
        else:
            present = subset_mask if attention_mask is None else subset_mask & attention_mask
            if self.pooler is not None:
                pooled = self.pooler(output[first[present]], pool=False)
            output = output[masked_tokens_mask[present]]
        output_cls = _output_class("BaseModelOutputWithPoolingAndCrossAttentions", "last_hidden_state", "pooler_output")
        return output_cls(last_hidden_state=output, pooler_output=pooled)


class BertForPreTraining(BertPreTrainedModel):
    """`BertModel` with the heads of both pre-training tasks and their loss."""

    def __init__(self, config):
        super().__init__(config)
        # Evaluate the vocabulary's head, and the last layer, at tokens with a label only.
        self.dense_seq_output = getattr(config, "dense_seq_output", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        assert self.dense_seq_output or not self.last_layer_subset, "last_layer_subset needs dense_seq_output"
        use_xentropy = getattr(config, "use_xentropy", False)
        loss_cls = partial(CrossEntropyLoss, inplace_backward=True) if use_xentropy else nn.CrossEntropyLoss
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss = loss_cls(ignore_index=0)
        self.nsp_loss = loss_cls(ignore_index=-1)
        self.cls.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self):
        """Make the decoder's weight that of the word embeddings."""
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self, input_ids, position_ids=None, token_type_ids=None, attention_mask=None, labels=None,
        next_sentence_label=None,
    ):  # fmt: skip
        """Logits of both tasks, and the sum of their losses when both have labels.

        Args:
            input_ids, position_ids, token_type_ids: (b, s).
            attention_mask: bool (b, s), true for tokens.
            labels: (b, s); 0 counts for nothing.
            next_sentence_label: (b,); -1 counts for nothing.

        Returns:
            An output with `loss`, `prediction_logits` (b, s, V), or with `dense_seq_output` and labels (n, V), and
            `seq_relationship_logits` (b, 2).
        """
        is_dense = self.dense_seq_output and labels is not None
        outputs = self.bert(
            input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            attention_mask=None if attention_mask is None else attention_mask.bool(),
            masked_tokens_mask=labels > 0 if is_dense and self.last_layer_subset else None,
        )
        sequence_output = outputs.last_hidden_state
        if is_dense:
            index = torch.nonzero(labels.flatten() > 0).flatten()
            if not self.last_layer_subset:
                sequence_output = index_first_axis(sequence_output.flatten(0, 1), index)
        prediction, relationship = self.cls(sequence_output, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            targets = labels.flatten()[index] if is_dense else labels.flatten()
            loss = self.mlm_loss(prediction.reshape(-1, prediction.shape[-1]), targets).float()
            loss = loss + self.nsp_loss(relationship.reshape(-1, 2), next_sentence_label.flatten()).float()
        fields = ("loss", "prediction_logits", "seq_relationship_logits")
        output_cls = _output_class("BertForPreTrainingOutput", *fields)
        return output_cls(loss=loss, prediction_logits=prediction, seq_relationship_logits=relationship)
