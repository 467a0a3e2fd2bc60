"""Dropout bits keyed by coordinates, so that tiles, backends and the backward pass agree.

Philox4x32 with 7 rounds (Salmon et al., SC 2011): key = seed, counter = (col // 8, row, batch * heads + head, offset).
Its eight 16-bit halves decide the eight keys of a group; a weight is kept when its number is below the threshold.
"""

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def _halves(word, threshold):
    """[M, G, 2] int8: whether the low and the high half of each word are kept."""
    low = (word & 0xFFFF).to(tl.int32) < threshold
    high = (word >> 16).to(tl.int32) < threshold
    return tl.join(low.to(tl.int8), high.to(tl.int8))


@triton.jit
def keep_tile(drop, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, N] bool: the weights of a tile that are kept; col0 is a multiple of 8."""
    row = row0 + tl.arange(0, BLOCK_M)[:, None] + tl.zeros([1, BLOCK_N // 8], tl.int32)
    group = col0 // 8 + tl.arange(0, BLOCK_N // 8)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    seed = tl.load(drop.rng_ptr)
    offset = tl.load(drop.rng_ptr + 1)
    w0, w1, w2, w3 = tl.philox_impl(
        group.to(tl.uint32),
        row.to(tl.uint32),
        (row * 0 + drop.batch_head).to(tl.uint32),
        (row * 0 + offset).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ROUNDS,
    )
    front = tl.join(_halves(w0, drop.threshold), _halves(w1, drop.threshold))  # [M, G, half, word]
    back = tl.join(_halves(w2, drop.threshold), _halves(w3, drop.threshold))
    kept = tl.join(front, back).permute(0, 1, 4, 3, 2)  # [M, G, pair, word, half]: the order of the columns
    return kept.reshape([BLOCK_M, BLOCK_N]) != 0
