"""How keys are shared out: by batch, heads and device alone, and by the rows that were measured."""

import pytest
import torch

from flash_attn_plus.device import Device
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.tuning import decode

H200 = Device("cuda90", 227 * 1024, 132)
CUDA = torch.device("cuda")


def problem(batch=1, keys=8192, heads=32, heads_k=8, d=128, queries=1, **more):
    return AttentionProblem(
        CUDA, torch.bfloat16, batch, queries, keys, heads, heads_k, d, d, has_seqused_k=True, **more
    )


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("queries", [1, 8, 16])
def test_the_measured_row_comes_first(d, queries):
    rows = max(16, 4 * queries)
    assert decode.configs(problem(64, d=d, queries=queries), H200)[0] == decode._MEASURED[d][rows]


def test_few_programs_of_many_rows_get_the_row_that_combines_them_soon():
    assert decode.configs(problem(queries=8), H200)[0] == decode._SPLIT
    assert decode.configs(problem(queries=8, is_batch_invariant=True), H200)[0] == decode._MEASURED[128][32]


@pytest.mark.parametrize("queries", [1, 8, 16])
def test_the_measured_row_for_8_bits_comes_first(queries):
    p = problem(64, queries=queries, cache_dtype=torch.float8_e4m3fn)
    assert decode.configs(p, H200)[0] == decode._8_BIT[max(16, 4 * queries)]


def test_8_bits_in_few_programs_have_a_row_of_their_own():
    p = problem(cache_dtype=torch.float8_e4m3fn)
    assert decode.configs(p, H200)[0] == decode._8_BIT_ALONE
    assert decode.configs(p._replace(page_size=16), H200)[0] == decode._8_BIT[16]
    assert decode.configs(p._replace(is_batch_invariant=True), H200)[0] == decode._8_BIT[16]


def test_the_measured_row_for_small_pages_comes_first():
    assert decode.configs(problem(page_size=1), H200)[0] == decode._SMALL_PAGES
    for page in (1, 8, 16):
        assert decode.configs(problem(64, page_size=page), H200)[0] == decode._MANY_SMALL_PAGES
    for batch, page in ((16, 16), (64, 32)):
        assert decode.configs(problem(batch, page_size=page), H200)[0] == decode._MEASURED[128][16]


def test_tiles_stay_below_a_warpgroup_where_it_may_miss_its_keys():
    p = problem(64, queries=16)
    assert decode.configs(p, H200, is_aligned=False)[0].block_m == 32
    assert decode.configs(p, Device("cuda100", 227 * 1024, 132), is_aligned=False)[0].block_m == 64
    assert decode.configs(problem(64, d=64, queries=16, cache_dtype=torch.float8_e4m3fn), H200)[0].block_m == 32


@pytest.mark.parametrize("batch", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_a_larger_cache_shares_keys_out_alike(batch, is_batch_invariant):
    found = []
    for keys in (1024, 8192, 1 << 20):
        p = problem(batch, keys, is_batch_invariant=is_batch_invariant)
        config = decode.configs(p, H200)[0]
        split = decode.splits(p, H200, config)
        tiles = -(-keys // config.block_n)
        share = max(-(-tiles // split.number), split.least_tiles)
        assert split.launched * share >= tiles, "some keys would belong to no program"
        found.append((config, split.number, split.least_tiles))
    assert len(set(found)) == 1


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("page", [0, 16])
def test_the_batch_decides_nothing_where_it_must_not(cache_dtype, queries, page):
    found = set()
    for batch in (1, 7, 64, 1000):
        p = problem(batch, queries=queries, page_size=page, cache_dtype=cache_dtype, is_batch_invariant=True)
        config = decode.configs(p, H200)[0]
        found.add((config, decode.splits(p, H200, config)))
    assert len(found) == 1


def test_a_number_that_is_asked_for_is_taken():
    p = problem(num_splits=5)
    assert decode.splits(p, H200, decode.configs(p, H200)[0]).number == 5


def test_many_queries_split_keys_only_where_the_device_would_idle():
    assert decode.is_decode(problem(queries=512, heads=4, heads_k=4), H200)
    assert not decode.is_decode(problem(batch=32, queries=512), H200)
    assert not decode.is_decode(problem(queries=512, heads=4, heads_k=4, is_batch_invariant=True), H200)
