"""Backward pass without atomics: row statistics, then dk and dv by tiles of keys, then dq by tiles of queries.

Recomputing the scores in both passes costs two more products than a fused pass, and buys gradients that are
bitwise repeatable (Dao, arXiv 2307.08691, section 3.1.2, with the sum over tiles kept inside one program).
"""

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import block_lists, dropout, mask, score, sequence
from flash_attn_plus.kernels.triton.call import Band, Drop, Rule

# Row starts of the statistics are multiples of this, and tiles of queries are no longer: no load needs a mask.
STATISTICS_ALIGN: tl.constexpr = tl.constexpr(128)


@triton.jit
def _padded(rows):
    return tl.cdiv(rows, STATISTICS_ALIGN) * STATISTICS_ALIGN


@triton.jit
def _statistics_base(ptr, batch, head, q_start, stride_head, F: tl.constexpr):
    """The pairs (lse, delta) of a head of a sequence; see `attention_statistics_kernel`."""
    start = batch.to(tl.int64) * stride_head * 0
    if F.has_cu_q:
        start = (q_start + batch * STATISTICS_ALIGN) // STATISTICS_ALIGN * STATISTICS_ALIGN
    return ptr + tl.multiple_of(2 * (head.to(tl.int64) * stride_head + start), 2 * STATISTICS_ALIGN)


@triton.jit(do_not_specialize=["len_q", "heads", "stride_lb", "stride_lh", "stride_statistics"])
def attention_statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, statistics_ptr, cu_q_ptr,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh, stride_statistics,
    len_q, heads, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """delta[row] = sum(out * dout) - dlse, and the pairs (lse in the scores' units, delta) that the dk/dv kernel reads.

    A pair is one aligned load where two arrays would be two unaligned ones; rows beyond the end get (+inf, 0),
    whose weight is 0. Heads of dense input are numbered batch * heads + head.
    """
    tiles = tl.cdiv(_padded(len_q), BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = batch_head // heads, batch_head % heads
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    row0 = tile * BLOCK_M
    if row0 >= _padded(len_q):
        return
    rows, dims = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)[None, :]
    local = tl.arange(0, BLOCK_M)[:, None]
    out_base = sequence.base(out_ptr, batch, head, q_start, stride_ob, stride_oh, stride_os)
    dout_base = sequence.base(dout_ptr, batch, head, q_start, stride_gb, stride_gh, stride_gs)
    out = sequence.load(
        sequence.tile(out_base, row0, local, stride_os, dims), rows[:, None], len_q, dims, HEAD_DIM_V, BLOCK_DV, True
    )
    dout = sequence.load(
        sequence.tile(dout_base, row0, local, stride_gs, dims), rows[:, None], len_q, dims, HEAD_DIM_V, BLOCK_DV, True
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row_offset = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + q_start
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_offset + rows, mask=rows < len_q, other=0.0)
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < len_q, other=float("inf"))
    tl.store(delta_ptr + row_offset + rows, delta, mask=rows < len_q)
    statistics_head = head if F.has_cu_q else batch_head
    base = _statistics_base(statistics_ptr, batch, statistics_head, q_start, stride_statistics, F)
    inside = rows < _padded(len_q)
    tl.store(base + rows * 2, lse * score.unit(F), mask=inside)
    tl.store(base + rows * 2 + 1, delta, mask=inside)


