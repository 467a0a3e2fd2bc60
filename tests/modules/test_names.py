"""Names, parameters, defaults and orders of flash_attn.modules, models and utils, as callers know them."""

import importlib
import inspect

import pytest

FACTORY = "device=None, dtype=None"
ROTARY = (
    "rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, "
    "use_alibi=False, window_size=(-1, -1)"
)
MLP = "in_features, hidden_features=None, out_features=None, activation=gelu"
SAMPLING = "top_k=1, top_p=0.0, temperature=1.0"
RESIDUAL = "resid_dropout1=0.0, resid_dropout2=0.0"
MARKS = "sequence_parallel=False, mark_shared_params=False"
AMP = "amp=False, amp_dtype=torch.float16"
TIMED = f"repeats=10, desc='', verbose=True, {AMP}, **kwinputs"
CREATE = f"config, layer_idx=None, process_group=None, {FACTORY}"
REMAP = "state_dict, config"
CLASSES = {
    "modules.mha": {
        "FlashSelfAttention": "causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), "
        "alibi_slopes=None, deterministic=False",
        "FlashCrossAttention": "causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, "
        "window_size=(-1, -1), deterministic=False",
        "SelfAttention": "causal=False, softmax_scale=None, attention_dropout=0.0",
        "CrossAttention": "causal=False, softmax_scale=None, attention_dropout=0.0",
        "MHA": "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, "
        f"dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, {ROTARY}, fused_bias_fc=False, "
        f"use_flash_attn=False, return_residual=False, checkpointing=False, {FACTORY}",
        "ParallelMHA": "embed_dim, num_heads, process_group, num_heads_kv=None, qkv_proj_bias=True, "
        f"out_proj_bias=True, dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, {ROTARY}, "
        f"use_flash_attn=False, checkpointing=False, sequence_parallel=True, {FACTORY}",
        "LinearResidual": f"in_features, out_features, bias=True, {FACTORY}",
    },
    "modules.mlp": {
        "Mlp": f"{MLP}, bias1=True, bias2=True, return_residual=False, {FACTORY}",
        "ParallelMLP": f"{MLP}, process_group=None, sequence_parallel=True, bias1=True, bias2=True, {FACTORY}",
        "GatedMlp": f"{MLP.replace('gelu', 'sigmoid')}, bias1=True, bias2=True, multiple_of=128, "
        f"return_residual=False, {FACTORY}",
        "ParallelGatedMlp": "in_features, process_group, hidden_features=None, out_features=None, activation=sigmoid, "
        f"bias1=True, bias2=True, multiple_of=128, sequence_parallel=True, {FACTORY}",
    },
    "modules.block": {
        "Block": "dim, mixer_cls=None, mlp_cls=None, norm_cls=LayerNorm, dropout_cls=Dropout, prenorm=True, "
        f"{RESIDUAL}, drop_path1=0.0, drop_path2=0.0, fused_dropout_add_ln=False, return_residual=False, "
        f"residual_in_fp32=False, {MARKS}",
        "ParallelBlock": f"dim, mixer_cls=None, mlp_cls=None, norm_cls=LayerNorm, dropout_cls=Dropout, {RESIDUAL}, "
        f"tied_norm=False, fused_dropout_add_ln=False, residual_in_fp32=False, {MARKS}",
    },
    "modules.embedding": {
        "GPT2Embeddings": "embed_dim, vocab_size, max_position_embeddings, padding_idx=None, "
        f"word_embed_proj_dim=None, {FACTORY}",
        "BertEmbeddings": "embed_dim, vocab_size, max_position_embeddings, type_vocab_size, padding_idx=None, "
        f"{FACTORY}",
        "VocabParallelEmbedding": "num_embeddings, *args, process_group=None, padding_idx=None, **kwargs",
        "ColumnParallelEmbedding": "num_embeddings, embedding_dim, *args, process_group=None, **kwargs",
        "ParallelGPT2Embeddings": "embed_dim, vocab_size, max_position_embeddings, process_group, padding_idx=None, "
        f"sequence_parallel=True, {FACTORY}",
    },
    "models.gpt": {
        "GPTModel": f"config, process_group=None, {FACTORY}",
        "GPTLMHeadModel": f"config, process_group=None, {FACTORY}",
        "GPTPreTrainedModel": "config, *inputs, **kwargs",
    },
    "models.bert": {
        "BertModel": "config, add_pooling_layer=True",
        **dict.fromkeys(
            (
                "BertEncoder", "BertPooler", "BertPredictionHeadTransform", "BertLMPredictionHead",
                "BertPreTrainingHeads", "BertForPreTraining",
            ),
            "config",
        ),
        "BertPreTrainedModel": "config, *inputs, **kwargs",
    },
    "models.vit": {
        "VisionTransformer": "img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='token', "
        "embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, qkv_bias=True, init_values=None, class_token=True, "
        "no_embed_class=False, pre_norm=False, fc_norm=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0, "
        "weight_init='', embed_layer=PatchEmbed, norm_layer=None, act_layer=None, use_flash_attn=False, "
        "fused_bias_fc=False, fused_mlp=False, fused_dropout_add_ln=False",
    },
    "utils.generation": {
        "InferenceParams": "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, "
        "key_value_memory_dict=<factory>, lengths_per_sample=None",
        "DecodingCGCache": "max_batch_size=0, max_seqlen=0, device=None, dtype=None, callables=<factory>, "
        "mempool=None, inference_params=None, run=None",
    },
}  # fmt: skip
FUNCTIONS = {
    "modules.mha": {
        "FlashSelfAttention.forward": "qkv, causal=None, cu_seqlens=None, max_seqlen=None",
        "FlashCrossAttention.forward": "q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, "
        "max_seqlen_k=None",
        "SelfAttention.forward": "qkv, causal=None, key_padding_mask=None",
        "CrossAttention.forward": "q, kv, causal=None, key_padding_mask=None",
        "MHA.forward": "x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None, "
        "inference_params=None, **kwargs",
        "MHA.allocate_inference_cache": "batch_size, max_seqlen, dtype=None",
        "ParallelMHA.forward": "x, seqlen=None, inference_params=None, **kwargs",
        "_update_kv_cache": "kv, inference_params, layer_idx",
        "get_alibi_slopes": "nheads",
    },
    "modules.block": {
        "Block.forward": "hidden_states, residual=None, mixer_subset=None, mixer_kwargs=None",
        "ParallelBlock.forward": "hidden_states1, hidden_states2=None, residual=None, mixer_kwargs=None",
    },
    "modules.embedding": {
        "GPT2Embeddings.forward": "input_ids, position_ids=None",
        "BertEmbeddings.forward": "input_ids, position_ids=None, token_type_ids=None",
        "ParallelGPT2Embeddings.forward": "input_ids, position_ids=None, combine_batch_seqlen_dim=False",
    },
    "models.gpt": {
        **dict.fromkeys(("create_mixer_cls", "create_mlp_cls", "create_block"), CREATE),
        "GPTModel.forward": "input_ids, position_ids=None, inference_params=None",
        "GPTLMHeadModel.forward": "input_ids, position_ids=None, inference_params=None, num_last_tokens=0",
        "GPTLMHeadModel.load_state_dict": "state_dict, strict=True, **kwargs",
        "GPTLMHeadModel.from_pretrained": "model_name, config, *args, strict=True, device=None, dtype=None, "
        "world_size=1, rank=0, **kwargs",
        "shard_state_dict_tp": "state_dict, config, world_size, rank",
        "combine_state_dicts_tp": "state_dicts, config",
        "remap_state_dict_hf_gpt2": REMAP,
        "remap_state_dict_megatron": REMAP,
        "_init_weights": "module, n_layer, initializer_range=0.02, mup_width_scale=1.0, rescale_prenorm_residual=True",
    },
    "models.gpt_neox": {"gpt_neox_config_to_gpt2_config": "gpt_neox_config", "remap_state_dict_hf_gpt_neox": REMAP},
    "models.gptj": {"gptj_config_to_gpt2_config": "gptj_config", "remap_state_dict_hf_gptj": REMAP},
    "models.opt": {"opt_config_to_gpt2_config": "opt_config", "remap_state_dict_hf_opt": REMAP},
    "models.falcon": {"falcon_config_to_gpt2_config": "falcon_config", "remap_state_dict_hf_falcon": REMAP},
    "models.llama": {
        "llama_config_to_gpt2_config": "llama_config",
        "config_from_checkpoint": "checkpoint_path, model_name, checkpoint_format='meta'",
        "config_from_meta_checkpoint": "checkpoint_path, model_name",
        "config_from_hf_checkpoint": "checkpoint_path, model_name",
        "state_dicts_from_checkpoint": "checkpoint_path, model_name",
        "remap_state_dict_meta_llama": REMAP,
        "remap_state_dict_hf_llama": REMAP,
        "inv_remap_state_dict_hf_llama": REMAP,
    },
    "models.baichuan": {"baichuan_config_to_gpt2_config": "baichuan_config", "remap_state_dict_hf_baichuan": REMAP},
    "models.btlm": {"btlm_config_to_gpt2_config": "btlm_config", "remap_state_dict_hf_btlm": REMAP},
    "models.bigcode": {
        "bigcode_config_to_gpt2_config": "bigcode_config",
        "remap_state_dict_hf_bigcode": REMAP,
        "inv_remap_state_dict_hf_bigcode": REMAP,
    },
    "models.bert": {
        "create_mixer_cls": "config, cross_attn=False, return_residual=False",
        "create_mlp_cls": "config, layer_idx=None, return_residual=False",
        "create_block": "config, layer_idx=None",
        "BertModel.forward": "input_ids, position_ids=None, token_type_ids=None, attention_mask=None, "
        "masked_tokens_mask=None",
        "BertForPreTraining.forward": "input_ids, position_ids=None, token_type_ids=None, attention_mask=None, "
        "labels=None, next_sentence_label=None",
        "BertForPreTraining.from_pretrained": "model_name, config, *inputs, **kwargs",
        "remap_state_dict": REMAP,
        "inv_remap_state_dict": REMAP,
    },
    "models.vit": {
        "vit_base_patch16_224": "pretrained=False, **kwargs",
        "init_weights_vit_timm": "module, name=''",
        "VisionTransformer.forward_features": "x, all_tokens=True",
        "VisionTransformer.forward_head": "x, pre_logits=False",
    },
    "utils.generation": {
        "modify_logits_for_top_k_filtering": "logits, top_k",
        "modify_logits_for_top_p_filtering": "logits, top_p",
        "sample": f"logits, {SAMPLING}",
        "decode": f"input_ids, model, max_length, {SAMPLING}, eos_token_id=None, teacher_outputs=None, "
        "vocab_size=None, tensor_parallel=1, cg=False, enable_timing=False",
        "sample_speculative": f"logits, logits_draft, tokens_draft, {SAMPLING}",
        "decode_speculative": "input_ids, model, model_draft, max_length, speculative_lookahead=3, "
        f"{SAMPLING}, eos_token_id=None, vocab_size=None, tensor_parallel=1, cg=False, enable_timing=False, "
        "debug=False",
        "GenerationMixin.generate": f"input_ids, max_length, {SAMPLING}, return_dict_in_generate=False, "
        "output_scores=False, **kwargs",
        "InferenceParams.reset": "max_seqlen, max_batch_size",
        "allocate_inference_cache": "max_batch_size, max_seqlen, nheads, headdim, layers, device, dtype=torch.float16",
        "update_graph_cache": "model, cache, batch_size, seqlen_og, max_seqlen, decoding_seqlens=(1,), "
        "tensor_parallel=1, dtype=None, n_warmups=2",
    },
    "utils.benchmark": {
        "benchmark_forward": f"fn, *inputs, {TIMED}",
        **dict.fromkeys(
            ("benchmark_backward", "benchmark_combined", "benchmark_fwd_bwd", "benchmark_all"),
            f"fn, *inputs, grad=None, {TIMED}",
        ),
        "pytorch_profiler": f"fn, *inputs, trace_filename=None, backward=False, {AMP}, cpu=False, verbose=True, "
        "**kwinputs",
        "benchmark_memory": "fn, *inputs, desc='', verbose=True, **kwinputs",
    },
    "utils.distributed": {
        **dict.fromkeys(
            ("all_gather_raw", "reduce_scatter_raw", "all_reduce_raw"), "input_, process_group, async_op=False"
        ),
        "sync_shared_params": "model, process_group",
        "allreduce_sequence_parallel_grad": "model, process_group",
        "get_dim_for_local_rank": "dim, world_size, local_rank, multiple_of=1",
    },
    "utils.library": {
        "triton_op": "name, fn=None, /, *, mutates_args, schema=None, allow_decomposition=True",
    },
    "utils.pretrained": {"state_dict_from_pretrained": "model_name, device=None, dtype=None"},
    "utils.testing": {
        "generate_random_padding_mask": "max_seqlen, batch_size, device, mode='random', zero_lengths=False",
        "generate_qkv": "q, k, v, query_padding_mask=None, key_padding_mask=None, qv=None, kvpacked=False, "
        "qkvpacked=False, query_unused_mask=None, key_unused_mask=None",
        "construct_local_mask": "seqlen_q, seqlen_k, window_size=(None, None), sink_token_length=0, "
        "query_padding_mask=None, key_padding_mask=None, key_leftpad=None, device=None",
        "attention_ref": "q, k, v, query_padding_mask=None, key_padding_mask=None, key_leftpad=None, attn_bias=None, "
        "dropout_p=0.0, dropout_mask=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(None, None), attention_chunk=0, sink_token_length=0, learnable_sink=None, softcap=0.0, "
        "upcast=True, reorder_ops=False, intermediate_dtype=None",
    },
}
OTHERS = {
    "modules.mlp": ("FusedMLP", "ParallelFusedMLP"),
    "models.bert": ("BertPreTrainedModel",),
    "models.vit": ("create_mixer_cls", "create_mlp_cls", "create_block"),
    "utils.distributed": (
        "AllGatherFunc", "AllReduceFunc", "ReduceScatterFunc", "all_gather", "all_reduce", "reduce_scatter",
    ),
    "utils.generation": ("capture_graph",),
    "utils.testing": ("construct_chunk_mask",),
    "utils.torch": ("custom_fwd", "custom_bwd"),
}  # fmt: skip


def shown(function) -> str:
    """The parameters as text, without self and annotations; defaults that are classes or functions by their name."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
    named = [
        p.replace(default=Name(p.default.__name__))
        if hasattr(p.default, "__name__") and p.default is not p.empty
        else p
        for p in parameters
    ]
    return str(signature.replace(parameters=named, return_annotation=signature.empty))[1:-1]


class Name(str):
    """A string that is shown without quotes."""

    __repr__ = str.__str__


def find(module: str, name: str):
    found = importlib.import_module(f"flash_attn.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def listed(table: dict) -> list[tuple[str, str, str]]:
    return [(module, name, text) for module, names in table.items() for name, text in names.items()]


@pytest.mark.parametrize(("module", "name", "text"), listed(CLASSES))
def test_constructor(module, name, text):
    assert shown(find(module, name).__init__) == text


@pytest.mark.parametrize(("module", "name", "text"), listed(FUNCTIONS))
def test_function(module, name, text):
    assert shown(find(module, name)) == text


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OTHERS.items() for name in names])
def test_name_exists(module, name):
    assert callable(find(module, name))
