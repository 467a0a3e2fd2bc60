"""The rows' log2 LSE and delta in the backward kernels, as numbers or as terms that the matrix unit subtracts.

A thread of transposed products holds a few keys of many queries, so that it would read a number for every query and
statistic, 32 or 64 loads a step while products keep shared memory busy. Instead Q and dO get 16 more columns: each
statistic as three bfloat16 terms, 24 bits, and zeros; to those K and V hold -1 and zeros. Subtracted by the products
they took head dim 64 from 502 to 542 TFLOP/s at 8,192 keys, 128 from 436 to 462 at 2,048 causal ones. A softcap stands
between the products and the LSE: then they stay numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from flash_attn_plus.kernels.gluon.backward_ends import COLS, TERMS
from flash_attn_plus.kernels.gluon.hopper import copy_in, record

LSE = gl.constexpr(0)
DELTA = gl.constexpr(1)


@gluon.jit
def _signs(WHICH: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr):
    """-1 in the columns of a statistic's terms."""
    rows = gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(1, layout)), 1)
    term = gl.expand_dims(gl.arange(0, COLS, gl.SliceLayout(0, layout)), 0) + 0 * rows - WHICH * TERMS
    return gl.where((term >= 0) & (term < TERMS), -1.0, 0.0).to(gl.bfloat16)


@record
class Statistics:
    """Those of the queries in flight."""

    tiles: gl.shared_memory_descriptor  # of terms [stages, queries, COLS], of numbers [2 * stages, 1, 1, queries]
    signs: object  # of terms: [2, keys, COLS], or None where they are made in registers
    are_terms: gl.constexpr
    STAGES: gl.constexpr

    @gluon.jit
    def copy(self, i, desc, WHICH: gl.constexpr, line, row, full):
        """Copy one statistic of the i-th tile; the LSE's terms bring delta's."""
        if not self.are_terms:
            copy_in(desc, [WHICH, line, row], full, self.tiles.index(WHICH * self.STAGES + i % self.STAGES))
        elif WHICH == LSE:
            tile = self.tiles.index(i % self.STAGES)
            copy_in(desc, [line, row, 0], full, tile.reshape([1, tile.shape[0], COLS]))

    @gluon.jit
    def read(self, i, WHICH: gl.constexpr, at, COUNT: gl.constexpr, layout: gl.constexpr):
        """Numbers of COUNT queries from `at` on."""
        tile = self.tiles.index(WHICH * self.STAGES + i % self.STAGES).reshape([self.tiles.shape[3]])
        return tile.slice(at, COUNT).load(layout)

    @gluon.jit
    def subtract(self, i, WHICH: gl.constexpr, products, KEYS: gl.constexpr, layout: gl.constexpr):
        """Issue the product that subtracts terms from transposed products, [keys, queries]; numbers wait."""
        if self.are_terms:
            terms = self.tiles.index(i % self.STAGES).permute((1, 0))
            if self.signs is None:
                signs = _signs(WHICH, KEYS, gl.DotOperandLayout(0, layout, 2))
            else:
                signs = self.signs.index(WHICH)
            products = warpgroup_mma(signs, terms, products, is_async=True)
        return products


@gluon.jit
def new_statistics(desc, QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HAS_ROOM: gl.constexpr):
    """Memory for those of STAGES tiles; HAS_ROOM: for signs as well, which take registers else."""
    ARE_TERMS: gl.constexpr = desc.dtype == gl.bfloat16
    signs = None
    if ARE_TERMS:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([QUERIES, COLS], gl.bfloat16)
        tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, QUERIES, COLS], layout)
        if HAS_ROOM:
            signs = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, COLS], layout)
            for which in gl.static_range(2):
                signs.index(which).store(_signs(which, KEYS, gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])))
    else:
        tiles = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 1, QUERIES], desc.layout)
    return Statistics(tiles, signs, ARE_TERMS, STAGES)
