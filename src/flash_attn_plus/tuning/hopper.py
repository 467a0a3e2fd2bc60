"""Tiles of the Hopper kernels, with the reason for each; measured on an H200 (benchmarks/results/h200-hopper*.json)."""

import math
from typing import NamedTuple

from flash_attn_plus.problem import AttentionProblem


class ForwardTile(NamedTuple):
    """Launch configuration of the forward kernel. Registers share a pool of 65536 over all warps."""

    block_n: int  # keys a tile
    consumers: int  # warpgroups of 64 queries each; four await both products before their softmax
    query_tiles: int  # of 64 queries; those beyond one a consumer let the next arrive during this one
    key_stages: int  # tiles of K in flight
    value_stages: int  # of V, which are held until the softmax of the next scores is over; 0: as of K, in common places
    has_turns: bool  # whether warpgroups issue their products in turns
    frees_early: bool  # whether the product with V is waited for, and V released, before the softmax
    consumer_registers: int
    producer_registers: int
    spills: int = 0  # local memory accesses a step


class BackwardTile(NamedTuple):
    """Launch configuration of the kernel that makes dk and dv, and in parts dq."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    longest_split: int  # visible keys a query up to which dq comes from a kernel of its own, since that is faster
    consumer_registers: int
    other_registers: int
    is_wide: bool = False  # a warpgroup for dv and one for dk; dq always has its own kernel
    spills: int = 0  # local memory accesses a step


class DqTile(NamedTuple):
    """Launch configuration of the kernel that makes dq, by two warpgroups of 64 queries."""

    block_n: int  # keys a tile
    query_tiles: int
    key_stages: int
    value_stages: int
    consumer_registers: int
    producer_registers: int
    spills: int = 0


FORWARD = {
    # Four stages beat two by 8 to 15 % up to 2,048 keys, by 1 to 9 % at 8,192.
    "64": ForwardTile(128, 2, 4, 4, 4, False, False, 240, 24),
    # A third warpgroup hides more latency: 490 against 457 TFLOP/s at 8,192 keys. Turns, and values freed before the
    # exponentials, took them from 482 to 526, causal from 450 to 490; freed before the maxima, up to 1 % more.
    # Slower for short sequences, whose ends, like the diagonal, cut deeper into taller tiles.
    "64 long": ForwardTile(128, 3, 6, 3, 3, True, True, 160, 32, spills=32),
    # Four warpgroups hide more latency still, with tiles of keys so small that each of them skips what none of its rows
    # sees: causal 512 keys from 268 to 314 TFLOP/s, 1,024 from 357 to 406, 2,048 from 404 to 449, full 1,024 from 446
    # to 482, packed documents by 4 to 16 %, windows by 4 %, a softcap by 7 to 15 %; ALiBi spills. Pairs on tiles of 128
    # queries, maxima under the product with V, and turns were slower. Full bands of 2,048 keys lose 2 % to "64 long".
    "64 tall": ForwardTile(64, 4, 8, 8, 0, False, True, 112, 24),
    # A third stage of values, which came too late, took 512 keys from 507 to 574 TFLOP/s, 16,384 from 594 to 687;
    # turns on top changed nothing, three stages of both with one of queries were slower by 2 to 14 %.
    "128": ForwardTile(128, 2, 4, 2, 3, False, False, 240, 24),
    # 128 keys do not fit the registers, a second stage of queries not the shared memory; half of one gained 1 to 2 %.
    "256": ForwardTile(64, 2, 3, 2, 2, False, False, 240, 24),
}
# A kernel of dq's own makes 7 products of 5, but no sums in memory. So it is faster for short sequences, and repeatable
# ones cost 8 to 21 % from 8,192 keys on. Sums that nobody clears first or rounds afterwards took
# 1,024 keys of head dim 64 from 310 to 338 TFLOP/s, 2,048 of 128 from 420 to 448; statistics subtracted by products
# packed documents from 465 to 495.
BACKWARD = {
    # Tiles of 128 queries: 444 against 383 TFLOP/s with 64 at 8,192 keys; their weights in halves, which do not spill,
    # 526 against 475. Sums win from 256 visible keys on, by 8 to 12 %, and lose 6 % at 128.
    64: BackwardTile(128, 128, 128, 240, 24, spills=4),
    # By 3 to 6 % at 256, by 11 to 15 % at 512.
    128: BackwardTile(64, 128, 128, 240, 24),
    # One kernel for all three, with its tiles of 64 keys, adds to dq twice as often: 243 TFLOP/s against 436.
    256: BackwardTile(64, 64, 0, 240, 24, is_wide=True),
}
DQ = {
    64: DqTile(128, 4, 3, 3, 240, 24),
    128: DqTile(128, 2, 2, 2, 240, 24, spills=24),
    # Larger tiles of keys do not fit the registers, more of them not the shared memory. Its products' descriptors are
    # computed in the loop, so that nothing spills: 518 against 414 TFLOP/s for all of the pass at 8,192 keys.
    256: DqTile(64, 2, 2, 1, 240, 24),
}
# What the heads in flight may take of the 50 MB cache under a causal band. Fewer heads leave longer tiles for the end:
# backward 16 MB cost 3 %.
CACHE = 32 << 20
# Forward, 16 MB took 512 keys from 340 to 356 TFLOP/s; with 2,048 it gained 4 % in one run and lost 6 % in another.
# Up to head dim 64 half of that gains 1 to 2 % more; at 128 it costs as much. Tall tiles lose 2 to 5 % by either.
SHORT_CACHE = 16 << 20
SHORT = 1024  # keys up to which SHORT_CACHE counts
LONG = 2048  # keys from which on "64 long" wins
LONG_CAUSAL = 4096  # there by 1 to 6 %; 2,048 lose 4; packed sequences are mostly shorter than the longest
TALL_CAUSAL = 16384  # keys below which "64 tall" beats it under a causal band: at 4,096 by 6 %, at 8,192 by 1 %
MANY = 256  # tiles of 256 queries from which on "64 tall" wins
PROCESSORS = 132  # of a GPU, among which tiles are dealt
# How much longer tiles of 256 queries may take by their number alone: full bands of 384 and 640 queries, which leave
# a third and a fifth of them idle, lose 42 and 14 %; causal ones of 320 lose 5 % by as much, but those of 640 gain 5 %.
MOST, MOST_CAUSAL = 1.05, 1.25
MOST_SUMMED = 4_000_000  # keys, up to whose tiles' parts of dq a counter counts


def padded_head_dim(head_dim: int) -> int:
    """The width of tiles: a power of two, filled up with zeros by the copy engine."""
    return max(64, 1 << (head_dim - 1).bit_length())


def forward_tile(problem: AttentionProblem, queries: float | None = None) -> ForwardTile:
    """The row for a problem; `queries` are those of a sequence on average, where they are packed."""
    p, width = problem, padded_head_dim(problem.head_dim)
    if width > 64:
        return FORWARD[str(width)]
    is_plain = p.left < 0 and not (p.has_softcap or p.has_alibi)
    is_short = p.seqlen_k < LONG
    if p.right >= 0:  # then every row sees what keys there are beyond the queries
        is_short = p.seqlen_k - p.seqlen_q < LONG_CAUSAL and p.seqlen_k < TALL_CAUSAL
    if (is_short or not is_plain) and not p.has_alibi and _fills_tall(p, queries or p.seqlen_q):
        return FORWARD["64 tall"]
    longest = LONG if p.right < 0 else LONG_CAUSAL * (1 + p.is_varlen_k)
    return FORWARD["64 long" if is_plain and p.seqlen_k >= longest else "64"]


def _fills_tall(p: AttentionProblem, queries: float) -> bool:
    """Whether tiles of 256 queries, of which there are enough, take hardly longer than two of 128 by their number."""
    tall, halves = (p.batch * p.heads * math.ceil(queries / rows) for rows in (256, 128))
    if tall < MANY:
        return False
    if p.is_varlen_q:  # half a tile of a sequence is empty
        ratio = (queries + 128) / (queries + 64)
    else:
        ratio = 2 * math.ceil(tall / PROCESSORS) / math.ceil(halves / PROCESSORS)
    return ratio <= (MOST_CAUSAL if p.right >= 0 else MOST)


def forward_cache(problem: AttentionProblem, tile: ForwardTile) -> int:
    """Bytes of keys and values of the heads that take turns in the forward kernel."""
    if problem.seqlen_k > SHORT or tile.consumers == 4:
        return CACHE
    return SHORT_CACHE // 2 if problem.head_dim <= 64 else SHORT_CACHE


def is_split(problem: AttentionProblem) -> bool:
    """Whether dq of a backward pass comes from a kernel of its own: then it is also bitwise repeatable."""
    tile, visible = BACKWARD[padded_head_dim(problem.head_dim)], problem.seqlen_k
    if problem.left >= 0:
        visible = min(visible, problem.left + max(problem.right, 0) + 1)
    elif problem.right >= 0:
        visible //= 2
    if problem.is_deterministic or tile.is_wide or problem.seqlen_k >= MOST_SUMMED:
        return True
    return visible <= tile.longest_split
