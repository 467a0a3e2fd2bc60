"""What stands around the Hopper backward kernel, in the interpreter: sums in the order of registers become rows."""

import pytest
import torch
from torch import Tensor

from flash_attn_plus.kernels.gluon.backward_ends import attention_round_dq_kernel


def as_held(rows: Tensor) -> Tensor:
    """Tiles of 64 x 64 of (lines, rows, columns), each in the order in which a warpgroup's registers hold it."""
    lines, height, width = rows.shape
    tiles = rows.view(lines, height // 64, 4, 2, 8, width // 64, 8, 4, 2)  # tile, warp, half, row; tile, 8 columns
    return tiles.permute(0, 1, 5, 2, 6, 4, 7, 3, 8).reshape(-1)


@pytest.mark.parametrize("lengths", [None, (70, 0, 130, 5)])
@pytest.mark.parametrize(("head_dim", "width", "align"), [(40, 64, 128), (64, 64, 128), (96, 128, 64), (128, 128, 64)])
def test_sums_in_the_order_of_registers_are_rounded_into_rows(head_dim, width, align, lengths):
    heads, scale, longest = 2, 0.5, max(lengths or (150,))
    batch = len(lengths or (1, 2))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else None
    height = -(-(starts[-1] + batch * align if starts else longest) // align) * align
    sums = torch.randn(heads if lengths else batch * heads, height, width)
    dq = torch.full((starts[-1], heads, head_dim) if starts else (batch, longest, heads, head_dim), torch.nan)
    strides = (0, *dq.stride()[:2]) if starts else dq.stride()[:3]
    cu = torch.tensor(starts, dtype=torch.int32) if starts else None
    grid = (-(-longest // align) * (align // 32) * heads * batch,)
    attention_round_dq_kernel[grid](
        as_held(sums), dq, cu, *strides, height, longest, heads, scale,
        HEAD_DIM=head_dim, BLOCK_D=width, ROWS=32, ALIGN=align,
    )  # fmt: skip
    found = dq.transpose(-2, -3)
    if not starts:
        expected = sums.view(batch, heads, height, width)[:, :, :longest]
    else:
        firsts = [(start + i * align) // align * align for i, start in enumerate(starts[:-1])]
        expected = torch.cat([sums[:, at : at + n] for at, n in zip(firsts, lengths, strict=True)], 1)
    assert torch.equal(found, expected[..., :head_dim] * scale)
