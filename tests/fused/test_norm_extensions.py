"""The functions that the original builds from a CUDA extension: `ops.layer_norm` and `ops.rms_norm`."""

from functools import partial

import formulas
import pytest
import torch
from flash_attn.ops import layer_norm as layer_norms
from flash_attn.ops import rms_norm as rms_norms
from formulas import assert_follows, normal

KINDS = {
    "layer": (
        layer_norms.dropout_add_layer_norm,
        layer_norms.dropout_add_layer_norm_subset,
        layer_norms.dropout_add_layer_norm_parallel_residual,
    ),
    "rms": (
        rms_norms.dropout_add_rms_norm,
        rms_norms.dropout_add_rms_norm_subset,
        rms_norms.dropout_add_rms_norm_parallel_residual,
    ),
}
EPS = 1e-5
kinds = pytest.mark.parametrize("kind", KINDS)


def vectors(device, *names, cols=40):
    return {name: normal(cols, dtype=torch.float32, device=device, seed=i) for i, name in enumerate(names)}


def rows(device, *names, shape=(3, 4, 40)):
    return {name: normal(*shape, dtype=torch.float32, device=device, seed=10 + i) for i, name in enumerate(names)}


@kinds
@pytest.mark.parametrize("has_layerscale", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_plain(path, device, kind, has_layerscale, has_residual):
    x = rows(device, "x0", *(["residual"] if has_residual else [])) | vectors(device, "weight", "bias")
    if has_layerscale:
        x |= vectors(device, "layerscale")
    scale = normal(3, 4, dtype=torch.float32, device=device)

    def actual(x0, weight, bias, residual=None, layerscale=None):
        return KINDS[kind][0](x0, residual, weight, bias, 0.0, EPS, rowscale=scale, layerscale=layerscale, prenorm=True)

    def formula(x0, weight, bias, residual=None, layerscale=None):
        t = x0 * scale.to(x0.dtype)[..., None]
        t = t if layerscale is None else t * layerscale
        return formulas.norm(t, weight, bias, residual, eps=EPS, is_rms_norm=kind == "rms", prenorm=True)

    assert_follows(actual, formula, x)


@kinds
def test_dropout_and_its_mask(path, device, kind):
    x = rows(device, "x0", "residual") | vectors(device, "weight", "bias")

    def actual(x0, residual, weight, bias):
        torch.manual_seed(1)
        return KINDS[kind][0](x0, residual, weight, bias, 0.3, EPS, prenorm=True, return_dropout_mask=True)

    mask = actual(**x)[-1]
    assert mask.dtype == torch.uint8
    assert 0.5 < mask.float().mean() < 0.9
    options = {"eps": EPS, "is_rms_norm": kind == "rms", "prenorm": True, "dropout_p": 0.3, "keep": mask.bool()}
    assert_follows(actual, lambda x0, **rest: formulas.norm(x0, **rest, **options), x)


@kinds
def test_residual_dtypes(path, device, kind):
    x0 = normal(3, 40, dtype=torch.bfloat16, device=device)
    weight = torch.ones(40, device=device)
    call = partial(KINDS[kind][0], x0, weight=weight, bias=None, dropout_p=0.0, epsilon=EPS, prenorm=True)
    for options, dtype in (
        ({"residual": None}, torch.bfloat16),
        ({"residual": None, "layerscale": weight}, torch.bfloat16),
        ({"residual": None, "residual_in_fp32": True}, torch.float32),
        ({"residual": x0}, torch.bfloat16),
        ({"residual": x0, "residual_in_fp32": True}, torch.bfloat16),
        ({"residual": x0.float()}, torch.float32),
    ):
        z, t = call(**options)
        assert z.dtype == torch.bfloat16
        assert t.dtype == dtype, options


@kinds
@pytest.mark.parametrize("has_out_subset", [False, True])
def test_subset(path, device, kind, has_out_subset):
    x = (
        rows(device, "x0", shape=(4, 40))
        | rows(device, "residual", shape=(2, 3, 40))
        | vectors(device, "weight", "bias")
    )
    x0_subset = torch.tensor([[2, 0, 1], [4, 3, 0]], dtype=torch.int32, device=device)
    out_subset = torch.tensor([[1, 2, 0], [0, 3, 4]], dtype=torch.int32, device=device) if has_out_subset else None

    def actual(x0, residual, weight, bias):
        z, t, mask = KINDS[kind][1](
            x0, residual, weight, bias, 0.0, EPS, x0_subset=x0_subset, out_subset=out_subset, rowscale_const=1.25,
            out_numrows=4, prenorm=True, return_dropout_mask=True,
        )  # fmt: skip
        assert mask.shape == x0.shape
        assert mask.all()
        return z, t

    def formula(x0, residual, weight, bias):
        zero = torch.zeros_like(x0[0])
        picked = [x0[1], zero, x0[0], x0[3], x0[2], zero]
        t = torch.stack(picked).view(2, 3, 40) * 1.25 + residual
        (z,) = formulas.norm(t, weight, bias, eps=EPS, is_rms_norm=kind == "rms")
        flat = z.view(6, 40)
        return (torch.stack((flat[0], flat[1], flat[4], flat[5])) if has_out_subset else z), t

    assert_follows(actual, formula, x)


@kinds
def test_subset_of_whole_sequences_keeps_their_shape(path, device, kind):
    x = (
        rows(device, "x0", shape=(2, 3, 40))
        | rows(device, "residual", shape=(4, 3, 40))
        | vectors(device, "weight", "bias")
    )
    x0_subset = torch.tensor([[0, 0, 0], [1, 2, 3], [0, 0, 0], [4, 5, 6]], dtype=torch.int32, device=device)
    out_subset = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]], dtype=torch.int32, device=device)

    def actual(x0, residual, weight, bias):
        return KINDS[kind][1](
            x0, residual, weight, bias, 0.0, EPS, x0_subset=x0_subset, out_subset=out_subset, out_numrows=9,
            prenorm=True,
        )  # fmt: skip

    def formula(x0, residual, weight, bias):
        zero = torch.zeros_like(x0[0])
        t = torch.stack((zero, x0[0], zero, x0[1])) + residual
        (z,) = formulas.norm(t, weight, bias, eps=EPS, is_rms_norm=kind == "rms")
        return z[:3], t

    z, t = actual(**x)
    assert (z.shape, t.shape) == ((3, 3, 40), (4, 3, 40))
    assert_follows(actual, formula, x)


