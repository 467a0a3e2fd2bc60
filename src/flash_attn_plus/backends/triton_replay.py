"""Launch a compiled kernel again without binding and hashing its arguments anew: most of a launch's host time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn_plus.backends import triton_descriptors, triton_key

triton_key.remember()  # every launcher imports this module, and none needs the key before

# The launcher's arguments are not public. These are the versions it was read and run in; others bind every time.
_PROVEN = ("3.6.", "3.7.")
IS_PROVEN = triton.__version__.startswith(_PROVEN) and torch.version.hip is None


def _has_hooks() -> bool:
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)) or bool(
        getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


# Of a descriptor: its place among the arguments, what makes arguments of it, and those made, by address.
_Described = tuple[int, Callable[[Any], list], dict[int, list]]
_MOST_MADE = 1024  # of each, as the caches of a model's layers have; then they are made anew


class Replay:
    """One compiled kernel, its grid and the arguments behind its tensors.

    A descriptor becomes what the copy engine reads, and that is kept for each address: memory comes and goes at few,
    and making it takes longer than all else.
    """

    def __init__(self, compiled: CompiledKernel, grid: tuple[int, ...], tail: tuple, device: torch.device):
        run = compiled.run
        middle: tuple = (compiled.packed_metadata, None, None, None)  # without hooks and what they are told
        self._launch: Any = run
        self._described: list[_Described] = []
        self._is_packed = False
        if not (run.global_scratch_size or run.profile_scratch_size):  # then the wrapper has nothing to do
            self._launch, self._described = _bare(run.launch)
            flags = (run.launch_cooperative_grid, run.launch_pdl)
            self._is_packed = hasattr(run, "arg_annotations")  # from Triton 3.7 on
            if self._is_packed:
                middle = (*flags, *middle, None, None, run.arg_annotations, run.kernel_signature)
            else:
                middle = (*flags, None, None, *middle)
        self._middle = (compiled.function, *middle)
        self._grid = (*grid, 1, 1)[:3]
        self._tail = tail
        self._device = device.index

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current stream.

        Tensors, addresses or descriptors must be as aligned and laid out as those that it was compiled for.
        """
        self.launch(self.expanded(*tensors))

    def expanded(self, *tensors: Any) -> list:
        """The first arguments, with what the copy engine reads in place of descriptors."""
        arguments = list(tensors)
        for i, make, made in self._described:  # from the last one, since each takes several places
            x = tensors[i]
            address = x.base.data_ptr()
            known = made.get(address)
            if known is None:
                if len(made) >= _MOST_MADE:
                    made.clear()
                known = made[address] = make(x)
            arguments[i : i + 1] = known
        return arguments

    def launch(self, arguments: list) -> None:
        """Launch with all arguments in front of the numbers, descriptors as `expanded` returns them."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        if self._is_packed:
            self._launch(*self._grid, stream, *self._middle, (*arguments, *self._tail))
        else:
            self._launch(*self._grid, stream, *self._middle, *arguments, *self._tail)


def _bare(launch: Any) -> tuple[Any, list[_Described]]:
    """The launcher in Triton's wrapper that makes anew, at every launch, what the copy engine reads of descriptors, and
    the descriptors from the last one on. Without such a wrapper the launcher as it is.
    """
    names = launch.__code__.co_freevars if hasattr(launch, "__code__") else ()
    if set(names) != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return launch, []
    held = {name: cell.cell_contents for name, cell in zip(names, launch.__closure__, strict=True)}
    make, facts = launch.__globals__["make_tensordesc_arg"], held["tensordesc_meta"]
    if None in facts:
        return launch, []
    places = sorted(held["tensordesc_indices"])
    described: list[_Described] = [(i, partial(make, metadata=fact), {}) for i, fact in zip(places, facts, strict=True)]
    return held["launcher"], described[::-1]


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


class Recorded:
    """A launch that Triton binds the first time; later ones repeat it on other tensors laid out alike."""

    def __init__(self, device: torch.device):
        self._device = device
        # a replay, how many tensors it takes, and its descriptors; changed in one step, for threads share plans
        self._known: tuple[Replay, int, dict[int, TensorDescriptor]] | None = None

    def bind(
        self, kernel: Any, grid: tuple[int, ...], tensors: tuple, tail: tuple, may_repeat: bool = True, **options: int
    ) -> None:
        """kernel[grid](*tensors, *tail, **options); descriptors may stand for tensors."""
        compiled = kernel[grid](*tensors, *tail, **options)
        descriptors = {i: x for i, x in enumerate(tensors) if isinstance(x, TensorDescriptor)}
        bare = tuple(x.base if i in descriptors else x for i, x in enumerate(tensors))
        count = max((i + 1 for i, x in enumerate(tensors) if x is not None), default=0)  # the rest stays None
        tail = (*tensors[count:], *tail)
        replay = record(compiled, grid, tail, bare, self._device) if may_repeat else None
        likes = {i: triton_descriptors.like(x, None) for i, x in descriptors.items()}
        self._known = None if replay is None else (replay, count, likes)

    def repeats(self, tensors: tuple) -> bool:
        """Launch on these tensors what was bound for others; False where that must be bound anew."""
        known = self._known
        if known is None or not may_replay():
            return False
        replay, count, descriptors = known
        places: list[Any] = []
        bits = 0
        for x in tensors[:count]:
            place = None
            if x is not None:
                place = x.data_ptr()
                bits |= place
            places.append(place)
        if bits & 15:
            return False
        for i, descriptor in descriptors.items():
            places[i] = triton_descriptors.like(descriptor, tensors[i])
        replay(*places)
        return True
