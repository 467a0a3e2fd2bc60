"""A block mask in plain PyTorch: every block of rows against the keys of its visible blocks only.

The mask is read on the host, so on another device than the CPU a call waits for that device. Heads and sequences that
share a mask are served together.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from flash_attn_plus.backends import torch_tiles
from flash_attn_plus.backends.torch_band import Band, Runs, row_blocks
from flash_attn_plus.backends.torch_tiles import Rule, Tiles


class Plane(NamedTuple):
    """Sequences, query heads and key heads that share one mask, given as rows of visible blocks."""

    sequences: slice
    heads: slice
    heads_k: slice
    mask: list[list[bool]]

    def rule(self, rule: Rule) -> Rule:
        """The rule of these sequences and heads alone."""
        slopes, numbers = rule.slopes, rule.batch_heads
        if slopes is not None:
            slopes = slopes[self.sequences if slopes.shape[0] > 1 else slice(None), self.heads]
        return rule._replace(
            slopes=slopes, batch_heads=numbers if numbers is None else numbers[self.sequences, self.heads]
        )

    def tiles(self, block_size: tuple[int, int], band: Band, size: int) -> Tiles:
        """Blocks of at most `size` rows, and the keys that the mask and the band leave them."""
        first = 0
        for blocks, alike in groupby(self.mask):
            start = first
            first += len(list(alike)) * block_size[0]
            for rows in row_blocks(max(start, band.first_row), min(first, band.len_q), size):
                yield rows, _visible_keys(blocks, block_size[1], band.keys(rows))


def _visible_keys(blocks: list[bool], width: int, keys: range) -> Runs:
    runs, position = [], 0
    for is_visible, alike in groupby(blocks):
        start = position
        position += len(list(alike)) * width
        run = range(max(start, keys.start), min(position, keys.stop))
        if is_visible and run:
            runs.append(run)
    return Runs(runs)


def _planes(block_mask: Tensor, heads: int, heads_k: int) -> Iterator[Plane]:
    """Every distinct mask of (1 or n, 1 or h, query blocks, key blocks)."""
    everything, group = slice(None), heads // heads_k
    is_one, is_shared = block_mask.shape[0] == 1, block_mask.shape[1] == 1
    for n, of_sequence in enumerate(block_mask.tolist()):
        for head, mask in enumerate(of_sequence):
            yield Plane(
                everything if is_one else slice(n, n + 1),
                everything if is_shared else slice(head, head + 1),
                everything if is_shared else slice(head // group, head // group + 1),
                mask,
            )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    band: Band,
    rule: Rule,
    block_mask: Tensor,
    block_size: tuple[int, int],
) -> None:
    """`torch_tiles.forward` under a mask, bool (1 or n, 1 or h, query blocks, key blocks)."""
    for plane in _planes(block_mask, q.shape[2], k.shape[2]):
        n, h, hk, _ = plane
        part = q[n, :, h]
        tiles = plane.tiles(block_size, band, torch_tiles.block_rows(part.shape[0], part.shape[2], band, q.device))
        torch_tiles.forward(part, k[n, :, hk], v[n, :, hk], out[n, :, h], lse[n, h], band, plane.rule(rule), tiles)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    band: Band,
    rule: Rule,
    block_mask: Tensor,
    block_size: tuple[int, int],
) -> None:
    """`torch_tiles.backward` under a mask; the sums of heads that share keys are taken in order."""
    sums = torch_tiles.zero_sums(k), torch_tiles.zero_sums(v)
    for plane in _planes(block_mask, q.shape[2], k.shape[2]):
        n, h, hk, _ = plane
        part = q[n, :, h]
        tiles = plane.tiles(block_size, band, torch_tiles.block_rows(part.shape[0], part.shape[2], band, q.device))
        torch_tiles.accumulate(
            part, k[n, :, hk], v[n, :, hk], dout[n, :, h], lse[n, h], delta[n, h], dq[n, :, h],
            sums[0][n, hk], sums[1][n, hk], band, plane.rule(rule), tiles,
        )  # fmt: skip
    for gradient, total in zip((dk, dv), sums, strict=True):
        gradient.copy_(total.transpose(1, 2))
