"""Append keys and values to a cache in place, turned by position: one Triton kernel, or PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.cache_checks import CacheCall
from flash_attn_plus.fused.path import on_device, uses_triton
from flash_attn_plus.tuning.config import power_of_two

E4M3_MAX = 448.0


class Appended(NamedTuple):
    """What attention goes on with."""

    q: Tensor  # turned, when the call has rotary tables
    used: Tensor  # int32 (b,): keys of each sequence, the new ones included


def plan(c: CacheCall) -> Callable[[CacheCall, Tensor | None], Appended]:
    """What appends the new keys and values of calls like this one.

    It is given the call and its page table (int32 (b, pages a sequence), or None). New key t turns by the angle of
    cache_seqlens + t; so does query t under a window or causal mask, while without one every query turns by that of
    cache_seqlens.
    """
    return TritonAppend(c.q) if uses_triton(c.q) else _append_torch


def _is_banded(c: CacheCall) -> bool:
    """Whether the mask's bounds lie within the cache: what decides how queries are turned."""
    return 0 <= c.left < c.capacity or 0 <= c.right < c.capacity


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool) -> Tensor:
    """x (b, s, h, d) with its first dimensions turned by the angles of rows `positions`, (b, s) or (b, 1), of cos.

    Pairs are (0, 1), (2, 3), ... when interleaved, else (t, t + rotary_dim / 2); computed in at least float32.
    Positions beyond the tables are left as they are.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    rotary_dim = 2 * cos.shape[-1]
    is_known = (positions < cos.shape[0])[..., None, None]
    at = positions.clamp(max=cos.shape[0] - 1)
    cos = torch.where(is_known, cos[at].to(precise).unsqueeze(2), 1.0)  # (b, s, 1, rotary_dim / 2)
    sin = torch.where(is_known, sin[at].to(precise).unsqueeze(2), 0.0)
    turning = x[..., :rotary_dim].to(precise)
    first, second = (turning[..., ::2], turning[..., 1::2]) if is_interleaved else turning.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(turned, -1).flatten(-2) if is_interleaved else torch.cat(turned, -1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), -1)


def _narrowed(x: Tensor, cache: Tensor, descale: Tensor | None) -> Tensor:
    """New rows in the cache's dtype."""
    if cache.dtype == x.dtype:
        return x
    if descale is not None:
        x = x.float() / by_head(descale)
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype)


def by_head(descale: Tensor) -> Tensor:
    """A factor that is one number, one a head or one a sequence and head, to multiply (b, s, hk, d) with."""
    if descale.numel() == 1:
        return descale.reshape(())
    return descale[:, None, :, None] if descale.ndim == 2 else descale[:, None]


def _append_torch(c: CacheCall, table: Tensor | None) -> Appended:
    q, k, v, lengths = c.q, c.k, c.v, c.cache_seqlens
    assert k is not None
    assert v is not None
    assert lengths is not None
    positions = lengths[:, None] + torch.arange(c.new, device=q.device)
    if c.rotary_cos is not None and c.rotary_sin is not None:
        steps = torch.arange(q.shape[1] if _is_banded(c) else 1, device=q.device)
        k = rotate(k, c.rotary_cos, c.rotary_sin, positions, c.rotary_interleaved)
        q = rotate(q, c.rotary_cos, c.rotary_sin, lengths[:, None] + steps, c.rotary_interleaved)
    if table is None:
        rows, slots = torch.arange(q.shape[0], device=q.device)[:, None], positions
    else:
        size = c.k_cache.shape[1]
        rows, slots = table.gather(1, positions // size).long(), positions % size
    c.k_cache[rows, slots] = _narrowed(k, c.k_cache, c.k_descale)
    c.v_cache[rows, slots] = _narrowed(v, c.v_cache, c.v_descale)
    return Appended(q, lengths + c.new)


class TritonAppend:
    """The launch of calls that share shapes, strides and numbers."""

    def __init__(self, q: Tensor):
        from flash_attn_plus.backends import triton_replay

        self._replaying = triton_replay
        self._index = q.device.index if q.device.type == "cuda" else None
        self._replay: Callable[..., None] | None = None

    def __call__(self, c: CacheCall, table: Tensor | None) -> Appended:
        assert c.cache_seqlens is not None
        turned = c.q if c.rotary_cos is None else torch.empty_like(c.q)
        used = torch.empty_like(c.cache_seqlens)
        tensors = (
            c.k, c.v, c.k_cache, c.v_cache, c.q, turned, c.rotary_cos, c.rotary_sin, c.cache_seqlens, used, table,
            c.k_descale, c.v_descale,
        )  # fmt: skip
        if self._replay is not None and self._index == torch.cuda.current_device() and self._replaying.may_replay():
            addresses = self._replaying.addresses(tensors)
            if not any(at & 15 for at in addresses[:8] if at):  # the rest may start anywhere
                self._replay(*addresses)
                return Appended(turned, used)
        with on_device(c.q):
            self._launch(c, tensors)
        return Appended(turned, used)

    def _launch(self, c: CacheCall, tensors: tuple) -> None:
        from flash_attn_plus.backends.triton_decode import descale_strides
        from flash_attn_plus.kernels.triton.cache_append import cache_append_kernel

        k, v, k_cache, v_cache, q, turned, *_, table, descale, _ = tensors
        heads, heads_k, d, dv = q.shape[2], k_cache.shape[2], q.shape[3], v.shape[3]
        angles, half = (0, 0) if c.rotary_cos is None else c.rotary_cos.shape
        tokens, most_heads = (c.new + q.shape[1], heads) if half else (c.new, heads_k)
        block_d, block_dv = power_of_two(d), power_of_two(dv)
        block_h = min(power_of_two(most_heads), max(1, 4096 // max(block_d, block_dv)))
        grid = (q.shape[0] * tokens, -(-most_heads // block_h))
        strides = (x.stride()[:3] for x in (k, v, k_cache, v_cache, q, turned))
        tail = (
            *(n for triple in strides for n in triple), half, 0 if table is None else table.stride(0),
            *descale_strides(descale), c.new, q.shape[1], heads, heads_k, k_cache.shape[1], c.capacity,
            k_cache.shape[0], angles, int(_is_banded(c)), d, dv, block_d, block_dv, block_h, half, c.rotary_interleaved,
            table is not None, descale is not None,
        )  # fmt: skip
        compiled = cache_append_kernel[grid](*tensors, *tail, num_warps=4)
        self._replay = self._replaying.record(compiled, grid, tail, tensors, q.device)
