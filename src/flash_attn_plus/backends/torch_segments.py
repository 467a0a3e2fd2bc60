"""A call cut into segments: runs of sequences of equal lengths, each seen as one dense batch without a copy."""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from flash_attn_plus.problem import AttentionInputs, AttentionProblem


class Segment(NamedTuple):
    """`count` consecutive sequences from number `first`, all with len_q queries and len_k keys.

    `row` is where the queries start in packed q (None: q is dense); `key` is where the keys start in packed k, or,
    when `is_packed_k` is false, within every row of dense k.
    """

    first: int
    size: int
    len_q: int
    len_k: int
    row: int | None
    key: int
    is_packed_k: bool

    @property
    def last(self) -> int:
        return self.first + self.size

    def queries(self, x: Tensor) -> Tensor:
        """View (size, len_q, h, *) of q or of a tensor laid out like it."""
        if self.row is None:
            return x[self.first : self.last]
        return x[self.row : self.row + self.size * self.len_q].unflatten(0, (self.size, self.len_q))

    def statistics(self, x: Tensor) -> Tensor:
        """View (count, h, len_q) of lse or of a tensor laid out like it."""
        if self.row is None:
            return x[self.first : self.last]
        rows = x[:, self.row : self.row + self.size * self.len_q]
        return rows.unflatten(1, (self.size, self.len_q)).transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """View (size, len_k, hk, *) of k or v or their gradients."""
        if not self.is_packed_k:
            return x[self.first : self.last, self.key : self.key + self.len_k]
        return x[self.key : self.key + self.size * self.len_k].unflatten(0, (self.size, self.len_k))

    def gathered_keys(self, x: Tensor, block_table: Tensor | None) -> Tensor:
        """`keys`, or with a block table a copy of the segment's pages, (size, len_k, hk, *)."""
        if block_table is None:
            return self.keys(x)
        pages = block_table[self.first : self.last, : math.ceil(self.len_k / x.shape[1])].long()
        return x[pages].flatten(1, 2)[:, : self.len_k]

    def blocks(self, block_mask: Tensor) -> Tensor:
        """(1 or size, 1 or h, query blocks, key blocks) of the segment."""
        return block_mask if block_mask.shape[0] == 1 else block_mask[self.first : self.last]

    def slopes(self, alibi_slopes: Tensor | None) -> Tensor | None:
        """(1 or count, h) slopes of the segment."""
        if alibi_slopes is None or alibi_slopes.ndim == 1:
            return alibi_slopes if alibi_slopes is None else alibi_slopes[None]
        return alibi_slopes[self.first : self.last]


def _lengths(x: AttentionInputs, problem: AttentionProblem) -> tuple[list[int], list[int], list[int]]:
    """Per sequence: number of queries, number of keys, and first key (in packed k, or in its row of dense k)."""
    batch = problem.batch
    len_q = x.cu_seqlens_q.diff().tolist() if x.cu_seqlens_q is not None else [problem.seqlen_q] * batch
    starts = [0] * batch
    if x.cu_seqlens_k is not None:
        cu = x.cu_seqlens_k.tolist()
        len_k = [stop - start for start, stop in pairwise(cu)]
        if x.block_table is None:
            starts = cu[:-1]
    else:
        len_k = [problem.seqlen_k] * batch
    if x.seqused_k is not None:
        len_k = x.seqused_k.tolist()
    if x.leftpad_k is not None:
        skipped = x.leftpad_k.tolist()
        starts = [start + skip for start, skip in zip(starts, skipped, strict=True)]
        len_k = [max(0, length - skip) for length, skip in zip(len_k, skipped, strict=True)]
    return len_q, len_k, starts


def segments(problem: AttentionProblem, x: AttentionInputs) -> Iterator[Segment]:
    """Every sequence of the call in order, neighbours of equal lengths joined.

    Reads cu_seqlens, seqused_k and leftpad_k on the host, which waits for the device when they live on one.
    """
    is_packed_q, is_packed_k = x.cu_seqlens_q is not None, x.cu_seqlens_k is not None and x.block_table is None
    if not (
        is_packed_q or is_packed_k or x.cu_seqlens_k is not None or x.seqused_k is not None or x.leftpad_k is not None
    ):
        yield Segment(0, problem.batch, problem.seqlen_q, problem.seqlen_k, None, 0, False)
        return
    len_q, len_k, starts = _lengths(x, problem)
    rows = list(accumulate(len_q, initial=0))
    first = 0
    for n in range(1, problem.batch + 1):
        joins = n < problem.batch and len_q[n] == len_q[first] and len_k[n] == len_k[first]
        if joins and starts[n] == starts[first] + (n - first) * len_k[first] * is_packed_k:
            continue
        row = rows[first] if is_packed_q else None
        yield Segment(first, n - first, len_q[first], len_k[first], row, starts[first], is_packed_k)
        first = n
