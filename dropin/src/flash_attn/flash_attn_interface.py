"""The functions of flash-attn over the engine of FlashAttention-Plus.

The public functions take any head dim up to flash_attn_plus.problem.MAX_HEAD_DIM, any device, float32 and (on CPU)
float64 beyond the original's float16 and bfloat16, and follow autocast. Query head i reads key head i // (h // hk).
"""

import torch

import flash_attn._raw as flash_attn_gpu
from flash_attn._autograd import (
    DENSE,
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
    attend,
)
from flash_attn._ops import (
    _flash_attn_backward,
    _flash_attn_backward_fake,
    _flash_attn_forward,
    _flash_attn_forward_fake,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_backward_fake,
    _flash_attn_varlen_forward,
    _flash_attn_varlen_forward_fake,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
)
from flash_attn._softmax_dump import _get_block_size_n, round_multiple
from flash_attn_plus.arguments import as_integer, as_number, autocast_dtype, resolve_scale, window_bounds
from flash_attn_plus.dispatch import apply
from flash_attn_plus.functional import autocast, separate
from flash_attn_plus.kvcache import lengths_of

USE_TRITON_ROCM = False  # callers read it to skip what the original's AMD backend lacks; nothing is lacking here

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_backward_fake",
    "_flash_attn_forward",
    "_flash_attn_forward_fake",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_backward_fake",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_forward_fake",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q over k and v.

    Args:
        q: (b, sq, h, d).
        k, v: (b, sk, hk, d) with h % hk == 0; v may have a head dim of its own.
        dropout_p: probability to drop an attention weight, in [0, 1); 0 at evaluation.
        softmax_scale: factor on q k^T; default d ** -0.5.
        causal: query i sees keys up to i + sk - sq (the mask is aligned to the bottom-right corner).
        window_size: (left, right), keys visible beside the diagonal, inclusive; -1 is unbounded. `causal` sets right
            to 0.
        softcap: when positive, scores become softcap * tanh(score / softcap); not together with dropout.
        alibi_slopes: float32 (h,) or (b, h); adds -slope * |i + sk - sq - j| to the scores.
        deterministic: make the gradients bitwise repeatable (by our kernels dk and dv always are).
        return_attn_probs: return (out, softmax_lse, S_dmask) instead of out. No gradient flows through the other two.

    Returns:
        out (b, sq, h, d), 0 in rows that see no key.
        softmax_lse, float32 (b, h, sq): natural log-sum-exp of the scores, +inf in rows that see no key.
        S_dmask: with dropout (b, h, sq and sk rounded up to 128), else empty; its sign bit says "dropped", its
            magnitude is exp(score - running maximum), taken from the last key block to the first over blocks of
            `_get_block_size_n` keys. For tests.

    Raises:
        RuntimeError: an argument breaks the contract; the message names it and the remedy.
    """
    q, k, v = autocast(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if k is q or v is q or v is k:
            k, v = separate(k, v)
        return apply(
            FlashAttnFunc, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, True,
        )  # fmt: skip
    return attend(
        "q_k_v", (q, k, v), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of q (b, sq, h, d) and kv (b, sk, 2, hk, d); the gradient of kv is one contiguous tensor."""
    q, kv = autocast(q, kv)
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        return FlashAttnKVPackedFunc.apply(
            q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, True,
        )  # fmt: skip
    return attend(
        "q_kv", (q, kv), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of qkv (b, s, 3, h, d); the gradient of qkv is one contiguous tensor."""
    (qkv,) = autocast(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return FlashAttnQKVPackedFunc.apply(
            qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, True,
        )  # fmt: skip
    return attend(
        "qkv", (qkv,), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention of packed sequences of different lengths.

    Args:
        q: (total_q, h, d), the sequences one after another.
        k, v: (total_k, hk, d), or with block_table (pages, page_size, hk, d).
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), where each sequence starts, and the total.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, or more; int or 0-dim tensor.
        block_table: int32 (b, max_blocks), the pages of each sequence, of any page size; forward only.
        The other arguments are those of `flash_attn_func`.

    Returns:
        out (total_q, h, d); rows behind the last sequence are undefined.
        softmax_lse, float32 (h, total_q), and S_dmask (b, h, max_seqlen_q and max_seqlen_k rounded up to 128), as
        `flash_attn_func` returns them.
    """
    q, k, v = autocast(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if k is q or v is q or v is k:
            k, v = separate(k, v)
        if cu_seqlens_k is cu_seqlens_q:
            (cu_seqlens_k,) = separate(cu_seqlens_k)
        return apply(
            FlashAttnVarlenFunc, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table,
            True,
        )  # fmt: skip
    return attend(
        "q_k_v", (q, k, v), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, return_attn_probs, block_table,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of q (total_q, h, d) and kv (total_k, 2, hk, d)."""
    q, kv = autocast(q, kv)
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        if cu_seqlens_k is cu_seqlens_q:
            (cu_seqlens_k,) = separate(cu_seqlens_k)
        return FlashAttnVarlenKVPackedFunc.apply(
            q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_attn_probs, True,
        )  # fmt: skip
    return attend(
        "q_kv", (q, kv), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of qkv (total, 3, h, d), every sequence attending to itself."""
    (qkv,) = autocast(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return FlashAttnVarlenQKVPackedFunc.apply(
            qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, True,
        )  # fmt: skip
    return attend(
        "qkv", (qkv,), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention over a key/value cache, into which new keys and values are written first. No gradients.

    Args:
        q: (b, sq, h, d).
        k_cache, v_cache: (b_cache, capacity, hk, d), or with block_table (pages, page_size, hk, d), of any page size;
            written in place. The last stride must be 1, the others are free.
        k, v: (b, new, hk, d), written at positions cache_seqlens to cache_seqlens + new - 1, then attended to.
            Sequences that share rows or pages must not count on what another one appends in the same call.
        rotary_cos, rotary_sin: (at least capacity, rotary_dim / 2), in q's dtype, rotary_dim a multiple of 16. New
            key t turns by the angle of position cache_seqlens + t; so does query t under a causal or local mask,
            while without one every query turns by that of cache_seqlens.
        cache_seqlens: int, or int32 (b,): keys already present, left padding included; default all of the cache.
        cache_batch_idx: int32 (b,), the row of the cache that each sequence uses; not with block_table.
        cache_leftpad: int32 (b,), index of the first valid key; not with block_table.
        block_table: int32 (b, max_blocks), the pages of each sequence.
        rotary_interleaved: turn pairs (0, 1), (2, 3), ... instead of (t, t + rotary_dim / 2).
        num_splits: programs that share the keys of one sequence, at most 128; 0: as many as fill the device.
        return_softmax_lse: return (out, softmax_lse).
        The other arguments are those of `flash_attn_func`.

    Returns:
        out (b, sq, h, d), and softmax_lse, float32 (b, h, sq).

    Raises:
        AssertionError: a cache's last stride is not 1.
        RuntimeError: an argument breaks the contract. Lengths beyond the capacity are seen on CPU and with
            FLASH_ATTENTION_DEBUG=1, since reading them from a GPU would wait for it.
    """
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    if autocast_dtype(q.device) is not None:  # the caches are written in place, so all follow their dtype
        q, k, v, rotary_cos, rotary_sin = (
            x if x is None else x.to(k_cache.dtype) for x in (q, k, v, rotary_cos, rotary_sin)
        )
    if k is not None or block_table is not None:
        k, v, rotary_cos, rotary_sin, block_table = map(maybe_contiguous, (k, v, rotary_cos, rotary_sin, block_table))
    left, right = window_bounds(window_size, causal)
    out, lse = flash_attn_gpu.fwd_kvcache(
        maybe_contiguous(q),
        k_cache,
        v_cache,
        k,
        v,
        lengths_of(cache_seqlens, q),
        rotary_cos,
        rotary_sin,
        maybe_contiguous(cache_batch_idx),
        cache_leftpad,
        block_table,
        alibi_slopes,
        None,
        resolve_scale(softmax_scale, q),
        causal,
        left,
        right,
        as_number("softcap", softcap),
        rotary_interleaved,
        as_integer("num_splits", num_splits),
    )
    return (out, lse) if return_softmax_lse else out
