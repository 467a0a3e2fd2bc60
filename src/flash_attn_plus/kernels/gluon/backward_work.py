"""What the roles of the backward kernels share, and the one that hands out tiles and copies in what they need."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn_plus.kernels.gluon.backward_statistics import DELTA, LSE, Statistics
from flash_attn_plus.kernels.gluon.band import Band, span
from flash_attn_plus.kernels.gluon.hopper import Ring, load_tile, record
from flash_attn_plus.kernels.gluon.tiles import Mailbox, draw, place, reset


@record
class Tile:
    """The keys of one tile and the tiles of queries that see them, for each head of the group."""

    batch: object
    head_k: object
    heads: object
    group: object
    col0: object
    first: object
    start: object  # where each head's walk begins, and ends before
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
        tile = gl.where(tile + 1 == self.end, self.first, tile + 1)
        return gl.where(tile == self.start, head + 1, head), tile

    @gluon.jit
    def before(self, head, tile):
        """(head, tile) of the step before; computed, since a loop does not carry what was another name's value."""
        return gl.where(tile == self.start, head - 1, head), gl.where(tile == self.first, self.end, tile) - 1

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
    in_circle: gl.constexpr  # tiles of a full band begin at different queries: else they add to one tile of dq at once
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.jit
    def count(self):
        """The number of tiles, the empty ones of short sequences included."""
        return self.batch * (self.heads // self.group) * gl.cdiv(self.len_k, self.BLOCK_N)

    @gluon.jit
    def spans(self, sequence):
        """(first row of queries, their number, of keys), of no more than was stated: others would wait for the rest."""
        q_start, len_q = span(self.cu_q_ptr, sequence, self.len_q)
        k_start, len_k = span(self.cu_k_ptr, sequence, self.len_k)
        return q_start, gl.minimum(len_q, self.len_q), k_start, gl.minimum(len_k, self.len_k)

    @gluon.jit
    def locate(self, number):
        """(batch, head of k, first key, first row of queries, of keys, their lengths) of a tile by its number."""
        heads_k = self.heads // self.group
        blocks = gl.cdiv(self.len_k, self.BLOCK_N)
        batch_head, block = place(number, self.batch * heads_k, self.chunk, blocks)
        sequence = batch_head // heads_k
        q_start, len_q, k_start, len_k = self.spans(sequence)
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
        start = first
        if self.in_circle and not (self.has_left or self.has_right):
            start += col0 // self.BLOCK_N * (end - first) // gl.cdiv(gl.maximum(len_k, 1), self.BLOCK_N)
        return Tile(sequence, head_k, self.heads, self.group, col0, first, start, masked_end, end, q_start, k_start,
                    band, self.cu_q_ptr is not None, self.BLOCK_M)  # fmt: skip

    @gluon.jit
    def query_count(self):
        """The number of tiles of queries of all heads, those beyond short sequences included."""
        return self.batch * self.heads * gl.cdiv(self.len_q, self.BLOCK_M)

    @gluon.jit
    def query_tile(self, number):
        """(its sequence and head of k as a tile of no keys, head, tile of queries), about in the order of `locate`."""
        tiles = gl.cdiv(self.len_q, self.BLOCK_M)
        batch_head, block = place(number, self.batch * self.heads, self.chunk * self.group, tiles)
        sequence = batch_head // self.heads
        head = batch_head % self.heads
        q_start, len_q, k_start, len_k = self.spans(sequence)
        t = self.tile((sequence, head // self.group, 0, q_start, k_start, len_q, len_k))
        return t, head, tiles - 1 - block

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
    statistics: Statistics
    ds_tiles: gl.shared_memory_descriptor
    dq_tiles: gl.shared_memory_descriptor  # one for each consumer
    dq_empty: gl.shared_memory_descriptor
    mailbox: Mailbox


@gluon.jit
def _fill(i, desc, stat_desc, WHICH: gl.constexpr, ring, statistics, t, head, tile):
    """Copy in the i-th tile of Q or dO with its rows' statistic."""
    row = tile * t.BLOCK_M
    at_batch, at_head, at_row = t.padded_row(head, row)
    HAS_MORE: gl.constexpr = WHICH == LSE or not statistics.are_terms
    full = ring.acquire(i, desc.block_type.nbytes + (stat_desc.block_type.nbytes if HAS_MORE else 0))
    load_tile(desc, t.batch, t.q_start, t.band.len_q, head, row, full, ring.tile(i))
    statistics.copy(i, stat_desc, WHICH, at_batch * t.heads + at_head, at_row, full)


@gluon.jit
def _draw(number, tiles, counter_ptr, DRAWS_ALL: gl.constexpr):
    """The number of the tile after this one."""
    if DRAWS_ALL:
        number = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        reset(number, tiles, counter_ptr)
        return number
    return draw(number, tiles, counter_ptr)


@gluon.jit
def producer(q_desc, k_desc, v_desc, do_desc, stat_desc, shared, work, counter_ptr, DRAWS_ALL: gl.constexpr):
    """One warp: hand out tiles, copy in K and V of each, and Q with its LSE and dO with its delta for every step.

    DRAWS_ALL: none is dealt to a program before it runs, since others may wait for it.
    """
    tiles = work.count()
    number = gl.program_id(0)
    if DRAWS_ALL:
        number = _draw(number, tiles, counter_ptr, DRAWS_ALL)
    sent = 0
    n = 0
    while number < tiles:
        numbers = work.locate(number)
        t = work.tile(numbers)
        if t.col0 < t.band.len_k:
            shared.mailbox.send(sent, numbers)
            head = t.head_k * t.group
            tile = t.start
            steps = t.steps()
            if steps > 0:  # what is free first comes first
                _fill(n, q_desc, stat_desc, LSE, shared.queries, shared.statistics, t, head, tile)
            full = shared.values.acquire(sent, v_desc.block_type.nbytes)
            load_tile(v_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, full, shared.values.tile(sent))
            full = shared.keys.acquire(sent, k_desc.block_type.nbytes)
            load_tile(k_desc, t.batch, t.k_start, t.band.len_k, t.head_k, t.col0, full, shared.keys.tile(sent))
            if steps > 0:
                _fill(n, do_desc, stat_desc, DELTA, shared.gradients, shared.statistics, t, head, tile)
            number = _draw(number, tiles, counter_ptr, DRAWS_ALL)  # here the counter's latency is hidden
            for i in range(n + 1, n + steps):
                head, tile = t.after(head, tile)
                if q_desc.block_type.shape[-1] == 128:  # dO's stage is free first: up to 3 % for 16,384 keys
                    _fill(i, do_desc, stat_desc, DELTA, shared.gradients, shared.statistics, t, head, tile)
                    _fill(i, q_desc, stat_desc, LSE, shared.queries, shared.statistics, t, head, tile)
                else:
                    _fill(i, q_desc, stat_desc, LSE, shared.queries, shared.statistics, t, head, tile)
                    _fill(i, do_desc, stat_desc, DELTA, shared.gradients, shared.statistics, t, head, tile)
            n += steps
            sent += 1
        else:
            number = _draw(number, tiles, counter_ptr, DRAWS_ALL)
    shared.mailbox.send(sent, (-1, 0, 0, 0, 0, 0, 0))
    shared.keys.drain(sent)
    shared.values.drain(sent)
    shared.queries.drain(n)
    shared.gradients.drain(n)
