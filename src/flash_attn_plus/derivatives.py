"""Derivatives that the operators do not have: an error where PyTorch would go on with zeros or constants."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn_plus.errors import InvalidArgument

_REMEDY = (
    "torch.nn.functional.scaled_dot_product_attention has it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


class _Last(torch.autograd.Function):
    """A copy whose backward pass says that there is none; it depends on `sources`, so that it is asked."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *sources: Tensor):
        return gradient.clone()

    @staticmethod
    def backward(ctx, *_):
        raise InvalidArgument(f"this function has no second derivative; for attention, {_REMEDY}")


def once_differentiable(backward: Callable) -> Callable:
    """A backward pass whose results, under create_graph=True, refuse to be differentiated.

    PyTorch's own decorator lets them pass for constants where the incoming gradient is one, as that of a sum is, so
    that a penalty on gradients would silently train nothing.
    """

    @wraps(backward)
    def run(ctx, *gradients):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        sources = [x for x in (*ctx.saved_tensors, *gradients) if isinstance(x, Tensor) and x.requires_grad]
        return tuple(None if x is None else _Last.apply(x, *sources) for x in results)

    return run


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise InvalidArgument under forward-mode differentiation of these tensors: their tangents would be lost."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise InvalidArgument(
            "attention has no forward-mode derivative (jvp, jacfwd, dual tensors); differentiate in reverse mode, or"
            f" {_REMEDY}"
        )
