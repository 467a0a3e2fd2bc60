"""Activations, SwiGLU and linear layers with an activation."""

from functools import partial

import formulas
import pytest
import torch
import torch.nn.functional as F
from flash_attn.ops.activations import (
    bias_gelu,
    bias_gelu_back,
    bias_gelu_impl,
    fast_gelu_impl,
    gelu_bwd,
    gelu_fwd,
    relu_bwd,
    sqrelu_bwd,
    sqrelu_fwd,
    swiglu,
    swiglu_bwd,
    swiglu_fwd,
)
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from formulas import assert_follows, normal

from flash_attn_plus.fused.activation import ACTIVATIONS, BiasActivation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_activations(path, device, dtype, activation, has_bias):
    tensors = {
        "x": normal(3, 5, 130, dtype=dtype, device=device, scale=2),
        "bias": normal(130, dtype=dtype, device=device) if has_bias else None,
    }

    def formula(x, bias):
        return formulas.ACTIVATIONS[activation](x if bias is None else x + bias)

    assert_follows(lambda x, bias: BiasActivation.apply(x, bias, activation), formula, tensors)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_strided", [False, True])
def test_swiglu(path, device, dtype, is_strided):
    def halves(both):
        gate, up = both.chunk(2, -1)
        return (gate, up) if is_strided else (gate.contiguous(), up.contiguous())

    assert_follows(
        lambda both: swiglu(*halves(both)),
        lambda both: F.silu(halves(both)[0]) * halves(both)[1],
        {"both": normal(3, 4, 260, dtype=dtype, device=device, scale=2)},
    )


def test_functions_and_their_gradients_agree_with_the_classes(path, device):
    x = normal(6, 40, dtype=torch.float32, device=device).requires_grad_()
    y = normal(6, 40, dtype=torch.float32, device=device, seed=1).requires_grad_()
    bias = normal(40, dtype=torch.float32, device=device).requires_grad_()
    g = normal(6, 40, dtype=torch.float32, device=device, seed=2)
    for forward, backward, function in (
        (gelu_fwd, gelu_bwd, fast_gelu_impl),
        (sqrelu_fwd, sqrelu_bwd, lambda t: F.relu(t).square()),
    ):
        out = function(x)
        torch.testing.assert_close(forward(x.detach()), out)
        torch.testing.assert_close(backward(g, x.detach()), torch.autograd.grad(out, x, g)[0])
    out = bias_gelu_impl(x, bias)
    assert torch.equal(out, bias_gelu(x.detach(), bias.detach()))
    dx, dbias = torch.autograd.grad(out, (x, bias), g)
    assert torch.equal(dx, bias_gelu_back(g, x.detach(), bias.detach()))
    torch.testing.assert_close(dbias, dx.sum(0))
    out = swiglu(x, y)
    assert torch.equal(out, swiglu_fwd(x.detach(), y.detach()))
    for a, b in zip(torch.autograd.grad(out, (x, y), g), swiglu_bwd(x.detach(), y.detach(), g), strict=True):
        assert torch.equal(a, b)


def test_relu_passes_the_gradient_at_zero(path, device):
    x = torch.tensor([-1.0, 0.0, 1.0], device=device)
    assert relu_bwd(torch.ones(3, device=device), x).tolist() == [0.0, 1.0, 1.0]


def test_empty_and_mismatched(path, device):
    empty = torch.empty(0, 8, device=device)
    assert swiglu(empty, empty).shape == gelu_fwd(empty).shape == (0, 8)
    with pytest.raises(RuntimeError, match="same shape"):
        swiglu(empty, torch.empty(0, 9, device=device))
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(RuntimeError, match="same shape"):
        swiglu_bwd(x, x, x[:2])
    with pytest.raises(RuntimeError, match="bias"):
        bias_gelu(x, x[0, :1])
    with pytest.raises(RuntimeError, match="gradient"):
        gelu_bwd(x[:2], x)


@pytest.mark.parametrize("activation", ["id", "gelu", "gelu_approx", "squared_relu"])
def test_linear_with_activation(path, device, activation):
    x, weight = normal(4, 24, dtype=torch.float32, device=device), normal(32, 24, dtype=torch.float32, device=device)
    bias = normal(32, dtype=torch.float32, device=device)
    act = formulas.ACTIVATIONS.get(activation, lambda t: t)
    out, pre = triton_linear_act(x, weight, bias, activation, save_act_input=True)
    torch.testing.assert_close(pre, F.linear(x, weight, bias))
    torch.testing.assert_close(out, act(pre))
    assert torch.equal(triton_linear_act(x, weight, bias, activation), out)
    leaf = pre.clone().requires_grad_()
    g, second = normal(4, 20, dtype=torch.float32, device=device), normal(20, 32, dtype=torch.float32, device=device)
    (expected,) = torch.autograd.grad(F.linear(act(leaf), second), leaf, g)
    torch.testing.assert_close(triton_dgrad_act(g, second, activation, pre), expected, rtol=1e-5, atol=1e-5)


def test_linear_with_activation_refuses(path, device):
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(4, 8, device=device)
    with pytest.raises(AssertionError, match="activation"):
        triton_linear_act(x, weight, activation="tanh")
    with pytest.raises(AssertionError, match="dtype"):
        triton_linear_act(x, weight.half())
    with pytest.raises(AssertionError, match="needs what entered"):
        triton_dgrad_act(torch.zeros(2, 4, device=device), weight, "gelu")
    assert partial(triton_linear_act, x, weight)().shape == (2, 4)
