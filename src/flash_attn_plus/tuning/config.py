"""One launch configuration of a kernel."""

from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tile sizes (powers of two) and the compiler options that go with them."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int
    is_split: bool = False  # dk and dv in a pass each: accumulators of large head dims do not fit together
    by_descriptor: bool = False  # the tiles of a loop come through tensor descriptors, by a copy engine


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def padded(n: int) -> int:
    """A head dim as tiles hold it: a power of two, and what a product takes at least."""
    return max(16, power_of_two(n))
