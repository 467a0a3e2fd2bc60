"""Block sizes and warps of the fused kernels: pure functions of sizes, with the reason beside each number."""

from functools import cache
from typing import NamedTuple

from flash_attn_plus.device import Device
from flash_attn_plus.tuning.config import power_of_two


class RowConfig(NamedTuple):
    """A kernel over rows, which it holds in registers where `block_cols` is not less than a row."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1
    unroll: int = 1  # steps of a row that is not held


def _warps(elements: int, per_thread: int, facts: Device) -> int:
    """A power of two of at most 1024 threads that gives each thread at most `per_thread` elements if it can."""
    width = 64 if facts.family == "cdna" else 32
    return min(1024 // width, max(1, power_of_two(elements) // (width * per_thread)))


REREAD_FROM = 4096  # columns from which the forward kernel reads a row again instead of holding it


@cache
def norm_forward(cols: int, has_dropout: bool, facts: Device) -> RowConfig:
    """Whole rows in registers; short rows are taken several at a time so that a program moves about 4 KB.

    Long rows are read again, in steps: `block_cols` is less than a row then. Not with dropout, which would be drawn
    again each time, nor on AMD, whose nearest caches are small.
    """
    block_cols = max(16, power_of_two(cols))
    if block_cols >= REREAD_FROM and not has_dropout and facts.family not in ("cdna", "rdna"):
        if block_cols <= 8192:
            return RowConfig(1, block_cols // 2, block_cols // 1024, unroll=2)
        return RowConfig(1, 4096, 16)  # 40 registers a thread: three programs a processor, not two
    block_rows = max(1, 2048 // block_cols)
    # 16 elements a thread are two 16-byte loads of a 16-bit type in flight: enough with several programs a processor.
    # Long rows take 32: more threads would wait for each other in every reduction.
    warps = _warps(block_rows * block_cols, 16 if block_cols <= 4096 else 32, facts)
    return RowConfig(block_rows, block_cols, min(16, warps))


@cache
def norm_backward(
    cols: int, element_size: int, row_tensors: int, weights: int, biases: int, facts: Device
) -> RowConfig:  # fmt: skip
    """As forward, but each program walks over many rows, the next two of which are on their way meanwhile.

    `row_tensors` counts the tensors read row by row, `weights` and `biases` the norm's parameters.
    """
    block_cols = max(16, power_of_two(cols))
    block_rows = max(1, 2048 // block_cols)
    # 16 elements a thread, 8 if the sums of four gradients are held. At 32 warps a thread has 64 registers: too few for
    # the sums of a bias too.
    warps = _warps(block_rows * block_cols, 16 // weights, facts)
    if biases:
        warps = min(16, warps)
    read = row_tensors + (weights if block_cols > REREAD_ABOVE else 0)
    staged = read * block_rows * block_cols * element_size  # one step, in shared memory
    # Two steps ahead or none: one alone is the slowest, on an H200 by a quarter. CDNA and RDNA stage in registers.
    is_ahead = facts.family not in ("cdna", "rdna") and 2 * staged + 4096 <= facts.shared_memory
    return RowConfig(block_rows, block_cols, warps, 3 if is_ahead else 1)


REREAD_ABOVE = 8192  # columns above which the backward kernel reads the weight for each row instead of holding it
SUMS_IN_REGISTERS = 16384  # float32 sums of weight gradients a program can hold beside the rows without spilling


@cache
def norm_backward_fused_sums(block_cols: int, element_size: int, wanted: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of the wanted sums (dweight, dbias, dweight1, dbias1) the row kernel keeps; the rest take a second pass.

    Bias gradients leave first: their second pass reads the output's gradient only.
    """
    if block_cols * element_size > 32768:  # too long to load ahead through shared memory: registers hold it all
        return (False,) * len(wanted)
    kept = list(wanted)
    second_branch = int(wanted[2])  # its gradient is a row more in registers
    for i in (3, 1, 2, 0):
        if (sum(kept) + second_branch) * block_cols <= SUMS_IN_REGISTERS:
            break
        kept[i] = False
    return tuple(kept)


def column_sums(rows: int, cols: int, processors: int) -> tuple[int, int, int]:
    """(block_rows, block_cols, row chunks) of the second pass over columns."""
    block_rows, block_cols = 8, 512
    column_blocks = -(-cols // block_cols)
    # about eight programs a processor, so that their loads cover each other's waiting
    chunks = max(1, min(8 * processors // column_blocks, -(-rows // block_rows)))
    return block_rows, block_cols, chunks


def totals(count: int) -> tuple[int, int]:
    """(rows, columns) a step of the sum over `count` partial sums: narrow, since a short gradient has few columns."""
    return min(128, max(16, power_of_two(count))), 16


def norm_backward_programs(rows: int, config: RowConfig, facts: Device) -> int:
    """Programs, hence partial sums of each weight gradient: few enough that adding them up stays cheap."""
    # 512 threads a processor have 128 registers each, and the rows that are on their way keep the memory busy
    a_processor = max(1, 16 // config.num_warps)
    tiles = -(-rows // config.block_rows)
    return max(1, min(facts.processors * a_processor, tiles))


@cache
def cross_entropy_block(cols: int) -> tuple[int, int]:
    """(columns a step, warps): 16 elements a thread; 32 in half as many programs were slower on an H200."""
    block = min(4096, max(128, power_of_two(cols)))
    return block, max(1, block // 512)


class RotaryBlock(NamedTuple):
    """What one program of the rotary kernel turns; `half` and `rest` are padded numbers of features."""

    tokens: int
    heads: int
    half: int
    rest: int
    num_warps: int


def rotary_block(heads: int, half: int, rest: int) -> RotaryBlock:
    """About 1024 pairs a program, 8 a thread, one 16-byte load of each half."""
    rows = max(1, 1024 // power_of_two(half))
    block_heads = min(rows, power_of_two(heads))
    while -(-heads // block_heads) * block_heads > 1.25 * heads:  # at most a fifth of the threads idle
        block_heads //= 2
    return RotaryBlock(rows // block_heads, block_heads, power_of_two(half), power_of_two(rest), 4)


@cache
def elementwise_block(cols: int) -> tuple[int, int]:
    """(columns, warps) of elementwise kernels over rows: 16 elements a thread."""
    block = min(2048, max(128, power_of_two(cols)))
    return block, max(1, block // 512)
