"""The `torch` backend: every feature on any device, in PyTorch's own operations."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flash_attn_plus.backends import torch_blocks, torch_cpu_flash, torch_tiles
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.torch_band import Band
from flash_attn_plus.backends.torch_segments import Segment, segments
from flash_attn_plus.checks import check_lengths
from flash_attn_plus.problem import FLOAT_DTYPES, MAX_HEAD_DIM, AttentionInputs, AttentionProblem


def _is_fused(problem: AttentionProblem, inputs: AttentionInputs) -> bool:
    """Whether PyTorch's fused CPU operator can serve: it knows no softcap, dropout, block mask or scale of 0."""
    is_plain = not (problem.has_softcap or problem.has_dropout or problem.has_block_mask or inputs.softmax_scale == 0.0)
    return is_plain and problem.device.type == "cpu"


def _is_whole(problem: AttentionProblem, inputs: AttentionInputs) -> bool:
    """Whether a call of the fused operator is all there is to do, before or after which nothing is copied."""
    if problem.is_varlen_q or problem.is_varlen_k or problem.page_size or problem.has_alibi or problem.left >= 0:
        return False
    if problem.has_seqused_k or problem.has_leftpad_k or problem.dtype == torch.float16 or inputs.softmax_scale <= 0.0:
        return False
    is_triangle = problem.right == 0 and problem.seqlen_q == problem.seqlen_k
    is_one_part = problem.right < 0 or is_triangle
    return _is_fused(problem, inputs) and is_one_part and problem.head_dim == problem.head_dim_v


def _rule(problem: AttentionProblem, x: AttentionInputs, segment: Segment) -> torch_tiles.Rule:
    batch_heads = None
    if problem.has_dropout:
        first, last = segment.first * problem.heads, segment.last * problem.heads
        batch_heads = torch.arange(first, last, device=x.q.device).view(segment.size, problem.heads)
    slopes = segment.slopes(x.alibi_slopes)
    return torch_tiles.Rule(x.softmax_scale, x.softcap, slopes, x.dropout_p, x.rng_state, batch_heads)


def _fill_delta(dout: Tensor, out: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """delta (n, h, sq) = rowsum(dout * out) - dlse of one segment."""
    torch.sum(dout.to(delta.dtype) * out, -1, out=delta.transpose(1, 2))
    if dlse is not None:
        delta -= dlse


def _fill_uncovered(x: Tensor, dim: int, covered: int, value: float) -> None:
    x.narrow(dim, covered, x.shape[dim] - covered).fill_(value)


class TorchEager(Backend):
    """Plain PyTorch, in memory linear in the sequence length.

    On the CPU PyTorch's fused attention does the work wherever it can; softcap, dropout, a gradient of the LSE and
    other devices run tile by tile. Lengths of packed or cached sequences are read on the host, so with them a call on
    another device waits for that device and cannot be captured in a graph.
    All results are bitwise repeatable. Rows that belong to no sequence get out 0, LSE +inf and gradient 0.
    """

    name = "torch"
    capability = Capability(dtypes=frozenset(FLOAT_DTYPES), max_head_dim=MAX_HEAD_DIM, takes_block_mask=True)

    @torch.no_grad()
    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Write every row of `out` and `lse`."""
        check_lengths(inputs, problem.seqlen_q, problem.seqlen_k)
        rows = 0
        for part in segments(problem, inputs):
            rows += part.size * part.len_q
            band = Band.of(part.len_q, part.len_k, problem.left, problem.right)
            q = part.queries(inputs.q)
            k, v = (part.gathered_keys(x, inputs.block_table) for x in (inputs.k, inputs.v))
            results = part.queries(out), part.statistics(lse)
            if _is_fused(problem, inputs):
                torch_cpu_flash.forward(q, k, v, *results, band, inputs.softmax_scale, part.slopes(inputs.alibi_slopes))
            elif problem.has_block_mask:
                blocks = part.blocks(inputs.block_mask), inputs.block_size
                torch_blocks.forward(q, k, v, *results, band, _rule(problem, inputs, part), *blocks)
            else:
                torch_tiles.forward(q, k, v, *results, band, _rule(problem, inputs, part))
        if problem.is_varlen_q:
            _fill_uncovered(out, 0, rows, 0.0)
            _fill_uncovered(lse, 1, rows, float("inf"))

    def plan_outputs(
        self, problem: AttentionProblem, inputs: AttentionInputs
    ) -> Callable[[AttentionInputs], tuple[Tensor, Tensor]] | None:
        """Those of the fused operator, where one call of it is the whole forward pass."""
        if not _is_whole(problem, inputs):
            return None
        return partial(torch_cpu_flash.whole_forward, is_causal=problem.right >= 0)

    def gradients(
        self, problem: AttentionProblem, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Those of the fused operator, where one call of it is the whole backward pass."""
        if not (_is_whole(problem, inputs) and torch_cpu_flash.keeps_precision(problem)):
            return None
        return torch_cpu_flash.whole_backward(inputs, dout, out, lse, is_causal=problem.right >= 0)

    @torch.no_grad()
    def backward(
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
        delta: Tensor,
    ) -> None:
        """Write every row of dq, dk, dv and delta."""
        check_lengths(inputs, problem.seqlen_q, problem.seqlen_k)
        rows = keys = 0
        for part in segments(problem, inputs):
            rows += part.size * part.len_q
            keys += part.size * part.len_k
            band = Band.of(part.len_q, part.len_k, problem.left, problem.right)
            q, dout_part, out_part, dq_part = (part.queries(x) for x in (inputs.q, dout, out, dq))
            k, v, dk_part, dv_part = (part.keys(x) for x in (inputs.k, inputs.v, dk, dv))
            lse_part, delta_part = part.statistics(lse), part.statistics(delta)
            _fill_delta(dout_part, out_part, None if dlse is None else part.statistics(dlse), delta_part)
            if _is_fused(problem, inputs) and dlse is None:
                torch_cpu_flash.backward(
                    q, k, v, dout_part, out_part, lse_part, dq_part, dk_part, dv_part,
                    band, inputs.softmax_scale, part.slopes(inputs.alibi_slopes),
                )  # fmt: skip
            else:
                given = q, k, v, dout_part, lse_part, delta_part
                rule, results = _rule(problem, inputs, part), (dq_part, dk_part, dv_part)
                if problem.has_block_mask:
                    blocks = part.blocks(inputs.block_mask), inputs.block_size
                    torch_blocks.backward(*given, *results, band, rule, *blocks)
                else:
                    torch_tiles.backward(*given, *results, band, rule)
        if problem.is_varlen_q:
            _fill_uncovered(dq, 0, rows, 0.0)
            _fill_uncovered(delta, 1, rows, 0.0)
        if problem.is_varlen_k:
            _fill_uncovered(dk, 0, keys, 0.0)
            _fill_uncovered(dv, 0, keys, 0.0)
