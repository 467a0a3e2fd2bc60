"""The raw key/value cache call, in its positional order."""

from flash_attn._checks import deliver
from flash_attn_plus import kvcache
from flash_attn_plus.cache_checks import CacheCall


def fwd_kvcache(
    q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table,
    alibi_slopes, out, softmax_scale, is_causal, window_left, window_right, softcap, rotary_interleaved,
    num_splits,
):  # fmt: skip
    """(out, softmax_lse) of q (b, sq, h, d) over the caches, into which k and v, when given, are written first."""
    call = CacheCall(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, leftpad_k, block_table,
        alibi_slopes, None, None, softmax_scale, window_left, 0 if is_causal else window_right, softcap,
        rotary_interleaved, num_splits,
    )  # fmt: skip
    result, lse = kvcache.attend(call)
    return deliver(result, out), lse
