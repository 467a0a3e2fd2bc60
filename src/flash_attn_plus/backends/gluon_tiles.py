"""What every launch of a Hopper kernel needs: tensors as tiles, a counter of tiles, and the launch itself."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_attn_plus.backends import triton_replay
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

LOG2E = 1.4426950408889634
QUERIES = 64  # rows of a warpgroup's tile, as of its matrix instruction
_RAGGED = 1 << 30  # rows a descriptor of packed sequences counts to
_ENDLESS = 0x7FFF0000


class Tiles:
    """What a launch needs to know of a tensor that is copied in boxes of [rows, cols] of one head.

    A launch builds the engine's descriptor from `base`, `shape` and `strides`; Triton's own class, whose checks cost
    more than the launch, is made once for each kernel that is compiled, or for each launch where the launcher is new.
    """

    __slots__ = ("base", "box", "padding", "shape", "strides")
    round_f32_to_tf32 = False  # launchers ask for it from Triton 3.7 on

    def __init__(self, base: Any, shape: list[int], strides: list[int], box: tuple[int, int]):
        self.base, self.shape, self.strides, self.box, self.padding = base, shape, strides, box, "zero"

    def of(self, base: Tensor | None) -> "Tiles":
        """The same boxes of another tensor of the same shape and strides, or of none, which holds no memory."""
        return Tiles(base, self.shape, self.strides, self.box)

    def checked(self) -> TensorDescriptor:
        """The same as Triton's descriptor, from which a kernel's type is derived."""
        rank, bits = len(self.shape), 8 * self.base.element_size()
        swizzle = min(128, self.box[1] * bits // 8) if self.box[0] > 1 else 0
        layout = gl.NVMMASharedLayout(swizzle, bits, rank)
        return TensorDescriptor(self.base, self.shape, self.strides, [1] * (rank - 2) + list(self.box), layout)


def rows_between(x: Tensor) -> int:
    """Rows of a cache from one sequence, or page, to the next, if it has several; 0 where that is no whole number."""
    if x.ndim == 3 or x.shape[0] == 1:
        return 1
    batch, row = x.stride()[:2]
    return batch // row if row > 0 and batch % row == 0 else 0


def tiles_of(x: Tensor, rows: int, cols: int, is_ragged: bool = False) -> Tiles:
    """Boxes of (b, s, h, d), packed (total, h, d) or, ragged, (b, s, h, d) as packed with rows beyond the used ones.

    Packed rows get two more dimensions whose strides add up to 2**64 elements at coordinate 2**30, which an address
    of 64 bits does not see: so a tile may end at any row, and the engine clips it there (as triton.tools.ragged_tma).
    """
    shape, strides, width = x.shape, x.stride(), x.shape[-1]
    # the stride of a single row or head is never used, but must be aligned
    row = strides[-3] if shape[-3] > 1 else 8 * width
    head = strides[-2] if shape[-2] > 1 else 8 * width
    if len(shape) == 3 or is_ragged:
        steps = [(1 << 34) - row, row, head, row, 1]
        return Tiles(x, [_ENDLESS, _ENDLESS, shape[-2], _RAGGED, width], steps, (rows, cols))
    batch = strides[0] if shape[0] > 1 else 8 * width
    return Tiles(x, [shape[0], shape[2], shape[1], width], [batch, head, row, 1], (rows, cols))


_compiled: dict[tuple, Any] = {}


class Launch:
    """A launch past Triton's inspection of every argument, once a kernel for the key is compiled.

    `key` holds all that the compiled code depends on beside the constants: dtype, presence of optional arguments and
    integers beyond 32 bits. The kernels specialise on no value of an argument.
    """

    def __init__(self, kernel: Any, where: torch.device, grid: int, key: tuple, constants: dict[str, Any]):
        self._kernel, self._where, self._grid, self._constants = kernel, where, (grid, 1, 1), constants
        self._index = where.index if where.type == "cuda" else None
        self._values = tuple(constants.values())
        self._key = (kernel, where, *key, *self._values)
        self._replay: triton_replay.Replay | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch on the current stream of the tensors' device."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                return self(*arguments)
        if self._replay is None:
            known = _compiled.get(self._key)
            if known is None or not triton_replay.IS_PROVEN:
                arguments = tuple(x.checked() if isinstance(x, Tiles) else x for x in arguments)
            if known is None:
                _compiled[self._key] = self._kernel[self._grid](*arguments, **self._constants, num_warps=4)
                return None
            if triton_replay.IS_PROVEN and self._index is not None:
                self._replay = triton_replay.Replay(known, self._grid, self._values, self._where)
        if self._replay is not None and triton_replay.may_replay():
            # a launch takes addresses in half the time of tensors
            self._replay(*[x.data_ptr() if type(x) is Tensor else x for x in arguments])
        else:
            _compiled[self._key][self._grid](*arguments, *self._values)
        return None


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counter(where: torch.device) -> Tensor:
    """A zero that the kernel leaves zero: one for each stream, whose launches do not overlap; a graph owns its own."""
    stream = 0
    if where.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=where)
        stream = torch._C._cuda_getCurrentRawStream(where.index)
    known = _counters.get((where, stream))
    if known is None:
        known = _counters[where, stream] = torch.zeros(1, dtype=torch.int32, device=where)
    return known


def chunk_of(heads: int, bytes_a_head: int, has_right: bool, most_bytes: int) -> int:
    """How many heads take turns: under a causal band as many as the cache holds, so that long tiles come first."""
    return max(1, min(heads, most_bytes // bytes_a_head)) if has_right else 1


def score_numbers(problem: AttentionProblem, inputs: AttentionInputs) -> tuple[int, float, float, float]:
    """(stride of slopes between batches, and of the scores: scale, scale under the softcap, softcap) in log2 units."""
    slopes, scale, cap = inputs.alibi_slopes, inputs.softmax_scale, inputs.softcap
    stride = slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0
    return (stride, scale * LOG2E, scale / cap if problem.has_softcap else 0.0, cap * LOG2E)
