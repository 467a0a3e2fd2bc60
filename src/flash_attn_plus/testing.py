"""Helpers to test any backend against the float64 oracle: seeded inputs, one tolerance rule, poisoned outputs.

For users who check an installation and for authors of backends; nothing in the engine imports this module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash_attn_plus import block_sparse, ops
from flash_attn_plus.problem import AttentionInputs, AttentionProblem, describe, normalize_band
from flash_attn_plus.reference import attention_reference

Layout = Literal["contiguous", "packed", "transposed", "sliced", "expanded"]


class Case(NamedTuple):
    """Shapes and options of one attention call.

    With `lengths_q` (`lengths_k`) queries (keys) are packed sequences of those lengths, followed by `trailing` rows
    that belong to none; `slack` is added to the maximal lengths that the call states. With `page_size` the keys are
    paged in shuffled order, `seqlen_k` of them at most; their lengths are `lengths_k` or `used`. All that must not
    be read (keys beyond `used`, before `leftpad`, in trailing rows and in unused pages) holds NaN.
    """

    batch: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    heads: int = 1
    heads_k: int = 1
    head_dim: int = 16
    head_dim_v: int | None = None
    left: int = -1
    right: int = -1
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: Literal["", "heads", "batch"] = ""
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    trailing: int = 0
    slack: int = 0
    used: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int = 0
    layout: Layout = "contiguous"
    q_factor: float = 1.0  # large values make hostile logits
    is_tied: bool = False  # all keys of a sequence are equal
    block_size: tuple[int, int] = (0, 0)  # with `blocks`: queries and keys of a block
    blocks: Literal["", "shared", "heads", "batch"] = ""  # a random block mask, and who has one of its own
    block_density: float = 0.5

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return self.batch if self.lengths_q is None else len(self.lengths_q)

    @property
    def has_backward(self) -> bool:
        """Whether gradients are defined: not for paged, partly used or left-padded keys."""
        return not self.page_size and self.used is None and self.leftpad is None

    def problem(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", is_backward: bool = False
    ) -> AttentionProblem:
        """What selection is asked for this case; no tensor is made."""
        seqlen_q = self.seqlen_q if self.lengths_q is None else max(self.lengths_q) + self.slack
        seqlen_k = self.seqlen_k if self.lengths_k is None else max(self.lengths_k) + self.slack
        if self.page_size and self.lengths_k is None:
            seqlen_k = -(-seqlen_k // self.page_size) * self.page_size
        return AttentionProblem(
            torch.device(device), dtype, self.sequences, seqlen_q, seqlen_k, self.heads, self.heads_k,
            self.head_dim, self.head_dim_v or self.head_dim, *normalize_band(self.left, self.right, seqlen_q, seqlen_k),
            self.softcap > 0.0, bool(self.alibi), self.dropout_p > 0.0,
            self.lengths_q is not None, self.lengths_k is not None and not self.page_size, self.page_size,
            self.used is not None, self.leftpad is not None, is_backward, has_block_mask=bool(self.blocks),
        )  # fmt: skip


class Call(NamedTuple):
    """Tensors of a case: inputs, gradients that arrive at out and lse, and the numbers beside them."""

    inputs: AttentionInputs
    dout: Tensor
    dlse: Tensor
    left: int
    right: int
    max_seqlen_q: int
    max_seqlen_k: int

    def problem(self, is_backward: bool = False) -> AttentionProblem:
        """What selection is asked."""
        return describe(
            self.inputs, self.max_seqlen_q, self.max_seqlen_k, self.left, self.right, is_backward=is_backward
        )


def arrange(x: Tensor, layout: Layout) -> Tensor:
    """A tensor equal to x (..., heads, dim) with other strides; the last stride stays 1.

    "expanded" repeats the first head with stride 0, so the values of the other heads change.
    """
    if layout == "packed":
        return torch.stack((torch.zeros_like(x), x, torch.zeros_like(x)), -3).select(-3, 1)
    if layout == "transposed":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 8), float("nan"))
        return wide[..., 1:-1, 3 : 3 + x.shape[-1]].copy_(x)
    if layout == "expanded":
        return x[..., :1, :].contiguous().expand(x.shape)
    return x.contiguous()


def _readable_keys(case: Case, rows: int) -> Tensor:
    """Bool (batch, rows) for dense or (rows,) for packed keys: the ones that may be read."""
    if case.lengths_k is None or case.page_size:
        position = torch.arange(rows).expand(case.sequences, rows)
        stop = torch.tensor(case.used or case.lengths_k or (rows,) * case.sequences)
        start = torch.tensor(case.leftpad if case.leftpad is not None else (0,) * case.sequences)
        return (position >= start[:, None]) & (position < stop[:, None])
    readable = torch.zeros(rows, dtype=torch.bool)
    first = 0
    for n, length in enumerate(case.lengths_k):
        used = length if case.used is None else case.used[n]
        readable[first + (case.leftpad[n] if case.leftpad else 0) : first + used] = True
        first += length
    return readable


def _page(x: Tensor, table: Tensor, page_size: int, pages: int) -> Tensor:
    """Dense (b, s, hk, d) as (pages, page_size, hk, d), NaN where no sequence lives."""
    paged = x.new_full((pages, page_size, *x.shape[2:]), float("nan"))
    for n, row in enumerate(table.tolist()):
        for block, page in enumerate(row):
            keys = x[n, block * page_size : (block + 1) * page_size]
            paged[page, : len(keys)] = keys
    return paged


def _lead(case: Case, side: Literal["q", "k"]) -> tuple[int, ...]:
    lengths = case.lengths_q if side == "q" else case.lengths_k
    if lengths is not None and not (side == "k" and case.page_size):
        return (sum(lengths) + case.trailing,)
    return (case.sequences, case.seqlen_q if side == "q" else case.seqlen_k)


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> Call:
    """The seeded tensors of a case; equal on every device and, up to rounding, for every dtype."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    def place(x: Tensor) -> Tensor:
        return arrange(x.to(device), case.layout)

    def integers(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    def starts(lengths: tuple[int, ...] | None) -> Tensor | None:
        return None if lengths is None else integers(tuple(accumulate(lengths, initial=0)))

    batch, dim_v, lead_q, lead_k = case.sequences, case.head_dim_v or case.head_dim, _lead(case, "q"), _lead(case, "k")
    q = normal(*lead_q, case.heads, case.head_dim) * case.q_factor
    k, v = normal(*lead_k, case.heads_k, case.head_dim), normal(*lead_k, case.heads_k, dim_v)
    dout = normal(*lead_q, case.heads, dim_v)
    dlse = torch.randn(_lse_shape(case), generator=random, dtype=torch.float64)
    if case.is_tied:
        k = k[..., :1, :, :].expand(k.shape)
    hidden = ~_readable_keys(case, lead_k[-1])[..., None, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    table = None
    if case.page_size:
        blocks = -(-case.seqlen_k // case.page_size)
        pages = batch * blocks + 2
        table = torch.randperm(pages, generator=random)[: batch * blocks].view(batch, blocks).int()
        k, v = _page(k, table, case.page_size, pages), _page(v, table, case.page_size, pages)
    slopes = None
    if case.alibi:
        shape = (case.heads,) if case.alibi == "heads" else (batch, case.heads)
        slopes = (torch.rand(shape, generator=random) * 0.3).to(device)
    rng_state = torch.randint(0, 2**62, (2,), generator=random).to(device) if case.dropout_p else None
    block_mask = _random_blocks(case, random)
    inputs = AttentionInputs(
        place(q), place(k), place(v), case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale,
        case.softcap, case.dropout_p, starts(case.lengths_q), starts(case.lengths_k), integers(case.used),
        integers(case.leftpad), None if table is None else table.to(device), slopes, rng_state,
        block_mask=None if block_mask is None else block_mask.to(device), block_size=case.block_size,
    )  # fmt: skip
    return Call(
        inputs,
        place(dout),
        dlse.to(device, lse_dtype(dtype)),
        case.left,
        case.right,
        0 if case.lengths_q is None else max(case.lengths_q) + case.slack,
        0 if case.lengths_k is None else max(case.lengths_k) + case.slack,
    )


def _random_blocks(case: Case, random: torch.Generator) -> Tensor | None:
    """Bool (1 or b, 1 or h, query blocks, key blocks), each visible with the case's probability."""
    if not case.blocks:
        return None
    problem = case.problem(torch.float32)
    blocks = [-(-n // size) for n, size in zip((problem.seqlen_q, problem.seqlen_k), case.block_size, strict=True)]
    lead = {"shared": (1, 1), "heads": (1, case.heads), "batch": (case.sequences, case.heads)}[case.blocks]
    return torch.rand((*lead, *blocks), generator=random) < case.block_density


def _lse_shape(case: Case) -> tuple[int, ...]:
    lead = _lead(case, "q")
    return (case.heads, *lead) if case.lengths_q is not None else (lead[0], case.heads, lead[1])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within the block every `out` and `lse` that the engine allocates starts as NaN, so unwritten elements show."""
    makers = ops.allocate_outputs, ops.allocate_alike

    def poisoned(maker: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
            out, lse = maker(*arguments)
            return out.fill_(float("nan")), lse.fill_(float("nan"))

        return allocate

    ops.allocate_outputs, ops.allocate_alike = poisoned(makers[0]), poisoned(makers[1])
    try:
        yield
    finally:
        ops.allocate_outputs, ops.allocate_alike = makers


def _arguments(call: Call) -> tuple[tuple, tuple]:
    """The operators' arguments for sequences and for options."""
    x = call.inputs
    return (
        (x.cu_seqlens_q, x.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k, x.seqused_k, x.leftpad_k, x.block_table),
        (x.alibi_slopes, x.rng_state, x.dropout_p, x.softmax_scale, call.left, call.right, x.softcap),
    )


def _block_arguments(call: Call) -> tuple:
    """What follows the tensors in the arguments of the block-sparse operators."""
    (cu_q, cu_k, longest_q, longest_k, *_), options = _arguments(call)
    return (call.inputs.block_mask, *call.inputs.block_size, cu_q, cu_k, longest_q, longest_k, *options)


def run_forward(call: Call) -> dict[str, Tensor]:
    """out and lse of the engine, by whatever backend is chosen."""
    sequences, options = _arguments(call)
    with torch.no_grad(), poisoned_outputs():
        if call.inputs.block_mask is None:
            out, lse = ops.forward(*call.inputs[:3], *sequences, *options)
        else:
            out, lse = block_sparse.forward(*call.inputs[:3], *_block_arguments(call))
    return {"out": out, "lse": lse}


def run_backward(
    call: Call, out: Tensor, lse: Tensor, *, with_dlse: bool = False, deterministic: bool = False
) -> dict[str, Tensor]:
    """dq, dk, dv and delta of the engine, written into strided buffers that start as NaN."""
    sequences, options = _arguments(call)
    q, k, v = call.inputs[:3]
    grads = [
        arrange(torch.full_like(x, float("nan"), memory_format=torch.contiguous_format), "sliced") for x in (q, k, v)
    ]
    dlse = call.dlse if with_dlse else None
    with torch.no_grad():
        if call.inputs.block_mask is None:
            delta = ops.backward(call.dout, q, k, v, out, lse, dlse, *grads, *sequences, *options, deterministic)
        else:
            delta = block_sparse.backward(call.dout, q, k, v, out, lse, dlse, *grads, *_block_arguments(call))
    return dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta}


def run_engine(call: Call, *, with_gradients: bool, with_dlse: bool = False) -> dict[str, Tensor]:
    """out and lse, and with gradients dq, dk, dv and delta, of the engine's operators."""
    results = run_forward(call)
    if with_gradients:
        results |= run_backward(call, results["out"], results["lse"], with_dlse=with_dlse)
    return results


def run_reference(
    call: Call, dtype: torch.dtype, *, with_gradients: bool, with_dlse: bool = False
) -> dict[str, Tensor]:
    """What `run_engine` should give: the oracle for float64, else plain PyTorch in `dtype` by the two-pass formula."""
    x = call.inputs
    q, k, v = (t.detach().to(dtype, copy=True).requires_grad_(with_gradients) for t in (x.q, x.k, x.v))
    options = x._asdict()
    for name in ("q", "k", "v"):
        del options[name]
    options |= {"left": call.left, "right": call.right, "dtype": dtype, "is_two_pass": dtype != torch.float64}
    out, lse = attention_reference(q, k, v, **options)
    results = {"out": out.detach(), "lse": lse.detach()}
    if with_gradients:
        dout = call.dout.to(dtype)
        dlse = call.dlse.to(lse.dtype)
        arriving, at = ((dout, dlse), (out, lse)) if with_dlse else ((dout,), (out,))
        grads = torch.autograd.grad(at, (q, k, v), arriving)
        delta = (dout.to(lse.dtype) * out.detach()).sum(-1).transpose(-1, -2)
        if with_dlse:
            delta = delta - dlse
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta}
    return results


def _covered(call: Call, name: str, x: Tensor) -> Tensor:
    """The part of a result that belongs to a sequence; the contract leaves the rest open."""
    cu = call.inputs.cu_seqlens_k if name in ("dk", "dv") else call.inputs.cu_seqlens_q
    if cu is None:
        return x
    return x[..., : int(cu[-1])] if name in ("lse", "delta") else x[: int(cu[-1])]


def assert_close(name: str, actual: Tensor, reference: Tensor, eager: Tensor) -> None:
    """The one tolerance rule.

    The largest error against the float64 `reference` may be at most twice that of `eager`, the two-pass formula in
    plain PyTorch in the inputs' dtype, plus one rounding unit (eps of the result's dtype) of the largest reference.
    Infinite reference values must be met exactly.
    """
    assert actual.shape == reference.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    finite = reference.isfinite()
    value = actual.double()
    assert torch.equal(value[~finite], reference[~finite]), f"{name} differs where the reference is infinite"
    assert bool(value[finite].isfinite().all()), f"{name} holds NaN or infinity where the reference is finite"
    if not bool(finite.any()):
        return
    error = (value - reference)[finite].abs().max().item()
    eager_error = (eager.double() - reference)[finite].abs().max().item()
    largest = reference[finite].abs().max().item()
    allowed = 2.0 * eager_error + torch.finfo(actual.dtype).eps * largest
    told = f"plain PyTorch's error {eager_error:.3e}, largest value {largest:.3e}"
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} ({told})"


def assert_matches_reference(call: Call, actual: dict[str, Tensor], *, with_dlse: bool = False) -> None:
    """Hold every result of `actual` (out, lse, dq, dk, dv, delta; any of them) to `assert_close`.

    For float64 inputs plain PyTorch is the oracle itself and has no error to compare with; there
    `torch.testing.assert_close` decides with its own limits. delta counts only for rows that see a key.
    """
    dtype = call.inputs.q.dtype
    options = {"with_gradients": not actual.keys() <= {"out", "lse"}, "with_dlse": with_dlse}
    expected = run_reference(call, torch.float64, **options)
    eager = expected if dtype == torch.float64 else run_reference(call, dtype, **options)
    has_key = expected["lse"].isfinite()
    for name, value in actual.items():
        results: tuple[Tensor, ...] = (value, expected[name], eager[name])
        if name == "delta":
            results = tuple(x.where(has_key, 0.0) for x in results)
        results = tuple(_covered(call, name, x) for x in results)
        if dtype == torch.float64:
            torch.testing.assert_close(*results[:2], msg=partial("{}: {}".format, name))
        else:
            assert_close(name, results[0], results[1], results[2])
