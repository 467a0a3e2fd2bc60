"""Rotary position embedding of one tensor, in place or not: the Triton launch and the PyTorch path."""

from functools import cache

import torch
from torch import Tensor

from flash_attn_plus.fused.launch import rotary_block
from flash_attn_plus.fused.path import on_device, uses_triton

MAX_HEAD_DIM = 256
_remembered_block = cache(rotary_block)  # torch.compile warns of caches, so its tracer meets the function itself


def _positions(
    x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> Tensor:  # (s,), (b, s), or (total,) packed
    """Table row of each token; -1 for tokens behind the last packed sequence."""
    tokens = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        return tokens + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    sequence = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
    num_sequences = cu_seqlens.shape[0] - 1
    is_tail = sequence >= num_sequences
    positions = tokens - cu_seqlens[sequence].long()
    if isinstance(seqlen_offsets, Tensor):
        positions = positions + seqlen_offsets[sequence.clamp(max=num_sequences - 1)]
    else:
        positions = positions + seqlen_offsets
    return torch.where(is_tail, -1, positions)


def _apply_torch(x, cos, sin, seqlen_offsets, cu_seqlens, is_interleaved, out, is_conjugate) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = cos.shape[1]
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    is_known = ((positions >= 0) & (positions < cos.shape[0]))[..., None]
    at = positions.clamp(0, max(0, cos.shape[0] - 1))
    cos = torch.where(is_known, cos[at].to(dtype), 1.0)[..., None, :]
    sin = torch.where(is_known, sin[at].to(dtype), 0.0)[..., None, :]
    if is_conjugate:
        sin = -sin
    turned = x[..., : 2 * half].to(dtype)
    x0, x1 = (turned[..., ::2], turned[..., 1::2]) if is_interleaved else (turned[..., :half], turned[..., half:])
    y0, y1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    y = torch.stack((y0, y1), -1).flatten(-2) if is_interleaved else torch.cat((y0, y1), -1)
    out[..., : 2 * half].copy_(y)
    if out is not x:
        out[..., 2 * half :].copy_(x[..., 2 * half :])


def _apply_triton(x, cos, sin, seqlen_offsets, cu_seqlens, is_interleaved, out, is_conjugate) -> None:
    from flash_attn_plus.kernels.triton.rotary import rotary_kernel

    is_packed = cu_seqlens is not None
    batch, (tokens, heads, head_dim) = (1 if is_packed else x.shape[0]), x.shape[-3:]
    half = cos.shape[1]
    rest = 0 if out is x else head_dim - 2 * half
    is_table_of_offsets = isinstance(seqlen_offsets, Tensor)
    num_sequences = cu_seqlens.shape[0] - 1 if is_packed else 0
    is_traced = torch.compiler.is_compiling()
    block = (rotary_block if is_traced else _remembered_block)(heads, half, rest)
    grid = (batch * -(-tokens // block.tokens) * -(-heads // block.heads),)
    tensors = (out, x, cos, sin, seqlen_offsets if is_table_of_offsets else None, cu_seqlens)
    numbers = (
        tokens, heads, cos.shape[0], 0 if is_table_of_offsets else seqlen_offsets,
        num_sequences, num_sequences.bit_length(),
    )  # fmt: skip
    # Strides of a lone batch differ from length to length to no purpose.
    batch_strides = (out.stride(0), x.stride(0)) if batch > 1 else (0, 0)
    constants = (
        batch_strides[0], *out.stride()[-3:-1], batch_strides[1], *x.stride()[-3:-1],
        half, rest, is_interleaved, is_conjugate, *block[:-1],
    )  # fmt: skip
    if is_traced:
        torch.library.wrap_triton(rotary_kernel)[grid](*tensors, *numbers, *constants, num_warps=block.num_warps)
        return
    from flash_attn_plus.backends.triton_relaunch import launch

    with on_device(x):
        launch(rotary_kernel, grid, tensors, numbers, constants, block.num_warps, x.device)


def _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen) -> None:
    assert x.ndim == (4 if cu_seqlens is None else 3), "x must be (b, s, h, d), or (total, h, d) with cu_seqlens"
    assert cu_seqlens is None or max_seqlen is not None, "max_seqlen must be passed together with cu_seqlens"
    seqlen = x.shape[1] if cu_seqlens is None else max_seqlen
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    assert cos.ndim == 2, "cos and sin must have shape (seqlen, rotary_dim / 2)"
    assert cos.shape == sin.shape, "cos and sin must have the same shape"
    assert 2 * cos.shape[1] <= x.shape[-1], "rotary_dim must be at most the head dim"
    assert x.shape[-1] <= MAX_HEAD_DIM, f"head dims up to {MAX_HEAD_DIM} are supported"
    assert cos.shape[0] >= seqlen, f"cos and sin have {cos.shape[0]} rows, but the sequences have up to {seqlen} tokens"
    if isinstance(seqlen_offsets, Tensor):
        assert seqlen_offsets.shape == (batch,), f"seqlen_offsets must have shape ({batch},)"
        assert seqlen_offsets.dtype in (torch.int32, torch.int64), "seqlen_offsets must be int32 or int64"
    else:
        assert seqlen_offsets + seqlen <= cos.shape[0], "seqlen_offsets lead beyond the end of cos and sin"


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first r features of each head by the angles of its token's position; no autograd.

    Args:
        x: (b, s, h, d), or (total, h, d) with `cu_seqlens`; any strides, any float dtype, d <= 256.
        cos, sin: (S, r / 2) tables, r <= d, S at least the longest sequence; their dtype may differ from x's.
        seqlen_offsets: position of the first token, an int or an int32 or int64 (b,) tensor. With a tensor, positions
            beyond the tables are left as they are.
        cu_seqlens: (b + 1,) starts of packed sequences, and the total; needs `max_seqlen`.
        interleaved: pair features 2t and 2t + 1 instead of t and t + r / 2.
        inplace: write into x and return it.
        conjugate: turn by the negative angles, which is the gradient of the rotation.

    Raises:
        AssertionError: shapes, dtypes or offsets disagree.
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    cos, sin = cos.contiguous(), sin.contiguous()
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.contiguous()
    out = x if inplace else torch.empty_like(x)
    if x.numel() > 0:
        run = _apply_triton if uses_triton(x) and x.stride(-1) == 1 else _apply_torch
        with torch.no_grad():
            run(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, out, conjugate)
    return out
