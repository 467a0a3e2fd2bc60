"""Vision transformer: the last block may compute the class token alone, whichever implementation runs."""

import pytest
import torch
from flash_attn.models.vit import VisionTransformer, vit_base_patch16_224
from tiny_models import flat_gradients, randomize

SIZES = {"img_size": 24, "patch_size": 8, "num_classes": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
FUSED = {"use_flash_attn": True, "fused_bias_fc": True, "fused_dropout_add_ln": True}
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def make_vit(**fields):
    torch.manual_seed(0)
    return randomize(VisionTransformer(**SIZES | fields))


def logits(model):
    return model(IMAGES.to(model.pos_embed.dtype))


@pytest.mark.parametrize("fields", [{}, {"no_embed_class": True, "qkv_bias": False}])
def test_implementations_agree_forward_and_backward(fields):
    plain, fused = make_vit(**fields).double(), make_vit(**fields, **FUSED).double()
    torch.testing.assert_close(logits(fused), logits(plain))
    actual, expected = (flat_gradients(model, lambda m: logits(m).square().sum()) for model in (fused, plain))
    torch.testing.assert_close(actual, expected)


def test_class_token_alone_is_the_first_of_all_tokens():
    model, precise = make_vit(), make_vit().double()
    assert model.forward_features(IMAGES).shape == (2, 10, 32)
    assert model.forward_features(IMAGES, all_tokens=False).shape == (2, 1, 32)
    assert model.forward_head(model.forward_features(IMAGES), pre_logits=True).shape == (2, 32)
    first_of_all = precise.forward_head(precise.forward_features(IMAGES.double()))
    torch.testing.assert_close(logits(precise), first_of_all)


def test_weights_of_timm():
    model = make_vit()
    timm = {}
    for name, x in model.state_dict().items():
        if name == "patch_embed.proj.weight":
            x = x.unflatten(1, (3, 8, 8))
        timm[name.replace("mixer.Wqkv", "attn.qkv").replace("mixer.out_proj", "attn.proj")] = x
    for kind in ("weight", "bias"):
        parts = [timm.pop(f"blocks.2.mixer.{x}.{kind}") for x in ("Wq", "Wkv")]
        timm[f"blocks.2.attn.qkv.{kind}"] = torch.cat(parts)
    fresh = VisionTransformer(**SIZES)
    fresh.load_state_dict(timm)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in fresh.state_dict().items())


def test_rates_of_dropout_and_stochastic_depth():
    model = VisionTransformer(**SIZES, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.4)
    paths = [(block.drop_path1.p, block.drop_path2.p) for block in model.blocks]
    assert paths == [(0.0, 0.0), (0.0, pytest.approx(0.2)), (pytest.approx(0.2), pytest.approx(0.4))]
    assert model.drop_path.p == pytest.approx(0.4)
    assert {block.dropout1.p for block in model.blocks} == {model.dropout.p} == {0.1}
    assert model.blocks[0].mixer.inner_attn.drop.p == 0.2
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_initialisation():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES | {"embed_dim": 128})
    assert model.blocks[0].mixer.Wqkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert not model.blocks[0].mlp.fc1.bias.any()


def test_what_is_not_supported_is_refused():
    for fields in ({"global_pool": "avg"}, {"class_token": False}, {"init_values": 1e-5}, {"pre_norm": True}):
        with pytest.raises(AssertionError, match=next(iter(fields))):
            VisionTransformer(**SIZES, **fields)
    with pytest.raises(AssertionError, match="pretrained"):
        vit_base_patch16_224(pretrained=True)


def test_base_model_has_its_sizes():
    with torch.device("meta"):
        model = vit_base_patch16_224(num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 85806346
