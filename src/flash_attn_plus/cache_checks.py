"""What a key/value cache call must satisfy beyond an ordinary one, each rule with the sentence a caller reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.checks import check_arguments
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import AttentionInputs

MOST_SPLITS = 128
CACHE_DTYPES = (torch.float8_e4m3fn,)  # besides that of q


class CacheCall(NamedTuple):
    """The arguments of one call; see `attention_with_kvcache`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    softmax_scale: float
    left: int
    right: int
    softcap: float
    rotary_interleaved: bool
    num_splits: int

    @property
    def new(self) -> int:
        """Appended keys of each sequence."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Keys that the cache holds for each sequence."""
        return self.k_cache.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


def check_shapes(c: CacheCall) -> None:
    """Raise InvalidArgument unless q and the caches fit each other: what looking at any size of the call relies on."""
    cached = "batch, seqlen_k" if c.block_table is None else "num_blocks, page_size"
    leading = {"q": "batch, seqlen_q", "k_cache": cached, "v_cache": cached, "k": "batch, new", "v": "batch, new"}
    for name, sizes in leading.items():
        x = getattr(c, name)
        if x is not None and x.ndim != 4:
            raise InvalidArgument(f"{name} must have shape ({sizes}, heads, head_dim), not {tuple(x.shape)}")
    keys, values, batch = c.k_cache.shape, c.v_cache.shape, c.q.shape[0]
    if keys[3] != c.q.shape[3]:
        raise InvalidArgument(f"k_cache must have q's head_dim, {c.q.shape[3]}, not {keys[3]}")
    if values[:3] != keys[:3]:
        raise InvalidArgument(
            f"v_cache must have shape {(*keys[:3], values[3])} to go with k_cache, not {tuple(values)}"
        )
    if c.cache_batch_idx is not None and c.cache_batch_idx.ndim != 1:
        raise InvalidArgument(f"cache_batch_idx must have shape ({batch},), not {tuple(c.cache_batch_idx.shape)}")
    if c.block_table is None and c.cache_batch_idx is None and keys[0] < batch:
        raise InvalidArgument(
            f"k_cache must have a row for each of the {batch} sequences, not {keys[0]}; cache_batch_idx shares rows"
        )


def _check_rows(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] != 1:
            raise InvalidArgument(f"{name} must have contiguous last dimension; call .contiguous() on it")


def _check_cache(c: CacheCall) -> None:
    _check_rows(q=c.q, k_cache=c.k_cache, v_cache=c.v_cache)
    if not 0 <= c.num_splits <= MOST_SPLITS:
        raise InvalidArgument(f"num_splits > {MOST_SPLITS} not supported, nor is a negative one; {c.num_splits} passed")
    for name, cache in (("k_cache", c.k_cache), ("v_cache", c.v_cache)):
        if cache.dtype != c.q.dtype and cache.dtype not in CACHE_DTYPES:
            raise InvalidArgument(
                f"query and {name} must have the same dtype, or {name} be float8_e4m3fn; q has {c.q.dtype}, {name} has"
                f" {cache.dtype}"
            )
    if c.k_cache.dtype != c.v_cache.dtype:
        raise InvalidArgument(f"k_cache and v_cache must have the same dtype: {c.k_cache.dtype}, {c.v_cache.dtype}")
    if c.block_table is not None:
        if c.block_table.ndim != 2:
            raise InvalidArgument(f"block_table must have shape (batch, max_blocks), not {tuple(c.block_table.shape)}")
        if c.cache_batch_idx is not None:
            raise InvalidArgument("Paged KVcache does not support cache_batch_idx; index block_table instead")
        if c.cache_leftpad is not None:
            raise InvalidArgument("Paged KV and leftpad_k are not supported together; drop one")
    indices = {
        "cache_seqlens": c.cache_seqlens,
        "cache_batch_idx": c.cache_batch_idx,
        "cache_leftpad": c.cache_leftpad,
    }
    for name, x in indices.items():
        if x is not None:
            if x.dtype != torch.int32:
                raise InvalidArgument(f"{name} must have dtype int32, not {x.dtype}")
            if x.device != c.q.device:
                raise InvalidArgument(f"{name} must be on {c.q.device} like q, but is on {x.device}")
            if x.shape != (c.q.shape[0],):
                raise InvalidArgument(f"{name} must have shape ({c.q.shape[0]},), not {tuple(x.shape)}")
            if not x.is_contiguous():
                raise InvalidArgument(f"{name} must be contiguous; call .contiguous() on it")


def _check_descales(c: CacheCall) -> None:
    is_narrow = c.k_cache.dtype != c.q.dtype
    heads_k = c.k_cache.shape[-2]
    for name, x in (("k_descale", c.k_descale), ("v_descale", c.v_descale)):
        if x is None:
            continue
        if not is_narrow:
            raise InvalidArgument(f"{name} belongs to a float8_e4m3fn cache, but the cache has {c.k_cache.dtype}")
        if x.dtype != torch.float32 or x.device != c.q.device:
            raise InvalidArgument(f"{name} must be float32 on {c.q.device}, not {x.dtype} on {x.device}")
        shapes = ((), (1,), (heads_k,), (c.q.shape[0], heads_k))
        if x.shape not in shapes:
            raise InvalidArgument(
                f"{name} must have shape (), (1,), ({heads_k},) or {shapes[-1]}, not {tuple(x.shape)}"
            )
    if (c.k_descale is None) != (c.v_descale is None):
        raise InvalidArgument("k_descale and v_descale go together; pass both or neither")
    if c.k_descale is not None and c.v_descale is not None and c.k_descale.shape != c.v_descale.shape:
        raise InvalidArgument("k_descale and v_descale must have the same shape")


