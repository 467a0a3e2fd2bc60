"""Attention over a key/value cache: append in place, then attend, without waiting for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_plus import cache_append, checks, device, env, ops
from flash_attn_plus.arguments import as_integer, as_number, resolve_scale, window_bounds
from flash_attn_plus.cache_checks import CacheCall, check_call, check_shapes, check_values
from flash_attn_plus.derivatives import refuse_tangents
from flash_attn_plus.dispatch import may_skip_dispatcher
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.fused.path import uses_triton
from flash_attn_plus.problem import AttentionInputs
from flash_attn_plus.selection import state


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few queries over a cache, into which new keys and values are written first. No gradients.

    Args:
        q: (b, sq, h, d); float16, bfloat16, float32 or float64.
        k_cache, v_cache: (rows, capacity, hk, d), or with block_table (pages, page_size, hk, d) of any page size;
            in q's dtype or float8_e4m3fn; written in place. The last stride is 1, the others are free.
        k, v: (b, new, hk, d) in q's dtype, written at positions cache_seqlens to cache_seqlens + new - 1.
            Sequences that share rows or pages must not count on what another one appends in the same call.
        rotary_cos, rotary_sin: (at least the capacity, rotary_dim / 2) in q's dtype, with k and v only. New key t
            turns by the angle of position cache_seqlens + t; so does query t under a causal or window mask, while
            without one every query turns by that of cache_seqlens.
        cache_seqlens: int, or int32 (b,): keys already present, left padding included; default the capacity.
        cache_batch_idx: int32 (b,), the row of the cache that each sequence uses; not with block_table.
        cache_leftpad: int32 (b,), index of the first valid key; not with block_table.
        block_table: int32 (b, max_blocks), the pages of each sequence.
        rotary_interleaved: turn pairs (0, 1), (2, 3), ... instead of (t, t + rotary_dim / 2).
        num_splits: programs that share the keys of one sequence, at most 128; 0: as many as fill the device.
        k_descale, v_descale: float32 (), (hk,) or (b, hk): what float8_e4m3fn caches are multiplied with. A NaN among
            8-bit values may be read as 480, the number behind the largest; among keys it stays one.
        The other arguments are those of `attention`.

    Returns:
        out (b, sq, h, d), and with `return_lse` the float32 LSE (b, h, sq).

    Raises:
        InvalidArgument: an argument breaks the contract. Lengths beyond the capacity and pages that do not exist are
            seen on CPU and with FLASH_ATTENTION_DEBUG=1, since reading them from a GPU would wait for it; nothing is
            written outside the cache in any case.
    """
    left, right = window_bounds(window_size, causal)
    call = CacheCall(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, lengths_of(cache_seqlens, q), cache_batch_idx, cache_leftpad,
        block_table, alibi_slopes, k_descale, v_descale, resolve_scale(softmax_scale, q), left, right,
        as_number("softcap", softcap), rotary_interleaved, as_integer("num_splits", num_splits),
    )  # fmt: skip
    out, lse = attend(call)
    return (out, lse) if return_lse else out


