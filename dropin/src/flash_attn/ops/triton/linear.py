"""A linear layer with its activation, without autograd."""

from flash_attn_plus.fused.linear import linear_activation, linear_input_gradient

_ACTIVATIONS = ("id", "gelu", "gelu_approx", "squared_relu")


def _check(activation):
    assert activation in _ACTIVATIONS, f"activation must be one of {', '.join(_ACTIVATIONS)}, not {activation!r}"


def triton_linear_act(x, weight, bias=None, activation="id", save_act_input=False):
    """act(x @ weight.T + bias), all of one dtype; with `save_act_input` also what entered the activation."""
    _check(activation)
    out, pre_activation = linear_activation(x, weight, bias, activation)
    return (out, pre_activation) if save_act_input else out


def triton_dgrad_act(grad_output, weight, activation="id", act_input=None):
    """(grad_output @ weight) * act'(act_input)."""
    _check(activation)
    return linear_input_gradient(grad_output, weight, activation, act_input)
