"""Write new keys and values into a dense or paged cache, the keys (and the queries beside them) turned by position.

One program serves some heads of one token. A token beyond the cache, or on a page that does not exist, is not written.
"""

import triton
import triton.language as tl


@triton.jit
def _turned(
    row_ptrs, is_head, dims, position, angles, cos_ptr, sin_ptr, stride_cos,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows in float32 whose first 2 * HALF features are turned by the angles of a position, HALF = 0: none.

    A position behind the `angles` rows of the tables turns nothing.
    """
    mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(row_ptrs[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        if IS_INTERLEAVED:
            partner, angle, is_first = dims ^ 1, dims // 2, dims % 2 == 0
        else:
            is_first = dims < HALF
            partner, angle = tl.where(is_first, dims + HALF, dims - HALF), dims % HALF
        is_turned = (dims < 2 * HALF) & (position < angles)
        cos = tl.load(cos_ptr + position * stride_cos + angle, mask=is_turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * stride_cos + angle, mask=is_turned, other=0.0).to(tl.float32)
        other = tl.load(row_ptrs[:, None] + partner[None, :], mask=mask & is_turned[None, :], other=0.0).to(tl.float32)
        x = x * cos[None, :] + other * tl.where(is_first, -sin, sin)[None, :]
    return x


@triton.jit
def _narrowed(x, descale_ptr, factor, kind: tl.constexpr, HAS_DESCALE: tl.constexpr):
    """x in the cache's dtype; for 8-bit caches divided by its factor and held within the range of e4m3."""
    if HAS_DESCALE:
        x = x / tl.load(descale_ptr + factor)
    if kind == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(kind)


@triton.jit(
    do_not_specialize=["new", "len_q", "heads", "heads_k", "page_size", "capacity", "pages", "angles", "query_step"],
    do_not_specialize_on_alignment=["seqlens_ptr", "used_ptr", "table_ptr", "k_descale_ptr", "v_descale_ptr"],
)  # fmt: skip
def cache_append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, q_ptr, turned_ptr, cos_ptr, sin_ptr, seqlens_ptr, used_ptr, table_ptr,
    k_descale_ptr, v_descale_ptr,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_cb, stride_cs, stride_ch, stride_wb, stride_ws, stride_wh,
    stride_qb, stride_qs, stride_qh, stride_tb, stride_ts, stride_th, stride_cos, stride_table,
    stride_descale_b, stride_descale_h, new, len_q, heads, heads_k, page_size, capacity, pages, angles,
    query_step, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr, IS_PAGED: tl.constexpr,
    HAS_DESCALE: tl.constexpr,
):  # fmt: skip
    """Cache rows of token t of sequence b at position seqlens[b] + t; used[b] = seqlens[b] + new; turned queries.

    The programs behind those of the new tokens turn queries: query t by the angle of seqlens[b] + t * query_step.
    """
    tokens = new + (len_q if HALF > 0 else 0)
    batch, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    length = tl.load(seqlens_ptr + batch)
    wide = batch.to(tl.int64)
    if (token == 0) & (tl.program_id(1) == 0):
        tl.store(used_ptr + batch, length + new)
    if token < new:
        position = length + token
        is_inside = (position >= 0) & (position < capacity)
        page, slot = wide, position
        if IS_PAGED:
            page = tl.load(table_ptr + wide * stride_table + position // page_size, mask=is_inside, other=-1)
            page, slot = page.to(tl.int64), position % page_size
        is_head = (head < heads_k) & is_inside & (page >= 0) & (page < pages)
        row = k_ptr + wide * stride_kb + token.to(tl.int64) * stride_ks + head * stride_kh
        k = _turned(
            row, is_head, dims, position.to(tl.int64), angles, cos_ptr, sin_ptr, stride_cos,
            HEAD_DIM, HALF, IS_INTERLEAVED,
        )  # fmt: skip
        row = v_ptr + wide * stride_vb + token.to(tl.int64) * stride_vs + head * stride_vh
        is_v = is_head[:, None] & (dims_v < HEAD_DIM_V)[None, :]
        v = tl.load(row[:, None] + dims_v[None, :], mask=is_v, other=0.0)
        factor = wide * stride_descale_b + head[:, None] * stride_descale_h
        factor = tl.where(is_head[:, None], factor, 0)
        k = _narrowed(k, k_descale_ptr, factor, k_cache_ptr.dtype.element_ty, HAS_DESCALE)
        v = _narrowed(v.to(tl.float32), v_descale_ptr, factor, v_cache_ptr.dtype.element_ty, HAS_DESCALE)
        row = k_cache_ptr + page * stride_cb + slot.to(tl.int64) * stride_cs + head * stride_ch
        tl.store(row[:, None] + dims[None, :], k, mask=is_head[:, None] & (dims < HEAD_DIM)[None, :])
        row = v_cache_ptr + page * stride_wb + slot.to(tl.int64) * stride_ws + head * stride_wh
        tl.store(row[:, None] + dims_v[None, :], v, mask=is_v)
    else:
        if HALF > 0:
            query = (token - new).to(tl.int64)
            angle = length + query * query_step
            is_query = head < heads
            source = q_ptr + wide * stride_qb + query * stride_qs + head * stride_qh
            q = _turned(
                source, is_query, dims, angle, angles, cos_ptr, sin_ptr, stride_cos, HEAD_DIM, HALF, IS_INTERLEAVED
            )
            target = turned_ptr + wide * stride_tb + query * stride_ts + head * stride_th
            is_q = is_query[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(target[:, None] + dims[None, :], q.to(turned_ptr.dtype.element_ty), mask=is_q)
