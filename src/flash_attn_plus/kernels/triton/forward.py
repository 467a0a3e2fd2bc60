"""Forward pass: one program walks the keys that a tile of queries sees (Dao, arXiv 2307.08691, algorithm 1)."""

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import block_lists, dropout, mask, score, sequence, softmax
from flash_attn_plus.kernels.triton.call import Band, Drop, Rule


@triton.jit
def _fold_tile(
    acc, row_max, row_sum, q, k_base, v_base, row0, col0, table_ptr, page_size,
    stride_kb, stride_ks, stride_vb, stride_vs, batch, kv_head, band, walk, rule, drop, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, F: tl.constexpr, is_masked,
):  # fmt: skip
    """Fold the keys [col0, col0 + BLOCK_N) into the accumulator; `is_masked` is a constant, but with descriptors."""
    rows, cols = row0 + tl.arange(0, q.shape[0]), tl.arange(0, BLOCK_N)
    dims, dims_v = tl.arange(0, q.shape[1])[:, None], tl.arange(0, acc.shape[1])[None, :]
    if F.has_descriptors:
        k = tl.trans(sequence.described(k_base, batch, kv_head, col0, BLOCK_N, q.shape[1]))  # [D, N]
    elif F.is_paged:
        k_ptrs = sequence.paged_tile(
            k_base, (col0 + cols)[None, :], table_ptr, page_size, stride_kb, stride_ks, band.len_k, dims
        )
        v_ptrs = sequence.paged_tile(
            v_base, (col0 + cols)[:, None], table_ptr, page_size, stride_vb, stride_vs, band.len_k, dims_v
        )
    else:
        k_ptrs = sequence.tile(k_base, col0, cols[None, :], stride_ks, dims)
        v_ptrs = sequence.tile(v_base, col0, cols[:, None], stride_vs, dims_v)
    cols += col0
    if not F.has_descriptors:
        k = sequence.load(k_ptrs, cols[None, :], band.len_k, dims, HEAD_DIM, q.shape[1], is_masked)  # [D, N]
    scores = tl.dot(q, k, input_precision=F.precision)  # [M, N]
    scores, _ = score.modify(scores, rows[:, None], cols[None, :], band, rule, F)
    if is_masked:
        scores = tl.where(block_lists.keep(rows[:, None], cols[None, :], band, walk, F), scores, float("-inf"))
    multiplier = score.multiplier(rule, F)
    if F.has_descriptors:
        weights, decay, row_max, row_sum = softmax.step_in_parts(scores, multiplier, row_max, row_sum, F)
    else:
        weights, decay, row_max, row_sum = softmax.step(scores, multiplier, row_max, row_sum, F)
    if F.has_dropout:
        kept = dropout.keep_tile(drop, row0, col0, acc.shape[0], BLOCK_N)
        weights = tl.where(kept, weights, 0.0)
    if F.has_descriptors:
        v = sequence.described(v_base, batch, kv_head, col0, BLOCK_N, acc.shape[1])  # [N, DV]
    else:
        v = sequence.load(v_ptrs, cols[:, None], band.len_k, dims_v, HEAD_DIM_V, acc.shape[1], is_masked)  # [N, DV]
    acc = score.add_product(weights.to(v.dtype), v, acc * decay[:, None], F)
    return acc, row_max, row_sum


