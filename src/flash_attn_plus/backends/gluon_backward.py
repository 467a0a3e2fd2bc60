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
from flash_attn_plus.kernels.gluon.backward_work import HELD_COLS, HELD_ROWS
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper

_END_ROWS = 32  # rows a program of the kernels around the main one


class _Sizes:
    """What the launches of one backward pass share; no tensor of the call that they are made for."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        p = problem
        self.p = p
        self.width = hopper.padded_head_dim(p.head_dim)
        self.tile = hopper.BACKWARD[self.width]
        self.is_split = hopper.is_split(p)
        self.group = p.heads // p.heads_k
        self.is_even = p.right < 0 and not (p.is_varlen_q or p.is_varlen_k)
        self.key = (p.dtype, self.width, p.is_varlen_q, p.is_varlen_k, self.is_even, self.is_split, p.has_alibi)
        self.processors = device.probe(p.device).processors
        # rows as the statistics and the accumulator count them: sequences begin at multiples of a tile
        align = self.tile.block_m
        rows = inputs.q.shape[0] + p.batch * align if p.is_varlen_q else p.seqlen_q
        self.rows = -(-rows // align) * align
        self.lines = p.heads if p.is_varlen_q else p.batch * p.heads
        self.ends_grid = -(-p.seqlen_q // align) * (align // _END_ROWS) * p.heads * p.batch
        self.ends_sizes = {"HEAD_DIM": p.head_dim, "BLOCK_D": self.width, "ROWS": _END_ROWS, "ALIGN": align}

    def counter(self) -> Tensor | None:
        """Where programs draw their tiles, or None where all tiles are alike; another one in a graph."""
        return None if self.is_even else counter(self.p.device)

    def scratch(self, columns: int) -> Tensor:
        """What allocates so many float32 numbers a row when given to torch.empty_like; it holds one."""
        number = self.lines * self.rows * columns
        return torch.empty((), dtype=torch.float32, device=self.p.device).expand(number)


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


def _prepare(c: _Sizes, out: Tensor, dout: Tensor, lse: Tensor, has_dlse: bool) -> Callable[..., None]:
    """What fills delta and the statistics, and clears the accumulator."""
    strides = (*_row_strides(out), *_row_strides(dout))
    key = (*c.key, not has_dlse, *map(_is_long, strides))
    launch = Launch(ends_kernels.attention_prepare_kernel, c.p.device, c.ends_grid, key, c.ends_sizes)
    numbers = (*strides, lse.shape[-1], c.lines, c.rows, c.p.seqlen_q, c.p.heads)

    def run(x, out, dout, lse, dlse, delta, statistics, accumulator) -> None:
        dlse = None if dlse is None else dlse.contiguous()
        launch(out, dout, lse, dlse, delta, statistics, accumulator, x.cu_seqlens_q, *numbers)

    return run


def _walk_queries(c: _Sizes, x: AttentionInputs, dout: Tensor, dk: Tensor, dv: Tensor) -> Callable[..., None]:
    """What fills dk and dv, and adds to the accumulator."""
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
    q, k, v, g, dk_boxes, dv_boxes = _boxes(
        (x.q, tile.block_m, c.width), (x.k, tile.block_n, c.width), (x.v, tile.block_n, c.width),
        (dout, tile.block_m, c.width), (dk, QUERIES, c.width), (dv, QUERIES, c.width),
    )  # fmt: skip
    rows = Tiles(None, [2, c.lines, c.rows], [c.lines * c.rows, c.rows, 1], (1, tile.block_m))
    sums = torch.empty((c.lines * c.rows * c.width,), device="meta")
    held = sums.view(-1, p.heads, c.rows * c.width // HELD_COLS.value, HELD_COLS.value).transpose(1, 2)
    (added,) = _boxes((held, HELD_ROWS.value, HELD_COLS.value))
    numbers = (
        p.batch, p.heads, c.group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right, *score_numbers(p, x),
        x.softmax_scale,
    )  # fmt: skip

    def run(x, dout, statistics, accumulator, dk, dv) -> None:
        dq = () if tile.is_wide else (None if accumulator is None else added.of(accumulator),)
        launch(
            q.of(x.q), k.of(x.k), v.of(x.v), g.of(dout), rows.of(statistics), *dq, dk_boxes.of(dk), dv_boxes.of(dv),
            x.cu_seqlens_q, x.cu_seqlens_k, c.counter(), x.alibi_slopes, *numbers,
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


def _round(c: _Sizes, softmax_scale: float, dq: Tensor) -> Callable[..., None]:
    """What makes dq of the accumulator."""
    strides = _row_strides(dq)
    key = (*c.key, *map(_is_long, strides))
    launch = Launch(ends_kernels.attention_round_dq_kernel, c.p.device, c.ends_grid, key, c.ends_sizes)
    numbers = (*strides, c.rows, c.p.seqlen_q, c.p.heads, softmax_scale)

    def run(x, accumulator, dq) -> None:
        launch(accumulator, dq, x.cu_seqlens_q, *numbers)

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
        self._statistics = c.scratch(2)
        self._accumulator = None if c.is_split else c.scratch(c.width)
        self._prepare = _prepare(c, out, dout, lse, dlse is not None)
        self._walk_queries = _walk_queries(c, inputs, dout, dk, dv)
        if c.is_split:
            self._walk_keys = _walk_keys(c, inputs, dout, lse, dq)
        else:
            self._round = _round(c, inputs.softmax_scale, dq)

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
        accumulator = None if self._accumulator is None else torch.empty_like(self._accumulator)
        self._prepare(x, out, dout, lse, dlse, delta, statistics, accumulator)
        self._walk_queries(x, dout, statistics, accumulator, dk, dv)
        if accumulator is None:
            self._walk_keys(x, dout, lse, delta, dq)
        else:
            self._round(x, accumulator, dq)
