"""The raw key/value cache call: append with rotary, then attend, without waiting for the device."""

import torch
from torch import Tensor

from flash_attn._checks import check_rows, deliver
from flash_attn_plus import env, ops
from flash_attn_plus.checks import check_arguments
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionInputs


def _check_cache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, leftpad_k, block_table, num_splits) -> None:
    check_rows(q=q, k_cache=k_cache, v_cache=v_cache)
    if num_splits > 128:
        raise InvalidArgument(f"num_splits > 128 not supported; {num_splits} was passed")
    if block_table is not None:
        if cache_batch_idx is not None:
            raise InvalidArgument("Paged KVcache does not support cache_batch_idx; index block_table instead")
        if leftpad_k is not None:
            raise InvalidArgument("Paged KV and leftpad_k are not supported together; drop one")
    indices = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "cache_leftpad": leftpad_k}
    for name, x in indices.items():
        if x is not None:
            if x.dtype != torch.int32:
                raise InvalidArgument(f"{name} must have dtype int32, not {x.dtype}")
            if x.device != q.device:
                raise InvalidArgument(f"{name} must be on {q.device} like q, but is on {x.device}")
            if x.shape != (q.shape[0],):
                raise InvalidArgument(f"{name} must have shape ({q.shape[0]},), not {tuple(x.shape)}")
            if not x.is_contiguous():
                raise InvalidArgument(f"{name} must be contiguous; call .contiguous() on it")


def _check_append(q, k_cache, v_cache, k, v, cache_seqlens, capacity: int) -> None:
    if v is None:
        raise InvalidArgument("If key is supplied, value must also be passed in")
    if cache_seqlens is None:
        raise InvalidArgument("If key is supplied, seqlens_k must also be passed in (cache_seqlens)")
    if q.shape[1] > capacity:
        raise InvalidArgument(
            f"If key is supplied, it must have seqlen <= the seqlen of the KV cache; q has {q.shape[1]} rows, the cache"
            f" holds {capacity}"
        )
    check_rows(q=q, k=k, v=v)
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.dtype != q.dtype:
            raise InvalidArgument(f"query and {name} must have the same dtype: {name} has {new.dtype}, q has {q.dtype}")
        expected = (q.shape[0], k.shape[1], *cache.shape[-2:])
        if new.shape != expected:
            raise InvalidArgument(f"{name} must have shape {expected}, not {tuple(new.shape)}")


def _check_rotary(q, k, rotary_cos, rotary_sin, capacity: int) -> None:
    if k is None:
        raise InvalidArgument(
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided"
        )
    rotary_dim = 2 * rotary_cos.shape[-1]
    if rotary_dim > q.shape[-1]:
        raise InvalidArgument(f"rotary_dim must be <= headdim; it is {rotary_dim}, headdim is {q.shape[-1]}")
    if rotary_dim % 16 != 0:
        raise InvalidArgument(f"Only rotary dimensions divisible by 16 are currently supported, not {rotary_dim}")
    if rotary_cos.shape[0] < capacity:
        raise InvalidArgument(
            f"cos/sin seqlen must be at least the seqlen of KV cache: {rotary_cos.shape[0]} < {capacity}"
        )
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x.dtype != q.dtype:
            raise InvalidArgument(f"{name} must have the same dtype as query: {x.dtype}, not {q.dtype}")
        if x.shape != rotary_cos.shape:
            raise InvalidArgument(f"{name} must have shape {tuple(rotary_cos.shape)}, not {tuple(x.shape)}")
        if x.device != q.device:
            raise InvalidArgument(f"{name} must be on {q.device} like q, but is on {x.device}")


