"""Few queries against many keys on Hopper: keys and values come through the copy engine.

Keys are the tall side of both products: scores are K q^T and outputs V^T P^T, so the few rows of a call, its queries of
all heads that share keys, are the short side of the matrix instruction, and nothing is computed for rows that are not
there. Tiles number split, split + splits, ... of a sequence's keys are one program's; its results are parts that the
last program of a sequence and head adds up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attn_plus.kernels.gluon.hopper import load_tile, new_barriers, record, thread_barrier
from flash_attn_plus.kernels.gluon.softmax import LN2

_LOWEST = gl.constexpr(-1e30)  # what maxima start from: finite, so that rows without keys need no branch


@record
class Piece:
    """A program's keys of one sequence and head: the tiles of rows first, first + step, ... below `length`."""

    start: object  # first row of the sequence in the cache
    head: object
    length: object
    first: object
    step: object

    @gluon.jit
    def fetch(self, desc, row, stage, full):
        """Copy the tile of rows `row` on into a stage; what lies beyond the sequence's end arrives as zeros."""
        mbarrier.expect(full, desc.block_type.nbytes)
        load_tile(desc, 0, self.start, self.length, self.head, row, full, stage)


@record
class Rows:
    """The rows of a call, query * group + head: queries of the heads that share keys."""

    q_ptr: object
    out_ptr: object
    lse_ptr: object
    batch: object
    head_k: object
    group: object
    count: object
    stride_qb: object
    stride_qs: object
    stride_qh: object
    stride_ob: object
    stride_os: object
    stride_oh: object
    stride_lb: object
    stride_lh: object
    HAS_ONE: gl.constexpr  # query: then rows are heads, which saves a division each

    @gluon.jit
    def place(self, rows):
        """(query, head of those that share keys) of each row."""
        if self.HAS_ONE:
            return rows * 0, rows
        else:
            return rows // self.group, rows % self.group

    @gluon.jit
    def queries(self, ROWS: gl.constexpr, D: gl.constexpr):
        """q, [ROWS, D]; zeros beyond the rows that there are."""
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        dims = gl.arange(0, D, gl.SliceLayout(0, layout))
        base = self.batch.to(gl.int64) * self.stride_qb + self.head_k * self.group * self.stride_qh
        query, head = self.place(rows)
        at = query * self.stride_qs + head * self.stride_qh
        at = gl.expand_dims(at, 1) + gl.expand_dims(dims, 0)
        return gl.load(self.q_ptr + base + at, mask=gl.expand_dims(rows < self.count, 1), other=0.0)

    @gluon.jit
    def store(self, rows, out, lse, dims, AXIS: gl.constexpr):
        """Write results of rows, which are `out`'s axis 1 - AXIS, and `dims` its other one."""
        batch = self.batch.to(gl.int64)
        query, head = self.place(rows)
        head += self.head_k * self.group
        lse_at = batch * self.stride_lb + head * self.stride_lh + query
        gl.store(self.lse_ptr + lse_at, lse, mask=rows < self.count)
        at = query * self.stride_os + head * self.stride_oh
        at = batch * self.stride_ob + (gl.expand_dims(at, AXIS) + gl.expand_dims(dims, 1 - AXIS))
        mask = gl.expand_dims(rows < self.count, AXIS)
        gl.store(self.out_ptr + at, out.to(self.out_ptr.dtype.element_ty), mask=mask)


