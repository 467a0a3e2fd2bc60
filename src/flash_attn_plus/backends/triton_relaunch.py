"""Launch a kernel by what its earlier launch compiled, without binding and hashing its arguments anew.

`triton_replay` repeats one launch on other tensors; here grids and numbers that no code is specialised for may change
too, so a stream of ever new lengths stays fast.
"""

from collections.abc import Hashable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from flash_attn_plus.backends import triton_replay

_MAX_INT32 = 2**31 - 1
# The kernel is kept beside what it compiled to, so that its id stays its own. Emptied when full, which a stream of ever
# new constants brings about.
_compiled: dict[tuple, tuple[Any, CompiledKernel]] = {}
_MAX_COMPILED = 4096


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Hashable, ...],
    num_warps: int,
    where: torch.device,
) -> None:
    """kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps) on the current stream of the current device.

    Args:
        tensors: the first arguments; `where` is their device, the current one.
        numbers: floats, and integers that the kernel does not specialise on.
        constants: the rest, integers among them that the kernel is specialised on; a new one binds anew.
    """
    addresses = [None if x is None else x.data_ptr() for x in tensors]  # taken in half the time of tensors
    bits = reduce(or_, filter(None, addresses), 0)
    may_remember = where.type == "cuda" and triton_replay.IS_PROVEN and not bits & 15
    are_narrow = min(numbers, default=0) >= -_MAX_INT32 and max(numbers, default=0) <= _MAX_INT32
    if not (may_remember and are_narrow and triton_replay.may_replay()):
        kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        return
    types = (*[None if x is None else x.dtype for x in tensors], *map(type, numbers))
    key = (id(kernel), where.index, num_warps, constants, types)
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        if isinstance(compiled, CompiledKernel):
            if len(_compiled) >= _MAX_COMPILED:
                _compiled.clear()
            _compiled[key] = kernel, compiled
        return
    compiled = known[1]
    stream = torch._C._cuda_getCurrentRawStream(where.index)
    compiled.run(
        *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
        *addresses, *numbers, *constants,
    )  # fmt: skip
