"""A pre-norm transformer block on MultiHeadFlashAttention: grouped heads, rotary positions, a sliding window.

It learns to repeat a random sequence, which a model without working attention cannot do.

python examples/transformer_block.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attention import MultiHeadFlashAttention

VOCABULARY, WIDTH, HALF = 32, 64, 16


class Block(nn.Module):
    """Attention and a gated MLP, each normalised before and added after."""

    def __init__(self, width: int, heads: int, kv_heads: int, window: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = MultiHeadFlashAttention(
            width, heads, kv_heads, causal=True, bias=False, rotary_dim=width // heads, window_size=(window, 0)
        )
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) in and out."""
        x = x + self.attention(self.norm1(x))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Two blocks between an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, heads=4, kv_heads=2, window=HALF + 4) for _ in range(2)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocabulary)."""
        return self.head(self.blocks(self.embedding(tokens)))


def train(model: nn.Module, device: str, steps: int = 60) -> float:
    """Train on HALF random tokens followed by the same again; the share of the second half that comes out right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        half = torch.randint(VOCABULARY, (64, HALF), device=device)
        tokens = torch.cat((half, half), dim=1)
        logits = model(tokens[:, :-1])[:, HALF - 1 :]  # only the repetition can be foretold
        loss = F.cross_entropy(logits.flatten(0, 1), half.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step:>4}: loss {loss.item():.3f}")
    return (logits.argmax(-1) == half).float().mean().item()


def main() -> None:
    """Train, and say how much was repeated right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    share = train(Model().to(device), device)
    print(f"{share:.1%} of the repeated tokens are right")


if __name__ == "__main__":
    main()
