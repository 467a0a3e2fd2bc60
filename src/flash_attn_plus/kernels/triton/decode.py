"""Few queries against many keys: the keys of a sequence are split over programs, whose results are combined.

The queries of all heads that share keys are the rows of one tile, so that keys and values are read once
(Flash-Decoding, Dao et al. 2023, with grouped heads).
"""

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import mask, score, sequence, softmax
from flash_attn_plus.kernels.triton.call import Band, Rule


@triton.jit
def _key_pointers(
    base, col0, cols, pages, page_size, stride_page, stride_row, dims, F: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Pointers of the keys [col0, col0 + BLOCK_N); `cols` counts from col0, `pages` are those of the keys.

    PAGE_SIZE is 0 where no tile spans two pages: then there is one page a tile.
    """
    if F.is_paged and PAGE_SIZE > 0:
        slots = (col0 + cols) % PAGE_SIZE
        return base + pages.to(tl.int64) * stride_page + slots.to(tl.int64) * stride_row + dims
    else:
        if F.is_paged:
            base += pages.to(tl.int64) * stride_page
            col0 = col0 % page_size
        return sequence.tile(base, col0, cols, stride_row, dims)


@triton.jit
def _pages(table_ptr, col0, cols, page_size, len_k, F: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The pages of the keys [col0, col0 + BLOCK_N): loaded a tile ahead, so that no key waits for its page."""
    if F.is_paged and PAGE_SIZE > 0:
        return tl.load(table_ptr + (col0 + cols) // PAGE_SIZE, mask=col0 + cols < len_k, other=0)
    else:
        if F.is_paged:
            return tl.load(table_ptr + col0 // page_size, mask=col0 < len_k, other=0)
        else:
            return col0


@triton.jit
def _as_float16(q):
    """(rows of q as float16, the powers of two they were divided by): 8-bit keys become float16 in one instruction."""
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 1)
    factor = tl.exp2(tl.ceil(tl.log2(tl.where(largest > 0.0, largest, 1.0))))
    return (q / factor[:, None]).to(tl.float16), factor


@triton.jit
def _unpacked(pairs):
    """The two e4m3 numbers of each int16, over 256, as float16: their bits moved into place, subnormals included.

    Products want values turned by rows, which the hardware does for 16 bits at once, not for 8. NaN becomes 480.
    """
    low = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
    high = (pairs & -0x8000) | ((pairs & 0x7F00) >> 1)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "len_q", "len_k", "heads", "group", "left", "right", "page_size", "stride_lb", "stride_lh", "splits",
        "launched", "tiles_m",
    ]
)  # fmt: skip
def attention_split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, used_k_ptr, leftpad_ptr, table_ptr, slopes_ptr,
    k_descale_ptr, v_descale_ptr, parts_ptr, parts_lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_table, stride_slopes, stride_descale_b, stride_descale_h,
    len_q, len_k, heads, group, left, right, page_size, scale, sign, softcap, splits, launched, tiles_m,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, LEAST_TILES: tl.constexpr,
    IS_SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_DESCALE: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """out and LSE of BLOCK_M rows, each a query of one of the heads that share keys, over one split of the keys.

    With IS_SPLIT each program writes R rows of out and of LSE, in float32, for the combining kernel.
    """
    tile_m = tl.program_id(0) % tiles_m
    rest = tl.program_id(0) // tiles_m
    split = rest % launched
    batch_head = rest // launched
    heads_k = heads // group
    batch, head_k = batch_head // heads_k, batch_head % heads_k
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    k_start, len_k = sequence.key_span(cu_k_ptr, used_k_ptr, leftpad_ptr, batch, len_k, F)
    packed = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # row = query * group + head within the group
    rows, head = packed // group, head_k * group + packed % group
    row0 = tile_m * BLOCK_M // group
    if row0 >= len_q:
        return
    is_row = rows < len_q
    band = Band(len_q, len_k, left, right)
    first, _full_first, _full_end, end = mask.key_tiles(row0, band, F, BLOCK_M, BLOCK_N)
    chunk = tl.maximum(tl.cdiv(end - first, splits), LEAST_TILES)  # whatever the number of programs launched
    low = first + split * chunk
    high = tl.minimum(low + chunk, end)
    if IS_SPLIT and low >= end:
        none = tl.full([R], float("inf"), tl.float32)
        tl.store(parts_lse_ptr + tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), none)
        return

    IS_PAIRED: tl.constexpr = v_ptr.dtype.element_ty == tl.int16
    WIDTH_V: tl.constexpr = HEAD_DIM_V // 2 if IS_PAIRED else HEAD_DIM_V
    BLOCK_W: tl.constexpr = BLOCK_DV // 2 if IS_PAIRED else BLOCK_DV
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + q_start * stride_qs
    q_ptrs = q_base + (rows.to(tl.int64) * stride_qs + head * stride_qh)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    factor_v = 1.0
    if HAS_DESCALE:
        at = batch.to(tl.int64) * stride_descale_b + head_k * stride_descale_h
        scale *= tl.load(k_descale_ptr + at)
        factor_v = tl.load(v_descale_ptr + at)
    slope = score.slope_of(slopes_ptr, batch, head, stride_slopes, F)
    if F.has_alibi:
        slope = slope[:, None]
    rule = Rule(scale, sign, softcap, slope)
    q = score.signed(q, rule, F)
    IS_WIDENED: tl.constexpr = q_ptr.dtype.element_ty == tl.bfloat16 and k_ptr.dtype.element_ty != tl.bfloat16
    if IS_WIDENED:
        q, row_factor = _as_float16(q)
    if F.is_paged:
        table_ptr += batch.to(tl.int64) * stride_table
        k_base = k_ptr + head_k.to(tl.int64) * stride_kh
        v_base = v_ptr + head_k.to(tl.int64) * stride_vh
    else:
        k_base = sequence.base(k_ptr, batch, head_k, k_start, stride_kb, stride_kh, stride_ks)
        v_base = sequence.base(v_ptr, batch, head_k, k_start, stride_vb, stride_vh, stride_vs)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, BLOCK_W if IS_PAIRED else 1], tl.float32)
    span = tl.arange(0, BLOCK_N)
    oldest = 0
    if F.has_left:
        oldest = row0 + len_k - len_q - left
    pages_k = _pages(table_ptr, low * BLOCK_N, span[None, :], page_size, band.len_k, F, PAGE_SIZE)
    pages_v = _pages(table_ptr, low * BLOCK_N, span[:, None], page_size, band.len_k, F, PAGE_SIZE)
    for i in tl.range(low, high):
        col0 = i * BLOCK_N
        cols = col0 + span
        k_ptrs = _key_pointers(
            k_base, col0, span[None, :], pages_k, page_size, stride_kb, stride_ks, dims[:, None], F, PAGE_SIZE
        )
        v_ptrs = _key_pointers(
            v_base, col0, span[:, None], pages_v, page_size, stride_vb, stride_vs, dims_v[None, :], F, PAGE_SIZE
        )
        pages_k = _pages(table_ptr, col0 + BLOCK_N, span[None, :], page_size, band.len_k, F, PAGE_SIZE)
        pages_v = _pages(table_ptr, col0 + BLOCK_N, span[:, None], page_size, band.len_k, F, PAGE_SIZE)
        k = sequence.load(k_ptrs, cols[None, :], band.len_k, dims[:, None], HEAD_DIM, BLOCK_D, True)  # [D, N]
        scores = tl.dot(q, k.to(q.dtype), input_precision=F.precision)
        if IS_WIDENED:
            scores *= row_factor[:, None]
        scores, _steepness = score.modify(scores, rows[:, None], cols[None, :], band, rule, F)
        scores = tl.where(mask.keep(rows[:, None], cols[None, :], band, F), scores, float("-inf"))
        weights, decay, row_max, row_sum = softmax.step(scores, score.multiplier(rule, F), row_max, row_sum, F)
        is_read = ((cols >= oldest) & (cols < band.len_k))[:, None] & (dims_v < WIDTH_V)[None, :]
        v = tl.load(v_ptrs, mask=is_read, other=0.0)  # [N, DV]; what the window has left behind may hold anything
        if IS_PAIRED:
            v_even, v_odd = _unpacked(v)
            acc = score.add_product(weights.to(q.dtype), v_even, acc * decay[:, None], F)
            acc_odd = score.add_product(weights.to(q.dtype), v_odd, acc_odd * decay[:, None], F)
        else:
            acc = score.add_product(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], F)

    columns = tl.arange(0, BLOCK_DV)[None, :]
    is_column = columns < HEAD_DIM_V
    total = acc
    if IS_PAIRED:
        total = tl.join(acc, acc_odd).reshape(BLOCK_M, BLOCK_DV) * 256.0
    factor, lse = softmax.finish(row_max, row_sum, F)
    out = total * (factor * factor_v)[:, None]
    if IS_SPLIT:
        part = tl.program_id(0).to(tl.int64) * R
        local = tl.arange(0, BLOCK_M)
        tl.store(parts_lse_ptr + part + local, lse, mask=local < R)
        part_ptrs = parts_ptr + (part + local)[:, None] * HEAD_DIM_V + columns
        tl.store(part_ptrs, out, mask=(local < R)[:, None] & is_column)
    else:
        out_base = out_ptr + batch.to(tl.int64) * stride_ob + q_start * stride_os
        lse_base = lse_ptr + batch.to(tl.int64) * stride_lb + q_start
        tl.store(lse_base + head * stride_lh + rows, lse, mask=is_row)
        out_ptrs = out_base + (rows.to(tl.int64) * stride_os + head * stride_oh)[:, None] + columns
        is_out = is_row[:, None] & is_column
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["len_q", "heads", "group", "stride_lb", "stride_lh", "launched", "tiles_m"])
def attention_combine_kernel(
    parts_ptr, parts_lse_ptr, out_ptr, lse_ptr, cu_q_ptr, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    len_q, heads, group, launched, tiles_m, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    R: tl.constexpr, BLOCK_S: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """out and LSE of one row from those of its splits; an LSE of +inf marks a split without keys.

    BLOCK_S does not depend on how many splits were launched: the order of the sums is that of a larger cache.
    """
    local, tile = tl.program_id(0) % R, tl.program_id(0) // R
    tile_m, batch_head = tile % tiles_m, tile // tiles_m
    heads_k = heads // group
    batch, packed = batch_head // heads_k, tile_m * BLOCK_M + local
    row, head = packed // group, batch_head % heads_k * group + packed % group
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    at = ((batch_head * launched + splits) * tiles_m + tile_m).to(tl.int64) * R + local
    lses = tl.load(parts_lse_ptr + at, mask=splits < launched, other=float("inf"))
    is_part = (splits < launched)[:, None] & (dims < HEAD_DIM_V)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * HEAD_DIM_V + dims[None, :], mask=is_part, other=0.0)
    has_keys = lses != float("inf")
    maximum = tl.max(tl.where(has_keys, lses, float("-inf")), 0)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = score.power(tl.where(has_keys, lses - pivot, float("-inf")) * score.unit(F), F)
    total = tl.sum(weights, 0)
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    parts = tl.where(has_keys[:, None], parts, 0.0)  # a split without keys wrote none
    out = tl.sum(parts * weights[:, None], 0) / total
    lse = tl.where(is_empty, float("inf"), pivot + tl.log2(total) * softmax.LN2)
    start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    if row < len_q:
        tl.store(lse_ptr + batch.to(tl.int64) * stride_lb + head * stride_lh + start + row, lse)
        out_ptr += batch.to(tl.int64) * stride_ob + (start + row) * stride_os + head * stride_oh
        tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM_V)
