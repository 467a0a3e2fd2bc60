"""Arguments and grids of the norm kernels."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.dropout import keep_threshold
from flash_attn_plus.fused import launch, norm_gluon
from flash_attn_plus.fused.path import on_device


@cache
def _modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Triton's, which need not be installed: the launcher, the kernels, and those of long rows."""
    from flash_attn_plus.backends import triton_relaunch
    from flash_attn_plus.kernels.triton import norm, norm_long

    return triton_relaunch, norm, norm_long


def _row_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in tensors]


def _partials(grad: Tensor | None, count: int) -> Tensor | None:
    """Float32 (count, cols) to hold one partial sum a program."""
    return None if grad is None else torch.empty((count, grad.shape[0]), dtype=torch.float32, device=grad.device)


def norm_forward(
    x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds, eps, dropout_p, zero_centered_weight, is_rms_norm,
    y, y1, t, mean, rstd, mask, mask1,
) -> None:  # fmt: skip
    """One program a block of rows, or a row where rows are long."""
    triton, kernels, long_kernels = _modules()
    (rows, cols), where = x.shape, x.device
    config = launch.norm_forward(cols, seeds is not None, device.probe(where))
    inputs, parameters, outputs = (x, residual, x1, rowscale), (weight, bias, weight1, bias1), (y, y1, t, mean, rstd)
    flags = kernels.NormFlags(is_rms_norm, zero_centered_weight)
    constants = (*_row_strides(x, residual, x1, y, y1, t), cols, flags)
    with on_device(x):
        if config.block_cols < cols:
            tensors: tuple = (*inputs, *parameters, *outputs)
            tail: tuple = (*constants, config.block_cols, config.unroll)
            triton.launch(
                long_kernels.norm_long_forward_kernel, (rows,), tensors, (eps,), tail, config.num_warps, where
            )
        else:
            grid, numbers = (-(-rows // config.block_rows),), (keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
            tensors, tail = (*inputs, seeds, *parameters, *outputs, mask, mask1), (*constants, *config[:2])
            triton.launch(
                kernels.norm_forward_kernel, grid, tensors, (rows, eps, *numbers), tail, config.num_warps, where
            )


def norm_backward(
    dy, t, weight, bias, dy1, weight1, dt, rowscale, seeds, mean, rstd, dropout_p, zero_centered_weight, is_rms_norm,
    dx, dx1, dresidual, y, dweight, dbias, dweight1, dbias1,
) -> None:  # fmt: skip
    """Each program walks over its share of the rows and leaves one partial sum of each weight gradient."""
    facts, (rows, cols) = device.probe(t.device), t.shape
    is_plain = all(x is None for x in (dy1, rowscale, seeds, dresidual, y))
    if is_plain and norm_gluon.serves(dy, t, weight, dt, dbias is not None):
        count = norm_gluon.programs(rows, facts.processors)
        sums = [_partials(g, count) for g in (dweight, dbias)]
        norm_gluon.norm_backward(dy, t, weight, dt, mean, rstd, zero_centered_weight, dx, *sums)
        with on_device(t):
            _add_up([*sums, None, None], (dweight, dbias, None, None), count)
        return
    triton, kernels, _ = _modules()
    row_tensors = 2 + (dy1 is not None) + (dt is not None)
    weights, biases = 1 + (weight1 is not None), (dbias is not None) + (dbias1 is not None)
    config = launch.norm_backward(cols, t.element_size(), row_tensors, weights, biases, facts)
    programs = launch.norm_backward_programs(rows, config, facts)
    gradients = (dweight, dbias, dweight1, dbias1)
    is_kept = launch.norm_backward_fused_sums(
        config.block_cols, t.element_size(), tuple(g is not None for g in gradients)
    )
    sums = [_partials(g if kept else None, programs) for g, kept in zip(gradients, is_kept, strict=True)]
    tensors = (
        t, dy, dy1, dt, rowscale, seeds, weight, bias, weight1, mean, rstd, dx, dx1, dresidual, y, *sums
    )  # fmt: skip
    numbers = (rows, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
    constants = (
        *_row_strides(t, dy, dy1, dt, dx, dx1, dresidual, y), cols,
        kernels.NormFlags(is_rms_norm, zero_centered_weight),
        config.block_rows, config.block_cols, config.num_stages, launch.REREAD_ABOVE,
    )  # fmt: skip
    with on_device(t):
        triton.launch(
            kernels.norm_backward_kernel, (programs,), tensors, numbers, constants, config.num_warps, t.device
        )
        _add_up(sums, gradients, programs)
        left = [None if kept else g for g, kept in zip(gradients, is_kept, strict=True)]
        _column_sums(t, dy, mean, rstd, left[0], left[1], facts.processors)
        _column_sums(t, dy1, mean, rstd, left[2], left[3], facts.processors)


def _column_sums(t, dy, mean, rstd, dweight: Tensor | None, dbias: Tensor | None, processors: int) -> None:
    """The weight gradients that the row kernel had no registers for."""
    if dweight is None and dbias is None:
        return
    triton, kernels, _ = _modules()
    rows, cols = t.shape
    block_rows, block_cols, chunks = launch.column_sums(rows, cols, processors)
    sums = [_partials(g, chunks) for g in (dweight, dbias)]
    grid, constants = (-(-cols // block_cols), chunks), (t.stride(0), dy.stride(0), cols, block_rows, block_cols)
    triton.launch(kernels.norm_column_sums_kernel, grid, (t, dy, mean, rstd, *sums), (rows,), constants, 4, t.device)
    _add_up([*sums, None, None], (dweight, dbias, None, None), chunks)


def _add_up(partials, gradients, count: int) -> None:
    """Gradients from `count` rows of partial sums each, where there are any."""
    last = max((i for i, partial in enumerate(partials) if partial is not None), default=-1)
    if last < 0:
        return
    cols = partials[last].shape[1]
    block_parts, block_cols = launch.totals(count)
    grid, where = (-(-cols // block_cols), last + 1), partials[last].device
    triton, kernels, _ = _modules()
    triton.launch(
        kernels.norm_totals_kernel, grid, (*partials, *gradients), (count,), (cols, block_parts, block_cols), 4, where
    )
