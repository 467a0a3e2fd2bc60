"""Tiles of queries and the keys that they see: where they lie, and the rings that bring them in."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attn_plus.kernels.gluon.band import Band, span
from flash_attn_plus.kernels.gluon.hopper import load_tile, record
from flash_attn_plus.kernels.gluon.tiles import place, reset, take


@record
class KeysAt:
    """Where the keys of sequences lie: one after the other, in equal parts of a cache, or in pages of one."""

    cu_k_ptr: object
    used_ptr: object  # lengths, where not all of the cache is in use
    leftpad_ptr: object  # first rows in use
    table_ptr: object  # pages of each sequence
    rows: object  # of the cache from one sequence, or page, to the next
    table_stride: object
    PAGE: gl.constexpr  # rows of a page, a multiple of a tile's; 0: not paged

    @gluon.jit
    def span(self, batch, len_k):
        """(first row, length) of a sequence; rows of pages count from its own first one."""
        start, len_k = span(self.cu_k_ptr, batch, len_k)
        if self.cu_k_ptr is None and (self.used_ptr is not None or self.leftpad_ptr is not None):
            start = batch * self.rows
        if self.used_ptr is not None:
            len_k = gl.minimum(gl.load(self.used_ptr + batch), len_k)  # never beyond what is allocated
        if self.leftpad_ptr is not None:
            pad = gl.load(self.leftpad_ptr + batch)
            start += pad
            len_k = gl.maximum(len_k - pad, 0)
        return start, len_k

    @gluon.jit
    def place(self, batch, start, length, row):
        """(first row, length, row within) of the memory that holds a row's tile."""
        if self.PAGE > 0:
            block = gl.minimum(row, length - 1) // self.PAGE
            start = gl.load(self.table_ptr + batch.to(gl.int64) * self.table_stride + block) * self.rows
            length = gl.minimum(length - block * self.PAGE, self.PAGE)
            row -= block * self.PAGE
        return start, length, row


@gluon.jit
def _add(a, b):
    return a + b


@record
class Work:
    """What every role needs to know of the call to place a tile."""

    cu_q_ptr: object
    keys_at: KeysAt
    batch: object
    heads: object
    chunk: object
    len_q: object
    len_k: object
    left: object
    right: object
    has_left: gl.constexpr
    has_right: gl.constexpr
    ROWS: gl.constexpr

    @gluon.jit
    def seek(self, tile, base, before):
        """(base, tiles before it, sequence, tiles before it, end of the tiles known) for tiles in growing order.

        Packed sequences are looked through 32 at a time, from `base` on. A tile not below the end does not exist.
        """
        sequence = base
        first = before
        end = self.batch * self.heads * gl.cdiv(self.len_q, self.ROWS)
        if self.cu_q_ptr is not None:
            ends, end = self._ends(base, before)
            while (tile >= end) & (base + 32 < self.batch):
                base += 32
                before = end
                ends, end = self._ends(base, before)
            is_past = tile >= ends
            sequence = base + gl.sum(is_past.to(gl.int32), 0)
            first = gl.max(gl.where(is_past, ends, before), 0)
        return base, before, sequence, first, end

    @gluon.jit
    def _ends(self, base, before):
        """Where each of 32 packed sequences' tiles end, and all of them."""
        i = base + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        ends = gl.load(self.cu_q_ptr + gl.minimum(i + 1, self.batch))
        lengths = ends - gl.load(self.cu_q_ptr + gl.minimum(i, self.batch))
        tiles = gl.cdiv(lengths, self.ROWS) * self.heads
        return gl.associative_scan(tiles, 0, _add) + before, gl.sum(tiles, 0) + before

    @gluon.jit
    def locate(self, tile, sequence, before):
        """(batch, head, first row of the tile, first row of its queries, of its keys, the sequence's band)."""
        if self.cu_q_ptr is None:
            blocks = gl.cdiv(self.len_q, self.ROWS)
            batch_head, block = place(tile, self.batch * self.heads, self.chunk, blocks)
            sequence = batch_head // self.heads
            head = batch_head % self.heads
            q_start, len_q = span(self.cu_q_ptr, sequence, self.len_q)
        else:
            q_start, len_q = span(self.cu_q_ptr, sequence, self.len_q)
            head, block = place(tile - before, self.heads, self.chunk, gl.cdiv(len_q, self.ROWS))
        k_start, len_k = self.keys_at.span(sequence, self.len_k)
        band = Band(len_q, len_k, self.left, self.right, self.has_left, self.has_right)
        return sequence, head, block * self.ROWS, q_start, k_start, band

    @gluon.jit
    def receive(self, mailbox, i):
        """(batch, head, first row of the tile, of its queries, the sequence's band) of a tile; batch -1: no more."""
        mailbox.wait(i)
        band = Band(mailbox.read(i, 4), mailbox.read(i, 5), self.left, self.right, self.has_left, self.has_right)
        numbers = (mailbox.read(i, 0), mailbox.read(i, 1), mailbox.read(i, 2), mailbox.read(i, 3), band)
        mailbox.release(i)
        return numbers


