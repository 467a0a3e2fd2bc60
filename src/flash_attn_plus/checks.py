"""What a call must satisfy, rule by rule, each with the sentence a caller reads when it does not.

Messages are formed only when a rule is broken: these checks run on every call that was not seen before.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import FLOAT_DTYPES, MAX_HEAD_DIM, AttentionInputs


def refuse_strangers(arguments: Mapping[str, object]) -> None:
    """Raise InvalidArgument for what should be a tensor, or None, and is of another type."""
    for name, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} must be a tensor, not {type(x).__name__}; convert it with torch.as_tensor")


def refuse_nested(*tensors: Tensor) -> None:
    """Raise InvalidArgument for nested tensors, whose operators know nothing of attention's."""
    if any(x.is_nested for x in tensors):
        raise InvalidArgument(
            "q, k and v must not be nested tensors; pass their values() with their offsets() as cu_seqlens, or call"
            " flash_attention.flash_attention, which takes them"
        )


def _shape(sizes: tuple) -> str:
    return "(" + ", ".join(str(s) for s in sizes) + (",)" if len(sizes) == 1 else ")")


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise InvalidArgument(f"{name} must be on {q.device} like q, but is on {x.device}")


def _has_shape(name: str, x: Tensor, shape: tuple) -> None:
    if x.shape != shape:
        raise InvalidArgument(f"{name} must have shape {_shape(shape)}, not {_shape(x.shape)}")


