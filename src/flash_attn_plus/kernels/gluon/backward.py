"""Backward pass: a program owns 128 keys, walks over the queries that see them and keeps dk and dv in registers.

Two warpgroups of 64 keys each compute transposed scores, so that the weights and their gradients are operands of the
products for dv and dk as they stand. They exchange the gradients of the scores through shared memory, each makes one
half of the columns of dq = ds k, and one warp adds those to a float32 accumulator in global memory: its sums are in no
fixed order, so dq is not bitwise repeatable, dk and dv are. Another warp copies tiles in.
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

from flash_attn_plus.kernels.gluon.backward_ends import ALIGN
from flash_attn_plus.kernels.gluon.band import Band, span
from flash_attn_plus.kernels.gluon.hopper import (
    Ring,
    add_out,
    copy_in,
    load_tile,
    named_arrive,
    named_sync,
    new_barriers,
    new_ring,
    record,
    store_tile,
)
from flash_attn_plus.kernels.gluon.tiles import place

_BOTH = gl.constexpr(4)  # ids of hardware barriers: both consumers
_DQ_FULL = gl.constexpr(5)  # a consumer and the writer; one each
_RINGS = gl.constexpr(7)


@gluon.jit
def padded_start(cu_q_ptr, batch, start):
    """First row of a sequence in arrays where every sequence begins at a multiple of ALIGN."""
    if cu_q_ptr is None:
        return 0 * batch
    return (start + batch * ALIGN) // ALIGN * ALIGN


@record
class Work:
    """The keys of one program and the tiles of queries that see them, for each head of the group."""

    batch: object
    head_k: object
    heads: object
    group: object
    col0: object
    first: object
    masked_end: object  # tiles [first, masked_end) need a mask
    end: object
    q_start: object
    k_start: object
    padded: object  # see padded_start
    band: object
    is_packed: gl.constexpr

    @gluon.jit
    def steps(self):
        """Tiles of queries over all heads of the group."""
        return (self.end - self.first) * self.group

    @gluon.jit
    def after(self, head, tile):
        """(head of the group, tile) of the next step."""
        is_last = tile + 1 == self.end
        return gl.where(is_last, head + 1, head), gl.where(is_last, self.first, tile + 1)

    @gluon.jit
    def padded_row(self, head, row):
        """(batch, head, row) in the accumulator; packed sequences share one batch."""
        if self.is_packed:
            return 0, head, self.padded + row
        return self.batch, head, row


@gluon.jit
def _locate(cu_q_ptr, cu_k_ptr, batch, heads, group, chunk, len_q, len_k, left, right, HAS_LEFT: gl.constexpr,
            HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    heads_k = heads // group
    blocks = gl.cdiv(len_k, BLOCK_N)
    batch_head, block = place(gl.program_id(0), batch * heads_k, chunk, blocks)
    sequence = batch_head // heads_k
    q_start, len_q = span(cu_q_ptr, sequence, len_q)
    k_start, len_k = span(cu_k_ptr, sequence, len_k)
    band = Band(len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
    col0 = (blocks - 1 - block) * BLOCK_N  # under a causal band the first keys are seen by most queries
    first, full_first, end = band.query_tiles(col0, BLOCK_N, BLOCK_M)
    end = gl.where(col0 < len_k, end, first)
    masked_end = gl.minimum(gl.maximum(full_first, first), end)
    if HAS_LEFT:
        masked_end = end
    masked_end = gl.where(col0 + BLOCK_N <= len_k, masked_end, end)
    return Work(sequence, batch_head % heads_k, heads, group, col0, first, masked_end, end, q_start, k_start,
                padded_start(cu_q_ptr, sequence, q_start), band, cu_q_ptr is not None)  # fmt: skip


@record
class Shared:
    """What the roles exchange through shared memory."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    queries: Ring
    gradients: Ring
    lses: gl.shared_memory_descriptor
    deltas: gl.shared_memory_descriptor
    ds_tiles: gl.shared_memory_descriptor
    dq_tiles: gl.shared_memory_descriptor
    dq_empty: gl.shared_memory_descriptor


