"""When the Gluon kernel serves the backward pass of a norm, and its launch."""

from functools import cache

from torch import Tensor

from flash_attn_plus import device, selection
from flash_attn_plus.fused.launch import RowConfig
from flash_attn_plus.fused.path import on_device

# Two rows of each of three tensors and the weight take 224 KB of shared memory at 16,384 columns; shorter rows are
# faster from registers. With 8 warps a thread has the registers for both sums of 64 columns, 16 of them a step.
LONGEST, SHORTEST = 16384, 8193
CONFIG = RowConfig(1, 4096, 8)


@cache
def _has_gluon() -> bool:
    return selection.get("gluon").unavailable() is None


def serves(dy: Tensor, t: Tensor, weight: Tensor, dt: Tensor | None, has_bias: bool) -> bool:
    """Whether the rows are too many for registers, 16 bits wide, and lie so that 16 bytes are copied at once."""
    if dt is None and not has_bias:
        return False  # two rows and one gradient's sums still fit, and are 2 % faster there
    rows = (dy, t, weight) if dt is None else (dy, t, weight, dt)
    cols = t.shape[1]
    return (
        SHORTEST <= cols <= LONGEST and cols % 16 == 0
        and device.probe(t.device).family == "cuda90" and selection.forced_backend() in (None, "gluon")
        and all(x.element_size() == 2 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in rows[:2] + rows[3:])
        and weight.element_size() == 2 and weight.data_ptr() % 16 == 0 and _has_gluon()
    )  # fmt: skip


def norm_backward(
    dy: Tensor, t: Tensor, weight: Tensor, dt: Tensor | None, mean: Tensor | None, rstd: Tensor,
    zero_centered_weight: bool, dx: Tensor, dweights: Tensor, dbiases: Tensor | None,
) -> None:  # fmt: skip
    """Fill dx, and a row of partial sums of the weight's (and the bias's) gradient a program."""
    from flash_attn_plus.backends.triton_relaunch import launch
    from flash_attn_plus.kernels.gluon.norm import norm_long_backward_kernel

    rows, cols = t.shape
    tensors = (t, dy, dt, weight, mean, rstd, dx, dweights, dbiases)
    strides = (t.stride(0), dy.stride(0), 0 if dt is None else dt.stride(0), dx.stride(0))
    constants = (*strides, cols, zero_centered_weight, LONGEST, CONFIG.block_cols, CONFIG.num_warps)
    with on_device(t):
        launch(norm_long_backward_kernel, dweights.shape[:1], tensors, (rows,), constants, CONFIG.num_warps, t.device)


def programs(rows: int, processors: int) -> int:
    """One a processor, whose shared memory it fills."""
    return max(1, min(processors, rows))
