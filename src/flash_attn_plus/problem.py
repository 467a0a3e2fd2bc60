"""What is asked of a backend: a hashable description without tensors, and the tensors beside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus import env

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
    num_splits: int = 0  # programs that share the keys of a sequence; 0: as many as fill the device
    cache_dtype: torch.dtype | None = None  # of k and v where it differs from q's
    is_batch_invariant: bool = False  # a sequence's result must not depend on the batch around it
    has_block_mask: bool = False
    has_dlse: bool = False  # backward: a gradient of the LSE arrives too


class AttentionInputs(NamedTuple):
    """The tensors and run-time numbers of one call.

    q is (b, sq, h, d) or packed (total_q, h, d); k is (b, sk, hk, d), packed (total_k, hk, d) or paged
    (pages, page_size, hk, d); v is like k with its own head dim. The last stride of each is 1.
    Lengths and tables are int32; `rng_state` is int64 (2,), seed and offset, present with dropout only.
    `block_mask` is bool (1 or b, 1 or h, query blocks, key blocks); a false block of `block_size` scores is hidden.
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
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    block_mask: Tensor | None = None
    block_size: tuple[int, int] = (0, 0)  # queries and keys of a block of block_mask


def normalize_band(left: int, right: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """The same mask with bounds that cannot bind turned into -1, so that kernels skip them."""
    if left < 0 or left >= seqlen_k - 1:  # the diagonal never lies beyond the last key
        left = -1
    if right < 0 or right >= seqlen_q - 1:  # nor more than seqlen_q - 1 before it
        right = -1
    return left, right


def describe(
    x: AttentionInputs,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    is_backward: bool = False,
    is_deterministic: bool = False,
    has_dlse: bool = False,
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
        has_block_mask=x.block_mask is not None,
        has_dlse=has_dlse,
        is_batch_invariant=env.batch_invariant(),
    )
