"""Tiles of the Hopper kernels by head dim, with the reason for each."""

from typing import NamedTuple


class ForwardTile(NamedTuple):
    """Launch configuration of the forward kernel."""

    block_n: int  # keys a tile
    consumers: int  # warpgroups of 64 queries each
    stages: int  # tiles of K, and of V, in flight
    consumer_registers: int
    producer_registers: int


FORWARD = {
    64: ForwardTile(128, 2, 2, 240, 24),
    128: ForwardTile(128, 2, 2, 240, 24),
    256: ForwardTile(64, 2, 2, 240, 24),
}


def padded_head_dim(head_dim: int) -> int:
    """The width of tiles: a power of two, filled up with zeros by the copy engine."""
    return max(64, 1 << (head_dim - 1).bit_length())


class BackwardTile(NamedTuple):
    """Launch configuration of the backward kernel, whose tiles are 64 queries by 128 keys."""

    consumer_registers: int
    other_registers: int
    spills: int  # local memory accesses a step with packed rows and two window bounds; none otherwise


BACKWARD = {64: BackwardTile(240, 24, 0), 128: BackwardTile(240, 24, 16)}
