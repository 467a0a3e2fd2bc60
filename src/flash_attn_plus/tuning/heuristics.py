"""(problem, device) -> launch configurations, best first; later ones need less shared memory.

Rows marked "measured" were the fastest of a sweep on that device; the others are the largest tiles that compile
without spilling registers for the target (tests/compile holds them to it).
"""

from functools import lru_cache

from flash_attn_plus import env
from flash_attn_plus.device import Device
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.tuning import table as measured
from flash_attn_plus.tuning.config import TileConfig as C
from flash_attn_plus.tuning.config import padded

_INTERPRETER = (C(32, 32, 4, 1),)
# Any target, when nothing above fits: ever smaller tiles, one stage.
_SMALLER = (C(64, 32, 4, 1), C(32, 32, 4, 1), C(32, 16, 4, 1), C(16, 16, 4, 1))
# float32 products are not done by 16-bit tensor cores; their operands live in registers, so tiles stay small.
_FLOAT32 = (C(32, 32, 4, 1), C(32, 16, 4, 1), C(16, 16, 4, 1))

# family -> largest head dim -> configurations for 16-bit inputs
_FORWARD: dict[str, dict[int, tuple[C, ...]]] = {
    # 8 warps hold 128 x 128 scores beside the accumulator; three stages just fit 227 KB. Measured.
    "cuda90": {
        64: (C(128, 64, 4, 3),),
        128: (C(128, 128, 8, 3), C(128, 64, 8, 2)),
        256: (C(128, 64, 8, 2),),
        512: (C(64, 32, 8, 1),),
    },
    "cuda100": {64: (C(128, 64, 8, 2),), 128: (C(128, 64, 8, 2),), 256: (C(128, 64, 8, 1),), 512: (C(64, 32, 8, 1),)},
    "cuda80": {64: (C(128, 64, 4, 3),), 128: (C(64, 64, 4, 2),), 256: (C(128, 32, 8, 2),), 512: (C(64, 32, 8, 1),)},
    # 99 KB of shared memory: two stages.
    "cuda86": {64: (C(128, 64, 8, 2),), 128: (C(128, 64, 8, 2),), 256: (C(64, 32, 4, 1),), 512: (C(32, 16, 4, 1),)},
    # 64 KB of shared memory; wavefronts of 64.
    "cdna": {64: (C(128, 64, 8, 2),), 128: (C(128, 64, 8, 2),), 256: (C(64, 32, 4, 1),), 512: (C(16, 16, 4, 1),)},
    # Matrix operands are held twice in registers there.
    "rdna": {64: (C(64, 64, 4, 1),), 128: (C(64, 32, 4, 1),), 256: (C(64, 32, 4, 1),), 512: (C(16, 16, 4, 1),)},
}
_DKDV: dict[str, dict[int, tuple[C, ...]]] = {
    # Some tens of spilled registers outside the products cost less than halving a tile. Measured.
    "cuda90": {
        64: (C(64, 64, 4, 3),),
        128: (C(64, 128, 8, 3),),
        256: (C(32, 128, 8, 2, is_split=True),),
        512: (C(16, 32, 8, 1, is_split=True),),
    },
    # Tensor memory takes the products' results; what is left of the registers is short all the same.
    "cuda100": {
        64: (C(32, 64, 8, 2),),
        128: (C(32, 64, 8, 1),),
        256: (C(32, 64, 8, 1, is_split=True),),
        512: (C(16, 32, 8, 1, is_split=True),),
    },
    "cuda80": {
        64: (C(32, 64, 8, 2),),
        128: (C(32, 64, 8, 1),),
        256: (C(32, 64, 8, 1, is_split=True),),
        512: (C(16, 32, 8, 1, is_split=True),),
    },
    "cdna": {
        64: (C(64, 64, 4, 1),),
        128: (C(32, 64, 4, 2),),
        256: (C(16, 32, 4, 1, is_split=True),),
        512: (C(16, 16, 4, 1, is_split=True),),
    },
    "rdna": {
        64: (C(16, 64, 8, 1),),
        128: (C(16, 64, 8, 1, is_split=True),),
        256: (C(16, 32, 4, 1, is_split=True),),
        512: (C(16, 16, 4, 1, is_split=True),),
    },
}
_DQ: dict[str, dict[int, tuple[C, ...]]] = {
    # Measured.
    "cuda90": {64: (C(64, 64, 4, 3),), 128: (C(128, 64, 8, 3),), 256: (C(128, 32, 8, 2),), 512: (C(32, 16, 8, 1),)},
    "cuda80": {64: (C(128, 32, 8, 2),), 128: (C(64, 64, 8, 2),), 256: (C(64, 32, 8, 1),), 512: (C(32, 16, 8, 1),)},
    "cdna": {64: (C(128, 64, 8, 2),), 128: (C(128, 32, 8, 2),), 256: (C(32, 32, 4, 1),), 512: (C(16, 16, 4, 1),)},
    "rdna": {64: (C(32, 32, 4, 1),), 128: (C(32, 32, 4, 1),), 256: (C(32, 16, 4, 1),), 512: (C(16, 16, 4, 1),)},
}
# Hopper, tiles through descriptors: fewer registers for addresses, so more programs share a processor, and one loop in
# place of two. Measured; at head dim 256 dq was not faster so. Forward, products are asked for ahead at head dim 128:
# 592 TFLOP/s over 8,192 keys, 542 over 2,048; in turn, tiles of 128 rows reached 505, and the same tiles 494.
_BY_DESCRIPTOR: dict[str, dict[int, C]] = {
    "forward": {64: C(64, 128, 4, 2), 128: C(64, 64, 4, 3), 256: C(128, 64, 8, 2)},
    "dkdv": {64: C(64, 64, 4, 3), 128: C(64, 64, 4, 2), 256: C(64, 64, 4, 2, is_split=True)},
    "dq": {64: C(64, 64, 4, 3), 128: C(128, 64, 8, 3)},
}
# Families that take them without being asked to by a table of the user's.
_DESCRIPTOR_FAMILIES = frozenset({"cuda90"})
# Below so many rows the host's time for a launch decides, and descriptors cost some of it.
_FEWEST_ROWS = 512
# Families that share another's rows where a table has none of their own.
_LIKE = {"cuda70": "cuda86", "cuda86": "cuda80", "cuda89": "cuda86", "cuda100": "cuda90", "cuda120": "cuda86"}
_LIKE |= {"rdna": "cdna", "other": "cdna"}


