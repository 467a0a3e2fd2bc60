"""Layer norm and RMS norm with everything that is fused into them."""

from functools import partial

import formulas
import pytest
import torch
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from formulas import assert_follows, normal

from flash_attn_plus.testing import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 40), (2, 5, 192), (1, 1030), (7, 8))


def tensors(shape, dtype, device, *names, weight_dtype=None, residual_dtype=None):
    """Named inputs of a norm over rows of `shape`."""
    cols, made = shape[-1], {}
    for seed, name in enumerate(("x", "weight", "bias", "residual", "x1", "weight1", "bias1", "rowscale")):
        if name not in names:
            continue
        if name in ("x", "x1", "residual"):
            made[name] = normal(
                *shape, dtype=residual_dtype or dtype if name == "residual" else dtype, device=device, seed=seed
            )
        elif name == "rowscale":
            made[name] = normal(*shape[:-1], dtype=dtype, device=device, seed=seed)
        else:
            made[name] = normal(cols, dtype=weight_dtype or dtype, device=device, seed=seed)
    return made


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_plain(path, device, shape, dtype, is_rms_norm):
    x = tensors(shape, dtype, device, "x", "weight", *(() if is_rms_norm else ("bias",)))
    x.setdefault("bias", None)
    assert_follows(partial(layer_norm_fn, is_rms_norm=is_rms_norm), partial(formulas.norm, is_rms_norm=is_rms_norm), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("zero_centered_weight", [False, True])
def test_everything_at_once(path, device, dtype, is_rms_norm, zero_centered_weight):
    x = tensors((4, 3, 100), dtype, device, "x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    options = {"is_rms_norm": is_rms_norm, "zero_centered_weight": zero_centered_weight, "prenorm": True}
    assert_follows(partial(layer_norm_fn, **options), partial(formulas.norm, **options), x)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_float32_residual_and_weights_beside_bfloat16(path, device, is_rms_norm):
    kinds = {"weight_dtype": torch.float32, "residual_dtype": torch.float32}
    x = tensors((6, 72), torch.bfloat16, device, "x", "weight", "bias", "residual", **kinds)
    options = {"is_rms_norm": is_rms_norm, "prenorm": True}
    y, t = assert_follows(partial(layer_norm_fn, **options), partial(formulas.norm, **options), x)
    assert y.dtype == torch.bfloat16
    assert t.dtype == torch.float32


def test_residual_in_fp32_without_a_residual(path, device):
    x = tensors((6, 72), torch.bfloat16, device, "x", "weight", "bias")
    y, t = layer_norm_fn(**x, prenorm=True, residual_in_fp32=True)
    assert y.dtype == torch.bfloat16
    assert t.dtype == torch.float32
    assert torch.equal(t, x["x"].float())


def test_rowscale(path, device):
    x = tensors((4, 5, 64), torch.float32, device, "x", "weight", "bias", "rowscale", "residual")
    scale = x.pop("rowscale")

    def formula(x, weight, bias, residual):
        return formulas.norm(x, weight, bias, residual, rowscale=scale.to(x.dtype), prenorm=True)

    assert_follows(partial(layer_norm_fn, rowscale=scale, prenorm=True), formula, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_dropout_of_both_branches(path, device, dtype, is_rms_norm):
    p = 0.27
    x = tensors((5, 3, 104), dtype, device, "x", "weight", "bias", "residual", "x1")
    options = {"is_rms_norm": is_rms_norm, "prenorm": True}

    def actual(**named):
        torch.manual_seed(3)
        return layer_norm_fn(**named, dropout_p=p, return_dropout_mask=True, **options)

    *_, keep, keep1 = actual(**x)
    assert keep.dtype == keep1.dtype == torch.bool
    assert not torch.equal(keep, keep1)

    def formula(**named):
        return formulas.norm(**named, dropout_p=p, keep=keep, keep1=keep1, **options)

    assert_follows(actual, formula, x)


def test_dropout_keeps_its_share_and_follows_the_seed(path, device):
    x = tensors((64, 256), torch.float32, device, "x", "weight", "bias")

    def mask(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        _, keep, keep1 = layer_norm_fn(**x, dropout_p=0.27, return_dropout_mask=True)
        assert keep1 is None
        return keep

    first, second = mask(5), mask()
    assert abs(first.float().mean().item() - 0.73) < 0.015
    assert not torch.equal(first, second)
    assert torch.equal(first, mask(5))
    assert not torch.equal(first[0], first[1])


def test_dropout_is_the_same_by_either_path(device):
    from flash_attn_plus import use_backend

    x = tensors((5, 300), torch.float32, device, "x", "weight", "bias", "x1")
    masks = []
    for name in ("torch", "triton"):
        torch.manual_seed(11)
        with use_backend(name):
            masks.append(layer_norm_fn(**x, dropout_p=0.5, return_dropout_mask=True)[-2:])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_no_dropout_has_no_masks(path, device):
    x = tensors((3, 16), torch.float32, device, "x", "weight", "bias")
    _, keep, keep1 = layer_norm_fn(**x, return_dropout_mask=True)
    assert keep is None
    assert keep1 is None


def test_strided_rows_and_transposed_gradients(path, device):
    wide = normal(6, 200, dtype=torch.float32, device=device)
    x = tensors((6, 96), torch.float32, device, "weight", "bias")
    expected = layer_norm_fn(wide[:, 3:99].contiguous(), **x)
    assert torch.equal(layer_norm_fn(wide[:, 3:99], **x), expected)
    leaf = wide[:, :96].contiguous().requires_grad_()
    dy = normal(96, 6, dtype=torch.float32, device=device).t()
    (strided,) = torch.autograd.grad(layer_norm_fn(leaf, **x), leaf, dy)
    (contiguous,) = torch.autograd.grad(layer_norm_fn(leaf, **x), leaf, dy.contiguous())
    assert torch.equal(strided, contiguous)


def test_more_partial_sums_than_a_step_takes(device):
    from flash_attn_plus.fused import norm_launch

    partials = normal(300, 40, dtype=torch.float32, device=device)
    total, last = torch.full((2, 40), float("nan"), dtype=torch.bfloat16, device=device)
    norm_launch._add_up([partials, None, None, -partials], (total, None, None, last), 300)
    assert_close("total", total, partials.double().sum(0), partials.sum(0).bfloat16())
    assert torch.equal(last, -total)


def test_zero_rows(path, device):
    x = tensors((2, 24), torch.float32, device, "weight", "bias")
    x = {name: t.requires_grad_() for name, t in x.items()}
    empty = torch.empty(0, 24, device=device, requires_grad=True)
    y = layer_norm_fn(empty, **x)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert empty.grad.shape == (0, 24)
    assert not x["weight"].grad.any()


def test_buffers_of_the_caller_are_written(path, device):
    x = tensors((4, 32), torch.float32, device, "x", "weight", "bias", "residual")
    out, residual_out = torch.full((4, 32), torch.nan, device=device), torch.full((4, 32), torch.nan, device=device)
    y, t = layer_norm_fn(**x, prenorm=True, out=out, residual_out=residual_out)
    assert y.data_ptr() == out.data_ptr()
    assert t.data_ptr() == residual_out.data_ptr()
    assert torch.equal(t, x["x"] + x["residual"])
    assert torch.equal(y, layer_norm_fn(**x))


def test_an_unchanged_input_is_returned_itself(path, device):
    x = tensors((4, 32), torch.float32, device, "x", "weight", "bias")
    assert layer_norm_fn(**x, prenorm=True)[1].data_ptr() == x["x"].data_ptr()


def test_the_weight_gradient_is_repeatable(path, device):
    x = tensors((33, 48), torch.bfloat16, device, "x", "weight", "bias")
    weight = x["weight"].requires_grad_()
    grads = [torch.autograd.grad(layer_norm_fn(**x).float().square().sum(), weight)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_norm_then_linear(path, device, prenorm, is_rms_norm):
    x = tensors((3, 4, 48), torch.float32, device, "x", "residual")
    x |= {
        "norm_weight": normal(48, dtype=torch.float32, device=device, seed=1),
        "norm_bias": normal(48, dtype=torch.float32, device=device, seed=2),
        "linear_weight": normal(20, 48, dtype=torch.float32, device=device, seed=3, scale=0.2),
        "linear_bias": normal(20, dtype=torch.float32, device=device, seed=4),
    }

    def formula(x, residual, norm_weight, norm_bias, linear_weight, linear_bias):
        y, t = formulas.norm(x, norm_weight, norm_bias, residual, is_rms_norm=is_rms_norm, prenorm=True)
        out = torch.nn.functional.linear(y, linear_weight, linear_bias)
        return (out, t) if prenorm else out

    assert_follows(partial(layer_norm_linear_fn, prenorm=prenorm, is_rms_norm=is_rms_norm), formula, x)


def test_norm_then_linear_under_autocast(path, device):
    x = normal(6, 48, dtype=torch.float32, device=device).requires_grad_()
    weight = normal(20, 48, dtype=torch.float32, device=device, seed=3).requires_grad_()
    ones = torch.ones(48, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer_norm_linear_fn(x, ones, None, weight, None, is_rms_norm=True)
        expected = torch.nn.functional.linear(rms_norm_fn(x, ones, None, out_dtype=torch.bfloat16), weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_module(path, device):
    module = RMSNorm(40, dropout_p=0.5, zero_centered_weight=True, device=device)
    assert module.bias is None
    assert not module.weight.any()
    x = normal(3, 40, dtype=torch.float32, device=device)
    module.eval()
    y, t = module(x, residual=x, prenorm=True)
    assert torch.equal(t, 2 * x)
    assert torch.equal(y, rms_norm_fn(x, module.weight, None, residual=x, eps=1e-5, zero_centered_weight=True))
    module.train()
    assert not torch.equal(module(x, residual=x), y)


@pytest.mark.parametrize(("fused", "reference"), [(layer_norm_fn, layer_norm_ref), (rms_norm_fn, rms_norm_ref)])
def test_reference_functions_agree(path, device, fused, reference):
    x = tensors((4, 40), torch.float32, device, "x", "weight", "bias", "residual", "weight1", "bias1")
    for a, b in zip(fused(**x, prenorm=True), reference(**x, prenorm=True, upcast=True), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be(path, device):
    x = tensors((4, 40), torch.float32, device, "x", "weight", "bias", "x1", "rowscale")
    with pytest.raises(AssertionError, match="rowscale"):
        layer_norm_fn(**x)
    del x["rowscale"], x["x1"]
    with pytest.raises(AssertionError, match="residual"):
        layer_norm_fn(**x, residual=x["x"][:2])
    with pytest.raises(RuntimeError, match="dropout_p"):
        layer_norm_fn(**x, dropout_p=1.0)
    long = torch.zeros(1, 16385, device=device)
    with pytest.raises(RuntimeError, match="feature dim >= 64KB"):
        layer_norm_fn(long, long[0], None)


def test_parameters_and_buffers_of_another_size_are_never_read_or_written(path, device):
    x, ones = torch.zeros(3, 40, device=device), torch.ones(40, device=device)
    for options, word in (
        ({"weight": ones[:8]}, "weight must"),
        ({"weight": None}, "weight must"),
        ({"bias": ones[:8]}, "bias must"),
        ({"weight1": ones[:8]}, "weight1 must"),
        ({"weight1": ones, "bias1": ones[:8]}, "bias1 must"),
        ({"bias1": ones}, "bias1 needs"),
        ({"out": x[:2].clone()}, "out must"),
        ({"out": torch.zeros(3, 80, device=device)[:, ::2]}, "out must"),
        ({"residual_out": x[:2].clone(), "prenorm": True}, "residual_out must"),
        ({"out": x.clone(), "out_dtype": torch.float16}, "out has dtype"),
        ({"x": x.int()}, "floating-point"),
        ({"x": x.view(3, 5, 8), "weight": ones[:8], "out": torch.zeros(5, 3, 8, device=device)}, "out must"),
        (
            {"x": x.view(3, 5, 8), "weight": ones[:8], "out": torch.zeros(5, 3, 8, device=device).transpose(0, 1)},
            "contiguous",
        ),
    ):
        with pytest.raises(RuntimeError, match=word):
            layer_norm_fn(**{"x": x, "weight": ones, "bias": None} | options)


def test_the_input_is_overwritten_only_where_nothing_trains(path, device):
    x, ones = normal(3, 40, dtype=torch.float32, device=device), torch.ones(40, device=device)
    expected = layer_norm_fn(x, ones, None)
    trained = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="backward pass"):
        layer_norm_fn(trained, ones, None, out=trained.detach())
    assert torch.equal(layer_norm_fn(x, ones, None, out=x), expected)
