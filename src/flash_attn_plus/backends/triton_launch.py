"""Arguments and grids of the portable kernels."""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from flash_attn_plus import device, env
from flash_attn_plus.backends import triton_blocks, triton_descriptors
from flash_attn_plus.backends.triton_replay import Recorded
from flash_attn_plus.kernels.features import Features
from flash_attn_plus.kernels.triton import backward as backward_kernels
from flash_attn_plus.kernels.triton import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import heuristics
from flash_attn_plus.tuning.config import TileConfig, padded


def features(problem: AttentionProblem, inputs: AttentionInputs) -> Features:
    """The compile-time switches of a call."""
    is_float32 = problem.dtype == torch.float32
    return Features(
        problem.left >= 0,
        problem.right >= 0,
        problem.has_softcap,
        problem.has_alibi,
        problem.has_dropout,
        inputs.softmax_scale <= 0.0,
        problem.is_varlen_q,
        inputs.cu_seqlens_k is not None,
        problem.has_seqused_k,
        problem.has_leftpad_k,
        problem.page_size > 0,
        is_float32,
        env.fp32_precision() if is_float32 else "ieee",
    )


def _row_strides(x: Tensor, is_packed: bool) -> tuple[int, int, int]:
    """(batch, sequence, head) strides; a packed tensor has no batch stride."""
    s = x.stride()
    return (0, s[0], s[1]) if is_packed else (s[0], s[1], s[2])


def _statistic_strides(lse: Tensor, is_packed: bool) -> tuple[int, int]:
    return (0, lse.stride(0)) if is_packed else (lse.stride(0), lse.stride(1))


def _scalars(inputs: AttentionInputs) -> tuple[float, float, float, int, float]:
    """(positive scale, its sign, softcap, threshold of kept 16-bit numbers, factor of kept weights)."""
    scale = inputs.softmax_scale
    sign = math.copysign(1.0, scale) if scale != 0.0 else 0.0
    keep = 1.0 - inputs.dropout_p
    return (abs(scale) or 1.0, sign, inputs.softcap, max(1, int(keep * 65536 + 0.5)), 1.0 / keep)


def _slope_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0


def is_aligned(x: Tensor) -> bool:
    """Whether the compiler knows that rows start at multiples of 16 bytes, so that copies need no registers."""
    return x.data_ptr() & 15 == 0 and not any(n & 15 for n in x.stride()[:-1])


def _widths(p: AttentionProblem, x: AttentionInputs, family: str) -> tuple[int, int]:
    """Columns of the tiles of keys and of values.

    They are equal where Hopper copies neither asynchronously: tiles that take turns in one place, each in a layout of
    its own, are products of wrong addresses there with CUDA 12.8's assembler, which Triton 3.6 brings.
    """
    widths = padded(p.head_dim), padded(p.head_dim_v)
    is_copied = is_aligned(x.k) and is_aligned(x.v)
    return widths if is_copied or family != "cuda90" else (max(widths), max(widths))


_fitting: dict[tuple, TileConfig] = {}
# What says that tiles do not fit; some assemblers break off over some tiles that others take.
_UNFIT = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


def forget_fitting() -> None:
    """Try every configuration anew, as after a change of the device's facts."""
    _fitting.clear()


def launch_first_fitting(key: tuple, configs: list[TileConfig], run: Callable[[TileConfig], None]) -> None:
    """Run with the first configuration that the device takes, and remember it for the key."""
    key = (*key, configs[0])  # a measured table may put others first, by length
    known = _fitting.get(key)
    if known is not None:
        run(known)
        return
    for i, config in enumerate(configs):
        try:
            run(config)
        except _UNFIT:
            if i + 1 == len(configs):
                raise
            continue
        _fitting[key] = config
        return


