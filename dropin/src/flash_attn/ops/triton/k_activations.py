"""Activations as Triton device functions, to be called from kernels; None where Triton is not installed."""

from enum import Enum

from flash_attn_plus.fused.device_code import (
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


class Activation(str, Enum):
    """Names of the activations."""

    SquaredReLU = "squared_relu"
    GeLU = "gelu"
    GeLUApprox = "gelu_approx"
    LeakyReLU = "leaky_relu"
    ReLU = "relu"


_FORWARD = {
    Activation.ReLU: relu,
    Activation.LeakyReLU: leaky_relu,
    Activation.GeLU: gelu,
    Activation.GeLUApprox: gelu_approx,
    Activation.SquaredReLU: squared_relu,
}
_BACKWARD = {
    Activation.ReLU: relu_grad,
    Activation.LeakyReLU: leaky_relu_grad,
    Activation.GeLU: gelu_grad,
    Activation.GeLUApprox: gelu_approx_grad,
    Activation.SquaredReLU: squared_relu_grad,
}


def get_triton_activation_kernel(activation):
    """The device function of an `Activation`; None for None."""
    return None if activation is None else _FORWARD[activation]


def get_triton_activation_bwd_kernel(activation):
    """The derivative's device function of an `Activation`; None for None."""
    return None if activation is None else _BACKWARD[activation]


__all__ = [
    "Activation",
    "cosh",
    "gelu",
    "gelu_approx",
    "gelu_approx_grad",
    "gelu_grad",
    "get_triton_activation_bwd_kernel",
    "get_triton_activation_kernel",
    "leaky_relu",
    "leaky_relu_grad",
    "relu",
    "relu_grad",
    "squared_relu",
    "squared_relu_grad",
    "tanh",
]
