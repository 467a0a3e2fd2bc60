"""Forward pass: two to four warpgroups of 64 queries each share the tiles of K and V that one warp copies in.

A step issues the scores of the next tile and the product with V of the previous one back to back, so the softmax runs
while the tensor cores work (Shah et al., arXiv 2407.08608). Programs are persistent; the copying warp also hands out
the tiles, one ahead, so that the next tile's keys arrive during the epilogue of this one. Values are copied behind the
keys of the next step, which are used before them. Where three warpgroups take turns, one's softmax also runs under the
others' products. Four warpgroups hide each other's latency: each awaits both products before its softmax, which takes
few enough registers, and one whose rows see fewer keys runs ahead of the others into the next tile.
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

from flash_attn_plus.kernels.gluon import softmax
from flash_attn_plus.kernels.gluon.hopper import named_arrive, named_sync, new_barriers, new_ring, record, store_tile
from flash_attn_plus.kernels.gluon.places import new_places
from flash_attn_plus.kernels.gluon.query_tiles import KeysAt, Queries, Work, producer
from flash_attn_plus.kernels.gluon.score import Rule
from flash_attn_plus.kernels.gluon.tiles import new_mailbox


@record
class Turns:
    """Whose products are next, told at a hardware barrier of each warpgroup, FIRST + warpgroup."""

    FIRST: gl.constexpr
    COUNT: gl.constexpr  # warpgroups that take turns; 0: products are issued as warpgroups come

    @gluon.jit
    def wait(self, WG: gl.constexpr):
        """Wait for a warpgroup's turn."""
        if self.COUNT > 0:
            named_sync(self.FIRST + WG, 256)

    @gluon.jit
    def pass_on(self, WG: gl.constexpr):
        """End a warpgroup's turn."""
        if self.COUNT > 0:
            named_arrive(self.FIRST + (WG + 1) % self.COUNT, 256)


@gluon.jit
def _pass_over(keys, values, turns, i, WG: gl.constexpr):
    """Leave the i-th tiles of K and V to the other warpgroups."""
    turns.wait(WG)  # a turn that is not used, since all have as many
    turns.pass_on(WG)
    keys.wait(i)
    keys.release(i)
    values.wait(i)
    values.release(i)


