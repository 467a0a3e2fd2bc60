"""The differentiable norms: one autograd function for the norm, one for the norm followed by a linear layer."""

import torch
from torch import Tensor

from flash_attn_plus.arguments import autocast_dtype
from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.fused.norm import norm_backward, norm_forward, rows_of


def _check_shapes(x: Tensor, residual: Tensor | None, x1: Tensor | None, rowscale: Tensor | None) -> None:
    assert residual is None or residual.shape == x.shape, "residual must have the shape of x"
    assert x1 is None or x1.shape == x.shape, "x1 must have the shape of x"
    assert x1 is None or rowscale is None, "rowscale is not supported together with x1"
    assert rowscale is None or rowscale.shape == x.shape[:-1], "rowscale must have the shape of x without features"


def _packed(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters with adjacent elements, as the kernels read them."""
    return [None if p is None else p.contiguous() for p in parameters]


def _buffer(name: str, buffer: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A caller's buffer as (rows, cols), which must be its own memory."""
    if buffer is None or len(shape) == 2:
        return buffer
    try:
        return buffer.view(-1, shape[-1]) if buffer.shape == shape else buffer
    except RuntimeError:
        raise InvalidArgument(
            f"{name} must be viewable as rows: its strides {buffer.stride()} are not; pass a contiguous buffer"
        ) from None


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both begin at the same address, which a tracer's tensors do not have."""
    return not torch.compiler.is_compiling() and a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _shaped(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    return x if x is None or len(shape) == 2 else x.reshape(shape)


class NormFunction(torch.autograd.Function):
    """norm(dropout(x * rowscale) + dropout(x1) + residual) and what else the flags ask for."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
        rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False,
        return_dropout_mask=False, out_dtype=None, out=None, residual_out=None,
    ):  # fmt: skip
        _check_shapes(x, residual, x1, rowscale)
        shape, cols = x.shape, x.shape[-1]
        flat = rows_of(x, cols)
        rowscale = None if rowscale is None else rowscale.reshape(-1)
        weight, bias, weight1, bias1, rowscale = _packed(weight, bias, weight1, bias1, rowscale)
        y, y1, mean, rstd, t, seeds, mask, mask1 = norm_forward(
            flat, weight, bias, eps, rows_of(residual, cols), rows_of(x1, cols), weight1, bias1, dropout_p, rowscale,
            out_dtype,
            torch.float32 if residual_in_fp32 else None, zero_centered_weight, is_rms_norm, return_dropout_mask,
            _buffer("out", out, shape), _buffer("residual_out", residual_out, shape),
        )  # fmt: skip
        if out is not None and any(ctx.needs_input_grad) and _share_memory(y, t):
            raise InvalidArgument("out must not be the memory of x or residual_out, which the backward pass reads")
        ctx.save_for_backward(t, weight, bias, weight1, bias1, rowscale, seeds, mean, rstd)
        ctx.shape, ctx.x_dtype, ctx.dropout_p = shape, x.dtype, dropout_p
        ctx.flags = (residual is not None, x1 is not None, zero_centered_weight, is_rms_norm)
        ctx.has_y1, ctx.prenorm = y1 is not None, prenorm
        results = [_shaped(y, shape)]
        if y1 is not None:
            results.append(_shaped(y1, shape))
        if prenorm:
            results.append(x if t is flat else _shaped(t, shape))
        if return_dropout_mask:
            results += [_shaped(mask, shape), _shaped(mask1, shape)]
            ctx.mark_non_differentiable(*(m for m in results[-2:] if m is not None))
        return results[0] if len(results) == 1 else tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *more):
        t, weight, bias, weight1, bias1, rowscale, seeds, mean, rstd = ctx.saved_tensors
        cols = ctx.shape[-1]
        has_residual, has_x1, zero_centered_weight, is_rms_norm = ctx.flags
        dy1 = rows_of(more[0], cols) if ctx.has_y1 else None
        dt = rows_of(more[int(ctx.has_y1)], cols) if ctx.prenorm else None
        dx, dweight, dbias, dresidual, dx1, dweight1, dbias1, _ = norm_backward(
            rows_of(dy, cols), t, weight, bias, mean, rstd, dt, dy1, weight1, bias1, seeds, ctx.dropout_p,
            rowscale, has_residual, has_x1, zero_centered_weight, is_rms_norm, ctx.x_dtype,
        )  # fmt: skip
        dx, dresidual, dx1 = (_shaped(g, ctx.shape) for g in (dx, dresidual, dx1))
        return dx, dweight, dbias, dresidual, dx1, dweight1, dbias1, *[None] * 11


class NormLinearFunction(torch.autograd.Function):
    """linear(norm(x + residual)): the norm's output is not saved but computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx, x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6, prenorm=False,
        residual_in_fp32=False, is_rms_norm=False,
    ):  # fmt: skip
        _check_shapes(x, residual, None, None)
        shape, cols = x.shape, x.shape[-1]
        dtype = autocast_dtype(x.device)
        flat = rows_of(x, cols)
        norm_weight, norm_bias = _packed(norm_weight, norm_bias)
        y, _, mean, rstd, t, *_ = norm_forward(
            flat, norm_weight, norm_bias, eps, rows_of(residual, cols), out_dtype=dtype,
            residual_dtype=torch.float32 if residual_in_fp32 else None, is_rms_norm=is_rms_norm,
        )  # fmt: skip
        ctx.weight_dtypes = linear_weight.dtype, None if linear_bias is None else linear_bias.dtype
        ctx.y_dtype = y.dtype
        weight = linear_weight.to(y.dtype)
        bias = None if linear_bias is None else linear_bias.to(y.dtype)
        out = torch.nn.functional.linear(y.reshape(shape), weight, bias)
        ctx.save_for_backward(t, norm_weight, norm_bias, weight, mean, rstd)
        ctx.shape, ctx.x_dtype = shape, x.dtype
        ctx.flags = (residual is not None, is_rms_norm, prenorm)
        if not prenorm:
            return out
        return out, x if t is flat else t.reshape(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *more):
        t, norm_weight, norm_bias, weight, mean, rstd = ctx.saved_tensors
        has_residual, is_rms_norm, prenorm = ctx.flags
        cols = ctx.shape[-1]
        dout = dout.reshape(-1, dout.shape[-1]).to(ctx.y_dtype)
        dy = dout @ weight
        dx, dweight, dbias, dresidual, *_, y = norm_backward(
            dy, t, norm_weight, norm_bias, mean, rstd, rows_of(more[0], cols) if prenorm else None,
            has_residual=has_residual, is_rms_norm=is_rms_norm, x_dtype=ctx.x_dtype, recompute_output=True,
        )  # fmt: skip
        weight_dtype, bias_dtype = ctx.weight_dtypes
        dlinear_weight = (dout.t() @ y).to(weight_dtype)
        dlinear_bias = None if bias_dtype is None else dout.sum(0).to(bias_dtype)
        dresidual = _shaped(dresidual, ctx.shape)
        return _shaped(dx, ctx.shape), dweight, dbias, dlinear_weight, dlinear_bias, dresidual, *[None] * 5
