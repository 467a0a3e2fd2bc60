"""Tiles of the Hopper kernels, with the reason for each; measured on an H200 (benchmarks/results/h200-hopper.json)."""

from typing import NamedTuple

from flash_attn_plus.problem import AttentionProblem


class ForwardTile(NamedTuple):
    """Launch configuration of the forward kernel. Registers share a pool of 65536 over all warps."""

    block_n: int  # keys a tile
    consumers: int  # warpgroups of 64 queries each
    query_stages: int  # 2: the next tile's queries arrive during this one
    stages: int  # tiles of K, and of V, in flight
    consumer_registers: int
    producer_registers: int
    spills: int = 0  # local memory accesses a step


class BackwardTile(NamedTuple):
    """Launch configuration of the backward kernel, whose tiles are 64 queries by 128 keys."""

    consumer_registers: int
    other_registers: int
    spills: int = 0  # local memory accesses a step with packed rows and two window bounds; none otherwise


FORWARD = {
    # Four stages beat two by 8 to 15 % up to 2,048 keys, by 1 to 9 % at 8,192.
    "64": ForwardTile(128, 2, 2, 4, 240, 24),
    # A third warpgroup hides more latency, though each then spills: 525 against 466 TFLOP/s at 8,192 keys, but slower
    # under a causal band, whose ends cut deeper into taller tiles, and for short sequences.
    "64 long": ForwardTile(128, 3, 2, 3, 160, 32, spills=28),
    # Tiles of 128 + 32 or 128 + 64 keys ran 5 % slower at 8,192 keys, of 64 keys 6 to 18 %. A second stage of queries
    # took 512 keys from 402 to 486 TFLOP/s and 8,192 causal ones from 616 to 681.
    "128": ForwardTile(128, 2, 2, 2, 240, 24),
    # 128 keys do not fit the registers, a second stage of queries not the shared memory.
    "256": ForwardTile(64, 2, 1, 2, 240, 24),
}
# dk and dv of 64 keys take 2 * head_dim registers of each thread, so head dim 256 needs another plan.
BACKWARD = {64: BackwardTile(240, 24), 128: BackwardTile(240, 24, spills=16)}
LONG = 2048  # keys from which on "64 long" wins


def padded_head_dim(head_dim: int) -> int:
    """The width of tiles: a power of two, filled up with zeros by the copy engine."""
    return max(64, 1 << (head_dim - 1).bit_length())


def forward_tile(problem: AttentionProblem) -> ForwardTile:
    """The row for a problem."""
    width = padded_head_dim(problem.head_dim)
    is_long = width == 64 and problem.left < 0 and problem.right < 0 and problem.seqlen_k >= LONG
    return FORWARD[f"{width} long" if is_long else str(width)]
