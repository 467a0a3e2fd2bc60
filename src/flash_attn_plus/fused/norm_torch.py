"""Layer norm and RMS norm in plain PyTorch, forward and backward, filling given outputs; formulas of the kernels."""

import torch
from torch import Tensor

from flash_attn_plus.dropout import COLUMNS_PER_COUNTER, keep_threshold, philox

_WORD = 0xFFFFFFFF


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_keep_mask(seeds: Tensor, cols: int, p: float) -> Tensor:
    """Bool (rows, cols): what dropout keeps, from an int64 seed a row; the bits that the Triton kernels draw."""
    groups = torch.arange(-(-cols // COLUMNS_PER_COUNTER), device=seeds.device)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    seed = seeds[:, None]
    words = philox((groups, zero, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))
    threshold, shape = keep_threshold(p), (seeds.shape[0], groups.shape[0])
    halves = [half.expand(shape) < threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(-2)[:, :cols]


def _drop(value: Tensor, seeds: Tensor | None, p: float, mask: Tensor | None) -> Tensor:
    if seeds is None:
        return value
    keep = row_keep_mask(seeds, value.shape[1], p)
    if mask is not None:
        mask.copy_(keep)
    return torch.where(keep, value / (1.0 - p), 0.0)


def _scale(weight: Tensor, zero_centered_weight: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1.0 if zero_centered_weight else weight.to(dtype)


def norm_forward(
    x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds, eps, dropout_p, zero_centered_weight, is_rms_norm,
    y, y1, t, mean, rstd, mask, mask1,
) -> None:  # fmt: skip
    """Fill y, y1, t, mean, rstd and the masks, each where it is not None; x is (rows, cols)."""
    dtype = accumulation_dtype(x.dtype)
    total = x.to(dtype)
    if rowscale is not None:
        total = total * rowscale.to(dtype)[:, None]
    total = _drop(total, None if seeds is None else seeds[: x.shape[0]], dropout_p, mask)
    if x1 is not None:
        total = total + _drop(x1.to(dtype), None if seeds is None else seeds[x.shape[0] :], dropout_p, mask1)
    if residual is not None:
        total = total + residual.to(dtype)
    if t is not None:
        t.copy_(total)
    if not is_rms_norm:
        average = total.mean(-1, keepdim=True)
        mean.copy_(average[:, 0])
        total = total - average
    inverse = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    rstd.copy_(inverse[:, 0])
    normed = total * inverse
    for out, w, b in ((y, weight, bias), (y1, weight1, bias1)):
        if out is not None:
            affine = normed * _scale(w, zero_centered_weight, dtype)
            out.copy_(affine if b is None else affine + b.to(dtype))


def norm_backward(
    dy, t, weight, bias, dy1, weight1, dt, rowscale, seeds, mean, rstd, dropout_p, zero_centered_weight, is_rms_norm,
    dx, dx1, dresidual, y, dweight, dbias, dweight1, dbias1,
) -> None:  # fmt: skip
    """Fill the gradients, and y again where it is not None, each where it is not None."""
    dtype = accumulation_dtype(t.dtype)
    normed, scale = t.to(dtype), _scale(weight, zero_centered_weight, dtype)
    if not is_rms_norm:
        normed = normed - mean[:, None]
    normed = normed * rstd[:, None]
    if y is not None:
        y.copy_(normed * scale if bias is None else normed * scale + bias.to(dtype))
    gradient = dy.to(dtype)
    dnormed = gradient * scale
    dweight.copy_((gradient * normed).sum(0))
    if dbias is not None:
        dbias.copy_(gradient.sum(0))
    if dy1 is not None:
        gradient = dy1.to(dtype)
        dnormed = dnormed + gradient * _scale(weight1, zero_centered_weight, dtype)
        dweight1.copy_((gradient * normed).sum(0))
        if dbias1 is not None:
            dbias1.copy_(gradient.sum(0))
    total = dnormed - normed * (normed * dnormed).mean(-1, keepdim=True)
    if not is_rms_norm:
        total = total - dnormed.mean(-1, keepdim=True)
    total = total * rstd[:, None]
    if dt is not None:
        total = total + dt.to(dtype)
    if dresidual is not None:
        dresidual.copy_(total)
    if dx1 is not None:
        dx1.copy_(_drop(total, None if seeds is None else seeds[t.shape[0] :], dropout_p, None))
    total = _drop(total, None if seeds is None else seeds[: t.shape[0]], dropout_p, None)
    dx.copy_(total if rowscale is None else total * rowscale.to(dtype)[:, None])
