"""The decode kernel of Hopper's copy engine compiles as its launcher would launch it, within what a processor has."""

import pytest
import torch
from gluon_harness import HOPPER, inspect
from harness import SHARED_MEMORY, recorded

from flash_attn_plus.backends import gluon_decode
from flash_attn_plus.kernels.gluon import decode as kernels
from flash_attn_plus.problem import AttentionInputs, describe


def launches(batch=1, queries=1, heads=32, heads_k=8, right=-1, **options):
    """A decode step over sequences of 8,192 keys."""
    q = torch.empty(batch, queries, heads, 128, dtype=torch.bfloat16)
    k = torch.empty(1, 1, heads_k, 128, dtype=torch.bfloat16).expand(batch, 8192, heads_k, 128)
    k = k.new_empty(batch * 8192 * heads_k * 128).view(k.shape)
    inputs = AttentionInputs(q, k, k, 128**-0.5, seqused_k=torch.zeros(batch, dtype=torch.int32), **options)
    with recorded(kernels, ("attention_decode_kernel",), HOPPER) as found:
        plan = gluon_decode.plan(describe(inputs, 0, 0, -1, right), inputs)
        if plan is not None:
            plan(inputs, torch.empty_like(q), torch.empty(batch, heads, queries))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 8},
        {"batch": 12},
        {"queries": 2, "right": 0},
        {"batch": 3, "heads": 8, "queries": 2},
        {"batch": 5},
        {"batch": 20},
        {"batch": 100},
        {"queries": 3, "right": 0},
        {"queries": 8, "right": 0},
        {"heads_k": 1},
        {"heads_k": 1, "batch": 90},
        {"batch": 40},
    ],
    ids=str,
)
def test_it_fits_without_spills(options):
    (launch,) = launches(**options)
    found = inspect(launch)
    assert found.shared <= SHARED_MEMORY[HOPPER]
    assert found.warnings == []
    assert "LDL" not in found.assembly
    assert "STL" not in found.assembly
    (loop,) = found.loops
    keys, groups = launch.args[1].block_shape[-2], launch.options["num_warps"] // 4
    assert sum("HGMMA" in line for line in loop) * groups == keys // 4  # of scores and outputs, 64 by 16 each
    assert sum("UTMALDG" in line for line in loop) == 2  # of keys and values


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"alibi_slopes": torch.ones(32)},
        {"queries": 9},
        {"queries": 3, "batch": 5},
        {"queries": 3, "batch": 11},
        {"batch": 49},
        {"leftpad_k": torch.zeros(1)},
    ],
    ids=str,
)
def test_what_it_leaves_to_the_portable_kernel(options):
    assert launches(**options) == []
