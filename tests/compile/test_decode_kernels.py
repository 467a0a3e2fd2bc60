"""The kernels of caches compile for every declared target, as their launchers would launch them there."""

from unittest import mock

import pytest
import torch
from harness import SHARED_MEMORY, TARGETS, Launch, compile_launch, recorded, report, stray_products

from flash_attn_plus import device
from flash_attn_plus.backends import gluon_decode, triton_decode
from flash_attn_plus.cache_append import plan
from flash_attn_plus.cache_checks import CacheCall
from flash_attn_plus.kernels.triton import cache_append as append_kernels
from flash_attn_plus.kernels.triton import decode as decode_kernels
from flash_attn_plus.problem import AttentionInputs, describe

E4M3 = torch.float8_e4m3fn
DECODE = ("attention_split_kernel",)


def launches(
    target, queries=1, heads=32, heads_k=8, d=128, dv=0, page=0, dtype=torch.bfloat16, cache_dtype=None, start=0
):
    """A decode step: one sequence of 8,192 keys, so that they are split; caches start at that many elements."""
    q = torch.empty(1, queries, heads, d, dtype=dtype)
    size = page or 8192
    k, v = (
        torch.empty(8192 * heads_k * n + start, dtype=cache_dtype or dtype)[start:].view(-1, size, heads_k, n)
        for n in (d, dv or d)
    )
    table = torch.zeros(1, 8192 // page, dtype=torch.int32) if page else None
    factor = None if cache_dtype is None else torch.ones(heads_k)
    inputs = AttentionInputs(
        q, k, v, d**-0.5, seqused_k=torch.zeros(1, dtype=torch.int32), block_table=table, k_descale=factor,
        v_descale=factor,
    )  # fmt: skip
    with recorded(decode_kernels, DECODE, target) as found, mock.patch.object(gluon_decode, "plan", return_value=None):
        triton_decode.SplitPlan(describe(inputs, 0, 0, -1, 0)._replace(cache_dtype=cache_dtype), inputs)(
            inputs, q.new_empty(1, queries, heads, dv or d), torch.empty(1, heads, queries)
        )
    assert [launch.kernel.__name__ for launch in found] == list(DECODE)
    return found


def check(target: str, launch: Launch, may_spill: bool = False) -> None:
    found = report(compile_launch(launch, target))
    name = launch.kernel.__name__
    assert found.shared <= SHARED_MEMORY[target], f"{name} uses {found.shared} bytes of shared memory"
    assert may_spill or found.spills == 0, f"{name} spills {found.spills} registers with {launch.options}"


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_one_query_without_spills(target, d):
    for launch in launches(target, d=d):
        check(target, launch)


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 8},
        {"queries": 4, "heads_k": 1},
        {"page": 16},
        {"page": 16, "queries": 8},
        {"d": 256},
        {"d": 512},
        {"dtype": torch.float32},
        {"cache_dtype": E4M3},
        {"cache_dtype": E4M3, "queries": 16, "page": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:90", "hip:gfx942"])
def test_variants_fit(target, options):
    if "cache_dtype" in options and target not in ("cuda:89", "cuda:90"):
        pytest.skip("the backend refuses 8-bit caches there")
    for launch in launches(target, **options):
        check(target, launch, may_spill=options.get("d") == 512 or "dtype" in options)


@pytest.mark.parametrize(
    "options",
    [
        {"d": 33, "dv": 1, "page": 16},
        {"d": 64, "dv": 16, "start": 1},
        {"d": 64, "cache_dtype": E4M3},
        {"d": 128, "dv": 64, "cache_dtype": E4M3},
        {"d": 128, "cache_dtype": E4M3},
        {"d": 64, "dv": 16},
    ],
    ids=str,
)
def test_products_of_many_queries_find_their_keys(options):
    for launch in launches("cuda:90", queries=16, **options):
        assert stray_products(report(compile_launch(launch, "cuda:90")).assembly) == []


@pytest.mark.parametrize("target", TARGETS)
def test_append(target, monkeypatch):
    q, new = torch.empty(2, 4, 32, 128, dtype=torch.bfloat16), torch.empty(2, 4, 8, 128, dtype=torch.bfloat16)
    cache, tables = torch.empty(64, 16, 8, 128, dtype=torch.bfloat16), torch.empty(512, 32, dtype=torch.bfloat16)
    lengths, pages = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 32, dtype=torch.int32)
    call = CacheCall(
        q, cache, cache, new, new, tables, tables, lengths, None, None, pages, None, None, None, 1.0, -1, 0, 0.0,
        False, 0,
    )  # fmt: skip
    monkeypatch.setattr("flash_attn_plus.cache_append.uses_triton", lambda _: True)
    with recorded(append_kernels, ("cache_append_kernel",), target) as found:
        plan(call)(call, pages)
    for launch in found:
        check(target, launch)


def test_8_bit_keys_become_float16_in_one_instruction():
    split = launches("cuda:90", cache_dtype=E4M3)[0]
    assert "F2FP.F16.E4M3.UNPACK" in report(compile_launch(split, "cuda:90")).assembly


def test_whether_a_device_reads_8_bit_caches():
    assert device.reads_e4m3(torch.device("cpu"))