@kinds
def test_factor_of_subset_is_not_rounded_to_half_precision(path, device, kind):
    x0 = normal(3, 40, dtype=torch.float16, device=device)
    _, t = KINDS[kind][1](
        x0, None, torch.ones(40, device=device), None, 0.0, EPS, rowscale_const=1 / 0.6, prenorm=True,
        residual_in_fp32=True,
    )  # fmt: skip
    assert torch.equal(t, x0.float() * (1 / 0.6))


@kinds
@pytest.mark.parametrize("has_x1", [False, True])
@pytest.mark.parametrize("has_weight1", [False, True])
def test_parallel_residual(path, device, kind, has_x1, has_weight1):
    x = rows(device, "x0", "residual", *(["x1"] if has_x1 else []))
    x |= vectors(device, "weight0", "bias0", *(["weight1", "bias1"] if has_weight1 else []))

    def actual(x0, residual, weight0, bias0, x1=None, weight1=None, bias1=None):
        z0, z1, t, mask0, mask1 = KINDS[kind][2](
            x0, x1, residual, weight0, bias0, weight1, bias1, 0.0, EPS, prenorm=True, return_dropout_mask=True
        )
        assert (z1 is not None) == has_weight1
        assert mask0.all()
        assert (mask1 is not None) == has_x1
        return z0, z1, t

    def formula(x0, residual, weight0, bias0, **rest):
        return formulas.norm(x0, weight0, bias0, residual, **rest, eps=EPS, is_rms_norm=kind == "rms", prenorm=True)

    assert_follows(actual, formula, x)


def test_modules_and_plain_functions(path, device):
    x, residual = rows(device, "x0", "residual").values()
    module = layer_norms.DropoutAddLayerNorm(40, prenorm=True, p=0.5, device=device).eval()
    z, t = module(x, residual)
    assert torch.equal(t, x + residual)
    assert torch.equal(z, layer_norms.layer_norm(t, module.weight, module.bias, 1e-5))
    module = rms_norms.DropoutAddRMSNorm(40, prenorm=True, p=0.5, device=device)
    assert not torch.equal(module(x, residual)[1], t)
    assert module.bias is None
    z, _ = module.eval()(x, residual)
    torch.testing.assert_close(z, rms_norms.rms_norm(t, module.weight, 1e-5))
    assert torch.equal(rms_norms.RMSNorm(40, device=device)(t), rms_norms.rms_norm(t, module.weight, 1e-5))
    applied = layer_norms.DropoutAddLayerNormFn.apply(x, residual, module.weight, None, None, None, 0.0, 1e-5)
    assert torch.equal(applied, layer_norms.dropout_add_layer_norm(x, residual, module.weight, None, 0.0, 1e-5))