@triton.jit
def _dkdv_tile(
    dk, dv, k, v, q_base, dout_base, statistics_base, stride_qs, stride_gs, row0, col0, batch, head, band, walk,
    rule, drop, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, F: tl.constexpr,
    WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr, is_masked,
):  # fmt: skip
    """Add what the queries [row0, row0 + BLOCK_M) contribute to one tile of keys; scores are transposed, [N, M]."""
    local = tl.arange(0, BLOCK_M)[:, None]
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, dk.shape[0])
    dims, dims_v = tl.arange(0, dk.shape[1])[None, :], tl.arange(0, dv.shape[1])[None, :]
    if F.has_descriptors:
        q = sequence.described(q_base, batch, head, row0, BLOCK_M, dk.shape[1])  # [M, D]
        dout = sequence.described(dout_base, batch, head, row0, BLOCK_M, dv.shape[1])  # [M, DV]
    else:
        q_ptrs = sequence.tile(q_base, row0, local, stride_qs, dims)
        dout_ptrs = sequence.tile(dout_base, row0, local, stride_gs, dims_v)
        q = sequence.load(q_ptrs, rows[:, None], band.len_q, dims, HEAD_DIM, dk.shape[1], is_masked)
        dout = sequence.load(dout_ptrs, rows[:, None], band.len_q, dims_v, HEAD_DIM_V, dv.shape[1], is_masked)
    q = score.signed(q, rule, F)
    pairs = tl.load(statistics_base + row0 * 2 + tl.arange(0, 2 * BLOCK_M))
    lse, delta = tl.split(pairs.reshape([BLOCK_M, 2]))
    scores = tl.dot(k, tl.trans(q), input_precision=F.precision)  # [N, M]
    if WANTS_DK:
        dp = tl.dot(v, tl.trans(dout), input_precision=F.precision)  # [N, M]
    scores, steepness = score.modify(scores, rows[None, :], cols[:, None], band, rule, F)
    p = score.power(scores * score.multiplier(rule, F) - lse[None, :], F)
    if is_masked:
        inside = block_lists.keep(rows[None, :], cols[:, None], band, walk, F, F.has_descriptors)
        p = tl.where(inside, p, 0.0)
    if F.has_dropout:
        kept = tl.trans(dropout.keep_tile(drop, row0, col0, BLOCK_M, dk.shape[0]))
        dropped = tl.where(kept, p * drop.factor, 0.0)
    else:
        dropped = p
    if WANTS_DV:
        dv = score.add_product(dropped.to(dout.dtype), dout, dv, F)
    if WANTS_DK:
        if F.has_dropout:
            dp = tl.where(kept, dp * drop.factor, 0.0)
        ds = score.derivative(p * (dp - delta[None, :]), steepness, F)
        dk = score.add_product(ds.to(q.dtype), q, dk, F)
    return dk, dv


