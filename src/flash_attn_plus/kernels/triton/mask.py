"""The visible band: the only definition of which key a query sees, and of which tiles need a mask.

All positions are within one sequence: query i sits on key i + len_k - len_q.
"""

import triton
import triton.language as tl


@triton.jit
def keep(rows, cols, band, F: tl.constexpr, BY_BOUNDS: tl.constexpr = True):
    """bool of rows' and cols' broadcast shape: the key is visible to the query.

    BY_BOUNDS costs a register or two for each row, and saves all but a comparison or two for each score.
    """
    shift = band.len_k - band.len_q
    if BY_BOUNDS and (F.has_left or F.has_right):
        end = tl.where(rows < band.len_q, band.len_k, 0)
        if F.has_right:
            end = tl.minimum(end, rows + (shift + band.right + 1))
        inside = cols < end
        if F.has_left:
            inside &= cols >= rows + (shift - band.left)
    else:
        inside = (cols < band.len_k) & (rows < band.len_q)
        if F.has_right:
            inside &= cols - rows - shift <= band.right
        if F.has_left:
            inside &= cols - rows - shift >= -band.left
    return inside


@triton.jit
def key_tiles(row0, band, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, full_first, full_end, end), counted in tiles of BLOCK_N keys, for the queries [row0, row0 + BLOCK_M).

    Tiles [first, end) hold every visible key; tiles [full_first, full_end) within them need no mask.
    """
    shift = band.len_k - band.len_q
    last_row = tl.minimum(row0 + BLOCK_M, band.len_q) - 1
    first = row0 * 0
    full_first = row0 * 0
    end = tl.cdiv(band.len_k, BLOCK_N)
    full_end = band.len_k // BLOCK_N
    if F.has_left:
        first = tl.maximum(row0 + shift - band.left, 0) // BLOCK_N
        full_first = tl.cdiv(tl.maximum(last_row + shift - band.left, 0), BLOCK_N)
    if F.has_right:
        end = tl.minimum(end, tl.cdiv(tl.maximum(last_row + shift + band.right + 1, 0), BLOCK_N))
        full_end = tl.minimum(full_end, tl.maximum(row0 + shift + band.right + 1, 0) // BLOCK_N)
    return _ordered(first, full_first, full_end, end)


@triton.jit
def query_tiles(col0, band, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Like `key_tiles`, counted in tiles of BLOCK_M queries, for the keys [col0, col0 + BLOCK_N)."""
    shift = band.len_k - band.len_q
    last_col = tl.minimum(col0 + BLOCK_N, band.len_k) - 1
    first = col0 * 0
    full_first = col0 * 0
    end = tl.cdiv(band.len_q, BLOCK_M)
    full_end = band.len_q // BLOCK_M
    if F.has_right:
        first = tl.maximum(col0 - shift - band.right, 0) // BLOCK_M
        full_first = tl.cdiv(tl.maximum(last_col - shift - band.right, 0), BLOCK_M)
    if F.has_left:
        end = tl.minimum(end, tl.cdiv(tl.maximum(last_col - shift + band.left + 1, 0), BLOCK_M))
        full_end = tl.minimum(full_end, tl.maximum(col0 - shift + band.left + 1, 0) // BLOCK_M)
    return _ordered(first, full_first, full_end, end)


@triton.jit
def _ordered(first, full_first, full_end, end):
    first = tl.minimum(first, end)
    full_first = tl.minimum(tl.maximum(full_first, first), end)
    return first, full_first, tl.maximum(full_end, full_first), end


@triton.jit
def masked_tile(i, first, full_first, full_end):
    """The i-th tile that needs a mask: those before the full ones, then those behind."""
    before = full_first - first
    return tl.where(i < before, first + i, full_end + i - before)
