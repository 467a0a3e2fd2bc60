"""Sequences and the visible band, for queries against keys and the reverse."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn_plus.kernels.gluon.hopper import record


@record
class Band:
    """One sequence: key j is visible to query i when -left <= j - (i + len_k - len_q) <= right."""

    len_q: object
    len_k: object
    left: object
    right: object
    has_left: gl.constexpr
    has_right: gl.constexpr

    @gluon.jit
    def key_tiles(self, row0, ROWS: gl.constexpr, TILE: gl.constexpr):
        """(first, full_first, full_end, end) in tiles of TILE keys, for the queries [row0, row0 + ROWS).

        Tiles [first, end) hold every visible key and at least one tile is named; those in [full_first, full_end)
        need no mask.
        """
        shift = self.len_k - self.len_q
        first = 0 * row0
        full_first = first
        end = gl.cdiv(self.len_k, TILE)
        full_end = self.len_k // TILE
        if self.has_left:
            first = gl.maximum(row0 + shift - self.left, 0) // TILE
            full_first = gl.cdiv(gl.maximum(row0 + ROWS - 1 + shift - self.left, 0), TILE)
        if self.has_right:
            end = gl.minimum(end, gl.cdiv(gl.maximum(row0 + ROWS + shift + self.right, 0), TILE))
            full_end = gl.minimum(full_end, gl.maximum(row0 + shift + self.right + 1, 0) // TILE)
        return first, full_first, full_end, gl.maximum(end, first + 1)

    @gluon.jit
    def parts(self, row0, ROWS: gl.constexpr, TILE: gl.constexpr):
        """How many tiles of TILE keys name the tile of queries [row0, row0 + ROWS) as one of their `query_tiles`."""
        first, _, _, end = self.key_tiles(row0, ROWS, TILE)
        is_seen = self.len_k > 0
        if self.has_right:
            is_seen = is_seen & (row0 + ROWS + self.len_k - self.len_q + self.right > 0)
        return gl.where(is_seen, end - first, 0)

    @gluon.jit
    def query_tiles(self, col0, COLS: gl.constexpr, TILE: gl.constexpr):
        """(first, full_first, end) in tiles of TILE queries, for the keys [col0, col0 + COLS); there may be none.

        Tiles [first, end) hold every query that sees a key; from full_first on no right bound hides one.
        """
        shift = self.len_k - self.len_q
        first = 0 * col0
        full_first = first
        end = gl.cdiv(self.len_q, TILE)
        if self.has_right:
            first = gl.minimum(gl.maximum(col0 - shift - self.right, 0) // TILE, end)
            full_first = gl.cdiv(gl.maximum(col0 + COLS - 1 - shift - self.right, 0), TILE)
        if self.has_left:
            end = gl.minimum(end, gl.maximum(col0 + COLS - 1 - shift + self.left + TILE, 0) // TILE)
        return first, full_first, gl.maximum(end, first)

    @gluon.jit
    def mask_keys(self, scores, row0, col0, layout: gl.constexpr):
        """[queries, keys] scores with -inf where the key does not exist or is not visible."""
        ROWS: gl.constexpr = scores.shape[0]
        cols = gl.expand_dims(gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout)), 0)
        diagonal = gl.arange(0, ROWS, gl.SliceLayout(1, layout)) + (row0 + self.len_k - self.len_q - col0)
        last = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, layout)) + (self.len_k - 1 - col0)
        if self.has_right:
            last = gl.minimum(last, diagonal + self.right)
        scores = gl.where(cols <= gl.expand_dims(last, 1), scores, float("-inf"))
        if self.has_left:
            scores = gl.where(cols >= gl.expand_dims(diagonal - self.left, 1), scores, float("-inf"))
        return scores

    @gluon.jit
    def query_limits(self, col0, row0, KEYS: gl.constexpr, layout: gl.constexpr):
        """(first, last) query, counted from row0, that sees each of the keys [col0, col0 + KEYS); none beyond len_k."""
        cols = gl.arange(0, KEYS, gl.SliceLayout(1, layout)) + col0
        diagonal = cols - (self.len_k - self.len_q) - row0
        earliest = 0 * cols
        latest = earliest
        if self.has_right:
            earliest = diagonal - self.right
        if self.has_left:
            latest = diagonal + self.left
        return gl.where(cols < self.len_k, earliest, 1 << 30), latest

    @gluon.jit
    def mask_queries(self, scores, limits, row0, layout: gl.constexpr):
        """[keys, queries] scores with -inf outside the keys' limits."""
        rows = gl.expand_dims(gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout)), 0)
        scores = gl.where(rows >= gl.expand_dims(limits[0] - row0, 1), scores, float("-inf"))
        if self.has_left:
            scores = gl.where(rows <= gl.expand_dims(limits[1] - row0, 1), scores, float("-inf"))
        return scores


@gluon.jit
def span(cu_ptr, batch, length):
    """(first row, length) of a sequence; dense ones start at row 0 of their batch."""
    start = 0
    if cu_ptr is not None:
        start = gl.load(cu_ptr + batch)
        length = gl.load(cu_ptr + batch + 1) - start
    return start, length