def _check_index(name: str, x: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    """int32 lengths or offsets, contiguous, on q's device."""
    if x is None:
        return
    if x.dtype != torch.int32:
        raise InvalidArgument(f"{name} must have dtype int32, not {x.dtype}; convert it with .to(torch.int32)")
    _same_device(name, x, q)
    _has_shape(name, x, shape)
    if not x.is_contiguous():
        raise InvalidArgument(f"{name} must be contiguous; call .contiguous() on it")


def _check_ranks(x: AttentionInputs) -> None:
    """Dtypes, devices and ranks of q, k and v."""
    q, k, v = x.q, x.k, x.v
    if q.dtype not in FLOAT_DTYPES:
        raise InvalidArgument(
            f"FlashAttention only support fp16 and bf16 data type (and, here, fp32 and fp64); q has {q.dtype}"
        )
    is_packed_q, is_packed_k = x.cu_seqlens_q is not None, x.cu_seqlens_k is not None and x.block_table is None
    if q.ndim != (3 if is_packed_q else 4):
        layout = "(total_q, heads, head_dim)" if is_packed_q else "(batch, seqlen_q, heads, head_dim)"
        raise InvalidArgument(f"q must have shape {layout}, not {_shape(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise InvalidArgument(f"query and {name} must have the same dtype: {name} has {t.dtype}, q has {q.dtype}")
        _same_device(name, t, q)
        if t.ndim != (3 if is_packed_k else 4):
            layout = "(total_k, heads_k, head_dim)" if is_packed_k else "(batch, seqlen_k, heads_k, head_dim)"
            layout = "(num_blocks, page_size, heads_k, head_dim)" if x.block_table is not None else layout
            raise InvalidArgument(f"{name} must have shape {layout}, not {_shape(t.shape)}")


def _check_heads(x: AttentionInputs) -> None:
    """Head dims and head counts."""
    d, dv, h, hk = x.q.shape[-1], x.v.shape[-1], x.q.shape[-2], x.k.shape[-2]
    if d > MAX_HEAD_DIM or dv > MAX_HEAD_DIM:
        raise InvalidArgument(
            f"FlashAttention forward only supports head dimension at most 256 (here at most {MAX_HEAD_DIM});"
            f" q has {d}, v has {dv}"
        )
    if d < 1 or dv < 1:
        raise InvalidArgument("head_dim must be positive; q or v has a last dimension of 0")
    if hk < 1 or h % hk != 0:
        raise InvalidArgument(
            f"Number of heads in key/value must divide number of heads in query, but q has {h} and k has {hk}"
        )


def _check_pages(x: AttentionInputs, batch: int) -> None:
    """The page table of a paged call."""
    table = x.block_table
    if table.dtype != torch.int32:
        raise InvalidArgument(
            f"block_table must have dtype torch.int32, not {table.dtype}; convert it with .to(torch.int32)"
        )
    _same_device("block_table", table, x.q)
    if table.ndim != 2 or table.shape[0] != batch:
        raise InvalidArgument(f"block_table must have shape ({batch}, max_blocks), not {_shape(table.shape)}")
    if table.stride(-1) != 1:
        raise InvalidArgument("block_table must have contiguous last dimension")
    if x.cu_seqlens_k is None and x.seqused_k is None:
        raise InvalidArgument(
            "a call with block_table needs cu_seqlens_k or seqused_k, which give the length of each sequence"
        )
    if x.leftpad_k is not None:
        raise InvalidArgument("Paged KV and leftpad_k are not supported together; drop one")


def _check_slopes(slopes: Tensor, q: Tensor, batch: int) -> None:
    heads = q.shape[-2]
    if slopes.dtype != torch.float32:
        raise InvalidArgument(f"ALiBi slopes must have dtype fp32, not {slopes.dtype}; call .float() on alibi_slopes")
    _same_device("alibi_slopes", slopes, q)
    if slopes.shape not in ((heads,), (batch, heads)):
        raise InvalidArgument(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), not {_shape(slopes.shape)}"
        )
    if slopes.stride(-1) != 1:
        raise InvalidArgument("ALiBi slopes tensor must have contiguous last dimension")


def check_arguments(x: AttentionInputs) -> None:
    """Raise InvalidArgument unless shapes, dtypes and devices agree; reads no device memory.

    Works on fake tensors with symbolic sizes too, so a bad call fails alike in eager mode and under torch.compile.
    """
    _check_ranks(x)
    _check_heads(x)
    q, k, v = x.q, x.k, x.v
    if x.cu_seqlens_q is None:
        batch = q.shape[0]
    else:
        if x.cu_seqlens_q.ndim != 1:
            raise InvalidArgument(f"cu_seqlens_q must have shape (batch + 1,), not {_shape(x.cu_seqlens_q.shape)}")
        batch = x.cu_seqlens_q.shape[0] - 1
        _check_index("cu_seqlens_q", x.cu_seqlens_q, q, (batch + 1,))
    if batch < 1:
        raise InvalidArgument("batch size must be positive; q is empty along its batch dimension")
    if x.block_table is not None:
        _check_pages(x, batch)
        leading: tuple[int, ...] = (k.shape[0], k.shape[1])
    else:
        leading = (k.shape[0],) if x.cu_seqlens_k is not None else (batch, k.shape[1])
    _check_index("cu_seqlens_k", x.cu_seqlens_k, q, (batch + 1,))
    _has_shape("k", k, (*leading, k.shape[-2], q.shape[-1]))
    _has_shape("v", v, (*leading, k.shape[-2], v.shape[-1]))
    _check_index("seqused_k", x.seqused_k, q, (batch,))
    _check_index("leftpad_k", x.leftpad_k, q, (batch,))
    if x.alibi_slopes is not None:
        _check_slopes(x.alibi_slopes, q, batch)
    for name, number in (("softmax_scale", x.softmax_scale), ("softcap", x.softcap)):
        if not -inf < number < inf:
            raise InvalidArgument(f"{name} must be finite, not {number}")
    if not 0.0 <= x.dropout_p < 1.0:
        raise InvalidArgument(f"p_dropout must be in [0, 1), not {x.dropout_p}; pass a dropout_p below 1")
    if x.softcap > 0.0 and x.dropout_p > 0.0:
        raise InvalidArgument("Softcapping does not support dropout for now; set softcap or dropout_p to 0")


def _check_starts(side: str, starts: list[int], total: int | None, longest: int | None) -> None:
    name, lengths = f"cu_seqlens_{side}", [stop - start for start, stop in pairwise(starts)]
    if starts[0] != 0:
        raise InvalidArgument(f"{name} must start at 0, not {starts[0]}")
    if min(lengths) < 0:
        raise InvalidArgument(f"{name} must not decrease; build it as the cumulative sum of the lengths")
    if longest is not None and max(lengths) > longest:
        raise InvalidArgument(
            f"max_seqlen_{side} is {longest}, but {name} holds a sequence of {max(lengths)}; pass the true maximum"
        )
    if total is not None and starts[-1] > total:
        raise InvalidArgument(f"{name} ends at {starts[-1]}, beyond the {total} rows of {side}")


def _check_used(x: AttentionInputs, room: list[int]) -> None:
    """The keys that are used and skipped of each sequence, which has room for so many."""
    used = room if x.seqused_k is None else x.seqused_k.tolist()
    if any(not 0 <= n <= most for n, most in zip(used, room, strict=True)):
        raise InvalidArgument(
            f"lengths of the keys (seqused_k, cache_seqlens) must lie between 0 and {max(room)}, as many as there are,"
            f" but reach from {min(used)} to {max(used)}"
        )
    skipped = [0] if x.leftpad_k is None else x.leftpad_k.tolist()
    if min(skipped) < 0:
        raise InvalidArgument(f"leftpad_k (cache_leftpad) must not be negative, but holds {min(skipped)}")


def _check_pages_used(blocks: int, page: int, table: Tensor, lengths: list[int]) -> None:
    columns, needed = table.shape[1], [-(-n // page) if page else 0 for n in lengths]
    if min(lengths) < 0:
        raise InvalidArgument(f"lengths of the keys (seqused_k, cache_seqlens) must not be negative: {min(lengths)}")
    if max(needed) > columns:
        raise InvalidArgument(
            f"block_table has {columns} pages a sequence, but the longest needs {max(needed)}: it has {max(lengths)}"
            f" keys, and there is room for {columns * page}"
        )
    ids = table[torch.arange(columns, device=table.device) < torch.tensor(needed, device=table.device)[:, None]]
    if bool(((ids < 0) | (ids >= blocks)).any()):
        raise InvalidArgument(
            f"block_table holds a page id outside [0, {blocks}), or cache_batch_idx a row; check those in use"
        )


def check_lengths(x: AttentionInputs, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Raise InvalidArgument where lengths or page ids lead out of a tensor; waits for the device they live on."""
    if x.cu_seqlens_q is not None:
        _check_starts("q", x.cu_seqlens_q.tolist(), x.q.shape[0], max_seqlen_q)
    lengths = None
    if x.cu_seqlens_k is not None:
        starts = x.cu_seqlens_k.tolist()
        total = x.k.shape[0] if x.block_table is None else None
        _check_starts("k", starts, total, max_seqlen_k if x.seqused_k is None else None)
        lengths = [stop - start for start, stop in pairwise(starts)]
    if x.block_table is not None:
        blocks, page = x.k.shape[:2]
        used = lengths if x.seqused_k is None else x.seqused_k.tolist()
        assert used is not None, "check_arguments sees to it"
        _check_pages_used(blocks, page, x.block_table, used)
    elif x.seqused_k is not None or x.leftpad_k is not None:
        _check_used(x, lengths or [x.k.shape[1]] * x.k.shape[0])


def check_values(x: AttentionInputs, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Debug mode: check what lies in device memory (lengths, page ids, slopes); costs a synchronisation."""
    check_lengths(x, max_seqlen_q, max_seqlen_k)
    if x.alibi_slopes is not None and not bool(x.alibi_slopes.isfinite().all()):
        raise InvalidArgument("alibi_slopes holds NaN or infinity; pass finite slopes")
