"""GPT and the families that a GPT2Config with further attributes expresses, serial and tensor-parallel."""

import logging
import math
from collections import OrderedDict, namedtuple
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from flash_attn.models._config import is_config
from flash_attn.models._gpt2_remap import (
    inv_remap_state_dict_hf_gpt2,
    inv_remap_state_dict_megatron,
    remap_state_dict_hf_gpt2,
    remap_state_dict_megatron,
)
from flash_attn.models._tensor_parallel import GATED_ACTIVATIONS, combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.models.bigcode import remap_state_dict_hf_bigcode
from flash_attn.models.falcon import remap_state_dict_hf_falcon
from flash_attn.models.gpt_neox import remap_state_dict_hf_gpt_neox
from flash_attn.models.gptj import remap_state_dict_hf_gptj
from flash_attn.models.llama import remap_state_dict_hf_llama
from flash_attn.models.opt import remap_state_dict_hf_opt
from flash_attn.modules.block import Block, ParallelBlock, add_norm, add_parallel_norm
from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelFusedMLP, ParallelGatedMlp, ParallelMLP
from flash_attn.ops.fused_dense import ColumnParallelLinear, fused_dense_func
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from flash_attn.utils.distributed import all_gather_raw, sync_shared_params
from flash_attn.utils.generation import GenerationMixin
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = [
    "CausalLMOutput",
    "GPTLMHeadModel",
    "GPTModel",
    "GPTPreTrainedModel",
    "combine_state_dicts_tp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict_hf_gpt2",
    "inv_remap_state_dict_megatron",
    "remap_state_dict_hf_gpt2",
    "remap_state_dict_megatron",
    "shard_state_dict_tp",
]

logger = logging.getLogger(__name__)
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
_GATES = {"glu": F.sigmoid, "swiglu": F.silu, "geglu": F.gelu}
_ACTIVATIONS = {
    "gelu": F.gelu,
    **dict.fromkeys(_TANH_GELU, partial(F.gelu, approximate="tanh")),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x).square(),
}
_REMAPS = {
    "gpt2": remap_state_dict_hf_gpt2,
    "facebook/opt": remap_state_dict_hf_opt,
    "EleutherAI/gpt-j-": remap_state_dict_hf_gptj,
    "togethercomputer/GPT-JT-": remap_state_dict_hf_gptj,
    "EleutherAI/gpt-neox-": remap_state_dict_hf_gpt_neox,
    "EleutherAI/pythia-": remap_state_dict_hf_gpt_neox,
    "togethercomputer/RedPajama-INCITE-": remap_state_dict_hf_gpt_neox,
    "tiiuae/falcon-": remap_state_dict_hf_falcon,
    "meta-llama/Llama-": remap_state_dict_hf_llama,
    "bigcode/": remap_state_dict_hf_bigcode,
    "WizardLM/": remap_state_dict_hf_bigcode,
}


def _softmax_scale(config, layer_idx, head_dim):
    scale = 1.0
    if config.scale_attn_weights:
        scale = head_dim ** (-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else -0.5)
    scale *= getattr(config, "mup_attn_multiplier", 1.0)
    if config.scale_attn_by_inverse_layer_idx:
        assert layer_idx is not None, "scale_attn_by_inverse_layer_idx needs layer_idx"
        scale /= layer_idx + 1
    return scale


