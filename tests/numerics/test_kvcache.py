"""attention_with_kvcache: what is written into the cache, and attention over it against float64, on every backend."""

from typing import NamedTuple

import pytest
import torch
from serving import BACKENDS, is_interpreted

from flash_attn_plus import InvalidArgument, attention_with_kvcache, ops, use_backend
from flash_attn_plus.problem import AttentionInputs
from flash_attn_plus.reference import attention_reference
from flash_attn_plus.testing import assert_close
from flash_attn_plus.tuning import decode as tuning

CAPACITY = 192
E4M3 = torch.float8_e4m3fn


class Setup(NamedTuple):
    """A cache and the new tokens of one call."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    rows: torch.Tensor  # (b, CAPACITY): the row or page of the cache that holds each key of each sequence
    slots: torch.Tensor  # and the place within it
    options: dict


LAYOUTS = ("dense", "batch_idx", "page1", "page16", "page48")
# name -> options of the call; "new" and "rotary" are the test's own
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 0), "causal": True},
    "window_both": {"window_size": (20, 3)},
    "softcap": {"softcap": 3.0, "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "splits": {"num_splits": 5, "causal": True},
    "scale": {"softmax_scale": -0.3},
    "append": {"new": 3, "causal": True},
    "append_long": {"new": 37},
    "rotary": {"new": 3, "rotary": 16, "causal": True},
    "rotary_interleaved": {"new": 3, "rotary": 32, "rotary_interleaved": True, "causal": True, "num_splits": 3},
    "rotary_unmasked": {"new": 3, "rotary": 16},
    "leftpad": {"leftpad": True, "causal": True, "new": 2},
}


def make(layout, name, dtype, device, cache_dtype=None, queries=3, heads=4, heads_k=2, d=32, dv=32) -> Setup:
    """Random inputs; every slot of the cache that is not in use holds NaN."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    asked = dict(OPTIONS[name])
    batch, new, rotary = 3, asked.pop("new", 0), asked.pop("rotary", 0)
    options = {"cache_seqlens": torch.tensor([CAPACITY - new, 70, 0 if new else 1], dtype=torch.int32, device=device)}
    page = {"dense": CAPACITY, "batch_idx": CAPACITY}.get(layout) or int(layout.removeprefix("page"))
    pages = batch * CAPACITY // page + (0 if layout == "dense" else 2)
    table = torch.arange(pages) if layout == "dense" else torch.randperm(pages, generator=generator)
    table = table[: batch * CAPACITY // page].view(batch, -1).to(device, torch.int32)
    k_cache, v_cache = draw(pages, page, heads_k, d), draw(pages, page, heads_k, dv)
    positions = torch.arange(CAPACITY, device=device)
    rows, slots = table.long().repeat_interleave(page, 1), (positions % page).expand(batch, -1)
    unused = torch.ones(pages, page, dtype=torch.bool, device=device)
    for n, length in enumerate(options["cache_seqlens"].tolist()):
        unused[rows[n, :length], slots[n, :length]] = False
    k_cache[unused], v_cache[unused] = torch.nan, torch.nan
    if layout == "batch_idx":
        options["cache_batch_idx"] = table[:, 0].contiguous()
    elif layout != "dense":
        options["block_table"] = table
    if asked.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(batch, heads, generator=generator).to(device)
    if asked.pop("leftpad", False):
        options["cache_leftpad"] = torch.tensor([5, 69, 0], dtype=torch.int32, device=device)
    if rotary:
        angles = torch.randn(CAPACITY, rotary // 2, generator=generator)
        options |= {"rotary_cos": angles.cos().to(device, dtype), "rotary_sin": angles.sin().to(device, dtype)}
    if cache_dtype is not None:
        k_cache, v_cache = k_cache.to(cache_dtype), v_cache.to(cache_dtype)
    k, v = (draw(batch, new, heads_k, d), draw(batch, new, heads_k, dv)) if new else (None, None)
    return Setup(draw(batch, queries, heads, d), k_cache, v_cache, k, v, rows, slots, options | asked)


def turned(x, setup: Setup, first) -> torch.Tensor:
    """x in float64, its token t of sequence n turned by the angles of position first[n] + t; by complex numbers."""
    cos, sin = (setup.options[f"rotary_{name}"].double() for name in ("cos", "sin"))
    positions = first[:, None] + torch.arange(x.shape[1], device=x.device)
    factor = torch.complex(cos, sin)[positions].unsqueeze(2)
    half, out = cos.shape[1], x.double().clone()
    even, odd = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not setup.options.get("rotary_interleaved"):
        even, odd = slice(0, half), slice(half, 2 * half)
    product = torch.complex(out[..., even], out[..., odd]) * factor
    out[..., even], out[..., odd] = product.real, product.imag
    return out


def call(setup: Setup, **more):
    """(out, lse) and the caches after the call, which get the new tokens."""
    k_cache, v_cache = setup.k_cache.clone(), setup.v_cache.clone()
    out, lse = attention_with_kvcache(
        setup.q, k_cache, v_cache, setup.k, setup.v, return_lse=True, **(setup.options | more)
    )
    return out, lse, k_cache, v_cache


def expected(setup: Setup, k_cache, v_cache, dtype):
    """(out, lse) of the definition over the given caches, in `dtype`."""
    o = setup.options
    used = o["cache_seqlens"] + (0 if setup.k is None else setup.k.shape[1])
    q = setup.q
    if "rotary_cos" in o:
        is_banded = o.get("causal") or "window_size" in o
        first = o["cache_seqlens"]
        if is_banded:
            q = turned(q, setup, first).to(q.dtype)
        else:
            q = torch.cat([turned(q[:, t : t + 1], setup, first) for t in range(q.shape[1])], 1).to(q.dtype)
    left, right = o.get("window_size", (-1, -1))
    keys, values = (x[setup.rows, setup.slots] for x in (k_cache, v_cache))
    return attention_reference(
        q, keys, values, left=left, right=0 if o.get("causal") else right, softcap=o.get("softcap", 0.0),
        softmax_scale=o.get("softmax_scale"), seqused_k=used, leftpad_k=o.get("cache_leftpad"),
        alibi_slopes=o.get("alibi_slopes"), k_descale=o.get("k_descale"), v_descale=o.get("v_descale"),
        dtype=dtype, is_two_pass=dtype != torch.float64,
    )  # fmt: skip


def check(setup: Setup, out, lse, k_cache, v_cache) -> None:
    exact, eager = (expected(setup, k_cache, v_cache, dtype) for dtype in (torch.float64, setup.q.dtype))
    assert_close("out", out, exact[0], eager[0])
    assert_close("lse", lse, exact[1], eager[1])


def same_bits(a, b) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.view(kind))


BOTH = pytest.mark.parametrize("backend", BACKENDS)


def crossed() -> list:
    """(options, layout, dtype): in float32 dense only; layouts that differ in addresses only with few options."""
    found = []
    for name in OPTIONS:
        for layout in LAYOUTS:
            if name == "leftpad" and layout.startswith("page"):
                continue  # paged caches have no left padding
            if layout in ("page1", "batch_idx") and name not in ("causal", "window", "rotary", "leftpad"):
                continue
            for dtype in (torch.float16, torch.float32) if layout == "dense" else (torch.float16,):
                found.append(pytest.param(name, layout, dtype, id=f"{name}-{layout}-{str(dtype)[6:]}"))
    return found


@BOTH
@pytest.mark.parametrize(("name", "layout", "dtype"), crossed())
def test_attention_over_a_cache(backend, name, layout, dtype, device):
    setup = make(layout, name, dtype, device)
    with use_backend(backend):
        out, lse, k_cache, v_cache = call(setup)
    new = 0 if setup.k is None else setup.k.shape[1]
    k_kept, v_kept = setup.k_cache.clone(), setup.v_cache.clone()
    if new:
        at = setup.options["cache_seqlens"][:, None].long() + torch.arange(new, device=device)
        rows, slots = setup.rows.gather(1, at), setup.slots.gather(1, at)
        k_kept[rows, slots], v_kept[rows, slots] = k_cache[rows, slots], setup.v
        if "rotary_cos" in setup.options:
            exact = turned(setup.k, setup, setup.options["cache_seqlens"])
            assert_close("k", k_cache[rows, slots], exact, exact.to(dtype))
        else:
            assert same_bits(k_cache[rows, slots], setup.k)
    assert same_bits(k_cache, k_kept)
    assert same_bits(v_cache, v_kept)
    check(setup, out, lse, k_cache, v_cache)


@BOTH
@pytest.mark.parametrize("more", [0, 8])
def test_queries_behind_the_cache_turn_as_far_as_the_tables_reach(backend, more, device):
    setup = make("dense", "rotary", torch.float16, device, queries=8)
    angles = torch.outer(torch.arange(CAPACITY + 8, device=device), torch.linspace(1.0, 0.1, 8, device=device))
    angles[CAPACITY + more :] = 0.0  # what is left as it is
    tables = {"rotary_cos": angles.cos().half(), "rotary_sin": angles.sin().half()}
    given = {name: x[: CAPACITY + more] for name, x in tables.items()}
    with use_backend(backend):
        results = call(setup, **given)
    check(setup._replace(options=setup.options | tables), *results)


@BOTH
@pytest.mark.parametrize("shape", [(1, 8, 1, 24, 40), (16, 2, 2, 64, 64), (5, 16, 1, 32, 16), (40, 4, 2, 32, 32)])
def test_shapes_of_queries_and_heads(backend, shape, device):
    queries, heads, heads_k, d, dv = shape
    sizes = {"queries": queries, "heads": heads, "heads_k": heads_k, "d": d, "dv": dv}
    setup = make("page16", "splits", torch.float16, device, **sizes)
    with use_backend(backend):
        check(setup, *call(setup))


@BOTH
@pytest.mark.parametrize("layout", ["dense", "page16"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 2)], ids=("one", "heads", "sequences"))
def test_a_cache_in_8_bits(backend, layout, shape, device):
    setup = make(layout, "rotary", torch.float16, device, cache_dtype=E4M3)
    factors = torch.rand(2, *shape, device=device) + 0.5
    setup.options.update(k_descale=factors[0], v_descale=factors[1])
    with use_backend(backend):
        out, lse, k_cache, v_cache = call(setup)
    assert k_cache.dtype == E4M3
    wide = (x.float() for x in (k_cache, v_cache))
    check(setup, out, lse, *wide)
    if is_interpreted(backend):
        return  # Triton's interpreter loses the carry where rounding reaches a power of two
    at = setup.options["cache_seqlens"][:, None].long() + torch.arange(setup.k.shape[1], device=device)
    written = v_cache[setup.rows.gather(1, at), setup.slots.gather(1, at)]
    factor = factors[1] if not shape else factors[1].reshape(-1, 1) if len(shape) == 1 else factors[1][:, None, :, None]
    assert same_bits(written, (setup.v.float() / factor).to(E4M3))


