"""Tiles of work for persistent programs: their order, and the mailbox through which one warp hands them out."""

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


@record
class Mailbox:
    """Two slots for tile numbers; -1 says that there are no more."""

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def send(self, i, tile):
        """Sender (one warp): put the i-th number."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        mbarrier.wait(self.empty.index(i & 1), ((i >> 1) & 1) ^ 1)
        self.slots.index(i & 1).store(gl.full([1], 0, gl.int32, layout) + tile)
        mbarrier.arrive(self.full.index(i & 1), count=1)

    @gluon.jit
    def receive(self, i):
        """Receiver (a warpgroup): take the i-th number."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(self.full.index(i & 1), (i >> 1) & 1)
        tile = gl.max(self.slots.index(i & 1).load(layout), 0)
        mbarrier.arrive(self.empty.index(i & 1), count=1)
        return tile


@gluon.jit
def new_mailbox(RECEIVERS: gl.constexpr):
    """An empty mailbox for RECEIVERS warpgroups."""
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Mailbox(slots, new_barriers(2, 1), new_barriers(2, RECEIVERS))