class ForwardPlan:
    """The forward launch of calls that share shapes, strides and numbers."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        self._problem = p = problem
        self._index = p.device.index if p.device.type == "cuda" else None
        self._facts = device.probe(p.device)
        self._features = features(p, inputs)
        self._recorded = Recorded(p.device)
        packed_k = p.is_varlen_k
        self._strides_qkv = (
            *_row_strides(inputs.q, p.is_varlen_q),
            *_row_strides(inputs.k, packed_k),
            *_row_strides(inputs.v, packed_k),
        )
        table_stride = inputs.block_table.stride(0) if p.page_size else 0
        self._numbers = (
            table_stride, _slope_stride(inputs.alibi_slopes), p.seqlen_q, p.seqlen_k, p.heads, p.heads // p.heads_k,
            p.left, p.right, p.page_size, *_scalars(inputs),
        )  # fmt: skip
        self._sizes = (p.head_dim, p.head_dim_v, *_widths(p, inputs, self._facts.family))

    def __call__(self, x: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Launch on the current stream of the problem's device."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                return self(x, out, lse)
        if self._problem.is_varlen_q:
            out.zero_()  # rows behind the last sequence belong to no program
        tensors = (x.q, x.k, x.v, out, lse, *x[6:13])  # lengths, tables, slopes and the state of dropout
        if not self._recorded.repeats(tensors):
            self._launch(x, tensors, out, lse)
        return None

    def _launch(self, x: AttentionInputs, tensors: tuple, out: Tensor, lse: Tensor) -> None:
        p, packed_q = self._problem, self._problem.is_varlen_q
        strides = (*self._strides_qkv, *_row_strides(out, packed_q), *_statistic_strides(lse, packed_q))

        def run(c: TileConfig) -> None:
            c, F, blocks = triton_blocks.prepare(p, x, self._features, c, is_by_keys=False)
            (k, v), F = triton_descriptors.streamed(c, F, (x.k, x.v), c.block_n)
            F = F._replace(is_ahead=heuristics.is_ahead(p, c))
            q = triton_descriptors.described(x.q, c.block_m) if F.is_ahead else x.q
            grid = (-(-p.seqlen_q // c.block_m) * p.heads * p.batch,)
            self._recorded.bind(
                forward_kernels.attention_forward_kernel, grid, (q, k, v, *tensors[3:]),
                (*strides, *self._numbers, blocks, *self._sizes, c.block_m, c.block_n, F), blocks is None,
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip

        key = ("forward", p.device, p.dtype, *self._sizes, x.block_size, self._features)
        configs = triton_descriptors.usable(heuristics.forward(p, self._facts), tensors[:3])
        launch_first_fitting(key, configs, run)


def forward(problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Launch the forward kernel."""
    ForwardPlan(problem, inputs)(inputs, out, lse)


