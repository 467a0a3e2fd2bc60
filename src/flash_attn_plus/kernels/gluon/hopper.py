"""Hopper's instructions as the kernels use them: bulk tensor copies, named barriers, rings of tiles.

The one place that knows which names and which gaps a Triton release has.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate, base_value

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_each = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # by the threads

# A packed tensor's descriptor has two leading dimensions whose strides cancel modulo 2**64, so that rows count up to
# RAGGED and the copy engine clips every tile at the end of its sequence (see `packed` in the launcher).
RAGGED = gl.constexpr(1 << 30)

_THREADS = (160, 256, 288, 416, 544)  # one warp or one warpgroup, and up to four warpgroups
_SYNC = gl.constexpr({n: f"bar.sync $1, {n}; mov.u32 $0, 0;" for n in _THREADS})
_ARRIVE = gl.constexpr({n: f"bar.arrive $1, {n}; mov.u32 $0, 0;" for n in _THREADS})


@builtin
def _reduce_out(desc, coordinates, tile, _semantic=None):
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coordinates, tile.handle)


add_out = getattr(tma, "async_atomic_add", None) or _reduce_out
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """The memory of a tile as one of another dtype, shape and layout."""
    method = getattr(tile, "reinterpret", None) or tile._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


def record(cls: type) -> type:
    """A class of annotated fields as a value inside kernels: tensors travel as they are, all else as constants."""
    names = tuple(cls.__annotations__)

    def __init__(self, *values):
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))

    cls.__init__ = gluon.constexpr_function(__init__)
    return _aggregate(cls)


@gluon.jit
def named_sync(barrier, THREADS: gl.constexpr):
    """Wait at a hardware barrier until THREADS threads have arrived; ids below 5 are Gluon's own."""
    gl.inline_asm_elementwise(_SYNC[THREADS], "=r,r", [gl.to_tensor(barrier)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_arrive(barrier, THREADS: gl.constexpr):
    """Arrive at a hardware barrier without waiting."""
    gl.inline_asm_elementwise(_ARRIVE[THREADS], "=r,r", [gl.to_tensor(barrier)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_tile(desc, batch, start, length, head, row, barrier, tile):
    """Copy rows [row, row + tile rows) of a head of a sequence; what lies beyond its end arrives as zeros."""
    ROWS: gl.constexpr = tile.shape[0]
    COLS: gl.constexpr = tile.shape[1]
    if len(desc.block_type.shape) == 5:
        at = [RAGGED, start + length, head, RAGGED - length + row, 0]
        copy_in(desc, at, barrier, tile.reshape([1, 1, 1, ROWS, COLS]))
    else:
        copy_in(desc, [batch, head, row, 0], barrier, tile.reshape([1, 1, ROWS, COLS]))


@gluon.jit
def store_tile(desc, batch, start, length, head, row, tile, col=0):
    """The reverse of `load_tile`, from column `col` on; what lies beyond the sequence's end is not written."""
    ROWS: gl.constexpr = tile.shape[0]
    COLS: gl.constexpr = tile.shape[1]
    if len(desc.block_type.shape) == 5:
        at = [RAGGED, start + length, head, RAGGED - length + row, col]
        copy_out(desc, at, tile.reshape([1, 1, 1, ROWS, COLS]))
    else:
        copy_out(desc, [batch, head, row, col], tile.reshape([1, 1, ROWS, COLS]))


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT initialised mbarriers that complete after ARRIVALS arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@record
class Ring:
    """Tiles that one warp fills and warpgroups read, in turn.

    Full stages are told by mbarriers, which count a copy's bytes. Empty ones are told by hardware barriers: to arrive
    there costs a reader one instruction, at an mbarrier a barrier of its warpgroup as well. Barrier FIRST + stage
    belongs to a stage; THREADS is one warp and every reader.
    """

    tiles: gl.shared_memory_descriptor  # [stages, rows, columns]
    full: gl.shared_memory_descriptor
    FIRST: gl.constexpr
    THREADS: gl.constexpr

    @gluon.jit
    def tile(self, i):
        """The i-th tile."""
        return self.tiles.index(i % self.tiles.shape[0])

    @gluon.jit
    def wait(self, i):
        """Reader: wait until the i-th tile is there."""
        mbarrier.wait(self.full.index(i % self.tiles.shape[0]), (i // self.tiles.shape[0]) & 1)

    @gluon.jit
    def release(self, i):
        """Reader: done with the i-th tile."""
        named_arrive(self.FIRST + i % self.tiles.shape[0], self.THREADS)

    @gluon.jit
    def acquire(self, i, BYTES: gl.constexpr):
        """Filler: wait until the i-th tile's stage is free; returns the barrier on which its BYTES are awaited."""
        STAGES: gl.constexpr = self.tiles.shape[0]
        if i >= STAGES:
            named_sync(self.FIRST + i % STAGES, self.THREADS)
        full = self.full.index(i % STAGES)
        mbarrier.expect(full, BYTES)
        return full

    @gluon.jit
    def drain(self, filled):
        """Filler: take up the last releases, since a hardware barrier must be even when the kernel ends."""
        STAGES: gl.constexpr = self.tiles.shape[0]
        for i in gl.static_range(STAGES):
            if filled > i:
                named_sync(self.FIRST + (filled - 1 - i) % STAGES, self.THREADS)


@gluon.jit
def new_ring(dtype: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, FIRST: gl.constexpr,
             READERS: gl.constexpr):  # fmt: skip
    """An empty ring of [ROWS, COLS] tiles for READERS warpgroups."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLS], layout)
    return Ring(tiles, new_barriers(STAGES, 1), FIRST, 128 * READERS + 32)