@gluon.jit
def _consumer(o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY: gl.constexpr,
              WG: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 query rows of every tile."""
    BLOCK_M: gl.constexpr = queries.tiles.shape[1]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    BLOCK_D: gl.constexpr = keys.tiles.shape[2]
    CONSUMERS: gl.constexpr = work.ROWS // BLOCK_M
    IS_AHEAD: gl.constexpr = queries.tiles.shape[0] >= 2 * CONSUMERS
    AWAITS_BOTH: gl.constexpr = CONSUMERS == 4
    dtype: gl.constexpr = queries.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    done = 0  # tiles of queries
    n = 0  # tiles of keys
    batch, head, row0, q_start, band = work.receive(mailbox, 0)
    if WG == CONSUMERS - 1:
        turns.pass_on(WG)  # the first is warpgroup 0's
    while batch >= 0:
        first, full_first, full_end, end = band.key_tiles(row0, work.ROWS, BLOCK_N)
        row0 += WG * BLOCK_M
        own_end = end
        if BLOCK_N <= BLOCK_M:  # then a warpgroup's rows may see fewer tiles than the others' do
            _, _, full_end, own_end = band.key_tiles(row0, BLOCK_M, BLOCK_N)
        for _ in range(gl.maximum(gl.where(row0 < band.len_q, own_end, 0), first + 1), end):
            _pass_over(keys, values, turns, n, WG)
            n += 1
            end -= 1
        diagonal = row0 + band.len_k - band.len_q
        slope = rule.slope(batch, head)
        o = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, o_layout)
        slot = queries.slot(done, WG, CONSUMERS)
        q = queries.tiles.index(slot)
        mbarrier.wait(queries.full.index(slot), queries.phase(done, WG, CONSUMERS))
        keys.wait(n)
        s = warpgroup_mma(q, keys.tile(n).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        keys.release(n)
        if IS_AHEAD:
            if done > 0:  # by now the last tile's output has left, and its memory can take queries
                tma.store_wait(0)
                mbarrier.arrive(queries.empty.index(queries.slot(done - 1, WG, CONSUMERS)), count=1)
        s, _ = rule.apply(s, slope, diagonal, (end - 1) * BLOCK_N, s_layout)
        if (end <= full_first) | (end > full_end):
            s = band.mask_keys(s, row0, (end - 1) * BLOCK_N, s_layout)
        row_max, p, row_sum = softmax.start(s, rule.factor())
        decay = gl.full([BLOCK_M], 1.0, gl.float32, s_rows)
        weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
        values.wait(n)
        for i in range(1, end - first):
            block = end - 1 - i
            if not AWAITS_BOTH:  # else they came with the values
                keys.wait(n + i)
            turns.wait(WG)
            s = warpgroup_mma(q, keys.tile(n + i).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            o = softmax.rescale(o, gl.convert_layout(decay, o_rows, assert_trivial=True))
            o = warpgroup_mma(weights, values.tile(n + i - 1), o, is_async=True)
            turns.pass_on(WG)
            if AWAITS_BOTH:
                s, o = warpgroup_mma_wait(0, deps=(s, o))
            else:
                s = warpgroup_mma_wait(1, deps=(s,))
            keys.release(n + i)
            s, _ = rule.apply(s, slope, diagonal, block * BLOCK_N, s_layout)
            if (block < full_first) | (block >= full_end):
                s = band.mask_keys(s, row0, block * BLOCK_N, s_layout)
            row_max, decay, p, row_sum = softmax.step(s, rule.factor(), row_max, row_sum)
            if not FREES_EARLY:
                values.wait(n + i)  # used in the next step; here it keeps the compiler from waiting for o any earlier
            if not AWAITS_BOTH:
                o = warpgroup_mma_wait(0, deps=(o,))
                values.release(n + i - 1)
            if FREES_EARLY:
                values.wait(n + i)
            weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
        n += end - first
        done += 1
        o = softmax.rescale(o, gl.convert_layout(decay, o_rows, assert_trivial=True))
        o = warpgroup_mma(weights, values.tile(n - 1), o, is_async=True)
        factor, lse = softmax.finish(row_max, row_sum, s_rows)
        rows = row0 + gl.arange(0, BLOCK_M, s_rows)
        line = head if work.cu_q_ptr is not None else batch * work.heads + head
        gl.store(lse_ptr + line.to(gl.int64) * lse_rows + (q_start + rows), lse, mask=rows < band.len_q)
        following = work.receive(mailbox, done)
        o = warpgroup_mma_wait(0, deps=(o,))
        values.release(n - 1)
        o = o * gl.expand_dims(gl.convert_layout(factor, o_rows, assert_trivial=True), 1)
        q.store(o.to(dtype))  # the tile of queries is spent: its memory carries the output
        fence_async_shared()
        store_tile(o_desc, batch, q_start, band.len_q, head, row0, q)
        if not IS_AHEAD:
            tma.store_wait(0)
            mbarrier.arrive(queries.empty.index(slot), count=1)
        batch, head, row0, q_start, band = following
    if WG == 0:
        turns.wait(WG)  # hardware barriers must be even when the kernel ends
    if AWAITS_BOTH:
        if done > 0:
            keys.release(n)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["batch", "heads", "group", "chunk", "len_q", "len_k", "left", "right", "lse_rows", "rows_k",
                       "table_stride", "slope_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "cu_q_ptr", "cu_k_ptr", "counter_ptr", "used_ptr", "leftpad_ptr",
                                    "table_ptr", "slopes_ptr"],
)  # fmt: skip
def attention_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, cu_q_ptr, cu_k_ptr, counter_ptr,
    used_ptr, leftpad_ptr, table_ptr, slopes_ptr, batch, heads, group, chunk, len_q, len_k, left, right, lse_rows,
    rows_k, table_stride, slope_stride, scale, cap_scale, cap,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, PAGE: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    HAS_TURNS: gl.constexpr, FREES_EARLY: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out and natural-log lse of softmax(scale * q k^T / log2(e)) v; scale is in log2 units.

    Descriptors have boxes of 64 queries or BLOCK_N keys by the padded head dim. lse is (batch * heads, lse_rows), or
    (heads, lse_rows) for packed queries. `counter_ptr` is a zero, and is one again at the end, or None for tiles of
    equal work.
    """
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-2]
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [Q_TILES, BLOCK_M, BLOCK_D], layout)
    queries = Queries(q_tiles, new_barriers(Q_TILES, 1), new_barriers(Q_TILES, 1))
    if CONSUMERS == 4:
        keys, values = new_places(dtype, K_STAGES, BLOCK_N, BLOCK_D, 6, CONSUMERS)
    else:
        keys = new_ring(dtype, K_STAGES, BLOCK_N, BLOCK_D, 6, CONSUMERS)
        values = new_ring(dtype, V_STAGES, BLOCK_N, BLOCK_D, 6 + K_STAGES, CONSUMERS)
    turns = Turns(6 + K_STAGES + V_STAGES, CONSUMERS if HAS_TURNS else 0)
    mailbox = new_mailbox(6, CONSUMERS)
    fence_async_shared()
    keys_at = KeysAt(cu_k_ptr, used_ptr, leftpad_ptr, table_ptr, rows_k, table_stride, PAGE)
    work = Work(cu_q_ptr, keys_at, batch, heads, chunk, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT,
                CONSUMERS * BLOCK_M)  # fmt: skip
    rule = Rule(scale, cap_scale, cap, slopes_ptr, slope_stride, HAS_SOFTCAP)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 0)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 1)),
            (producer, (q_desc, None, k_desc, v_desc, queries, None, keys, values, mailbox, work, group,
                        counter_ptr, -1, 1)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 0)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 1)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 2)),
            (producer, (q_desc, None, k_desc, v_desc, queries, None, keys, values, mailbox, work, group,
                        counter_ptr, -1, 1)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 0)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 1)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 2)),
            (_consumer, (o_desc, lse_ptr, lse_rows, queries, keys, values, mailbox, turns, work, rule, FREES_EARLY, 3)),
            (producer, (q_desc, None, k_desc, v_desc, queries, None, keys, values, mailbox, work, group,
                        counter_ptr, -1, 1, True)),
        ], [4, 4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
