"""Descriptors, arguments and grids of the Hopper kernels."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_attn_plus import device
from flash_attn_plus.kernels.gluon import backward as backward_kernels
from flash_attn_plus.kernels.gluon import backward_ends as ends_kernels
from flash_attn_plus.kernels.gluon import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper

LOG2E = 1.4426950408889634
_L2_BYTES = 32 << 20  # what the heads in flight may take of the 50 MB cache
_RAGGED = 1 << 30  # rows a descriptor of packed sequences counts to
_ENDLESS = 0x7FFF0000
_QUERIES = 64  # rows of a warpgroup's tile, as of its matrix instruction
_KEYS = 128  # keys a program of the backward kernel
_ALIGN = ends_kernels.ALIGN.value
_END_ROWS = 32  # rows a program of the kernels around the backward kernel; 64 spill


class Tiles:
    """What a launch needs to know of a tensor that is copied in boxes of [rows, cols] of one head.

    A launch builds the engine's descriptor from `base`, `shape` and `strides`; Triton's own class, whose checks cost
    more than the launch, is made once for each kernel that is compiled.
    """

    __slots__ = ("base", "box", "padding", "shape", "strides")

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], box: tuple[int, int]):
        self.base, self.shape, self.strides, self.box, self.padding = base, shape, strides, box, "zero"

    def of(self, base: Tensor) -> "Tiles":
        """The same boxes of another tensor of the same shape and strides."""
        return Tiles(base, self.shape, self.strides, self.box)

    def checked(self) -> TensorDescriptor:
        """The same as Triton's descriptor, from which a kernel's type is derived."""
        rank, bits = len(self.shape), 8 * self.base.element_size()
        swizzle = min(128, self.box[1] * bits // 8) if self.box[0] > 1 else 0
        layout = gl.NVMMASharedLayout(swizzle, bits, rank)
        return TensorDescriptor(self.base, self.shape, self.strides, [1] * (rank - 2) + list(self.box), layout)


def tiles_of(x: Tensor, rows: int, cols: int) -> Tiles:
    """Boxes of (b, s, h, d) or packed (total, h, d).

    Packed rows get two more dimensions whose strides add up to 2**64 elements at coordinate 2**30, which an address
    of 64 bits does not see: so a tile may end at any row, and the engine clips it there (as triton.tools.ragged_tma).
    """
    shape, strides, width = x.shape, x.stride(), x.shape[-1]
    # the stride of a single row or head is never used, but must be aligned
    row = strides[-3] if shape[-3] > 1 else 8 * width
    head = strides[-2] if shape[-2] > 1 else 8 * width
    if len(shape) == 3:
        steps = [(1 << 34) - row, row, head, row, 1]
        return Tiles(x, [_ENDLESS, _ENDLESS, shape[1], _RAGGED, width], steps, (rows, cols))
    batch = strides[0] if shape[0] > 1 else 8 * width
    return Tiles(x, [shape[0], shape[2], shape[1], width], [batch, head, row, 1], (rows, cols))


_compiled: dict[tuple, Any] = {}


class _Launch:
    """A launch past Triton's inspection of every argument, once a kernel for the key is compiled.

    `key` holds all that the compiled code depends on beside the constants: dtype, presence of optional arguments and
    integers beyond 32 bits. The kernels specialise on no value of an argument.
    """

    def __init__(self, kernel: Any, where: torch.device, grid: int, key: tuple, constants: dict[str, Any]):
        self._kernel, self._where, self._grid, self._constants = kernel, where, (grid, 1, 1), constants
        self._values = tuple(constants.values())
        self._key = (kernel, where, *key, *self._values)

    def __call__(self, *arguments: object) -> None:
        """Launch on the current stream of the tensors' device."""
        where = self._where
        if where.type == "cuda" and where.index != torch.cuda.current_device():
            with torch.cuda.device(where):
                return self(*arguments)
        known = _compiled.get(self._key)
        if known is not None:
            known[self._grid](*arguments, *self._values)
            return None
        checked = [x.checked() if isinstance(x, Tiles) else x for x in arguments]
        _compiled[self._key] = self._kernel[self._grid](*checked, **self._constants, num_warps=4)
        return None


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(where: torch.device) -> Tensor:
    """A zero that the kernel leaves zero: one for each stream, whose launches do not overlap; a graph owns its own."""
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=where)
    stream = torch.cuda.current_stream(where).cuda_stream if where.type == "cuda" else 0
    if (where, stream) not in _counters:
        _counters[where, stream] = torch.zeros(1, dtype=torch.int32, device=where)
    return _counters[where, stream]