def create_mixer_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """A callable dim -> MHA, or ParallelMHA with a process group, as the config says."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    has_dwconv = getattr(config, "attn_dwconv", False)
    kwargs = {"fused_bias_fc": getattr(config, "fused_bias_fc", False), "dwconv": has_dwconv}
    if process_group is not None:
        assert not has_dwconv, "attn_dwconv is not supported with tensor parallelism"
        sequence_parallel = getattr(config, "sequence_parallel", True)
        kwargs = {"process_group": process_group, "sequence_parallel": sequence_parallel}
    return partial(
        MHA if process_group is None else ParallelMHA,
        num_heads=config.num_attention_heads,
        num_heads_kv=getattr(config, "n_head_kv", None),
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=_softmax_scale(config, layer_idx, head_dim),
        causal=True,
        layer_idx=layer_idx,
        # A fraction like 2/3 may miss the whole number it stands for by a rounding error.
        rotary_emb_dim=int(getattr(config, "rotary_emb_fraction", 0.0) * head_dim + 1e-6),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=getattr(config, "window_size", (-1, -1)),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        device=device,
        dtype=dtype,
        **kwargs,
    )


def _fused_mlp_cls(config, layer_idx, process_group, kwargs):
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(level, Sequence):
        assert layer_idx is not None, "a list for mlp_checkpoint_lvl needs layer_idx"
        level = level[layer_idx]
    if getattr(config, "fused_dense_sqrelu_dense", False):
        assert config.activation_function == "sqrelu", "fused_dense_sqrelu_dense needs activation_function='sqrelu'"
        assert process_group is None, "fused_dense_sqrelu_dense is not supported with tensor parallelism"
        return partial(FusedDenseSqreluDense, checkpoint_lvl=level, **kwargs)
    activations = dict.fromkeys(_TANH_GELU, "gelu_approx") | {"relu": "relu", "sqrelu": "sqrelu"}
    name = config.activation_function
    assert name in activations, f"fused_mlp supports {', '.join(activations)}, not {name!r}"
    mlp_cls = FusedMLP if process_group is None else ParallelFusedMLP
    return partial(mlp_cls, activation=activations[name], checkpoint_lvl=level, **kwargs)


def create_mlp_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """A callable dim -> MLP as the config says."""
    fused, sqrelu = getattr(config, "fused_mlp", False), getattr(config, "fused_dense_sqrelu_dense", False)
    assert not (fused and sqrelu), "fused_mlp and fused_dense_sqrelu_dense exclude each other"
    kwargs = {
        "hidden_features": config.n_inner,
        "bias1": getattr(config, "mlp_fc1_bias", True),
        "bias2": getattr(config, "mlp_fc2_bias", True),
        "device": device,
        "dtype": dtype,
    }
    is_parallel = process_group is not None
    if is_parallel:
        kwargs |= {"process_group": process_group, "sequence_parallel": getattr(config, "sequence_parallel", True)}
    if fused or sqrelu:
        return _fused_mlp_cls(config, layer_idx, process_group, kwargs)
    name = config.activation_function
    if name in GATED_ACTIVATIONS:
        multiple_of = getattr(config, "mlp_multiple_of", 128)
        mlp_cls = ParallelGatedMlp if is_parallel else GatedMlp
        return partial(mlp_cls, activation=_GATES[name], multiple_of=multiple_of, **kwargs)
    assert name in _ACTIVATIONS, (
        f"activation_function must be one of {', '.join((*_ACTIVATIONS, *_GATES))}, not {name!r}"
    )
    return partial(ParallelMLP if is_parallel else Mlp, activation=_ACTIVATIONS[name], **kwargs)


def _norm_cls(config, device=None, dtype=None):
    norm_cls = RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm
    return partial(norm_cls, eps=config.layer_norm_epsilon, device=device, dtype=dtype)


def create_block(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """One Block or ParallelBlock as the config says."""
    factory = {"device": device, "dtype": dtype}
    prenorm = getattr(config, "prenorm", True)
    is_parallel_block = getattr(config, "parallel_block", False)
    assert prenorm or not is_parallel_block, "parallel_block needs prenorm=True"
    # A prenorm block begins with the dropout of what is in front of it: in the first one, of the embeddings.
    resid_dropout1 = config.embd_pdrop if prenorm and layer_idx == 0 else config.resid_pdrop
    common = {
        "mixer_cls": create_mixer_cls(config, layer_idx, process_group=process_group, **factory),
        "mlp_cls": create_mlp_cls(config, layer_idx, process_group=process_group, **factory),
        "norm_cls": _norm_cls(config, **factory),
        "resid_dropout1": resid_dropout1,
        "resid_dropout2": config.resid_pdrop,
        "fused_dropout_add_ln": getattr(config, "fused_dropout_add_ln", False),
        "residual_in_fp32": getattr(config, "residual_in_fp32", False),
        "sequence_parallel": process_group is not None and getattr(config, "sequence_parallel", True),
        "mark_shared_params": process_group is not None,
    }
    if is_parallel_block:
        tied_norm = getattr(config, "parallel_block_tied_norm", False)
        block = ParallelBlock(config.hidden_size, tied_norm=tied_norm, **common)
    else:
        block = Block(config.hidden_size, prenorm=prenorm, **common)
    block.layer_idx = layer_idx
    return block


def _init_weights(module, n_layer, initializer_range=0.02, mup_width_scale=1.0, rescale_prenorm_residual=True):
    """GPT-2's initialisation: normal weights, zero biases, projections into the residual scaled by 1/sqrt(2 layers)."""
    std = initializer_range * math.sqrt(mup_width_scale)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        module.weight._optim = getattr(module.weight, "_optim", {}) | {"lr_multiplier": mup_width_scale}
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, p in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * n_layer))


