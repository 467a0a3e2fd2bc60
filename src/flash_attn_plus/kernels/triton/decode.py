"""Few queries against many keys: the keys of a sequence are split over programs, whose results are combined.

The queries of all heads that share keys are the rows of one tile, so that keys and values are read once
(Flash-Decoding, Dao et al. 2023, with grouped heads). With as many SHARES of a tile's keys as a program has warps, each
warp runs a softmax of its own over its share, and none waits for another before the end.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import mask, score, sequence, softmax, splits
from flash_attn_plus.kernels.triton.call import Band, Rule


class Table(NamedTuple):
    """Where the pages of a sequence are told, for paged keys."""

    ptr: tl.tensor
    page_size: tl.tensor
    pages: tl.tensor  # those that there are


class New(NamedTuple):
    """New rows of one sequence and head, and the cached ones; in a paged cache those of the first page."""

    ptr: tl.tensor
    stride: tl.tensor
    cache_ptr: tl.tensor
    stride_row: tl.tensor
    stride_page: tl.tensor


@triton.jit
def _base(ptr, batch, head, start, stride_batch, stride_head, stride_row, F: tl.constexpr):
    """Where the keys of a sequence and head count from; for paged ones where those of every page do."""
    if F.is_paged:
        return ptr + head.to(tl.int64) * stride_head
    else:
        return sequence.base(ptr, batch, head, start, stride_batch, stride_head, stride_row)


@triton.jit
def _key_pointers(
    base, col0, cols, pages, page_size, stride_page, stride_row, dims, F: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pointers of the keys [col0, col0 + BLOCK_N); `cols` counts from col0, `pages` are those of the keys.

    PAGE_SIZE is 0 where no tile spans two pages: then there is one page a tile.
    """
    if F.is_paged and PAGE_SIZE > 0:
        slots = (cols if BLOCK_N % PAGE_SIZE == 0 else col0 + cols) % PAGE_SIZE
        return (base + (slots.to(tl.int64) * stride_row + dims)) + pages.to(tl.int64) * stride_page
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
def _unpacked(pairs, ARCH: tl.constexpr):
    """The two e4m3 numbers of each int16 as float16.

    Products want values turned by rows, which the hardware does for 16 bits at once, not for 8.
    """
    if ARCH >= 89:  # one instruction sorts the bytes of two int16, one each makes two numbers of them
        return tl.inline_asm_elementwise(
            "{ .reg .b32 sorted; .reg .b16 low, high; prmt.b32 sorted, $2, $2, 0x3120; mov.b32 {low, high}, sorted;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # bits moved into place make it 1 / 256 of the number, subnormals included; NaN becomes 480
        low = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
        high = (pairs & -0x8000) | ((pairs & 0x7F00) >> 1)
        return low.to(tl.float16, bitcast=True) * 256.0, high.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _columns(BLOCK_N: tl.constexpr, SHARES: tl.constexpr):
    """0 to BLOCK_N - 1 along the last axis, and along the one before it; in front of both, the shares."""
    if SHARES == 1:
        span = tl.arange(0, BLOCK_N)
    else:
        span = tl.arange(0, SHARES)[:, None] * (BLOCK_N // SHARES) + tl.arange(0, BLOCK_N // SHARES)[None, :]
    axis: tl.constexpr = len(span.shape)
    return tl.expand_dims(span, axis - 1), tl.expand_dims(span, axis)


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr):
    """What every share starts to sum up from."""
    if SHARES == 1:
        return tl.zeros([BLOCK_M, WIDTH], tl.float32)
    else:
        return tl.zeros([SHARES, BLOCK_M, WIDTH], tl.float32)


@triton.jit
def _add_values(
    acc, acc_odd, weights, v, decay, IS_PAIRED: tl.constexpr, ARCH: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """(acc, acc_odd) with the products of a tile; only pairs of 8 bits have odd columns of their own."""
    if IS_PAIRED:
        v_even, v_odd = _unpacked(v, ARCH)
        acc = score.add_product(weights, v_even, acc * decay, F)
        acc_odd = score.add_product(weights, v_odd, acc_odd * decay, F)
    else:
        acc = score.add_product(weights, v.to(weights.dtype), acc * decay, F)
    return acc, acc_odd


@triton.jit
def _append(new, old, begin, end, table, dims, DIMS: tl.constexpr, MOST_NEW: tl.constexpr, F: tl.constexpr):
    """Write the new rows [begin, end) behind the `old` ones; those on pages that do not exist are not written."""
    row = tl.arange(0, MOST_NEW)[:, None]
    at, is_row, ptr = old + row, (row >= begin) & (row < end), new.cache_ptr
    if F.is_paged:
        page = tl.load(table.ptr + at // table.page_size, mask=is_row, other=-1)
        is_row &= (page >= 0) & (page < table.pages)
        at = at % table.page_size
        ptr += page.to(tl.int64) * new.stride_page
    is_read = is_row & (dims < DIMS)
    x = tl.load(new.ptr + row.to(tl.int64) * new.stride + dims, mask=is_read, other=0.0)
    tl.store(ptr + at.to(tl.int64) * new.stride_row + dims, x, mask=is_read)


@triton.jit
def _factors(k_descale_ptr, v_descale_ptr, batch, head, stride_batch, stride_head, HAS_DESCALE: tl.constexpr):
    """What keys and values of a sequence and head are multiplied with."""
    if HAS_DESCALE:
        at = batch.to(tl.int64) * stride_batch + head * stride_head
        return tl.load(k_descale_ptr + at), tl.load(v_descale_ptr + at)
    else:
        return 1.0, 1.0


@triton.jit
def _tiles_of(split, first, end, most_splits, LEAST_TILES: tl.constexpr, IS_SPLIT: tl.constexpr):
    """(first tile of a split, its end, tiles of each split) of the tiles [first, end) of keys.

    They follow from the keys in use, whatever the number of programs launched.
    """
    if IS_SPLIT:
        chunk = tl.maximum(tl.cdiv(end - first, most_splits), LEAST_TILES)
        low = first + split * chunk
        return low, tl.minimum(low + chunk, end), chunk
    else:
        return first, end, end - first


@triton.jit(
    do_not_specialize=[
        "len_q", "len_k", "heads_k", "group", "left", "right", "page_size", "stride_lb", "stride_lh", "most_splits",
        "tiles_m", "new", "pages", "stride_nb", "stride_ns", "stride_nh", "stride_wb", "stride_ws", "stride_wh",
    ],
    do_not_specialize_on_alignment=[
        "cu_q_ptr", "cu_k_ptr", "used_k_ptr", "leftpad_ptr", "table_ptr", "slopes_ptr", "k_descale_ptr",
        "v_descale_ptr", "k_new_ptr", "v_new_ptr",
    ],
)  # fmt: skip
def attention_split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, used_k_ptr, leftpad_ptr, table_ptr, slopes_ptr,
    k_descale_ptr, v_descale_ptr, k_new_ptr, v_new_ptr, parts_ptr, counters_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_nb, stride_ns, stride_nh, stride_wb, stride_ws, stride_wh,
    stride_table, stride_slopes, stride_descale_b, stride_descale_h, new, pages,
    len_q, len_k, heads_k, group, left, right, page_size, scale, sign, softcap, most_splits, tiles_m,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, LEAST_TILES: tl.constexpr,
    IS_SPLIT: tl.constexpr, IS_TILED: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_DESCALE: tl.constexpr,
    MOST_NEW: tl.constexpr, F: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """out and LSE of BLOCK_M rows, each a query of one of the heads that share keys, over one split of the keys.

    Programs that share keys, or shares that do, write R rows each as parts, in float32; the last program combines
    them. With `new` keys, each program first writes those that it reads into the cache: between them, they write all.
    ARCH is an NVIDIA GPU's compute capability, 90 for 9.0; 0 elsewhere.
    """
    tile, tile_m, row0 = tl.program_id(0), 0, 0
    if IS_TILED:
        tile_m = tile % tiles_m
        row0 = tile_m * BLOCK_M // group
        tile = tile // tiles_m
    batch, head_k, split = tile // heads_k, tile % heads_k, tl.program_id(1)
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    k_start, old = sequence.key_span(cu_k_ptr, used_k_ptr, leftpad_ptr, batch, len_k, F)
    len_k = tl.minimum(old + new, len_k) if MOST_NEW > 0 else old
    packed = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # row = query * group + head within the group
    rows, head = packed // group, head_k * group + packed % group
    dims = tl.arange(0, BLOCK_D)
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + q_start * stride_qs
    q_ptrs = q_base + (rows.to(tl.int64) * stride_qs + head * stride_qh)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=(rows < len_q)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if (IS_TILED or F.has_cu_q) and row0 >= len_q:
        return
    band = Band(len_q, len_k, left, right)
    first, _full_first, _full_end, end = mask.key_tiles(row0, band, F, BLOCK_M, BLOCK_N)
    low, high, chunk = _tiles_of(split, first, end, most_splits, LEAST_TILES, IS_SPLIT)
    if (low >= end) & (split > 0):
        return
    IS_PAIRED: tl.constexpr = v_ptr.dtype.element_ty == tl.int16
    WIDTH_V: tl.constexpr = HEAD_DIM_V // 2 if IS_PAIRED else HEAD_DIM_V
    BLOCK_W: tl.constexpr = BLOCK_DV // 2 if IS_PAIRED else BLOCK_DV
    dims_v = tl.arange(0, BLOCK_W)
    factor_k, factor_v = _factors(
        k_descale_ptr, v_descale_ptr, batch, head_k, stride_descale_b, stride_descale_h, HAS_DESCALE
    )
    slope = score.slope_of(slopes_ptr, batch, head, stride_slopes, F)
    if F.has_alibi:
        slope = slope[:, None]
    rule = Rule(scale * factor_k, sign, softcap, slope)
    q = score.signed(q, rule, F)
    IS_WIDENED: tl.constexpr = q_ptr.dtype.element_ty == tl.bfloat16 and k_ptr.dtype.element_ty != tl.bfloat16
    if IS_WIDENED:
        q, row_factor = _as_float16(q)
    if SHARES > 1:
        q = tl.broadcast_to(q[None, :, :], [SHARES, BLOCK_M, BLOCK_D])
    if F.is_paged:
        table_ptr += batch.to(tl.int64) * stride_table
    k_base = _base(k_ptr, batch, head_k, k_start, stride_kb, stride_kh, stride_ks, F)
    v_base = _base(v_ptr, batch, head_k, k_start, stride_vb, stride_vh, stride_vs, F)

    if MOST_NEW > 0 and new > 0:
        begin = tl.where(split > 0, low * BLOCK_N, 0) - old  # the first split's: also what no query sees
        stop = tl.minimum(high * BLOCK_N, len_k) - old
        table = Table(table_ptr, page_size, pages)
        base = sequence.base(k_new_ptr, batch, head_k, 0, stride_nb, stride_nh, stride_ns)
        rows_k = New(base, stride_ns, k_base, stride_ks, stride_kb)
        _append(rows_k, old, begin, stop, table, dims[None, :], HEAD_DIM, MOST_NEW, F)
        base = sequence.base(v_new_ptr, batch, head_k, 0, stride_wb, stride_wh, stride_ws)
        rows_v = New(base, stride_ws, v_base, stride_vs, stride_vb)
        _append(rows_v, old, begin, stop, table, dims_v[None, :], HEAD_DIM_V, MOST_NEW, F)
        tl.debug_barrier()
    acc = _zeros(BLOCK_M, BLOCK_W, SHARES)
    acc_odd = _zeros(BLOCK_M, BLOCK_W if IS_PAIRED else 1, SHARES)
    row_sum = tl.sum(acc_odd, len(acc_odd.shape) - 1)
    row_max = row_sum - float("inf")
    span_k, span_v = _columns(BLOCK_N, SHARES)
    oldest = row0 + len_k - len_q - left if F.has_left else 0
    pages_k = _pages(table_ptr, low * BLOCK_N, span_k, page_size, band.len_k, F, PAGE_SIZE)
    pages_v = _pages(table_ptr, low * BLOCK_N, span_v, page_size, band.len_k, F, PAGE_SIZE)
    for i in tl.range(low, high):
        col0 = i * BLOCK_N
        cols_k, cols_v = col0 + span_k, col0 + span_v
        k_ptrs = _key_pointers(
            k_base, col0, span_k, pages_k, page_size, stride_kb, stride_ks, dims[:, None], F, PAGE_SIZE, BLOCK_N
        )
        v_ptrs = _key_pointers(
            v_base, col0, span_v, pages_v, page_size, stride_vb, stride_vs, dims_v[None, :], F, PAGE_SIZE, BLOCK_N
        )
        pages_k = _pages(table_ptr, col0 + BLOCK_N, span_k, page_size, band.len_k, F, PAGE_SIZE)
        pages_v = _pages(table_ptr, col0 + BLOCK_N, span_v, page_size, band.len_k, F, PAGE_SIZE)
        k = sequence.load(k_ptrs, cols_k, band.len_k, dims[:, None], HEAD_DIM, BLOCK_D, True)  # [D, N]
        scores = tl.dot(q, k.to(q.dtype), input_precision=F.precision)
        if IS_WIDENED:
            scores *= row_factor[:, None]
        scores, _steepness = score.modify(scores, rows[:, None], cols_k, band, rule, F)
        scores = tl.where(mask.keep(rows[:, None], cols_k, band, F), scores, float("-inf"))
        weights, decay, row_max, row_sum = softmax.step(scores, score.multiplier(rule, F), row_max, row_sum, F)
        decay = tl.expand_dims(decay, len(decay.shape))
        is_read = (cols_v >= oldest) & (cols_v < band.len_k) & (dims_v < WIDTH_V)[None, :]
        v = tl.load(v_ptrs, mask=is_read, other=0.0)  # [N, DV]; what the window has left behind may hold anything
        acc, acc_odd = _add_values(acc, acc_odd, weights.to(q.dtype), v, decay, IS_PAIRED, ARCH, F)

    if IS_PAIRED:
        acc = tl.join(acc, acc_odd)
        acc = acc.reshape([SHARES, BLOCK_M, BLOCK_DV] if SHARES > 1 else [BLOCK_M, BLOCK_DV])
    factor, lse = softmax.finish(row_max, row_sum, F)
    out = acc * tl.expand_dims(factor * factor_v, len(factor.shape))
    number = tl.maximum(tl.cdiv(end - first, chunk), 1) if IS_SPLIT else 1  # of splits that have keys
    rows_of = splits.Rows(tile_m * BLOCK_M, batch, q_start, len_q, head_k, group)
    target = splits.Target(out_ptr, lse_ptr, stride_ob, stride_os, stride_oh, stride_lb, stride_lh)
    if SHARES == 1 and (not IS_SPLIT or number == 1):
        splits.store(out, lse, rows_of, target, HEAD_DIM_V)
    else:
        splits.join(
            out, lse, split, number, parts_ptr, counters_ptr, rows_of, target,
            R, ROWS, STEP, HEAD_DIM_V, BLOCK_DV, SHARES, F,
        )  # fmt: skip
