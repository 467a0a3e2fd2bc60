"""The same self-attention on PyTorch's SDPA, on flash-attn's interface and on the flash_attention modules.

All three are given the same weights and must agree, in outputs and gradients.

python examples/migration_guide.py
"""

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_qkvpacked_func
from torch import Tensor, nn

from flash_attention import FlashAttention

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 300, 4, 64


class SelfAttention(nn.Module):
    """Projections around an attention core; the cores below are what a migration changes."""

    def __init__(self, core) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, features) in and out; the core takes and returns (batch, seqlen, ..., heads, head_dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM))
        return self.out(self.core(qkv).flatten(-2))


def with_sdpa(qkv: Tensor) -> Tensor:
    """PyTorch: (batch, heads, seqlen, head_dim), so two transpositions."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def with_flash_attn(qkv: Tensor) -> Tensor:
    """flash-attn's interface: the packed projection goes in as it is."""
    return flash_attn_qkvpacked_func(qkv, causal=True)


class WithModules(nn.Module):
    """The flash_attention package: a module, in PyTorch's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FlashAttention(causal=True)

    def forward(self, qkv: Tensor) -> Tensor:
        """The options stand in the constructor, so nothing but tensors is passed."""
        return self.attention(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)


def main() -> None:
    """Run each on the same input and weights, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(BATCH, SEQLEN, HEADS * HEAD_DIM, device=device, dtype=dtype)
    cores = {"SDPA": with_sdpa, "flash_attn": with_flash_attn, "flash_attention": WithModules()}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, core in cores.items():
        torch.manual_seed(1)
        model = SelfAttention(core).to(device, dtype)
        out = model(x)
        (gradient,) = torch.autograd.grad(out.float().square().mean(), [model.qkv.weight])
        results[name] = (out, gradient)
        pairs = zip(results[name], results["SDPA"], strict=True)
        parts = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        print(f"{name:<16} output and gradient differ from SDPA's by {parts[0]:.1e} and {parts[1]:.1e}")
        assert max(parts) < (0.02 if dtype == torch.bfloat16 else 1e-5), "more than rounding"


if __name__ == "__main__":
    main()
