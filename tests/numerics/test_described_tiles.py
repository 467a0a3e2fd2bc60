"""The portable kernels over tiles that come through descriptors, which only Hopper takes by itself."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from serving import run_directly, test_device

from flash_attn_plus import selection
from flash_attn_plus.backends import triton_descriptors
from flash_attn_plus.device import Device
from flash_attn_plus.testing import Case
from flash_attn_plus.tuning import heuristics, table
from flash_attn_plus.tuning.config import TileConfig

ON_CPU = test_device() == "cpu"
TILE = 16 if ON_CPU else 64
SHORT, LONG = TILE + 5, 2 * TILE + 10
BASE = Case(batch=2, seqlen_q=SHORT, seqlen_k=LONG, heads=2, heads_k=1, head_dim=16 if ON_CPU else 64)
CASES = {
    "full": BASE,
    "full_one_tile": BASE._replace(seqlen_k=TILE - 3),
    "full_two_tiles": BASE._replace(seqlen_k=TILE + 1),
    "causal_without_keys": BASE._replace(seqlen_q=LONG, seqlen_k=3, right=0),
    "full_whole_tiles": BASE._replace(seqlen_q=2 * TILE, seqlen_k=3 * TILE),
    "causal": BASE._replace(right=0),
    "causal_tall": BASE._replace(seqlen_q=LONG, seqlen_k=SHORT, right=0),
    "window": BASE._replace(left=TILE, right=9),
    "window_left": BASE._replace(seqlen_q=LONG, left=13),
    "whole_tiles": BASE._replace(seqlen_q=2 * TILE, seqlen_k=2 * TILE, right=0),
    "narrow_heads": BASE._replace(head_dim=BASE.head_dim - 8, right=0),
    "one_head": BASE._replace(batch=1, heads=1, heads_k=1, right=0),
    "transposed": BASE._replace(layout="transposed", right=0),
    "sliced": BASE._replace(layout="sliced"),
    "scale_negative": BASE._replace(softmax_scale=-0.3, right=0),
    "expanded": BASE._replace(heads=4, heads_k=2, layout="expanded", right=0),
}
SPLIT = {"split": BASE._replace(right=0), "split_full": BASE}


def check(case: Case, device: str, is_split: bool, is_ahead: bool) -> int:
    """Hold the passes to the tolerance rule; how many tensors were described."""
    config = TileConfig(TILE, TILE, 4, 2, by_descriptor=True)
    described = mock.Mock(side_effect=triton_descriptors.described)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_descriptors, "described", described))
        if not is_ahead:
            stack.enter_context(mock.patch.object(heuristics, "is_ahead", return_value=False))
        for kernel in table.KERNELS:
            stack.enter_context(table.only(kernel, config._replace(is_split=is_split and kernel == "dkdv")))
        run_directly(selection.get("triton"), case, torch.float16, device, with_backward=True)
    return described.call_count


@pytest.mark.parametrize("name", [*CASES, *SPLIT])
def test_tiles(name: str, device: str):
    case, is_split = (CASES | SPLIT)[name], name in SPLIT
    # The copy engine takes neither odd strides nor strides of 0.
    assert check(case, device, is_split, True) == (0 if case.layout in {"sliced", "expanded"} else 7)


@pytest.mark.parametrize("name", ["full", "causal", "window", "narrow_heads"])
def test_products_in_turn(name: str, device: str):
    assert check(CASES[name], device, False, False) == 6


def test_products_are_asked_for_ahead_where_two_tiles_of_them_fit():
    plain = BASE._replace(head_dim=128).problem(torch.bfloat16)
    tiles = TileConfig(64, 64, 4, 3, by_descriptor=True)
    assert heuristics.is_ahead(plain, tiles)
    assert heuristics.is_ahead(plain._replace(head_dim=64), tiles)
    assert not heuristics.is_ahead(plain._replace(head_dim_v=256), tiles)
    assert not heuristics.is_ahead(plain._replace(has_softcap=True), tiles)
    assert not heuristics.is_ahead(plain, tiles._replace(block_n=128))
    assert not heuristics.is_ahead(plain, tiles._replace(by_descriptor=False))


def test_long_plain_calls_of_16_bits_take_them_before_others():
    hopper = Device("cuda90", 227 * 1024, 132)
    plain = Case(batch=1, seqlen_q=2048, seqlen_k=2048, heads=8, heads_k=8, head_dim=128).problem(torch.bfloat16)
    features = ("has_softcap", "has_alibi", "has_dropout", "has_block_mask", "is_varlen_q", "is_varlen_k")
    others = [plain._replace(**{name: True}) for name in features]
    others += [plain._replace(dtype=torch.float32), plain._replace(head_dim_v=64), plain._replace(seqlen_q=128)]
    for kernel in (heuristics.forward, heuristics.dkdv, heuristics.dq):
        first, *rest = kernel(plain, hopper)
        assert first.by_descriptor
        assert rest
        assert not any(c.by_descriptor for p in others for c in (*rest, *kernel(p, hopper)))
        assert not any(c.by_descriptor for c in kernel(plain, hopper._replace(family="cuda100")))
