"""What sums of dq in the Hopper backward kernel rest on: how many parts a tile of queries has, and counters at 0."""

from random import Random
from types import SimpleNamespace

import pytest
import torch

from flash_attn_plus.kernels.gluon import band as band_kernels
from flash_attn_plus.kernels.gluon.backward_ends import COLS, LOG2E, attention_prepare_kernel


@pytest.fixture
def plain(monkeypatch):
    """Functions of bands on numbers, called as (name, band, arguments)."""
    where = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, where=lambda is_a, a, b: a if is_a else b
    )
    monkeypatch.setattr(band_kernels, "gl", where)

    def call(name, band, *arguments):
        return getattr(band_kernels.Band, name).fn(band, *arguments)

    return call


def band_of(plain, len_q, len_k, left, right):
    band = SimpleNamespace(len_q=len_q, len_k=len_k, left=left, right=right, has_left=left >= 0, has_right=right >= 0)
    band.key_tiles = lambda *arguments: plain("key_tiles", band, *arguments)
    return band


@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (128, 128)])
@pytest.mark.parametrize("sides", [(False, False), (False, True), (True, True), (True, False)])
def test_a_tile_of_queries_has_as_many_parts_as_tiles_of_keys_name_it(plain, sides, rows, cols):
    random = Random(0)
    for _ in range(300):
        lengths = random.choice((0, random.randint(0, 1000))), random.choice((0, 1, random.randint(0, 1000)))
        band = band_of(plain, *lengths, *(random.choice((0, 1, 64, 300)) if has else -1 for has in sides))
        parts = [0] * -(-lengths[0] // rows)
        for col0 in range(0, lengths[1], cols):
            first, _, end = plain("query_tiles", band, col0, cols, rows)
            for tile in range(first, end):
                parts[tile] += 1
        assert [plain("parts", band, tile * rows, rows, cols) for tile in range(len(parts))] == parts, vars(band)


@pytest.mark.parametrize("scale", [None, 0.125, -3.0])
@pytest.mark.parametrize("lengths", [None, (70, 0, 130, 5)])
@pytest.mark.parametrize(("head_dim", "width", "align"), [(40, 64, 128), (96, 128, 64)])
def test_statistics_and_counters_of_parts(head_dim, width, align, lengths, scale):
    """As many as tiles; what no tile has is left alone. With a scale, statistics are terms."""
    heads, longest = 2, max(lengths or (150,))
    batch = len(lengths or (1, 2))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else None
    height = -(-(starts[-1] + batch * align if starts else longest) // align) * align
    lines = heads if lengths else batch * heads
    shape = (starts[-1], heads, head_dim) if starts else (batch, longest, heads, head_dim)
    out, dout = torch.randn(shape), torch.randn(shape)
    strides = (0, *out.stride()[:2]) if starts else out.stride()[:3]
    lse = 100 * torch.randn(heads, starts[-1]) if starts else 100 * torch.randn(batch, heads, longest)
    lse[..., 3] = torch.inf
    delta, statistics = torch.full_like(lse, torch.nan), torch.full((2, lines, height), torch.nan)
    if scale is not None:
        statistics = torch.full((lines, height, COLS.value), torch.nan, dtype=torch.bfloat16)
    parts = torch.full((lines, height // align), 7, dtype=torch.int32)
    cu = torch.tensor(starts, dtype=torch.int32) if starts else None
    grid = (-(-longest // align) * (align // 32) * heads * batch,)
    attention_prepare_kernel[grid](
        out, dout, lse, None, delta, statistics, parts, cu, *strides, *strides, lse.shape[-1], lines, height, longest,
        heads, 1 / (scale or 1), HEAD_DIM=head_dim, BLOCK_D=width, ROWS=32, ALIGN=align,
    )  # fmt: skip
    expected = (out * dout).sum(-1).transpose(-1, -2)
    torch.testing.assert_close(delta, expected)
    used = torch.zeros(height, dtype=torch.bool)
    weighed = lse * LOG2E.value
    if scale is not None:
        assert statistics[:, :, 6:].nan_to_num(0).eq(0).all()
        statistics = torch.stack([statistics[..., at : at + 3].double().sum(-1) for at in (0, 3)])
        weighed = (lse.double() / scale).clamp(-1e30, 1e30)
    for i, length in enumerate(lengths or (longest,)):
        first = (starts[i] + i * align) // align * align if starts else 0
        end = first + -(-length // align) * align
        used[first:end] = True
        at = slice(starts[i], starts[i] + length) if starts else slice(None)
        rows = slice(first, first + length)
        for found, value in zip(statistics, (weighed, expected), strict=True):
            value = value[..., at].flatten(0, -2).to(found.dtype)
            torch.testing.assert_close(found[:, rows], value, rtol=1e-6, atol=1e-5)
        assert statistics[0, :, first + length : end].mul(scale or 1).ge(1e29).all()
    assert statistics[:, :, ~used].isnan().all()
    assert parts.eq(torch.where(used[::align], 0, 7)).all()
