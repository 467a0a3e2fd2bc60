"""Mixed precision and activation checkpointing: the same model, the same loss, fewer bytes kept for the backward pass.

Attention follows autocast, and keeps no matrix of scores anyway; checkpointing then drops whole blocks.

python examples/mixed_precision_and_checkpointing.py
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attention import MultiHeadFlashAttention

WIDTH, HEADS, LAYERS, SEQLEN = 128, 4, 4, 256


class Block(nn.Module):
    """Attention with dropout, and an MLP, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = MultiHeadFlashAttention(WIDTH, HEADS, causal=True, dropout=0.1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) in and out."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


def step(blocks: nn.ModuleList, x: Tensor, dtype: torch.dtype, is_checkpointed: bool) -> tuple[float, int, Tensor]:
    """One forward and backward pass; the loss, bytes kept between the two, and a gradient in float32."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in blocks.parameters()}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    torch.manual_seed(1)  # the same dropout in every run; checkpointing restores it for its second forward pass
    blocks.zero_grad()
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == torch.float16)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
    ):
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False) if is_checkpointed else block(y)
        loss = y.float().square().mean()
    scaler.scale(loss).backward()
    gradient = blocks[0].attention.q_proj.weight.grad / scaler.get_scale()
    return loss.item(), sum(kept.values()), gradient


def main() -> None:
    """Compare float32, mixed precision, and both with checkpointing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(LAYERS)).to(device)
    x = torch.randn(4, SEQLEN, WIDTH, device=device)
    exact = step(blocks, x, torch.float32, False)[2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for is_checkpointed in (False, True):
            loss, kept, gradient = step(blocks, x, dtype, is_checkpointed)
            error = ((gradient - exact).norm() / exact.norm()).item()
            name = f"{str(dtype).removeprefix('torch.')}{', checkpointed' if is_checkpointed else ''}"
            print(f"{name:<22} loss {loss:.4f}  kept {kept / 1e6:6.1f} MB  gradient off by {error:.1e}")


if __name__ == "__main__":
    main()
