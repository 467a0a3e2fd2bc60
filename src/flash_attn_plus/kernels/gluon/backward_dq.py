"""Gradient of the queries by a kernel of its own: a program owns tiles of queries and walks over the keys they see.

It computes the scores and their gradients once more, and needs no sums across programs: dq is bitwise repeatable.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attn_plus.kernels.gluon.hopper import new_barriers, new_ring, store_tile
from flash_attn_plus.kernels.gluon.query_tiles import KeysAt, Queries, Work, producer
from flash_attn_plus.kernels.gluon.score import Rule
from flash_attn_plus.kernels.gluon.tiles import new_mailbox

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _consumer(dq_desc, lse_ptr, delta_ptr, lse_rows, queries, do_tiles, keys, values, mailbox, work, rule, scale,
              WG: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 query rows of every tile."""
    BLOCK_M: gl.constexpr = queries.tiles.shape[1]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    BLOCK_D: gl.constexpr = keys.tiles.shape[2]
    CONSUMERS: gl.constexpr = work.ROWS // BLOCK_M
    dtype: gl.constexpr = queries.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    done = 0  # tiles of queries
    n = 0  # tiles of keys
    batch, head, row0, q_start, band = work.receive(mailbox, 0)
    while batch >= 0:
        first, full_first, full_end, end = band.key_tiles(row0, work.ROWS, BLOCK_N)
        row0 += WG * BLOCK_M
        diagonal = row0 + band.len_k - band.len_q
        slope = rule.slope(batch, head)
        rows = row0 + gl.arange(0, BLOCK_M, s_rows)
        line = head if work.cu_q_ptr is not None else batch * work.heads + head
        at = line.to(gl.int64) * lse_rows + (q_start + rows)
        lse = gl.expand_dims(gl.load(lse_ptr + at, mask=rows < band.len_q, other=float("inf")) * _LOG2E, 1)
        delta = gl.expand_dims(gl.load(delta_ptr + at, mask=rows < band.len_q, other=0.0), 1)
        dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, dq_layout)
        slot = queries.slot(done, WG, CONSUMERS)
        mbarrier.wait(queries.full.index(slot), queries.phase(done, WG, CONSUMERS))
        for block in range(first, end):
            tile = slot
            if BLOCK_D > 128:  # 0 in a form that the loop computes: the descriptors of wide tiles spill outside it
                tile += n >> 31
            q = queries.tiles.index(tile)
            do = do_tiles.index(tile)
            keys.wait(n)
            s = warpgroup_mma(q, keys.tile(n).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            values.wait(n)
            dp = warpgroup_mma(do, values.tile(n).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            s, steepness = rule.apply(s, slope, diagonal, block * BLOCK_N, s_layout)
            if (block < full_first) | (block >= full_end):
                s = band.mask_keys(s, row0, block * BLOCK_N, s_layout)
            p = gl.exp2(s * rule.factor() - lse)
            if rule.has_softcap:
                p = p * steepness
            keys.wait(n)  # over long since; here it keeps the compiler's waits apart
            dp = warpgroup_mma_wait(0, deps=(dp,))
            values.release(n)
            ds = gl.convert_layout((p * (dp - delta)).to(dtype), ds_layout, assert_trivial=True)
            dq = warpgroup_mma(ds, keys.tile(n), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            keys.release(n)
            n += 1
        done += 1
        following = work.receive(mailbox, done)
        q = queries.tiles.index(slot)
        q.store((dq * scale).to(dtype))  # the tile of queries is spent: its memory carries the gradient
        fence_async_shared()
        store_tile(dq_desc, batch, q_start, band.len_q, head, row0, q)
        tma.store_wait(0)
        mbarrier.arrive(queries.empty.index(slot), count=1)
        batch, head, row0, q_start, band = following


@gluon.jit(
    do_not_specialize=["batch", "heads", "group", "chunk", "len_q", "len_k", "left", "right", "lse_rows",
                       "slope_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "delta_ptr", "cu_q_ptr", "cu_k_ptr", "counter_ptr", "slopes_ptr"],
)  # fmt: skip
def attention_backward_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, counter_ptr,
    slopes_ptr, batch, heads, group, chunk, len_q, len_k, left, right, lse_rows, slope_stride, scale_log2, cap_scale,
    cap, scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, Q_TILES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq from q, k, v, dout, the natural-log lse and delta of the forward kernel's shapes.

    Descriptors have boxes of 64 queries or BLOCK_N keys by the padded head dim. `counter_ptr` is a zero, and is one
    again at the end, or None for tiles of equal work.
    """
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-2]
    CONSUMERS: gl.constexpr = 2
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [Q_TILES, BLOCK_M, BLOCK_D], layout)
    do_tiles = gl.allocate_shared_memory(dtype, [Q_TILES, BLOCK_M, BLOCK_D], layout)
    queries = Queries(q_tiles, new_barriers(Q_TILES, 1), new_barriers(Q_TILES, 1))
    keys = new_ring(dtype, K_STAGES, BLOCK_N, BLOCK_D, 6, CONSUMERS)
    values = new_ring(dtype, V_STAGES, BLOCK_N, BLOCK_D, 6 + K_STAGES, CONSUMERS)
    mailbox = new_mailbox(6, CONSUMERS)
    fence_async_shared()
    keys_at = KeysAt(cu_k_ptr, None, None, None, 0, 0, 0)
    rule = Rule(scale_log2, cap_scale, cap, slopes_ptr, slope_stride, HAS_SOFTCAP)
    work = Work(cu_q_ptr, keys_at, batch, heads, chunk, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT,
                CONSUMERS * BLOCK_M)  # fmt: skip
    gl.warp_specialize([
        (_consumer, (dq_desc, lse_ptr, delta_ptr, lse_rows, queries, do_tiles, keys, values, mailbox, work,
                     rule, scale, 0)),
        (_consumer, (dq_desc, lse_ptr, delta_ptr, lse_rows, queries, do_tiles, keys, values, mailbox, work,
                     rule, scale, 1)),
        (producer, (q_desc, do_desc, k_desc, v_desc, queries, do_tiles, keys, values, mailbox, work, group,
                    counter_ptr, 1)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
