"""What the roles of the backward kernels share, and the two of them that only move data."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flash_attn_plus.kernels.gluon.band import Band, span
from flash_attn_plus.kernels.gluon.hopper import Ring, add_out, copy_in, load_tile, named_sync, record
from flash_attn_plus.kernels.gluon.tiles import Mailbox, draw, place

SIDE = gl.constexpr(64)  # rows and columns of a tile of dq, of which a consumer makes one a step
# The same in shared memory and in the accumulator, in the order in which a warpgroup's registers hold it (`as_held`):
# by stores of 16 bytes without bank conflicts instead of 8 bytes with them, which gained 5 to 8 %, head dim 64 1 to 7.
HELD_ROWS = gl.constexpr(128)
HELD_COLS = gl.constexpr(32)
DQ_FULL = gl.constexpr(5)  # ids of hardware barriers between a consumer and the writer of dq; one each


@record
class Tile:
    """The keys of one tile and the tiles of queries that see them, for each head of the group."""

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
    band: object
    is_packed: gl.constexpr
    BLOCK_M: gl.constexpr

    @gluon.jit
    def steps(self):
        """Tiles of queries over all heads of the group."""
        return (self.end - self.first) * self.group

    @gluon.jit
    def after(self, head, tile):
        """(head, tile) of the next step."""
        is_last = tile + 1 == self.end
        return gl.where(is_last, head + 1, head), gl.where(is_last, self.first, tile + 1)

    @gluon.jit
    def padded_row(self, head, row):
        """(batch, head, row) in the accumulator; packed sequences share one batch and begin at whole tiles there."""
        if self.is_packed:
            return 0, head, (self.q_start + self.batch * self.BLOCK_M) // self.BLOCK_M * self.BLOCK_M + row
        return self.batch, head, row


@record
class Work:
    """What every role needs to know of the call to place a tile."""

    cu_q_ptr: object
    cu_k_ptr: object
    batch: object
    heads: object
    group: object
    chunk: object
    len_q: object
    len_k: object
    left: object
    right: object
    has_left: gl.constexpr
    has_right: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.jit
    def count(self):
        """The number of tiles, the empty ones of short sequences included."""
        return self.batch * (self.heads // self.group) * gl.cdiv(self.len_k, self.BLOCK_N)

    @gluon.jit
    def locate(self, number):
        """(batch, head of k, first key, first row of queries, of keys, their lengths) of a tile by its number."""
        heads_k = self.heads // self.group
        blocks = gl.cdiv(self.len_k, self.BLOCK_N)
        batch_head, block = place(number, self.batch * heads_k, self.chunk, blocks)
        sequence = batch_head // heads_k
        q_start, len_q = span(self.cu_q_ptr, sequence, self.len_q)
        k_start, len_k = span(self.cu_k_ptr, sequence, self.len_k)
        col0 = (blocks - 1 - block) * self.BLOCK_N  # under a causal band the first keys are seen by most queries
        return sequence, batch_head % heads_k, col0, q_start, k_start, len_q, len_k

    @gluon.jit
    def tile(self, numbers):
        """The tile of what `locate` returns."""
        sequence, head_k, col0, q_start, k_start, len_q, len_k = numbers
        band = Band(len_q, len_k, self.left, self.right, self.has_left, self.has_right)
        first, full_first, end = band.query_tiles(col0, self.BLOCK_N, self.BLOCK_M)
        masked_end = gl.minimum(gl.maximum(full_first, first), end)
        if self.has_left:
            masked_end = end
        masked_end = gl.where(col0 + self.BLOCK_N <= len_k, masked_end, end)
        return Tile(sequence, head_k, self.heads, self.group, col0, first, masked_end, end, q_start, k_start, band,
                    self.cu_q_ptr is not None, self.BLOCK_M)  # fmt: skip

    @gluon.jit
    def receive(self, mailbox, i):
        """The i-th tile; batch -1: none."""
        mailbox.wait(i)
        return self.tile((mailbox.read(i, 0), mailbox.read(i, 1), mailbox.read(i, 2), mailbox.read(i, 3),
                          mailbox.read(i, 4), mailbox.read(i, 5), mailbox.read(i, 6)))  # fmt: skip


@record
class Shared:
    """What the roles exchange through shared memory."""

    keys: Ring  # one stage, as is that of values
    values: Ring
    queries: Ring
    gradients: Ring
    lses: gl.shared_memory_descriptor
    deltas: gl.shared_memory_descriptor
    ds_tiles: gl.shared_memory_descriptor
    dq_tiles: gl.shared_memory_descriptor  # one for each consumer
    dq_empty: gl.shared_memory_descriptor
    mailbox: Mailbox


@gluon.jit
def _fill(i, desc, stat_desc, WHICH: gl.constexpr, ring, statistics, t, head, tile):
    """Copy in the i-th tile of Q or dO with its rows' statistic."""
    row = tile * t.BLOCK_M
    at_batch, at_head, at_row = t.padded_row(head, row)
    full = ring.acquire(i, desc.block_type.nbytes + stat_desc.block_type.nbytes)
    load_tile(desc, t.batch, t.q_start, t.band.len_q, head, row, full, ring.tile(i))
    at = [WHICH, at_batch * t.heads + at_head, at_row]
    copy_in(stat_desc, at, full, statistics.index(i % statistics.shape[0]))


