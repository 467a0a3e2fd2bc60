"""Decode steps over dense caches of head dim 128, whose keys Hopper's copy engine brings in, against float64."""

import pytest
import torch
from graphs import captured

from flash_attn_plus import attention_with_kvcache, device, kvcache
from flash_attn_plus.backends import gluon_decode
from flash_attn_plus.reference import attention_reference
from flash_attn_plus.testing import assert_close

IS_HOPPER = torch.cuda.is_available() and device.probe(torch.device("cuda", 0)).family == "cuda90"
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
CAPACITY = 1000


@pytest.fixture
def served(monkeypatch):
    """The plans of the kernel under test, None where another serves."""
    plans = []
    plan = gluon_decode.plan
    monkeypatch.setattr(kvcache, "_plans", {})
    monkeypatch.setattr(gluon_decode, "plan", lambda *call: plans.append(plan(*call)) or plans[-1])
    return plans


def make(lengths, heads=32, heads_k=8, queries=1, dtype=torch.bfloat16, capacity=CAPACITY):
    """q, caches with NaN beyond the lengths, and the lengths."""
    generator = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator).to(dtype)  # noqa: E731
    q, rows = draw(len(lengths), queries, heads, 128), draw(2, len(lengths), max(lengths), heads_k, 128)
    caches = torch.full((2, len(lengths), capacity, heads_k, 128), torch.nan, device="cuda", dtype=dtype)
    for i, length in enumerate(lengths):
        caches[:, i, :length] = rows[:, i, :length]
    return q, *caches, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def check(results, q, k, v, lengths, **options):
    q, k, v, lengths = q.cpu(), k.cpu(), v.cpu(), lengths.cpu()
    exact, eager = (
        attention_reference(q, k, v, seqused_k=lengths, dtype=dtype, is_two_pass=is_two_pass, **options)
        for dtype, is_two_pass in ((torch.float64, False), (q.dtype, True))
    )
    for name, x, *expected in zip(("out", "lse"), results, exact, eager, strict=False):
        assert_close(name, x.cpu(), *expected)


def random_lengths(batch, longest):
    lengths = torch.randint(0, longest + 1, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    return (longest, *lengths[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "heads_k", "queries"), [(32, 8, 1), (8, 8, 1), (8, 1, 1), (8, 2, 2), (6, 2, 2), (2, 2, 5)], ids=str
)
@pytest.mark.parametrize(("programs", "longest"), [(8, 1000), (24, 257), (48, 500), (128, 300), (200, 300), (960, 150)])
def test_against_float64(programs, longest, heads, heads_k, queries, dtype, served):
    lengths = random_lengths(programs // heads_k, longest)
    q, k, v, used = make(lengths, heads, heads_k, queries, dtype, longest + 1)
    results = attention_with_kvcache(q, k, v, cache_seqlens=used, causal=True, return_lse=True)
    assert served[0] is not None
    check(results, q, k, v, used, right=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("programs", "heads", "heads_k", "queries"),
    [(1, 32, 1, 1), (8, 32, 8, 8), (8, 9, 1, 1), (24, 32, 8, 3), (33, 9, 3, 7), (100, 32, 1, 1), (132, 24, 2, 1)],
    ids=str,
)
def test_more_rows_against_float64(programs, heads, heads_k, queries, dtype, served):
    lengths = random_lengths(programs // heads_k, 700)
    q, k, v, used = make(lengths, heads, heads_k, queries, dtype, 701)
    results = attention_with_kvcache(q, k, v, cache_seqlens=used, causal=True, return_lse=True)
    assert served[0] is not None
    check(results, q, k, v, used, right=0)


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0, 0), (127, 128, 129), (0, 1000)], ids=str)
def test_ends_of_tiles_and_sequences_without_keys(lengths, served):
    q, k, v, used = make(lengths)
    results = attention_with_kvcache(q, k, v, cache_seqlens=used, return_lse=True)
    assert served[0] is not None
    check(results, q, k, v, used)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 17, 128])
def test_numbers_of_splits(number, served):
    q, k, v, used = make((1000, 5, 384))
    results = attention_with_kvcache(q, k, v, cache_seqlens=used, num_splits=number, return_lse=True)
    assert served[0] is not None
    check(results, q, k, v, used)


def test_heads_before_rows_and_rows_apart(served):
    """Caches (b, hk, s, d), and rows that are part of longer ones."""
    q, k, v, used = make((900, 300, 77))
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    wide = torch.cat((k, v), -1)
    for caches in (by_head, (wide[..., :128], wide[..., 128:])):
        check(attention_with_kvcache(q, *caches, cache_seqlens=used, return_lse=True), q, k, v, used)
    assert served[1] is not None


def test_all_of_a_cache(served):
    q, k, v, used = make((CAPACITY,) * 3)
    results = attention_with_kvcache(q, k, v, return_lse=True)
    assert served[0] is not None
    check(results, q, k, v, used)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_repeats_graphs_and_larger_caches_change_no_bit(batch, served):
    lengths = random_lengths(batch, 1000)
    steps = []
    for capacity in (1000, 4000):
        call = make(lengths, capacity=capacity)
        steps.append(lambda c=call: attention_with_kvcache(*c[:3], cache_seqlens=c[3], return_lse=True))
    expected = steps[0]()
    graphs = [captured(step) for step in steps]
    for _ in range(20):
        for (graph, results), step in zip(graphs, steps, strict=True):
            for x in results:
                x.fill_(torch.nan)
            graph.replay()
            for found in (results, step()):
                for x, y in zip(found, expected, strict=True):
                    assert torch.equal(x, y)
    assert all(plan is not None for plan in served)


def test_what_it_does_not_serve_goes_elsewhere(served):
    q, k, v, used = make((900, 300))
    results = attention_with_kvcache(q, k, v, cache_seqlens=used, window_size=(100, 0), return_lse=True)
    assert served == [None]
    check(results, q, k, v, used, left=100, right=0)
