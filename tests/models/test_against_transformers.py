"""Every family against its model in transformers: names, logits and greedy generation, on tiny random weights.

Logits are those of float32 on a CPU and of bfloat16 on a GPU, of enough tokens that the largest error is no accident;
generated tokens are compared in float32, where none ties.
"""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from flash_attn.models import baichuan, bert, bigcode, falcon, gpt, gpt_neox, gptj, llama, opt, vit

from flash_attn_plus.testing import assert_close

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
GPT_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 48}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


# name: (family, options of its config)
FAMILIES = {
    "gpt2": ("GPT2", GPT_SIZES | NO_DROPOUT),
    # Their faster implementations forget this scale.
    "gpt2-inverse-layer-scale": (
        "GPT2",
        GPT_SIZES | NO_DROPOUT | {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"},
    ),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 96, "rotary_pct": 0.25}),
    "gpt_neox-sequential": ("GPTNeoX", SIZES | {"intermediate_size": 96, "use_parallel_residual": False}),
    "gpt_neox-rotary-base": ("GPTNeoX", SIZES | {"intermediate_size": 96, "rotary_pct": 1.0, "rotary_emb_base": 500}),
    "gptj": ("GPTJ", GPT_SIZES | NO_DROPOUT | {"rotary_dim": 8, "tie_word_embeddings": False}),
    "opt": ("OPT", SIZES | {"ffn_dim": 96, "max_position_embeddings": 48, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "opt-postnorm-projected": (
        "OPT",
        SIZES
        | {"ffn_dim": 96, "max_position_embeddings": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "falcon-multi-query": ("Falcon", SIZES | {"multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-grouped": ("Falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-grouped-one-norm": (
        "Falcon",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential-bias": (
        "Falcon",
        SIZES | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": False},
    ),
    "llama": ("Llama", SIZES | {"intermediate_size": 80}),
    "llama-grouped": ("Llama", SIZES | {"intermediate_size": 80, "num_key_value_heads": 2, "rope_theta": 1e6}),
    "llama-tied-bias": (
        "Llama",
        SIZES | {"intermediate_size": 80, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "bigcode": ("GPTBigCode", GPT_SIZES | NO_DROPOUT | {"multi_query": True}),
}
# family: (class in transformers, translation of its config, remap, its inverse)
FUNCTIONS = {
    "GPT2": ("GPT2LMHeadModel", lambda config: config, gpt.remap_state_dict_hf_gpt2, gpt.inv_remap_state_dict_hf_gpt2),
    "GPTNeoX": (
        "GPTNeoXForCausalLM",
        gpt_neox.gpt_neox_config_to_gpt2_config,
        gpt_neox.remap_state_dict_hf_gpt_neox,
        gpt_neox.inv_remap_state_dict_hf_gpt_neox,
    ),
    "GPTJ": (
        "GPTJForCausalLM",
        gptj.gptj_config_to_gpt2_config,
        gptj.remap_state_dict_hf_gptj,
        gptj.inv_remap_state_dict_hf_gptj,
    ),
    "OPT": (
        "OPTForCausalLM",
        opt.opt_config_to_gpt2_config,
        opt.remap_state_dict_hf_opt,
        opt.inv_remap_state_dict_hf_opt,
    ),
    "Falcon": (
        "FalconForCausalLM",
        falcon.falcon_config_to_gpt2_config,
        falcon.remap_state_dict_hf_falcon,
        falcon.inv_remap_state_dict_hf_falcon,
    ),
    "Llama": (
        "LlamaForCausalLM",
        llama.llama_config_to_gpt2_config,
        llama.remap_state_dict_hf_llama,
        llama.inv_remap_state_dict_hf_llama,
    ),
    "GPTBigCode": (
        "GPTBigCodeForCausalLM",
        bigcode.bigcode_config_to_gpt2_config,
        bigcode.remap_state_dict_hf_bigcode,
        bigcode.inv_remap_state_dict_hf_bigcode,
    ),
}


SMALL = 0.1  # steps that leave errors in bfloat16 about as small as they arose


def randomize(model, by: float = SMALL):
    """The model in evaluation mode with nothing at zero or one, where initialisation would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return model.eval()


class Pair:
    """One family's model in transformers and ours with the same random weights, in evaluation mode."""

    def __init__(self, name: str, by: float = SMALL, **options):
        family, fields = FAMILIES[name]
        model_class, translate, self.remap, self.inverse = FUNCTIONS[family]
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(**TOKENS | fields)
        self.theirs = randomize(getattr(transformers, model_class)(config), by)
        self.config = translate(config)
        for key, value in options.items():
            setattr(self.config, key, value)
        self.ours = gpt.GPTLMHeadModel(self.config).eval()
        self.state_dict = self.remap(self.theirs.state_dict(), self.config)
        self.ours.load_state_dict(self.state_dict)

    def to(self, *args) -> "Pair":
        self.theirs, self.ours = self.theirs.to(*args), self.ours.to(*args)
        return self


def working_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def assert_as_precise(name, ours, theirs, compute):
    """compute(model) of ours against theirs in float64, by the tolerance rule."""
    with torch.no_grad():
        eager = compute(theirs)
        torch.set_default_dtype(torch.float64)  # of the masks that some of theirs make
        try:
            reference = compute(copy.deepcopy(theirs).double()).double()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_close(name, compute(ours), reference, eager)


@pytest.mark.parametrize(
    "options", [{}, {"use_flash_attn": True, "fused_dropout_add_ln": True}], ids=["plain", "flash"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, options, device):
    pair = Pair(name, **options).to(device, working_dtype(device))
    ids = torch.randint(2, 97, (32, 21)).to(device)
    assert_as_precise("logits", pair.ours, pair.theirs, lambda model: model(ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_vocabulary_changes_no_logit(name, device):
    pair = Pair(name, pad_vocab_size_multiple=8).to(device, working_dtype(device))
    ids = torch.randint(2, 97, (32, 21)).to(device)
    with torch.no_grad():
        assert pair.ours(ids).logits.shape[-1] == 104
    assert_as_precise("logits", pair.ours, pair.theirs, lambda model: model(ids).logits[..., :97])


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_survives_the_way_there_and_back(name):
    pair = Pair(name, pad_vocab_size_multiple=8)
    back = pair.inverse(pair.state_dict, pair.config)
    theirs = pair.theirs.state_dict()
    if "embed_out.weight" in back and "lm_head.weight" in theirs:  # version 5 has renamed it
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert theirs.keys() == back.keys()
    for key, x in back.items():
        if "embed_positions" in key:  # rows without meaning
            x, theirs[key] = x[2:], theirs[key][2:]
        assert torch.equal(x, theirs[key]), key


@pytest.mark.parametrize("options", [{}, {"use_flash_attn": True}], ids=["plain", "flash"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation(name, options, device):
    pair = Pair(name, by=0.3, **options).to(device)  # else some repeat one token
    ids = torch.randint(2, 97, (2, 7)).to(device)
    expected = pair.theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=40, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert torch.equal(pair.ours.generate(ids, max_length=40), expected)
    assert len(set(expected[0, 7:].tolist())) > 2  # else hardly anything was tested


def test_output_classes_are_those_of_transformers():
    pair = Pair("gpt2")
    ids = torch.randint(2, 97, (1, 4))
    for top_k, name in ((1, "GreedySearchDecoderOnlyOutput"), (5, "SampleDecoderOnlyOutput")):
        output = pair.ours.generate(ids, 6, top_k=top_k, return_dict_in_generate=True, output_scores=True)
        classes = transformers.generation
        assert isinstance(output, getattr(classes, name, None) or classes.GenerateDecoderOnlyOutput)
        assert len(output.scores) == 2


def test_from_pretrained_reads_their_checkpoint(tmp_path, monkeypatch):
    pair = Pair("gpt2")
    monkeypatch.chdir(tmp_path)
    for safe in (True, False):
        pair.theirs.save_pretrained("gpt2-tiny", safe_serialization=safe, max_shard_size="100KB" if safe else "1GB")
        model = gpt.GPTLMHeadModel.from_pretrained("gpt2-tiny", pair.config)
        assert all(torch.equal(x, pair.state_dict[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"head_dim": 32}],
    ids=["scaled-rope", "head-dim"],
)
def test_llama_variant_without_an_equal_is_refused(fields):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=80, **fields)
    with pytest.raises(NotImplementedError, match=r"rope|head_dim"):
        llama.llama_config_to_gpt2_config(config)


def test_a_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match="LlamaConfig"):
        gpt.GPTLMHeadModel(transformers.LlamaConfig(**SIZES))


BERT = SIZES | {"intermediate_size": 96, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "pad_token_id": 0}
BERT |= {"attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_flash_attn": True, "fused_dropout_add_ln": True, "fused_bias_fc": True}],
    ids=["plain", "flash"],
)
@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_bert(options, has_padding, hidden_act, device):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, hidden_act=hidden_act)
    theirs = randomize(transformers.BertForPreTraining(config))
    for key, value in options.items():
        setattr(config, key, value)
    config.pad_vocab_size_multiple = 8
    ours = bert.BertForPreTraining(config).eval()
    state_dict = bert.remap_state_dict(theirs.state_dict(), config)
    ours.load_state_dict(state_dict)
    back = bert.inv_remap_state_dict(state_dict, config)
    theirs.load_state_dict(back)
    ours, theirs = (model.to(device, working_dtype(device)) for model in (ours, theirs))
    ids, types = torch.randint(1, 97, (3, 16)).to(device), torch.randint(0, 2, (3, 16)).to(device)
    lengths = torch.tensor([16, 9, 1] if has_padding else [16, 16, 16], device=device)
    mask = torch.arange(16, device=device) < lengths[:, None]

    def results(model):
        kwargs = {"token_type_ids": types, "attention_mask": mask if model is ours else mask.long()}
        return model.bert(ids, **kwargs), model(ids, **kwargs)

    def everything(model):
        hidden, heads = results(model)
        logits = heads.prediction_logits[mask][:, :97], heads.seq_relationship_logits
        return torch.cat([x.flatten() for x in (hidden.last_hidden_state[mask], hidden.pooler_output, *logits)])

    assert_as_precise("everything", ours, theirs, everything)
    hidden, logits = results(ours)
    assert type(hidden) is transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions
    assert type(logits) is transformers.models.bert.modeling_bert.BertForPreTrainingOutput


def test_baichuan_is_llama_with_another_pairing_of_features(device):
    torch.manual_seed(0)
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TOKENS, intermediate_size=80)))
    state_dict = dict(theirs.state_dict())
    for i in range(3):
        prefix = f"model.layers.{i}.self_attn."
        parts = [state_dict.pop(f"{prefix}{x}_proj.weight") for x in "qkv"]
        state_dict[prefix + "W_pack.weight"] = torch.cat(parts)
    fields = SIZES | TOKENS | {"intermediate_size": 80, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    config = baichuan.baichuan_config_to_gpt2_config(SimpleNamespace(**fields))
    ours = gpt.GPTLMHeadModel(config).eval()
    ours.load_state_dict(baichuan.remap_state_dict_hf_baichuan(state_dict, config))
    ours, theirs = (model.to(device, working_dtype(device)) for model in (ours, theirs))
    ids = torch.randint(2, 97, (32, 21)).to(device)
    assert_as_precise("logits", ours, theirs, lambda model: model(ids).logits)


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_against_mpt(heads, device):
    torch.manual_seed(0)
    sizes = {"d_model": 48, "n_heads": heads, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64}
    theirs = randomize(transformers.MptForCausalLM(transformers.MptConfig(**sizes)))
    config = transformers.GPT2Config(
        **{"n_embd": 48, "n_head": heads, "n_layer": 2, "vocab_size": 97, "n_inner": 192, "n_positions": 0},
        **NO_DROPOUT | dict.fromkeys(("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False),
        **{"activation_function": "gelu", "use_alibi": True, "use_flash_attn": True},
    )
    ours = gpt.GPTLMHeadModel(config).eval()
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.register_parameter("bias", None)
    names = {
        "wte.": "embeddings.word_embeddings.", "blocks.": "layers.", "norm_1.": "norm1.", "norm_2.": "norm2.",
        "norm_f.": "ln_f.", "attn.": "mixer.", "ffn.up_proj.": "mlp.fc1.", "ffn.down_proj.": "mlp.fc2.",
    }  # fmt: skip
    state_dict = {}
    for name, x in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state_dict[name] = x
    ours.load_state_dict(state_dict)
    ours, theirs = ours.to(device), theirs.to(device)
    ids = torch.randint(2, 97, (32, 21)).to(device)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=40, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(ours.generate(ids, max_length=40), expected)
    ours, theirs = (model.to(working_dtype(device)) for model in (ours, theirs))
    assert_as_precise("logits", ours, theirs, lambda model: model(ids).logits)


# Their names of versions 4 and 5, and timm's.
VIT_NAMES = (
    (r"^vit\.embeddings\.(cls_token)", r"\1"),
    (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^vit\.layernorm", "norm"),
    (r"^classifier", "head"),
    (r"^vit\.(encoder\.layer|layers)", "blocks"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(attention\.query|q_proj)", "attn.q"),
    (r"attention\.(attention\.key|k_proj)", "attn.k"),
    (r"attention\.(attention\.value|v_proj)", "attn.v"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)


@pytest.mark.parametrize(
    "options", [{}, {"use_flash_attn": True, "fused_dropout_add_ln": True}], ids=["plain", "flash"]
)
def test_vit(options, device):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10, layer_norm_eps=1e-6)
    theirs = randomize(transformers.ViTForImageClassification(config))
    timm = {}
    for name, x in theirs.state_dict().items():
        for pattern, new in VIT_NAMES:
            name = re.sub(pattern, new, name)
        timm[name] = x
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [timm.pop(f"blocks.{i}.attn.{x}.{kind}") for x in "qkv"]
            timm[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    ours = vit.VisionTransformer(
        img_size=32, patch_size=8, num_classes=10, embed_dim=64, depth=3, num_heads=4, **options
    ).eval()
    ours.load_state_dict(timm)
    ours, theirs = (model.to(device, working_dtype(device)) for model in (ours, theirs))
    images = torch.randn(16, 3, 32, 32).to(device, working_dtype(device))

    def logits(model):
        return model(images) if model is ours else model(images.to(model.dtype)).logits

    assert_as_precise("logits", ours, theirs, logits)