@BOTH
@pytest.mark.parametrize("page", [-1, 2**31 - 1])
def test_a_cache_in_8_bits_with_pages_that_are_not_in_use(backend, page, device):
    setup = make("page16", "plain", torch.float16, device, cache_dtype=E4M3)
    setup.options["block_table"][1:, 5:] = page
    factors = torch.tensor([[0.5, 1.0], [1.0, 2.0], [2.0, 0.5]], device=device)
    setup.options.update(k_descale=factors, v_descale=factors)
    with use_backend(backend):
        out, lse, k_cache, v_cache = call(setup)
    check(setup, out, lse, k_cache.float(), v_cache.float())


@BOTH
def test_a_nan_is_not_lost_on_its_way_into_8_bits(backend, device):
    setup = make("dense", "append", torch.float16, device, cache_dtype=E4M3)
    setup.k[1, 2, 0, 5], setup.v[1, 2, 1, 7], setup.v[1, 2, 1, 8] = torch.nan, torch.nan, torch.inf
    with use_backend(backend):
        _, _, k_cache, v_cache = call(setup)
    at = int(setup.options["cache_seqlens"][1]) + 2
    assert v_cache[1, at, 1, 8].float() == 448.0
    if is_interpreted(backend):
        return  # Triton's interpreter knows no NaN of 8 bits
    assert k_cache[1, at, 0].isnan().nonzero().flatten().tolist() == [5]
    assert v_cache[1, at, 1].isnan().nonzero().flatten().tolist() == [7]