@record
class Parts:
    """Results over some of the keys, in float32: outputs [split, ROWS, D] of a sequence and head, and LSEs in log2."""

    ptr: object
    lse_ptr: object
    counter_ptr: object
    number: object
    ROWS: gl.constexpr
    D: gl.constexpr

    @gluon.jit
    def store(self, split, rows, out, lse, dims, count):
        """Write one, out [D, ROWS]; whether all others are there is told to every thread."""
        at = split * self.ROWS + rows
        gl.store(self.lse_ptr + at, lse, mask=rows < count)
        ptrs = self.ptr + (gl.expand_dims(at * self.D, 0) + gl.expand_dims(dims, 1))
        gl.store(ptrs, out, mask=gl.expand_dims(rows < count, 0))
        thread_barrier()  # every thread of this program has written
        is_last = gl.atomic_add(self.counter_ptr, 1, sem="acq_rel") == self.number - 1
        if is_last:
            gl.store(self.counter_ptr, 0)
        return is_last

    @gluon.jit
    def combine(self, target, COMBINED: gl.constexpr, MOST: gl.constexpr):
        """Add them up, COMBINED rows of MOST parts at a time: every thread its own elements, in the parts' order.

        Code that runs once takes as long to fetch as to run, so it is short: a part's weights are worked out by one
        thread each and shared out, and a thread's elements lie at offsets that the compiler knows.
        """
        WARPS: gl.constexpr = gl.num_warps()
        DOWN: gl.constexpr = COMBINED if WARPS > COMBINED else WARPS
        ACROSS: gl.constexpr = WARPS // DOWN
        WIDE: gl.constexpr = 4 // ACROSS if ACROSS < 4 else 1
        layout: gl.constexpr = gl.BlockedLayout([1, MOST, WIDE], [1, 1, 32], [DOWN, 1, ACROSS], [2, 1, 0])
        flat: gl.constexpr = gl.BlockedLayout([1, 1], [32 // MOST, MOST], [WARPS, 1], [1, 0])
        out_layout: gl.constexpr = gl.SliceLayout(1, layout)
        row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
        part = gl.arange(0, MOST, gl.SliceLayout(0, flat))
        parts = gl.arange(0, MOST, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        parts = gl.expand_dims(gl.expand_dims(parts, 0), 2)
        dims = gl.arange(0, self.D, gl.SliceLayout(0, out_layout))
        for first in range(0, target.count, COMBINED):
            flat_rows = first + gl.arange(0, COMBINED, gl.SliceLayout(1, flat))
            rows = first + gl.arange(0, COMBINED, row_layout)
            at = gl.expand_dims(gl.expand_dims(rows * self.D, 1) + gl.expand_dims(dims, 0), 1)
            top = gl.full([COMBINED], _LOWEST, gl.float32, gl.SliceLayout(1, flat))
            total = gl.zeros([COMBINED], gl.float32, gl.SliceLayout(1, flat))
            out = gl.zeros([COMBINED, self.D], gl.float32, out_layout)
            for begin in range(0, self.number, MOST):
                lse_at = gl.expand_dims((begin + part) * self.ROWS, 0) + gl.expand_dims(flat_rows, 1)
                is_part = gl.expand_dims(begin + part < self.number, 0)
                lses = gl.load(self.lse_ptr + lse_at, mask=is_part, other=_LOWEST, cache_modifier=".cg")
                ptrs = (self.ptr + begin * self.ROWS * self.D + at) + parts * (self.ROWS * self.D)
                x = gl.load(ptrs, mask=begin + parts < self.number, other=0.0, cache_modifier=".cg")
                higher = gl.maximum(top, gl.max(lses, 1))
                weights = gl.exp2(lses - gl.expand_dims(higher, 1))
                decay = gl.exp2(top - higher)
                total = total * decay + gl.sum(weights, 1)
                top = higher
                out = out * gl.expand_dims(gl.convert_layout(decay, row_layout), 1)
                weights = gl.expand_dims(gl.convert_layout(weights, gl.SliceLayout(2, layout)), 2)
                out += gl.sum(x * weights, 1)
            lse = gl.where(top == _LOWEST, float("inf"), (top + gl.log2(total)) * LN2)
            factor = gl.convert_layout(1.0 / total, row_layout)
            target.store(rows, out * gl.expand_dims(factor, 1), gl.convert_layout(lse, row_layout), dims, 1)


@gluon.jit(
    do_not_specialize=["group", "count", "len_q", "len_k", "rows_k", "most_splits", "right"],
    do_not_specialize_on_alignment=["used_ptr"],
)  # fmt: skip
def attention_decode_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, used_ptr, parts_ptr, counters_ptr, group, count, len_q,
    len_k, rows_k, most_splits, right, stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_lb,
    stride_lh, scale, ROWS: gl.constexpr, STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr, LEAST_TILES: gl.constexpr,
    IS_SPLIT: gl.constexpr, COMBINED: gl.constexpr, MOST: gl.constexpr, HAS_ONE: gl.constexpr,
):  # fmt: skip
    """out and natural-log LSE of softmax(scale * q k^T / log2(e)) v for `len_q` queries; scale is in log2 units.

    Programs are (head of keys, sequence, split). Descriptors have boxes of a tile of one head's keys and end where its
    sequence does. Counters are zeros, one a sequence and head, and are zeros again at the end.
    """
    N: gl.constexpr = k_desc.block_type.shape[-2]
    D: gl.constexpr = k_desc.block_type.shape[-1]
    dtype: gl.constexpr = k_desc.dtype
    head = gl.program_id(0)
    batch = gl.program_id(1)
    split = gl.program_id(2)
    length = len_k
    if used_ptr is not None:
        length = gl.minimum(gl.load(used_ptr + batch), length)
    keys_full = new_barriers(STAGES, 1)
    values_full = new_barriers(STAGES, 1)
    fence_async_shared()
    thread_barrier()
    target = Rows(q_ptr, out_ptr, lse_ptr, batch, head, group, count, stride_qb, stride_qs, stride_qh, stride_ob,
                  stride_os, stride_oh, stride_lb, stride_lh, HAS_ONE)  # fmt: skip
    q = target.queries(ROWS, D)
    splits = 1  # here at the earliest the length is waited for
    if IS_SPLIT:  # by the keys in use, whatever the number of programs
        splits = gl.maximum(gl.minimum(gl.cdiv(length, N * LEAST_TILES), most_splits), 1)
        if split >= splits:
            return
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], dtype)
    keys = gl.allocate_shared_memory(dtype, [STAGES, N, D], shared)
    values = gl.allocate_shared_memory(dtype, [STAGES, N, D], shared)
    piece = Piece(batch * rows_k, head, length, split * N, splits * N)
    for i in range(0, STAGES):
        row = piece.first + i * piece.step
        if row < length:
            piece.fetch(k_desc, row, keys.index(i), keys_full.index(i))
            piece.fetch(v_desc, row, values.index(i), values_full.index(i))
    q_tile = gl.allocate_shared_memory(dtype, [ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype))
    p_tile = gl.allocate_shared_memory(dtype, [ROWS, N], gl.NVMMASharedLayout.get_default_for([ROWS, N], dtype))
    q_tile.store(q)
    fence_async_shared()
    thread_barrier()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    s_cols: gl.constexpr = gl.SliceLayout(0, layout)
    none = gl.zeros([N, ROWS], gl.float32, layout)
    tall = gl.arange(0, N, gl.SliceLayout(1, layout))
    rows = gl.arange(0, ROWS, s_cols)
    o = gl.zeros([D, ROWS], gl.float32, layout)
    row_max = gl.full([ROWS], _LOWEST, gl.float32, s_cols)
    sums = gl.zeros([N, ROWS], gl.float32, layout)
    end = gl.full([ROWS], 0, gl.int32, s_cols) + length
    if HAS_RIGHT:
        end = gl.minimum(end, rows // group + (length - len_q + right + 1))
    done = 0
    for row in range(piece.first, length, piece.step):
        stage = done % STAGES
        phase = done // STAGES & 1
        coming = row + STAGES * piece.step
        mbarrier.wait(keys_full.index(stage), phase)
        s = warpgroup_mma(keys.index(stage), q_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = gl.where(gl.expand_dims(tall, 1) < gl.expand_dims(end - row, 0), s, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(s, 0) * scale)
        decay = gl.exp2(row_max - new_max)
        p = gl.exp2(s * scale - gl.expand_dims(new_max, 0))
        row_max = new_max
        sums = sums * gl.expand_dims(decay, 0) + p
        p_tile.store(gl.permute(p.to(dtype), (1, 0)))
        fence_async_shared()
        thread_barrier()  # all have used the keys, too
        if coming < length:
            piece.fetch(k_desc, coming, keys.index(stage), keys_full.index(stage))
        o = o * gl.expand_dims(decay, 0)
        mbarrier.wait(values_full.index(stage), phase)
        o = warpgroup_mma(values.index(stage).permute((1, 0)), p_tile.permute((1, 0)), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        thread_barrier()  # all have used the values
        if coming < length:
            piece.fetch(v_desc, coming, values.index(stage), values_full.index(stage))
        done += 1  # noqa: SIM113 - Gluon has no enumerate
    weight = gl.sum(sums, 0)
    is_empty = weight == 0.0
    o = o * gl.expand_dims(gl.where(is_empty, 0.0, 1.0 / weight), 0)
    lse = gl.where(is_empty, _LOWEST, row_max + gl.log2(weight))
    dims = gl.arange(0, D, gl.SliceLayout(1, layout))
    if IS_SPLIT and splits > 1:
        item = (batch * gl.num_programs(0) + head).to(gl.int64)
        items = gl.num_programs(1).to(gl.int64) * gl.num_programs(0)
        launched = gl.num_programs(2)
        parts = Parts(parts_ptr + item * launched * (ROWS * D), parts_ptr + (items * D + item) * launched * ROWS,
                      counters_ptr + item, splits, ROWS, D)  # fmt: skip
        if parts.store(split, rows, o, lse, dims, count):
            parts.combine(target, COMBINED, MOST)
    else:
        target.store(rows, o, gl.where(is_empty, float("inf"), lse * LN2), dims, 0)
