"""The sums of dq: a warp adds the consumers' parts to a float32 accumulator, two more round each tile that is complete.

A counter for every tile of queries of a head tells who does what, in whatever order programs come by. A program claims
a tile before its part is there: the first one's part is stored, so that nobody clears the accumulator, and the others
await that before they add theirs; all walk in the same direction, full bands in a circle, so that no two await each
other. With all its queries behind it, a program counts itself as done with each tile of them. The tiles are dealt to
the programs' rounding warps, which await their last part: so they are rounded out of the cache and beside the products.
Nothing waits for a program that does not run, as all draw their tiles of keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flash_attn_plus.kernels.gluon.hopper import (
    add_out,
    copy_in,
    copy_out,
    named_sync,
    record,
    store_tile,
    thread_barrier,
)

SIDE = gl.constexpr(64)  # rows and columns of a tile of dq, of which a consumer makes one a step
# The same in shared memory and in the accumulator, in the order in which a warpgroup's registers hold it (`as_held`):
# by stores of 16 bytes without bank conflicts instead of 8 bytes with them, which gained 5 to 8 %, head dim 64 1 to 7.
HELD_ROWS = gl.constexpr(128)
HELD_COLS = gl.constexpr(32)
DQ_FULL = gl.constexpr(5)  # ids of hardware barriers between a consumer and the writer of dq; one each
# A counter's units: claims below, then whether the first part is stored, above the programs that are done.
_STORED = gl.constexpr(1 << 15)
_DONE = gl.constexpr(1 << 16)

# Each is for a whole warp. The copy engine is another proxy than the one that counts: hence the fences.
_FIRST_LANE = "{\n.reg .pred is_first;\n.reg .u32 lane;\nmov.u32 lane, %laneid;\nsetp.eq.u32 is_first, lane, 0;\n"
# Relaxed: an acquire would only add that the nearest cache, which copies do not use, is emptied of all that spilled.
_CLAIM = gl.constexpr(f"""{_FIRST_LANE}
@is_first atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff;
bar.warp.sync 0xffffffff;
fence.proxy.async.global;
}}""")
_AWAIT_FIRST = gl.constexpr(f"""{{
.reg .pred is_missing;
again:
ld.relaxed.gpu.global.u32 $0, [$1];
and.b32 $0, $0, {_STORED.value};
setp.eq.u32 is_missing, $0, 0;
@is_missing bra again;
fence.acq_rel.gpu;
fence.proxy.async.global;
}}""")
_TELL_STORED = gl.constexpr(
    {
        pending: f"""{_FIRST_LANE}
