"""Block masks: for every tile the list of the tiles that its scores lie in, and the mask where blocks cut tiles.

A list is two counts, the numbers of the full tiles, a free place, and from its end the numbers of the partial tiles,
which need a mask; both ascend from where they begin. So kernels walk lists as they walk ranges, in time proportional
to the visible tiles, and nobody on the host has to know how many there are.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import mask, sequence
from flash_attn_plus.kernels.triton.call import Band


class Blocks(NamedTuple):
    """A block mask, uint8 with adjacent key blocks, and the lists made from it; strides of shared dimensions are 0."""

    lists_ptr: tl.tensor
    list_batch: tl.tensor
    list_head: tl.tensor
    list_length: tl.tensor  # all of a list: counts, numbers and the free place
    mask_ptr: tl.tensor
    mask_batch: tl.tensor
    mask_head: tl.tensor
    mask_row: tl.tensor
    block_q: tl.tensor
    block_k: tl.tensor


class Walk(NamedTuple):
    """The list of one tile, and its head's mask."""

    list_ptr: tl.tensor
    length: tl.tensor
    mask_ptr: tl.tensor
    mask_row: tl.tensor
    block_q: tl.tensor
    block_k: tl.tensor


@triton.jit
def _mask_of(mask_ptr, batch, head, mask_batch, mask_head):
    return mask_ptr + batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head


@triton.jit
def walk_of(blocks, batch, head, tile, F: tl.constexpr):
    """The walk of one tile of one head; what `blocks` is, nothing, without a block mask."""
    walk = blocks
    if F.has_blocks:
        place = batch.to(tl.int64) * blocks.list_batch + head.to(tl.int64) * blocks.list_head
        list_ptr = blocks.lists_ptr + place + tile.to(tl.int64) * blocks.list_length
        mask_ptr = _mask_of(blocks.mask_ptr, batch, head, blocks.mask_batch, blocks.mask_head)
        walk = Walk(list_ptr, blocks.list_length, mask_ptr, blocks.mask_row, blocks.block_q, blocks.block_k)
    return walk


@triton.jit
def spans(walk, band_tiles, F: tl.constexpr):
    """(first, full_first, full_end, end) of a walk, in places of its list; without one those of the band's tiles."""
    first, full_first, full_end, end = band_tiles
    if F.has_blocks:
        first, full_first = full_first * 0, full_first * 0
        full_end = tl.load(walk.list_ptr)
        end = full_end + tl.load(walk.list_ptr + 1)
    return first, full_first, full_end, end


@triton.jit
def _full_entry(walk, i):
    return tl.load(walk.list_ptr + 2 + i)


@triton.jit
def _partial_entry(walk, i):
    return tl.load(walk.list_ptr + walk.length - 1 - i)


@triton.jit
def first_tiles(walk, place, F: tl.constexpr):
    """(first full tile, first partial tile): what the loops over `full_tile` and `masked_tile` begin with."""
    full = place
    partial = place
    if F.has_blocks:
        full = _full_entry(walk, 0)
        partial = _partial_entry(walk, 0)
    return full, partial


@triton.jit
def full_tile(walk, i, tile, F: tl.constexpr):
    """(the i-th tile that needs no mask, the next one): read a step ahead, so that no step waits for its number."""
    current = i
    if F.has_blocks:
        current = tile
        tile = _full_entry(walk, i + 1)
    return current, tile


@triton.jit
def masked_tile(walk, i, tile, first, full_first, full_end, F: tl.constexpr):
    """Like `full_tile`, of the tiles that need a mask."""
    if F.has_blocks:
        current = tile
        tile = _partial_entry(walk, i + 1)
    else:
        current = mask.masked_tile(i, first, full_first, full_end)
    return current, tile


@triton.jit
def keep(rows, cols, band, walk, F: tl.constexpr, BY_BOUNDS: tl.constexpr = True):
    """`mask.keep`, and the key's block is visible to the query's."""
    inside = mask.keep(rows, cols, band, F, BY_BOUNDS)
    if F.has_cut_blocks:
        ptrs = walk.mask_ptr + (rows // walk.block_q) * walk.mask_row + cols // walk.block_k
        inside &= tl.load(ptrs, mask=inside, other=0) != 0
    return inside


@triton.jit
def _blocks_of(row0, col0, band, mask_ptr, mask_row, block_q, block_k, is_wanted, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """(some, all) int32 of is_wanted's shape: visible blocks among those that each tile at (row0, col0) overlaps."""
    last_row, last_col = tl.minimum(row0 + BLOCK_M, band.len_q), tl.minimum(col0 + BLOCK_N, band.len_k)
    some = is_wanted.to(tl.int32) * 0
    every = some + 1
    for i in range(0, (BLOCK_M + block_q - 2) // block_q + 1):
        row = row0 // block_q + i
        for j in range(0, (BLOCK_N + block_k - 2) // block_k + 1):
            col = col0 // block_k + j
            overlaps = is_wanted & (row * block_q < last_row) & (col * block_k < last_col)
            visible = tl.load(mask_ptr + row * mask_row + col + some * 0, mask=overlaps, other=0) != 0
            some |= visible.to(tl.int32)
            every &= (visible | (overlaps == 0)).to(tl.int32)
    return some, every


@triton.jit(do_not_specialize=["len_q", "len_k", "left", "right", "heads", "tiles", "others"])
def attention_lists_kernel(
    lists_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, mask_batch, mask_head, mask_row, block_q, block_k,
    len_q, len_k, left, right, heads, tiles, others,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr, IS_BY_KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One list: the tiles of queries that a tile of keys lies in (IS_BY_KEYS), or the reverse."""
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = batch_head // heads, batch_head % heads
    _, len_q = sequence.query_span(cu_q_ptr, batch, len_q, F)
    _, len_k = sequence.key_span(cu_k_ptr, None, None, batch, len_k, F)
    band = Band(len_q, len_k, left, right)
    mask_ptr = _mask_of(mask_ptr, batch, head, mask_batch, mask_head)
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * (others + 3)
    if IS_BY_KEYS:
        first, full_first, full_end, end = mask.query_tiles(tile * BLOCK_N, band, F, BLOCK_M, BLOCK_N)
    else:
        first, full_first, full_end, end = mask.key_tiles(tile * BLOCK_M, band, F, BLOCK_M, BLOCK_N)
    end = tl.minimum(end, others)
    full = tile * 0
    partial = tile * 0
    for start in range(first, end, CHUNK):
        other = start + tl.arange(0, CHUNK)
        if IS_BY_KEYS:
            row0, col0 = other * BLOCK_M, tile * BLOCK_N
        else:
            row0, col0 = tile * BLOCK_M, other * BLOCK_N
        some, every = _blocks_of(
            row0, col0, band, mask_ptr, mask_row, block_q, block_k, other < end, BLOCK_M, BLOCK_N
        )  # fmt: skip
        is_full = some & every & ((other >= full_first) & (other < full_end)).to(tl.int32)
        is_partial = some - is_full
        tl.store(list_ptr + 1 + full + tl.cumsum(is_full, 0), other, mask=is_full != 0)
        tl.store(list_ptr + others + 3 - partial - tl.cumsum(is_partial, 0), other, mask=is_partial != 0)
        full += tl.sum(is_full, 0)
        partial += tl.sum(is_partial, 0)
    tl.store(list_ptr, full)
    tl.store(list_ptr + 1, partial)
