"""Block sizes and warps of the fused kernels: pure functions of sizes, with the reason beside each number."""

from typing import NamedTuple

from flash_attn_plus.device import Device


class RowConfig(NamedTuple):
    """A kernel that holds whole rows in registers."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _warps(elements: int, per_thread: int, facts: Device) -> int:
    """A power of two of at most 1024 threads that gives each thread at most `per_thread` elements if it can."""
    width = 64 if facts.family == "cdna" else 32
    return min(1024 // width, max(1, next_power_of_two(elements) // (width * per_thread)))


def norm_forward(cols: int, facts: Device) -> RowConfig:
    """Whole rows in registers; short rows are taken several at a time so that a program moves about 4 KB."""
    block_cols = max(16, next_power_of_two(cols))
    block_rows = max(1, 2048 // block_cols)
    # 16 elements a thread are two 16-byte loads of a 16-bit type in flight: enough with several programs a processor.
    return RowConfig(block_rows, block_cols, min(16, _warps(block_rows * block_cols, 16, facts)))


def norm_backward(cols: int, element_size: int, row_tensors: int, facts: Device) -> RowConfig:
    """As forward, but each program walks over many rows, the next of which is loaded while this one is reduced.

    `row_tensors` counts the tensors read row by row.
    """
    block_cols = max(16, next_power_of_two(cols))
    block_rows = max(1, 2048 // block_cols)
    # x, dy and the sums of the weight gradients live at once. 8 elements of each a thread fit in 64 registers; longer
    # rows take 16, since at 1024 threads a program no thread may have more than 64 registers, addresses included.
    warps = _warps(block_rows * block_cols, 8 if block_cols <= 4096 else 16, facts)
    weights = 2 if block_cols > REREAD_ABOVE else 0
    staged = (row_tensors + weights) * block_rows * block_cols * element_size  # one step, in shared memory
    if facts.family in ("cdna", "rdna"):  # registers hold what is on its way, and they are short
        return RowConfig(block_rows, block_cols, warps, 1)
    if 2 * staged <= facts.shared_memory // 2:  # two steps ahead, and room for a second program
        return RowConfig(block_rows, block_cols, warps, 3)
    return RowConfig(block_rows, block_cols, warps, 2 if staged + 1024 <= facts.shared_memory else 1)


REREAD_ABOVE = 8192  # columns above which the backward kernel reads the weight for each row instead of holding it
SUMS_IN_REGISTERS = 16384  # float32 sums of weight gradients a program can hold beside the rows without spilling


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
    block_rows, block_cols = 16, 256
    column_blocks = -(-cols // block_cols)
    # about four programs a processor, so that their loads cover each other's waiting
    chunks = max(1, min(4 * processors // column_blocks, -(-rows // block_rows)))
    return block_rows, block_cols, chunks


def norm_backward_programs(rows: int, config: RowConfig, facts: Device) -> int:
    """Programs, hence partial sums of each weight gradient: few enough that adding them up stays cheap."""
    # 64 registers a thread let 1024 threads run beside each other on a processor; more than four add only partial sums
    a_processor = min(4, max(1, 32 // config.num_warps))
    tiles = -(-rows // config.block_rows)
    return max(1, min(facts.processors * a_processor, tiles))


def cross_entropy_block(cols: int) -> tuple[int, int]:
    """(columns a step, warps): 32 elements a thread keep four 16-byte loads of a 16-bit type in flight."""
    block = min(8192, max(128, next_power_of_two(cols)))
    return block, min(8, max(1, block // 1024))


def rotary_rows(half: int) -> tuple[int, int]:
    """(rows of one head each, warps): about 2048 pairs a program, 16 a thread, two 16-byte loads of each half."""
    block_half = next_power_of_two(half)
    return max(1, 2048 // block_half), 4


def elementwise_block(cols: int) -> tuple[int, int]:
    """(columns, warps) of elementwise kernels over rows: 16 elements a thread."""
    block = min(2048, max(128, next_power_of_two(cols)))
    return block, max(1, block // 512)