def _initializer(config):
    return partial(
        _init_weights,
        n_layer=config.num_hidden_layers,
        initializer_range=config.initializer_range,
        mup_width_scale=getattr(config, "mup_width_scale", 1.0),
    )


def _padded_vocab_size(config):
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return math.ceil(config.vocab_size / multiple) * multiple


class GPTPreTrainedModel(nn.Module):
    """Holds the config and loads published weights.

    Raises:
        ValueError: the config is not a GPT2Config.
    """

    def __init__(self, config, *inputs, **kwargs):
        super().__init__()
        if not is_config(config, "GPT2Config"):
            raise ValueError(
                f"{type(self).__name__} takes a GPT2Config, not {type(config).__name__}; "
                "flash_attn.models translates the configs of other families"
            )
        self.config = config

    @classmethod
    def from_pretrained(
        cls, model_name, config, *args, strict=True, device=None, dtype=None, world_size=1, rank=0, **kwargs
    ):
        """A model with the weights of a checkpoint.

        Args:
            model_name: tells the family by its beginning, such as "facebook/opt"; see `state_dict_from_pretrained`.
            world_size, rank: take this rank's part of the weights.

        Raises:
            NotImplementedError: the name belongs to no family.
        """
        remap = next((f for prefix, f in _REMAPS.items() if model_name.startswith(prefix)), None)
        if remap is None:
            raise NotImplementedError(
                f"Model {model_name} not supported: names begin with {', '.join(_REMAPS)}; other weights can be "
                "loaded by load_state_dict behind a remap function of flash_attn.models"
            )
        model = cls(config, *args, device=device, dtype=dtype, **kwargs)
        state_dict = remap(state_dict_from_pretrained(model_name, device="cpu", dtype=dtype), config)
        if world_size > 1:
            state_dict = shard_state_dict_tp(state_dict, config, world_size, rank)
        logger.info(model.load_state_dict(state_dict, strict=strict))
        return model


