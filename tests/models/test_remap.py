"""State dicts of other implementations: every remap has an inverse, and each layout is what it should be."""

import json
from types import SimpleNamespace

import pytest
import torch
from flash_attn.models import baichuan, bert, bigcode, btlm, falcon, gpt, gpt_neox, gptj, llama, opt
from tiny_models import ROTARY, BertConfig, GPT2Config, make_gpt, randomize

NO_BIAS = dict.fromkeys(("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False)
GATED = {"rms_norm": True, "activation_function": "swiglu", "mlp_multiple_of": 1, "n_inner": 72}
UNTIED = {"tie_word_embeddings": False}
PARALLEL = ROTARY | {"parallel_block": True}
# name: (module, middle of the functions' names, fields of the config, some of their names, names to be dropped)
FAMILIES = {
    "gpt2": (gpt, "hf_gpt2", {}, ["transformer.h.1.attn.c_attn.bias", "lm_head.weight"], ["transformer.h.0.attn.bias"]),
    "megatron": (
        gpt,
        "megatron",
        {},
        ["language_model.encoder.layers.1.self_attention.query_key_value.bias"],
        ["language_model.encoder.layers.0.self_attention.rotary_emb.inv_freq"],
    ),
    "gpt_neox": (
        gpt_neox,
        "hf_gpt_neox",
        PARALLEL | UNTIED,
        ["gpt_neox.layers.1.attention.query_key_value.bias", "embed_out.weight"],
        ["gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"],
    ),
    "gptj": (
        gptj,
        "hf_gptj",
        PARALLEL
        | UNTIED
        | {"parallel_block_tied_norm": True, "qkv_proj_bias": False, "out_proj_bias": False, "lm_head_bias": True},
        ["transformer.h.1.attn.k_proj.weight", "lm_head.bias"],
        ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    ),
    "opt": (
        opt,
        "hf_opt",
        {},
        ["model.decoder.layers.1.self_attn.v_proj.bias", "model.decoder.embed_positions.weight"],
        [],
    ),
    "opt-postnorm": (
        opt,
        "hf_opt",
        {"prenorm": False, "word_embed_proj_dim": 32},
        ["model.decoder.project_in.weight", "model.decoder.project_out.weight"],
        [],
    ),
    "falcon": (
        falcon,
        "hf_falcon",
        PARALLEL | NO_BIAS | {"n_head_kv": 1, "parallel_block_tied_norm": True},
        ["transformer.h.1.input_layernorm.bias"],
        ["transformer.h.0.self_attention.maybe_rotary.inv_freq"],
    ),
    "falcon-grouped": (
        falcon,
        "hf_falcon",
        PARALLEL | NO_BIAS | {"n_head_kv": 2},
        ["transformer.h.1.ln_attn.bias", "transformer.h.0.ln_mlp.weight"],
        [],
    ),
    "llama": (
        llama,
        "hf_llama",
        ROTARY | NO_BIAS | GATED | UNTIED | {"n_head_kv": 2},
        ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"],
        ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    ),
    "llama-meta": (
        llama,
        "meta_llama",
        ROTARY | NO_BIAS | GATED | UNTIED | {"n_head_kv": 2},
        ["layers.1.attention.wk.weight", "layers.0.feed_forward.w1.weight", "norm.weight"],
        ["rope.freqs"],
    ),
    "baichuan": (
        baichuan,
        "hf_baichuan",
        ROTARY | NO_BIAS | GATED | UNTIED,
        ["model.layers.1.self_attn.W_pack.weight"],
        ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    ),
    "btlm": (
        btlm,
        "hf_btlm",
        GATED | {"rms_norm": False, "n_positions": 0, "use_alibi": True, "use_flash_attn": True},
        ["transformer.h.1.mlp.c_fc2.bias"],
        ["transformer.relative_pe.slopes", "transformer.h.0.attn.bias"],
    ),
}
WORDS = "transformer.embeddings.word_embeddings.weight"


def functions(name):
    module, middle = FAMILIES[name][:2]
    return getattr(module, f"remap_state_dict_{middle}"), getattr(module, f"inv_remap_state_dict_{middle}")


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, x in actual.items():
        assert torch.equal(x, expected[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_remap_and_its_inverse(name):
    _, _, fields, some_names, dropped = FAMILIES[name]
    remap, inverse = functions(name)
    model = make_gpt(fields)
    ours = dict(model.state_dict())
    theirs = inverse(ours, model.config)
    assert theirs.keys() >= set(some_names)
    assert not any("{" in key or "*" in key or "mixer" in key for key in theirs)
    assert_equal(remap(theirs | dict.fromkeys(dropped, torch.zeros(1)), model.config), ours)
    assert_equal(inverse(remap(theirs, model.config), model.config), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_vocabulary_is_padded_with_zeros_and_cut_again(name):
    remap, inverse = functions(name)
    model = make_gpt(FAMILIES[name][2])
    theirs = inverse(dict(model.state_dict()), model.config)
    model.config.pad_vocab_size_multiple = 16
    padded = remap(theirs, model.config)
    gpt.GPTLMHeadModel(model.config).load_state_dict(padded)
    for key in (WORDS, "lm_head.weight"):
        assert padded[key].shape[0] == 64
        assert not padded[key][61:].any()
    assert_equal(inverse(padded, model.config), theirs)


def test_unknown_names_are_kept_so_that_loading_reports_them():
    model = make_gpt({})
    theirs = gpt.inv_remap_state_dict_hf_gpt2(dict(model.state_dict()), model.config)
    theirs["transformer.h.0.adapter.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="adapter"):
        model.load_state_dict(gpt.remap_state_dict_hf_gpt2(theirs, model.config))


@pytest.mark.parametrize(
    ("name", "pattern", "replacement"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("opt", "model.decoder.final_layer_norm.", "decoder.layer_norm."),
        ("megatron", "language_model.encoder.", "language_model.transformer."),
        ("megatron", ".self_attention.", ".attention."),
    ],
)
def test_variants_of_their_names(name, pattern, replacement):
    remap, inverse = functions(name)
    model = make_gpt(FAMILIES[name][2])
    theirs = inverse(dict(model.state_dict()), model.config)
    renamed = {key.replace(pattern, replacement): x for key, x in theirs.items()}
    assert renamed.keys() != theirs.keys()
    assert_equal(remap(renamed, model.config), dict(model.state_dict()))


def test_tied_head_may_be_absent():
    model = make_gpt({})
    theirs = gpt.inv_remap_state_dict_hf_gpt2(dict(model.state_dict()), model.config)
    del theirs["lm_head.weight"]
    assert_equal(gpt.remap_state_dict_hf_gpt2(theirs, model.config), dict(model.state_dict()))


def tagged(rows):
    """A weight (len(rows), 1) whose rows are told apart."""
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def test_llama_rows_go_from_halves_to_neighbours():
    config = GPT2Config(n_embd=8, n_head=2, n_head_kv=1, n_layer=1, tie_word_embeddings=False)
    q = tagged([0, 1, 10, 11, 4, 5, 14, 15])  # features 10, 11 turn together with 0, 1
    state_dict = {"q": q, "k": tagged([20, 21, 30, 31]), "v": tagged([40, 41, 42, 43])}
    theirs = {f"model.layers.0.self_attn.{x}_proj.weight": w for x, w in state_dict.items()}
    ours = llama.remap_state_dict_hf_llama(theirs, config)["transformer.layers.0.mixer.Wqkv.weight"]
    assert ours.flatten().tolist() == [0, 10, 1, 11, 4, 14, 5, 15, 20, 30, 21, 31, 40, 41, 42, 43]


def test_gate_is_the_second_half():
    config = GPT2Config(n_layer=1)
    up, gate = tagged([1, 2]), tagged([3, 4])
    for function, names in (
        (llama.remap_state_dict_hf_llama, ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")),
        (llama.remap_state_dict_meta_llama, ("layers.0.feed_forward.w3.weight", "layers.0.feed_forward.w1.weight")),
        (
            baichuan.remap_state_dict_hf_baichuan,
            ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
        ),
    ):
        ours = function(dict(zip(names, (up, gate), strict=True)), config)
        assert ours["transformer.layers.0.mlp.fc1.weight"].flatten().tolist() == [1, 2, 3, 4]


def test_falcon_groups_are_taken_apart():
    config = GPT2Config(n_embd=4, n_head=4, n_head_kv=2, n_layer=1, parallel_block=True)
    theirs = {"transformer.h.0.self_attention.query_key_value.weight": tagged([0, 1, 10, 20, 2, 3, 11, 21])}
    ours = falcon.remap_state_dict_hf_falcon(theirs, config)["transformer.layers.0.mixer.Wqkv.weight"]
    assert ours.flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_bigcode_head_is_repeated_and_must_stay_single():
    config = GPT2Config(n_embd=4, n_head=2, n_layer=1)
    theirs = {"transformer.h.0.attn.c_attn.weight": tagged([0, 1, 2, 3, 10, 11, 20, 21])}
    ours = bigcode.remap_state_dict_hf_bigcode(theirs, config)
    key = "transformer.layers.0.mixer.Wqkv.weight"
    assert ours[key].flatten().tolist() == [0, 1, 2, 3, 10, 11, 10, 11, 20, 21, 20, 21]
    assert_equal(bigcode.inv_remap_state_dict_hf_bigcode(ours, config), theirs)
    ours[key][6] += 1
    with pytest.raises(ValueError, match="key heads differ"):
        bigcode.inv_remap_state_dict_hf_bigcode(ours, config)


@pytest.mark.parametrize("fields", [{}, {"last_layer_subset": True, "dense_seq_output": True}])
@pytest.mark.parametrize("multiple", [1, 16])
def test_bert(fields, multiple):
    torch.manual_seed(0)
    config = BertConfig(**fields)
    model = randomize(bert.BertForPreTraining(config))
    ours = dict(model.state_dict())
    theirs = bert.inv_remap_state_dict(ours, config)
    assert "bert.encoder.layer.1.attention.self.key.weight" in theirs
    assert_equal(bert.remap_state_dict(theirs, config), ours)
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): x for key, x in theirs.items()}
    del old["cls.predictions.decoder.bias"]
    old["bert.embeddings.position_ids"] = torch.arange(24)
    assert_equal(bert.remap_state_dict(old, config), ours)
    config.pad_vocab_size_multiple = multiple
    padded = bert.remap_state_dict(theirs, config)
    bert.BertForPreTraining(config).load_state_dict(padded)
    assert bool((padded["cls.predictions.decoder.bias"][61:] == -100).all())
    assert_equal(bert.inv_remap_state_dict(padded, config), theirs)
    config.vocab_size, config.orig_vocab_size = 64, 61
    assert_equal(bert.inv_remap_state_dict(padded, config), theirs)


def test_meta_shards_make_the_whole(tmp_path):
    model = make_gpt(FAMILIES["llama-meta"][2])
    config, ours = model.config, dict(model.state_dict())
    folder = tmp_path / "7B"
    folder.mkdir()
    for rank in range(2):
        shard = gpt.shard_state_dict_tp(dict(ours), config, 2, rank)
        shard[WORDS] = ours[WORDS].chunk(2, dim=1)[rank]  # Meta spreads columns of the words
        rest = {key: x for key, x in shard.items() if "Wqkv" not in key}
        theirs = dict(llama.inv_remap_state_dict_meta_llama(rest, config))
        for i in range(2):
            q, k, v = shard[f"transformer.layers.{i}.mixer.Wqkv.weight"].split((32, 16, 16))
            theirs |= {f"layers.{i}.attention.w{x}.weight": w for x, w in zip("qkv", (q, k, v), strict=True)}
        torch.save(theirs, folder / f"consolidated.0{rank}.pth")
    shards = llama.state_dicts_from_checkpoint(tmp_path, "7B")
    whole = gpt.combine_state_dicts_tp([llama.remap_state_dict_meta_llama(s, config) for s in shards], config)
    assert_equal(whole, ours)


def test_configs_need_transformers_only_when_translated(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8}))
    with pytest.raises(ValueError, match="checkpoint_format"):
        llama.config_from_checkpoint(tmp_path, "", checkpoint_format="zip")
    with pytest.raises(ValueError, match="SimpleNamespace"):
        gpt.GPTLMHeadModel(SimpleNamespace())
    with pytest.raises(ValueError, match="GPT2Config"):
        bert.BertModel(GPT2Config())


def test_older_checkpoints_have_their_norms_one_sum_earlier():
    model = make_gpt({})
    ours = dict(model.state_dict())
    order = [f"transformer.layers.{i}.norm{n}" for i in range(2) for n in (1, 2)] + ["transformer.ln_f"]
    old_order = ["transformer.ln_0", *order[:-1]]
    old = {key: x for key, x in ours.items() if not key.startswith(tuple(order))}
    for new_name, old_name in zip(order, old_order, strict=True):
        old |= {f"{old_name}.{kind}": ours[f"{new_name}.{kind}"] for kind in ("weight", "bias")}
    fresh = gpt.GPTLMHeadModel(model.config)
    fresh.load_state_dict(old)
    assert_equal(dict(fresh.state_dict()), ours)


def test_from_pretrained_chooses_the_family_by_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_gpt(FAMILIES["gpt_neox"][2])
    folder = tmp_path / "EleutherAI" / "pythia-tiny"
    folder.mkdir(parents=True)
    theirs = gpt_neox.inv_remap_state_dict_hf_gpt_neox(dict(model.state_dict()), model.config)
    torch.save(theirs, folder / "pytorch_model.bin")
    loaded = gpt.GPTLMHeadModel.from_pretrained("EleutherAI/pythia-tiny", model.config, dtype=torch.bfloat16)
    assert_equal(dict(loaded.state_dict()), {k: x.bfloat16() for k, x in model.state_dict().items()})
    with pytest.raises(NotImplementedError, match="someone/else"):
        gpt.GPTLMHeadModel.from_pretrained("someone/else", model.config)