def _check_capacity(cache_seqlens: Tensor, new: int, capacity: int, is_paged: bool) -> None:
    """Reads lengths, so only where that costs no synchronisation, or in debug mode."""
    if torch.compiler.is_compiling() or not (cache_seqlens.device.type == "cpu" or env.debug()):
        return
    needed = int(cache_seqlens.max()) + new
    what = "block_table has pages" if is_paged else "k_cache has room"
    if needed > capacity:
        raise InvalidArgument(f"{what} for {capacity} keys a sequence, but the appended keys need {needed}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool) -> Tensor:
    """x (b, s, h, d) with its first dimensions turned by the angles of rows `positions`, (b, s) or (b, 1), of cos.

    Pairs are (0, 1), (2, 3), ... when interleaved, else (t, t + rotary_dim / 2); computed in at least float32.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = (t[positions].to(precise).unsqueeze(2) for t in (cos, sin))  # (b, s, 1, rotary_dim / 2)
    turning = x[..., :rotary_dim].to(precise)
    first, second = (turning[..., ::2], turning[..., 1::2]) if is_interleaved else turning.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(turned, -1).flatten(-2) if is_interleaved else torch.cat(turned, -1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), -1)


def _slots(positions: Tensor, page_size: int, cache_batch_idx, block_table) -> tuple[Tensor, Tensor]:
    """Where in the cache's two leading dimensions each of positions (b, s) lies."""
    if block_table is not None:
        return block_table.gather(1, positions // page_size).long(), positions % page_size
    if cache_batch_idx is not None:
        return cache_batch_idx.long()[:, None], positions
    return torch.arange(positions.shape[0], device=positions.device)[:, None], positions


def fwd_kvcache(
    q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table,
    alibi_slopes, out, softmax_scale, is_causal, window_left, window_right, softcap, rotary_interleaved,
    num_splits,
):  # fmt: skip
    """(out, softmax_lse) of q (b, sq, h, d) over the caches, into which k and v, when given, are written first.

    `num_splits` is a hint that does not change the result.
    """
    right = 0 if is_causal else window_right
    is_paged = block_table is not None
    capacity = k_cache.shape[1] * (block_table.shape[1] if is_paged else 1)
    _check_cache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, leftpad_k, block_table, num_splits)
    if k is not None:
        _check_append(q, k_cache, v_cache, k, v, cache_seqlens, capacity)
    elif v is not None:
        raise InvalidArgument("If value is supplied, key must also be passed in")
    if (rotary_cos is None) != (rotary_sin is None):
        raise InvalidArgument("If rotary cos is provided, rotary sin must also be provided, and the other way round")
    if rotary_cos is not None:
        _check_rotary(q, k, rotary_cos, rotary_sin, capacity)
    batch, new = q.shape[0], 0 if k is None else k.shape[1]
    with torch.no_grad():
        lengths = cache_seqlens if k is None else cache_seqlens + new
        table = block_table
        if table is None and cache_batch_idx is not None:
            table = cache_batch_idx[:, None]  # a dense cache is a paged one with one page a sequence
        if table is not None and lengths is None:
            lengths = torch.full((batch,), capacity, dtype=torch.int32, device=q.device)
        keys, values = (k_cache, v_cache) if table is not None else (k_cache[:batch], v_cache[:batch])
        if k is not None:
            asked = AttentionInputs(q, keys, values, softmax_scale, softcap, alibi_slopes=alibi_slopes)
            check_arguments(asked._replace(seqused_k=lengths, block_table=table))  # before anything is written
            _check_capacity(cache_seqlens, new, capacity, is_paged)
            positions = cache_seqlens[:, None] + torch.arange(new, device=q.device)
            if rotary_cos is not None:
                k = rotate(k, rotary_cos, rotary_sin, positions, rotary_interleaved)
                is_banded = 0 <= window_left < capacity or 0 <= right < capacity
                steps = torch.arange(q.shape[1] if is_banded else 1, device=q.device)
                q = rotate(q, rotary_cos, rotary_sin, cache_seqlens[:, None] + steps, rotary_interleaved)
            slots = _slots(positions, k_cache.shape[1], cache_batch_idx, block_table)
            k_cache[slots], v_cache[slots] = k, v
        if leftpad_k is not None and table is not None:  # left padding has no paged form
            keys, values = (x.index_select(0, cache_batch_idx) for x in (k_cache, v_cache))
            table = None
        result, lse = ops.forward(
            q, keys, values, None, None, 0, 0, lengths, leftpad_k, table,
            alibi_slopes, None, 0.0, softmax_scale, window_left, right, softcap,
        )  # fmt: skip
        return deliver(result, out), lse
