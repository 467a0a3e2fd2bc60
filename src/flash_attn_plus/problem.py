"""What is asked of a backend: a hashable description without tensors, and the tensors beside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.errors import InvalidArgument

MAX_HEAD_DIM = 512
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """One attention call, as selection and kernels' configuration see it.

    Lengths are the longest of the batch. `left` and `right` bound the visible band around the diagonal
    that is aligned to the bottom-right corner: key j is visible to query i when
    `-left <= j - (i + len_k - len_q) <= right`; -1 means unbounded; causal is `right == 0`.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    left: int = -1
    right: int = -1
    has_softcap: bool = False
    has_alibi: bool = False
    has_dropout: bool = False
    is_varlen_q: bool = False
    is_varlen_k: bool = False
    page_size: int = 0
    has_seqused_k: bool = False
    has_leftpad_k: bool = False
    is_backward: bool = False
    is_deterministic: bool = False


class AttentionInputs(NamedTuple):
    """The tensors and run-time numbers of one call.

    q is (b, sq, h, d) or packed (total_q, h, d); k is (b, sk, hk, d), packed (total_k, hk, d) or paged
    (pages, page_size, hk, d); v is like k with its own head dim. The last stride of each is 1.
    Lengths and tables are int32; `rng_state` is int64 (2,), seed and offset, present with dropout only.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    block_table: Tensor | None = None
    alibi_slopes: Tensor | None = None
    rng_state: Tensor | None = None


def normalize_band(left: int, right: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """The same mask with bounds that cannot bind turned into -1, so that kernels skip them."""
    if left < 0 or left >= seqlen_k - 1:  # the diagonal never lies beyond the last key
        left = -1
    if right < 0 or right >= seqlen_q - 1:  # nor more than seqlen_q - 1 before it
        right = -1
    return left, right


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgument(message)


def _shape(*sizes: object) -> str:
    return "(" + ", ".join(str(s) for s in sizes) + ")"


def _check_index(name: str, x: Tensor | None, device: torch.device, shape: tuple[int, ...] | None) -> None:
    if x is None:
        return
    _require(x.dtype == torch.int32, f"{name} must have dtype int32, not {x.dtype}; convert it with .to(torch.int32)")
    _require(x.device == device, f"{name} must be on {device} like q, but is on {x.device}")
    if shape is not None:
        _require(x.ndim == len(shape), f"{name} must have shape {_shape(*shape)}, not {_shape(*x.shape)}")
        _require(x.shape == shape, f"{name} must have shape {_shape(*shape)}, not {_shape(*x.shape)}")
        _require(x.is_contiguous(), f"{name} must be contiguous; call .contiguous() on it")


def check_arguments(x: AttentionInputs) -> None:
    """Raise InvalidArgument unless shapes, dtypes and devices agree; reads no device memory.

    Works on fake tensors with symbolic sizes too, so a bad call fails alike in eager mode and under torch.compile.
    """
    q, k, v = x.q, x.k, x.v
    _require(
        q.dtype in FLOAT_DTYPES,
        f"FlashAttention only support fp16 and bf16 data type (and, here, fp32 and fp64); q has {q.dtype}",
    )
    varlen_q, paged = x.cu_seqlens_q is not None, x.block_table is not None
    varlen_k = x.cu_seqlens_k is not None and not paged
    rank_q, rank_k = 3 if varlen_q else 4, 3 if varlen_k else 4
    layout_q = "(total_q, heads, head_dim)" if varlen_q else "(batch, seqlen_q, heads, head_dim)"
    layout_k = "(total_k, heads_k, head_dim)" if varlen_k else "(batch, seqlen_k, heads_k, head_dim)"
    if paged:
        layout_k = "(num_blocks, page_size, heads_k, head_dim)"
    _require(q.ndim == rank_q, f"q must have shape {layout_q}, not {_shape(*q.shape)}")
    for name, t in (("k", k), ("v", v)):
        _require(
            t.dtype == q.dtype, f"query and {name} must have the same dtype: {name} has {t.dtype}, q has {q.dtype}"
        )
        _require(t.device == q.device, f"{name} must be on {q.device} like q, but is on {t.device}")
        _require(t.ndim == rank_k, f"{name} must have shape {layout_k}, not {_shape(*t.shape)}")
    heads, head_dim = q.shape[-2], q.shape[-1]
    heads_k = k.shape[-2]
    _require(
        head_dim <= MAX_HEAD_DIM and v.shape[-1] <= MAX_HEAD_DIM,
        f"FlashAttention forward only supports head dimension at most 256 (here at most {MAX_HEAD_DIM});"
        f" q has {head_dim}, v has {v.shape[-1]}",
    )
    _require(head_dim > 0 and v.shape[-1] > 0, "head_dim must be positive; q or v has a last dimension of 0")
    _require(
        heads_k > 0 and heads % heads_k == 0,
        f"Number of heads in key/value must divide number of heads in query, but q has {heads} and k has {heads_k}",
    )
    if varlen_q:
        _require(
            x.cu_seqlens_q.ndim == 1, f"cu_seqlens_q must have shape (batch + 1,), not {_shape(*x.cu_seqlens_q.shape)}"
        )
        batch = x.cu_seqlens_q.shape[0] - 1
        _check_index("cu_seqlens_q", x.cu_seqlens_q, q.device, (batch + 1,))
    else:
        batch = q.shape[0]
    _require(batch > 0, "batch size must be positive; q is empty along its batch dimension")
    if paged:
        _require(
            x.block_table.dtype == torch.int32,
            f"block_table must have dtype torch.int32, not {x.block_table.dtype}; convert it with .to(torch.int32)",
        )
        _require(
            x.block_table.device == q.device,
            f"block_table must be on {q.device} like q, but is on {x.block_table.device}",
        )
        _require(
            x.block_table.ndim == 2 and x.block_table.shape[0] == batch,
            f"block_table must have shape ({batch}, max_blocks), not {_shape(*x.block_table.shape)}",
        )
        _require(x.block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
        _require(
            x.cu_seqlens_k is not None or x.seqused_k is not None,
            "a call with block_table needs cu_seqlens_k or seqused_k, which give the length of each sequence",
        )
        expected_k: tuple[int, ...] = (k.shape[0], k.shape[1], heads_k, head_dim)
    elif varlen_k:
        expected_k = (k.shape[0], heads_k, head_dim)
    else:
        expected_k = (batch, k.shape[1], heads_k, head_dim)
    _check_index("cu_seqlens_k", x.cu_seqlens_k, q.device, (batch + 1,))
    _require(k.shape == expected_k, f"k must have shape {_shape(*expected_k)}, not {_shape(*k.shape)}")
    expected_v = (*expected_k[:-1], v.shape[-1])
    _require(v.shape == expected_v, f"v must have shape {_shape(*expected_v)}, not {_shape(*v.shape)}")
    _check_index("seqused_k", x.seqused_k, q.device, (batch,))
    _check_index("leftpad_k", x.leftpad_k, q.device, (batch,))
    _require(not (paged and x.leftpad_k is not None), "Paged KV and leftpad_k are not supported together; drop one")
    slopes = x.alibi_slopes
    if slopes is not None:
        _require(
            slopes.dtype == torch.float32,
            f"ALiBi slopes must have dtype fp32, not {slopes.dtype}; call .float() on alibi_slopes",
        )
        _require(slopes.device == q.device, f"alibi_slopes must be on {q.device} like q, but is on {slopes.device}")
        _require(
            slopes.shape in ((heads,), (batch, heads)),
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), not {_shape(*slopes.shape)}",
        )
        _require(slopes.stride(-1) == 1, "ALiBi slopes tensor must have contiguous last dimension")
    _require(0.0 <= x.dropout_p < 1.0, f"p_dropout must be in [0, 1), not {x.dropout_p}; pass a dropout_p below 1")
    _require(
        not (x.softcap > 0.0 and x.dropout_p > 0.0),
        "Softcapping does not support dropout for now; set softcap or dropout_p to 0",
    )


def check_values(x: AttentionInputs, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Debug mode: check what lies in device memory (lengths, page ids, slopes); costs a synchronisation."""
    for side, cu, total, longest in (
        ("q", x.cu_seqlens_q, x.q.shape[0], max_seqlen_q),
        ("k", x.cu_seqlens_k, None if x.block_table is not None else x.k.shape[0], max_seqlen_k),
    ):
        if cu is None:
            continue
        name, steps = f"cu_seqlens_{side}", cu.diff()
        _require(int(cu[0]) == 0, f"{name} must start at 0, not {int(cu[0])}")
        _require(bool((steps >= 0).all()), f"{name} must not decrease; build it as the cumulative sum of the lengths")
        _require(
            int(steps.max()) <= longest,
            f"max_seqlen_{side} is {longest}, but {name} holds a sequence of {int(steps.max())}; pass the true maximum",
        )
        if total is not None:
            _require(int(cu[-1]) <= total, f"{name} ends at {int(cu[-1])}, beyond the {total} rows of {side}")
    if x.block_table is not None:
        page, blocks = x.k.shape[1], x.k.shape[0]
        lengths = x.seqused_k if x.seqused_k is not None else x.cu_seqlens_k.diff()
        pages_used = (lengths + page - 1) // page
        _require(
            int(pages_used.max()) <= x.block_table.shape[1],
            f"block_table has {x.block_table.shape[1]} pages a sequence, but the longest needs {int(pages_used.max())}",
        )
        used = torch.arange(x.block_table.shape[1], device=x.q.device) < pages_used[:, None]
        ids = x.block_table[used]
        _require(
            bool(((ids >= 0) & (ids < blocks)).all()),
            f"block_table holds a page id outside [0, {blocks}); check the pages of the sequences in use",
        )
    if x.alibi_slopes is not None:
        _require(bool(x.alibi_slopes.isfinite().all()), "alibi_slopes holds NaN or infinity; pass finite slopes")


def describe(
    x: AttentionInputs,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    is_backward: bool = False,
    is_deterministic: bool = False,
) -> AttentionProblem:
    """The problem of a checked call with concrete sizes."""
    q, k = x.q, x.k
    varlen_q, paged = x.cu_seqlens_q is not None, x.block_table is not None
    seqlen_q = max_seqlen_q if varlen_q else q.shape[1]
    if x.cu_seqlens_k is not None:
        seqlen_k = max_seqlen_k
    elif paged:
        seqlen_k = x.block_table.shape[1] * k.shape[1]
    else:
        seqlen_k = k.shape[1]
    left, right = normalize_band(left, right, seqlen_q, seqlen_k)
    return AttentionProblem(
        q.device,
        q.dtype,
        x.cu_seqlens_q.shape[0] - 1 if varlen_q else q.shape[0],
        seqlen_q,
        seqlen_k,
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        x.v.shape[-1],
        left,
        right,
        x.softcap > 0.0,
        x.alibi_slopes is not None,
        x.dropout_p > 0.0,
        varlen_q,
        x.cu_seqlens_k is not None and not paged,
        k.shape[1] if paged else 0,
        x.seqused_k is not None,
        x.leftpad_k is not None,
        is_backward,
        is_deterministic,
    )