def _check_append(c: CacheCall) -> None:
    if c.k is None:
        if c.v is not None:
            raise InvalidArgument("If value is supplied, key must also be passed in")
        return
    if c.v is None:
        raise InvalidArgument("If key is supplied, value must also be passed in")
    if c.cache_seqlens is None:
        raise InvalidArgument("If key is supplied, seqlens_k must also be passed in (cache_seqlens)")
    if c.q.shape[1] > c.capacity:
        raise InvalidArgument(
            f"If key is supplied, it must have seqlen <= the seqlen of the KV cache; q has {c.q.shape[1]} rows, the"
            f" cache holds {c.capacity}"
        )
    _check_rows(k=c.k, v=c.v)
    for name, x, cache in (("k", c.k, c.k_cache), ("v", c.v, c.v_cache)):
        if x.dtype != c.q.dtype:
            raise InvalidArgument(f"query and {name} must have the same dtype: {name} has {x.dtype}, q has {c.q.dtype}")
        if x.device != c.q.device:
            raise InvalidArgument(f"{name} must be on {c.q.device} like q, but is on {x.device}")
        expected = (c.q.shape[0], c.new, *cache.shape[-2:])
        if x.shape != expected:
            raise InvalidArgument(f"{name} must have shape {expected}, not {tuple(x.shape)}")


def _check_rotary(c: CacheCall) -> None:
    if (c.rotary_cos is None) != (c.rotary_sin is None):
        raise InvalidArgument("If rotary cos is provided, rotary sin must also be provided, and the other way round")
    if c.rotary_cos is None or c.rotary_sin is None:
        return
    if c.k is None:
        raise InvalidArgument(
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided"
        )
    if c.rotary_cos.ndim != 2:
        raise InvalidArgument(f"rotary_cos must have shape (seqlen, rotary_dim / 2), not {tuple(c.rotary_cos.shape)}")
    rotary_dim = 2 * c.rotary_cos.shape[-1]
    if rotary_dim > c.q.shape[-1]:
        raise InvalidArgument(f"rotary_dim must be <= headdim; it is {rotary_dim}, headdim is {c.q.shape[-1]}")
    if rotary_dim % 16 != 0:
        raise InvalidArgument(f"Only rotary dimensions divisible by 16 are currently supported, not {rotary_dim}")
    if c.rotary_cos.shape[0] < c.capacity:
        raise InvalidArgument(
            f"cos/sin seqlen must be at least the seqlen of KV cache: {c.rotary_cos.shape[0]} < {c.capacity}"
        )
    for name, x in (("rotary_cos", c.rotary_cos), ("rotary_sin", c.rotary_sin)):
        if x.dtype != c.q.dtype:
            raise InvalidArgument(f"{name} must have the same dtype as query: {x.dtype}, not {c.q.dtype}")
        if x.shape != c.rotary_cos.shape:
            raise InvalidArgument(f"{name} must have shape {tuple(c.rotary_cos.shape)}, not {tuple(x.shape)}")
        if x.device != c.q.device:
            raise InvalidArgument(f"{name} must be on {c.q.device} like q, but is on {x.device}")
        if not x.is_contiguous():
            raise InvalidArgument(f"{name} must be contiguous; call .contiguous() on it")


def check_call(c: CacheCall, inputs: AttentionInputs) -> None:
    """Raise InvalidArgument unless the call is sound; reads no device memory. `inputs` is the attention after it."""
    _check_cache(c)
    _check_descales(c)
    _check_append(c)
    _check_rotary(c)
    same = inputs if c.k_cache.dtype == c.q.dtype else inputs._replace(k=_like(inputs.k, c.q), v=_like(inputs.v, c.q))
    check_arguments(same)


def _like(x: Tensor, q: Tensor) -> Tensor:
    """A tensor of x's sizes and q's dtype without memory of its own: the common rules want equal dtypes."""
    return torch.empty(1, dtype=q.dtype, device=x.device).expand(x.shape)


def check_values(c: CacheCall) -> None:
    """Raise InvalidArgument where an append leaves the cache; reads lengths and pages, so a GPU is waited for."""
    if c.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lengths = c.cache_seqlens
    assert lengths is not None
    needed, least = int(lengths.max()) + c.new, int(lengths.min())
    if least < 0:
        raise InvalidArgument(f"cache_seqlens must not be negative, but holds {least}")
    if needed > c.capacity:
        what = "k_cache has room" if c.block_table is None else "block_table has pages"
        raise InvalidArgument(f"{what} for {c.capacity} keys a sequence, but the appended keys need {needed}")
    rows = c.k_cache.shape[0]
    if c.block_table is not None:
        size = c.k_cache.shape[1]
        columns = torch.arange(c.block_table.shape[1], device=c.q.device)
        used = c.block_table[columns < ((lengths + c.new + size - 1) // size)[:, None]]
        if bool(((used < 0) | (used >= rows)).any()):
            raise InvalidArgument(f"block_table holds a page id outside [0, {rows}) among the pages in use")
    elif c.cache_batch_idx is not None and bool(((c.cache_batch_idx < 0) | (c.cache_batch_idx >= rows)).any()):
        raise InvalidArgument(f"cache_batch_idx holds a row outside [0, {rows}) of the cache")