@triton.jit(
    do_not_specialize=["len_q", "len_k", "heads", "group", "left", "right", "stride_statistics", "stride_slopes"]
)
def attention_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, rng_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    stride_statistics, stride_slopes, len_q, len_k, heads, group, left, right,
    scale, sign, softcap, keep_threshold, keep_factor, blocks,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv (or one of them) of one tile of BLOCK_N keys, summed over the query heads of the group in order.

    With F.has_descriptors q_ptr and dout_ptr are descriptors of (batch, query, head, dim) in tiles of BLOCK_M queries.
    """
    tiles = tl.cdiv(len_k, BLOCK_N)
    tile = tl.program_id(0) % tiles
    batch_kv = tl.program_id(0) // tiles
    batch, kv_head = batch_kv // (heads // group), batch_kv % (heads // group)
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    k_start, len_k = sequence.key_span(cu_k_ptr, None, None, batch, len_k, F)
    col0 = tile * BLOCK_N
    if col0 >= len_k:
        return
    band = Band(len_q, len_k, left, right)
    local, cols = tl.arange(0, BLOCK_N)[:, None], col0 + tl.arange(0, BLOCK_N)
    dims, dims_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_base = sequence.base(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_ks)
    v_base = sequence.base(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vs)
    k_ptrs = sequence.tile(k_base, col0, local, stride_ks, dims)
    v_ptrs = sequence.tile(v_base, col0, local, stride_vs, dims_v)
    k = sequence.load(k_ptrs, cols[:, None], len_k, dims, HEAD_DIM, BLOCK_D, True)  # [N, D]
    v = sequence.load(v_ptrs, cols[:, None], len_k, dims_v, HEAD_DIM_V, BLOCK_DV, True)  # [N, DV]

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    band_tiles = mask.query_tiles(col0, band, F, BLOCK_M, BLOCK_N)
    for member in tl.range(0, group):
        head = kv_head * group + member
        rule = Rule(scale, sign, softcap, score.slope_of(slopes_ptr, batch, head, stride_slopes, F))
        drop = Drop(rng_ptr, batch * heads + head, keep_threshold, keep_factor)
        statistics_head = head if F.has_cu_q else batch * heads + head
        if F.has_descriptors:
            q_base, dout_base = q_ptr, dout_ptr
        else:
            q_base = sequence.base(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qs)
            dout_base = sequence.base(dout_ptr, batch, head, q_start, stride_gb, stride_gh, stride_gs)
        statistics_base = _statistics_base(statistics_ptr, batch, statistics_head, q_start, stride_statistics, F)
        walk = block_lists.walk_of(blocks, batch, head, tile, F)
        first, full_first, full_end, end = block_lists.spans(walk, band_tiles, F)
        full, partial = block_lists.first_tiles(walk, full_first, F)
        if F.has_descriptors:  # the copy engine fills up the last tile, so one loop without a gap serves all tiles
            for i in tl.range(first, end):
                is_masked = False  # rows behind the end have no weight, and what keys behind the end get is not stored
                if F.has_left or F.has_right:
                    is_masked = (i < full_first) | (i >= full_end)
                dk, dv = _dkdv_tile(
                    dk, dv, k, v, q_base, dout_base, statistics_base, stride_qs, stride_gs, i * BLOCK_M, col0, batch,
                    head, band, walk, rule, drop, BLOCK_M, HEAD_DIM, HEAD_DIM_V, F, WANTS_DK, WANTS_DV, is_masked,
                )  # fmt: skip
        else:
            for i in tl.range(full_first, full_end):
                place, full = block_lists.full_tile(walk, i, full, F)
                dk, dv = _dkdv_tile(
                    dk, dv, k, v, q_base, dout_base, statistics_base, stride_qs, stride_gs, place * BLOCK_M, col0,
                    batch, head, band, walk, rule, drop, BLOCK_M, HEAD_DIM, HEAD_DIM_V, F, WANTS_DK, WANTS_DV, False,
                )  # fmt: skip
            for i in tl.range(0, end - first - (full_end - full_first)):
                place, partial = block_lists.masked_tile(walk, i, partial, first, full_first, full_end, F)
                dk, dv = _dkdv_tile(
                    dk, dv, k, v, q_base, dout_base, statistics_base, stride_qs, stride_gs, place * BLOCK_M, col0,
                    batch, head, band, walk, rule, drop, BLOCK_M, HEAD_DIM, HEAD_DIM_V, F, WANTS_DK, WANTS_DV, True,
                )  # fmt: skip

    if WANTS_DK:
        dk_base = sequence.base(dk_ptr, batch, kv_head, k_start, stride_dkb, stride_dkh, stride_dks)
        dk_ptrs = sequence.tile(dk_base, col0, local, stride_dks, dims)
        dk_mask = (cols < len_k)[:, None] & (dims < HEAD_DIM)
        tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=dk_mask)
    if WANTS_DV:
        dv_base = sequence.base(dv_ptr, batch, kv_head, k_start, stride_dvb, stride_dvh, stride_dvs)
        dv_ptrs = sequence.tile(dv_base, col0, local, stride_dvs, dims_v)
        dv_mask = (cols < len_k)[:, None] & (dims_v < HEAD_DIM_V)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)


@triton.jit
def _dq_tile(
    dq, q, dout, lse, delta, k_base, v_base, stride_ks, stride_vs, row0, col0, batch, kv_head, band, walk, rule, drop,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, F: tl.constexpr, is_masked,
):  # fmt: skip
    """Add what the keys [col0, col0 + BLOCK_N) contribute to one tile of queries."""
    local, cols = tl.arange(0, BLOCK_N)[None, :], col0 + tl.arange(0, BLOCK_N)
    rows = row0 + tl.arange(0, q.shape[0])
    dims, dims_v = tl.arange(0, q.shape[1])[:, None], tl.arange(0, dout.shape[1])[:, None]
    if F.has_descriptors:
        k = tl.trans(sequence.described(k_base, batch, kv_head, col0, BLOCK_N, q.shape[1]))  # [D, N]
        v = tl.trans(sequence.described(v_base, batch, kv_head, col0, BLOCK_N, dout.shape[1]))  # [DV, N]
    else:
        k_ptrs = sequence.tile(k_base, col0, local, stride_ks, dims)
        v_ptrs = sequence.tile(v_base, col0, local, stride_vs, dims_v)
        k = sequence.load(k_ptrs, cols[None, :], band.len_k, dims, HEAD_DIM, q.shape[1], is_masked)
        v = sequence.load(v_ptrs, cols[None, :], band.len_k, dims_v, HEAD_DIM_V, dout.shape[1], is_masked)
    scores = tl.dot(q, k, input_precision=F.precision)  # [M, N]
    dp = tl.dot(dout, v, input_precision=F.precision)  # [M, N]
    scores, steepness = score.modify(scores, rows[:, None], cols[None, :], band, rule, F)
    p = score.power(scores * score.multiplier(rule, F) - lse[:, None], F)
    if is_masked:
        inside = block_lists.keep(rows[:, None], cols[None, :], band, walk, F, F.has_descriptors)
        p = tl.where(inside, p, 0.0)
    if F.has_dropout:
        dp = tl.where(dropout.keep_tile(drop, row0, col0, dq.shape[0], BLOCK_N), dp * drop.factor, 0.0)
    ds = score.derivative(p * (dp - delta[:, None]), steepness, F)
    return score.add_product(ds.to(k.dtype), tl.trans(k), dq, F)


@triton.jit(
    do_not_specialize=["len_q", "len_k", "heads", "group", "left", "right", "stride_lb", "stride_lh", "stride_slopes"]
)
def attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, slopes_ptr, rng_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh,
    stride_lb, stride_lh, stride_slopes, len_q, len_k, heads, group, left, right,
    scale, sign, softcap, keep_threshold, keep_factor, blocks,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """dq of one tile of BLOCK_M queries of one head.

    With F.has_descriptors k_ptr and v_ptr are descriptors of (batch, key, head, dim) in tiles of BLOCK_N keys.
    """
    tiles = tl.cdiv(len_q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = batch_head // heads, batch_head % heads
    if F.has_right:
        tile = tiles - 1 - tile  # rows at the bottom see the most keys: start them first
    q_start, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    k_start, len_k = sequence.key_span(cu_k_ptr, None, None, batch, len_k, F)
    row0 = tile * BLOCK_M
    if row0 >= len_q:
        return
    band = Band(len_q, len_k, left, right)
    rule = Rule(scale, sign, softcap, score.slope_of(slopes_ptr, batch, head, stride_slopes, F))
    drop = Drop(rng_ptr, batch_head, keep_threshold, keep_factor)
    local, rows = tl.arange(0, BLOCK_M)[:, None], row0 + tl.arange(0, BLOCK_M)
    dims, dims_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q_base = sequence.base(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qs)
    dout_base = sequence.base(dout_ptr, batch, head, q_start, stride_gb, stride_gh, stride_gs)
    q_ptrs = sequence.tile(q_base, row0, local, stride_qs, dims)
    dout_ptrs = sequence.tile(dout_base, row0, local, stride_gs, dims_v)
    q = score.signed(sequence.load(q_ptrs, rows[:, None], len_q, dims, HEAD_DIM, BLOCK_D, True), rule, F)  # [M, D]
    dout = sequence.load(dout_ptrs, rows[:, None], len_q, dims_v, HEAD_DIM_V, BLOCK_DV, True)  # [M, DV]
    row_offset = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + q_start
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < len_q, other=float("inf")) * score.unit(F)
    delta = tl.load(delta_ptr + row_offset + rows, mask=rows < len_q, other=0.0)
    kv_head = head // group
    if F.has_descriptors:
        k_base, v_base = k_ptr, v_ptr
    else:
        k_base = sequence.base(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_ks)
        v_base = sequence.base(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vs)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    walk = block_lists.walk_of(blocks, batch, head, tile, F)
    first, full_first, full_end, end = block_lists.spans(walk, mask.key_tiles(row0, band, F, BLOCK_M, BLOCK_N), F)
    full, partial = block_lists.first_tiles(walk, full_first, F)
    if F.has_descriptors and (F.has_left or F.has_right):  # without a band two loops were faster
        for i in tl.range(first, end):
            dq = _dq_tile(
                dq, q, dout, lse, delta, k_base, v_base, stride_ks, stride_vs, row0, i * BLOCK_N, batch, kv_head,
                band, walk, rule, drop, BLOCK_N, HEAD_DIM, HEAD_DIM_V, F, (i < full_first) | (i >= full_end),
            )  # fmt: skip
    else:
        for i in tl.range(full_first, full_end):
            place, full = block_lists.full_tile(walk, i, full, F)
            dq = _dq_tile(
                dq, q, dout, lse, delta, k_base, v_base, stride_ks, stride_vs, row0, place * BLOCK_N, batch, kv_head,
                band, walk, rule, drop, BLOCK_N, HEAD_DIM, HEAD_DIM_V, F, False,
            )  # fmt: skip
        for i in tl.range(0, end - first - (full_end - full_first)):
            place, partial = block_lists.masked_tile(walk, i, partial, first, full_first, full_end, F)
            dq = _dq_tile(
                dq, q, dout, lse, delta, k_base, v_base, stride_ks, stride_vs, row0, place * BLOCK_N, batch, kv_head,
                band, walk, rule, drop, BLOCK_N, HEAD_DIM, HEAD_DIM_V, F, True,
            )  # fmt: skip
    factor = scale
    if F.has_signed_scale:
        factor = scale * sign
    dq_base = sequence.base(dq_ptr, batch, head, q_start, stride_dqb, stride_dqh, stride_dqs)
    dq_ptrs = sequence.tile(dq_base, row0, local, stride_dqs, dims)
    dq_mask = (rows < len_q)[:, None] & (dims < HEAD_DIM)
    tl.store(dq_ptrs, (dq * factor).to(dq_ptr.dtype.element_ty), mask=dq_mask)
