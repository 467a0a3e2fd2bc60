"""How a decode call is tiled and how many programs share the keys of one sequence."""

import math
from functools import lru_cache
from typing import NamedTuple

from flash_attn_plus.device import Device
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.tuning.config import padded, power_of_two

MOST_SPLITS = 128
_MOST_QUERIES = 16  # of a sequence; with more, or more rows than these, the prefill kernels are as good
_MOST_BATCH = 65535  # of a grid's second number
_MOST_ROWS = 128  # queries times heads that share keys
_LEAST_KEYS = 128  # of a split: below it the work of combining shows
_INVARIANT_KEYS = 1024  # of a split where the batch must not show: long enough to be read at full speed


class DecodeConfig(NamedTuple):
    """Tiles and compiler options of the split kernel."""

    block_m: int  # rows: queries of the heads that share keys
    block_n: int  # keys
    num_warps: int
    num_stages: int
    per_processor: int  # programs that one processor holds at a time
    shares: int = 1  # of a key tile: 1, or one for each warp, with a softmax of its own


class Splits(NamedTuple):
    """How the keys of each sequence are shared out, by numbers that do not depend on the lengths in use."""

    number: int  # at most so many splits a sequence
    least_tiles: int  # of key tiles a split
    launched: int  # splits of the grid: those beyond never have keys


_D = DecodeConfig
# H200, largest head dim -> rows a tile -> fastest of sweeps over contexts of 8k to 128k and batches of 1 to 128.
_MEASURED: dict[int, dict[int, DecodeConfig]] = {
    64: {16: _D(16, 256, 8, 3, 1), 32: _D(32, 128, 4, 3, 1, 4), 64: _D(64, 128, 4, 3, 2)},
    128: {16: _D(16, 128, 8, 3, 1), 32: _D(32, 128, 4, 3, 1), 64: _D(64, 64, 4, 3, 1)},
    256: {16: _D(16, 64, 8, 3, 1), 32: _D(32, 64, 8, 3, 1), 64: _D(64, 32, 4, 3, 1)},
}
# Head dims up to 128, pages of up to 8 keys, whose addresses cost registers: two programs a processor.
_SMALL_PAGES = _D(16, 64, 8, 3, 2)
# For more programs than two a processor a stage more, so that not three share one, whose last wave leaves most idle: 64
# sequences of 8,192 keys in pages of 1 take 502 us instead of 570. Pages of 16, too: 493 instead of 498.
_MANY_SMALL_PAGES = _D(16, 64, 8, 4, 2)
_8_BIT = {16: _D(16, 64, 4, 4, 2, 4), 32: _D(32, 128, 4, 3, 2), 64: _D(64, 64, 4, 3, 1)}
_8_BIT_ALONE = _D(16, 128, 4, 5, 1, 4)  # for fewer programs than two a processor
_COPIED = _D(8, 128, 4, 3, 1)  # as many tiles on their way as memory holds
_COPIED_BY_TWO = _D(8, 64, 4, 3, 2)  # programs that share a processor, where one each would leave a wave half empty
_COPIED_ROWS = _D(32, 128, 8, 3, 1)
_SPLIT = _D(32, 128, 8, 3, 1)  # for keys in several splits: these warps combine 32 rows sooner


