"""dk and dv for head dims beyond 128: one warpgroup computes the weights and dv, the other their gradients and dk.

Each holds 64 keys' rows of its result in registers. The weights go from the first to the second through shared
memory. dq comes from a kernel of its own (backward_dq).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from flash_attn_plus.kernels.gluon.backward_statistics import DELTA, LSE, Statistics, new_statistics
from flash_attn_plus.kernels.gluon.backward_work import Work, producer
from flash_attn_plus.kernels.gluon.hopper import (
    Ring,
    named_arrive,
    named_sync,
    new_ring,
    record,
    reinterpret,
    store_tile,
    thread_barrier,
)
from flash_attn_plus.kernels.gluon.score import Rule
from flash_attn_plus.kernels.gluon.tiles import Mailbox, new_mailbox

_P_FULL = gl.constexpr(4)  # ids of hardware barriers, one for each tile of weights
_P_EMPTY = gl.constexpr(13)
_RINGS = gl.constexpr(6)


@record
class Shared:
    """What the roles exchange through shared memory."""

    keys: Ring  # one stage, as is that of values
    values: Ring
    queries: Ring
    gradients: Ring
    statistics: Statistics
    p_tiles: gl.shared_memory_descriptor
    mailbox: Mailbox


@gluon.jit
def _dv_consumer(dv_desc, shared, work, rule, HAS_MASK: gl.constexpr):
    """One warpgroup: the weights of every step, and dv."""
    KEYS: gl.constexpr = shared.keys.tiles.shape[1]
    BLOCK_D: gl.constexpr = shared.keys.tiles.shape[2]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    dtype: gl.constexpr = shared.keys.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    out = reinterpret(shared.p_tiles, dtype, [KEYS, BLOCK_D], out_layout)
    k = shared.keys.tiles.index(0)
    done = 0  # tiles of keys
    n = 0  # tiles of queries
    t = work.receive(shared.mailbox, 0)
    while t.batch >= 0:
        dv = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
        begin = n
        end = n + t.steps()
        limits = None
        if HAS_MASK:
            limits = t.band.query_limits(t.col0, t.first * BLOCK_M, KEYS, s_layout)
        tiles = t.end - t.first
        masked = t.masked_end - t.first
        tile = 0  # of this head
        head = t.head_k * t.group
        diagonal = t.col0 - t.first * BLOCK_M - (t.band.len_k - t.band.len_q)
        shared.keys.wait(done)
        for i in range(begin, end):
            shared.queries.wait(i)
            q = shared.queries.tile(i).permute((1, 0))
            s = warpgroup_mma(k, q, no_scores, use_acc=False, is_async=True)
            lse = shared.statistics.read(i, LSE, 0, BLOCK_M, gl.SliceLayout(0, s_layout))
            s = warpgroup_mma_wait(0, deps=(s,))
            shared.queries.release(i)
            s, steepness = rule.apply(s, rule.slope(t.batch, head), diagonal, tile * BLOCK_M, s_layout)
            if HAS_MASK:
                if tile < masked:
                    s = t.band.mask_queries(s, limits, tile * BLOCK_M, s_layout)
            p = gl.exp2(s * rule.factor() - gl.expand_dims(lse, 0))
            weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
            if rule.has_softcap:
                p = p * steepness
            if i >= begin + 2:
                named_sync(_P_EMPTY + i % 2, 256)
            shared.p_tiles.index(i % 2).store(p)
            named_arrive(_P_FULL + i % 2, 256)
            shared.gradients.wait(i)
            dv = warpgroup_mma(weights, shared.gradients.tile(i), dv, is_async=True)
            dv = warpgroup_mma_wait(0, deps=(dv,))
            shared.gradients.release(i)
            tile = gl.where(tile + 1 == tiles, 0, tile + 1)
            head = gl.where(tile == 0, head + 1, head)
        n = end
        for i in gl.static_range(2):  # the tiles of weights are spent: their memory carries dv
            if end - begin > i:
                named_sync(_P_EMPTY + (end - 1 - i) % 2, 256)
        out.store(dv.to(dtype))
        fence_async_shared()
        t = work.receive(shared.mailbox, done)  # read again, so that it takes no registers in between
        store_tile(dv_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, out)
        shared.keys.release(done)
        shared.mailbox.release(done)
        done += 1
        t = work.receive(shared.mailbox, done)
        tma.store_wait(0)
        thread_barrier()


@gluon.jit
def _dk_consumer(dk_desc, shared, work, scale):
    """One warpgroup: the gradients of the weights of every step, and dk."""
    KEYS: gl.constexpr = shared.keys.tiles.shape[1]
    BLOCK_D: gl.constexpr = shared.keys.tiles.shape[2]
    BLOCK_M: gl.constexpr = shared.queries.tiles.shape[1]
    dtype: gl.constexpr = shared.keys.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    v = shared.values.tiles.index(0)
    done = 0  # tiles of keys
    n = 0  # tiles of queries
    t = work.receive(shared.mailbox, 0)
    while t.batch >= 0:
        dk = gl.zeros([KEYS, BLOCK_D], gl.float32, kv_layout)
        end = n + t.steps()
        shared.values.wait(done)
        for i in range(n, end):
            shared.gradients.wait(i)
            do = shared.gradients.tile(i).permute((1, 0))
            dp = warpgroup_mma(v, do, no_scores, use_acc=False, is_async=True)
            delta = shared.statistics.read(i, DELTA, 0, BLOCK_M, gl.SliceLayout(0, s_layout))
            dp = warpgroup_mma_wait(0, deps=(dp,))
            shared.gradients.release(i)
            named_sync(_P_FULL + i % 2, 256)
            p = shared.p_tiles.index(i % 2).load(s_layout)
            named_arrive(_P_EMPTY + i % 2, 256)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
            shared.queries.wait(i)
            weights = gl.convert_layout(ds, p_layout, assert_trivial=True)
            dk = warpgroup_mma(weights, shared.queries.tile(i), dk, is_async=True)
            dk = warpgroup_mma_wait(0, deps=(dk,))
            shared.queries.release(i)
        n = end
        shared.values.release(done)
        shared.keys.wait(done)
        out = shared.keys.tiles.index(0)  # the last scores came before the last weights: K is spent
        out.store((dk * scale).to(dtype))
        fence_async_shared()
        t = work.receive(shared.mailbox, done)  # read again, so that it takes no registers in between
        store_tile(dk_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, out)
        shared.mailbox.release(done)
        tma.store_wait(0)
        thread_barrier()
        shared.keys.release(done)
        done += 1
        t = work.receive(shared.mailbox, done)


@gluon.jit(
    do_not_specialize=["batch", "heads", "group", "chunk", "len_q", "len_k", "left", "right", "slope_stride"],
    do_not_specialize_on_alignment=["cu_q_ptr", "cu_k_ptr", "counter_ptr", "slopes_ptr"],
)
def attention_backward_wide_kernel(
    q_desc, k_desc, v_desc, do_desc, stat_desc, dk_desc, dv_desc, cu_q_ptr, cu_k_ptr, counter_ptr,
    slopes_ptr, batch, heads, group, chunk, len_q, len_k, left, right, slope_stride, scale_log2, cap_scale, cap, scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_EDGE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv from q, k, v, dout and the rows' statistics.

    Boxes hold 64 keys or rows by the padded head dim, `stat_desc` 64 of the rows' log2 LSE (0) or delta (1).
    HAS_EDGE: a tile of keys may reach beyond its sequence. `counter_ptr`: as in the forward kernel.
    """
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-2]
    STAGES: gl.constexpr = 2
    dtype: gl.constexpr = q_desc.dtype
    HAS_MASK: gl.constexpr = HAS_LEFT or HAS_RIGHT or HAS_EDGE
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], gl.float32)
    keys = new_ring(dtype, 1, BLOCK_N, BLOCK_D, _RINGS, 2)
    values = new_ring(dtype, 1, BLOCK_N, BLOCK_D, _RINGS + 1, 1)
    queries = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS + 2, 2)
    gradients = new_ring(dtype, STAGES, BLOCK_M, BLOCK_D, _RINGS + 2 + STAGES, 2)
    statistics = new_statistics(stat_desc, BLOCK_M, 0, STAGES, False)
    p_tiles = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N, BLOCK_M], p_layout)
    mailbox = new_mailbox(7, 2)
    fence_async_shared()
    work = Work(cu_q_ptr, cu_k_ptr, batch, heads, group, chunk, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT,
                False, BLOCK_M, BLOCK_N)  # fmt: skip
    rule = Rule(scale_log2, cap_scale, cap, slopes_ptr, slope_stride, HAS_SOFTCAP)
    shared = Shared(keys, values, queries, gradients, statistics, p_tiles, mailbox)
    gl.warp_specialize([
        (_dv_consumer, (dv_desc, shared, work, rule, HAS_MASK)),
        (_dk_consumer, (dk_desc, shared, work, scale)),
        (producer, (q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work, counter_ptr, False)),
    ], [4, 1], [CONSUMER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