class GPTModel(GPTPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config, process_group=None, device=None, dtype=None):
        super().__init__(config)
        factory = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = getattr(config, "sequence_parallel", True)
        self.embeddings_multiplier = getattr(config, "mup_embeddings_multiplier", 1.0)
        self.prenorm = getattr(config, "prenorm", True)
        self.parallel_block = getattr(config, "parallel_block", False)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        sizes = (config.hidden_size, _padded_vocab_size(config), config.max_position_embeddings)
        word_dim = getattr(config, "word_embed_proj_dim", None)
        if process_group is None:
            self.embeddings = GPT2Embeddings(*sizes, word_embed_proj_dim=word_dim, **factory)
        else:
            assert word_dim is None, "word_embed_proj_dim is not supported with tensor parallelism"
            self.embeddings = ParallelGPT2Embeddings(
                *sizes, process_group=process_group, sequence_parallel=self.sequence_parallel, **factory
            )
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(
            [create_block(config, layer_idx=i, process_group=process_group, **factory) for i in layers]
        )
        if getattr(config, "rotary_emb_fraction", 0.0) > 0.0:  # one table of angles for all layers
            for layer in self.layers[1:]:
                layer.mixer.rotary_emb = self.layers[0].mixer.rotary_emb
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f = _norm_cls(config, **factory)(config.hidden_size)
        else:
            self.embd_drop = nn.Dropout(config.embd_pdrop)
        if process_group is not None and self.prenorm:
            for p in self.ln_f.parameters():
                p._shared_params = True
                if self.sequence_parallel:
                    p._sequence_parallel = True
        self.apply(_initializer(config))
        self.tie_weights()

    def tie_weights(self):
        """Give parameters that ranks share the values of the first rank."""
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The caches of the layers, by layer."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, position_ids=None, inference_params=None):
        """input_ids (b, s) -> hidden states (b, s, e), or a sequence-parallel rank's share (b * s / world, e)."""
        is_combined = self.process_group is not None and self.sequence_parallel
        kwargs = {"combine_batch_seqlen_dim": True} if is_combined else {}
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, **kwargs)
        if self.embeddings_multiplier != 1.0:
            hidden_states = hidden_states * self.embeddings_multiplier
        mixer_kwargs = {"seqlen": input_ids.shape[1]} if is_combined else {}
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        fused, residual = self.fused_dropout_add_ln, None
        if not self.prenorm:
            hidden_states = self.embd_drop(hidden_states)
            for layer in self.layers:
                hidden_states = layer(hidden_states, mixer_kwargs=mixer_kwargs)
            return hidden_states
        if not self.parallel_block:
            for layer in self.layers:
                hidden_states, residual = layer(hidden_states, residual, mixer_kwargs=mixer_kwargs)
            return add_norm(self.ln_f, hidden_states, residual, self.drop_f, fused=fused, prenorm=False)
        branches = (hidden_states, None)
        for layer in self.layers:
            *branches, residual = layer(*branches, residual, mixer_kwargs=mixer_kwargs)
        return add_parallel_norm(
            self.ln_f, None, branches, residual, (self.drop_f, self.drop_f), fused=fused, prenorm=False
        )[0]


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """`GPTModel` with the head that gives logits."""

    def __init__(self, config, process_group=None, device=None, dtype=None):
        super().__init__(config)
        factory = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.transformer = GPTModel(config, process_group=process_group, **factory)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        self.norm_head = getattr(config, "norm_head", False)
        self.output_scale = getattr(config, "mup_output_multiplier", 1.0) * getattr(config, "mup_width_scale", 1.0)
        has_bias = getattr(config, "lm_head_bias", False)
        word_dim = getattr(config, "word_embed_proj_dim", None)
        embed_dim, vocab_size = word_dim or config.hidden_size, _padded_vocab_size(config)
        self.project_out = None
        if word_dim is not None:
            self.project_out = nn.Linear(config.hidden_size, word_dim, bias=False, **factory)
        if process_group is None:
            self.lm_head = nn.Linear(embed_dim, vocab_size, bias=has_bias, **factory)
        else:
            sequence_parallel = getattr(config, "sequence_parallel", True)
            self.lm_head = ColumnParallelLinear(
                embed_dim, vocab_size, process_group, bias=has_bias, sequence_parallel=sequence_parallel, **factory
            )
        for module in filter(None, (self.lm_head, self.project_out)):
            module.apply(_initializer(config))
        self.tie_weights()

    def tie_weights(self):
        """Make the head a view of the word embeddings if they are tied, and share what ranks share."""
        if self.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The caches of the layers, by layer."""
        return self.transformer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _logits(self, hidden_states):
        if not self.norm_head:
            return self.lm_head(hidden_states)
        return fused_dense_func(
            hidden_states,
            F.normalize(self.lm_head.weight),
            self.lm_head.bias,
            process_group=self.process_group,
            sequence_parallel=getattr(self.lm_head, "sequence_parallel", False),
        )

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        """Logits of every token.

        Args:
            input_ids, position_ids: (b, s).
            inference_params: an InferenceParams whose caches hold the tokens in front.
            num_last_tokens: when positive, logits of this many last tokens only.

        Returns:
            CausalLMOutput with logits (b, s, V); without inference_params, a tensor-parallel rank's share of V, of
            (b * s, V) when sequence-parallel.
        """
        assert input_ids.ndim == 2, f"input_ids must be (b, s), not {tuple(input_ids.shape)}"
        batch = input_ids.shape[0]
        hidden_states = self.transformer(input_ids, position_ids=position_ids, inference_params=inference_params)
        if inference_params is not None or num_last_tokens > 0:
            assert hidden_states.ndim == 3, "generation needs sequence_parallel=False in the config"
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        if self.output_scale != 1.0:
            hidden_states = hidden_states * self.output_scale
        logits = self._logits(hidden_states)
        if self.process_group is not None and inference_params is not None:  # sampling needs the whole vocabulary
            logits = rearrange(all_gather_raw(logits, self.process_group)[0], "(n b) ... d -> b ... (n d)", b=batch)
        return CausalLMOutput(logits=logits)

    def load_state_dict(self, state_dict, strict=True, **kwargs):
        """As nn.Module's; also accepts an older layout with `transformer.ln_0`, in which norms followed their sums."""
        if "transformer.ln_0.weight" in state_dict:
            state_dict = _shifted_norms(state_dict, len(self.transformer.layers))
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


def _shifted_norms(state_dict, n_layer):
    """The norm behind each sum becomes the norm in front of what follows it."""
    names = ["transformer.ln_0"]
    names += [f"transformer.layers.{i}.norm{n}" for i in range(n_layer) for n in (1, 2)]
    shifted = dict(zip(names, [*names[1:], "transformer.ln_f"], strict=True))
    renamed = OrderedDict()
    for name, x in state_dict.items():
        prefix, _, kind = name.rpartition(".")
        renamed[f"{shifted.get(prefix, prefix)}.{kind}"] = x
    return renamed
