"""Arguments and grids of the Hopper kernels of the backward pass."""

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.gluon_tiles import QUERIES, Launch, Tiles, chunk_of, counter, score_numbers, tiles_of
from flash_attn_plus.kernels.gluon import backward as backward_kernels
from flash_attn_plus.kernels.gluon import backward_dq as dq_kernels
from flash_attn_plus.kernels.gluon import backward_ends as ends_kernels
from flash_attn_plus.kernels.gluon import backward_wide as wide_kernels
from flash_attn_plus.kernels.gluon.backward_work import SIDE
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper

_END_ROWS = 32  # rows a program of the kernels around the main one


class _Call:
    """What the launches of one backward pass share."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        p = problem
        self.p, self.x = p, inputs
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
        """Where programs draw their tiles, or None where all tiles are alike."""
        return None if self.is_even else counter(self.p.device)

    def empty(self, *shape: int) -> Tensor:
        """Scratch memory."""
        return torch.empty(shape, dtype=torch.float32, device=self.p.device)


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; a packed tensor has no batch stride."""
    s = x.stride()
    return (0, s[0], s[1]) if x.ndim == 3 else (s[0], s[1], s[2])


def _is_long(n: int) -> bool:
    """Whether Triton passes the number in 64 bits."""
    return n > 0x7FFFFFFF


def _prepare(
    c: _Call,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    delta: Tensor,
    statistics: Tensor,
    accumulator: Tensor | None,
) -> None:
    strides = (*_row_strides(out), *_row_strides(dout))
    dlse = None if dlse is None else dlse.contiguous()
    key = (*c.key, dlse is None, *map(_is_long, strides))
    Launch(ends_kernels.attention_prepare_kernel, c.p.device, c.ends_grid, key, c.ends_sizes)(
        out, dout, lse, dlse, delta, statistics, accumulator, c.x.cu_seqlens_q, *strides, lse.shape[-1], c.lines,
        c.rows, c.p.seqlen_q, c.p.heads,
    )  # fmt: skip


def _walk_queries(
    c: _Call, dout: Tensor, statistics: Tensor, accumulator: Tensor | None, dk: Tensor, dv: Tensor
) -> None:
    """Fill dk and dv, and add to the accumulator."""
    p, x, tile = c.p, c.x, c.tile
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
    dq: tuple[Tiles | None, ...] = () if tile.is_wide else (None,)
    if accumulator is not None:
        by_row = accumulator.view(-1, p.heads, c.rows, p.head_dim).transpose(1, 2)
        dq = (tiles_of(by_row, SIDE.value, SIDE.value),)
    kernel = backward_kernels.attention_backward_kernel
    if tile.is_wide:
        kernel = wide_kernels.attention_backward_wide_kernel
    Launch(kernel, p.device, grid, c.key, constants)(
        tiles_of(x.q, tile.block_m, c.width), tiles_of(x.k, tile.block_n, c.width),
        tiles_of(x.v, tile.block_n, c.width), tiles_of(dout, tile.block_m, c.width),
        Tiles(statistics, [2, c.lines, c.rows], [c.lines * c.rows, c.rows, 1], (1, tile.block_m)), *dq,
        tiles_of(dk, QUERIES, c.width), tiles_of(dv, QUERIES, c.width), x.cu_seqlens_q, x.cu_seqlens_k, c.counter(),
        x.alibi_slopes, p.batch, p.heads, c.group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right,
        *score_numbers(p, x), x.softmax_scale,
    )  # fmt: skip


def _walk_keys(c: _Call, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    """Fill dq by a kernel of its own."""
    p, x, tile = c.p, c.x, hopper.DQ[c.width]
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
    Launch(dq_kernels.attention_backward_dq_kernel, p.device, grid, c.key, constants)(
        tiles_of(x.q, QUERIES, c.width), tiles_of(x.k, tile.block_n, c.width), tiles_of(x.v, tile.block_n, c.width),
        tiles_of(dout, QUERIES, c.width), tiles_of(dq, QUERIES, c.width), lse, delta, x.cu_seqlens_q, x.cu_seqlens_k,
        c.counter(), x.alibi_slopes, p.batch, p.heads, c.group, chunk, p.seqlen_q, p.seqlen_k, p.left, p.right,
        lse.shape[-1], *score_numbers(p, x), x.softmax_scale,
    )  # fmt: skip


def _round(c: _Call, accumulator: Tensor, dq: Tensor) -> None:
    strides = _row_strides(dq)
    key = (*c.key, *map(_is_long, strides))
    Launch(ends_kernels.attention_round_dq_kernel, c.p.device, c.ends_grid, key, c.ends_sizes)(
        accumulator, dq, c.x.cu_seqlens_q, *strides, c.rows, c.p.seqlen_q, c.p.heads, c.x.softmax_scale
    )


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
    """Launch the row statistics, then the kernel that walks over queries and what completes dq."""
    c = _Call(problem, inputs)
    statistics = c.empty(2, c.lines, c.rows)
    accumulator = None if c.is_split else c.empty(c.lines, c.rows, problem.head_dim)
    _prepare(c, out, dout, lse, dlse, delta, statistics, accumulator)
    _walk_queries(c, dout, statistics, accumulator, dk, dv)
    if accumulator is None:
        _walk_keys(c, dout, lse, delta, dq)
    else:
        _round(c, accumulator, dq)
