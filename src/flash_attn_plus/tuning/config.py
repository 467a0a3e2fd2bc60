"""One launch configuration of a kernel."""

from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tile sizes (powers of two) and the compiler options that go with them."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int
    is_split: bool = False  # dk and dv in a pass each: accumulators of large head dims do not fit together
