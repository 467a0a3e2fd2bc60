"""Launch a compiled kernel again without binding and hashing its arguments anew: most of a launch's host time."""

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

# The launcher's arguments are not public. These are the versions it was read and run in; others bind every time.
_PROVEN = ("3.6.",)
IS_PROVEN = triton.__version__.startswith(_PROVEN) and torch.version.hip is None


def _has_hooks() -> bool:
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)) or bool(
        getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


class Replay:
    """One compiled kernel, its grid and the arguments behind its tensors."""

    def __init__(self, compiled: CompiledKernel, grid: tuple[int, ...], tail: tuple, device: torch.device):
        run = compiled.run
        between: tuple = ()
        self._launch = run
        if not (run.global_scratch_size or run.profile_scratch_size):  # then the wrapper has nothing to do
            self._launch = run.launch
            between = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        self._middle = (compiled.function, *between, compiled.packed_metadata, None, None, None)
        self._grid = (*grid, 1, 1)[:3]
        self._tail = tail
        self._device = device.index

    def __call__(self, *tensors: Tensor | int | None) -> None:
        """Launch on the current stream; every tensor, or address, must be as aligned as when it was compiled."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._launch(*self._grid, stream, *self._middle, *tensors, *self._tail)


def addresses(tensors: tuple) -> list[int | None]:
    """Where the tensors start: a launch takes these in half the time of tensors."""
    return [x if x is None else x.data_ptr() for x in tensors]


def are_aligned(tensors: tuple) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, which compiled code may rely on."""
    bits = 0
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    return bits & 15 == 0


def may_replay() -> bool:
    """Not while a profiler listens to launches: it learns of the ordinary ones only."""
    return not _has_hooks()


def record(compiled: object, grid: tuple[int, ...], tail: tuple, tensors: tuple, device: torch.device) -> Replay | None:
    """A replay of the launch that returned `compiled`, where that was proven; None where launches must be bound."""
    if IS_PROVEN and device.type == "cuda" and isinstance(compiled, CompiledKernel) and are_aligned(tensors):
        return Replay(compiled, grid, tail, device)
    return None