def _chunk(heads: int, bytes_a_head: int, has_right: bool) -> int:
    """How many heads take turns: under a causal band as many as the cache holds, so that long tiles come first."""
    return max(1, min(heads, _L2_BYTES // bytes_a_head)) if has_right else 1


class ForwardPlan:
    """The forward kernel for calls that differ in their tensors' contents only.

    As many programs as processors each take tiles of queries until none is left.
    """

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        p, x = problem, inputs
        width = hopper.padded_head_dim(p.head_dim)
        tile = hopper.forward_tile(p)
        tiles = p.batch * p.heads * -(-p.seqlen_q // (_QUERIES * tile.consumers))
        self._is_even = p.right < 0 and not (p.is_varlen_q or p.is_varlen_k)
        self._device, self._width = p.device, width
        self._tiles = (
            tiles_of(x.q, _QUERIES, width),
            tiles_of(x.k, tile.block_n, width),
            tiles_of(x.v, tile.block_n, width),
        )
        chunk = _chunk(p.batch * p.heads, p.seqlen_k * width * 4, p.right >= 0)
        self._sizes = (p.batch, p.heads, p.heads // p.heads_k, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right)
        constants = {
            "HAS_LEFT": p.left >= 0,
            "HAS_RIGHT": p.right >= 0,
            "CONSUMERS": tile.consumers,
            "Q_STAGES": tile.query_stages,
            "STAGES": tile.stages,
            "CONSUMER_REGISTERS": tile.consumer_registers,
            "PRODUCER_REGISTERS": tile.producer_registers,
        }
        key = (p.dtype, width, tile.block_n, p.is_varlen_q, p.is_varlen_k, self._is_even)
        grid = min(tiles, device.probe(p.device).processors)
        self._launch = _Launch(forward_kernels.attention_forward_kernel, p.device, grid, key, constants)

    def __call__(self, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Fill out and lse."""
        x, (q, k, v) = inputs, self._tiles
        self._launch(
            q.of(x.q), k.of(x.k), v.of(x.v), tiles_of(out, _QUERIES, self._width), lse, x.cu_seqlens_q, x.cu_seqlens_k,
            None if self._is_even else _counter(self._device), *self._sizes, lse.shape[-1], x.softmax_scale * LOG2E,
        )  # fmt: skip


def forward(problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Launch the forward kernel."""
    ForwardPlan(problem, inputs)(inputs, out, lse)


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; a packed tensor has no batch stride."""
    s = x.stride()
    return (0, s[0], s[1]) if x.ndim == 3 else (s[0], s[1], s[2])


def _is_long(n: int) -> bool:
    """Whether Triton passes the number in 64 bits."""
    return n > 0x7FFFFFFF


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
) -> None:
    """Launch the row statistics, the main kernel, and the rounding of dq."""
    p, x = problem, inputs
    width = hopper.padded_head_dim(p.head_dim)
    tile = hopper.BACKWARD[width]
    rows = x.q.shape[0] + p.batch * _ALIGN if p.is_varlen_q else p.seqlen_q
    rows = -(-rows // _ALIGN) * _ALIGN
    lines = p.heads if p.is_varlen_q else p.batch * p.heads
    statistics = torch.empty((2, lines, rows), dtype=torch.float32, device=p.device)
    accumulator = torch.empty((lines, rows, p.head_dim), dtype=torch.float32, device=p.device)
    by_row = accumulator.view(-1, p.heads, rows, p.head_dim).transpose(1, 2)
    key = (p.dtype, width, p.is_varlen_q, p.is_varlen_k, dlse is None)
    ends_grid = -(-p.seqlen_q // _ALIGN) * (_ALIGN // _END_ROWS) * p.heads * p.batch
    sizes = {"HEAD_DIM": p.head_dim, "BLOCK_D": width, "ROWS": _END_ROWS}
    strides = (*_row_strides(out), *_row_strides(dout))
    dlse = None if dlse is None else dlse.contiguous()
    prepare_key = (*key, *map(_is_long, strides))
    _Launch(ends_kernels.attention_prepare_kernel, p.device, ends_grid, prepare_key, sizes)(
        out, dout, lse, dlse, delta, statistics, accumulator, x.cu_seqlens_q, *strides, lse.shape[-1], lines, rows,
        p.seqlen_q, p.heads,
    )  # fmt: skip
    group = p.heads // p.heads_k
    chunk = _chunk(p.batch * p.heads_k, group * p.seqlen_q * width * 8, p.right >= 0)
    constants = {
        "HAS_LEFT": p.left >= 0,
        "HAS_RIGHT": p.right >= 0,
        "HAS_EDGE": p.is_varlen_k or p.seqlen_k % _KEYS != 0,
        "CONSUMER_REGISTERS": tile.consumer_registers,
        "OTHER_REGISTERS": tile.other_registers,
    }
    grid = -(-p.seqlen_k // _KEYS) * p.batch * p.heads_k
    _Launch(backward_kernels.attention_backward_kernel, p.device, grid, key, constants)(
        tiles_of(x.q, _QUERIES, width), tiles_of(x.k, _KEYS, width), tiles_of(x.v, _KEYS, width),
        tiles_of(dout, _QUERIES, width),
        Tiles(statistics, [2, lines, rows], [lines * rows, rows, 1], (1, _QUERIES)),
        tiles_of(by_row, _QUERIES, width // 2),
        tiles_of(dk, _KEYS // 2, width), tiles_of(dv, _KEYS // 2, width), x.cu_seqlens_q, x.cu_seqlens_k,
        p.batch, p.heads, group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right, x.softmax_scale * LOG2E,
        x.softmax_scale,
    )  # fmt: skip
    dq_strides = _row_strides(dq)
    round_key = (*key, *map(_is_long, dq_strides))
    _Launch(ends_kernels.attention_round_dq_kernel, p.device, ends_grid, round_key, sizes)(
        accumulator, dq, x.cu_seqlens_q, *dq_strides, rows, p.seqlen_q, p.heads, x.softmax_scale
    )
