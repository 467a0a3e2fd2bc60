"""A linear layer with its activation: PyTorch's matrix multiplication and one fused elementwise pass; no autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.fused.activation import activation_backward, activation_forward


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "id"
) -> tuple[Tensor, Tensor]:
    """(act(x @ weight.T + bias), x @ weight.T + bias).

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), bias: (out_features,); all of one dtype.
        activation: "id", or one of `activation.ACTIVATIONS`.
    """
    assert weight.dtype == x.dtype, f"weight must have the dtype of x: {weight.dtype} is not {x.dtype}"
    assert bias is None or bias.dtype == x.dtype, "bias must have the dtype of x"
    with torch.no_grad():
        pre_activation = F.linear(x, weight, bias)
        if activation == "id":
            return pre_activation, pre_activation
        return activation_forward(pre_activation, activation), pre_activation


def linear_input_gradient(
    dout: Tensor, weight: Tensor, activation: str = "id", pre_activation: Tensor | None = None
) -> Tensor:
    """(dout @ weight) * act'(pre_activation), the gradient of what entered the activation before the linear layer.

    Args:
        dout: (..., out_features); weight: (out_features, in_features); of one dtype.
        pre_activation: (..., in_features), needed unless `activation` is "id".
    """
    assert weight.dtype == dout.dtype, f"weight must have the dtype of dout: {weight.dtype} is not {dout.dtype}"
    with torch.no_grad():
        dx = dout @ weight
        if activation == "id":
            return dx
        assert pre_activation is not None, f"activation {activation!r} needs what entered it"
        return activation_backward(dx, pre_activation, activation)