class BackwardPlan:
    """The launches of backward passes that are laid out alike: delta, then dk and dv, then dq."""

    def __init__(self, problem: AttentionProblem, inputs: AttentionInputs):
        self._problem = p = problem
        self._index = p.device.index if p.device.type == "cuda" else None
        self._features = features(p, inputs)
        self._rows, number = _statistics_size(p, inputs.q)
        # torch.empty_like takes half the time of torch.empty; this holds one number
        self._statistics_like = torch.empty(1, dtype=torch.float32, device=inputs.q.device).expand(number)
        self._recorded: list[tuple[Recorded, int]] = []  # and which tensors it takes

    def __call__(
        self, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
        dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor,
    ) -> None:  # fmt: skip
        """Launch on the current stream of the problem's device."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                return self(x, dout, out, lse, dlse, dq, dk, dv, delta)
        p, statistics = self._problem, torch.empty_like(self._statistics_like)
        if p.is_varlen_q or p.is_varlen_k:  # rows behind the last sequence belong to no program
            for gradient in (dq, dk, dv):
                gradient.zero_()
        spans = (x.cu_seqlens_q, x.cu_seqlens_k, x.alibi_slopes, x.rng_state)
        given = (
            (out, dout, lse, dlse, delta, statistics, x.cu_seqlens_q),
            (x.q, x.k, x.v, dout, statistics, dk, dv, *spans),
            (x.q, x.k, x.v, dout, lse, delta, dq, *spans),
        )
        if not self._recorded or not all(recorded.repeats(given[i]) for recorded, i in self._recorded):
            self._launch(x, given)
        return None

    def _bind(self, kernel: Any, grid: int, tensors: tuple, tail: tuple, c: TileConfig) -> Recorded:
        recorded = Recorded(self._problem.device)
        is_alike = not self._problem.has_block_mask  # whose lists are made for each call
        recorded.bind(kernel, (grid,), tensors, tail, is_alike, num_warps=c.num_warps, num_stages=c.num_stages)
        return recorded

    def _launch(self, x: AttentionInputs, given: tuple[tuple, tuple, tuple]) -> None:
        p, F = self._problem, self._features
        packed_q, packed_k = p.is_varlen_q, p.is_varlen_k
        (out, dout, lse, *_), (*_, dk, dv), dq = given[0], given[1][:7], given[2][6]
        head_dims = (p.head_dim, p.head_dim_v, padded(p.head_dim), padded(p.head_dim_v))
        strides_g, statistic_strides = _row_strides(dout, packed_q), _statistic_strides(lse, packed_q)
        strides = (*_row_strides(x.q, packed_q), *_row_strides(x.k, packed_k), *_row_strides(x.v, packed_k), *strides_g)
        sizes = (p.seqlen_q, p.seqlen_k, p.heads, p.heads // p.heads_k, p.left, p.right)
        numbers = (_slope_stride(x.alibi_slopes), *sizes, *_scalars(x))
        made: dict[int, list[Recorded]] = {}  # tiles that do not fit leave none behind

        def run_statistics(c: TileConfig) -> None:
            align = backward_kernels.STATISTICS_ALIGN.value
            grid = -(-p.seqlen_q // align) * align // c.block_m * p.heads * p.batch
            tail = (
                *_row_strides(out, packed_q), *strides_g, *statistic_strides, self._rows, p.seqlen_q, p.heads,
                *head_dims[1::2], c.block_m, F,
            )  # fmt: skip
            made[0] = [self._bind(backward_kernels.attention_statistics_kernel, grid, given[0], tail, c)]

        def run_dkdv(c: TileConfig) -> None:
            c, switches, blocks = triton_blocks.prepare(p, x, F, c, is_by_keys=True)
            (q, g), switches = triton_descriptors.streamed(c, switches, (x.q, dout), c.block_m)
            passes = ((heuristics.dv_alone(c), False, True), (c, True, False)) if c.is_split else ((c, True, True),)
            bound = []
            for t, wants_dk, wants_dv in passes:
                grid = -(-p.seqlen_k // t.block_n) * p.heads_k * p.batch
                tail = (
                    *strides, *_row_strides(dk, packed_k), *_row_strides(dv, packed_k), self._rows, *numbers, blocks,
                    *head_dims, t.block_m, t.block_n, switches, wants_dk, wants_dv,
                )  # fmt: skip
                tensors = (q, x.k, x.v, g, *given[1][4:])
                bound.append(self._bind(backward_kernels.attention_backward_dkdv_kernel, grid, tensors, tail, t))
            made[1] = bound

        def run_dq(c: TileConfig) -> None:
            c, switches, blocks = triton_blocks.prepare(p, x, F, c, is_by_keys=False)
            (k, v), switches = triton_descriptors.streamed(c, switches, (x.k, x.v), c.block_n)
            grid = -(-p.seqlen_q // c.block_m) * p.heads * p.batch
            tail = (
                *strides, *_row_strides(dq, packed_q), *statistic_strides, *numbers, blocks, *head_dims, c.block_m,
                c.block_n, switches,
            )  # fmt: skip
            tensors = (x.q, k, v, *given[2][3:])
            made[2] = [self._bind(backward_kernels.attention_backward_dq_kernel, grid, tensors, tail, c)]

        facts, usable = device.probe(p.device), triton_descriptors.usable
        key = (p.device, p.dtype, p.head_dim, p.head_dim_v, x.block_size, F)
        run_statistics(heuristics.statistics(p))
        launch_first_fitting(("dkdv", *key), usable(heuristics.dkdv(p, facts), (x.q, dout)), run_dkdv)
        launch_first_fitting(("dq", *key), usable(heuristics.dq(p, facts), (x.k, x.v)), run_dq)
        self._recorded = [(recorded, i) for i in sorted(made) for recorded in made[i]]


def backward(
    problem: AttentionProblem, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor,
) -> None:  # fmt: skip
    """Launch the three kernels."""
    BackwardPlan(problem, inputs)(inputs, dout, out, lse, dlse, dq, dk, dv, delta)


def _statistics_size(p: AttentionProblem, q: Tensor) -> tuple[int, int]:
    """Padded rows a head of the dk/dv kernel's scratch, and its numbers: 8 bytes for each row of each head."""
    align = backward_kernels.STATISTICS_ALIGN.value
    heads, rows = (p.heads, q.shape[0] + p.batch * align) if p.is_varlen_q else (p.batch * p.heads, p.seqlen_q)
    padded_rows = -(-rows // align) * align
    return padded_rows, heads * padded_rows * 2


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


_NOTHING = _Nothing()


def on_device(where: torch.device):
    """Make the tensors' device current: Triton launches on the current one."""
    if where.type != "cuda" or where.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(where)
