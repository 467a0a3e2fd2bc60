"""The lists that the kernels walk name a tile once if the band and a visible block reach it, and know the full ones."""

import pytest
import torch

from flash_attn_plus.backends import triton_blocks
from flash_attn_plus.backends.triton_launch import features
from flash_attn_plus.reference import shown_by_blocks, visible
from flash_attn_plus.testing import Case, make_inputs
from flash_attn_plus.tuning.config import TileConfig

TILE = 64
CASES = {
    "whole": Case(seqlen_q=300, seqlen_k=420, block_size=(64, 128), blocks="shared"),
    "whole_causal": Case(seqlen_q=300, seqlen_k=420, block_size=(64, 64), blocks="shared", right=0),
    "cut": Case(seqlen_q=130, seqlen_k=500, block_size=(16, 256), blocks="shared", right=0),
    "cut_window": Case(seqlen_q=300, seqlen_k=200, block_size=(100, 7), blocks="shared", left=90, right=30),
    "dense_blocks": Case(seqlen_q=200, seqlen_k=300, block_size=(20, 24), blocks="shared", block_density=0.9),
    "longer_than_a_chunk": Case(seqlen_q=64, seqlen_k=64 * 600, head_dim=1, block_size=(64, 64), blocks="shared"),
}


def tiles_of(band: torch.Tensor, shown: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """(full, partial) tiles for every tile of rows, from the scores that the band and the blocks let through."""
    found = []
    for start in range(0, len(band), TILE):
        here = slice(start, start + TILE)
        tiles = list(zip(*(x[here].split(TILE, 1) for x in (band, shown)), strict=True))
        whole = [bool((a & b).all()) and a.shape[1] == TILE for a, b in tiles]
        some = [bool(a.any() and b.any()) for a, b in tiles]
        numbers = range(len(tiles))
        found.append(([i for i in numbers if whole[i]], [i for i in numbers if some[i] and not whole[i]]))
    return found


@pytest.mark.parametrize("is_by_keys", [False, True], ids=["by_queries", "by_keys"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lists(case, is_by_keys, device):
    if is_by_keys:
        case = case._replace(seqlen_q=case.seqlen_k, seqlen_k=case.seqlen_q)
    call = make_inputs(case, torch.float32, device)
    problem, x = call.problem(), call.inputs
    config, switches, blocks = triton_blocks.prepare(
        problem, x, features(problem, x), TileConfig(TILE, TILE, 4, 1), is_by_keys
    )
    assert (config.block_m, config.block_n) == (TILE, TILE)
    assert switches.has_cut_blocks == any(size % TILE for size in case.block_size)
    band = visible(case.seqlen_q, case.seqlen_k, case.left, case.right, x.q.device)
    shown = shown_by_blocks(x.block_mask[0, 0], case.block_size, case.seqlen_q, case.seqlen_k)
    expected = tiles_of(band.t(), shown.t()) if is_by_keys else tiles_of(band, shown)
    lists = blocks.lists_ptr[0, 0].tolist()
    assert len(lists) == len(expected)
    for (full, partial, *numbers), (whole, cut) in zip(lists, expected, strict=True):
        assert numbers[:full] == whole
        assert numbers[::-1][:partial] == cut


def test_tiles_are_made_to_fit_blocks(device):
    call = make_inputs(CASES["whole"], torch.float32, device)
    problem, x = call.problem(), call.inputs
    config, *_ = triton_blocks.prepare(problem, x, features(problem, x), TileConfig(128, 128, 8, 3), False)
    assert config == TileConfig(64, 128, 4, 3)
