"""Layer norm and RMS norm with residual, dropout, row scale and a second branch in one pass."""

import torch
import torch.nn.functional as F
from torch import nn

from flash_attn_plus.fused.norm import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    backward_into,
    forward_into,
    norm_backward,
    norm_forward,
)
from flash_attn_plus.fused.norm_autograd import NormFunction as LayerNormFn
from flash_attn_plus.fused.norm_autograd import NormLinearFunction as LayerNormLinearFn

_library = torch.library.Library("flash_attn", "FRAGMENT")
for _name, _schema, _implementation in (
    ("layer_norm_fwd_impl", FORWARD_SCHEMA, forward_into),
    ("layer_norm_bwd_impl", BACKWARD_SCHEMA, backward_into),
):
    _library.define(_name + _schema)
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn::{_name}", lambda *_: None, lib=_library)


def maybe_contiguous_lastdim(x):
    """None, or x with adjacent elements along its last dimension."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def maybe_contiguous(x):
    """None, or x in contiguous memory."""
    return x.contiguous() if x is not None else None


def triton_autotune_configs():
    """No configurations: sizes are chosen by rule, so nothing is timed at run time."""
    return []


def _norm_ref(normalise, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm,
              zero_centered_weight, dropout_mask, dropout_mask1, upcast):  # fmt: skip
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1, rowscale = (
            None if t is None else t.float() for t in (x, weight, bias, residual, x1, weight1, bias1, rowscale)
        )
    if zero_centered_weight:
        weight = weight + 1.0
        weight1 = None if weight1 is None else weight1 + 1.0
    assert x1 is None or rowscale is None, "rowscale is not supported together with x1"

    def drop(t, mask):
        if dropout_p == 0.0:
            return t
        return F.dropout(t, p=dropout_p) if mask is None else t.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    if rowscale is not None:
        x = x * rowscale[..., None]
    x = drop(x, dropout_mask)
    if x1 is not None:
        x = x + drop(x1, dropout_mask1)
    if residual is not None:
        x = (x + residual).to(x.dtype)
    outs = [normalise(x, weight, bias).to(dtype)]
    if weight1 is not None:
        outs.append(normalise(x, weight1, bias1).to(dtype))
    if prenorm:
        outs.append(x)
    return outs[0] if len(outs) == 1 else tuple(outs)


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """`layer_norm_fn` in plain PyTorch operations, with given dropout masks (True = kept), in float32 if `upcast`."""

    def normalise(t, w, b):
        return F.layer_norm(t.to(w.dtype), t.shape[-1:], weight=w, bias=b, eps=eps)

    return _norm_ref(
        normalise, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm, zero_centered_weight,
        dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """`rms_norm_fn` in plain PyTorch operations; see `layer_norm_ref`."""

    def normalise(t, w, b):
        normed = t * torch.rsqrt(t.square().mean(dim=-1, keepdim=True) + eps) * w
        return normed if b is None else normed + b

    return _norm_ref(
        normalise, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm, zero_centered_weight,
        dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    dropout_p=0.0,
    rowscale=None,
    out_dtype=None,
    residual_dtype=None,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out=None,
    residual_out=None,
):
    """(y, y1, mean, rstd, t, seeds, dropout_mask, dropout_mask1) of x (rows, features), without autograd."""
    return norm_forward(
        x, weight, bias, eps, residual, x1, weight1, bias1, dropout_p, rowscale, out_dtype, residual_dtype,
        zero_centered_weight, is_rms_norm, return_dropout_mask, out, residual_out,
    )  # fmt: skip


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    dresidual=None,
    dy1=None,
    weight1=None,
    bias1=None,
    seeds=None,
    dropout_p=0.0,
    rowscale=None,
    has_residual=False,
    has_x1=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    x_dtype=None,
    recompute_output=False,
):
    """(dx, dw, db, dresidual_in, dx1, dw1, db1), and y with `recompute_output`; x is t of the forward pass.

    `rstd` says what `eps` was.
    """
    grads = norm_backward(
        dy, x, weight, bias, mean, rstd, dresidual, dy1, weight1, bias1, seeds, dropout_p, rowscale, has_residual,
        has_x1, zero_centered_weight, is_rms_norm, x_dtype, recompute_output,
    )  # fmt: skip
    return grads if recompute_output else grads[:-1]


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """norm(t) * weight + bias with t = dropout(x * rowscale) + dropout(x1) + residual; reductions in float32.

    Args:
        x: (..., n); residual and x1 of the same shape; weight, bias, weight1, bias1: (n,).
        rowscale: (...), not together with x1.
        prenorm: also return t, in the residual's dtype, else float32 if `residual_in_fp32`, else x's dtype.
        weight1: a second output norm(t) * weight1 + bias1.
        zero_centered_weight: the weights are stored minus one.
        return_dropout_mask: append two bool masks (True = kept), None where there is no dropout or no x1.
        out_dtype: of the outputs; default x's. `out` and `residual_out` are buffers to write into.

    Returns:
        y; (y, t) with prenorm; (y, y1) or (y, y1, t) with weight1; then the masks.

    Raises:
        AssertionError: shapes disagree, or rowscale comes with x1.
        RuntimeError: a row is longer than 64 KB.
    """
    return LayerNormFn.apply(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, is_rms_norm, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """`layer_norm_fn` with the root of the mean square in place of mean and variance."""
    return LayerNormFn.apply(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """RMS norm (Zhang and Sennrich, arXiv 1910.07467) with a residual and dropout in front of it."""

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        """Start as the identity scale."""
        (nn.init.zeros_ if self.zero_centered_weight else nn.init.ones_)(self.weight)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """norm(dropout(x) + residual), and that sum too with `prenorm`; dropout in training only."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """linear(norm(x + residual)), and that sum too with `prenorm`; the norm's output is recomputed, not saved."""
    return LayerNormLinearFn.apply(
        x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm
    )
