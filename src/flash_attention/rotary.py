"""Rotary position embedding at given positions, differentiable."""

import torch
from torch import Tensor

from flash_attn_plus.fused.rotary import apply_rotary


def rotary_tables(positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (tokens, rotary_dim / 2), of the angles position * base ** (-2 t / rotary_dim).

    They are float32 (float64 for float64) and made anew for each call, so a module keeps no table that a conversion
    could round, a longer sequence outgrow or a checkpoint miss.
    """
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    features = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=kind)
    angles = positions.flatten().to(kind)[:, None] * base ** (-features / rotary_dim)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return apply_rotary(x, cos, sin, interleaved=is_interleaved)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        cos, sin = ctx.saved_tensors
        return apply_rotary(gradient, cos, sin, interleaved=ctx.is_interleaved, conjugate=True), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    """x (..., h, d), its leading dimensions those of the tables' tokens or, repeating the tables, (b, tokens).

    The first rotary_dim features of each head turn, in pairs t and t + rotary_dim / 2, or 2t and 2t + 1.
    """
    if x.shape[-3] == cos.shape[0]:
        return _Rotate.apply(x if x.ndim == 4 else x[None], cos, sin, is_interleaved).view(x.shape)
    tokens = x.reshape(1, cos.shape[0], *x.shape[-2:])
    return _Rotate.apply(tokens, cos, sin, is_interleaved).view(x.shape)