@triton.jit
def _described_product(q, k_base, batch, kv_head, col0, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """q k^T [M, N] of the keys [col0, col0 + BLOCK_N)."""
    k = tl.trans(sequence.described(k_base, batch, kv_head, col0, BLOCK_N, q.shape[1]))  # [D, N]
    return tl.dot(q, k, input_precision=F.precision)


@triton.jit
def _add_described(acc, weights, decay, v_base, batch, kv_head, col0, F: tl.constexpr):
    """The accumulator, decayed, and the weights' product with the values [col0, col0 + BLOCK_N)."""
    v = sequence.described(v_base, batch, kv_head, col0, weights.shape[1], acc.shape[1])  # [N, DV]
    return score.add_product(weights.to(v.dtype), v, acc * decay[:, None], F)


@triton.jit
def _masked(scores, row0, col0, band, walk, F: tl.constexpr):
    rows, cols = row0 + tl.arange(0, scores.shape[0]), col0 + tl.arange(0, scores.shape[1])
    return tl.where(block_lists.keep(rows[:, None], cols[None, :], band, walk, F), scores, float("-inf"))


@triton.jit
def _fold_ahead(
    acc, row_max, row_sum, q, k_base, v_base, batch, kv_head, row0, first, full_first, full_end, end, band, walk, rule,
    BLOCK_N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Fold the tiles [first, end) of keys, weighing each one's products while the next one's are under way.

    The order within a step keeps the tensor cores busy: maxima under the values' product of the step before, then the
    next products, the powers under them.
    """
    multiplier = score.multiplier(rule, F)
    last = tl.maximum(end - 1, first)
    scores = _described_product(q, k_base, batch, kv_head, first * BLOCK_N, BLOCK_N, F)
    for i in tl.range(first, last):
        if F.has_left or F.has_right:  # else the last tile only can need a mask
            if (i < full_first) | (i >= full_end):
                scores = _masked(scores, row0, i * BLOCK_N, band, walk, F)
        new_max, pivot = softmax.peak_in_parts(scores, multiplier, row_max)
        ahead = _described_product(q, k_base, batch, kv_head, (i + 1) * BLOCK_N, BLOCK_N, F)
        weights, decay, row_sum = softmax.weights_in_parts(scores, multiplier, row_max, pivot, row_sum, F)
        acc = _add_described(acc, weights, decay, v_base, batch, kv_head, i * BLOCK_N, F)
        row_max = new_max
        scores = ahead
    if (last < full_first) | (last >= full_end):
        scores = _masked(scores, row0, last * BLOCK_N, band, walk, F)
    weights, decay, row_max, row_sum = softmax.step_in_parts(scores, multiplier, row_max, row_sum, F)
    acc = _add_described(acc, weights, decay, v_base, batch, kv_head, last * BLOCK_N, F)
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["len_q", "len_k", "heads", "group", "left", "right", "page_size", "stride_lb", "stride_lh"]
)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, used_k_ptr, leftpad_ptr, table_ptr, slopes_ptr, rng_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_table, stride_slopes,
    len_q, len_k, heads, group, left, right, page_size, scale, sign, softcap, keep_threshold, keep_factor, blocks,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """out[rows] = softmax(q k^T) v and its LSE for one tile of BLOCK_M queries of one head of one sequence.

    With F.has_descriptors k_ptr and v_ptr are descriptors of (batch, key, head, dim) in tiles of BLOCK_N keys; with
    F.is_ahead q_ptr is one, too, in tiles of BLOCK_M queries.
    """
    tiles = tl.cdiv(len_q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = batch_head // heads, batch_head % heads
    if F.has_right:
        tile = tiles - 1 - tile  # rows at the bottom see the most keys: start them first
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    k_start, len_k = sequence.key_span(cu_k_ptr, used_k_ptr, leftpad_ptr, batch, len_k, F)
    row0 = tile * BLOCK_M
    if row0 >= len_q:
        return
    band = Band(len_q, len_k, left, right)
    rule = Rule(scale, sign, softcap, score.slope_of(slopes_ptr, batch, head, stride_slopes, F))
    drop = Drop(rng_ptr, batch_head, keep_threshold, keep_factor)

    rows = row0 + tl.arange(0, BLOCK_M)
    dims, dims_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    if F.is_ahead:  # by pointers q would take a second place in shared memory
        q = sequence.described(q_ptr, batch, head, row0, BLOCK_M, BLOCK_D)  # [M, D]
    else:
        q_base = sequence.base(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qs)
        q_ptrs = sequence.tile(q_base, row0, tl.arange(0, BLOCK_M)[:, None], stride_qs, dims)
        q = sequence.load(q_ptrs, rows[:, None], len_q, dims, HEAD_DIM, BLOCK_D, True)  # [M, D]
    q = score.signed(q, rule, F)
    kv_head = head // group
    if F.has_descriptors:
        k_base, v_base = k_ptr, v_ptr
    elif F.is_paged:
        table_ptr += batch.to(tl.int64) * stride_table
        k_base = k_ptr + kv_head.to(tl.int64) * stride_kh
        v_base = v_ptr + kv_head.to(tl.int64) * stride_vh
    else:
        k_base = sequence.base(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_ks)
        v_base = sequence.base(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vs)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if F.has_descriptors:
        row_sum = tl.zeros([BLOCK_M, softmax.PARTS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    walk = block_lists.walk_of(blocks, batch, head, tile, F)
    first, full_first, full_end, end = block_lists.spans(walk, mask.key_tiles(row0, band, F, BLOCK_M, BLOCK_N), F)
    full, partial = block_lists.first_tiles(walk, full_first, F)
    if F.is_ahead:
        acc, row_max, row_sum = _fold_ahead(
            acc, row_max, row_sum, q, k_base, v_base, batch, kv_head, row0, first, full_first, full_end, end,
            band, walk, rule, BLOCK_N, F,
        )  # fmt: skip
        row_sum = tl.sum(row_sum, 1)
    elif F.has_descriptors:  # the copy engine fills up the last tile, so one loop without a gap serves all tiles
        for i in tl.range(first, end):
            acc, row_max, row_sum = _fold_tile(
                acc, row_max, row_sum, q, k_base, v_base, row0, i * BLOCK_N, table_ptr, page_size, stride_kb,
                stride_ks, stride_vb, stride_vs, batch, kv_head, band, walk, rule, drop, BLOCK_N, HEAD_DIM,
                HEAD_DIM_V, F, (i < full_first) | (i >= full_end),
            )  # fmt: skip
        row_sum = tl.sum(row_sum, 1)
    else:
        for i in tl.range(full_first, full_end):
            place, full = block_lists.full_tile(walk, i, full, F)
            acc, row_max, row_sum = _fold_tile(
                acc, row_max, row_sum, q, k_base, v_base, row0, place * BLOCK_N, table_ptr, page_size, stride_kb,
                stride_ks, stride_vb, stride_vs, batch, kv_head, band, walk, rule, drop, BLOCK_N, HEAD_DIM,
                HEAD_DIM_V, F, False,
            )  # fmt: skip
        for i in tl.range(0, end - first - (full_end - full_first)):
            place, partial = block_lists.masked_tile(walk, i, partial, first, full_first, full_end, F)
            acc, row_max, row_sum = _fold_tile(
                acc, row_max, row_sum, q, k_base, v_base, row0, place * BLOCK_N, table_ptr, page_size, stride_kb,
                stride_ks, stride_vb, stride_vs, batch, kv_head, band, walk, rule, drop, BLOCK_N, HEAD_DIM,
                HEAD_DIM_V, F, True,
            )  # fmt: skip

    factor, lse = softmax.finish(row_max, row_sum, F)
    if F.has_dropout:
        factor *= keep_factor
    lse_base = lse_ptr + batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + q_start
    tl.store(lse_base + rows, lse, mask=rows < len_q)
    out_base = sequence.base(out_ptr, batch, head, q_start, stride_ob, stride_oh, stride_os)
    out_ptrs = sequence.tile(out_base, row0, tl.arange(0, BLOCK_M)[:, None], stride_os, dims_v)
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=(rows < len_q)[:, None] & (dims_v < HEAD_DIM_V))
