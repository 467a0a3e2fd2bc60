"""Backward pass: a program owns tiles of 128 keys, walks over the queries that see them, keeps dk and dv in registers.

Two warpgroups of 64 keys each compute transposed scores, so that the weights and their gradients are operands of the
products for dv and dk as they stand. They exchange the gradients of the scores through shared memory, each makes one
half of dq = ds k, and other warps add those up in global memory and round what is complete (backward_sums): the order
of the sums is not fixed, so dq is not bitwise repeatable, dk and dv are. Where that matters, or where so few keys are
seen that the sums cost more than they save, dq comes from a kernel of its own (backward_dq). Another warp hands out the
tiles and copies in what they need, also for the tile after this one.
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

from flash_attn_plus.kernels.gluon.backward_statistics import DELTA, LSE, new_statistics
from flash_attn_plus.kernels.gluon.backward_sums import (
    DQ_FULL,
    HELD_COLS,
    HELD_ROWS,
    SIDE,
    Sums,
    as_held,
    dq_rounder,
    dq_writer,
)
from flash_attn_plus.kernels.gluon.backward_work import Shared, Work, producer
from flash_attn_plus.kernels.gluon.hopper import (
    named_arrive,
    named_sync,
    new_barriers,
    new_ring,
    reinterpret,
    store_tile,
    thread_barrier,
)
from flash_attn_plus.kernels.gluon.score import Rule
from flash_attn_plus.kernels.gluon.tiles import new_mailbox

_BOTH = gl.constexpr(4)  # id of the consumers' hardware barrier; 5 and 6 are DQ_FULL's
_RINGS = gl.constexpr(7)
# Queries whose weights a warpgroup holds at a time: more would spill. Products are those of a whole tile, since halves
# read more shared memory, of which a step is short already: with them 8,192 queries took 14 % longer.
PART = gl.constexpr(64)


@gluon.jit
def _parts(x, layout: gl.constexpr):
    """The columns of a product in parts of the layout's width, as they lie in the registers; one or two."""
    if x.shape[1] == PART:
        parts = (x,)
    else:
        a, b = x.reshape([x.shape[0], 2, PART]).permute((0, 2, 1)).split()
        parts = (
            gl.convert_layout(a, layout, assert_trivial=True),
            gl.convert_layout(b, layout, assert_trivial=True),
        )
    return parts


@gluon.jit
def _dq(stage, shared, WG: gl.constexpr):
    """Issue the product for one half of dq."""
    k = shared.keys.tiles.index(0)
    ds = shared.ds_tiles.index(stage)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    no_dq = gl.zeros([SIDE, SIDE], gl.float32, layout)
    if k.shape[1] == SIDE:  # of the rows, else of the columns
        dq = warpgroup_mma(ds.slice(WG * SIDE, SIDE, 1).permute((1, 0)), k, no_dq, use_acc=False, is_async=True)
    else:
        dq = warpgroup_mma(ds.permute((1, 0)), k.slice(WG * SIDE, SIDE, 1), no_dq, use_acc=False, is_async=True)
    return dq


@gluon.jit
def _send(dq, shared, WG: gl.constexpr):
    """Hand one half of dq to the writer."""
    shared.dq_tiles.index(WG).store(as_held(dq))
    fence_async_shared()
    named_arrive(DQ_FULL + WG, 160)


