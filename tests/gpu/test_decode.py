"""Decode steps on a GPU: captured into graphs, without waiting for the device, bit by bit as in eager mode."""

import pytest
import torch
from graphs import captured

from flash_attn_plus import attention_with_kvcache
from flash_attn_plus.backends import triton_counters
from flash_attn_plus.reference import attention_reference
from flash_attn_plus.testing import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (900, 17, 0, 1000)


def step_over(capacity, page=0, dtype=torch.bfloat16, is_rotary=True):
    """A decode step with append, and rotary or not, over caches of the given capacity, and what it writes into."""
    generator = torch.Generator("cuda").manual_seed(3)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator).to(dtype)  # noqa: E731
    q, k, v = draw(4, 1, 8, 64), draw(4, 1, 2, 64), draw(4, 1, 2, 64)
    angles = torch.randn(4096, 16, device="cuda", generator=generator)
    rows = draw(2, 4, 1024, 2, 64)
    caches = torch.full((2, 4, capacity, 2, 64), torch.nan, device="cuda", dtype=dtype)
    caches[:, :, :1024] = rows
    options = {"cache_seqlens": torch.tensor(LENGTHS, device="cuda", dtype=torch.int32), "causal": True}
    if is_rotary:
        options |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    k_cache, v_cache = caches
    if page:
        options["block_table"] = torch.arange(4 * capacity // page, device="cuda", dtype=torch.int32).view(4, -1)
        k_cache, v_cache = (x.view(-1, page, 2, 64) for x in (k_cache, v_cache))
    return lambda: attention_with_kvcache(q, k_cache, v_cache, k, v, return_lse=True, **options), caches


@pytest.mark.parametrize("is_rotary", [False, True])
@pytest.mark.parametrize("page", [0, 1, 16, 256])
def test_a_graph_replays_what_eager_mode_computes(page, is_rotary):
    step, _ = step_over(1024, page, is_rotary=is_rotary)
    eager = step()
    graph, results = captured(step)
    for x in results:
        x.fill_(torch.nan)
    graph.replay()
    for x, y in zip(results, eager, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("page", [0, 16])
def test_a_graph_over_a_larger_cache_changes_no_bit(page):
    eager = step_over(1024, page)[0]()
    graph, results = captured(step_over(4096, page)[0])
    graph.replay()
    for x, y in zip(results, eager, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("page", [0, 16])
def test_nothing_waits_for_the_device(page):
    step, _ = step_over(1024, page)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_are_bitwise_equal():
    step, _ = step_over(1024)
    first = step()
    for _ in range(50):
        for x, y in zip(step(), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("are_used_up", [False, True], ids=["counters kept ready", "counters cleared by the graph"])
def test_graphs_and_streams_at_the_same_time_do_not_meet(are_used_up, monkeypatch):
    """Programs that share keys count each other; those of another launch must not."""
    steps = [step_over(1024)[0], step_over(1024, 16)[0]]
    eager = [step() for step in steps]
    if are_used_up:
        none = torch.zeros(0, dtype=torch.int32, device="cuda")
        monkeypatch.setattr(triton_counters.of(eager[0][0].device), "_of_graphs", none)
    graphs = [captured(step) for step in steps]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), step, stream in zip(graphs, steps, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                results = step()
    torch.cuda.synchronize()
    for (_, replayed), expected in zip(graphs, eager, strict=True):
        for x, y in zip(replayed, expected, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(results, eager[-1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("most_kept", [0, 1 << 16, triton_counters._MOST_KEPT])
def test_launches_that_want_more_room_or_less_take_turns(most_kept, monkeypatch):
    monkeypatch.setattr(triton_counters, "_MOST_KEPT", most_kept)
    monkeypatch.setattr(triton_counters.of(torch.device("cuda", 0)), "_of_stream", {})
    steps = [step_over(length, page, is_rotary=False)[0] for length in (1024, 8192, 2048) for page in (0, 16)]
    expected = [step() for step in steps]
    for _ in range(3):
        for step, results in zip(steps, expected, strict=True):
            for x, y in zip(step(), results, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_sequence_does_not_see_the_batch_when_asked(cache_dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BATCH_INVARIANT", "1")
    q = torch.randn(300, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(300, 2048, 2, 128, device="cuda").to(cache_dtype) for _ in range(2))
    lengths = torch.randint(0, 2049, (300,), device="cuda", dtype=torch.int32)
    everyone = attention_with_kvcache(q, k, v, cache_seqlens=lengths)
    for few in (slice(3, 4), slice(0, 100)):
        some = attention_with_kvcache(q[few], k[few], v[few], cache_seqlens=lengths[few])
        assert torch.equal(some, everyone[few])


@pytest.mark.parametrize(
    ("d", "dv", "cache_dtype", "start"),
    [
        (33, 1, torch.float16, 0),
        (64, 16, torch.float16, 1),
        (64, 64, torch.float8_e4m3fn, 0),
        (128, 64, torch.float8_e4m3fn, 0),
    ],
    ids=str,
)
def test_many_queries_find_keys_that_are_not_copied_asynchronously(d, dv, cache_dtype, start):
    """With those of 4 heads they are the rows of a warpgroup, whose products would read elsewhere."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator).half()  # noqa: E731
    q, lengths = draw(2, 16, 8, d), torch.tensor([96, 31], dtype=torch.int32)
    k, v = (draw(2 * 96 * 2 * n + start)[start:].view(2, 96, 2, n).to(cache_dtype) for n in (d, dv))
    caches = [torch.empty(x.numel() + start, dtype=cache_dtype, device="cuda")[start:].view(x.shape) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache.copy_(x)
    results = attention_with_kvcache(q.cuda(), *caches, cache_seqlens=lengths.cuda(), causal=True, return_lse=True)
    exact, eager = (
        attention_reference(q, k.half(), v.half(), right=0, seqused_k=lengths, dtype=dtype, is_two_pass=is_two_pass)
        for dtype, is_two_pass in ((torch.float64, False), (torch.float16, True))
    )
    for name, x, *expected in zip(("out", "lse"), results, exact, eager, strict=False):
        assert_close(name, x.cpu(), *expected)
