"""attention_with_kvcache over random crossings of its options: not a bit of memory around the new keys may change.

Caches are slices of larger tensors of NaN, page tables hold numbers of no page behind the keys in use, new keys may be
views of one row, and lengths may leave no room for all of them: a GPU is not waited for to tell.
"""

import random
from typing import NamedTuple

import pytest
import torch
from serving import BACKENDS

from flash_attn_plus import attention_with_kvcache, kvcache, use_backend
from flash_attn_plus.reference import attention_reference
from flash_attn_plus.testing import assert_close

SEEDS = range(10)
NO_PAGE = (-1, 1_000_000, 2**31 - 1)


class Crossing(NamedTuple):
    """One call, and where the keys of each sequence lie."""

    q: torch.Tensor
    buffers: tuple[torch.Tensor, torch.Tensor]  # that the caches are slices of
    inside: tuple[slice, slice, slice]  # rows or pages, slots and heads
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor  # (b, capacity): the row or page of each key
    slots: torch.Tensor
    lengths: torch.Tensor
    options: dict

    def caches(self, buffers) -> list[torch.Tensor]:
        """The slices of such buffers."""
        return [x[self.inside][..., : new.shape[-1]] for x, new in zip(buffers, (self.k, self.v), strict=True)]

    def written(self) -> tuple[torch.Tensor, ...]:
        """(sequence, new key, row, slot) of the new keys that have a place."""
        at = self.lengths[:, None] + torch.arange(self.k.shape[1])
        sequence, number = (at < self.rows.shape[1]).nonzero(as_tuple=True)
        at = at[sequence, number]
        return sequence, number, self.rows[sequence, at], self.slots[sequence, at]


def _layout(rng: random.Random, batch: int, page: int, lengths: list[int], capacity: int) -> tuple[torch.Tensor, dict]:
    """(the row or page of each page of each sequence, the option that tells it)."""
    per_sequence = capacity // page
    ids = torch.tensor(rng.sample(range(batch * per_sequence + 2), batch * per_sequence)).view(batch, per_sequence)
    if per_sequence == 1 and rng.random() < 0.5:
        return torch.arange(batch)[:, None], {}
    if per_sequence == 1:
        return ids, {"cache_batch_idx": ids[:, 0].int().contiguous()}
    told = ids.int()
    for n, length in enumerate(lengths):
        told[n, -(-min(length, capacity) // page) :] = rng.choice(NO_PAGE)
    return ids, {"block_table": told}


def cross(seed: int, may_overflow: bool) -> Crossing:
    """A random call; every slot of the cache that is not in use, and all memory around it, holds NaN."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    batch, heads_k, group = rng.randint(1, 3), rng.randint(1, 2), rng.choice((1, 3, 8))
    d, dv = rng.choice((3, 16, 33, 64, 80)), rng.choice((1, 16, 40, 64))
    queries, new = rng.choice((1, 1, 2, 5)), rng.choice((0, 1, 1, 2, 7, 16, 17))
    page = rng.choice((1, 3, 16, 0, 0))
    capacity = rng.randint(20, 150)
    page, capacity = (page, capacity // page * page) if page else (capacity, capacity)
    most = capacity + 2 if may_overflow else capacity - new
    lengths = [rng.choice((0, most, rng.randint(0, capacity - new))) for _ in range(batch)]
    ids, options = _layout(rng, batch, page, [length + new for length in lengths], capacity)
    pages, guard = int(ids.max()) + 2, rng.randint(0, 1)
    wide = [torch.full((pages + 2, page + guard, heads_k + guard, x + 8 * guard), torch.nan).half() for x in (d, dv)]
    inside = (slice(1, -1), slice(0, page), slice(guard, None))
    rows, slots = ids.repeat_interleave(page, 1), (torch.arange(capacity) % page).expand(batch, -1)
    for buffer, x in zip(wide, (d, dv), strict=True):
        cache = buffer[inside][..., :x]
        for n, length in enumerate(lengths):
            used = min(length, capacity)
            cache[rows[n, :used], slots[n, :used]] = draw(used, heads_k, x)
    k, v = draw(batch, new, heads_k, d), draw(batch, new, heads_k, dv)
    if rng.random() < 0.3:
        k, v = k[:, :, :1].expand(-1, -1, heads_k, -1), v[:1].expand(batch, -1, -1, -1)
    options |= {"causal": rng.random() < 0.5, "num_splits": rng.choice((0, 1, 2, 7))}
    options["window_size"] = rng.choice(((-1, -1), (-1, -1), (0, 5), (20, 0), (rng.randint(0, 90), -1)))
    options["softcap"] = rng.choice((0.0, 0.0, 3.0))
    if rng.random() < 0.3:
        options["alibi_slopes"] = torch.rand(batch, heads_k * group, generator=generator)
    q = draw(batch, queries, heads_k * group, d)
    return Crossing(q, tuple(wide), inside, k, v, rows, slots, torch.tensor(lengths), options)


def expected(c: Crossing, k_cache, v_cache, dtype):
    o, capacity = c.options, c.rows.shape[1]
    left, right = o["window_size"]
    keys, values = (x[c.rows, c.slots] for x in (k_cache, v_cache))
    used = (c.lengths + c.k.shape[1]).clamp(max=capacity).int()
    return attention_reference(
        c.q, keys, values, left=left, right=0 if o["causal"] else right, softcap=o["softcap"], seqused_k=used,
        alibi_slopes=o.get("alibi_slopes"), dtype=dtype, is_two_pass=dtype != torch.float64,
    )  # fmt: skip


def attend(c: Crossing, device: str):
    """(out, lse), and the buffers after the call."""
    on_device = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    buffers = [x.to(device, copy=True) for x in c.buffers]
    options = {name: on_device(x) for name, x in c.options.items()}
    out, lse = attention_with_kvcache(
        on_device(c.q), *c.caches(buffers), on_device(c.k), on_device(c.v), cache_seqlens=on_device(c.lengths.int()),
        return_lse=True, **options,
    )  # fmt: skip
    return out.cpu(), lse.cpu(), *(x.cpu() for x in buffers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_crossing(seed, backend, device, monkeypatch):
    may_overflow = backend == "triton" and seed % 2 == 1
    if may_overflow:
        monkeypatch.setattr(kvcache, "check_values", lambda _: None)
    c = cross(seed, may_overflow)
    with use_backend(backend):
        out, lse, *buffers = attend(c, device)
    sequence, number, row, slot = c.written()
    kept = [x.clone() for x in c.buffers]
    for cache, new in zip(c.caches(kept), (c.k, c.v), strict=True):
        cache[row, slot] = new[sequence, number]
    for before, after in zip(kept, buffers, strict=True):
        assert torch.equal(before.view(torch.int16), after.view(torch.int16))
    exact, eager = (expected(c, *c.caches(buffers), dtype) for dtype in (torch.float64, torch.float16))
    assert_close("out", out, exact[0], eager[0])
    assert_close("lse", lse, exact[1], eager[1])
