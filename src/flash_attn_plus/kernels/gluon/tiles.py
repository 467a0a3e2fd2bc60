"""Tiles of work for persistent programs: their order, how they are drawn, and the mailbox that hands them out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attn_plus.kernels.gluon.hopper import new_barriers, record


@gluon.jit
def place(tile, heads_total, chunk, blocks):
    """Tile number -> (head of all batches, block), last block first within chunks of heads that share the L2 cache.

    Under a causal band the last block has most work, so that it must not start last.
    """
    first = tile // (chunk * blocks) * chunk
    width = gl.minimum(chunk, heads_total - first)
    rest = tile - first * blocks
    return first + rest % width, blocks - 1 - rest // width


@gluon.jit
def take(tile, counter_ptr):
    """The tile after this one: drawn from a counter, or dealt in turns where all tiles are alike."""
    if counter_ptr is not None:
        return gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    return tile + gl.num_programs(0)


@gluon.jit
def reset(tile, tiles, counter_ptr):
    """Make the counter 0 again after the last of all draws, of which there are as many as tiles."""
    if counter_ptr is not None:
        if tile == tiles - 1 + gl.num_programs(0):
            gl.store(counter_ptr, 0)


@gluon.jit
def draw(tile, tiles, counter_ptr):
    """`take` where the number of tiles is known: the counter resets itself."""
    tile = take(tile, counter_ptr)
    reset(tile, tiles, counter_ptr)
    return tile


@record
class Mailbox:
    """Two slots of a few numbers each, by which one warp tells the others what their next tile is."""

    slots: gl.shared_memory_descriptor  # [2 * NUMBERS, 1]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    NUMBERS: gl.constexpr

    @gluon.jit
    def send(self, i, numbers):
        """Sender (one warp): put the i-th message."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        mbarrier.wait(self.empty.index(i & 1), ((i >> 1) & 1) ^ 1)
        for j in gl.static_range(len(numbers)):
            self.slots.index((i & 1) * self.NUMBERS + j).store(gl.full([1], 0, gl.int32, layout) + numbers[j])
        mbarrier.arrive(self.full.index(i & 1), count=1)

    @gluon.jit
    def wait(self, i):
        """Receiver: wait until the i-th message is there."""
        mbarrier.wait(self.full.index(i & 1), (i >> 1) & 1)

    @gluon.jit
    def read(self, i, NUMBER: gl.constexpr):
        """Receiver: one number of the i-th message; until its release it may be read again instead of kept."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return gl.max(self.slots.index((i & 1) * self.NUMBERS + NUMBER).load(layout), 0)

    @gluon.jit
    def release(self, i):
        """Receiver: done with the i-th message."""
        mbarrier.arrive(self.empty.index(i & 1), count=1)


@gluon.jit
def new_mailbox(NUMBERS: gl.constexpr, RECEIVERS: gl.constexpr):
    """An empty mailbox for RECEIVERS partitions."""
    slots = gl.allocate_shared_memory(gl.int32, [2 * NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Mailbox(slots, new_barriers(2, 1), new_barriers(2, RECEIVERS), NUMBERS)