def _rows(table: dict[str, dict[int, tuple[C, ...]]], family: str, head_dim: int) -> tuple[C, ...]:
    while family not in table:
        family = _LIKE[family]
    return next(rows for largest, rows in table[family].items() if head_dim <= largest)


def _stream_bytes(p: AttentionProblem, resident: int, streamed: int, c: C) -> int:
    """Shared memory of a kernel that keeps some rows and streams others in stages, each with both head dims."""
    width = (padded(p.head_dim) + padded(p.head_dim_v)) * p.dtype.itemsize
    return (resident + c.num_stages * streamed) * width


def forward_bytes(p: AttentionProblem, c: C) -> int:
    """Shared memory of the forward kernel: the query tile and the stages of keys and values."""
    queries = c.block_m * padded(p.head_dim) * p.dtype.itemsize
    return queries + _stream_bytes(p, 0, c.block_n, c)


def dkdv_bytes(p: AttentionProblem, c: C) -> int:
    """Shared memory of the dk/dv kernel: a tile of keys and values, the stages of queries and output gradients."""
    return _stream_bytes(p, c.block_n, c.block_m, c)


def dq_bytes(p: AttentionProblem, c: C) -> int:
    """Shared memory of the dq kernel: a tile of queries and output gradients, the stages of keys and values."""
    return _stream_bytes(p, c.block_m, c.block_n, c)


