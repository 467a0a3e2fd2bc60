"""Activations with their derivatives as device functions, and elementwise kernels over rows built from them."""

import triton
import triton.language as tl

_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)
_LEAK: tl.constexpr = tl.constexpr(0.01)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def cosh(x):
    exp_x = tl.exp(x)
    return (exp_x + 1.0 / exp_x) * 0.5


@triton.jit
def relu(x):
    return tl.where(x >= 0, x, 0.0)


@triton.jit
def relu_grad(x):
    return tl.where(x >= 0, 1.0, 0.0)


@triton.jit
def squared_relu(x):
    return relu(x) * relu(x)


@triton.jit
def squared_relu_grad(x):
    return 2.0 * relu(x)


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, _LEAK * x)


@triton.jit
def leaky_relu_grad(x):
    return tl.where(x >= 0, 1.0, _LEAK)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_grad(x):
    return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_approx(x):
    return x * tl.sigmoid(2.0 * _SQRT_2_OVER_PI * x * (1.0 + _CUBIC * x * x))


@triton.jit
def gelu_approx_grad(x):
    u = 2.0 * _SQRT_2_OVER_PI * x * (1.0 + _CUBIC * x * x)
    s = tl.sigmoid(u)
    return s + x * s * tl.sigmoid(-u) * 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name."""
    if ACTIVATION == "gelu":
        return gelu(x)
    elif ACTIVATION == "gelu_approx":
        return gelu_approx(x)
    elif ACTIVATION == "squared_relu":
        return squared_relu(x)
    elif ACTIVATION == "leaky_relu":
        return leaky_relu(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return relu(x)


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation of that name."""
    if ACTIVATION == "gelu":
        return gelu_grad(x)
    elif ACTIVATION == "gelu_approx":
        return gelu_approx_grad(x)
    elif ACTIVATION == "squared_relu":
        return squared_relu_grad(x)
    elif ACTIVATION == "leaky_relu":
        return leaky_relu_grad(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return relu_grad(x)


@triton.jit
def _tile(num_cols, BLOCK: tl.constexpr):
    """(row, columns, which columns exist) of this program; 64-bit, since a flat tensor is one row."""
    blocks = tl.cdiv(num_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, cols, cols < num_cols


@triton.jit
def activation_forward_kernel(
    out_ptr, x_ptr, bias_ptr, num_cols, x_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """out = act(x + bias); out is contiguous."""
    row, cols, inside = _tile(num_cols, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    out = activate(x, ACTIVATION).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_cols + cols, out, mask=inside)


@triton.jit
def activation_backward_kernel(
    dx_ptr, dout_ptr, x_ptr, bias_ptr, num_cols, dout_stride, x_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dout * act'(x + bias); dx is contiguous."""
    row, cols, inside = _tile(num_cols, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * dout_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dx = (dout * activate_grad(x, ACTIVATION)).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + row * num_cols + cols, dx, mask=inside)


@triton.jit
def swiglu_forward_kernel(out_ptr, gate_ptr, up_ptr, num_cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    """out = silu(gate) * up; out is contiguous."""
    row, cols, inside = _tile(num_cols, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_cols + cols, out, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dgate_ptr, dup_ptr, dout_ptr, gate_ptr, up_ptr, num_cols, dout_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    """dgate and dup are contiguous."""
    row, cols, inside = _tile(num_cols, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * dout_stride + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dout * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + row * num_cols + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * num_cols + cols, (dout * gate * s).to(dup_ptr.dtype.element_ty), mask=inside)