@gluon.jit
def _step(i, done, is_last, is_masked, row0, diagonal, slope, dk, dv, shared, limits, band, rule, WG: gl.constexpr,
          HAS_MASK: gl.constexpr, HAS_DQ: gl.constexpr):  # fmt: skip
    """One tile of queries: (dk, dv) with its part added, dq's part handed to the writer.

    With the last one the keys' tile is done: V is released after its product and K after dq's, so that the next ones
    are copied meanwhile. `is_last` None: later, by the caller.
    """
    BLOCK_D: gl.constexpr = shared.keys.tiles.shape[2]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    KEYS: gl.constexpr = shared.keys.tiles.shape[1] // 2
    LAST: gl.constexpr = BLOCK_M - PART
    dtype: gl.constexpr = shared.keys.tiles.dtype
    whole_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, whole_layout)
    zero = 0
    if HAS_MASK or BLOCK_D == 128:
        # unknown to the compiler, which else keeps descriptors of K and V in registers and other things in memory: 15
        # to 20 accesses a step, and 15 % less speed at head dim 128 causal
        zero = i >> 31
    own_k = shared.keys.tiles.index(zero).slice(WG * KEYS, KEYS, 0)
    own_v = shared.values.tiles.index(zero).slice(WG * KEYS, KEYS, 0)
    stage = i % 2
    q = shared.queries.tile(i)
    do = shared.gradients.tile(i)
    statistics = shared.statistics
    own_ds = shared.ds_tiles.index(stage).slice(WG * KEYS, KEYS, 0)
    shared.queries.wait(i)
    s = warpgroup_mma(own_k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    s = statistics.subtract(i, LSE, s, KEYS, whole_layout)
    shared.gradients.wait(i)
    dp = warpgroup_mma(own_v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    dp = statistics.subtract(i, DELTA, dp, KEYS, whole_layout)
    s = _parts(warpgroup_mma_wait(2 if statistics.are_terms else 1, deps=(s,)), s_layout)
    for at in gl.static_range(0, BLOCK_M, PART):
        scores, steepness = rule.apply(s[at // PART], slope, diagonal, row0 + at, s_layout)
        if HAS_MASK:
            if is_masked:
                scores = band.mask_queries(scores, limits, row0 + at, s_layout)
        exponents = scores * rule.factor()
        if not statistics.are_terms:
            exponents -= gl.expand_dims(statistics.read(i, LSE, at, PART, columns), 0)
        p = gl.exp2(exponents)
        weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
        dv = warpgroup_mma(weights, do.slice(at, PART, 0), dv, is_async=True)
        if rule.has_softcap:
            p = p * steepness
        if HAS_DQ and at == LAST:  # needed below; here it keeps the compiler's waits apart
            mbarrier.wait(shared.dq_empty.index(WG), (i & 1) ^ 1)
        else:
            shared.gradients.wait(i)  # over long since; likewise
        if at == 0:
            dp = _parts(warpgroup_mma_wait(1, deps=(dp,)), s_layout)
            if is_last is not None:
                if is_last:
                    shared.values.release(done)
        dp_part = dp[at // PART]
        if not statistics.are_terms:  # late: registers are short before
            dp_part -= gl.expand_dims(statistics.read(i, DELTA, at, PART, columns), 0)
        ds = (p * dp_part).to(dtype)
        if HAS_DQ:
            own_ds.slice(at, PART, 1).store(ds)
        if at < LAST:
            dk = warpgroup_mma(
                gl.convert_layout(ds, p_layout, assert_trivial=True), q.slice(at, PART, 0), dk, is_async=True
            )
    if HAS_DQ:
        fence_async_shared()
        named_sync(_BOTH, 256)  # ds is complete, and its other stage free to be written next
        dq = _dq(stage, shared, WG)
    dk = warpgroup_mma(gl.convert_layout(ds, p_layout, assert_trivial=True), q.slice(LAST, PART, 0), dk, is_async=True)
    if HAS_DQ:
        dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
        if is_last is not None:
            if is_last:
                shared.keys.release(done)
        shared.gradients.release(i)
        _send(dq, shared, WG)
    else:
        dv = warpgroup_mma_wait(1, deps=(dv,))
        if is_last is not None:
            if is_last:
                shared.keys.release(done)
        shared.gradients.release(i)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.queries.release(i)
    return dk, dv


@gluon.jit
def _pass_by(i, shared, WG: gl.constexpr, HAS_DQ: gl.constexpr):
    """One tile of queries that see none of this warpgroup's keys: its half of dq, from the others'."""
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    KEYS: gl.constexpr = shared.keys.tiles.shape[1] // 2
    ds_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    shared.queries.wait(i)
    shared.gradients.wait(i)
    if HAS_DQ:
        stage = i % 2
        no_ds = gl.zeros([KEYS, BLOCK_M], shared.keys.tiles.dtype, ds_layout)
        shared.ds_tiles.index(stage).slice(WG * KEYS, KEYS, 0).store(no_ds)
        mbarrier.wait(shared.dq_empty.index(WG), (i & 1) ^ 1)
        fence_async_shared()
        named_sync(_BOTH, 256)
        _send(warpgroup_mma_wait(0, deps=(_dq(stage, shared, WG),)), shared, WG)
    shared.gradients.release(i)
    shared.queries.release(i)


@gluon.jit
def _consumer(dk_desc, dv_desc, shared, work, rule, scale, WG: gl.constexpr, HAS_MASK: gl.constexpr,
              HAS_DQ: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 keys of every tile, and one half of dq."""
    BLOCK_D: gl.constexpr = shared.keys.tiles.shape[2]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    KEYS: gl.constexpr = dk_desc.block_type.shape[-2]
    dtype: gl.constexpr = shared.keys.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    EARLY: gl.constexpr = HAS_MASK or BLOCK_D == 64  # of a full band at head dim 128 it costs 1 %
    OUTS: gl.constexpr = HELD_ROWS * HELD_COLS * 32 // dtype.primitive_bitwidth // (KEYS * BLOCK_D)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype)
    out = reinterpret(shared.dq_tiles.index(WG), dtype, [OUTS, KEYS, BLOCK_D], out_layout).index(0)
    done = 0  # tiles of keys
    n = 0  # tiles of queries
    t = work.receive(shared.mailbox, 0)
    while t.batch >= 0:
        dk = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
        dv = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
        end = n + t.steps()
        limits = None
        if HAS_MASK:
            limits = t.band.query_limits(t.col0 + WG * KEYS, t.first * BLOCK_M, KEYS, s_layout)
        tiles = t.end - t.first
        masked = t.masked_end - t.first
        tile = t.start - t.first  # of this head
        head = t.head_k * t.group
        diagonal = t.col0 + WG * KEYS - t.first * BLOCK_M - (t.band.len_k - t.band.len_q)
        shared.keys.wait(done)
        shared.values.wait(done)
        passed = 0
        if WG == 1 and work.has_right:
            passed = gl.where((diagonal - t.band.right >= BLOCK_M) & (n < end), 1, 0)
            if passed > 0:
                _pass_by(n, shared, WG, HAS_DQ)
            tile = gl.where(passed == tiles, 0, passed)
            head += gl.where(passed == tiles, 1, 0)
        if EARLY:
            if n + passed >= end:
                shared.values.release(done)
                shared.keys.release(done)
        for i in range(n + passed, end):
            slope = rule.slope(t.batch, head)
            is_last = i + 1 == end if EARLY else None
            dk, dv = _step(i, done, is_last, tile < masked, tile * BLOCK_M, diagonal, slope, dk, dv, shared, limits,
                           t.band, rule, WG, HAS_MASK, HAS_DQ)  # fmt: skip
            tile = gl.where(tile + 1 == tiles, 0, tile + 1)
            head = gl.where(tile == t.start - t.first, head + 1, head)
        if not EARLY:
            shared.values.release(done)
            shared.keys.release(done)
        n = end
        t = work.receive(shared.mailbox, done)  # read again, so that it takes no registers in between
        if HAS_DQ:
            mbarrier.wait(shared.dq_empty.index(WG), (n & 1) ^ 1)
        out.store(dv.to(dtype))
        fence_async_shared()
        store_tile(dv_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0 + WG * KEYS, out)
        tma.store_wait(0)
        thread_barrier()
        out.store((dk * scale).to(dtype))
        fence_async_shared()
        store_tile(dk_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0 + WG * KEYS, out)
        shared.mailbox.release(done)
        done += 1
        t = work.receive(shared.mailbox, done)
        tma.store_wait(0)
        thread_barrier()


@gluon.jit(
    do_not_specialize=["batch", "heads", "group", "chunk", "len_q", "len_k", "left", "right", "slope_stride"],
    do_not_specialize_on_alignment=["cu_q_ptr", "cu_k_ptr", "counter_ptr", "slopes_ptr", "parts_ptr"],
)
def attention_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stat_desc, sum_desc, dq_desc, dk_desc, dv_desc, cu_q_ptr, cu_k_ptr,
    counter_ptr, slopes_ptr, parts_ptr, batch, heads, group, chunk, len_q, len_k, left, right, slope_stride,
    scale_log2, cap_scale, cap, scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_EDGE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv and, unless `sum_desc`, `dq_desc` and `parts_ptr` are None, dq from q, k, v, dout and rows' statistics.

    Boxes hold BLOCK_N keys or BLOCK_M rows by the padded head dim (dk, dv: 64 keys; dq: 64 x 64), `stat_desc` BLOCK_M
    of the rows' log2 LSE (0) or delta (1). HAS_EDGE: a tile of keys may reach beyond its sequence. `sum_desc` is room
    for dq in float32, in tiles as held, `parts_ptr` a zero for each of a head's tiles of BLOCK_M rows. `counter_ptr` is
    a zero, and is one again at the end, or None for tiles of equal work, which only do without dq.
    """
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-2]
    STAGES: gl.constexpr = 2
    dtype: gl.constexpr = q_desc.dtype
    HAS_DQ: gl.constexpr = sum_desc is not None
    HAS_MASK: gl.constexpr = HAS_LEFT or HAS_RIGHT or HAS_EDGE
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    dq_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HELD_ROWS, HELD_COLS], gl.float32)
    keys = new_ring(dtype, 1, BLOCK_N, BLOCK_D, _RINGS, 2)
    values = new_ring(dtype, 1, BLOCK_N, BLOCK_D, _RINGS + 1, 2)
    queries = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS + 2, 2)
    gradients = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS + 2 + STAGES, 2)
    statistics = new_statistics(stat_desc, BLOCK_M, BLOCK_N // 2, STAGES, BLOCK_D > 64)
    ds_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_M], ds_layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, HELD_ROWS, HELD_COLS], dq_layout)
    dq_empty = new_barriers(2, 1)
    mailbox = new_mailbox(7, 3 if HAS_DQ else 2)
    fence_async_shared()
    work = Work(cu_q_ptr, cu_k_ptr, batch, heads, group, chunk, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT,
                HAS_DQ, BLOCK_M, BLOCK_N)  # fmt: skip
    rule = Rule(scale_log2, cap_scale, cap, slopes_ptr, slope_stride, HAS_SOFTCAP)
    shared = Shared(keys, values, queries, gradients, statistics, ds_tiles, dq_tiles, dq_empty, mailbox)
    if HAS_DQ:
        sums = Sums(sum_desc, parts_ptr)
        rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, SIDE], dtype)
        held = gl.allocate_shared_memory(gl.float32, [HELD_ROWS, HELD_COLS], dq_layout)
        rows = gl.allocate_shared_memory(dtype, [SIDE, SIDE], rows_layout)
        held_full = new_barriers(1, 1)
        fence_async_shared()
        gl.warp_specialize([
            (_consumer, (dk_desc, dv_desc, shared, work, rule, scale, 0, HAS_MASK, HAS_DQ)),
            (_consumer, (dk_desc, dv_desc, shared, work, rule, scale, 1, HAS_MASK, HAS_DQ)),
            (dq_rounder, (sums, held, rows, held_full.index(0), dq_desc, work, scale)),
            (producer, (q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work, counter_ptr, True)),
            (dq_writer, (sums, shared, work)),
        ], [4, 2, 1, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (dk_desc, dv_desc, shared, work, rule, scale, 0, HAS_MASK, HAS_DQ)),
            (_consumer, (dk_desc, dv_desc, shared, work, rule, scale, 1, HAS_MASK, HAS_DQ)),
            (producer, (q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work, counter_ptr, False)),
        ], [4, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