def copied(p: AttentionProblem, device: Device) -> DecodeConfig | None:
    """The tile of a call whose keys had better come through Hopper's copy engine, or None.

    H200, microseconds before and after. 32 heads over 8: 1 x 8,192 20.8 and 19.0, 5 x 8,192 63.9 and 57.2, 8 x 8,192
    76.6 and 75.0, 16 x 8,192 134.6 and 133.6, 17 x 8,192 165.0 and 147.4, 50 x 8,192 414.6 and 390.7, 90 x 4,096 374.4
    and 352.2, 128 x 2,048 259.8 and 255.3; of lengths up to 8,192, 8 61.1 and 50.4, 16 107.4 and 84.7, 32 173.9 and
    155.6, 48 210.3 and 195.6. 16 heads over 16: 16 x 8,192 250.0 and 245.4. 32 over 1: 16 x 8,192 34.1 and 32.4,
    128 x 8,192 157.9 and 135.5, 1,000 x 1,024 284.3 and 204.2. 8 queries: 1 x 8,192 25.2 and 22.7, 4 x 8,192 49.9 and
    48.6, but 16 x 8,192 134.5 and 135.6. Waves that are nearly full lose, too: 64 x 8,192 481.0 and 490.4.
    """
    rows, programs = p.seqlen_q * (p.heads // p.heads_k), p.batch * p.heads_k
    if device.family != "cuda90" or p.dtype.itemsize != 2 or p.cache_dtype is not None or p.is_batch_invariant:
        return None
    if p.batch > _MOST_BATCH or p.head_dim != 128 or p.head_dim_v != 128 or rows > 32 or p.page_size or p.left >= 0:
        return None
    if p.has_softcap or p.has_alibi or p.is_varlen_q or p.is_varlen_k or p.has_leftpad_k:
        return None
    waves = programs / device.processors
    if rows > 8:
        is_faster = waves <= 1 / 4 or p.seqlen_q == 1
        return _COPIED_ROWS._replace(block_m=16 if rows <= 16 else 32) if is_faster else None
    if 1 < waves <= 2:
        return _COPIED_BY_TWO
    return None if 2 < waves < 7 and waves > 0.95 * math.ceil(waves) else _COPIED


def is_decode(p: AttentionProblem, device: Device) -> bool:
    """Whether the split kernel is the one for a forward call: few rows share the keys, so reading them takes the time.

    So it is for caches in 8 bits, which only it reads, and for more queries over a cache where the prefill kernel
    would leave most of the device idle; unless the batch must not show.
    """
    if p.has_dropout or p.has_block_mask or p.is_backward:
        return False
    if p.cache_dtype is not None:
        return True
    if p.seqlen_q <= _MOST_QUERIES and p.seqlen_q * (p.heads // p.heads_k) <= _MOST_ROWS:
        return True
    is_cache = p.has_seqused_k or p.page_size > 0
    return is_cache and not p.is_batch_invariant and 2 * p.batch * p.heads * -(-p.seqlen_q // 128) < device.processors


def configs(p: AttentionProblem, device: Device, is_aligned: bool = True) -> list[DecodeConfig]:
    """Configurations of the split kernel, best first; the later ones need less shared memory."""
    rows = min(max(16, power_of_two(p.seqlen_q * (p.heads // p.heads_k))), 64)
    head_dim = max(p.head_dim, p.head_dim_v)
    found = []
    if device.family == "cuda90" and not _may_multiply_by_warpgroup(p, is_aligned):
        rows = min(rows, 32)
    if device.family == "interpreter":
        return [_D(rows, 32, 4, 1, 1, 2 if p.dtype.itemsize == 2 else 1)]
    if device.family == "cuda90" and p.dtype.itemsize == 2 and head_dim <= 256:
        found = _measured(p, device, rows, head_dim)
    smaller = 16 if p.dtype.itemsize == 4 else rows
    for block_n, stages in ((64, 3), (32, 3), (32, 2), (16, 2), (16, 1)):
        if p.dtype.itemsize == 2 or block_n <= 32:
            found.append(_D(smaller, block_n, 4, stages, 2))
    fitting = [c for c in found if _bytes(p, c) * c.per_processor <= device.shared_memory]
    return fitting or found[-1:]


def _may_multiply_by_warpgroup(p: AttentionProblem, is_aligned: bool) -> bool:
    """Whether tiles of 64 rows are multiplied rightly: the instructions of Hopper's warpgroups find keys in memory.

    CUDA 12.8's assembler, which Triton 3.6 brings, loses that address in some kernels where keys and values take turns
    in one place of different layouts: those that do not go there by asynchronous copies.
    """
    if p.cache_dtype is not None:  # both layouts are the same from here on
        return min(p.head_dim, p.head_dim_v) > 64
    return is_aligned


def _measured(p: AttentionProblem, device: Device, rows: int, head_dim: int) -> list[DecodeConfig]:
    """The measured configurations of a call with that many rows a tile, best first."""
    found = [next(table[rows] for largest, table in _MEASURED.items() if head_dim <= largest)]
    if head_dim > 128:
        return found
    programs, has_small_pages = p.batch * p.heads_k, 0 < p.page_size < 64
    are_many = p.is_batch_invariant or programs >= 2 * device.processors
    are_few = not p.is_batch_invariant and programs <= device.processors // 2
    if p.cache_dtype is not None:
        found.insert(0, _8_BIT[rows])
        if rows == 16 and not are_many and not has_small_pages:
            found.insert(0, _8_BIT_ALONE)
    elif rows == 16 and 0 < p.page_size <= (16 if are_many else 8):
        found.insert(0, _MANY_SMALL_PAGES if are_many else _SMALL_PAGES)
    elif rows == 32 and head_dim > 64 and are_few:
        found.insert(0, _SPLIT)
    return found


def _bytes(p: AttentionProblem, c: DecodeConfig) -> int:
    """Shared memory of the split kernel: the stages of keys and values, and a tile of rows on its way to a product."""
    width = padded(p.head_dim) + padded(p.head_dim_v)
    stages = max(c.num_stages - 1, 1) * c.block_n * width * (p.cache_dtype or p.dtype).itemsize
    return stages + c.block_m * max(width, c.block_n) * p.dtype.itemsize


def splits(p: AttentionProblem, device: Device, c: DecodeConfig) -> Splits:
    """Whole waves of programs, without a look at the allocated length, so that a larger cache changes no bit."""
    tiles_m = -(-p.seqlen_q * (p.heads // p.heads_k) // c.block_m)
    if p.num_splits > 0:
        number, least_tiles = p.num_splits, 1
    elif p.is_batch_invariant:
        number, least_tiles = MOST_SPLITS, -(-_INVARIANT_KEYS // c.block_n)
    else:
        number = _whole_waves(p.batch * p.heads_k * tiles_m, device.processors * c.per_processor)
        least_tiles = -(-_LEAST_KEYS // c.block_n)
    seen = p.seqlen_k if p.left < 0 or p.right < 0 else min(p.seqlen_k, p.left + p.right + p.seqlen_q)
    most_tiles = -(-seen // c.block_n) + 1
    return Splits(number, least_tiles, max(1, min(number, -(-most_tiles // least_tiles))))


@lru_cache(maxsize=1024)
def _whole_waves(programs: int, slots: int) -> int:
    """The smallest number of splits that fills the last wave of programs nearly as well as any."""
    used = [programs * s / (-(-programs * s // slots) * slots) for s in range(1, MOST_SPLITS + 1)]
    return next(s for s, share in enumerate(used, 1) if share >= 0.95 * max(used))