@gluon.jit
def _producer(q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work):
    """One warp: copy in K and V once, then Q with its LSE and dO with its delta for every step."""
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    STAGES: gl.constexpr = shared.queries.tiles.shape[0]
    band = work.band
    full = shared.kv_full.index(0)
    mbarrier.expect(full, 2 * k_desc.block_type.nbytes)
    load_tile(k_desc, work.batch, work.k_start, band.len_k, work.head_k, work.col0, full, shared.k)
    load_tile(v_desc, work.batch, work.k_start, band.len_k, work.head_k, work.col0, full, shared.v)
    head = work.head_k * work.group
    tile = work.first
    for i in range(work.steps()):
        row = tile * BLOCK_M
        at_batch, at_head, at_row = work.padded_row(head, row)
        line = at_batch * work.heads + at_head
        full = shared.queries.acquire(i, q_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        load_tile(q_desc, work.batch, work.q_start, band.len_q, head, row, full, shared.queries.tile(i))
        copy_in(stat_desc, [0, line, at_row], full, shared.lses.index(i % STAGES))
        full = shared.gradients.acquire(i, do_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        load_tile(do_desc, work.batch, work.q_start, band.len_q, head, row, full, shared.gradients.tile(i))
        copy_in(stat_desc, [1, line, at_row], full, shared.deltas.index(i % STAGES))
        head, tile = work.after(head, tile)
    shared.queries.drain(work.steps())
    shared.gradients.drain(work.steps())


@gluon.jit
def _dq_writer(dq_desc, dq_tiles, dq_empty, work):
    """One warp: add the consumers' halves of dq to the accumulator."""
    CONSUMERS: gl.constexpr = dq_tiles.shape[0]
    BLOCK_M: gl.constexpr = dq_tiles.shape[1]
    HALF: gl.constexpr = dq_tiles.shape[2]
    head = work.head_k * work.group
    tile = work.first
    for _ in range(work.steps()):
        at_batch, at_head, at_row = work.padded_row(head, tile * BLOCK_M)
        for w in gl.static_range(CONSUMERS):
            named_sync(_DQ_FULL + w, 160)
            add_out(dq_desc, [at_batch, at_head, at_row, w * HALF], dq_tiles.index(w).reshape([1, 1, BLOCK_M, HALF]))
        for w in gl.static_range(CONSUMERS):
            tma.store_wait(CONSUMERS - 1 - w)
            mbarrier.arrive(dq_empty.index(w), count=1)
        head, tile = work.after(head, tile)
    tma.store_wait(0)


@gluon.jit
def _step(i, is_masked, row0, dk, dv, shared, limits, band, scale_log2, WG: gl.constexpr, HAS_MASK: gl.constexpr):
    """One tile of queries: (dk, dv) with its part added, dq's part handed to the writer."""
    BLOCK_D: gl.constexpr = shared.k.shape[1]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    STAGES: gl.constexpr = shared.queries.tiles.shape[0]
    KEYS: gl.constexpr = shared.k.shape[0] // 2
    HALF: gl.constexpr = BLOCK_D // 2
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    no_dq = gl.zeros([BLOCK_M, HALF], gl.float32, dq_layout)
    own_k = shared.k.slice(WG * KEYS, KEYS, 0)
    own_v = shared.v.slice(WG * KEYS, KEYS, 0)
    half_k = shared.k.slice(WG * HALF, HALF, 1)
    stage = i % STAGES
    q = shared.queries.tile(i)
    do = shared.gradients.tile(i)
    shared.queries.wait(i)
    s = warpgroup_mma(own_k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    shared.gradients.wait(i)
    dp = warpgroup_mma(own_v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if HAS_MASK:
        if is_masked:
            s = band.mask_queries(s, limits, row0, s_layout)
    lse = shared.lses.index(stage).reshape([BLOCK_M]).load(columns)  # late: registers are short before
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
    mbarrier.wait(shared.dq_empty.index(WG), (i & 1) ^ 1)  # needed below; here it keeps the compiler's waits apart
    delta = shared.deltas.index(stage).reshape([BLOCK_M]).load(columns)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
    weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
    shared.ds_tiles.index(stage).slice(WG * KEYS, KEYS, 0).store(ds)
    fence_async_shared()
    dv = warpgroup_mma(weights, do, dv, is_async=True)
    named_sync(_BOTH, 256)  # ds is complete, and its other stage free to be written next
    dq = warpgroup_mma(shared.ds_tiles.index(stage).permute((1, 0)), half_k, no_dq, use_acc=False, is_async=True)
    dv = warpgroup_mma_wait(1, deps=(dv,))
    shared.gradients.release(i)
    dk = warpgroup_mma(gl.convert_layout(ds, p_layout, assert_trivial=True), q, dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    shared.dq_tiles.index(WG).store(dq)
    fence_async_shared()
    named_arrive(_DQ_FULL + WG, 160)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.queries.release(i)
    return dk, dv


@gluon.jit
def _consumer(dk_desc, dv_desc, shared, work, scale_log2, scale, WG: gl.constexpr, HAS_MASK: gl.constexpr):
    """One warpgroup: 64 keys of the program and one half of dq's columns."""
    BLOCK_D: gl.constexpr = shared.k.shape[1]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    KEYS: gl.constexpr = shared.k.shape[0] // 2
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    band = work.band
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
    col0 = work.col0 + WG * KEYS
    mbarrier.wait(shared.kv_full.index(0), 0)
    if HAS_MASK:
        limits = band.query_limits(col0, work.first * BLOCK_M, KEYS, s_layout)
        tiles = work.end - work.first
        masked = work.masked_end - work.first
        tile = 0  # of this head
        for i in range(work.steps()):
            dk, dv = _step(i, tile < masked, tile * BLOCK_M, dk, dv, shared, limits, band, scale_log2, WG, True)
            tile = gl.where(tile + 1 == tiles, 0, tile + 1)
    else:
        for i in range(work.steps()):
            dk, dv = _step(i, False, 0, dk, dv, shared, None, band, scale_log2, WG, False)
    named_sync(_BOTH, 256)
    # the tiles of Q and dO are spent: one of each per consumer carries dk and dv out
    dv_tile = shared.gradients.tiles.index(WG)
    dk_tile = shared.queries.tiles.index(WG)
    dv_tile.store(dv.to(dtype))
    dk_tile.store((dk * scale).to(dtype))
    fence_async_shared()
    store_tile(dv_desc, work.batch, work.k_start, band.len_k, work.head_k, col0, dv_tile)
    store_tile(dk_desc, work.batch, work.k_start, band.len_k, work.head_k, col0, dk_tile)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["batch", "heads", "group", "chunk", "len_q", "len_k", "left", "right"],
    do_not_specialize_on_alignment=["cu_q_ptr", "cu_k_ptr"],
)
def attention_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stat_desc, dq_desc, dk_desc, dv_desc, cu_q_ptr, cu_k_ptr,
    batch, heads, group, chunk, len_q, len_k, left, right, scale_log2, scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_EDGE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv and the unscaled float32 dq accumulator from q, k, v, dout and the rows' statistics.

    Boxes hold 128 keys or 64 rows by the padded head dim (dq: half of it), `stat_desc` 64 of the rows' log2 LSE (0)
    or delta (1). HAS_EDGE: a tile of keys may reach beyond its sequence.
    """
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-2]
    STAGES: gl.constexpr = 2
    dtype: gl.constexpr = q_desc.dtype
    HAS_MASK: gl.constexpr = HAS_LEFT or HAS_RIGHT or HAS_EDGE
    gl.static_assert(BLOCK_N == 2 * BLOCK_M)  # consumers send dk and dv out through tiles of Q and dO
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    dq_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D // 2], gl.float32)
    k = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], kv_layout)
    v = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], kv_layout)
    kv_full = new_barriers(1, 1)
    queries = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS, 2)
    gradients = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS + STAGES, 2)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BLOCK_M], stat_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BLOCK_M], stat_desc.layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_M], ds_layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, BLOCK_D // 2], dq_layout)
    dq_empty = new_barriers(2, 1)
    fence_async_shared()
    work = _locate(cu_q_ptr, cu_k_ptr, batch, heads, group, chunk, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT,
                   BLOCK_M, BLOCK_N)  # fmt: skip
    shared = Shared(k, v, kv_full, queries, gradients, lses, deltas, ds_tiles, dq_tiles, dq_empty)
    gl.warp_specialize([
        (_consumer, (dk_desc, dv_desc, shared, work, scale_log2, scale, 0, HAS_MASK)),
        (_consumer, (dk_desc, dv_desc, shared, work, scale_log2, scale, 1, HAS_MASK)),
        (_producer, (q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work)),
        (_dq_writer, (dq_desc, dq_tiles, dq_empty, work)),
    ], [4, 1, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
