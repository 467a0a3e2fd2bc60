"""What the attributes of the config do."""

import math

import pytest
import torch
from flash_attn.models import gpt
from flash_attn.modules.mha import get_alibi_slopes
from flash_attn.ops.triton.layer_norm import RMSNorm
from tiny_models import FLASH_ONLY, ROTARY, STRUCTURES, GPT2Config, assert_same, flat_gradients, make_gpt, make_ids

from flash_attn_plus.testing import assert_close

IDS = make_ids(2, 17)
FUSED = {"use_flash_attn": True, "fused_bias_fc": True, "fused_dropout_add_ln": True}
PLAIN_MLPS = ("gelu_new", "relu", "sqrelu")


@pytest.mark.parametrize("name", STRUCTURES)
def test_implementations_agree_forward_and_backward(name):
    plain, fused = make_gpt(STRUCTURES[name]).double(), make_gpt(STRUCTURES[name], **FUSED).double()
    weight = torch.randn(2, 17, 61, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits)
    actual, expected = (flat_gradients(model, lambda m: (m(IDS).logits * weight).sum()) for model in (fused, plain))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STRUCTURES)
def test_half_precision(name, dtype):
    precise, plain = make_gpt(STRUCTURES[name]).to(dtype), make_gpt(STRUCTURES[name]).to(dtype)
    fused = make_gpt(STRUCTURES[name], **FUSED).to(dtype)
    with torch.no_grad():
        reference, eager, actual = (model(IDS).logits for model in (precise.double(), plain, fused))
    assert actual.dtype == dtype
    assert_close("logits", actual, reference, eager)


@pytest.mark.parametrize("activation", PLAIN_MLPS)
def test_fused_mlp_agrees(activation):
    plain = make_gpt({"activation_function": activation}).double()
    for fields in ({"fused_mlp": True, "mlp_checkpoint_lvl": [0, 2]}, {"fused_dense_sqrelu_dense": True}):
        if activation == "sqrelu" or "fused_mlp" in fields:
            fused = make_gpt({"activation_function": activation} | fields).double()
            torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits)
            actual, expected = (flat_gradients(m, lambda m: m(IDS).logits.square().mean()) for m in (fused, plain))
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", FLASH_ONLY)
def test_attention_that_only_the_engine_has(name):
    """Against the same model with its mask or bias written out, in place of the engine's."""
    model = make_gpt(FLASH_ONLY[name], use_flash_attn=True)
    distance = torch.arange(17)[None, :] - torch.arange(17)[:, None]
    bias = torch.zeros(17, 17).masked_fill((distance > 0) | ((distance < -5) if name == "window" else False), -math.inf)
    if name == "alibi":
        bias = bias + torch.tensor(get_alibi_slopes(8))[:, None, None] * distance.float()

    class WrittenOut(torch.nn.Module):
        def forward(self, qkv, cu_seqlens=None, max_seqlen=None):
            q, k, v = qkv.unbind(2)
            scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5 + bias.to(q.dtype)
            return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    plain = make_gpt(FLASH_ONLY[name], use_flash_attn=True)
    for layer in plain.transformer.layers:
        layer.mixer.inner_attn = WrittenOut()
    assert_same("logits", model(IDS).logits.detach(), plain, lambda m: m(IDS).logits)


def test_softmax_scale():
    def scales(**fields):
        return [layer.mixer.inner_attn.softmax_scale for layer in make_gpt(fields).transformer.layers]

    assert scales() == [0.25, 0.25]
    assert scales(scale_attn_by_inverse_layer_idx=True) == [0.25, 0.125]
    assert scales(mup_scale_qk_dot_by_d=True, mup_attn_multiplier=8.0) == [0.5, 0.5]
    assert scales(scale_attn_weights=False) == [1.0, 1.0]


def test_mup_scales_embeddings_and_logits():
    base = {"n_layer": 0, "tie_word_embeddings": False, "n_positions": 0}
    scaled = make_gpt(base | {"mup_embeddings_multiplier": 3.0, "mup_output_multiplier": 2.0, "mup_width_scale": 0.25})
    with torch.no_grad():
        hidden = scaled.transformer.ln_f(scaled.transformer.embeddings(IDS) * 3.0)
        torch.testing.assert_close(scaled(IDS).logits, scaled.lm_head(hidden * 0.5))