@BOTH
@pytest.mark.parametrize("layout", ["dense", "page16"])
def test_a_larger_cache_changes_no_bit(backend, layout, device):
    setup = make(layout, "splits", torch.float16, device)
    setup.options.pop("num_splits")
    more = torch.full_like(setup.k_cache, torch.nan)
    if layout == "dense":
        k_cache, v_cache = (torch.cat((x, more), 1) for x in (setup.k_cache, setup.v_cache))
        larger = setup._replace(k_cache=k_cache, v_cache=v_cache)
    else:
        table = setup.options["block_table"]
        larger = setup._replace(options=setup.options | {"block_table": torch.cat((table, table), 1)})
    with use_backend(backend):
        small, large = call(setup), call(larger)
    assert same_bits(small[0], large[0])
    assert same_bits(small[1], large[1])


@BOTH
def test_batch_invariance(backend, device, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BATCH_INVARIANT", "1")
    monkeypatch.setattr(tuning, "_INVARIANT_KEYS", 64)  # so that the sequences here are split
    setup = make("dense", "causal", torch.float16, device)
    with use_backend(backend):
        together = call(setup)
        for n in range(3):
            options = setup.options | {"cache_seqlens": setup.options["cache_seqlens"][n : n + 1]}
            alone = setup._replace(
                q=setup.q[n : n + 1],
                k_cache=setup.k_cache[n : n + 1],
                v_cache=setup.v_cache[n : n + 1],
                options=options,
            )
            assert same_bits(call(alone)[0], together[0][n : n + 1])


@pytest.mark.parametrize("layout", ["dense", "page16"])
def test_nothing_is_written_outside_the_cache(layout, device):
    """On a GPU, where lengths are not looked at; the interpreter stands in for one."""
    from flash_attn_plus import cache_append
    from flash_attn_plus.cache_checks import CacheCall

    setup = make(layout, "append", torch.float16, device)
    lengths = setup.options["cache_seqlens"] + torch.tensor([0, 0, 10 * CAPACITY], dtype=torch.int32, device=device)
    lengths[0] = CAPACITY - 1
    table = setup.options.get("block_table")
    if table is not None:
        table[1, 70 // 16] = 1_000_000
    whole = torch.zeros((len(setup.k_cache) + 2, *setup.k_cache.shape[1:]), dtype=torch.float16, device=device)
    k_cache, v_cache = whole[1:-1], whole.clone()[1:-1]
    asked = CacheCall(
        setup.q, k_cache, v_cache, setup.k, setup.v, None, None, lengths, None, None, table, None, None, None,
        1.0, -1, 0, 0.0, False, 0,
    )  # fmt: skip
    with use_backend("triton"):
        appended = cache_append.plan(asked)(asked, table)
    assert appended.used.tolist() == (lengths + 3).tolist()
    written = whole.any(-1).any(-1)
    assert not written[0].any()
    assert not written[-1].any()
    assert int(written.sum()) == (1 if table is not None else 1 + 3)  # of 9 new tokens, those with a place


# name -> layout, shape, options of the call
JOINED = {
    "window shorter than the new keys": ("dense", {"queries": 1}, {"new": 16, "window_size": (3, 0)}),
    "window, pages of one key": ("page1", {"queries": 5}, {"new": 13, "window_size": (5, 0), "num_splits": 4}),
    "new keys in several splits": ("page16", {"queries": 16}, {"new": 16, "causal": True, "num_splits": 8}),
    "queries of several tiles": ("dense", {"queries": 16, "heads": 8, "heads_k": 1}, {"new": 12, "causal": True}),
    "chosen rows": ("batch_idx", {"queries": 2}, {"new": 2, "causal": True}),
}


@pytest.mark.parametrize("name", JOINED)
def test_attention_appends_a_few_keys_itself(name, device, monkeypatch):
    from flash_attn_plus import cache_append

    layout, shape, options = JOINED[name]
    monkeypatch.setitem(OPTIONS, name, options)
    monkeypatch.setattr(cache_append.TritonAppend, "__call__", None)
    setup = make(layout, name, torch.float16, device, **shape)
    with use_backend("triton"):
        out, lse, k_cache, v_cache = call(setup)
    at = setup.options["cache_seqlens"][:, None].long() + torch.arange(options["new"], device=device)
    rows, slots = setup.rows.gather(1, at), setup.slots.gather(1, at)
    k_kept, v_kept = setup.k_cache.clone(), setup.v_cache.clone()
    k_kept[rows, slots], v_kept[rows, slots] = setup.k, setup.v
    assert same_bits(k_cache, k_kept)
    assert same_bits(v_cache, v_kept)
    check(setup, out, lse, k_cache, v_cache)


def test_attention_writes_nothing_outside_the_cache(device):
    setup = make("dense", "append", torch.float16, device)
    lengths = torch.tensor([CAPACITY - 1, 70, 10 * CAPACITY], dtype=torch.int32, device=device)
    whole = torch.zeros((2, 5, *setup.k_cache.shape[1:]), dtype=torch.float16, device=device)
    inputs = AttentionInputs(setup.q, *whole[:, 1:-1], 1.0, seqused_k=lengths)
    with use_backend("triton"):
        out, lse = ops.allocate_outputs(setup.q, setup.q, False)
        ops.plan_forward(inputs, -1, 0)(inputs, out, lse, (setup.k, setup.v))
    for x in whole:
        written = x.any(-1).any(-1)
        assert not written[0].any()
        assert not written[-1].any()
        assert int(written.sum()) == 1 + 3


@pytest.mark.parametrize("what", ["length", "page", "row"])
def test_debug_mode_names_what_lies_outside(what, device, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_DEBUG", "1")
    setup = make({"length": "dense", "page": "page16", "row": "batch_idx"}[what], "append", torch.float16, device)
    if what == "length":
        setup.options["cache_seqlens"][0] += 1
    elif what == "page":
        setup.options["block_table"][1, 4] = -1
    else:
        setup.options["cache_batch_idx"][1] = 99
    message = {"length": "k_cache has room", "page": "block_table holds a page", "row": "cache_batch_idx holds"}[what]
    with pytest.raises(InvalidArgument, match=message):
        call(setup)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "cache_batch_idx"])
def test_one_number_is_no_cache(name, device):
    setup = make("batch_idx", "append", torch.float16, device)
    if name == "cache_batch_idx":
        setup.options[name] = setup.options[name].sum().int()
    else:
        setup = setup._replace(**{name: getattr(setup, name).sum()})
    with pytest.raises(InvalidArgument, match=f"{name} must have shape"):
        call(setup)


@BOTH
def test_no_new_keys_and_no_lengths(backend, device):
    """Without lengths the whole cache counts; an int holds for every sequence."""
    setup = make("dense", "plain", torch.float16, device)
    k_cache, v_cache = (x.nan_to_num(0.5) for x in (setup.k_cache, setup.v_cache))
    full = torch.full((3,), CAPACITY, dtype=torch.int32, device=device)
    with use_backend(backend):
        results = [
            attention_with_kvcache(setup.q, k_cache, v_cache, cache_seqlens=lengths)
            for lengths in (None, CAPACITY, full)
        ]
    assert same_bits(results[0], results[1])
    assert same_bits(results[1], results[2])


@BOTH
@pytest.mark.parametrize("name", ["append", "rotary"])
def test_an_append_of_no_rows_attends_the_old_ones(backend, name, device):
    setup = make("dense", name, torch.float32, device)
    empty = setup._replace(k=setup.k[:, :0], v=setup.v[:, :0])
    without = setup._replace(k=None, v=None, options=dict(setup.options))
    if name == "rotary":  # turns the queries all the same, and a turn of 0 leaves them
        for table, value in (("rotary_cos", 1.0), ("rotary_sin", 0.0)):
            empty.options[table] = torch.full_like(empty.options[table], value)
            del without.options[table]
    with use_backend(backend):
        results = [call(x) for x in (empty, without)]
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))
