"""Activations in one pass: functions with their gradients, and autograd classes; results in the input's dtype."""

import torch

from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.fused.activation import SwiGLU as SwiGLUFunction
from flash_attn_plus.fused.activation import (
    activation_backward,
    activation_forward,
    bias_gradient,
    swiglu_backward,
    swiglu_forward,
)


def bias_gelu(y, bias):
    """GELU (tanh approximation) of y + bias; y (..., n), bias (n,)."""
    return activation_forward(y, "gelu_approx", bias)


def bias_gelu_back(g, y, bias):
    """Gradient of y (and, summed over rows, of bias) in `bias_gelu`, given g at the output."""
    return activation_backward(g, y, "gelu_approx", bias)


class GeLUFunction(torch.autograd.Function):
    """`bias_gelu` of (input, bias), differentiable in both."""

    @staticmethod
    def forward(ctx, input, bias):
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, bias = ctx.saved_tensors
        grad_input = bias_gelu_back(grad_output, input, bias)
        return grad_input, bias_gradient(grad_input, bias)


bias_gelu_impl = GeLUFunction.apply


def gelu_fwd(x):
    """GELU, tanh approximation."""
    return activation_forward(x, "gelu_approx")


def gelu_bwd(g, x):
    """Gradient of `gelu_fwd`."""
    return activation_backward(g, x, "gelu_approx")


class FastGeLUFunction(torch.autograd.Function):
    """`gelu_fwd`, differentiable."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return (gelu_bwd(grad_output, input),)


fast_gelu_impl = FastGeLUFunction.apply


def relu_bwd(g, x):
    """Gradient of ReLU; it passes at x == 0."""
    return activation_backward(g, x, "relu")


def sqrelu_fwd(x):
    """Square of ReLU."""
    return activation_forward(x, "squared_relu")


def sqrelu_bwd(g, x):
    """Gradient of `sqrelu_fwd`."""
    return activation_backward(g, x, "squared_relu")


def swiglu_fwd(x, y):
    """silu(x) * y; x is the gate."""
    return swiglu_forward(x, y)


def swiglu_bwd(x, y, g):
    """Gradients (dx, dy) of `swiglu_fwd`."""
    return swiglu_backward(g, x, y)


swiglu = SwiGLUFunction.apply