cp.async.bulk.wait_group {pending};
fence.proxy.async.global;
bar.warp.sync 0xffffffff;
@is_first red.release.gpu.global.add.u32 [$1], {_STORED.value};
mov.u32 $0, 0;
}}"""
        for pending in (0, 2)
    }
)
_FLUSH = gl.constexpr("""cp.async.bulk.wait_group 0;
fence.proxy.async.global;
bar.warp.sync 0xffffffff;
mov.u32 $0, $1;""")
_AWAIT_ALL = gl.constexpr("""{
.reg .pred is_missing;
.reg .u32 done;
again:
ld.relaxed.gpu.global.u32 $0, [$1];
shr.u32 done, $0, 16;
setp.ne.u32 is_missing, done, $2;
@!is_missing bra over;
nanosleep.u32 200;
bra again;
over:
fence.acq_rel.gpu;
fence.proxy.async.global;
}""")


@gluon.jit
def as_held(dq):
    """A tile of dq in the order of registers, which moves none: (warp, 8 columns, lane, half of 16 rows, 2 columns)."""
    x = dq.reshape([4, 2, 4, 2, 8, 4, 2]).permute((0, 4, 2, 3, 5, 1, 6))
    return x.reshape([HELD_ROWS, HELD_COLS])


@gluon.jit
def _as_rows(held):
    """The reverse of `as_held` for one warp's quarter: 16 rows of dq."""
    return held.reshape([8, 8, 4, 2, 2]).permute((3, 1, 0, 2, 4)).reshape([HELD_ROWS // 8, SIDE])


@record
class Sums:
    """The accumulator of dq in memory, in tiles as held, two a tile of queries, and the counters of its tiles."""

    desc: object
    parts_ptr: object

    @gluon.jit
    def counter(self, t, head, tile):
        """Where the counter of a tile of queries, or of several, is."""
        at_batch, at_head, at_row = t.padded_row(head, tile * t.BLOCK_M)
        tiles = self.desc.shape[2] // (2 * HELD_ROWS)
        return self.parts_ptr + ((at_batch * t.heads + at_head) * tiles + at_row // t.BLOCK_M)

    @gluon.jit
    def place(self, t, head, tile, WHICH: gl.constexpr):
        """Where one half of a tile of queries is."""
        at_batch, at_head, at_row = t.padded_row(head, tile * t.BLOCK_M)
        return [at_batch, at_head, at_row * (2 * HELD_ROWS // t.BLOCK_M) + WHICH * HELD_ROWS, 0]

    @gluon.jit
    def claim(self, t, head, tile):
        """Announce a part; returns the counter as it was before."""
        address = self.counter(t, head, tile).to(gl.int64, bitcast=True)
        return gl.inline_asm_elementwise(_CLAIM, "=&r,l", [address], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def await_first(self, t, head, tile):
        """Wait until the part that is stored has reached memory."""
        address = self.counter(t, head, tile).to(gl.int64, bitcast=True)
        gl.inline_asm_elementwise(_AWAIT_FIRST, "=&r,l", [address], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def tell_stored(self, t, head, tile, PENDING: gl.constexpr):
        """Once all copies but the last PENDING have reached memory, let others add their parts to a tile."""
        address = self.counter(t, head, tile).to(gl.int64, bitcast=True)
        gl.inline_asm_elementwise(_TELL_STORED[PENDING], "=&r,l", [address], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def await_all(self, t, head, tile, parts):
        """Wait until all parts have reached memory."""
        address = self.counter(t, head, tile).to(gl.int64, bitcast=True)
        gl.inline_asm_elementwise(_AWAIT_ALL, "=&r,l,r", [address, parts], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def hand_over(self, t, head, tile, WHICH: gl.constexpr, part, is_first):
        """Store or add one consumer's part of a tile."""
        at = self.place(t, head, tile, WHICH)
        source = part.reshape([1, 1, HELD_ROWS, HELD_COLS])
        if is_first:
            copy_out(self.desc, at, source)
        else:
            add_out(self.desc, at, source)

    @gluon.jit
    def finish(self, t):
        """Once all copies have reached memory, count this program as done with every tile of queries (one warp)."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        lanes = gl.arange(0, 32, layout)
        done = gl.full([32], _DONE, gl.int32, layout)
        steps = t.steps()
        tiles = t.end - t.first
        gl.inline_asm_elementwise(_FLUSH, "=r,r", [steps], dtype=gl.int32, is_pure=False, pack=1)
        for at in range(0, steps, 32):
            step = at + lanes
            counters = self.counter(t, t.head_k * t.group + step // tiles, t.first + step % tiles)
            gl.atomic_add(counters, done, mask=step < steps, sem="release")


@gluon.jit
def dq_writer(sums, shared, work):
    """One warp: hand the consumers' parts of dq to the accumulator."""
    done = 0
    t = work.receive(shared.mailbox, 0)
    while t.batch >= 0:
        head = t.head_k * t.group
        tile = t.start
        steps = t.steps()
        claims = 0 * steps
        was_first = 0 * steps  # of the step before, which was not told
        if steps > 0:
            claims = sums.claim(t, head, tile)
        for i in range(steps):
            is_first = claims == 0
            before_head, before_tile = t.before(head, tile)
            waits = (claims > 0) & (claims < _STORED)
            if waits:
                if was_first > 0:  # who waits owes nothing, else all those of a circle would
                    sums.tell_stored(t, before_head, before_tile, 0)
                sums.await_first(t, head, tile)
            for w in gl.static_range(2):
                named_sync(DQ_FULL + w, 160)
                sums.hand_over(t, head, tile, w, shared.dq_tiles.index(w), is_first)
            for w in gl.static_range(2):
                tma.store_wait(1 - w)
                mbarrier.arrive(shared.dq_empty.index(w), count=1)
            # only now: to await this step's copies would hold up the next, by 6 % at head dim 64
            if (was_first > 0) & (waits == 0):
                sums.tell_stored(t, before_head, before_tile, 2)
            was_first = gl.where(is_first, 1, 0)
            head, tile = t.after(head, tile)
            if i + 1 < steps:
                claims = sums.claim(t, head, tile)
        if was_first > 0:
            before_head, before_tile = t.before(head, tile)
            sums.tell_stored(t, before_head, before_tile, 0)
        sums.finish(t)
        shared.mailbox.release(done)
        done += 1
        t = work.receive(shared.mailbox, done)


@gluon.jit
def dq_rounder(sums, held, rows, full, dq_desc, work, scale):
    """Two warps: dq of the tiles of queries that are dealt to this program, in the order in which they are complete."""
    BLOCK_M: gl.constexpr = work.BLOCK_M
    QUARTER: gl.constexpr = HELD_ROWS // 4
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    halves = 0
    for number in range(gl.program_id(0), work.query_count(), gl.num_programs(0)):
        t, head, tile = work.query_tile(number)
        row = tile * BLOCK_M
        if row < t.band.len_q:
            parts = t.band.parts(row, BLOCK_M, work.BLOCK_N)
            sums.await_all(t, head, tile, parts)
            for w in gl.static_range(2):
                thread_barrier()  # what was there is read
                if parts > 0:
                    mbarrier.expect(full, sums.desc.block_type.nbytes)
                    copy_in(sums.desc, sums.place(t, head, tile, w), full, held.reshape([1, 1, HELD_ROWS, HELD_COLS]))
                    mbarrier.wait(full, halves & 1)
                    halves += 1
                tma.store_wait(0)
                thread_barrier()
                for i in gl.static_range(4):
                    part = held.slice(i * QUARTER, QUARTER, 0).load(layout) * scale
                    part = gl.where(parts > 0, part, 0.0)
                    rows.slice(i * 16, 16, 0).store(_as_rows(part).to(dq_desc.dtype))
                fence_async_shared()
                if BLOCK_M == SIDE:  # the halves lie side by side, else below each other
                    store_tile(dq_desc, t.batch, t.q_start, t.band.len_q, head, row, rows, w * SIDE)
                elif row + w * SIDE < t.band.len_q:
                    store_tile(dq_desc, t.batch, t.q_start, t.band.len_q, head, row + w * SIDE, rows)
    tma.store_wait(0)