def takes_descriptors(p: AttentionProblem) -> bool:
    """Whether the kernels can read the call's tiles through descriptors: dense sequences of 16-bit numbers, and no rule
    that would make new values of what was read or needs more registers than the tiles leave.
    """
    is_dense = not (p.is_varlen_q or p.is_varlen_k or p.page_size or p.has_seqused_k or p.has_leftpad_k)
    is_plain = not (p.has_softcap or p.has_alibi or p.has_dropout or p.has_block_mask)
    return is_dense and is_plain and p.dtype.itemsize == 2 and p.cache_dtype is None


def is_ahead(p: AttentionProblem, c: C) -> bool:
    """Whether the forward kernel asks for a tile's products before the powers of the one before it, which hides them:
    where two tiles of products, and nothing besides, fit into registers.
    """
    has_room = c.block_n <= 64 and max(padded(p.head_dim), padded(p.head_dim_v)) <= 128
    return has_room and c.by_descriptor and takes_descriptors(p)


def _by_descriptor(kernel: str, p: AttentionProblem, device: Device) -> list[C]:
    row = _BY_DESCRIPTOR[kernel].get(padded(p.head_dim))
    is_measured = p.head_dim == p.head_dim_v and min(p.seqlen_q, p.seqlen_k) >= _FEWEST_ROWS
    if row is None or not is_measured or device.family not in _DESCRIPTOR_FAMILIES or not takes_descriptors(p):
        return []
    return [row._replace(by_descriptor=True)]


def dv_alone(c: C) -> C:
    """The tiles of a split pass for dv: with neither v nor dk to hold, twice as wide where that was measured."""
    return c._replace(block_n=2 * c.block_n, num_warps=2 * c.num_warps) if c.by_descriptor else c


def _ladder(kernel: str, p: AttentionProblem, device: Device) -> list[C]:
    if device.family == "interpreter":
        return list(_INTERPRETER)
    table, size = _TABLES[kernel]
    head_dim = max(p.head_dim, p.head_dim_v)
    rows = _rows(table, device.family, head_dim)
    if p.has_dropout and len(rows) > 1:
        rows = rows[1:]  # the bits need shared memory and registers of their own
    first = _FLOAT32 if p.dtype.itemsize == 4 else (*rows, *_SMALLER)
    if head_dim > 128 and table is _DKDV:
        first = tuple(c._replace(is_split=True) for c in first)
    return [c for c in (*_by_descriptor(kernel, p, device), *first) if size(p, c) <= device.shared_memory]


_TABLES = {"forward": (_FORWARD, forward_bytes), "dkdv": (_DKDV, dkdv_bytes), "dq": (_DQ, dq_bytes)}


@lru_cache(maxsize=8192)
def _known(kernel: str, p: AttentionProblem, device: Device, path: str | None) -> list[C]:
    configs = _ladder(kernel, p, device)
    tuned = measured.lookup(path, kernel, p, device.family) if path else None
    if tuned is None or _TABLES[kernel][1](p, tuned) > device.shared_memory:
        return configs
    return configs if tuned.by_descriptor and not takes_descriptors(p) else [tuned, *configs]


def _configs(kernel: str, p: AttentionProblem, device: Device) -> list[C]:
    """What a search asks for, else what the user's table holds and then the built-in tables."""
    asked = measured.forced(kernel)
    return _known(kernel, p, device, env.tuning_table()) if asked is None else [asked]


def forward(p: AttentionProblem, device: Device) -> list[C]:
    """Configurations of the forward kernel."""
    return _configs("forward", p, device)


def dkdv(p: AttentionProblem, device: Device) -> list[C]:
    """Configurations of the dk/dv kernel."""
    return _configs("dkdv", p, device)


def dq(p: AttentionProblem, device: Device) -> list[C]:
    """Configurations of the dq kernel."""
    return _configs("dq", p, device)


def statistics(p: AttentionProblem) -> C:
    """Configuration of the statistics kernel: memory-bound, one pass over out and dout in 4,096 numbers a tile."""
    return C(max(16, min(128, 4096 // padded(p.head_dim_v))), 0, 4, 1)


def fits(p: AttentionProblem, device: Device) -> bool:
    """Whether every kernel of the pass has a configuration within the device's shared memory."""
    kernels = (dkdv, dq) if p.is_backward else (forward,)
    return all(kernel(p, device) for kernel in kernels)
