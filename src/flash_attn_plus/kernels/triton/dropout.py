"""Dropout bits keyed by coordinates, so that tiles, backends and the backward pass agree.

Philox4x32 with 7 rounds (Salmon et al., SC 2011): key = seed, counter = (col // 8, row, batch * heads + head, offset).
Its eight 16-bit halves decide the eight keys of a group; a weight is kept when its number is below the threshold.
"""

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def keep_bits(drop, rows, cols):
    """bool of the broadcast shape of rows and cols: the weight is kept."""
    seed = tl.load(drop.rng_ptr)
    offset = tl.load(drop.rng_ptr + 1)
    col, row = rows * 0 + cols, rows + cols * 0
    w0, w1, w2, w3 = tl.philox_impl(
        (col // 8).to(tl.uint32),
        row.to(tl.uint32),
        (row * 0 + drop.batch_head).to(tl.uint32),
        (row * 0 + offset).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ROUNDS,
    )
    index = col % 8
    word = tl.where(index < 4, tl.where(index < 2, w0, w1), tl.where(index < 6, w2, w3))
    number = tl.where(index % 2 == 0, word & 0xFFFF, word >> 16)
    return number.to(tl.int32) < drop.threshold