@gluon.jit
def producer(q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work, counter_ptr):
    """One warp: hand out tiles, copy in K and V of each, and Q with its LSE and dO with its delta for every step."""
    tiles = work.count()
    number = gl.program_id(0)
    sent = 0
    n = 0
    while number < tiles:
        numbers = work.locate(number)
        t = work.tile(numbers)
        if t.col0 < t.band.len_k:
            shared.mailbox.send(sent, numbers)
            head = t.head_k * t.group
            tile = t.first
            steps = t.steps()
            if steps > 0:  # what is free first comes first
                _fill(n, q_desc, stat_desc, 0, shared.queries, shared.lses, t, head, tile)
            full = shared.values.acquire(sent, v_desc.block_type.nbytes)
            load_tile(v_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, full, shared.values.tile(sent))
            full = shared.keys.acquire(sent, k_desc.block_type.nbytes)
            load_tile(k_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, full, shared.keys.tile(sent))
            if steps > 0:
                _fill(n, do_desc, stat_desc, 1, shared.gradients, shared.deltas, t, head, tile)
            number = draw(number, tiles, counter_ptr)  # here the counter's latency is hidden
            for i in range(n + 1, n + steps):
                head, tile = t.after(head, tile)
                if q_desc.block_type.shape[-1] == 128:  # dO's stage is free first: up to 3 % for 16,384 keys
                    _fill(i, do_desc, stat_desc, 1, shared.gradients, shared.deltas, t, head, tile)
                    _fill(i, q_desc, stat_desc, 0, shared.queries, shared.lses, t, head, tile)
                else:
                    _fill(i, q_desc, stat_desc, 0, shared.queries, shared.lses, t, head, tile)
                    _fill(i, do_desc, stat_desc, 1, shared.gradients, shared.deltas, t, head, tile)
            n += steps
            sent += 1
        else:
            number = draw(number, tiles, counter_ptr)
    shared.mailbox.send(sent, (-1, 0, 0, 0, 0, 0, 0))
    shared.keys.drain(sent)
    shared.values.drain(sent)
    shared.queries.drain(n)
    shared.gradients.drain(n)


@gluon.jit
def dq_writer(dq_desc, shared, work):
    """One warp: add the consumers' parts of dq to the accumulator."""
    # the consumers' tiles follow each other, be they below each other or side by side
    HELD_A_ROW: gl.constexpr = 2 * HELD_ROWS // work.BLOCK_M
    done = 0
    t = work.receive(shared.mailbox, 0)
    while t.batch >= 0:
        head = t.head_k * t.group
        tile = t.first
        for _ in range(t.steps()):
            at_batch, at_head, at_row = t.padded_row(head, tile * work.BLOCK_M)
            for w in gl.static_range(2):
                named_sync(DQ_FULL + w, 160)
                source = shared.dq_tiles.index(w).reshape([1, 1, HELD_ROWS, HELD_COLS])
                add_out(dq_desc, [at_batch, at_head, at_row * HELD_A_ROW + w * HELD_ROWS, 0], source)
            for w in gl.static_range(2):
                tma.store_wait(1 - w)
                mbarrier.arrive(shared.dq_empty.index(w), count=1)
            head, tile = t.after(head, tile)
        shared.mailbox.release(done)
        done += 1
        t = work.receive(shared.mailbox, done)
    tma.store_wait(0)
