"""Arguments and grids of the Hopper kernels of the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.gluon_tiles import QUERIES, Launch, Tiles, chunk_of, counter, score_numbers, tiles_of
from flash_attn_plus.kernels.gluon import backward as backward_kernels
from flash_attn_plus.kernels.gluon import backward_dq as dq_kernels
from flash_attn_plus.kernels.gluon import backward_ends as ends_kernels
from flash_attn_plus.kernels.gluon import backward_wide as wide_kernels
from flash_attn_plus.kernels.gluon.backward_ends import COLS
from flash_attn_plus.kernels.gluon.backward_sums import HELD_COLS, HELD_ROWS, SIDE
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper

_ROWS = 64  # a program of the kernel before the main one: 8 to 10 % faster than with 32
_LEAST_SCALE = 1e-20  # of softmax, for terms of LSE / scale


class _Sizes:
    """What the launches of one backward pass share; no tensor of the call that they are made for."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        p = problem
        self.p = p
        self.width = hopper.padded_head_dim(p.head_dim)
        self.tile = hopper.BACKWARD[self.width]
        self.is_split = hopper.is_split(p)
        self.group = p.heads // p.heads_k
        # sums of dq wait for other programs, which must not have been dealt a tile that they do not run yet
        self.is_even = self.is_split and p.right < 0 and not (p.is_varlen_q or p.is_varlen_k)
        # of statistics, which products subtract; else statistics are numbers
        self.has_terms = not (p.has_softcap or self.tile.is_wide) and inputs.softmax_scale >= _LEAST_SCALE
        self.key = (
            p.dtype, self.width, p.is_varlen_q, p.is_varlen_k, self.is_even, self.is_split, p.has_alibi, self.has_terms
        )  # fmt: skip
        self.processors = device.probe(p.device).processors
        # rows as the statistics and the sums of dq count them: sequences begin at multiples of a tile
        align = self.tile.block_m
        rows = inputs.q.shape[0] + p.batch * align if p.is_varlen_q else p.seqlen_q
        self.rows = -(-rows // align) * align
        self.lines = p.heads if p.is_varlen_q else p.batch * p.heads

    def counter(self) -> Tensor | None:
        """Where programs draw their tiles, or None where all tiles are alike; another one in a graph."""
        return None if self.is_even else counter(self.p.device)

    def scratch(self, numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What allocates so many numbers for each line when given to torch.empty_like; it holds one."""
        return torch.empty((), dtype=dtype, device=self.p.device).expand(self.lines * numbers)


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; a packed tensor has no batch stride."""
    s = x.stride()
    return (0, s[0], s[1]) if x.ndim == 3 else (s[0], s[1], s[2])


def _is_long(n: int) -> bool:
    """Whether Triton passes the number in 64 bits."""
    return n > 0x7FFFFFFF


def _boxes(*boxes: tuple[Tensor, int, int]) -> list[Tiles]:
    """Boxes of (tensor, rows, columns) that hold no memory."""
    return [tiles_of(*box).of(None) for box in boxes]


def _prepare(
    c: _Sizes, x: AttentionInputs, out: Tensor, dout: Tensor, lse: Tensor, has_dlse: bool
) -> Callable[..., None]:
    """What fills delta and the statistics, and clears the counters of dq's parts."""
    p, align = c.p, c.tile.block_m
    strides = (*_row_strides(out), *_row_strides(dout))
    key = (*c.key, not has_dlse, *map(_is_long, strides))
    grid = -(-p.seqlen_q // align) * (align // _ROWS) * p.heads * p.batch
    sizes = {"HEAD_DIM": p.head_dim, "BLOCK_D": c.width, "ROWS": _ROWS, "ALIGN": align}
    launch = Launch(ends_kernels.attention_prepare_kernel, p.device, grid, key, sizes)
    inverse_scale = 1 / x.softmax_scale if c.has_terms else 0.0
    numbers = (*strides, lse.shape[-1], c.lines, c.rows, p.seqlen_q, p.heads, inverse_scale)

    def run(x, out, dout, lse, dlse, delta, statistics, parts) -> None:
        dlse = None if dlse is None else dlse.contiguous()
        launch(out, dout, lse, dlse, delta, statistics, parts, x.cu_seqlens_q, *numbers)

    return run


def _walk_queries(
    c: _Sizes, x: AttentionInputs, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> Callable[..., None]:
    """What fills dk and dv, and dq unless that has a kernel of its own."""
    p, tile = c.p, c.tile
    # Counted with all four heads of a group, fewer of its long tiles took turns: the last ones cost 5 to 11 %.
    chunk = chunk_of(p.batch * p.heads_k, p.seqlen_q * c.width * 8, p.right >= 0, hopper.CACHE)
    constants = {
        "HAS_LEFT": p.left >= 0,
        "HAS_RIGHT": p.right >= 0,
        "HAS_EDGE": p.is_varlen_k or p.seqlen_k % tile.block_n != 0,
        "HAS_SOFTCAP": p.has_softcap,
        "CONSUMER_REGISTERS": tile.consumer_registers,
        "OTHER_REGISTERS": tile.other_registers,
    }
    grid = min(-(-p.seqlen_k // tile.block_n) * p.batch * p.heads_k, c.processors)
    kernel = backward_kernels.attention_backward_kernel
    if tile.is_wide:
        kernel = wide_kernels.attention_backward_wide_kernel
    launch = Launch(kernel, p.device, grid, c.key, constants)
    q, k, v, g, dq_boxes, dk_boxes, dv_boxes = _boxes(
        (x.q, tile.block_m, c.width), (x.k, tile.block_n, c.width), (x.v, tile.block_n, c.width),
        (dout, tile.block_m, c.width), (dq, SIDE.value, SIDE.value), (dk, QUERIES, c.width), (dv, QUERIES, c.width),
    )  # fmt: skip
    rows = Tiles(None, [2, c.lines, c.rows], [c.lines * c.rows, c.rows, 1], (1, tile.block_m))
    if c.has_terms:
        cols = COLS.value
        rows = Tiles(None, [c.lines, c.rows, cols], [c.rows * cols, cols, 1], (tile.block_m, cols))
    sums = torch.empty((c.lines * c.rows * c.width,), device="meta")
    held = sums.view(-1, p.heads, c.rows * c.width // HELD_COLS.value, HELD_COLS.value).transpose(1, 2)
    (added,) = _boxes((held, HELD_ROWS.value, HELD_COLS.value))
    numbers = (
        p.batch, p.heads, c.group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right, *score_numbers(p, x),
        x.softmax_scale,
    )  # fmt: skip

    def run(x, dout, statistics, sums, parts, dq, dk, dv) -> None:
        dq_boxes_of: tuple = () if tile.is_wide else (None, None)
        if sums is not None:
            dq_boxes_of = (added.of(sums), dq_boxes.of(dq))
        launch(
            q.of(x.q), k.of(x.k), v.of(x.v), g.of(dout), rows.of(statistics), *dq_boxes_of, dk_boxes.of(dk),
            dv_boxes.of(dv), x.cu_seqlens_q, x.cu_seqlens_k, c.counter(), x.alibi_slopes,
            *(() if tile.is_wide else (parts,)), *numbers,
        )  # fmt: skip

    return run


def _walk_keys(c: _Sizes, x: AttentionInputs, dout: Tensor, lse: Tensor, dq: Tensor) -> Callable[..., None]:
    """What fills dq by a kernel of its own."""
    p, tile = c.p, hopper.DQ[c.width]
    chunk = chunk_of(p.batch * p.heads, p.seqlen_k * c.width * 4, p.right >= 0, hopper.CACHE)
    constants = {
        "HAS_LEFT": p.left >= 0,
        "HAS_RIGHT": p.right >= 0,
        "HAS_SOFTCAP": p.has_softcap,
        "Q_TILES": tile.query_tiles,
        "K_STAGES": tile.key_stages,
        "V_STAGES": tile.value_stages,
        "CONSUMER_REGISTERS": tile.consumer_registers,
        "PRODUCER_REGISTERS": tile.producer_registers,
    }
    grid = min(-(-p.seqlen_q // (2 * QUERIES)) * p.batch * p.heads, c.processors)
    launch = Launch(dq_kernels.attention_backward_dq_kernel, p.device, grid, c.key, constants)
    q, k, v, g, boxes = _boxes(
        (x.q, QUERIES, c.width), (x.k, tile.block_n, c.width), (x.v, tile.block_n, c.width), (dout, QUERIES, c.width),
        (dq, QUERIES, c.width),
    )  # fmt: skip
    numbers = (
        p.batch, p.heads, c.group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right, lse.shape[-1],
        *score_numbers(p, x), x.softmax_scale,
    )  # fmt: skip

    def run(x, dout, lse, delta, dq) -> None:
        launch(
            q.of(x.q), k.of(x.k), v.of(x.v), g.of(dout), boxes.of(dq), lse, delta, x.cu_seqlens_q, x.cu_seqlens_k,
            c.counter(), x.alibi_slopes, *numbers,
        )  # fmt: skip

    return run


class BackwardPlan:
    """The row statistics, then the kernel that walks over queries and what completes dq, for calls laid out alike."""

    def __init__(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ):
        c = _Sizes(problem, inputs)
        columns, dtype = (COLS.value, torch.bfloat16) if c.has_terms else (2, torch.float32)
        self._statistics = c.scratch(columns * c.rows, dtype)
        self._sums = self._parts = None
        self._prepare = _prepare(c, inputs, out, dout, lse, dlse is not None)
        self._walk_queries = _walk_queries(c, inputs, dout, dq, dk, dv)
        if c.is_split:
            self._walk_keys = _walk_keys(c, inputs, dout, lse, dq)
        else:
            self._sums = c.scratch(c.rows * c.width)
            self._parts = c.scratch(c.rows // c.tile.block_m, torch.int32)

    def __call__(
        self,
        x: AttentionInputs,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        delta: Tensor,
    ) -> None:
        """Fill dq, dk, dv and delta."""
        statistics = torch.empty_like(self._statistics)
        sums = parts = None
        if self._sums is not None:
            sums, parts = torch.empty_like(self._sums), torch.empty_like(self._parts)
        self._prepare(x, out, dout, lse, dlse, delta, statistics, parts)
        self._walk_queries(x, dout, statistics, sums, parts, dq, dk, dv)
        if sums is None:
            self._walk_keys(x, dout, lse, delta, dq)
