"""Launches of the decode kernel whose keys come through Hopper's copy engine."""

from typing import Any

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends import triton_counters, triton_launch, triton_replay
from flash_attn_plus.backends.gluon_hopper import can_copy, has_proven_gluon
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import decode as tuning
from flash_attn_plus.tuning.config import power_of_two
from flash_attn_plus.tuning.decode import DecodeConfig

_MOST_MAPS = 1024  # of the layers of several models; then they are made anew


def plan(problem: AttentionProblem, inputs: AttentionInputs) -> "CopyPlan | None":
    """The launch of calls that share shapes, strides and numbers, where the kernel serves them and is faster."""
    config = tuning.copied(problem, device.probe(problem.device))
    if config is None or inputs.softmax_scale <= 0.0 or not has_proven_gluon():
        return None
    if not (can_copy(inputs.k) and can_copy(inputs.v) and triton_launch.is_aligned(inputs.q)):
        return None
    from flash_attn_plus.backends.gluon_tiles import rows_between

    rows = rows_between(inputs.k)
    return CopyPlan(problem, inputs, config, rows) if rows and rows == rows_between(inputs.v) else None


class CopyPlan:
    """The launch of decode calls over a dense cache that share shapes, strides and numbers."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs, config: DecodeConfig, rows: int):
        from flash_attn_plus.backends.gluon_tiles import tiles_of

        p, c, facts = problem, config, device.probe(problem.device)
        self._problem, self._config = p, c
        self._splits = tuning.splits(p, facts, c)
        self._grid = (p.heads_k, p.batch, self._splits.launched)
        self._boxes = tuple(tiles_of(x, c.block_n, p.head_dim, is_ragged=True).of(None) for x in (inputs.k, inputs.v))
        self._rows = rows  # of the cache from one sequence to the next
        self._index = p.device.index
        self._counters = triton_counters.of(p.device)
        self._items = p.heads_k * p.batch
        parts = self._items * self._splits.launched
        self._room = parts * c.block_m * (p.head_dim + 1) if self._splits.launched > 1 else 0
        self._replay: triton_replay.Replay | None = None
        self._maps: dict[tuple[int, int], list] = {}  # what the copy engine reads, by addresses of the caches

    def __call__(self, x: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Launch on the current stream of the problem's device; q, k and v must be as aligned as at the first call."""
        replay = self._replay
        if replay is None or self._index != torch._C._cuda_getDevice() or not triton_replay.may_replay():
            with triton_launch.on_device(self._problem.device):
                self._launch(x, out, lse)
            return
        caches, used = (x.k.data_ptr(), x.v.data_ptr()), x.seqused_k
        maps = self._maps.get(caches)
        if maps is None:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            maps = self._maps[caches] = replay.expanded(None, *self._tiles(x))[1:]
        # Held until the launch: a captured one's room is nobody else's before it.
        scratch = self._counters.scratch(self._items, self._room) if self._room else triton_counters.NONE
        lengths = None if used is None else used.data_ptr()
        replay.launch([x.q.data_ptr(), *maps, out.data_ptr(), lse.data_ptr(), lengths, *scratch.places])

    def _tiles(self, x: AttentionInputs) -> tuple[Any, Any]:
        k, v = self._boxes
        return k.of(x.k), v.of(x.v)

    def _launch(self, x: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        from flash_attn_plus.backends.gluon_tiles import LOG2E
        from flash_attn_plus.kernels.gluon.decode import attention_decode_kernel

        p, c, s = self._problem, self._config, self._splits
        scratch = self._counters.scratch(self._items, self._room) if self._room else triton_counters.NONE
        group = p.heads // p.heads_k
        rows, parts = p.seqlen_q * group, min(16, power_of_two(s.launched))
        combined = min(power_of_two(rows), c.block_m, 32 * c.num_warps // parts)  # rows at a time, all in registers
        tail = (
            group, rows, p.seqlen_q, p.seqlen_k, self._rows, s.number, p.right, *x.q.stride()[:3], *out.stride()[:3],
            *lse.stride()[:2], x.softmax_scale * LOG2E, c.block_m, c.num_stages, p.right >= 0 and p.seqlen_q > 1,
            s.least_tiles, s.launched > 1, combined, parts, p.seqlen_q == 1,
        )  # fmt: skip
        rest = (out, lse, x.seqused_k, scratch.room, scratch.counters)
        tiles = (y.checked() for y in self._tiles(x))
        compiled = attention_decode_kernel[self._grid](x.q, *tiles, *rest, *tail, num_warps=c.num_warps)
        self._replay = triton_replay.record(compiled, self._grid, tail, (x.q, x.k, x.v, *rest), p.device)