def test_normalised_head():
    model = make_gpt({"norm_head": True, "tie_word_embeddings": False})
    with torch.no_grad():
        before = model(IDS).logits
        model.lm_head.weight.mul_(torch.rand(61, 1) + 0.5)
        torch.testing.assert_close(model(IDS).logits, before)


def test_num_last_tokens():
    model = make_gpt({})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, num_last_tokens=3).logits, model(IDS).logits[:, -3:])


def test_position_ids():
    model = make_gpt({})
    with torch.no_grad():
        default, explicit = model(IDS).logits, model(IDS, position_ids=torch.arange(17).expand(2, -1)).logits
        assert torch.equal(default, explicit)
        assert not torch.equal(default, model(IDS, position_ids=torch.arange(1, 18).expand(2, -1)).logits)


def test_names_of_the_parameters():
    names = set(make_gpt({}).state_dict())
    expected = {f"transformer.embeddings.{x}_embeddings.weight" for x in ("word", "position")}
    expected |= {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"}
    parts = ("norm1", "norm2", "mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    expected |= {f"transformer.layers.{i}.{x}.{y}" for i in range(2) for x in parts for y in ("weight", "bias")}
    assert names == expected
    assert set(make_gpt({}, **FUSED).state_dict()) == expected
    rotary = make_gpt(STRUCTURES["postnorm-projected"] | ROTARY)
    assert {"project_out.weight", "transformer.embeddings.project_in.weight"} <= set(rotary.state_dict())
    assert not any("rotary" in name or "ln_f" in name for name in rotary.state_dict())


def test_layers_share_the_rotary_tables():
    layers = make_gpt(ROTARY).transformer.layers
    assert layers[0].mixer.rotary_emb is layers[1].mixer.rotary_emb


@pytest.mark.parametrize("fields", [{}, {"rms_norm": True, "activation_function": "geglu"}])
def test_initialisation(fields):
    torch.manual_seed(0)
    model = gpt.GPTLMHeadModel(GPT2Config(n_embd=256, mup_width_scale=0.25, **fields))
    std = 0.02 * 0.5
    expected = {"Wqkv": std, "fc1": std, "out_proj": std / 2, "fc2": std / 2, "position_embeddings": 0.02}
    for name, p in model.named_parameters():
        layer, kind = name.split(".")[-2:]
        if layer in expected and kind == "weight":
            assert p.std().item() == pytest.approx(expected[layer], rel=0.05)
        elif kind == "bias":
            assert not p.any()
    assert model.transformer.layers[0].mlp.fc1.weight._optim == {"lr_multiplier": 0.25}
    assert isinstance(model.transformer.ln_f, RMSNorm) == bool(fields)


def test_dropout_in_front_of_a_block_is_that_of_what_came_before():
    for prenorm in (True, False):
        model = gpt.GPTModel(GPT2Config(embd_pdrop=0.1, resid_pdrop=0.2, attn_pdrop=0.3, prenorm=prenorm))
        first, second = model.layers
        assert first.dropout1.p == (0.1 if prenorm else 0.2)
        assert (first.dropout2.p, second.dropout1.p, second.dropout2.p) == (0.2, 0.2, 0.2)
        assert first.mixer.inner_attn.drop.p == 0.3
        assert (model.drop_f.p == 0.2) if prenorm else (model.embd_drop.p == 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function"),
        ({"activation_function": "swiglu", "fused_mlp": True}, "fused_mlp"),
        ({"fused_dense_sqrelu_dense": True}, "sqrelu"),
        ({"use_alibi": True}, "use_flash_attn"),
        ({"window_size": (4, 0)}, "use_flash_attn"),
        ({"parallel_block": True, "prenorm": False}, "parallel_block"),
        ({"n_head_kv": 3}, "num_heads_kv"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(AssertionError, match=message):
        gpt.GPTLMHeadModel(GPT2Config(**fields))