def lengths_of(cache_seqlens: Any, q: Tensor) -> Tensor | None:
    """One length for all sequences as the lengths of each; lengths of each, and None, stay what they are."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        is_one = cache_seqlens.ndim == 0 and not cache_seqlens.is_floating_point()
        return cache_seqlens.to(q.device, torch.int32).expand(q.shape[0]).contiguous() if is_one else cache_seqlens
    length = as_integer("cache_seqlens", cache_seqlens)
    if isinstance(length, int) and not 0 <= length < 2**31:
        raise InvalidArgument(f"cache_seqlens must be a number of keys, or int32 (batch,), not {length}")
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def attend(c: CacheCall) -> tuple[Tensor, Tensor]:
    """(out, LSE) of a call whose numbers are resolved."""
    if not torch.compiler.is_compiling():
        new = () if c.k is None or c.v is None else (c.k, c.v)
        if may_skip_dispatcher(c.q, c.k_cache, c.v_cache, *new):
            return run(c)
        refuse_tangents(c.q, c.k_cache, c.v_cache, c.k, c.v)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return attend(c)
    return torch.ops.flash_attn_plus.attend_cache(*c)


def _table(c: CacheCall) -> Tensor | None:
    """The page table of a call: a dense cache of chosen rows is a paged one with one page a sequence."""
    return c.block_table if c.cache_batch_idx is None else c.cache_batch_idx[:, None]


def _inputs(c: CacheCall, q: Tensor, lengths: Tensor | None, table: Tensor | None) -> AttentionInputs:
    """The attention of a call, with the given queries, lengths and page table."""
    keys, values, pad = c.k_cache, c.v_cache, c.cache_leftpad
    if table is None:
        if keys.shape[0] != q.shape[0]:
            keys, values = keys[: q.shape[0]], values[: q.shape[0]]
    else:
        pad = None  # it has no paged form
        if lengths is None:
            lengths = torch.full((q.shape[0],), c.capacity, dtype=torch.int32, device=q.device)
    return AttentionInputs(
        q, keys, values, c.softmax_scale, c.softcap, 0.0, None, None, lengths, pad, table, c.alibi_slopes, None,
        c.k_descale, c.v_descale,
    )  # fmt: skip


class _Plan:
    """What calls that differ in their tensors' contents only have in common: checked once, launched alike."""

    def __init__(self, c: CacheCall):
        check_shapes(c)
        # Left padding has no paged form; 8-bit caches are read by Triton's kernels only.
        self._must_gather = c.cache_leftpad is not None and c.cache_batch_idx is not None
        is_wide = c.k_cache.dtype == c.q.dtype
        self._must_widen = not is_wide and not (uses_triton(c.q) and device.reads_e4m3(c.q.device))
        self._forward: Callable[..., None] | None = None
        # Of no new rows Triton would run no program, and nothing would tell the lengths.
        self._append = cache_append.plan(c) if c.new > 0 or c.rotary_cos is not None else None
        self._is_recorded = not uses_triton(c.q)  # by autograd, which does not see what Triton's kernels do
        self._is_debug = env.debug()
        is_plain = is_wide and c.rotary_cos is None and not self._must_gather
        self._may_join = is_plain and c.new > 0 and uses_triton(c.q)
        self._is_joined = False  # the kernel that attends appends, too
        self._reads_lengths = c.k is not None and (self._is_debug or c.q.device.type == "cpu")
        is_whole = c.k_cache.shape[0] == c.q.shape[0] if c.block_table is None else c.cache_seqlens is not None
        must_change = self._must_gather or self._must_widen or c.cache_batch_idx is not None or not is_whole
        # Later calls are launches on the tensors as they are: so are most steps, which then look no further.
        self._is_bare = not (must_change or self._append is not None or self._is_recorded or self._is_debug)
        self._likes: tuple[Tensor, Tensor] | None = None
        check_call(c, _inputs(c, c.q, c.cache_seqlens, _table(c)))

    def __call__(self, c: CacheCall) -> tuple[Tensor, Tensor]:
        if self._is_bare and self._likes is not None and self._forward is not None:
            like_out, like_lse = self._likes
            out, lse = torch.empty_like(like_out), torch.empty_like(like_lse)
            inputs = AttentionInputs(
                c.q, c.k_cache, c.v_cache, c.softmax_scale, c.softcap, 0.0, None, None, c.cache_seqlens,
                c.cache_leftpad, c.block_table, c.alibi_slopes, None, c.k_descale, c.v_descale,
            )  # fmt: skip
            self._forward(inputs, out, lse)
            return out, lse
        if self._is_recorded and torch.is_grad_enabled():
            with torch.no_grad():
                return self(c)
        q, lengths, table = c.q, c.cache_seqlens, _table(c)
        if self._append is not None:
            if self._reads_lengths:
                check_values(c)
            if self._forward is None and self._may_join:
                forward = ops.plan_forward(_inputs(c, q, lengths, table), c.left, c.right, c.num_splits)
                self._is_joined = c.new <= getattr(forward, "most_new", 0)
            if not self._is_joined:
                q, lengths = self._append(c, table)
        inputs = _inputs(c, q, lengths, table)
        if self._must_gather:
            keys, values = (x.index_select(0, c.cache_batch_idx) for x in (c.k_cache, c.v_cache))
            inputs = inputs._replace(k=keys, v=values, leftpad_k=c.cache_leftpad, block_table=None)
        if self._must_widen:
            inputs = _widened(inputs)
        if self._is_debug:
            checks.check_values(inputs, c.q.shape[1], c.capacity)
        if self._forward is None or self._likes is None:
            self._forward = ops.plan_forward(inputs, c.left, c.right, c.num_splits)
            out, lse = ops.allocate_outputs(inputs.q, inputs.v, False)
            self._likes = out.new_empty(()).expand(out.shape), lse.new_empty(()).expand(lse.shape)
        else:
            like_out, like_lse = self._likes  # a third of the time of torch.empty
            out, lse = torch.empty_like(like_out), torch.empty_like(like_lse)
        if self._is_joined:
            self._forward(inputs, out, lse, (c.k, c.v))
        else:
            self._forward(inputs, out, lse)
        return out, lse


