"""A ring for readers that await the keys of a step and the values of the one before it together."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attn_plus.kernels.gluon.hopper import named_arrive, named_sync, new_barriers, record


@record
class Places:
    """Half of a ring whose every place holds a tile of K and the tile of V before it, for readers that await both.

    So a place has one barrier of each kind. The tile of V comes first: its filler waits until the place is free. Behind
    the last tile of V there are no keys, before the first tile of K no values.
    """

    tiles: gl.shared_memory_descriptor  # [places, rows, columns], a power of two of them
    full: gl.shared_memory_descriptor
    FIRST: gl.constexpr
    THREADS: gl.constexpr
    LAG: gl.constexpr  # places from a tile's number to its own: 1 for V

    @gluon.jit
    def place(self, i):
        """Where the i-th tile lies."""
        return (i + self.LAG) & (self.tiles.shape[0] - 1)

    @gluon.jit
    def tile(self, i):
        """The i-th tile."""
        return self.tiles.index(self.place(i))

    @gluon.jit
    def wait(self, i):
        """Reader: wait until the place of the i-th tile is full."""
        PLACES: gl.constexpr = self.tiles.shape[0]
        mbarrier.wait(self.full.index(self.place(i)), ((i + self.LAG) & PLACES) // PLACES)

    @gluon.jit
    def release(self, i):
        """Reader: done with both tiles at the place of the i-th tile of K."""
        if self.LAG == 0:
            named_arrive(self.FIRST + self.place(i), self.THREADS)

    @gluon.jit
    def acquire(self, i, BYTES: gl.constexpr):
        """Filler: the barrier on which the i-th tile's BYTES are awaited, once its place is free."""
        if self.LAG == 1:
            if i + 1 >= self.tiles.shape[0]:
                named_sync(self.FIRST + self.place(i), self.THREADS)
        full = self.full.index(self.place(i))
        mbarrier.expect(full, BYTES)
        return full

    @gluon.jit
    def drain(self, filled):
        """Filler: fill the last place, and take up the last releases."""
        PLACES: gl.constexpr = self.tiles.shape[0]
        if self.LAG == 1:
            if filled > 0:
                mbarrier.arrive(self.full.index(self.place(filled - 1)), count=1)
            for i in gl.static_range(PLACES):
                if (filled > 0) & (filled >= i):
                    named_sync(self.FIRST + self.place(filled - 1 - i), self.THREADS)


@gluon.jit
def new_places(dtype: gl.constexpr, PLACES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, FIRST: gl.constexpr,
               READERS: gl.constexpr):  # fmt: skip
    """(keys, values): the halves of an empty ring of [ROWS, COLS] tiles for READERS warpgroups."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    full = new_barriers(PLACES, 2)
    mbarrier.arrive(full.index(0), count=1)
    keys = gl.allocate_shared_memory(dtype, [PLACES, ROWS, COLS], layout)
    values = gl.allocate_shared_memory(dtype, [PLACES, ROWS, COLS], layout)
    return Places(keys, full, FIRST, 128 * READERS + 32, 0), Places(values, full, FIRST, 128 * READERS + 32, 1)