@record
class Queries:
    """The consumers' tiles of queries, in turn; with more of them than consumers the next ones arrive early."""

    tiles: gl.shared_memory_descriptor  # [tiles, rows, columns]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def slot(self, i, consumer, CONSUMERS: gl.constexpr):
        """Where a consumer's i-th tile lies."""
        if self.tiles.shape[0] % CONSUMERS == 0:
            return i % (self.tiles.shape[0] // CONSUMERS) * CONSUMERS + consumer
        return (i * CONSUMERS + consumer) % self.tiles.shape[0]

    @gluon.jit
    def phase(self, i, consumer, CONSUMERS: gl.constexpr):
        """The parity of its barriers."""
        if self.tiles.shape[0] % CONSUMERS == 0:
            return i // (self.tiles.shape[0] // CONSUMERS) & 1
        return (i * CONSUMERS + consumer) // self.tiles.shape[0] & 1


@gluon.jit
def _fill(i, desc, ring, batch, at, head):
    """Copy in the i-th tile of K or of V."""
    start, length, row = at
    full = ring.acquire(i, desc.block_type.nbytes)
    load_tile(desc, batch, start, length, head, row, full, ring.tile(i))


@gluon.jit
def producer(q_desc, do_desc, k_desc, v_desc, queries, do_tiles, keys, values, mailbox, work, group, counter_ptr,
             STEP: gl.constexpr, LAG: gl.constexpr = 0, VALUES_FIRST: gl.constexpr = False):  # fmt: skip
    """One warp: hand out tiles, copy in their rows of Q, and of dO, and then keys and values, by STEP tiles a time.

    LAG is how many steps later than a tile's keys its values are used: so they are copied behind the next keys, too,
    or with VALUES_FIRST before them.
    """
    BLOCK_M: gl.constexpr = queries.tiles.shape[1]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    CONSUMERS: gl.constexpr = work.ROWS // BLOCK_M
    IS_AHEAD: gl.constexpr = queries.tiles.shape[0] >= 2 * CONSUMERS
    BYTES: gl.constexpr = q_desc.block_type.nbytes if do_desc is None else 2 * q_desc.block_type.nbytes
    tile = gl.program_id(0)
    sent = 0
    copied = 0
    base, before, sequence, first_tile, tiles = work.seek(tile, 0 * tile, 0 * tile)
    while tile < tiles:
        batch, head, row0, q_start, k_start, band = work.locate(tile, sequence, first_tile)
        mailbox.send(sent, (batch, head, row0, q_start, band.len_q, band.len_k))
        first, _, _, end = band.key_tiles(row0, work.ROWS, BLOCK_N)
        head_k = head // group
        col0 = (first if STEP > 0 else end - 1) * BLOCK_N
        at = work.keys_at.place(batch, k_start, band.len_k, col0)
        if not IS_AHEAD:  # what is free first comes first
            _fill(copied, k_desc, keys, batch, at, head_k)
        for w in gl.static_range(CONSUMERS):
            slot = queries.slot(sent, w, CONSUMERS)
            mbarrier.wait(queries.empty.index(slot), queries.phase(sent, w, CONSUMERS) ^ 1)
            mbarrier.expect(queries.full.index(slot), BYTES)
            row = row0 + w * BLOCK_M
            full = queries.full.index(slot)
            load_tile(q_desc, batch, q_start, band.len_q, head, row, full, queries.tiles.index(slot))
            if do_desc is not None:
                load_tile(do_desc, batch, q_start, band.len_q, head, row, full, do_tiles.index(slot))
        if IS_AHEAD:
            _fill(copied, k_desc, keys, batch, at, head_k)
        if LAG == 0:
            _fill(copied, v_desc, values, batch, at, head_k)
        turn = gl.maximum(end - first - 3, 0)  # late, so that programs end together, but with the latency hidden
        if turn == 0:
            tile = take(tile, counter_ptr)
        for i in range(1, end - first):
            col0 += STEP * BLOCK_N
            last_at = at
            at = work.keys_at.place(batch, k_start, band.len_k, col0)
            if VALUES_FIRST:
                _fill(copied + i - LAG, v_desc, values, batch, last_at, head_k)
            _fill(copied + i, k_desc, keys, batch, at, head_k)
            if not VALUES_FIRST:
                _fill(copied + i - LAG, v_desc, values, batch, at if LAG == 0 else last_at, head_k)
            if i == turn:
                tile = take(tile, counter_ptr)
        copied += end - first
        if LAG == 1:
            _fill(copied - 1, v_desc, values, batch, at, head_k)
        sent += 1
        base, before, sequence, first_tile, tiles = work.seek(tile, base, before)
    reset(tile, tiles, counter_ptr)
    mailbox.send(sent, (-1, 0, 0, 0, 0, 0))
    keys.drain(copied)
    values.drain(copied)
