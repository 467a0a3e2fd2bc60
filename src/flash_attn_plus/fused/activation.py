"""Activations in one pass, with an optional bias, and the gated SwiGLU; float32 inside, the input's dtype outside."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.fused.launch import elementwise_block
from flash_attn_plus.fused.path import on_device, uses_triton

ACTIVATIONS = ("relu", "squared_relu", "leaky_relu", "gelu", "gelu_approx")
_LEAK = 0.01

_library = torch.library.Library("flash_attn_plus", "FRAGMENT")
_library.define("activation_forward(Tensor x, Tensor? bias, str activation) -> Tensor")
_library.define("activation_backward(Tensor dout, Tensor x, Tensor? bias, str activation) -> Tensor")
_library.define("swiglu_forward(Tensor gate, Tensor up) -> Tensor")
_library.define("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)")


def _rows(*tensors: Tensor, is_flat: bool) -> list[Tensor]:
    """The tensors as (rows, cols) with adjacent elements; as one long row where nothing depends on the column."""
    if is_flat and all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    cols = tensors[0].shape[-1]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (x.reshape(-1, cols) for x in tensors)]


def _launch(kernel, x: Tensor, *arguments) -> None:
    """One program a block of columns of one row of x (rows, cols)."""
    block, num_warps = elementwise_block(x.shape[1])
    with on_device(x):
        kernel[(x.shape[0] * -(-x.shape[1] // block),)](*arguments, BLOCK=block, num_warps=num_warps)


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [x.to(dtype) for x in tensors]


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation == "squared_relu":
        return F.relu(x).square()
    if activation == "leaky_relu":
        return F.leaky_relu(x, _LEAK)
    return F.gelu(x, approximate="tanh" if activation == "gelu_approx" else "none")


def _activate_grad(dout: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.where(x >= 0, dout, 0.0)
    if activation == "squared_relu":
        return dout * 2.0 * F.relu(x)
    if activation == "leaky_relu":
        return torch.where(x >= 0, dout, _LEAK * dout)
    approximate = "tanh" if activation == "gelu_approx" else "none"
    return torch.ops.aten.gelu_backward(dout, x, approximate=approximate)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    (wide,) = _wide(x)
    return wide if bias is None else wide + bias.to(wide.dtype)


def _activation_forward(x, bias, activation) -> Tensor:
    if not uses_triton(x) or x.numel() == 0:
        return _activate(_biased(x, bias), activation).to(x.dtype)
    from flash_attn_plus.kernels.triton.activation import activation_forward_kernel

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows,) = _rows(x, is_flat=bias is None)
    _launch(activation_forward_kernel, rows, out, rows, bias, rows.shape[1], rows.stride(0), activation)
    return out


def _activation_backward(dout, x, bias, activation) -> Tensor:
    if not uses_triton(x) or x.numel() == 0:
        biased = _biased(x, bias)
        return _activate_grad(dout.to(biased.dtype), biased, activation).to(x.dtype)
    from flash_attn_plus.kernels.triton.activation import activation_backward_kernel

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, drows = _rows(x, dout, is_flat=bias is None)
    strides = (drows.stride(0), rows.stride(0))
    _launch(activation_backward_kernel, rows, dx, drows, rows, bias, rows.shape[1], *strides, activation)
    return dx


def _swiglu_forward(gate, up) -> Tensor:
    if not uses_triton(gate) or gate.numel() == 0:
        wide_gate, wide_up = _wide(gate, up)
        return (F.silu(wide_gate) * wide_up).to(gate.dtype)
    from flash_attn_plus.kernels.triton.activation import swiglu_forward_kernel

    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _rows(gate, up, is_flat=True)
    _launch(swiglu_forward_kernel, g, out, g, u, g.shape[1], g.stride(0), u.stride(0))
    return out


def _swiglu_backward(dout, gate, up) -> tuple[Tensor, Tensor]:
    if not uses_triton(gate) or gate.numel() == 0:
        d, g, u = _wide(dout, gate, up)
        s = torch.sigmoid(g)
        return (d * u * s * (1.0 + g * (1.0 - s))).to(gate.dtype), (d * g * s).to(up.dtype)
    from flash_attn_plus.kernels.triton.activation import swiglu_backward_kernel

    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    d, g, u = _rows(dout, gate, up, is_flat=True)
    strides = (d.stride(0), g.stride(0), u.stride(0))
    _launch(swiglu_backward_kernel, g, dgate, dup, d, g, u, g.shape[1], *strides)
    return dgate, dup


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


for _name, _implementation, _fake in (
    ("activation_forward", _activation_forward, lambda x, bias, activation: _like(x)),
    ("activation_backward", _activation_backward, lambda dout, x, bias, activation: _like(x)),
    ("swiglu_forward", _swiglu_forward, lambda gate, up: _like(gate)),
    ("swiglu_backward", _swiglu_backward, lambda dout, gate, up: (_like(gate), _like(up))),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_plus::{_name}", _fake, lib=_library)


def _check(x: Tensor, activation: str, bias: Tensor | None, dout: Tensor | None = None) -> None:
    if activation not in ACTIVATIONS:
        raise InvalidArgument(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise InvalidArgument(f"bias must have shape {tuple(x.shape[-1:])}, not {tuple(bias.shape)}")
    if dout is not None and dout.shape != x.shape:
        raise InvalidArgument(f"the gradient must have the shape of x, {tuple(x.shape)}, not {tuple(dout.shape)}")


def activation_forward(x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """act(x + bias) in x's dtype, contiguous; not differentiable. `bias` is (x.shape[-1],)."""
    _check(x, activation, bias)
    return torch.ops.flash_attn_plus.activation_forward(x, None if bias is None else bias.contiguous(), activation)


def activation_backward(dout: Tensor, x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """dout * act'(x + bias) in x's dtype, contiguous; relu and leaky_relu pass the gradient at 0."""
    _check(x, activation, bias, dout)
    bias = None if bias is None else bias.contiguous()
    return torch.ops.flash_attn_plus.activation_backward(dout, x, bias, activation)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype, contiguous; not differentiable."""
    if gate.shape != up.shape:
        raise InvalidArgument(f"gate and up must have the same shape, not {tuple(gate.shape)} and {tuple(up.shape)}")
    return torch.ops.flash_attn_plus.swiglu_forward(gate, up)


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous."""
    if not gate.shape == up.shape == dout.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (gate, up, dout))
        raise InvalidArgument(f"gate, up and their gradient must have the same shape, not {shapes}")
    return torch.ops.flash_attn_plus.swiglu_backward(dout, gate, up)


def bias_gradient(dx: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias (n,) from that of the sum (..., n) it went into."""
    return dx.reshape(-1, dx.shape[-1]).sum(0).to(bias.dtype)


class BiasActivation(torch.autograd.Function):
    """act(x + bias), differentiable in both; bias may be None."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return activation_forward(x, activation, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        dx = activation_backward(dout, x, ctx.activation, bias)
        return dx, None if bias is None else bias_gradient(dx, bias), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, differentiable in both."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(dout, *ctx.saved_tensors)