# Plans of recent calls, by everything that they may depend on; emptied when full.
_plans: dict[tuple, _Plan] = {}
_MAX_PLANS = 4096
_TENSORS = CacheCall._fields.index("softmax_scale")  # the fields before it


def run(c: CacheCall) -> tuple[Tensor, Tensor]:
    """What `attend` does, in eager mode and without gradients."""
    q, k_cache, v_cache = c.q, c.k_cache, c.v_cache
    alignment = 0
    if q.is_cuda or v_cache.dtype != q.dtype:
        alignment = (q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) & 15
    fields: tuple[Any, ...] = c
    try:
        tensors = [x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in fields[:_TENSORS]]
    except AttributeError:
        checks.refuse_strangers(dict(zip(c._fields[:_TENSORS], fields, strict=False)))
        raise
    key = (*tensors, fields[_TENSORS:], alignment, state())
    plan = _plans.get(key)
    if plan is None:
        plan = _Plan(c)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan(c)


# The same as one operator, so that torch.compile takes the call without a break. Its order is that of CacheCall.
_library = torch.library.Library("flash_attn_plus", "FRAGMENT")
_library.define(
    "attend_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? rotary_cos,"
    " Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table,"
    " Tensor? alibi_slopes, Tensor? k_descale, Tensor? v_descale, float softmax_scale, SymInt left, SymInt right,"
    " float softcap, bool rotary_interleaved, SymInt num_splits) -> (Tensor out, Tensor lse)"
)


def _operator(*arguments) -> tuple[Tensor, Tensor]:
    return run(CacheCall(*arguments))


def _operator_fake(*arguments) -> tuple[Tensor, Tensor]:
    c = CacheCall(*arguments)
    check_shapes(c)
    check_call(c, _inputs(c, c.q, c.cache_seqlens, _table(c)))
    return ops.allocate_outputs(c.q, c.v_cache, False)


_library.impl("attend_cache", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_plus::attend_cache", _operator_fake, lib=_library)


def _widened(x: AttentionInputs) -> AttentionInputs:
    """The inputs with 8-bit caches multiplied out in q's dtype, for backends that read no other."""
    keys, values, table = x.k, x.v, x.block_table
    if x.k_descale is not None and x.k_descale.ndim == 2 and table is not None:  # a factor a sequence: no shared pages
        pages = table.long().clamp(0, len(keys) - 1)  # those behind the keys in use may have any number
        keys, values = (t[pages].flatten(1, 2) for t in (keys, values))
        table = None

    def widen(cache: Tensor, descale: Tensor | None) -> Tensor:
        return (cache.float() if descale is None else cache.float() * cache_append.by_head(descale)).to(x.q.dtype)

    return x._replace(
        k=widen(keys, x.k_descale), v=widen(values, x.v_descale), block_table=table, k_descale=None, v_descale=None
    )
