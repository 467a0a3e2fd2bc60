"""Masks: padding on either side, documents in one row, windows, blocks, and any matrix, each checked.

PyTorch gets the same mask as a boolean matrix; here only the last call holds one.

python examples/custom_mask_padding.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attention import flash_attention
from flash_attn_plus import attention, block_sparse_attention

SEQLEN = 256


def check(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rows: Tensor | None = None) -> None:
    """Compare with PyTorch under the matrix `visible`, in all rows or in those that count."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
    rows = torch.ones_like(out[..., 0, 0], dtype=torch.bool) if rows is None else rows
    out, expected = out[rows], expected[rows]
    difference = ((out - expected).norm() / expected.norm()).item()
    assert difference < (0.02 if out.dtype == torch.bfloat16 else 1e-5), "more than rounding"
    share = visible.float().mean().item()
    print(f"{name:<28} {share:>4.0%} of the scores visible, difference {difference:.1e}")


def main() -> None:
    """One call for each kind of mask."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, SEQLEN, 4, 64, device=device, dtype=dtype) for _ in range(3))
    bhsd = [x.transpose(1, 2) for x in (q, k, v)]
    position = torch.arange(SEQLEN, device=device)
    causal = position <= position[:, None]  # (query, key)

    # Padding: True where a token takes part. With `causal`, padding may be on the left, as generation has it.
    for side, keep in (
        ("right", position < torch.tensor([[200], [31]], device=device)),
        ("left", position >= torch.tensor([[56], [225]], device=device)),
    ):
        out = flash_attention(*bhsd, keep, causal=True).transpose(1, 2)
        check(f"{side} padding, causal", out, q, k, v, causal & keep[:, None, None, :], keep)

    # Documents packed into one row: tokens see their own document only.
    starts = torch.tensor([0, 100, 130, SEQLEN], device=device, dtype=torch.int32)
    one = [x[0] for x in (q, k, v)]
    out = attention(*one, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=126, max_seqlen_k=126)
    document = torch.bucketize(position, starts[1:], right=True)
    same = document == document[:, None]
    check("documents, causal", out[None], q[:1], k[:1], v[:1], (causal & same)[None, None])

    # A window: 32 keys before each token, and 8 behind it.
    near = (position - position[:, None] >= -32) & (position - position[:, None] <= 8)
    check("window (32, 8)", attention(q, k, v, window_size=(32, 8)), q, k, v, near[None, None])

    # Blocks of 64 x 64, of any pattern: here a prefix that all see, and each block itself, causal on the diagonal.
    blocks = torch.eye(4, dtype=torch.bool, device=device)
    blocks[:, 0] = True
    out = block_sparse_attention(q, k, v, blocks[None], block_size=(64, 64), causal=True)
    visible = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1) & causal
    check("blocks: prefix and diagonal", out, q, k, v, visible[None, None])

    # Blocks of one score: any mask at all, as a matrix of bools, one for each head.
    anything = (torch.rand(4, SEQLEN, SEQLEN, device=device) < 0.3) | torch.eye(SEQLEN, dtype=torch.bool, device=device)
    check("any matrix", block_sparse_attention(q, k, v, anything, block_size=(1, 1)), q, k, v, anything[None])


if __name__ == "__main__":
    main()
