"""One attention call three ways: checked against PyTorch, with gradients, and with its backend explained.

python examples/basic_usage.py
"""

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func
from torch import Tensor

from flash_attn_plus import attention, explain

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding."""
    return bool((a - b).norm() <= (0.02 if a.dtype == torch.bfloat16 else 1e-5) * b.norm())


def compare_with_pytorch(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Causal attention, 8 query heads on 2 key heads: (batch, seqlen, heads, head_dim) in and out."""
    out = flash_attn_func(q, k, v, causal=True)
    swapped = (x.transpose(1, 2) for x in (q, k, v))  # PyTorch's own wants (batch, heads, seqlen, head_dim)
    expected = F.scaled_dot_product_attention(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)
    difference = (out - expected).abs().max().item()
    print(f"causal attention {tuple(out.shape)}: largest difference from PyTorch's {difference:.1e}")
    assert close(out, expected)


def train_one_step(q: Tensor, k: Tensor, v: Tensor) -> None:
    """A sliding window, dropout and softmax scale in one call, then the gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, dropout_p=0.1, softmax_scale=0.1, causal=True, window_size=(127, 0))
    out.square().mean().backward()
    shapes = ", ".join(f"d{name} {tuple(x.grad.shape)}" for name, x in zip("qkv", leaves, strict=True))
    print(f"gradients of a window of 128 keys with dropout: {shapes}")


def merge_two_halves(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The engine's own call also returns the log-sum-exp, by which attention over parts adds up to the whole."""
    whole = attention(q, k, v)
    (out1, lse1), (out2, lse2) = (
        attention(q, *half, return_lse=True) for half in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True)
    )
    weight = torch.sigmoid(lse1 - lse2).transpose(1, 2)[..., None]  # lse is (batch, heads, seqlen)
    merged = (out1 * weight + out2 * (1 - weight)).to(whole.dtype)
    print(f"two halves merged: largest difference from the whole {(merged - whole).abs().max().item():.1e}")
    assert close(merged, whole)


def main() -> None:
    """Run all three on the same tensors."""
    torch.manual_seed(0)
    q = torch.randn(2, 512, 8, 64, device=device, dtype=dtype)
    k, v = (torch.randn(2, 512, 2, 64, device=device, dtype=dtype) for _ in range(2))
    compare_with_pytorch(q, k, v)
    train_one_step(q, k, v)
    merge_two_halves(q, k, v)
    print("which backend serves the call, and why the others do not:")
    print(explain(q, k, v, causal=True))


if __name__ == "__main__":
    main()
