"""Launches of the split-key kernels: few queries against many keys."""

import torch
import triton
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends import gluon_decode, triton_counters, triton_replay
from flash_attn_plus.backends import triton_launch as launch
from flash_attn_plus.backends.triton_replay import Replay
from flash_attn_plus.kernels.features import Features
from flash_attn_plus.kernels.triton import decode as kernels
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import decode as tuning
from flash_attn_plus.tuning.config import padded, power_of_two
from flash_attn_plus.tuning.decode import DecodeConfig

New = tuple[Tensor, Tensor]  # keys and values (b, new, hk, d), as yet outside the cache

_MOST_NEW = 16  # one tile of rows


class SplitPlan:
    """The launch of decode calls that share shapes, strides and numbers.

    Calls may bring up to `most_new` new keys of each sequence, which the launch then writes into the cache.
    """

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        self._problem = problem
        self._features = launch.features(problem, inputs)
        self._is_paired = _can_pair(problem, inputs.v)
        self._is_aligned = launch.is_aligned(inputs.k) and launch.is_aligned(inputs.v)
        self._arch = _arch(device.probe(problem.device))
        self.most_new = _MOST_NEW if _can_append(problem, self._features) else 0
        self._is_settled = False  # on a configuration that the device takes
        self._index = problem.device.index
        self._counters = triton_counters.of(problem.device)
        self._replay: Replay | None = None
        self._copies = gluon_decode.plan(problem, inputs)

    def _use(self, c: DecodeConfig) -> None:
        p = self._problem
        self._config = c
        self._splits = tuning.splits(p, device.probe(p.device), c)
        rows = p.seqlen_q * (p.heads // p.heads_k)
        self._tiles_m = -(-rows // c.block_m)
        self._rows = power_of_two(rows) if self._tiles_m == 1 else c.block_m
        self._tiles = self._tiles_m * p.heads_k * p.batch
        self._grid = (self._tiles, self._splits.launched)
        self._room = 0  # for parts
        if self._splits.launched > 1 or c.shares > 1:
            self._room = self._tiles * self._splits.launched * c.shares * self._rows * (p.head_dim_v + 1)
        self._replay = None

    def __call__(self, x: AttentionInputs, out: Tensor, lse: Tensor, new: New | None = None) -> None:
        """Launch on the current stream of the problem's device; q, k and v must be as aligned as at the first call.

        Either all calls bring as many new keys, behind those that `x.seqused_k` counts, or none does.
        """
        if new is None and self._copies is not None:
            self._copies(x, out, lse)
            return
        replay = self._replay
        if replay is not None and self._index == torch._C._cuda_getDevice() and triton_replay.may_replay():
            if self._problem.is_varlen_q:
                out.zero_()  # rows behind the last sequence belong to no program
            places = triton_replay.addresses(self._tensors(x, out, lse, new))
            # Held until the launch: a captured one's room is nobody else's before it.
            scratch = self._counters.scratch(self._tiles, self._room) if self._room else triton_counters.NONE
            replay.launch([*places, *scratch.places])
            return
        with launch.on_device(self._problem.device):
            if self._problem.is_varlen_q:
                out.zero_()
            if self._is_settled:
                self._launch(x, out, lse, new)
                return
            for c in tuning.configs(self._problem, device.probe(self._problem.device), self._is_aligned):
                self._use(c)
                try:
                    self._launch(x, out, lse, new)
                    self._is_settled = True
                    return
                except triton.runtime.errors.OutOfResources as error:
                    refusal = error
            raise refusal

    def _tensors(self, x: AttentionInputs, out: Tensor, lse: Tensor, new: New | None) -> tuple:
        return (
            x.q, x.k, x.v, out, lse, x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_k, x.leftpad_k,
            x.block_table, x.alibi_slopes, x.k_descale, x.v_descale, *(new or (x.q, x.q)),
        )  # fmt: skip

    def _out_strides(self, out: Tensor, lse: Tensor) -> tuple[int, ...]:
        is_packed = self._problem.is_varlen_q
        return (*launch._row_strides(out, is_packed), *launch._statistic_strides(lse, is_packed))

    def _combined_at_a_time(self, width: int) -> tuple[int, int]:
        """(rows, parts) that the last program combines at a time, so that each thread's elements fit its registers."""
        threads, in_flight = 32 * self._config.num_warps, 8 * self._config.num_warps  # of several warps, more is free
        rows = min(self._rows, max(1, 8 * threads // width))
        parts = power_of_two(self._splits.launched * self._config.shares)
        return rows, max(1, min(parts, 16, in_flight * threads // (rows * width)))

    def _launch(self, x: AttentionInputs, out: Tensor, lse: Tensor, new: New | None) -> None:
        p, c, s, tensors = self._problem, self._config, self._splits, self._tensors(x, out, lse, new)
        scratch = self._counters.scratch(self._tiles, self._room) if self._room else triton_counters.NONE
        tensors = (*tensors, scratch.room, scratch.counters)
        packed_k = p.is_varlen_k
        if self._is_paired:
            tensors = (*tensors[:2], x.v.view(torch.int16), *tensors[3:])
        is_whole = p.page_size == 0 or p.page_size % c.block_n == 0 or x.block_table.shape[1] == 1
        rows, step = self._combined_at_a_time(padded(p.head_dim_v))
        tail = (
            *launch._row_strides(x.q, p.is_varlen_q), *launch._row_strides(x.k, packed_k),
            *launch._row_strides(tensors[2], packed_k), *self._out_strides(out, lse),
            *(n for y in new or () for n in y.stride()[:3]), *(() if new else (0,) * 6),
            x.block_table.stride(0) if p.page_size else 0, launch._slope_stride(x.alibi_slopes),
            *descale_strides(x.k_descale), new[0].shape[1] if new else 0, x.k.shape[0],
            p.seqlen_q, p.seqlen_k, p.heads_k, p.heads // p.heads_k, p.left, p.right, p.page_size,
            *launch._scalars(x)[:3], s.number, self._tiles_m,
            p.head_dim, p.head_dim_v, padded(p.head_dim), padded(p.head_dim_v), c.block_m, c.block_n, self._rows,
            s.least_tiles, s.launched > 1, self._tiles_m > 1, 0 if is_whole else p.page_size, x.k_descale is not None,
            self.most_new if new else 0, self._features, c.shares, rows, step, self._arch,
        )  # fmt: skip
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
        compiled = kernels.attention_split_kernel[self._grid](*tensors, *tail, **options)
        self._replay = triton_replay.record(compiled, self._grid, tail, tensors, p.device)


def _arch(facts: device.Device) -> int:
    """The compute capability of a device of NVIDIA, 90 for 9.0, or 0."""
    return int(facts.family.removeprefix("cuda")) if facts.family.startswith("cuda") else 0


def _can_pair(p: AttentionProblem, v: Tensor) -> bool:
    """Whether 8-bit values can be read two at a time."""
    if p.cache_dtype is None or p.dtype.itemsize != 2 or p.head_dim_v < 32:
        return False
    return not any(n & 1 for n in (p.head_dim_v, v.data_ptr(), *v.stride()[:-1]))


def _can_append(p: AttentionProblem, f: Features) -> bool:
    """Whether the kernel can write new keys before it reads them: where a barrier orders a program's own accesses."""
    is_plain = f.has_used_k and not (f.has_cu_q or f.has_cu_k or f.has_leftpad) and p.cache_dtype is None
    return is_plain and device.probe(p.device).family.startswith(("cuda", "interpreter"))


def descale_strides(descale: Tensor | None) -> tuple[int, int]:
    """(sequence, head) strides of a factor that is one number, one a head, or one a sequence and head."""
    if descale is None or descale.numel() == 1:
        return (0, 0)
    return (descale.stride(0) if descale.ndim == 2 else 0, descale.stride(-1))
