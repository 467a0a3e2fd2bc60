"""The Triton functions that `flash_attn` exports by name, as they are; None where Triton is not installed."""

from flash_attn_plus.fused.path import HAS_TRITON

if HAS_TRITON:
    from flash_attn_plus.kernels.triton.activation import (
        cosh,
        gelu,
        gelu_approx,
        gelu_approx_grad,
        gelu_grad,
        leaky_relu,
        leaky_relu_grad,
        relu,
        relu_grad,
        squared_relu,
        squared_relu_grad,
        tanh,
    )
    from flash_attn_plus.kernels.triton.cross_entropy import cross_entropy_bwd_kernel, cross_entropy_fwd_kernel
    from flash_attn_plus.kernels.triton.rotary import rotary_kernel
else:
    tanh = cosh = relu = relu_grad = squared_relu = squared_relu_grad = leaky_relu = leaky_relu_grad = None
    gelu = gelu_grad = gelu_approx = gelu_approx_grad = None
    cross_entropy_fwd_kernel = cross_entropy_bwd_kernel = rotary_kernel = None

__all__ = [
    "cosh",
    "cross_entropy_bwd_kernel",
    "cross_entropy_fwd_kernel",
    "gelu",
    "gelu_approx",
    "gelu_approx_grad",
    "gelu_grad",
    "leaky_relu",
    "leaky_relu_grad",
    "relu",
    "relu_grad",
    "rotary_kernel",
    "squared_relu",
    "squared_relu_grad",
    "tanh",
]
